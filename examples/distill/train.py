"""Trains one network, from its latest checkpoint if there is one.

It leaves in the arm's folder:

    checkpoints/    see checkpoint.py
    metrics.jsonl   one line per epoch: epoch, step, task_loss, kd_loss, validation_accuracy, seconds (up to here)
    result.json     losses and accuracy on each whole split; written last, so an arm that has it is finished

Losses are means over images, unweighted; `kd_loss` is 0 for the teacher.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

import dot_optax
from examples.distill import checkpoint, data, models, records, steps
from examples.distill.errors import UserError


class Arm(NamedTuple):
    """One training run of an experiment: the student of one method, or the teacher."""

    name: str
    directory: Path
    model: ConfigDict  # name and options for `models.build`
    optimizer: optax.GradientTransformation  # over per-loss gradients, see methods.py
    epochs: int
    remedy: str  # what to change when the loss is not finite
    teacher: steps.Teacher | None = None  # whom the student imitates


_TrainEpoch = Callable[[steps.TrainState, Iterable[data.Batch]], tuple[steps.TrainState, list[dot_optax.PerLoss]]]
_Evaluate = Callable[[steps.TrainState, grain.MapDataset], dict[str, float]]


def is_finished(directory: Path) -> bool:
    """Whether the arm in this folder needs no more training."""
    return (directory / "result.json").exists()


def new_network(model: ConfigDict, dataset: data.Dataset, seed: int) -> tuple[nnx.GraphDef, Any, Any]:
    """Returns (graphdef, params, rest) of a freshly initialized network."""
    return models.split(
        models.build(**model, num_classes=dataset.num_classes, input_shape=dataset.image_shape, rngs=nnx.Rngs(seed))
    )


def fit(arm: Arm, config: ConfigDict, dataset: data.Dataset) -> None:
    """Trains `arm` to its last epoch and writes its result."""
    graphdef, params, rest = new_network(arm.model, dataset, config.seed)
    teacher_graphdef, teacher_variables = arm.teacher or (None, None)
    temperature = config.distillation.temperature
    train_step = steps.make_train_step(graphdef, teacher_graphdef, arm.optimizer, temperature)
    eval_step = steps.make_eval_step(graphdef, teacher_graphdef, temperature)

    def train_epoch(
        state: steps.TrainState, batches: Iterable[data.Batch]
    ) -> tuple[steps.TrainState, list[dot_optax.PerLoss]]:
        losses = []
        for batch in batches:
            state, loss = train_step(state, teacher_variables, batch)
            losses.append(loss)
        return state, jax.device_get(losses)  # Once an epoch: a fetch in every step would hold up the next step.

    def evaluate(state: steps.TrainState, split: grain.MapDataset) -> dict[str, float]:
        batches = data.eval_batches(split, config.eval_batch_size)
        sums = jax.device_get([eval_step((state.params, state.rest), teacher_variables, batch) for batch in batches])
        means = {name: float(sum(batch[name] for batch in sums)) / len(split) for name in sums[0]}
        return means | {"count": len(split)}

    state = steps.init_state(params, rest, arm.optimizer)
    if checkpoint.is_imported(arm.directory):
        params, rest = checkpoint.load_variables(arm.directory)
        state, seconds = state._replace(params=params, rest=rest), 0.0
    else:
        try:
            state, seconds = _train(arm, config, dataset, state, train_epoch, evaluate)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_how_to_go_on(arm, data.steps_per_epoch(dataset, config.batch_size))) from None
    splits = {name: evaluate(state, getattr(dataset, name)) for name in ("train", "validation", "test")}
    records.write_json(arm.directory / "result.json", {"method": arm.name, "seconds": seconds, **splits})


def _train(
    arm: Arm,
    config: ConfigDict,
    dataset: data.Dataset,
    state: steps.TrainState,
    train_epoch: _TrainEpoch,
    evaluate: _Evaluate,
) -> tuple[steps.TrainState, float]:
    """The loop over epochs: from the latest checkpoint to the last epoch. Returns the final state and the seconds."""
    batches = data.train_batches(dataset.train, config.batch_size, config.seed, arm.epochs)
    steps_per_epoch = data.steps_per_epoch(dataset, config.batch_size)
    with checkpoint.manager(arm.directory) as checkpoints:
        state, progress = checkpoint.restore_latest(checkpoints, state, batches)
        records.keep_lines(arm.directory / "metrics.jsonl", progress.epoch)
        started = time.perf_counter() - progress.seconds
        with _progress_bar(arm, progress) as bar:
            for epoch in range(progress.epoch + 1, arm.epochs + 1):
                state, losses = train_epoch(state, itertools.islice(batches, steps_per_epoch))
                validation = evaluate(state, dataset.validation)
                _check_finite(arm, checkpoints, epoch, losses, validation)
                progress = checkpoint.Progress(epoch, time.perf_counter() - started)
                _log_epoch(arm, progress, losses, validation, bar)
                if epoch % config.checkpoint_every_epochs == 0 or epoch == arm.epochs:
                    checkpoint.save(checkpoints, state, batches, progress)
    return state, progress.seconds


def _how_to_go_on(arm: Arm, steps_per_epoch: int) -> str:
    step = max(checkpoint.saved_steps(arm.directory), default=0)
    if step:
        return f"the same command goes on from the checkpoint of epoch {step // steps_per_epoch} of {arm.name}"
    return f"the same command starts {arm.name} again, of which no checkpoint was saved yet"


def _check_finite(
    arm: Arm,
    checkpoints: ocp.CheckpointManager,
    epoch: int,
    losses: list[dot_optax.PerLoss],
    validation: dict[str, float],
) -> None:
    """Raises if a loss of this epoch is not finite, before anything of the epoch is saved."""
    finite = [np.isfinite(loss).all() for loss in losses]
    # The last update of the epoch shows only afterwards, in the validation loss.
    finite.append(np.isfinite(list(validation.values())).all())
    if all(finite):
        return
    step = (epoch - 1) * len(losses) + min(finite.index(False) + 1, len(losses))
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


def _log_epoch(
    arm: Arm, progress: checkpoint.Progress, losses: list[dot_optax.PerLoss], validation: dict[str, float], bar: tqdm
) -> None:
    task_loss, kd_loss = (float(mean) for mean in np.mean(losses, axis=0))
    record = {
        "epoch": progress.epoch,
        "step": progress.epoch * len(losses),
        "task_loss": task_loss,
        "kd_loss": kd_loss,
        "validation_accuracy": validation["accuracy"],
        "seconds": progress.seconds,
    }
    records.append_line(arm.directory / "metrics.jsonl", record)
    shown = f"task loss {task_loss:.4f}, KD loss {kd_loss:.4f}" if arm.teacher else f"task loss {task_loss:.4f}"
    bar.set_postfix_str(shown, refresh=False)
    bar.update()


def _progress_bar(arm: Arm, progress: checkpoint.Progress) -> tqdm:
    # Into a log file, a line now and then; on a terminal, as often as the eye can follow.
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(desc=f"{arm.name:>15}", total=arm.epochs, initial=progress.epoch, unit="epoch", mininterval=interval)
