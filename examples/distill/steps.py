"""The train step and the evaluation step: pure functions, compiled once, the same for every method."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import dot_optax
from examples.distill import models
from examples.distill.parallel import AXIS, Layout, jit_layout

Metrics = dict[str, jax.Array]


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


class Problem(NamedTuple):
    """What a step computes: the two networks, and how images and logits become losses."""

    student: nnx.GraphDef
    teacher: nnx.GraphDef | None  # without one there is no distillation loss
    temperature: float
    mean: tuple[float, ...]  # of the stored pixels, per channel
    std: tuple[float, ...]


def init_state(params: Any, rest: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, rest, optimizer.init(params))


def make_train_step(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    layout: Layout | None = None,
    *,
    gradient_metrics: bool = True,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]:
    """Returns `train_step(state, teacher_variables, batch) -> (state, metrics)`; the old state's memory is reused.

    The metrics are the two losses, as unweighted means over the batch, and with `gradient_metrics` the norms of their
    gradients and the cosine between these; without a teacher, only those of the task. By default it runs on one device.

    A step of which a loss, the update or a statistic of BatchNorm is not finite, on any device, is skipped: only `step`
    changes, and no schedule of the optimizer moves on. The metric `skipped` says so: it is above 0 then.
    """
    layout = layout or jit_layout(jax.sharding.Mesh(jax.devices()[:1], (AXIS,)))

    def train_step(state: TrainState, teacher_variables: Any, batch: Any) -> tuple[TrainState, Metrics]:
        images = _normalize(problem, batch["image"])
        teacher_logits = _teacher_logits(problem, teacher_variables, images)

        def loss_fn(params: Any) -> tuple[dot_optax.PerLoss, Any]:
            logits, rest = models.apply(problem.student, params, state.rest, images, train=True)
            losses = _losses(problem, logits, teacher_logits, batch["label"])
            return jax.tree.map(jnp.mean, losses), rest

        params = layout.local_params(state.params)
        (losses, rest), grads = dot_optax.value_and_grads(loss_fn, has_aux=True)(params)
        grads = layout.average_grads(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        metrics = {"task_loss": losses.task, "kd_loss": losses.kd}
        if gradient_metrics:
            metrics |= _gradient_metrics(grads)
        if problem.teacher is None:
            metrics = {name: value for name, value in metrics.items() if name.startswith("task_")}
        finite = _all_finite((losses, updates, rest))
        metrics = layout.average_metrics(metrics | {"skipped": jnp.float32(~finite)})
        params = optax.apply_updates(state.params, layout.average_updates(updates))
        new = TrainState(state.step + 1, params, rest, opt_state)
        skipped = metrics["skipped"] > 0
        # One condition: into a `where` for every array XLA would fuse the whole check, and compile for a minute.
        kept = jax.lax.cond(skipped, lambda old, new: old, lambda old, new: new, state, new)
        return kept._replace(step=new.step), metrics

    return layout.compile(train_step)


def make_eval_step(problem: Problem) -> Callable[[tuple[Any, Any], Any, Any], Metrics]:
    """Returns `eval_step(variables, teacher_variables, batch)`, which gives sums over the valid examples.

    `top1` and `top5` count the images whose label is the likeliest class, and among the five likeliest.
    """

    @jax.jit
    def eval_step(variables: tuple[Any, Any], teacher_variables: Any, batch: Any) -> Metrics:
        images, label = _normalize(problem, batch["image"]), batch["label"]
        logits, _ = models.apply(problem.student, *variables, images, train=False)
        losses = _losses(problem, logits, _teacher_logits(problem, teacher_variables, images), label)
        per_example = {"task_loss": losses.task, "kd_loss": losses.kd}
        if problem.teacher is None:
            del per_example["kd_loss"]
        for k in (1, 5):
            _, likeliest = jax.lax.top_k(logits, min(k, logits.shape[-1]))
            per_example[f"top{k}"] = jnp.any(likeliest == label[:, None], axis=-1)
        return {name: jnp.sum(value, where=batch["valid"]) for name, value in per_example.items()}

    return eval_step


def _normalize(problem: Problem, images: jax.Array) -> jax.Array:
    leading = range(images.ndim - 1)
    mean, std = (jnp.expand_dims(jnp.float32(values), leading) for values in (problem.mean, problem.std))
    return (images.astype(jnp.float32) - mean) / std


def _teacher_logits(problem: Problem, variables: Any, images: jax.Array) -> jax.Array | None:
    return None if problem.teacher is None else models.apply(problem.teacher, *variables, images, train=False)[0]


def _losses(
    problem: Problem, logits: jax.Array, teacher_logits: jax.Array | None, labels: jax.Array
) -> dot_optax.PerLoss:
    """Both losses of each example."""
    task = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    if teacher_logits is None:
        return dot_optax.PerLoss(task, kd=jnp.zeros_like(task))
    return dot_optax.PerLoss(task, kd=dot_optax.losses.kd_loss(logits, teacher_logits, problem.temperature))


def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _gradient_metrics(grads: dot_optax.PerLoss) -> Metrics:
    task, kd = optax.tree.norm(grads.task), optax.tree.norm(grads.kd)
    product = jnp.where(task * kd > 0, task * kd, 1.0)  # A gradient that vanishes has a cosine of 0 with any other.
    return {"task_grad_norm": task, "kd_grad_norm": kd, "grad_cosine": optax.tree.vdot(*grads) / product}
