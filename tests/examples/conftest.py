"""What the tests of the example share: one prepared dataset, and a command line that trains for seconds only."""

import functools
import os
import shutil

import pytest

from examples.distill.command_line import main
from examples.language_model.command_line import main as language_model_main
from tests.language_model import tiny_language_model, write_texts
from tests.runs import DISTILL, Workspace


@pytest.fixture(scope="session")
def workspaces(tmp_path_factory):
    """From a program to the workspace for its runs in processes of their own; all workers of pytest share them."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    return functools.cache(lambda program: Workspace(folder / program.module, program))


@pytest.fixture(scope="session")
def workspace(workspaces):
    """That of `examples.distill`."""
    return workspaces(DISTILL)


@pytest.fixture(scope="session")
def data_dir(workspace):
    """A folder with the prepared digits."""
    return workspace.folder


@pytest.fixture(scope="session")
def distill(data_dir):
    """Runs the command line in this process, with few epochs, and returns its exit code."""

    def run(workdir, *overrides):
        return main(
            [
                f"--workdir={workdir}",
                f"--config.dataset.data_dir={data_dir}",
                "--config.devices=1",
                "--config.epochs=6",
                "--config.checkpoint_every_steps=28",
                "--config.teacher.epochs=2",
                *overrides,
            ]
        )

    return run


@pytest.fixture(scope="session")
def finished(distill, workspace, tmp_path_factory):
    """The working directory of a finished run of `kd,dot`; read it, do not write to it."""
    shared, workdir = workspace.folder / "finished", tmp_path_factory.mktemp("finished") / "run"
    with workspace.one_at_a_time():
        if not (shared / "losses.png").exists():  # the last thing that is written
            assert distill(shared) == 0
    shutil.copytree(shared, workdir)
    return workdir


@pytest.fixture(scope="session")
def texts(workspace):
    """A glob of small files of Python source."""
    folder = workspace.folder / "texts"
    with workspace.one_at_a_time():
        if not folder.exists():
            write_texts(folder)
    return folder / "*.py"


@pytest.fixture(scope="session")
def language_model(texts):
    """Runs the command line in this process, with tiny networks and few steps, and returns its exit code."""

    def run(workdir, *overrides):
        return language_model_main(
            [f"--workdir={workdir}", "--config.devices=1", *tiny_language_model(texts), *overrides]
        )

    return run


@pytest.fixture(scope="session")
def finished_language_model(language_model, workspace, tmp_path_factory):
    """The working directory of a finished run of `kd,dot`; read it, do not write to it."""
    shared, workdir = workspace.folder / "finished_language_model", tmp_path_factory.mktemp("finished") / "run"
    with workspace.one_at_a_time():
        if not (shared / "losses.png").exists():
            assert language_model(shared, "--config.method=kd,dot") == 0
    shutil.copytree(shared, workdir)
    return workdir
