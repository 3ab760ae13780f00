"""Bad input: one line on stderr that says what to do, exit code 1, no traceback."""

import fcntl
import re
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import jax
import pytest

from examples.distill import identity as identities
from examples.distill import settings
from examples.distill.command_line import main
from examples.distill.configs.digits import get_config
from examples.trainer import checkpoint, identity, process, records, workdir
from examples.trainer.errors import UserError
from examples.trainer.settings import fields

CONFIGS = [
    "cifar100_r32x4_r8x4",
    "cifar100_r32x4_shufflev2",
    "cifar100_vgg13_vgg8",
    "digits",
    "fashion_mnist_cnn",
    "fashion_mnist_vit",
    "imagenet_r34_r18",
    "imagenet_r50_mobilenetv1",
    "tiny_imagenet_r18_mobilenetv2",
    "tiny_imagenet_r18_shufflev2",
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config=digit"],
            f"there is no --config=digit; give the path of a .py file, or one of {', '.join(CONFIGS)}",
        ),
        (["--config=_imagenet"], "error: there is no --config=_imagenet; give the path"),
        ([f"--config={settings.__file__}"], "defines no get_config()"),
        (["--config=no/such/file.py"], "error: there is no --config=no/such/file.py; give the path"),
        (
            ["--config.optimizer.detla=0.05"],
            "error: the config has no field 'optimizer.detla'; did you mean 'optimizer.delta'?",
        ),
        (["--config.zzz", "1"], "error: the config has no field 'zzz'; known: "),
        (
            ["--config.optimizer=3"],
            "error: --config.optimizer is a section of the config; its fields: optimizer.b2, ",
        ),
        (["--confg=digits"], "confg"),
        (["--epochs=3"], "Unknown command line flag 'epochs'"),
        (["--epochs=3"], "; did you mean --config.epochs?"),
        (["digits"], "error: unexpected argument 'digits'"),
        (["--config.method=dto"], "error: bad --config.method='dto': give one or more of ce, kd, kd_gain_matched, dot"),
        (["--config.seed=-1"], "error: bad --config.seed=-1: give a whole number that is not negative"),
        (["--config.epochs=0"], "error: bad --config.epochs=0: give a whole number of at least 1"),
        (["--config.epochs=many"], "--config.epochs=many"),
        (["--config.teacher.epochs=-2"], "error: bad --config.teacher.epochs=-2: give a whole number of at least 1"),
        (["--config.student.model.hidden=0,"], "error: bad --config.student.model.hidden=(0,): give whole numbers"),
        (["--config.student.model.hidden=(a,)"], "error: bad --config.student.model.hidden=('(a,)',): give whole"),
        (["--config.student.model.name=mpl"], "error: unknown model 'mpl'; known: mlp"),
        (["--config.optimizer.drop_epochs=150,x"], "error: bad --config.optimizer.drop_epochs=('150,x',): give whole"),
        (["--config.optimizer.drop_factor=nan"], "error: bad --config.optimizer.drop_factor=nan: give a finite number"),
        (["--config.optimizer.learning_rate=-1"], "error: bad --config.optimizer.learning_rate=-1.0: give a finite"),
        (["--config.teacher.optimizer.learning_rate=inf"], "error: bad --config.teacher.optimizer.learning_rate=inf"),
        (["--config.optimizer.weight_decay=-1"], "error: bad --config.optimizer.weight_decay=-1.0: give a finite"),
        (["--config.optimizer.momentum=1.5"], "error: bad --config.optimizer.momentum=1.5: give a number of at least"),
        (["--config.optimizer.delta=0.2"], "error: bad --config.optimizer.delta=0.2: betas: momentum + delta must lie"),
        (["--config.method=kd", "--config.optimizer.delta=0.2"], "error: bad --config.optimizer.delta=0.2"),
        (["--config.distillation.temperature=0"], "error: bad --config.distillation.temperature=0.0: give a finite"),
        (["--config.distillation.task_weight=nan"], "error: bad --config.distillation.task_weight=nan: give a finite"),
        (
            ["--config.distillation.task_weight=0", "--config.distillation.kd_weight=0"],
            "error: bad --config.distillation.task_weight and --config.distillation.kd_weight: both are 0",
        ),
        (
            ["--config.dkd.task_weight=0", "--config.dkd.alpha=0", "--config.dkd.beta=0"],
            "error: bad --config.dkd.task_weight, --config.dkd.alpha and --config.dkd.beta: all are 0",
        ),
        (
            ["--config.method=deepkd", "--config.deepkd.delta_non_target=0.1"],
            "error: bad --config.deepkd.delta_non_target=0.1: with a momentum of 0.9 it makes one of 1, which must be",
        ),
        (
            ["--config.method=kd,deepkd", "--config.optimizer.momentum=0"],
            "error: bad --config.deepkd.delta_target=-0.075: with a momentum of 0.0 it makes one of -0.075, which must be",
        ),
        (
            ["--config.deepkd.top_k_phases=0.5,0.5"],
            "error: bad --config.deepkd.top_k_phases=(0.5, 0.5): give two numbers from 0 to 1, the second larger",
        ),
        (["--config.dataset.mean=(a,)"], "error: bad --config.dataset.mean=('(a,)',): give finite numbers"),
        (["--config.dataset.std=(0.,)"], "error: bad --config.dataset.std=(0.0,): give finite numbers above 0"),
        (["--config.dataset.std=(1.,2.)"], "error: bad --config.dataset.std=(1.0, 2.0): give one number for each"),
        (["--config.dataset.name=no_such_digits"], "error: unknown --config.dataset.name='no_such_digits'"),
        (["--config.dataset.test=exam"], "error: bad --config.dataset.test='exam': Unknown split"),
        (
            ["--config.dataset.train=train[:99999%]"],
            "error: bad --config.dataset.train='train[:99999%]': Error parsing",
        ),
        (["--config.dataset.validation=train[:0]"], "error: bad --config.dataset.validation='train[:0]': it has no"),
        (["--config.dataset.validation=train[50%:20%]"], "error: bad --config.dataset.validation='train[50%:20%]': it"),
        (["--config.dataset.workers=-1"], "error: bad --config.dataset.workers=-1: give a whole number that is not"),
        (
            ["--config.dataset.preprocessing=crop"],
            "error: unknown --config.dataset.preprocessing='crop'; known: none, cifar, fashion_mnist",
        ),
        (
            ["--config.dataset.image_size=16"],
            "error: bad --config.dataset.image_size=16: the images of 'sklearn_digits' are stored with 8 x 8 pixels, and"
            " --config.dataset.preprocessing=none keeps that",
        ),
        (["--config.dtype=int8"], "error: bad --config.dtype='int8': give one of float32, bfloat16"),
        (
            ["--config.teacher.checkpoint=/nowhere"],
            "error: no trained network in --config.teacher.checkpoint=/nowhere; give the folder of a mlp (import one with"
            " python -m examples.distill.import_teacher, or train one)",
        ),
        (
            ["--config.teacher.train=False"],
            "error: no teacher: give --config.teacher.checkpoint=FOLDER of a mlp (import one with python -m"
            " examples.distill.import_teacher, or train one), or --config.teacher.train=True to train it first; see"
            " examples/distill/README.md",
        ),
        (
            ["--config.optimizer.drop_epochs=2,2"],
            "error: bad --config.optimizer.drop_epochs=(2, 2): give whole numbers",
        ),
        (["--config.student.model.hidden=10000000000"], "error: the 750,000,000,010 parameters of mlp take 3000.0 GB"),
        (["--config.teacher.model.hidden=10000000000", "--smoke_test"], "error: the 750,000,000,010 parameters of mlp"),
        (
            ["--config.sampling.form=loss"],
            "error: bad --config.sampling.form='loss': give one of none, losses, alternating, difference, examples",
        ),
        (["--config.sampling.period=0"], "error: bad --config.sampling.period=0: give a whole number from 1 to 65,536"),
        (["--config.sampling.period=65537"], "error: bad --config.sampling.period=65537: give a whole number from 1"),
        (
            ["--config.sampling.period=4"],
            "error: --config.sampling.period=4 has no effect without a form: give --config.sampling.form as well",
        ),
        (
            ["--config.sampling.form=alternating", "--config.sampling.period=4"],
            "error: bad --config.sampling.period=4: in turn, each loss is due at every second step",
        ),
        (
            ["--config.sampling.form=examples", "--config.sampling.period=3", "--config.devices=2"],
            "error: bad --config.sampling.period=3: with --config.sampling.form=examples it must divide the 32 rows that"
            " each device has of a batch",
        ),
        (["--config.batch_size=1000"], "error: batch size 1000 is larger than the training split (900 images)"),
    ],
)
def test_bad_input(arguments, message, data_dir, tmp_path, capsys):
    assert main([*arguments, f"--workdir={tmp_path / 'run'}", f"--config.dataset.data_dir={data_dir}"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not list(tmp_path.iterdir())  # A mistake leaves nothing behind.


def test_an_unprepared_dataset(tmp_path, capsys):
    arguments = [f"--config.dataset.data_dir={tmp_path}", "--config.dataset.prepare=False", f"--workdir={tmp_path}/run"]
    assert main(arguments) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert f"is not prepared in {tmp_path / 'sklearn_digits'}" in line
    assert "with --config.dataset.prepare=True or with tfds build, see examples/distill/README.md" in line
    assert "--config.dataset.prepare=True" in line


@pytest.mark.parametrize("field", fields(get_config()))
def test_a_field_without_a_value(field):
    config = get_config()
    section, _, name = field.rpartition(".")
    with config.unlocked(), config.ignore_type():
        (config[section] if section else config)[name] = None
    with pytest.raises(UserError, match=f"--config.{re.escape(field)} is not set, and this config gives no default"):
        settings.validated(config)


@pytest.mark.parametrize("flag", ["workdir", "config.dataset.data_dir"])
def test_folders_that_cannot_be_written(flag, tmp_path, capsys):
    (tmp_path / "file").touch()
    folders = {"workdir": tmp_path / "run", "config.dataset.data_dir": tmp_path / "data", flag: tmp_path / "file" / "x"}
    assert main([f"--{name}={folder}" for name, folder in folders.items()]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert f"--{flag}={folders[flag]}: " in line


def test_a_workdir_of_another_config(finished, distill, capsys):
    assert distill(finished, "--config.optimizer.delta=0.05", "--config.student.model.hidden=(16, 16)") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "optimizer.delta is 0.075 there and 0.05 here" in line
    assert "student.model.hidden is [32] there and [16, 16] here" in line
    assert "choose another --workdir, or delete that folder" in line


def test_a_folder_of_something_else(tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    assert main([f"--workdir={tmp_path}"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "is not empty" in line


def test_a_folder_in_which_checkpoints_would_not_be_found(tmp_path, capsys):
    assert main([f"--workdir={tmp_path / 'run[1]'}"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("run[1]: Orbax takes [ ] in a path for a pattern; use other names")
    assert not any(tmp_path.iterdir())


def test_the_command_prints_one_line_and_exits_with_1():
    command = [sys.executable, "-m", "examples.distill", "--config=digit"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert process.stdout == ""
    known = ", ".join(CONFIGS)
    assert process.stderr == f"error: there is no --config=digit; give the path of a .py file, or one of {known}\n"


def test_help_lists_configs_methods_and_fields_with_their_defaults(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert f"Configs: {', '.join(CONFIGS)}" in lines
    for method in ("ce", "kd", "kd_gain_matched", "dot", "dkd", "dkd_dot", "deepkd", "crd", "crd_dot"):
        assert any(line.split()[:1] == [method] for line in lines)
    listed = [line.strip().split("=")[0] for line in lines if line.startswith("  --")]
    assert listed == [f"--config.{field}" for field in fields(get_config())]
    assert "  --config.optimizer.delta=0.075" in lines


@pytest.mark.parametrize(
    ("saved", "field", "refused"),
    [
        ((), "dataset.train", False),
        (("teacher",), "optimizer.delta", False),
        (("teacher",), "student.model.hidden", False),
        (("teacher",), "dataset.train", True),
        (("teacher",), "teacher.epochs", True),
        (("teacher", "kd"), "optimizer.delta", True),
        (("teacher", "kd"), "checkpoint_every_steps", False),
        (("teacher", "kd"), "diagnostics", True),
        (("teacher", "kd"), "diagnostics_by", False),
        (("ce",), "teacher.epochs", False),
        (("teacher",), "sampling.form", False),
        (("teacher", "kd"), "sampling.form", True),
        (("teacher", "kd"), "sampling.period", True),
        (("ce",), "sampling.form", False),
        (("teacher", "ce"), "sampling.form", True),
        (("ce",), "epochs", True),
        (("teacher", "ce"), "teacher.epochs", True),
        (("teacher", "kd", "ce"), "dkd.beta", False),
        (("teacher", "deepkd"), "dkd.beta", False),
        (("teacher", "dkd_dot"), "dkd.beta", True),
        (("teacher", "deepkd"), "deepkd.top_k_phases", True),
        (("teacher", "kd"), "crd.dim", False),
        (("teacher", "crd_dot"), "crd.dim", True),
    ],
)
def test_what_nothing_saved_depends_on_may_change(saved, field, refused, tmp_path):
    belongs = identities.of(settings.validated(get_config()))
    for job in ("teacher", "kd", "ce", "dkd_dot", "deepkd", "crd_dot"):
        (tmp_path / job / "checkpoints").mkdir(parents=True)
        (tmp_path / job / "metrics.jsonl").touch()
    for job in saved:
        (tmp_path / job / "result.json").touch()
    identity.record(tmp_path, belongs, checksum=None)
    record = records.read_json(tmp_path / "config.json")
    records.write_json(tmp_path / "config.json", record | ({field: "something else"} if field in record else {}))
    if refused:
        with pytest.raises(UserError, match=f"belongs to another config: {field} is 'something else' there"):
            identity.check(tmp_path, belongs)
    else:
        identity.check(tmp_path, belongs)
        identity.record(tmp_path, belongs, checksum=None)
        assert records.read_json(tmp_path / "config.json") == record


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("config.json", lambda text: text[: len(text) // 2]),
        ("config.json", lambda text: "[]"),
        ("teacher/result.json", lambda text: ""),
        ("dot/result.json", lambda text: "{}"),
        ("dot/result.json", lambda text: text.replace("top1", "top2")),
        ("teacher/result.json", lambda text: text.replace("top1", "top2")),
        ("dot/metrics.jsonl", lambda text: text.replace('"task_loss": ', '"task_loss": "high", "x": ')),
        ("dot/metrics.jsonl", lambda text: text[:-20]),
        ("dot/metrics.jsonl", lambda text: text[: text.rindex("{")]),
        ("kd/metrics.jsonl", lambda text: ""),
        ("kd/metrics.jsonl", lambda text: "\udcff" + text),
        ("kd/metrics.jsonl", None),
    ],
)
def test_a_damaged_file_is_named(finished, distill, tmp_path, capsys, file, damage):
    path = tmp_path / "run" / file
    shutil.copytree(finished, tmp_path / "run")
    if damage:
        path.write_text(damage(path.read_text()), errors="surrogateescape")
    else:
        path.unlink()
    assert distill(tmp_path / "run") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path} is damaged (")


def test_a_log_that_is_shorter_than_the_checkpoint_is_damaged(tmp_path):
    records.append_line(tmp_path / "metrics.jsonl", {"epoch": 1})
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged \(it has 1 lines instead of 2\)"):
        records.keep_lines(tmp_path / "metrics.jsonl", 2)


def test_a_network_without_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match=f"no checkpoint in {tmp_path / 'kd' / 'checkpoints'}"):
        checkpoint.load_variables(tmp_path / "kd")


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["variables", "variables/d"])
def test_a_damaged_teacher(damage, finished, data_dir, tmp_path):
    shutil.copytree(finished / "teacher", tmp_path / "teacher")
    [*_, latest] = sorted((tmp_path / "teacher" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    shutil.rmtree(latest / damage)
    # In a process of its own: Orbax leaves behind reads that fail later.
    arguments = [f"--workdir={tmp_path / 'run'}", f"--config.dataset.data_dir={data_dir}"]
    command = [sys.executable, "-m", "examples.distill", *arguments, f"--config.teacher.checkpoint={tmp_path}/teacher"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    [line] = process.stderr.splitlines()
    assert line.startswith(f"error: cannot read the checkpoint {latest} (")
    assert len(line) < 600
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_no_checkpoint_is_intact(finished, data_dir, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "dot" / "result.json").unlink()
    folder = tmp_path / "run" / "dot" / "checkpoints"
    damaged = sorted(int(path.name) for path in folder.iterdir())
    for step in damaged:
        shutil.rmtree(folder / str(step) / "optimizer")
    flags = (f"--workdir={tmp_path / 'run'}", f"--config.dataset.data_dir={data_dir}", "--config.method=dot")
    command = [sys.executable, "-m", "examples.distill", *flags, "--config.epochs=6", "--config.teacher.epochs=2"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    line = process.stderr.splitlines()[-1]
    assert line.startswith(f"error: cannot read the checkpoint {folder / str(damaged[-1])} (")
    assert line.endswith(
        f"), nor any older one; restore one of them, or delete {folder.parent} to train from the start"
    )
    assert sorted(int(path.name) for path in folder.iterdir()) == damaged


def test_two_runs_in_one_workdir(finished, distill, capsys):
    with (finished / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert distill(finished) == 1
    assert capsys.readouterr().err == f"error: another run is using --workdir={finished}\n"
    assert distill(finished) == 0


def test_only_the_first_host_claims_the_workdir(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with workdir.claim(tmp_path / "run"):
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("number", "code", "what"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 0, "terminated")]
)
def test_a_signal_while_it_imports(number, code, what):
    # With `importtime` Python reports each module, so the signal can wait for one that is imported early.
    command = [sys.executable, "-X", "importtime", "-m", "examples.distill"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        next(line for line in process.stderr if "absl" in line)
        process.send_signal(number)
        _, errors = process.communicate()
    assert process.returncode == code
    assert errors.splitlines()[-1] == f"{what} before anything was begun"


def test_an_interrupt_that_python_drops_is_sent_again(monkeypatch):
    again = threading.Event()
    monkeypatch.setattr(process._thread, "interrupt_main", again.set)
    process._unraisable(SimpleNamespace(exc_type=KeyboardInterrupt))
    assert again.wait(timeout=60)
