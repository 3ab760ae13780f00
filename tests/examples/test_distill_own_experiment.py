"""A file outside the repository: the one on the page, and files with mistakes."""

import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx

from examples import distill
from examples.distill import models
from examples.distill.command_line import main
from examples.trainer import checkpoint

_PAGE = pathlib.Path(distill.__file__).parent / "your_own_experiment.md"


@pytest.fixture
def experiment(tmp_path):
    """The file on the page, written to a folder of its own."""
    [file] = re.findall(r"^```python\n(.*?)^```$", _PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(file.splitlines()) <= 80
    path = tmp_path / "my_experiment.py"
    path.write_text(file)
    return path


def test_the_file_on_the_page_runs_from_another_folder(experiment):
    flags = ("--config.devices=1", "--config.epochs=2", "--config.teacher.epochs=1", "--config.method=dot_clipped")
    command = [sys.executable, "-m", "examples.distill", "--config=my_experiment.py", *flags]
    process = subprocess.run(command, cwd=experiment.parent, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert "DOT, clipped" in process.stdout
    assert (experiment.parent / "runs" / "my_experiment" / "dot_clipped" / "result.json").exists()


def test_its_smoke_test_reads_no_data(experiment, tmp_path, capsys):
    experiment.write_text(experiment.read_text().replace("    digits = load_digits()", "    raise OSError"))
    flags = ("--config.method=dot_clipped", "--config.teacher.train=False", "--config.devices=1")
    assert main([f"--config={experiment}", *flags, "--smoke_test", f"--workdir={tmp_path / 'run'}"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"dot_clipped: about \d+ (seconds|minutes)", output)
    assert re.search(r"^It works\. Here the run would take about \d+ (seconds|minutes)", output, flags=re.MULTILINE)
    assert list(tmp_path.iterdir()) == [experiment]


_START = "from examples.distill import configs, data, methods, models\nfrom examples.distill.configs import digits\n"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("get_config = 1 / 0", "raises ZeroDivisionError: division by zero (line 3)"),
        ("def get_config():\n    return {}[0]", "raises KeyError: 0 (line 4)"),
        ("def get_config(:", "raises SyntaxError: "),
        ("import no_such_package", "raises ModuleNotFoundError: No module named 'no_such_package' (line 3)"),
        ("raise SystemExit(3)", "raises SystemExit: 3 (line 3)"),
        ("get_config = 3", "raises TypeError: 'int' object is not callable"),
        ("def get_config():\n    return 3", "get_config() of --config=FILE returns a int, not a ConfigDict"),
        ("def get_config():\n    pass", "get_config() of --config=FILE returns a NoneType, not a ConfigDict"),
        ("x = 3", "--config=FILE defines no get_config()"),
        (
            "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()",
            "the config lacks the field 'batch_size'; begin with configs.default()",
        ),
        (
            "def get_config():\n    config = digits.get_config()\n    config.teacher = 3\n    return config",
            "raises TypeError: Could not override field 'teacher'",
        ),
        (
            "def get_config():\n    config = digits.get_config()\n    config.epoch = 3\n    return config",
            "the config has no field 'epoch'; did you mean 'epochs'?",
        ),
        (
            "def get_config():\n    config = digits.get_config()\n    config.optimizer.warmup_epoch = 3\n    return config",
            "the config has no field 'optimizer.warmup_epoch'; did you mean 'optimizer.warmup_epochs'?",
        ),
        (
            "def get_config():\n    config = digits.get_config()\n    config.student = type(config)({'model': 'mlp'})\n"
            "    return config",
            "bad --config.student.model='mlp': give a ConfigDict with the name of a model and its options",
        ),
        (
            "def get_config():\n    config = digits.get_config()\n    del config.student.model['name']\n    return config",
            "the config lacks the field 'student.model.name'",
        ),
        (
            "def get_config():\n    config = digits.get_config()\n    config.method = 3\n    return config",
            "raises TypeError: Could not override field 'method'",
        ),
    ],
)
def test_a_file_with_a_mistake(file, message, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(_START + file)
    assert main([f"--config={path}", f"--workdir={tmp_path / 'run'}"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message.replace("FILE", str(path)) in line
    assert list(tmp_path.iterdir()) == [path]


def test_an_option_of_ones_own_method(tmp_path, capsys):
    """Other sections have the fields of the trainer alone."""
    path = tmp_path / "mine.py"
    path.write_text(
        _START + "def get_config():\n    config = digits.get_config()\n    config.optimizer.my_norm = 3.0\n"
        "    config.method = 'no_such_method'\n    return config"
    )
    assert main([f"--config={path}", f"--workdir={tmp_path / 'run'}", "--config.optimizer.my_norm=2.0"]) == 1
    assert "no_such_method" in capsys.readouterr().err


@models.register("network_with_dropout")
class _WithDropout(nnx.Module):
    def __init__(self, num_classes, *, rngs):
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.classifier = nnx.Linear(64, num_classes, rngs=rngs)

    def __call__(self, images):
        return self.classifier(self.dropout(images.reshape(len(images), -1)))


def test_the_random_state_of_dropout_is_saved(tmp_path):
    graphdef, *variables = models.split(models.build("network_with_dropout", 10, rngs=nnx.Rngs(0)))
    images = np.ones((4, 8, 8, 1), np.float32)
    first, rest = models.apply(graphdef, *variables, images, train=True)
    checkpoint.save_variables(tmp_path, variables[0], rest)
    second, _ = models.apply(graphdef, *checkpoint.load_variables(tmp_path), images, train=True)
    expected, _ = models.apply(graphdef, variables[0], rest, images, train=True)
    np.testing.assert_array_equal(second, expected)
    assert np.any(first != second)  # another step drops others
