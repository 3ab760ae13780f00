"""Whole runs of the language model through the command line: what they leave behind, and what happens when run again."""

import json
import math
import pathlib
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from etils import epath
from matplotlib.image import imread

from examples.language_model import generate, jobs, tokenizer, trained
from examples.language_model.command_line import main
from examples.trainer import checkpoint, loop
from tests.language_model import tiny_language_model
from tests.tiers import slow_but

_README = pathlib.Path(jobs.__file__).with_name("README.md")
_TRAINING = ("task_loss", "kd_loss", "task_grad_norm", "kd_grad_norm", "grad_cosine")
_EVALUATION = ("task_loss", "kd_loss", "bits_per_byte", "top1")
_OF_DISTILLATION = {"kd_loss", "kd_grad_norm", "grad_cosine", "validation_kd_loss"}


def _lines(job):
    return [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]


def _result(job):
    return json.loads((job / "result.json").read_text())


def _assert_same_student(a, b, **tolerances):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerances.get("atol", 0)),
        checkpoint.load_variables(a),
        checkpoint.load_variables(b),
    )


def test_what_a_run_leaves(finished_language_model):
    folder = finished_language_model
    for job in ("teacher", "kd", "dot"):
        lines = _lines(folder / job)
        assert [line["step"] for line in lines] == [12, 24, 36, 48]
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
        assert lines[-1]["task_loss"] < lines[0]["task_loss"]
        assert set(_result(folder / job)["continuations"]) == {"import os", "def __init__", "for name in"}
    assert lines[-1]["kd_loss"] < lines[0]["kd_loss"]
    height, width, _ = imread(folder / "losses.png").shape
    assert width > height > 100


def test_bits_per_byte_count_all_predictions_and_all_bytes(finished_language_model):
    """A token is a byte here, documents end with one more, and the first token of a split is not predicted."""
    text = json.loads((finished_language_model / "text" / "corpus.json").read_text())["splits"]
    for job in ("teacher", "kd", "dot"):
        for split in ("validation", "test"):
            means = _result(finished_language_model / job)[split]
            assert means["count"] == text[split]["tokens"] - 1
            bits = means["task_loss"] * means["count"] / math.log(2) / text[split]["bytes"]
            assert means["bits_per_byte"] == pytest.approx(bits, rel=1e-12)
            assert 0 < means["bits_per_byte_error"] < means["bits_per_byte"]


def test_the_best_checkpoint_has_the_lowest_validation_loss(finished_language_model):
    lines = _lines(finished_language_model / "dot")
    best = min(lines, key=lambda line: line["validation_task_loss"])
    assert _result(finished_language_model / "dot")["best"] == {
        "step": best["step"],
        "task_loss": best["validation_task_loss"],
    }


def test_a_second_run_reports_and_does_not_train(finished_language_model, language_model, capsys, monkeypatch):
    monkeypatch.setattr(loop, "fit", lambda *args: pytest.fail("trained again"))
    assert language_model(finished_language_model, "--config.method=kd,dot") == 0
    printed = capsys.readouterr().out
    assert "Nothing left to train." in printed
    header, bits, *_ = [line for line in printed.splitlines() if line.startswith((" " * 19, "test bits"))]
    assert header.split() == ["teacher", "KD", "DOT"]
    for job in ("teacher", "kd", "dot"):
        assert f"{_result(finished_language_model / job)['test']['bits_per_byte']:.4f} ±" in bits
    continued = _result(finished_language_model / "dot")["continuations"]["import os"]
    assert f"  DOT                {continued!r}" in printed


@pytest.mark.slow  # trains
def test_a_trained_network_can_be_used_and_teaches(finished_language_model, texts, tmp_path, capsys):
    """Its architecture and its tokenizer are in its folder, so that no flag has to say them again."""
    folder = epath.Path(shutil.copytree(finished_language_model / "dot", tmp_path / "dot"))
    code = re.search(r"## Use a student\n\n```python\n(.*?)```", _README.read_text(), re.DOTALL)[1]
    assert "runs/bytes/dot" in code
    exec(code.replace("runs/bytes/dot", str(folder)), names := {})
    assert names["logits"].shape == (1, len("import os"), 256)
    graphdef, params = trained.load(folder)
    bytes_ = tokenizer.of_bytes()
    written = _result(folder)["continuations"]
    assert generate.continue_text(graphdef, params, bytes_, list(written), 4) == list(written.values())
    flags = [flag for flag in tiny_language_model(texts) if "teacher" not in flag]
    flags += [f"--config.teacher.path={folder}", "--config.method=kd", "--config.epochs=2", "--config.devices=1"]
    assert main([f"--workdir={tmp_path / 'run'}", *flags]) == 0
    for name in ("task_loss", "bits_per_byte", "top1"):
        assert _result(tmp_path / "run" / "teacher")["test"][name] == _result(folder)["test"][name]
    record = _result(folder)
    (folder / "result.json").write_text(json.dumps(record | {"tokenizer": "another"}))
    assert main([f"--workdir={tmp_path / 'other'}", *flags]) == 1
    assert "was trained with another tokenizer; give --config.text.tokenizer" in capsys.readouterr().err


@pytest.mark.slow  # see also test_trainer_faults.py
def test_an_interrupted_run_ends_as_one_that_was_not(finished_language_model, language_model, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(finished_language_model, workdir, ignore=shutil.ignore_patterns("dot", "kd"))
    jobs_of = jobs.student

    def interrupted(*args):
        job, calls = jobs_of(*args), iter(range(30))

        def step(*args):
            if next(calls) == 29:
                signal.raise_signal(signal.SIGTERM)
            return job.step(*args)

        return job._replace(step=step)

    monkeypatch.setattr(jobs, "student", interrupted)
    assert language_model(workdir, "--config.method=dot") == 0
    assert 12 < max(checkpoint.saved_steps(workdir / "dot")) < 48
    monkeypatch.setattr(jobs, "student", jobs_of)
    assert language_model(workdir, "--config.method=dot") == 0
    _assert_same_student(workdir / "dot", finished_language_model / "dot")
    without_seconds = [
        [line | {"seconds": 0} for line in _lines(folder / "dot")] for folder in (workdir, finished_language_model)
    ]
    assert without_seconds[0] == without_seconds[1]


@pytest.mark.slow
def test_a_cache_of_all_tokens_gives_the_same_student(finished_language_model, language_model, tmp_path):
    workdir = tmp_path / "run"
    flags = ("--config.method=dot", f"--config.teacher.path={finished_language_model / 'teacher'}")
    assert language_model(workdir, *flags, "--config.distillation.cache=True") == 0
    assert {path.name for path in (workdir / "text").iterdir()} >= {
        f"teacher_logits_{split}" for split in ("train", "validation", "test")
    }
    # Float16 changes log-probabilities by up to 2.4e-4 of their size. Where a gradient is no larger than what that makes of it,
    # Adam's step of 1e-3 may go the other way: two such steps.
    _assert_same_student(workdir / "dot", finished_language_model / "dot", atol=2e-3)
    here, there = (_result(folder / "dot") for folder in (workdir, finished_language_model))
    assert here["test"]["kd_loss"] == pytest.approx(there["test"]["kd_loss"], rel=1e-2)
    assert (here["cost"]["teacher_forwards"], there["cost"]["teacher_forwards"]) == (0.0, 1.0)
    assert here["cost"]["relative_flops"] < there["cost"]["relative_flops"]


_OVERRIDES = {
    "every second layer of the teacher, muon, reverse": [
        "--config.student.every_nth_layer=2",
        "--config.optimizer.name=muon",
        "--config.distillation.loss=reverse",
    ],
    "top_k, without prompts": [
        "--config.distillation.loss=top_k",
        "--config.distillation.k=8",
        "--config.prompts=()",
    ],
    "top_k from a cache, alternating": [
        "--config.distillation.loss=top_k",
        "--config.distillation.k=8",
        "--config.distillation.cache=True",
        "--config.sampling.form=alternating",
    ],
    "jsd and examples from a cache": [
        "--config.distillation.loss=jsd",
        "--config.sampling.form=examples",
        "--config.distillation.cache=True",
    ],
    "skew, difference": [
        "--config.distillation.loss=skew",
        "--config.sampling.form=difference",
        "--config.sampling.period=4",
    ],
    "remat, in bfloat16": ["--config.remat=True", "--config.dtype=bfloat16"],
    "four devices": ["--config.devices=4"],
    "pmap": ["--config.devices=2", "--config.parallel=pmap"],
    "shard_map": [
        "--config.devices=2",
        "--config.parallel=shard_map",
        "--config.optimizer.name=sgd",
        "--config.teacher.optimizer.name=sgd",
        "--config.optimizer.learning_rate=0.02",
    ],
    "diagnostics": ["--config.method=ce,kd,dot", "--config.diagnostics=True"],
    "diagnostics on four devices, two of them for a sequence": [
        "--config.diagnostics=True",
        "--config.diagnostics_by=layer",
        "--config.devices=4",
        "--config.model_devices=2",
    ],
    "without gradient metrics": ["--config.method=kd,kd_gain_matched,dot", "--config.gradient_metrics=False"],
}


@pytest.mark.parametrize("which", slow_but(_OVERRIDES))
def test_what_can_be_chosen(which, language_model, tmp_path, capsys):
    overrides = _OVERRIDES[which]
    short = ("--config.method=dot", "--config.epochs=2", "--config.teacher.epochs=1")
    assert language_model(tmp_path / "run", *short, *overrides) == 0
    lines = _lines(tmp_path / "run" / "dot")
    assert lines[-1]["validation_task_loss"] < lines[0]["validation_task_loss"]
    assert 0 <= lines[-1]["validation_kd_loss"] < 1  # The teacher has learnt little, so it can go either way.
    assert "test bits per byte" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("form", [[], ["--config.model_devices=4"], ["--config.parallel=pmap"]])
def test_devices_share_the_work(form, finished_language_model, language_model, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished_language_model, workdir, ignore=shutil.ignore_patterns("dot", "kd"))
    assert language_model(workdir, "--config.method=dot", "--config.devices=4", *form) == 0
    # Where a gradient is a rounding error, Adam's step of 1e-3 may go the other way: two such steps.
    _assert_same_student(workdir / "dot", finished_language_model / "dot", atol=2e-3)
    here, there = (_lines(folder / "dot")[-1]["validation_task_loss"] for folder in (workdir, finished_language_model))
    assert here == pytest.approx(there, rel=1e-4)
