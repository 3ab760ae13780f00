"""A file outside the repository: the one on the page, and files with mistakes."""

import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from examples import distill
from examples.distill import models, settings, smoke_test
from examples.distill.command_line import main
from examples.distill.configs.digits import get_config
from examples.trainer import checkpoint, loop
from examples.trainer.errors import UserError
from examples.trainer.preemption import Preempted

_PAGE = pathlib.Path(distill.__file__).parent / "your_own_experiment.md"


@pytest.fixture
def experiment(tmp_path):
    """The file on the page, written to a folder of its own."""
    [file] = re.findall(r"^```python\n(.*?)^```$", _PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(file.splitlines()) <= 80
    path = tmp_path / "my_experiment.py"
    path.write_text(file)
    return path


@pytest.mark.slow  # trains, in a process of its own
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


def test_a_smoke_test_of_an_epoch_of_one_step(capsys):
    flags = ("--config.method=ce", "--config.teacher.train=False", "--config.batch_size=900")
    assert main([*flags, "--config.devices=1", "--smoke_test"]) == 0
    assert "It works." in capsys.readouterr().out


def test_a_smoke_test_of_a_batch_that_is_too_large(capsys):
    assert main(["--config.batch_size=901", "--config.devices=1", "--smoke_test"]) == 1
    assert "batch size 901 is larger than the training split" in capsys.readouterr().err


@pytest.mark.parametrize(("end", "code"), [(KeyboardInterrupt, 130), (Preempted, 0)])
def test_a_smoke_test_that_is_ended_promises_nothing(end, code, monkeypatch, capsys):
    def fit(job, settings):
        raise end("the same command goes on")

    monkeypatch.setattr(loop, "fit", fit)
    assert main(["--config.devices=1", "--smoke_test"]) == code
    assert capsys.readouterr().err.splitlines()[-1].endswith("; a smoke test saves nothing")


def test_a_smoke_test_on_several_hosts(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="runs on one host"):
        smoke_test.run(settings.validated(get_config()), "digits", lambda: False)


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
        (
            "def get_config():\n    config = digits.get_config()\n    config.student.model.activation = print\n"
            "    return config",
            "bad --config.student.model.activation=<built-in function print>: give Python's own numbers and texts",
        ),
        (
            "import numpy\ndef get_config():\n    config = digits.get_config()\n"
            "    config.dataset.mean = (numpy.float32(0),)\n    return config",
            "bad --config.dataset.mean=(np.float32(0.0),): give Python's own numbers and texts",
        ),
        (
            "def get_config():\n    config = digits.get_config()\n    config.student.model.num_classes = 3\n"
            "    return config",
            "--config.student.model.num_classes is no option of a model",
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


def test_an_option_of_ones_own_network_may_mean_anything():
    config = get_config()
    config.student.model = ConfigDict({"name": "network_with_dropout", "hidden": 16, "momentum": 1.0, "norm": None})
    config.teacher.model = ConfigDict({"name": "mlp", "hidden": 16})
    with pytest.raises(UserError, match=r"bad --config.teacher.model.hidden=16: give whole numbers"):
        settings.validated(config)
    config.teacher.model = ConfigDict({"name": "mlp", "hidden": (16,)})
    assert settings.validated(config).fields["student.model.momentum"] == 1.0


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
