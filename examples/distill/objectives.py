"""What a student is trained on: its losses, their weights, and what holds them for the optimizer.

The first loss is always the task's, cross-entropy with the labels; an objective adds those of distillation:

    kd       the T² KL of plain distillation, in `PerLoss(task, kd)`
    dkd      DKD's weighted sum of its parts, target class and other classes, in `PerLoss(task, kd)`
    deepkd   both parts, each with a gradient of its own, in `DeepKDLosses(task, target, non_target)`
    crd      CRD's contrast of features, in `PerLoss(task, kd)`; it has projectors and a memory, see crd.py

A method says which one it trains on: `methods.register(name, objective="dkd")`. Whatever the objective, `kd_loss` in the
log is the plain KL, so that methods can be compared; the losses that are trained have their own names beside it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import dot_optax
from examples.distill import crd as contrast
from examples.trainer.errors import UserError, one_line


class Seen(NamedTuple):
    """What an objective may look at in a step."""

    logits: jax.Array  # of the student: [batch, classes]
    teacher_logits: jax.Array  # likewise
    labels: jax.Array  # [batch]
    temperature: float  # `config.distillation.temperature`
    step: Any  # how many steps were taken before this one
    # The others are there for an objective that has something of its own.
    features: jax.Array | None = None  # of the student, which its head is given: [batch, width]
    teacher_features: jax.Array | None = None  # likewise
    index: jax.Array | None = None  # [batch]: which images of the training split these are
    all_labels: Any = None  # of the training split


class Own(NamedTuple):
    """What the losses of an objective have of their own: parameters to be trained, and what is kept from step to step.

    Both are entries `step.OWN`, of the `params` and of the `rest` of a state, beside those of the network.
    """

    # (the widths of the features of student and teacher, the images of the training split) -> (params, rest)
    init: Callable[[tuple[int, int], int], tuple[Any, Any]]
    distill: Callable[[Seen, Any, Any], tuple[tuple[jax.Array, ...], Any]]  # with both -> the losses, the new rest


class Objective(NamedTuple):
    """The losses of a student."""

    container: Any  # a NamedTuple, which holds something for each loss, in order, as the optimizer takes it
    names: tuple[str, ...]  # of the losses in the log, the task's first
    weights: Any  # of the losses, in a container: numbers, or schedules from the number of updates so far
    distill: Callable[[Seen], tuple[jax.Array, ...]]  # the losses behind the task's, of each example
    deltas: Any = None  # in a container: how far the momentum of each loss is from `momentum`, if not by DOT's `delta`
    own: Own | None = None  # what its losses have of their own; then it has their `distill`, and no other


class Length(NamedTuple):
    """Of a student's training."""

    epochs: int
    steps_per_epoch: int


def kd_loss(seen: Seen) -> jax.Array:
    """The plain distillation loss of each example."""
    return dot_optax.losses.kd_loss(seen.logits, seen.teacher_logits, seen.temperature)


PLAIN = Objective(dot_optax.PerLoss, ("task", "kd"), dot_optax.PerLoss(1.0, 1.0), lambda seen: (kd_loss(seen),))


def build(name: str, config: ConfigDict, length: Length) -> Objective:
    """Returns the objective `name` as a whole config has it."""
    return OBJECTIVES[name](config, length)


def kd(config: ConfigDict, length: Length) -> Objective:
    """Cross-entropy and the KL of plain distillation, with the weights of the section `distillation`."""
    del length
    section = config.distillation
    return PLAIN._replace(weights=dot_optax.PerLoss(section.task_weight, section.kd_weight))


def dkd(config: ConfigDict, length: Length) -> Objective:
    """Cross-entropy and the loss of DKD, whose weight rises in the first epochs."""
    section = config.dkd

    def distill(seen: Seen) -> tuple[jax.Array]:
        return (dot_optax.losses.dkd_loss(*seen[:4], alpha=section.alpha, beta=section.beta),)

    epochs = section.warmup_epochs
    # DKD's first epoch has 1 / epochs of the weight: of one epoch all of it.
    rising = dot_optax.losses.dkd_warmup(length.steps_per_epoch, epochs) if epochs > 1 else 1.0
    return Objective(dot_optax.PerLoss, ("task", "dkd"), dot_optax.PerLoss(section.task_weight, rising), distill)


def deepkd(config: ConfigDict, length: Length) -> Objective:
    """Cross-entropy and both parts of DeepKD, the second on the teacher's likeliest classes, of which it takes ever more."""
    section = config.deepkd

    def distill(seen: Seen) -> tuple[jax.Array, jax.Array]:
        k = _likeliest(section, length, seen.logits.shape[-1], seen.step)
        return dot_optax.losses.deepkd_losses(*seen[:4], k=k)

    return Objective(
        dot_optax.DeepKDLosses,
        dot_optax.DeepKDLosses._fields,
        dot_optax.DeepKDLosses(section.task_weight, section.target_weight, section.non_target_weight),
        distill,
        dot_optax.DeepKDLosses(section.delta_task, section.delta_target, section.delta_non_target),
    )


def crd(config: ConfigDict, length: Length) -> Objective:
    """Cross-entropy and CRD's contrast of features."""
    del length
    section, seed = config.crd, config.seed

    def distill(seen: Seen, params: Any, rest: Any) -> tuple[tuple[jax.Array], Any]:
        loss, rest = contrast.loss(section, seed, seen, params, rest)
        return (loss,), rest

    own = Own(
        init=lambda widths, num_images: contrast.init(section, seed, widths, num_images),
        distill=distill,
    )
    weights = dot_optax.PerLoss(section.task_weight, section.crd_weight)
    return Objective(dot_optax.PerLoss, ("task", "crd"), weights, lambda seen: (), own=own)


OBJECTIVES: dict[str, Callable[[ConfigDict, Length], Objective]] = {"kd": kd, "dkd": dkd, "deepkd": deepkd, "crd": crd}


def check(name: str, objective: Objective, num_classes: int) -> None:
    """Raises if the losses cannot be computed for so many classes: the method `name` could not train."""
    if objective.own:  # whatever the number of classes
        return
    logits, labels = jax.ShapeDtypeStruct((2, num_classes), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)
    try:
        jax.eval_shape(lambda *seen: objective.distill(Seen(*seen, temperature=1.0, step=0)), logits, logits, labels)
    except Exception as error:
        raise UserError(f"cannot use method {name!r} with {num_classes} classes: {one_line(error, 200)}") from error


def why_not_longer(name: str, config: ConfigDict) -> str | None:
    """Why a finished run on this objective cannot be trained for more epochs; None if it can."""
    if name != "deepkd" or config.deepkd.top_k_fraction == 1:
        return None
    return (
        "DeepKD's phases of classes are parts of all epochs: with more epochs, every epoch would have had other classes;"
        " choose another --workdir to train anew"
    )


def _likeliest(section: ConfigDict, length: Length, num_classes: int, step: Any) -> Any:
    """How many classes DeepKD compares at a step; None: all."""
    if section.top_k_fraction == 1:
        return None
    begin, end = (round(part * length.epochs * length.steps_per_epoch) for part in section.top_k_phases)
    return dot_optax.losses.top_k_schedule(num_classes, begin, max(begin + 1, end), section.top_k_fraction)(step)
