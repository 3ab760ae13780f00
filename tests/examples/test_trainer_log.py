"""What the log of a job shows and writes."""

import contextlib
import json
import re
import sys
import time

import numpy as np
import pytest

from examples.distill import jobs
from examples.trainer.errors import UserError
from examples.trainer.job import Job
from examples.trainer.log import Log


def _job(directory, **options):
    nothing = dict.fromkeys(("init_state", "step", "evaluate", "batches", "seed", "splits", "remedy"))
    return Job(
        name="dot", directory=directory, epochs=3, metrics=jobs.metrics("dot"), unit="images", **nothing, **options
    )


def test_a_line_of_the_log_has_the_means_of_its_epoch(tmp_path):
    def log_epoch(log, values):
        for value in values:
            log.step({"task_loss": np.float32(value), "kd_loss": np.float32(10 * value), "skipped": np.float32(0)})
        log.epoch({"top1": 0.5}, seconds=1.0)

    job = _job(tmp_path, steps_per_epoch=4, batch_size=2)
    with contextlib.closing(Log(job)) as log:
        log_epoch(log, [1, 2, 3, 6])
        after_one_epoch = json.loads(json.dumps(log.state()))
        log_epoch(log, [0, 0, 0, 2])
    with contextlib.closing(Log(job, after_one_epoch)) as log:
        log_epoch(log, [4, 4, 4, 8])  # again, after an interruption
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["step"], line["task_loss"], line["kd_loss"]) for line in lines] == [
        (1, 4, 3.0, 30.0),
        (2, 8, 5.0, 50.0),
    ]
    assert lines[1]["validation_top1"] == 0.5 and lines[1]["grad_cosine"] is None


def test_a_log_goes_on_with_other_metrics(tmp_path):
    """The lines before need to have the losses alone: what else is logged may change from run to run."""
    before = {"epoch": 1, "step": 1, "task_loss": 1.0, "kd_loss": 2.0, "once": 3.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(before) + "\n")
    job = _job(tmp_path, steps_per_epoch=1, batch_size=2)
    with contextlib.closing(Log(job, {"steps": 1})) as log:
        log.step({"task_loss": 0.5, "kd_loss": 1.0, "grad_cosine": 0.25, "skipped": 0.0})
        log.epoch({}, seconds=1.0)
    first, second = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert first == before and (second["epoch"], second["grad_cosine"]) == (2, 0.25)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "step": 1, "task_loss": 1.0}) + "\n")
    with pytest.raises(UserError, match=r"is damaged \(it lacks kd_loss\)"):
        Log(job, {"steps": 1})


def test_a_mean_is_over_the_steps_that_know(tmp_path, capsys, monkeypatch):
    """The bar shows the last mean that there was, also while an epoch has none yet."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with contextlib.closing(Log(_job(tmp_path, steps_per_epoch=3, batch_size=2))) as log:
        for kd in (4.0, np.nan, 8.0, np.nan, np.nan, np.nan):
            log.step({"task_loss": 1.0, "kd_loss": np.float32(kd), "grad_cosine": np.nan, "skipped": 0.0})
            state = log.state()
            if log.epoch_is_complete:
                log.epoch({"top1": 0.5}, seconds=1.0)
        time.sleep(0.11)
        log.step({"task_loss": 1.0, "kd_loss": np.nan, "skipped": 0.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["task_loss"], line["kd_loss"], line["grad_cosine"]) for line in lines] == [
        (1, 6, None),
        (1, None, None),
    ]
    assert (state["totals"], state["counts"]) == ({"task_loss": 3}, {"task_loss": 3})
    assert "epoch 3/3, task loss 1.0000, KD loss 6.0000" in capsys.readouterr().err.split("\r")[-1]


def test_the_bar_shows_images_per_second_what_is_left_and_both_losses(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with contextlib.closing(Log(_job(tmp_path, steps_per_epoch=2, batch_size=50))) as log:
        for _ in range(2):
            time.sleep(0.11)  # the bar is redrawn ten times a second
            log.step({"task_loss": 0.25, "kd_loss": 1.5, "skipped": 0.0})
    shown = capsys.readouterr().err.split("\r")[-1]
    assert re.search(
        r"dot:  33%.* 100/300 \[\d\d:\d\d<\d\d:\d\d, .*images/s, epoch 1/3, task loss 0.2500, KD loss 1.5000", shown
    )
