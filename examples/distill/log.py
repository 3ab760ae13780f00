"""What is known of an arm while it trains: the progress bar, `metrics.jsonl`, and event files for TensorBoard.

A line of `metrics.jsonl` stands for an epoch and holds

    epoch, step                     finished so far
    task_loss, kd_loss              means over the images of the epoch, unweighted, while it was being trained
    task_grad_norm, kd_grad_norm    means over its steps of the norms of the gradients of these unweighted losses
    grad_cosine                     ... and of the cosine between these: below 0, the losses are in conflict
    validation_...                  task_loss, kd_loss, top1 and top5 (fractions of 1) after the epoch
    seconds                         spent so far, compilation and evaluation included, over all runs of the command

With --config.parallel=shard_map the norms and the cosine are those of each device's own part of a batch, averaged: the
gradients themselves are never averaged there, and the noise of a smaller batch makes their norms larger.

null stands for what there is not: what concerns distillation where there is no teacher, gradients if they are not
wanted.
"""

import collections
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from examples.distill import records

_TRAINING = ("task_loss", "kd_loss", "task_grad_norm", "kd_grad_norm", "grad_cosine")
_VALIDATION = ("task_loss", "kd_loss", "top1", "top5")
_SHOWN = {"task_loss": "task loss", "kd_loss": "KD loss"}


class Log:
    """The log of one arm, which goes on after `epochs_done` epochs. Close it at the end.

    Of several hosts the first one alone shows and writes it.
    """

    def __init__(
        self, name: str, directory: Path, epochs_done: int, epochs: int, steps_per_epoch: int, batch_size: int
    ) -> None:
        self.steps = epochs_done * steps_per_epoch
        self._path = directory / "metrics.jsonl"
        self._epochs, self._steps_per_epoch, self._batch_size = epochs, steps_per_epoch, batch_size
        self._totals: collections.Counter[str] = collections.Counter()  # of the metrics of this epoch
        self._writes = jax.process_index() == 0
        self._events = None
        if self._writes:
            kept = records.keep_lines(self._path, epochs_done, ("epoch", "step", *_TRAINING))
            self._events = _begin_events(directory, kept)
        self._bar = tqdm(
            desc=f"{name:>15}",
            total=epochs * steps_per_epoch * batch_size,
            initial=self.steps * batch_size,
            unit=" images",
            unit_scale=True,
            disable=not self._writes,
            # Into a log file, a line now and then; on a terminal, as often as the eye can follow.
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
        )

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Takes in the metrics of one step."""
        self._totals.update({name: float(value) for name, value in metrics.items()})
        self.steps += 1
        means = self._means()
        shown = ", ".join(f"{label} {means[name]:.4f}" for name, label in _SHOWN.items() if name in means)
        epoch = -(-self.steps // self._steps_per_epoch)
        self._bar.set_postfix_str(f"epoch {epoch}/{self._epochs}, {shown}", refresh=False)
        self._bar.update(self._batch_size)

    def epoch(self, validation: Mapping[str, float], seconds: float) -> None:
        """Writes down an epoch whose steps were all taken in."""
        means = self._means()
        record = {
            "epoch": self.steps // self._steps_per_epoch,
            "step": self.steps,
            **{name: means.get(name) for name in _TRAINING},
            **{f"validation_{name}": validation.get(name) for name in _VALIDATION},
            "seconds": seconds,
        }
        if self._events:
            records.append_line(self._path, record)
            _write_event(self._events, record)
        self._totals.clear()

    def close(self) -> None:
        self._bar.close()
        if self._events:
            self._events.close()

    def _means(self) -> dict[str, float]:
        count = (self.steps - 1) % self._steps_per_epoch + 1
        return {name: total / count for name, total in self._totals.items()}


def _begin_events(directory: Path, lines: list[records.Record]) -> SummaryWriter:
    """Begins the event files anew with the `lines` of the log, so that they never say what an interruption undid."""
    for file in directory.glob("events.out.tfevents.*"):
        file.unlink()
    events = SummaryWriter(str(directory))
    for record in lines:
        _write_event(events, record)
    return events


def _write_event(events: SummaryWriter, record: records.Record) -> None:
    for name, value in record.items():
        if name != "step" and isinstance(value, (int, float)):
            events.add_scalar(name, value, record["step"])
    events.flush()
