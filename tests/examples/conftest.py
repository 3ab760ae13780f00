"""What the tests of the example share: one prepared dataset, and a command line that trains for seconds only."""

import pytest
import tensorflow_datasets as tfds

import examples.distill.datasets  # noqa: F401  (registers the builders)
from examples.distill.command_line import main


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with the prepared digits."""
    folder = tmp_path_factory.mktemp("tensorflow_datasets")
    tfds.disable_progress_bar()
    tfds.builder("sklearn_digits", data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


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
def finished(distill, tmp_path_factory):
    """The working directory of a finished run of `kd,dot`; read it, do not write to it."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert distill(workdir) == 0
    return workdir
