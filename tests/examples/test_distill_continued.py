"""A finished run that goes on: to more epochs, and with a teacher that is known by its content."""

import json
import shutil

import jax
import numpy as np
import pytest

from examples.trainer import checkpoint


def _lines(job):
    return [json.loads(line) | {"seconds": None} for line in (job / "metrics.jsonl").read_text().splitlines()]


def test_more_epochs_end_with_the_bits_of_a_longer_run(finished, distill, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    assert distill(tmp_path / "run", "--config.method=kd", "--config.epochs=8") == 0
    table = capsys.readouterr().out
    assert "8 epochs" in table and "DOT is finished for 6 epochs" in table
    shutil.copytree(finished / "teacher", tmp_path / "whole" / "teacher")
    assert distill(tmp_path / "whole", "--config.method=kd", "--config.epochs=8") == 0
    run, whole = (checkpoint.load_variables(tmp_path / name / "kd") for name in ("run", "whole"))
    jax.tree.map(np.testing.assert_array_equal, run, whole)
    assert _lines(tmp_path / "run" / "kd") == _lines(tmp_path / "whole" / "kd")
    result = json.loads((tmp_path / "run" / "kd" / "result.json").read_text())
    assert result["epochs"] == 8


def test_results_that_do_not_say_their_epochs_are_continued_too(finished, distill, monkeypatch):
    path = finished / "kd" / "result.json"
    result = json.loads(path.read_text())
    del result["epochs"]
    path.write_text(json.dumps(result))
    assert distill(finished, "--config.method=kd", "--config.epochs=7") == 0
    assert [line["epoch"] for line in _lines(finished / "kd")] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--config.epochs=5"], "a run of 6 epochs and cannot go on to 5: a longer run cannot be made a shorter one"),
        (["--config.epochs=8", "--config.optimizer.momentum=0.8"], "optimizer.momentum is 0.9 there and 0.8 here"),
        (["--config.teacher.epochs=3"], "teacher.epochs is 2 there and 3 here"),
    ],
)
def test_what_cannot_go_on(flags, reason, finished, distill, capsys):
    assert distill(finished, *flags) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert reason in line


def test_a_cosine_schedule_cannot_go_on(finished, distill, tmp_path, capsys):
    flags = ("--config.method=kd", "--config.optimizer.schedule=cosine")
    shutil.copytree(finished / "teacher", tmp_path / "run" / "teacher")
    assert distill(tmp_path / "run", *flags, "--config.epochs=1") == 0
    capsys.readouterr()
    assert distill(tmp_path / "run", *flags, "--config.epochs=2") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "is of a run of 1 epochs and cannot go on to 2: its cosine schedule ended with the last epoch" in line


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


def test_a_teacher_in_the_working_directory_that_was_replaced_is_refused(finished, distill, capsys):
    _change(finished / "teacher")
    assert distill(finished, "--config.method=ce") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "is not the one that" in line


def test_a_teacher_that_was_moved_is_the_same(finished, distill, tmp_path):
    shutil.copytree(finished / "teacher", tmp_path / "teacher")
    flags = ("--config.epochs=1", f"--config.teacher.checkpoint={tmp_path / 'teacher'}")
    assert distill(tmp_path / "run", *flags, "--config.method=kd") == 0
    (tmp_path / "teacher").rename(tmp_path / "moved")
    flags = ("--config.epochs=1", f"--config.teacher.checkpoint={tmp_path / 'moved'}")
    assert distill(tmp_path / "run", *flags, "--config.method=ce") == 0


def test_a_teacher_of_which_nothing_depends_can_be_replaced(finished, distill, tmp_path):
    shutil.copytree(finished / "teacher", tmp_path / "teacher")
    flags = (f"--config.teacher.checkpoint={tmp_path / 'teacher'}", "--config.method=kd", "--config.epochs=1")
    assert distill(tmp_path / "run", *flags, "--config.optimizer.learning_rate=1e30") == 1  # before it saves anything
    before = json.loads((tmp_path / "run" / "teacher" / "result.json").read_text())
    _change(tmp_path / "teacher")
    assert distill(tmp_path / "run", *flags) == 0
    after = json.loads((tmp_path / "run" / "teacher" / "result.json").read_text())
    assert before["test"]["task_loss"] != after["test"]["task_loss"]
