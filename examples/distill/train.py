"""Trains one network, from its latest checkpoint if there is one.

It leaves in the arm's folder:

    checkpoints/    see checkpoint.py
    metrics.jsonl   one line per epoch, see log.py; events.out... says the same to TensorBoard
    result.json     losses, top-1 and top-5 on each whole split; written last, so an arm that has it is finished
"""

import collections
import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

from examples.distill import checkpoint, data, models, parallel, records, steps
from examples.distill.errors import UserError
from examples.distill.log import Log
from examples.distill.preemption import Preempted

_STEPS_AHEAD = 2  # that the device has in hand while the host waits for the metrics of a step

Variables = tuple[Any, Any]  # (params, rest)
Evaluate = Callable[[Variables, str], records.Record]


class Setup(NamedTuple):
    """What all arms of an experiment share."""

    config: ConfigDict
    dataset: data.Dataset
    layout: parallel.Layout
    preempted: Callable[[], bool]  # asked before every batch; see preemption.py


class Arm(NamedTuple):
    """One training run of an experiment: the student of one method, or the teacher."""

    name: str
    directory: Path
    model: ConfigDict  # name and options for `models.build`
    optimizer: optax.GradientTransformation  # over per-loss gradients, see methods.py
    epochs: int
    remedy: str  # what to change when the loss is not finite
    teacher: steps.Teacher | None = None  # whom the student imitates, with its variables on all devices


def is_finished(directory: Path) -> bool:
    """Whether the arm in this folder needs no more training."""
    return (directory / "result.json").exists()


def new_network(model: ConfigDict, setup: Setup, *, axis_name: str | None = None) -> tuple[nnx.GraphDef, Any, Any]:
    """Returns (graphdef, params, rest) of a freshly initialized network."""
    return models.split(
        models.build(
            **model,
            num_classes=setup.dataset.num_classes,
            input_shape=setup.dataset.image_shape,
            dtype=setup.config.dtype,
            axis_name=axis_name,
            rngs=nnx.Rngs(setup.config.seed),
        )
    )


def fit(arm: Arm, setup: Setup) -> None:
    """Trains `arm` to its last epoch and writes its result."""
    try:
        evaluate, variables, progress = _train(arm, setup)
        write_result(arm, setup, evaluate, variables, progress)
    except (KeyboardInterrupt, Preempted) as end:
        raise type(end)(_how_to_go_on(arm)) from None


def make_evaluate(arm: Arm, setup: Setup, graphdef: nnx.GraphDef) -> Evaluate:
    """Returns `evaluate(variables, split)`, which gives means over a split, and how many images it has."""
    problem, teacher_variables = _problem(arm, setup, graphdef)
    eval_step = steps.make_eval_step(problem)
    mesh = setup.layout.mesh
    batch_size = -(-setup.config.eval_batch_size // mesh.size) * mesh.size  # Whatever is too much is padding.
    put = functools.partial(parallel.divide, mesh)

    def evaluate(variables: Variables, split: str) -> records.Record:
        examples = getattr(setup.dataset, split)
        batches = data.eval_batches(setup.dataset, examples, batch_size, put)
        sums: collections.Counter[str] = collections.Counter()
        # The bar appears only where one would wonder.
        with tqdm(
            desc=f"{arm.name}, {split} split",
            total=len(examples),
            unit=" images",
            delay=10,
            leave=False,
            disable=jax.process_index() > 0,
        ) as bar:
            for batch_sums in _fetched(eval_step(variables, teacher_variables, batch) for batch in batches):
                if setup.preempted():
                    raise Preempted
                sums.update({name: float(value) for name, value in batch_sums.items()})
                bar.update(min(batch_size, len(examples) - bar.n))
        return {name: value / len(examples) for name, value in sums.items()} | {"count": len(examples)}

    return evaluate


def write_result(
    arm: Arm,
    setup: Setup,
    evaluate: Evaluate,
    variables: Variables,
    progress: checkpoint.Progress | None = None,
    *,
    splits: Sequence[str] = ("train", "validation", "test"),
) -> None:
    """Evaluates a network on whole splits and writes `result.json`, which declares the arm finished.

    `progress` is that of a network which was trained here.
    """
    means: dict[str, records.Record] = {}  # by what the config calls a split: the same one twice is evaluated once
    names = {name: setup.config.dataset[name] for name in splits}
    for name, split in names.items():
        if split not in means:
            means[split] = evaluate(variables, name)
    result = {
        "method": arm.name,
        "seconds": progress and progress.seconds,
        "best": progress and progress.best and progress.best._asdict(),
        **{name: means[split] for name, split in names.items()},
    }
    if jax.process_index() == 0:
        with records.writing(arm.directory):
            arm.directory.mkdir(exist_ok=True)
        records.write_json(arm.directory / "result.json", result)


def _train(arm: Arm, setup: Setup) -> tuple[Evaluate, Variables, checkpoint.Progress]:
    """Goes from the latest checkpoint to the last epoch."""
    config, dataset, layout, _ = setup
    with (
        data.train_batches(dataset, config.batch_size, config.seed, arm.epochs, layout.put_batch) as batches,
        checkpoint.Checkpoints(arm.directory, config.keep_checkpoints) as checkpoints,
    ):
        training = _Training(arm, setup, batches, checkpoints)
        with contextlib.closing(training.log):
            training.run()
        state = layout.gather(training.state)
        return training.evaluate, (state.params, state.rest), training.progress


class _Training:
    """The loop over steps, and what it has in hand."""

    def __init__(
        self, arm: Arm, setup: Setup, batches: grain.DatasetIterator, checkpoints: checkpoint.Checkpoints
    ) -> None:
        self._arm, self._setup, self._batches, self._checkpoints = arm, setup, batches, checkpoints
        config, dataset, layout, _ = setup
        graphdef, *variables = new_network(arm.model, setup, axis_name=layout.axis_name)
        state = layout.place(steps.init_state(*variables, arm.optimizer))
        self.evaluate = make_evaluate(arm, setup, graphdef)
        problem, self._teacher_variables = _problem(arm, setup, graphdef)
        self._step = steps.make_train_step(problem, arm.optimizer, layout, gradient_metrics=config.gradient_metrics)
        self._steps_per_epoch = data.steps_per_epoch(dataset, config.batch_size)
        self._last_step = arm.epochs * self._steps_per_epoch

        state, self.progress = checkpoints.restore_latest(state, batches, config.seed)
        self.state = layout.spread(state)  # Nobody else holds a state, so that the step can use its memory again.
        self._started = time.perf_counter() - self.progress.seconds
        self.log = Log(arm.name, arm.directory, arm.epochs, self._steps_per_epoch, config.batch_size, self.progress.log)

    def run(self) -> None:
        """Trains to the last epoch. When it ends with `Preempted`, the last step is saved."""
        every = self._setup.config.checkpoint_every_steps
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
                self._train_until(min(_next_multiple(done, every), _next_multiple(done, self._steps_per_epoch)))
        except Preempted:
            self._save(wait=True)
            raise

    def _train_until(self, last: int) -> None:
        for metrics in _fetched(self._steps(last - self.log.steps)):
            self.log.step(metrics)
            self._check_skipped()
        if self.log.steps < last:
            raise Preempted

    def _steps(self, count: int) -> Iterator[steps.Metrics]:
        """Takes that many steps, or fewer when preempted, so that those in flight can be fetched first."""
        for _ in range(count):
            if self._setup.preempted():
                return
            self.state, metrics = self._step(self.state, self._teacher_variables, next(self._batches))
            yield metrics

    def _end_epoch(self) -> None:
        state = self._setup.layout.gather(self.state)
        validation = self.evaluate((state.params, state.rest), "validation")
        self._check_validation(validation)
        if not self.log.skipped_in_a_row:  # else it is not saved
            self.progress = self.progress.validated(self.log.steps, validation["top1"])
        self.log.epoch(validation, self._seconds())

    def _save(self, *, wait: bool) -> None:
        if self.log.steps == 0 or self._checkpoints.has(self.log.steps):
            return
        state = self._setup.layout.gather(self.state)
        del self.state  # With shard_map it is a second set of momenta.
        self.progress = self.progress._replace(seconds=self._seconds(), log=self.log.state())
        self.progress = self._checkpoints.save(state, self._batches, self.progress, wait=wait)
        self.state = self._setup.layout.spread(state)  # so that it goes on as a run does that begins here

    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def _check_skipped(self) -> None:
        skipped = self.log.skipped_in_a_row
        if skipped >= self._setup.config.max_consecutive_skips:
            raise self._not_finite(f"{skipped} steps in a row were skipped, the last of them step {self.log.steps}")

    def _check_validation(self, validation: records.Record) -> None:
        # What the last update of an epoch has done shows only here.
        if not np.isfinite(list(validation.values())).all():
            raise self._not_finite(f"the validation loss is not finite after step {self.log.steps}")

    def _not_finite(self, what: str) -> UserError:
        latest = self._checkpoints.latest()
        kept = f"the latest checkpoint is {latest}" if latest else "no checkpoint was saved yet"
        return UserError(
            f"{self._arm.name}: {what} (epoch {self.log.current_epoch}); {kept}; {self._arm.remedy} and start again in a"
            " new --workdir"
        )


def _next_multiple(step: int, interval: int) -> int:
    return (step // interval + 1) * interval


def _problem(arm: Arm, setup: Setup, graphdef: nnx.GraphDef) -> tuple[steps.Problem, Variables | None]:
    """Returns what the steps of an arm compute, and the variables of its teacher."""
    teacher, teacher_variables = arm.teacher or (None, None)
    config = setup.config
    problem = steps.Problem(graphdef, teacher, config.distillation.temperature, config.dataset.mean, config.dataset.std)
    return problem, teacher_variables


def _fetched(results: Iterable[steps.Metrics]) -> Iterator[dict[str, np.ndarray]]:
    """Fetches what steps return, each when two more were dispatched: so the device never waits for the host."""
    dispatched: collections.deque[steps.Metrics] = collections.deque()
    for result in results:
        dispatched.append(result)
        if len(dispatched) > _STEPS_AHEAD:
            yield jax.device_get(dispatched.popleft())
    while dispatched:
        yield jax.device_get(dispatched.popleft())


def _how_to_go_on(arm: Arm) -> str:
    step = max(checkpoint.saved_steps(arm.directory), default=0)
    if step:
        return f"the same command goes on from step {step} of {arm.name}"
    return f"the same command starts {arm.name} again, of which no checkpoint was saved yet"
