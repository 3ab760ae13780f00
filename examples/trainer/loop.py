"""Trains one network, from its latest checkpoint if there is one; what it leaves behind stands in `job.Job`."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import grain
import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from examples.trainer import checkpoint, records
from examples.trainer.errors import UserError
from examples.trainer.job import Job, Variables
from examples.trainer.log import Log
from examples.trainer.parallel import Layout
from examples.trainer.preemption import Preempted
from examples.trainer.step import Metrics, network

_STEPS_AHEAD = 2  # that the device has in hand while the host waits for the metrics of a step


class Options(NamedTuple):
    """How to train, for all jobs of a run: none of it changes what a job computes."""

    layout: Layout
    checkpoint_every_steps: int  # besides every epoch that validates better than all before, and the last
    keep_checkpoints: int  # the latest, besides the best
    max_consecutive_skips: int  # after so many steps in a row that were not finite, and skipped, training stops
    preempted: Callable[[], bool]  # asked before every batch; see preemption.py


def options(config: ConfigDict, layout: Layout, preempted: Callable[[], bool]) -> Options:
    """Returns the options of a config, whose fields have the same names."""
    return Options(
        layout,
        config.checkpoint_every_steps,
        config.keep_checkpoints,
        config.max_consecutive_skips,
        preempted,
    )


def is_finished(directory: epath.Path) -> bool:
    """Whether the job of this folder needs no more training."""
    with records.reading(directory):
        return (directory / "result.json").exists()


def finished_epochs(directory: epath.Path) -> int:
    """For how many epochs the job of this folder was trained to the end; 0 if it is not finished."""
    if not is_finished(directory):
        return 0
    result = records.read_json(directory / "result.json")
    if "epochs" in result:
        return result["epochs"] or 0
    return records.count_lines(directory / "metrics.jsonl")  # It was once not said.


def fit(job: Job, options: Options) -> None:
    """Trains to the last epoch and writes the result."""
    try:
        cost = job.cost()  # First: should it fail, nothing is lost.
        variables, progress = _train(job, options)
        write_result(job, variables, progress, cost)
    except (KeyboardInterrupt, Preempted) as end:
        raise type(end)(_how_to_go_on(job)) from None


def write_result(
    job: Job, variables: Variables, progress: checkpoint.Progress | None = None, cost: records.Record | None = None
) -> None:
    """Evaluates a network on whole splits and writes `result.json`, which declares the job finished.

    `progress` and `cost` are those of a network which was trained here.
    """
    best = progress and progress.best
    means: dict[str, records.Record] = {}
    for name, split in job.splits.items():
        if split not in means:
            means[split] = job.evaluate(variables, name)
    result = {
        "method": job.name,
        "epochs": progress and job.epochs,
        "seconds": progress and progress.seconds,
        "best": best and {"step": best.step, job.metrics.best: best.value},
        "cost": cost or {},
        **{name: means[split] for name, split in job.splits.items()},
        **job.further(variables),
    }
    if jax.process_index() == 0:
        with records.writing(job.directory):
            job.directory.mkdir(exist_ok=True)
        records.write_json(job.directory / "result.json", result)


def fetch(results: Iterable[Metrics]) -> Iterator[dict[str, np.ndarray]]:
    """Brings what steps return to the host, each when two more were dispatched: so the device never waits for it."""
    dispatched: collections.deque[Metrics] = collections.deque()
    for result in results:
        dispatched.append(result)
        if len(dispatched) > _STEPS_AHEAD:
            yield jax.device_get(dispatched.popleft())
    while dispatched:
        yield jax.device_get(dispatched.popleft())


def _train(job: Job, options: Options) -> tuple[Variables, checkpoint.Progress]:
    """Goes from the latest checkpoint to the last epoch."""
    with (
        job.batches() as batches,
        checkpoint.Checkpoints(job.directory, options.keep_checkpoints) as checkpoints,
    ):
        training = _Training(job, options, batches, checkpoints)
        with contextlib.closing(training.log):
            training.run()
        return training.variables(), training.progress


class _Training:
    """The loop over steps, and what it has in hand."""

    def __init__(
        self, job: Job, options: Options, batches: grain.DatasetIterator, checkpoints: checkpoint.Checkpoints
    ) -> None:
        self._job, self._options, self._batches, self._checkpoints = job, options, batches, checkpoints
        self._last_step = job.epochs * job.steps_per_epoch
        layout = options.layout
        start = layout.gather(layout.place(job.init_state()))
        state, self.progress = checkpoints.restore_latest(start, batches, job.seed)
        del start  # Only `self.state` holds the arrays, so that the step can use their memory again.
        self.state = layout.place(state)
        self._started = time.perf_counter() - self.progress.seconds
        self.log = Log(job, self.progress.log)

    def variables(self) -> Variables:
        """The network as it is now."""
        state = self._options.layout.gather(self.state)
        return network(state.params), network(state.rest)

    def run(self) -> None:
        """Trains to the last epoch. When it ends with `Preempted`, the last step is saved."""
        every = self._options.checkpoint_every_steps
        try:
            while True:
                if self.log.epoch_is_complete:
                    self._end_epoch()
                done = self.log.steps
                is_best = self.progress.best is not None and self.progress.best.step == done
                # While steps are skipped one after another, the state may be what makes them so.
                if done == self._last_step or ((done % every == 0 or is_best) and not self.log.skipped_in_a_row):
                    self._save(wait=done == self._last_step)
                if done == self._last_step:
                    return
                self._train_until(min(_next_multiple(done, every), _next_multiple(done, self._job.steps_per_epoch)))
        except Preempted:
            self._save(wait=True)
            raise

    def _train_until(self, last: int) -> None:
        for metrics in fetch(self._steps(last - self.log.steps)):
            self.log.step(metrics)
            self._check_skipped()
        if self.log.steps < last:
            raise Preempted

    def _steps(self, count: int) -> Iterator[Metrics]:
        """Takes that many steps, or fewer when preempted, so that those in flight can be fetched first."""
        for _ in range(count):
            if self._options.preempted():
                return
            self.state, metrics = self._job.step(self.state, next(self._batches))
            yield metrics

    def _end_epoch(self) -> None:
        validation = self._job.evaluate(self.variables(), "validation")
        self._check_validation(validation)
        if not self.log.skipped_in_a_row:  # else it is not saved
            metrics = self._job.metrics
            self.progress = self.progress.validated(
                self.log.steps, validation[metrics.best], lower_is_better=metrics.lower_is_better
            )
        self.log.epoch(validation, self._seconds())

    def _save(self, *, wait: bool) -> None:
        if self.log.steps == 0 or self._checkpoints.has(self.log.steps):
            return
        self._remove_result()
        state = self._options.layout.gather(self.state)
        del self.state  # With shard_map it is a second set of momenta.
        self.progress = self.progress._replace(seconds=self._seconds(), log=self.log.state())
        self.progress = self._checkpoints.save(state, self._batches, self.progress, wait=wait)
        self.state = self._options.layout.place(state)  # so that it goes on as a run does that begins here

    def _remove_result(self) -> None:
        """Removes what was written after fewer epochs: the latest checkpoint is that of another network from here on."""
        if jax.process_index() == 0:
            with records.writing(self._job.directory):
                (self._job.directory / "result.json").unlink(missing_ok=True)

    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def _check_skipped(self) -> None:
        skipped = self.log.skipped_in_a_row
        if skipped >= self._options.max_consecutive_skips:
            raise self._not_finite(f"{skipped} steps in a row were skipped, the last of them step {self.log.steps}")

    def _check_validation(self, validation: records.Record) -> None:
        # What the last update of an epoch has done shows only here.
        if not np.isfinite(list(validation.values())).all():
            raise self._not_finite(f"the validation loss is not finite after step {self.log.steps}")

    def _not_finite(self, what: str) -> UserError:
        latest = self._checkpoints.latest()
        kept = f"the latest checkpoint is {latest}" if latest else "no checkpoint was saved yet"
        return UserError(
            f"{self._job.name}: {what} (epoch {self.log.current_epoch}); {kept}; {self._job.remedy} and start again in a"
            " new --workdir"
        )


def _next_multiple(step: int, interval: int) -> int:
    return (step // interval + 1) * interval


def _how_to_go_on(job: Job) -> str:
    step = max(checkpoint.saved_steps(job.directory), default=0)
    if step:
        return f"the same command goes on from step {step} of {job.name}"
    return f"the same command starts {job.name} again, of which no checkpoint was saved yet"
