"""Trains one network, from its latest checkpoint if there is one.

It leaves in the arm's folder:

    checkpoints/    see checkpoint.py
    metrics.jsonl   one line per epoch, see log.py; events.out... says the same to TensorBoard
    result.json     losses, top-1 and top-5 on each whole split; written last, so an arm that has it is finished
"""

import collections
import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

from examples.distill import checkpoint, data, models, parallel, records, steps
from examples.distill.errors import UserError
from examples.distill.log import Log

_STEPS_AHEAD = 2  # that the device has in hand while the host waits for the metrics of a step

Variables = tuple[Any, Any]  # (params, rest)
Evaluate = Callable[[Variables, str], records.Record]


class Setup(NamedTuple):
    """What all arms of an experiment share."""

    config: ConfigDict
    dataset: data.Dataset
    layout: parallel.Layout


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
        evaluate, variables, seconds = _train(arm, setup)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(arm, _steps_per_epoch(setup))) from None
    write_result(arm, setup, evaluate, variables, seconds=seconds)


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
                sums.update({name: float(value) for name, value in batch_sums.items()})
                bar.update(min(batch_size, len(examples) - bar.n))
        return {name: value / len(examples) for name, value in sums.items()} | {"count": len(examples)}

    return evaluate


def write_result(
    arm: Arm,
    setup: Setup,
    evaluate: Evaluate,
    variables: Variables,
    *,
    splits: Sequence[str] = ("train", "validation", "test"),
    seconds: float | None = None,
) -> None:
    """Evaluates a network on whole splits and writes `result.json`, which declares the arm finished."""
    means: dict[str, records.Record] = {}  # by what the config calls a split: the same one twice is evaluated once
    names = {name: setup.config.dataset[name] for name in splits}
    for name, split in names.items():
        if split not in means:
            means[split] = evaluate(variables, name)
    result = {"method": arm.name, "seconds": seconds, **{name: means[split] for name, split in names.items()}}
    if jax.process_index() == 0:
        arm.directory.mkdir(exist_ok=True)
        records.write_json(arm.directory / "result.json", result)


def _train(arm: Arm, setup: Setup) -> tuple[Evaluate, Variables, float]:
    """The loop over epochs: from the latest checkpoint to the last epoch. Returns the final variables and the seconds."""
    config, dataset, layout = setup
    graphdef, *variables = new_network(arm.model, setup, axis_name=layout.axis_name)
    state = layout.place(steps.init_state(*variables, arm.optimizer))
    del variables  # Nobody but the step holds a state, so that its memory can be used again.
    evaluate = make_evaluate(arm, setup, graphdef)
    problem, teacher_variables = _problem(arm, setup, graphdef)
    train_step = steps.make_train_step(problem, arm.optimizer, layout, gradient_metrics=config.gradient_metrics)
    steps_per_epoch = _steps_per_epoch(setup)

    def train(batches: Iterable[data.Batch]) -> Iterator[steps.Metrics]:
        nonlocal state
        for batch in batches:
            state, metrics = train_step(state, teacher_variables, batch)
            yield metrics

    with (
        data.train_batches(dataset, config.batch_size, config.seed, arm.epochs, layout.put_batch) as batches,
        checkpoint.manager(arm.directory) as checkpoints,
    ):
        state, progress = checkpoint.restore_latest(checkpoints, state, batches)
        state = layout.spread(state)
        started = time.perf_counter() - progress.seconds
        log = Log(arm.name, arm.directory, progress.epoch, arm.epochs, steps_per_epoch, config.batch_size)
        with contextlib.closing(log):
            for epoch in range(progress.epoch + 1, arm.epochs + 1):
                for step_metrics in _fetched(train(itertools.islice(batches, steps_per_epoch))):
                    log.step(step_metrics)
                    _check_finite(arm, checkpoints, epoch, log.steps, step_metrics)
                gathered = layout.gather(state)
                validation = evaluate((gathered.params, gathered.rest), "validation")
                # What the last update of the epoch has done shows only here.
                _check_finite(arm, checkpoints, epoch, log.steps, validation)
                progress = checkpoint.Progress(epoch, time.perf_counter() - started)
                log.epoch(validation, progress.seconds)
                if epoch % config.checkpoint_every_epochs == 0 or epoch == arm.epochs:
                    checkpoint.save(checkpoints, gathered, batches, progress)
                del gathered  # With shard_map it is a second set of momenta.
    state = layout.gather(state)
    return evaluate, (state.params, state.rest), progress.seconds


def _problem(arm: Arm, setup: Setup, graphdef: nnx.GraphDef) -> tuple[steps.Problem, Variables | None]:
    """Returns what the steps of an arm compute, and the variables of its teacher."""
    teacher, teacher_variables = arm.teacher or (None, None)
    config = setup.config
    problem = steps.Problem(graphdef, teacher, config.distillation.temperature, config.dataset.mean, config.dataset.std)
    return problem, teacher_variables


def _steps_per_epoch(setup: Setup) -> int:
    return data.steps_per_epoch(setup.dataset, setup.config.batch_size)


def _fetched(results: Iterable[steps.Metrics]) -> Iterator[dict[str, np.ndarray]]:
    """Fetches what steps return, each when two more were dispatched: so the device never waits for the host."""
    dispatched: collections.deque[steps.Metrics] = collections.deque()
    for result in results:
        dispatched.append(result)
        if len(dispatched) > _STEPS_AHEAD:
            yield jax.device_get(dispatched.popleft())
    while dispatched:
        yield jax.device_get(dispatched.popleft())


def _how_to_go_on(arm: Arm, steps_per_epoch: int) -> str:
    step = max(checkpoint.saved_steps(arm.directory), default=0)
    if step:
        return f"the same command goes on from the checkpoint of epoch {step // steps_per_epoch} of {arm.name}"
    return f"the same command starts {arm.name} again, of which no checkpoint was saved yet"


def _check_finite(
    arm: Arm, checkpoints: ocp.CheckpointManager, epoch: int, step: int, metrics: dict[str, np.ndarray | float]
) -> None:
    """Raises if a metric is not finite, before anything of the epoch is saved."""
    if np.isfinite(list(metrics.values())).all():
        return
    checkpoints.wait_until_finished()
    latest = checkpoints.latest_step()
    kept = (
        f"the last good checkpoint is {checkpoints.directory / str(latest)}"
        if latest
        else "no checkpoint was saved yet"
    )
    raise UserError(
        f"{arm.name}: the loss is not finite at step {step} (epoch {epoch}); {kept}; {arm.remedy} and start again in a"
        " new --workdir"
    )
