"""Bad input: one line on stderr that says what to do, exit code 1, no traceback."""

import subprocess
import sys

import pytest

from examples.distill.__main__ import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=digit"], "error: unknown config 'digit'; known: digits, or the path of a .py file"),
        (["--config=no/such/file.py"], "error: unknown config 'no/such/file.py'; known: digits"),
        (
            ["--config.optimizer.detla=0.05"],
            "error: the config has no field 'optimizer.detla'; did you mean 'optimizer.delta'?",
        ),
        (["--config.zzz", "1"], "error: the config has no field 'zzz'; known: "),
        (["--config.optimizer.drop_epochs=150,x"], "error: bad drop_epochs ('150,x',): give whole numbers"),
        (["--config.epochs=0"], "error: bad --config.epochs=0: it must be at least 1"),
        (["--config.epochs=many"], "--config.epochs=many"),
        (["--confg=digits"], "confg"),
        (["digits"], "error: unexpected argument 'digits'"),
        (["--config.method=dto"], "error: bad --config.method='dto': give one or more of ce, kd, kd_gain_matched, dot"),
        (["--config.dataset.name=no_such_digits"], "error: unknown --config.dataset.name='no_such_digits'"),
        (["--config.dataset.test=exam"], "error: cannot read split 'exam' of dataset 'sklearn_digits'"),
        (["--config.student.model.name=mpl"], "error: unknown model 'mpl'; known: mlp"),
        (["--config.optimizer.delta=0.2"], "error: bad --config.optimizer: "),
        (["--config.batch_size=1000"], "error: batch size 1000 is larger than the training split (900 images)"),
    ],
)
def test_bad_input(arguments, message, data_dir, tmp_path, capsys):
    assert main([*arguments, f"--workdir={tmp_path / 'run'}", f"--config.dataset.data_dir={data_dir}"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    # A mistake does not claim the folder: after correcting it, the same folder is fine.
    assert not (tmp_path / "run" / "config.json").exists()


def test_an_unprepared_dataset(tmp_path, capsys):
    arguments = [f"--config.dataset.data_dir={tmp_path}", "--config.dataset.prepare=False", f"--workdir={tmp_path}/run"]
    assert main(arguments) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert f"is not prepared in {tmp_path / 'sklearn_digits'}" in line
    assert "--config.dataset.prepare=True" in line


@pytest.mark.parametrize("flag", ["workdir", "config.dataset.data_dir"])
def test_folders_that_cannot_be_written(flag, tmp_path, capsys):
    (tmp_path / "file").touch()
    folders = {"workdir": tmp_path / "run", "config.dataset.data_dir": tmp_path / "data", flag: tmp_path / "file" / "x"}
    assert main([f"--{name}={folder}" for name, folder in folders.items()]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: cannot ")
    assert f"--{flag}" in line


def test_a_workdir_of_another_config(finished, distill, capsys):
    assert distill(finished, "--config.optimizer.delta=0.05", "--config.student.model.hidden=(16, 16)") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "optimizer.delta is 0.075 there and 0.05 here" in line
    assert "student.model.hidden is [32] there and [16, 16] here" in line
    assert "another --workdir" in line


def test_a_folder_of_something_else(tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    assert main([f"--workdir={tmp_path}"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "is not empty" in line


def test_the_command_prints_one_line_and_exits_with_1():
    command = [sys.executable, "-m", "examples.distill", "--config=digit"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert process.stdout == ""
    assert process.stderr == "error: unknown config 'digit'; known: digits, or the path of a .py file\n"


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "Configs: digits" in capsys.readouterr().out
