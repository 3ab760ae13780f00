"""Whole runs through the command line: what they leave behind, and what happens when they are run again."""

import json
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.distill import data, jobs, models
from examples.distill.command_line import parse
from examples.trainer import checkpoint, loop, records
from examples.trainer.log import Log
from tests.tiers import slow_but

_TRAINING = ("task_loss", "kd_loss", "task_grad_norm", "kd_grad_norm", "grad_cosine")
_EVALUATION = ("task_loss", "kd_loss", "top1", "top5")
_OF_DISTILLATION = {"kd_loss", "kd_grad_norm", "grad_cosine", "validation_kd_loss"}


def _assert_same_student(a, b):
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load_variables(a), checkpoint.load_variables(b))


def _lines(job):
    return [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]


def _epochs(job):
    return [line["epoch"] for line in _lines(job)]


def test_metrics_have_one_line_per_epoch(finished):
    for job, epochs in (("teacher", 2), ("kd", 6), ("dot", 6)):
        lines = _lines(finished / job)
        assert [line["epoch"] for line in lines] == list(range(1, epochs + 1))
        assert [line["step"] for line in lines] == [14 * epoch for epoch in range(1, epochs + 1)]
        for line in lines:
            assert set(line) == {
                "epoch",
                "step",
                *_TRAINING,
                "skipped_steps",
                *(f"validation_{name}" for name in _EVALUATION),
                "seconds",
            }
            unknown = {name for name, value in line.items() if value is None}
            assert unknown == (_OF_DISTILLATION if job == "teacher" else set())
            assert -1 <= (line["grad_cosine"] or 0) <= 1
            assert line["validation_top1"] <= line["validation_top5"]
    assert lines[-1]["task_loss"] < lines[0]["task_loss"]
    assert lines[-1]["kd_loss"] < lines[0]["kd_loss"]


def test_tensorboard_shows_the_metrics(finished):
    for job in ("teacher", "dot"):
        events = EventAccumulator(str(finished / job)).Reload()
        lines = _lines(finished / job)
        assert set(events.Tags()["scalars"]) == {name for name, value in lines[0].items() if value is not None} - {
            "step"
        }
        for name in events.Tags()["scalars"]:
            seen = [(event.step, event.value) for event in events.Scalars(name)]
            assert seen == [(line["step"], np.float32(line[name])) for line in lines]


def test_the_picture_can_be_read(finished):
    height, width, _ = imread(finished / "losses.png").shape
    assert width > height > 100


def test_a_second_run_reports_and_does_not_train(finished, distill, capsys, monkeypatch):
    monkeypatch.setattr(loop, "fit", lambda *args: pytest.fail("trained again"))
    before = (finished / "dot" / "metrics.jsonl").read_bytes()
    assert distill(finished) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"Working directory: {finished}\nNothing left to train.\n")
    assert f"Picture: {finished}/losses.png" in printed
    result = records.read_json(finished / "dot" / "result.json")
    table = {row.split("  ")[0]: row for row in printed.splitlines()}
    assert f"{result['train']['task_loss']:.4f}" in table["train task loss"]
    assert f"{result['train']['kd_loss']:.4f}" in table["train KD loss"]
    assert f"{result['test']['top1']:.4f}" in table["test top-1"]
    assert f"{result['test']['top5']:.4f}" in table["test top-5"]
    assert f"{result['seconds']:.1f}" in table["seconds"]
    assert re.search(r"^ +KD +DOT$", printed, re.MULTILINE)
    assert "kd_gain_matched" in printed
    assert "benchmarks.digits_learning_rates" in printed
    assert (finished / "dot" / "metrics.jsonl").read_bytes() == before


def test_the_student_can_be_loaded_and_gives_the_reported_accuracy(finished, data_dir):
    config = parse([f"--config.dataset.data_dir={data_dir}"]).config
    dataset = data.load(config.dataset)
    graphdef, *_ = jobs.network(config.student.model, jobs.Shared(config, dataset, layout=None, preempted=None))
    params, rest = checkpoint.load_variables(finished / "dot")
    [batch] = data.eval_batches(dataset, dataset.test, 447)
    logits, _ = models.apply(graphdef, params, rest, batch["image"] / 16, train=False)
    accuracy = np.mean(np.argmax(logits, axis=-1) == batch["label"])
    assert accuracy == pytest.approx(records.read_json(finished / "dot" / "result.json")["test"]["top1"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("epoch", "next_run"),
    [
        pytest.param(1, "starts dot again, of which no checkpoint was saved yet", marks=pytest.mark.slow),
        (5, "goes on from step 56 of dot"),
    ],
)
def test_an_interrupted_run_ends_with_the_same_bits(finished, distill, tmp_path, monkeypatch, capsys, epoch, next_run):
    append_line = records.append_line

    def interrupted(path, record):
        append_line(path, record)
        if path.parent.name == "dot" and record["epoch"] == epoch:
            raise KeyboardInterrupt

    shutil.copytree(finished / "teacher", tmp_path / "run" / "teacher")
    with monkeypatch.context() as patch:
        patch.setattr(records, "append_line", interrupted)
        assert distill(tmp_path / "run", "--config.method=dot") == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"interrupted; the same command {next_run}"
    assert _epochs(tmp_path / "run" / "dot") == list(range(1, epoch + 1))
    assert distill(tmp_path / "run", "--config.method=dot") == 0
    _assert_same_student(tmp_path / "run" / "dot", finished / "dot")
    assert _epochs(tmp_path / "run" / "dot") == [1, 2, 3, 4, 5, 6]
    events = EventAccumulator(str(tmp_path / "run" / "dot")).Reload()
    assert [event.step for event in events.Scalars("task_loss")] == [14, 28, 42, 56, 70, 84]
    for resumed, whole in zip(_lines(tmp_path / "run" / "dot"), _lines(finished / "dot"), strict=True):
        assert resumed | {"seconds": 0} == whole | {"seconds": 0}


@pytest.mark.parametrize("number", slow_but([signal.SIGHUP, signal.SIGUSR1], signal.SIGHUP))
def test_signals_that_save_within_an_epoch(number, finished, distill, tmp_path, monkeypatch, capsys):
    """SIGTERM too, which `tests/faults.py` sends to the real command, where all of them have their usual meaning."""
    step, before = Log.step, signal.signal(number, lambda *_: None)

    def send(self, metrics):
        step(self, metrics)
        if self.steps == 17:
            signal.raise_signal(number)

    shutil.copytree(finished / "teacher", tmp_path / "run" / "teacher")
    monkeypatch.setattr(Log, "step", send)
    try:
        assert distill(tmp_path / "run", "--config.method=dot") == 0
    finally:
        signal.signal(number, before)
    saved = checkpoint.saved_steps(tmp_path / "run" / "dot")[-1]
    assert 17 <= saved < 28  # within the second epoch
    assert capsys.readouterr().err.splitlines()[-1] == f"terminated; the same command goes on from step {saved} of dot"


@pytest.mark.slow  # a run with the memory of CRD goes on in the first tier
@pytest.mark.parametrize("method", ["dkd_dot", "deepkd", "kd_priority", "dot_projected", "dto_kd"])
def test_other_methods_go_on_with_the_same_bits(method, finished, distill, tmp_path, monkeypatch):
    """The classes and weights of a step, and what weightings remember, follow from what is saved."""
    flags = (f"--config.method={method}", "--config.epochs=3", "--config.checkpoint_every_steps=10")
    append_line = records.append_line

    def interrupted(path, record):
        append_line(path, record)
        if path.parent.name == method and record["epoch"] == 2:
            raise KeyboardInterrupt

    for name in ("run", "again"):
        shutil.copytree(finished / "teacher", tmp_path / name / "teacher")
    assert distill(tmp_path / "run", *flags) == 0
    with monkeypatch.context() as patch:
        patch.setattr(records, "append_line", interrupted)
        assert distill(tmp_path / "again", *flags) == 130
    assert distill(tmp_path / "again", *flags) == 0
    _assert_same_student(tmp_path / "run" / method, tmp_path / "again" / method)
    a, b = ([line | {"seconds": 0} for line in _lines(tmp_path / name / method)] for name in ("run", "again"))
    assert a == b
    assert all(value is not None for line in a for value in line.values())


def test_a_run_interrupted_before_its_result_only_evaluates(finished, distill, tmp_path, monkeypatch):
    run = shutil.copytree(finished, tmp_path / "run")
    result = run / "kd" / "result.json"
    expected = records.read_json(result)
    result.unlink()
    monkeypatch.setattr(Log, "step", lambda *args: pytest.fail("trained again"))
    assert distill(run, "--config.method=kd") == 0
    assert records.read_json(result) == expected


@pytest.mark.slow
def test_a_method_can_be_added_and_the_teacher_is_reused(distill, tmp_path, capsys):
    assert distill(tmp_path / "run", "--config.method=ce", "--config.epochs=1") == 0
    teacher = (tmp_path / "run" / "teacher" / "result.json").stat().st_mtime_ns
    capsys.readouterr()
    assert distill(tmp_path / "run", "--config.method=kd_gain_matched", "--config.epochs=1") == 0
    assert re.search(r"^ +CE +KD, gain-matched$", capsys.readouterr().out, re.MULTILINE)
    assert (tmp_path / "run" / "teacher" / "result.json").stat().st_mtime_ns == teacher


@pytest.mark.slow
def test_the_latest_checkpoints_and_the_best_are_kept(distill, tmp_path):
    flags = ("--config.method=ce", "--config.checkpoint_every_steps=5", "--config.keep_checkpoints=3")
    spoil = ("--config.optimizer.drop_epochs=(3,)", "--config.optimizer.drop_factor=300")  # a learning rate of 3
    assert distill(tmp_path / "run", *flags, "--config.teacher.train=False", *spoil) == 0
    accuracies = {line["step"]: line["validation_top1"] for line in _lines(tmp_path / "run" / "ce")}
    best = max(accuracies, key=accuracies.get)
    assert best < 70
    assert checkpoint.saved_steps(tmp_path / "run" / "ce") == [best, 75, 80, 84]
    result = records.read_json(tmp_path / "run" / "ce" / "result.json")
    assert result["best"] == {"step": best, "top1": accuracies[best]}
    params, _ = checkpoint.load_variables(tmp_path / "run" / "ce", best)
    last, _ = checkpoint.load_variables(tmp_path / "run" / "ce")
    assert not np.array_equal(params["classifier"]["kernel"], last["classifier"]["kernel"])


@pytest.mark.slow
def test_dot_without_delta_ends_where_kd_ends(finished, distill, tmp_path):
    assert distill(tmp_path / "run", "--config.method=dot", "--config.optimizer.delta=0") == 0
    kd = records.read_json(finished / "kd" / "result.json")["train"]
    dot = records.read_json(tmp_path / "run" / "dot" / "result.json")["train"]
    assert dot == pytest.approx(kd, rel=1e-3)


def test_a_loss_that_stays_infinite_stops_the_run_and_keeps_the_checkpoint(finished, distill, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished / "teacher", workdir / "teacher")
    # The learning rate "drops" by a factor of 1e30 after epoch 3.
    explode = ("--config.method=kd", "--config.optimizer.drop_epochs=(3,)", "--config.optimizer.drop_factor=1e30")
    assert distill(workdir, *explode, "--config.max_consecutive_skips=5") == 1
    *warnings, message = capsys.readouterr().err.splitlines()
    latest = workdir / "kd" / "checkpoints" / "42"
    assert message.startswith(
        "error: kd: 5 steps in a row were skipped, the last of them step 48 (epoch 4); the latest checkpoint is"
        f" {latest}; lower --config.optimizer.learning_rate"
    )
    assert message.endswith("and start again in a new --workdir")
    for step in range(44, 49):  # after step 43, the parameters are of the order of 1e25
        assert any(f"warning: kd: step {step} (epoch 4) is skipped: its loss or update" in line for line in warnings)
    assert np.isfinite(checkpoint.load_variables(workdir / "kd")[0]["classifier"]["kernel"]).all()
    assert _epochs(workdir / "kd") == [1, 2, 3]


@pytest.mark.slow
def test_a_run_that_failed_before_its_first_checkpoint_does_not_hold_the_folder(distill, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert distill(workdir, "--config.method=kd", "--config.optimizer.learning_rate=1e30") == 1
    assert "no checkpoint was saved yet" in capsys.readouterr().err
    teacher = (workdir / "teacher" / "result.json").stat().st_mtime_ns
    assert distill(workdir, "--config.method=kd", "--config.epochs=2") == 0
    assert (workdir / "teacher" / "result.json").stat().st_mtime_ns == teacher
    assert _epochs(workdir / "kd") == [1, 2]


def test_the_workdir_is_named_after_the_config():
    assert parse(["--config=cifar100_vgg13_vgg8"]).workdir == "runs/cifar100_vgg13_vgg8"


def test_config_is_recorded_without_what_may_change(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["optimizer.delta"] == 0.075
    assert not {"method", "dataset.data_dir", "dataset.prepare", "dataset.workers"} & set(config)


def test_gradients_are_measured_only_if_they_are_wanted(finished, distill, tmp_path):
    shutil.copytree(finished / "teacher", tmp_path / "run" / "teacher")
    flags = ("--config.method=kd", "--config.epochs=1", "--config.gradient_metrics=False")
    assert distill(tmp_path / "run", *flags) == 0
    [line] = _lines(tmp_path / "run" / "kd")
    assert {name for name, value in line.items() if value is None} == {"task_grad_norm", "kd_grad_norm", "grad_cosine"}


def test_the_networks_compute_in_the_dtype_of_the_config(data_dir):
    for dtype in ("float32", "bfloat16"):
        config = parse([f"--config.dataset.data_dir={data_dir}", f"--config.dtype={dtype}"]).config
        dataset = data.load(config.dataset)
        network = jobs.network(config.student.model, jobs.Shared(config, dataset, layout=None, preempted=None))
        image = np.zeros((1, *dataset.image_shape), np.float32)
        (logits, [hidden]), _ = models.apply(*network, image, train=False, with_features=True)
        assert (hidden.dtype, logits.dtype) == (dtype, "float32")
