"""What is known of an arm while it trains: the progress bar, `metrics.jsonl`, and event files for TensorBoard.

A line of `metrics.jsonl` stands for an epoch and holds

    epoch, step                     finished so far
    task_loss, kd_loss              means over the images of the epoch, unweighted, while it was being trained
    task_grad_norm, kd_grad_norm    means over its steps of the norms of the gradients of these unweighted losses
    grad_cosine                     ... and of the cosine between these: below 0, the losses are in conflict
    skipped_steps                   of the epoch, since something was not finite; the means are over the others
    validation_...                  task_loss, kd_loss, top1 and top5 (fractions of 1) after the epoch
    seconds                         spent so far, compilation and evaluation included, over all runs of the command

With --config.parallel=shard_map the norms and the cosine are those of each device's own part of a batch, averaged: the
gradients themselves are never averaged there, and the noise of a smaller batch makes their norms larger.

null stands for what there is not: what concerns distillation where there is no teacher, gradients if they are not
wanted, means over no step at all.
"""

import collections
import contextlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from examples.distill import records

_TRAINING = ("task_loss", "kd_loss", "task_grad_norm", "kd_grad_norm", "grad_cosine")
_VALIDATION = ("task_loss", "kd_loss", "top1", "top5")
_SHOWN = {"task_loss": "task loss", "kd_loss": "KD loss"}


def warn(message: str) -> None:
    """Shows a warning, above the bar if there is one; of several hosts, on the first."""
    if jax.process_index() == 0:
        tqdm.write(f"warning: {message}", file=sys.stderr)


class Log:
    """The log of one arm, which begins anew or goes on from an earlier `state()`. Close it at the end.

    Of several hosts the first one alone shows and writes it.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        epochs: int,
        steps_per_epoch: int,
        batch_size: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        state = state or {}
        self.steps: int = state.get("steps", 0)
        self.skipped_in_a_row: int = state.get("skipped_in_a_row", 0)
        self._epoch_steps: int = state.get("epoch_steps", 0)  # of an epoch that is not written down yet
        self._skipped: int = state.get("skipped", 0)  # ... and how many of these were
        # ... and the sums of the metrics of the others, and how many had them
        self._totals = collections.Counter(state.get("totals", {}))
        self._counts = collections.Counter(state.get("counts", {}))
        self._name, self._path = name, directory / "metrics.jsonl"
        self._epochs, self._steps_per_epoch, self._batch_size = epochs, steps_per_epoch, batch_size
        self._writes = jax.process_index() == 0
        self._events = None
        if self._writes:
            epochs_done = (self.steps - self._epoch_steps) // steps_per_epoch
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

    def state(self) -> dict[str, Any]:
        """What another `Log` needs to go on from here; JSON can hold it."""
        return {
            "steps": self.steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "epoch_steps": self._epoch_steps,
            "skipped": self._skipped,
            "totals": dict(self._totals),
            "counts": dict(self._counts),
        }

    @property
    def current_epoch(self) -> int:
        """The number of the epoch that the last step was of, from 1."""
        return -(-self.steps // self._steps_per_epoch)

    @property
    def epoch_is_complete(self) -> bool:
        """Whether all steps of an epoch were taken in, which is not written down yet."""
        return self._epoch_steps == self._steps_per_epoch

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Takes in the metrics of one step."""
        self.steps += 1
        self._epoch_steps += 1
        values = {name: float(value) for name, value in metrics.items()}
        if values.pop("skipped") > 0:
            self.skipped_in_a_row += 1
            self._skipped += 1
            warn(
                f"{self._name}: step {self.steps} (epoch {self.current_epoch}) is skipped: its loss or update is not finite"
            )
        else:
            self.skipped_in_a_row = 0
            self._totals.update(values)
            self._counts.update(values.keys())
        means = self._means()
        shown = [f"{label} {means[name]:.4f}" for name, label in _SHOWN.items() if name in means]
        shown += [f"{self._skipped} skipped"] if self._skipped else []
        self._bar.set_postfix_str(f"epoch {self.current_epoch}/{self._epochs}, {', '.join(shown)}", refresh=False)
        self._bar.update(self._batch_size)

    def epoch(self, validation: Mapping[str, float], seconds: float) -> None:
        """Writes down an epoch that is complete."""
        means = self._means()
        record = {
            "epoch": self.current_epoch,
            "step": self.steps,
            **{name: means.get(name) for name in _TRAINING},
            "skipped_steps": self._skipped,
            **{f"validation_{name}": validation.get(name) for name in _VALIDATION},
            "seconds": seconds,
        }
        if self._events:
            records.append_line(self._path, record)
            with records.writing(self._path.with_name("events.out.tfevents...")):
                _write_event(self._events, record)
        self._epoch_steps = self._skipped = 0
        self._totals.clear()
        self._counts.clear()

    def close(self) -> None:
        self._bar.close()
        if self._events:
            with contextlib.suppress(OSError):  # Every epoch was written when it ended.
                self._events.close()

    def _means(self) -> dict[str, float]:
        return {name: total / self._counts[name] for name, total in self._totals.items()}


def _begin_events(directory: Path, lines: list[records.Record]) -> EventsWriter:
    """Begins the event files anew with the `lines` of the log, so that they never say what an interruption undid."""
    for file in directory.glob("events.out.tfevents.*"):
        file.unlink()
    # Not tensorboardX's SummaryWriter: its thread ends when it cannot write, and who has more for it then waits forever.
    with records.writing(directory / "events.out.tfevents..."):
        events = EventsWriter(str(directory / "events"))
        for record in lines:
            _write_event(events, record)
    return events


def _write_event(events: EventsWriter, record: records.Record) -> None:
    values = [
        Summary.Value(tag=name, simple_value=value)
        for name, value in record.items()
        if name != "step" and isinstance(value, (int, float))
    ]
    events.write_event(Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values)))
    events.flush()
