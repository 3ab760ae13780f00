"""The train step and the evaluation step: pure functions, compiled once, the same for every method."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import dot_optax
from examples.distill import models


class TrainState(NamedTuple):
    """Everything that changes during training."""

    step: jax.Array
    params: Any
    rest: Any
    opt_state: optax.OptState


class Teacher(NamedTuple):
    """A trained network. Its variables are arguments of the compiled steps, not constants inside them."""

    graphdef: nnx.GraphDef
    variables: tuple[Any, Any]  # (params, rest)


def init_state(params: Any, rest: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, rest, optimizer.init(params))


def make_train_step(
    graphdef: nnx.GraphDef, teacher: nnx.GraphDef | None, optimizer: optax.GradientTransformation, temperature: float
) -> Callable[[TrainState, Any, Any], tuple[TrainState, dot_optax.PerLoss]]:
    """Returns `train_step(state, teacher_variables, batch) -> (state, losses)`; the old state's memory is reused.

    The losses are batch means, unweighted. Without a teacher the distillation loss is zero.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, teacher_variables: Any, batch: Any) -> tuple[TrainState, dot_optax.PerLoss]:
        teacher_logits = _teacher_logits(teacher, teacher_variables, batch)

        def loss_fn(params: Any) -> tuple[dot_optax.PerLoss, Any]:
            logits, rest = models.apply(graphdef, params, state.rest, batch["image"], train=True)
            losses = _losses(logits, teacher_logits, batch["label"], temperature)
            return jax.tree.map(jnp.mean, losses), rest

        (losses, rest), grads = dot_optax.value_and_grads(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, rest, opt_state), losses

    return train_step


def make_eval_step(
    graphdef: nnx.GraphDef, teacher: nnx.GraphDef | None, temperature: float
) -> Callable[[tuple[Any, Any], Any, Any], dict[str, jax.Array]]:
    """Returns `eval_step(variables, teacher_variables, batch)`, which gives sums over the valid examples."""

    @jax.jit
    def eval_step(variables: tuple[Any, Any], teacher_variables: Any, batch: Any) -> dict[str, jax.Array]:
        logits, _ = models.apply(graphdef, *variables, batch["image"], train=False)
        losses = _losses(logits, _teacher_logits(teacher, teacher_variables, batch), batch["label"], temperature)
        correct = jnp.argmax(logits, axis=-1) == batch["label"]
        per_example = {"task_loss": losses.task, "kd_loss": losses.kd, "accuracy": correct}
        return {name: jnp.sum(value, where=batch["valid"]) for name, value in per_example.items()}

    return eval_step


def _teacher_logits(teacher: nnx.GraphDef | None, variables: Any, batch: Any) -> jax.Array | None:
    return None if teacher is None else models.apply(teacher, *variables, batch["image"], train=False)[0]


def _losses(
    logits: jax.Array, teacher_logits: jax.Array | None, labels: jax.Array, temperature: float
) -> dot_optax.PerLoss:
    """Both losses of each example."""
    task = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    if teacher_logits is None:
        return dot_optax.PerLoss(task, kd=jnp.zeros_like(task))
    return dot_optax.PerLoss(task, kd=dot_optax.losses.kd_loss(logits, teacher_logits, temperature))
