"""A finished run that goes on: to more epochs, and with a teacher that is known by its content."""

import json
import pathlib
import shutil
import tarfile

import jax
import numpy as np
import pytest

from examples.distill.command_line import main
from examples.trainer import checkpoint, loop, preemption

pytestmark = pytest.mark.slow


@pytest.fixture
def run(finished, tmp_path):
    """The working directory of a finished run, to be changed."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def _lines(job):
    return [json.loads(line) | {"seconds": None} for line in (job / "metrics.jsonl").read_text().splitlines()]


def test_more_epochs_end_with_the_bits_of_a_longer_run(run, distill, tmp_path, capsys):
    # Results of before did not say for how many epochs.
    result = json.loads((run / "kd" / "result.json").read_text())
    (run / "kd" / "result.json").write_text(json.dumps({k: v for k, v in result.items() if k != "epochs"}))
    flags = ("--config.method=kd", "--config.epochs=8")
    assert distill(run, *flags) == 0
    table = capsys.readouterr().out
    assert "8 epochs" in table and "DOT was trained for 6 epochs" in table
    shutil.copytree(run / "teacher", tmp_path / "whole" / "teacher")
    assert distill(tmp_path / "whole", *flags) == 0
    continued, whole = (checkpoint.load_variables(folder / "kd") for folder in (run, tmp_path / "whole"))
    jax.tree.map(np.testing.assert_array_equal, continued, whole)
    assert _lines(run / "kd") == _lines(tmp_path / "whole" / "kd")
    assert json.loads((run / "kd" / "result.json").read_text())["epochs"] == 8


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--config.epochs=5"], "a run of 6 epochs and cannot go on to 5: a longer run cannot be made a shorter one"),
        (["--config.epochs=8", "--config.optimizer.momentum=0.8"], "optimizer.momentum is 0.9 there and 0.8 here"),
        (["--config.teacher.epochs=3"], "teacher.epochs is 2 there and 3 here"),
    ],
)
def test_what_cannot_go_on(flags, reason, run, distill, capsys):
    assert distill(run, *flags) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert reason in line


def test_a_longer_run_that_has_saved_nothing_is_taken_back(run, distill, monkeypatch, capsys):
    def interrupted(training):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop._Training, "run", interrupted)
    assert distill(run, "--config.epochs=8") == 130
    monkeypatch.undo()
    assert distill(run) == 0
    assert "Nothing left to train." in capsys.readouterr().out


def test_a_longer_run_that_has_saved_is_not_finished(run, distill, monkeypatch, capsys):
    preempted = iter([False] * 5 + [True])
    monkeypatch.setattr(preemption, "watch", lambda: lambda: next(preempted))
    assert distill(run, "--config.epochs=8", "--config.method=kd") == 0
    monkeypatch.undo()
    assert checkpoint.saved_steps(run / "kd")[-1] == 6 * 14 + 5
    assert not checkpoint.has_network(run / "kd")
    assert distill(run) == 1
    assert "cannot go on to 6: a longer run cannot be made a shorter one" in capsys.readouterr().err


def test_a_cosine_schedule_cannot_go_on(distill, tmp_path, capsys):
    flags = ("--config.method=ce", "--config.teacher.train=False", "--config.optimizer.schedule=cosine")
    assert distill(tmp_path / "run", *flags, "--config.epochs=1") == 0
    capsys.readouterr()
    assert distill(tmp_path / "run", *flags, "--config.epochs=2") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "is of a run of 1 epochs and cannot go on to 2: its cosine schedule ended with the last epoch" in line


def test_deepkd_cannot_go_on_but_the_others_beside_it_can(distill, tmp_path, capsys):
    """Unless it compares all classes from the first step on."""
    run, flags = tmp_path / "run", ("--config.teacher.epochs=1", "--config.teacher.model.hidden=(4,)")
    assert distill(run, *flags, "--config.method=dkd,deepkd", "--config.epochs=1") == 0
    capsys.readouterr()
    assert distill(run, *flags, "--config.method=dkd", "--config.epochs=2") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "is of a run of 1 epochs and cannot go on to 2: DeepKD's phases of classes are parts of all epochs" in line
    shutil.rmtree(run / "deepkd")
    assert distill(run, *flags, "--config.method=dkd", "--config.epochs=2") == 0
    printed = capsys.readouterr().out
    assert "The KD loss is the plain one in every column; DKD minimized another" in printed
    first, second = _lines(run / "dkd")
    assert {"task_loss", "kd_loss", "dkd_loss", "task_grad_norm", "dkd_grad_norm", "grad_cosine"} < set(first)
    assert [name for name, value in first.items() if value is None] == ["seconds"]  # of `_lines`
    assert second["dkd_loss"] < first["dkd_loss"]


def test_fields_that_came_later_change_nothing_for_what_does_not_use_them(distill, tmp_path, capsys):
    """A working directory of before DKD, of a config that gives its fields values other than the defaults."""
    run, flags = tmp_path / "run", ("--config.teacher.epochs=1", "--config.teacher.model.hidden=(4,)")
    flags += ("--config.epochs=1", "--config.dkd.beta=6", "--config.deepkd.task_weight=0.5")
    assert distill(run, *flags, "--config.method=kd") == 0
    record = json.loads((run / "config.json").read_text())
    before = {field: value for field, value in record.items() if field.split(".")[0] not in ("dkd", "deepkd")}
    (run / "config.json").write_text(json.dumps(before))
    capsys.readouterr()
    assert distill(run, *flags, "--config.method=kd,dkd") == 0
    assert "kd: " not in capsys.readouterr().err.replace("dkd: ", "")
    assert json.loads((run / "config.json").read_text()) == record
    assert distill(run, *flags, "--config.method=kd,dkd", "--config.dkd.beta=8") == 1
    assert "belongs to another config: dkd.beta is 6.0 there and 8.0 here" in capsys.readouterr().err


def _change(teacher):
    """Moves every weight of a teacher a little."""
    params, rest = checkpoint.load_variables(teacher)
    shutil.rmtree(teacher)
    checkpoint.save_variables(teacher, jax.tree.map(lambda leaf: leaf + 0.01, params), rest)


def test_a_teacher_that_was_replaced_is_refused(finished, distill, tmp_path, capsys):
    shutil.copytree(finished / "teacher", tmp_path / "teacher")
    flag = f"--config.teacher.checkpoint={tmp_path / 'teacher'}"
    assert distill(tmp_path / "run", flag, "--config.method=kd", "--config.epochs=1") == 0
    _change(tmp_path / "teacher")
    capsys.readouterr()
    assert distill(tmp_path / "run", flag, "--config.method=dot", "--config.epochs=1") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert f"the teacher in {tmp_path / 'teacher'} is not the one that kd in --workdir={tmp_path / 'run'} had" in line
    assert not (tmp_path / "run" / "dot").exists()


def test_a_teacher_in_the_working_directory_that_was_replaced_is_refused(run, distill, capsys):
    _change(run / "teacher")
    assert distill(run, "--config.method=ce") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "is not the one that" in line


def test_a_teacher_that_was_moved_is_the_same(finished, distill, tmp_path):
    shutil.copytree(finished / "teacher", tmp_path / "teacher")
    flags = ("--config.epochs=1", f"--config.teacher.checkpoint={tmp_path / 'teacher'}")
    assert distill(tmp_path / "run", *flags, "--config.method=kd") == 0
    (tmp_path / "teacher").rename(tmp_path / "moved")
    flags = ("--config.epochs=1", f"--config.teacher.checkpoint={tmp_path / 'moved'}")
    assert distill(tmp_path / "run", *flags, "--config.method=dot") == 0


def test_a_teacher_of_which_nothing_depends_can_be_replaced(finished, distill, tmp_path):
    shutil.copytree(finished / "teacher", tmp_path / "teacher")
    flags = (f"--config.teacher.checkpoint={tmp_path / 'teacher'}", "--config.method=kd", "--config.epochs=1")
    assert distill(tmp_path / "run", *flags, "--config.optimizer.learning_rate=1e30") == 1  # before it saves anything
    before = json.loads((tmp_path / "run" / "teacher" / "result.json").read_text())
    _change(tmp_path / "teacher")
    assert distill(tmp_path / "run", *flags) == 0
    after = json.loads((tmp_path / "run" / "teacher" / "result.json").read_text())
    assert before["test"]["task_loss"] != after["test"]["task_loss"]


def test_a_working_directory_of_before_is_continued(data_dir, tmp_path, capsys):
    """It was written before the trainer was split off: fields are missing in its record, and epochs in its result.

    KD is finished there, DOT was interrupted after the first of two epochs. The bound: rounding errors of 14 steps on
    another machine, which momenta that were not read would exceed by far.
    """
    with tarfile.open(pathlib.Path(__file__).parent / "data" / "workdir_before_the_trainer.tgz") as archive:
        archive.extractall(tmp_path / "before", filter="data")
    flags = [
        f"--config.dataset.data_dir={data_dir}",
        "--config.devices=1",
        "--config.method=kd,dot",
        "--config.epochs=2",
        "--config.teacher.epochs=1",
        "--config.teacher.model.hidden=(4,)",
        "--config.student.model.hidden=(3,)",
    ]
    [first, _] = _lines(tmp_path / "before" / "dot")
    assert main([f"--workdir={tmp_path / 'before'}", *flags]) == 0
    assert "kd: " not in capsys.readouterr().err
    assert _lines(tmp_path / "before" / "dot")[0] == first
    shutil.copytree(tmp_path / "before" / "teacher", tmp_path / "now" / "teacher")
    assert main([f"--workdir={tmp_path / 'now'}", *flags, "--config.method=dot"]) == 0
    before, now = (checkpoint.load_variables(tmp_path / name / "dot") for name in ("before", "now"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), before, now)
