"""What is known of a job while it trains: the progress bar, `metrics.jsonl`, and event files for TensorBoard.

A line of `metrics.jsonl` stands for an epoch and holds

    epoch, step         finished so far
    ...                 the training metrics of the job: means over the steps of the epoch while it was being trained
    skipped_steps       of the epoch, since something was not finite; the means are over the others
    validation_...      the validation metrics of the job after the epoch
    seconds             spent so far, compilation and evaluation included, over all runs of the command

null stands for what there is not, such as a mean over no step at all: a metric that a step does not know, such as a loss
that it did not compute, is NaN there, and left out of the mean.
"""

import collections
import contextlib
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from examples.trainer import records
from examples.trainer.job import Job


def warn(message: str) -> None:
    """Shows a warning, above the bar if there is one; of several hosts, on the first."""
    if jax.process_index() == 0:
        tqdm.write(f"warning: {message}", file=sys.stderr)


class Log:
    """The log of one job, which begins anew or goes on from an earlier `state()`. Close it at the end.

    Of several hosts the first one alone shows and writes it.
    """

    def __init__(self, job: Job, state: Mapping[str, Any] | None = None) -> None:
        state = state or {}
        self.steps: int = state.get("steps", 0)
        self.skipped_in_a_row: int = state.get("skipped_in_a_row", 0)
        self._epoch_steps: int = state.get("epoch_steps", 0)  # of an epoch that is not written down yet
        self._skipped: int = state.get("skipped", 0)  # ... and how many of these were
        # ... and the sums of the metrics of the others, and how many had them
        self._totals = collections.Counter(state.get("totals", {}))
        self._counts = collections.Counter(state.get("counts", {}))
        self._shown: dict[str, float] = {}  # beside the bar: the last means that there were
        self._job, self._path = job, job.directory / "metrics.jsonl"
        self._writes = jax.process_index() == 0
        self._events = None
        if self._writes:
            epochs_done = (self.steps - self._epoch_steps) // job.steps_per_epoch
            # Of the metrics, no more: the epochs before may have been logged by other flags.
            needed = ("epoch", "step", *(name for name in job.metrics.training if name.endswith("_loss")))
            kept = records.keep_lines(self._path, epochs_done, needed)
            self._events = _begin_events(job.directory, kept)
        self._bar = tqdm(
            desc=f"{job.name:>15}",
            total=job.epochs * job.steps_per_epoch * job.batch_size,
            initial=self.steps * job.batch_size,
            unit=f" {job.unit}",
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
        return -(-self.steps // self._job.steps_per_epoch)

    @property
    def epoch_is_complete(self) -> bool:
        """Whether all steps of an epoch were taken in, which is not written down yet."""
        return self._epoch_steps == self._job.steps_per_epoch

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Takes in the metrics of one step."""
        self.steps += 1
        self._epoch_steps += 1
        values = {name: float(value) for name, value in metrics.items()}
        if values.pop("skipped") > 0:
            self.skipped_in_a_row += 1
            self._skipped += 1
            warn(
                f"{self._job.name}: step {self.steps} (epoch {self.current_epoch}) is skipped: its loss or update is not finite"
            )
        else:
            self.skipped_in_a_row = 0
            known = {name: value for name, value in values.items() if not math.isnan(value)}
            self._totals.update(known)
            self._counts.update(known.keys())
        self._shown |= self._means()
        means = self._job.metrics.shown.items()
        shown = [f"{label} {self._shown[name]:.4f}" for name, label in means if name in self._shown]
        shown += [f"{self._skipped} skipped"] if self._skipped else []
        self._bar.set_postfix_str(f"epoch {self.current_epoch}/{self._job.epochs}, {', '.join(shown)}", refresh=False)
        self._bar.update(self._job.batch_size)

    def epoch(self, validation: Mapping[str, float], seconds: float) -> None:
        """Writes down an epoch that is complete."""
        means = self._means()
        record = {
            "epoch": self.current_epoch,
            "step": self.steps,
            **{name: means.get(name) for name in self._job.metrics.training},
            "skipped_steps": self._skipped,
            **{f"validation_{name}": validation.get(name) for name in self._job.metrics.validation},
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
            with contextlib.suppress(Exception):  # Every epoch was written when it ended.
                self._events.close()

    def _means(self) -> dict[str, float]:
        return {name: total / self._counts[name] for name, total in self._totals.items()}


def _begin_events(directory: epath.Path, lines: list[records.Record]) -> EventsWriter:
    """Begins the event files anew with the `lines` of the log, so that they never say what an interruption undid."""
    with records.writing(directory / "events.out.tfevents..."):
        for file in directory.glob("events.out.tfevents.*"):
            file.unlink()
        # Not tensorboardX's SummaryWriter: its thread ends when it cannot write, and the next write then waits forever.
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
