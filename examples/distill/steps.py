"""What the steps of this example compute: normalized images, the losses of each, and the evaluation of a batch."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import dot_optax
from examples.distill import models, objectives
from examples.distill.objectives import Seen
from examples.trainer import step
from examples.trainer.parallel import Layout
from examples.trainer.sampling import EXACT, Losses, Sampling, flops
from examples.trainer.step import OWN, Metrics, TrainState, network


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
    kd_gradient: bool = True  # else the distillation loss is there for the log alone
    objective: objectives.Objective = objectives.PLAIN
    all_labels: Any = None  # of the training split, for an objective that has something of its own

    @property
    def losses(self) -> Losses:
        """The names of the losses of a step; without a teacher those of distillation are 0."""
        trained = self.objective.names
        # The plain distillation loss is logged whatever the objective is.
        return Losses(trained, () if "kd" in trained or self.teacher is None else ("kd",))


def make_train_step(
    problem: Problem, optimizer: optax.GradientTransformation, layout: Layout, **options: Any
) -> Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]:
    """Returns `train_step(state, teacher_variables, batch) -> (state, metrics)`, see `step.make_train_step`.

    The metrics are the losses, as unweighted means over the batch, and with `gradient_metrics` the norms of their
    gradients and the cosine between these; without a teacher, only those of the task.
    """
    losses = problem.losses
    return step.make_train_step(
        functools.partial(_train_losses, problem),
        optimizer,
        layout,
        losses=losses,
        container=problem.objective.container,
        reported=("task",) if problem.teacher is None else losses.trained + losses.logged,
        **options,
    )


def relative_flops(problem: Problem, plain: Problem, sampling: Sampling, summed: Any, *args: Any) -> float | None:
    """The operations of a step up to its gradients, where those of plain distillation, the problem `plain`, are 1.

    These are one gradient of the sum of both losses, the teacher's forward pass included. The last arguments are the
    student's params and rest, the teacher's variables and a batch, or their shapes. None where XLA does not count.
    """
    both = dot_optax.PerLoss(1.0, 1.0)
    found = flops(functools.partial(_train_losses, problem), problem.losses, sampling, summed, *args)
    of_kd = flops(functools.partial(_train_losses, plain), plain.losses, EXACT, both, *args)
    return found / of_kd if found and of_kd else None


def reached(problem: Problem, params: Any, *args: Any) -> Any:
    """Which loss that is trained reaches which parameter; the arguments are those of a step's losses, or their shapes."""

    def losses(params: Any, *args: Any) -> Any:
        values, _ = _train_losses(problem, params, *args, step=0)
        return problem.objective.container(*(values[name] for name in problem.losses.trained))

    return dot_optax.reached(losses, params, *args)


def make_eval_step(problem: Problem) -> Callable[[tuple[Any, Any], Any, Any], Metrics]:
    """Returns `eval_step(variables, teacher_variables, batch)`, which gives sums over the valid examples.

    `top1` and `top5` count the images whose label is the likeliest class, and among the five likeliest. `kd_loss` is the
    plain one, whatever the student was trained on: other losses may depend on the step.
    """

    @jax.jit
    def eval_step(variables: tuple[Any, Any], teacher_variables: Any, batch: Any) -> Metrics:
        images, label = _normalize(problem, batch["image"]), batch["label"]
        logits, _ = models.apply(problem.student, *variables, images, train=False)
        per_example = {"task_loss": _task_loss(logits, label)}
        if problem.teacher is not None:
            teacher_logits, _ = models.apply(problem.teacher, *teacher_variables, images, train=False)
            per_example["kd_loss"] = dot_optax.losses.kd_loss(logits, teacher_logits, problem.temperature)
        for k in (1, 5):
            _, likeliest = jax.lax.top_k(logits, min(k, logits.shape[-1]))
            per_example[f"top{k}"] = jnp.any(likeliest == label[:, None], axis=-1)
        return {name: jnp.sum(value, where=batch["valid"]) for name, value in per_example.items()}

    return eval_step


def _train_losses(
    problem: Problem, params: Any, rest: Any, teacher_variables: Any, batch: Any, step: Any
) -> tuple[dict[str, jax.Array], Any]:
    images, label = _normalize(problem, batch["image"]), batch["label"]
    own = problem.objective.own
    apply = models.apply_with_features if own else _apply
    if problem.teacher is not None:
        teacher_logits, teacher_features, _ = apply(problem.teacher, *teacher_variables, images, train=False)
    logits, features, new = apply(problem.student, network(params), network(rest), images, train=True)
    task, *others = problem.losses.trained
    losses = {task: jnp.mean(_task_loss(logits, label))}
    if problem.teacher is None:
        return losses | {name: jnp.zeros_like(losses[task]) for name in others}, new
    seen = Seen(logits, teacher_logits, label, problem.temperature, step)
    if own:
        seen = seen._replace(features=features, teacher_features=teacher_features, index=batch["index"])
        found, of_losses = own.distill(seen._replace(all_labels=problem.all_labels), params[OWN], rest[OWN])
        new = new | {OWN: of_losses}
    else:
        found = problem.objective.distill(seen)
    distilled = dict(zip(others, map(jnp.mean, found), strict=True))
    if not problem.kd_gradient:
        distilled = jax.lax.stop_gradient(distilled)
    still = seen._replace(logits=jax.lax.stop_gradient(logits))  # a loss for the log alone needs no gradient
    logged = {name: jnp.mean(objectives.kd_loss(still)) for name in problem.losses.logged}
    return losses | distilled | logged, new


def _apply(*args: Any, train: bool) -> tuple[jax.Array, None, Any]:
    """As `models.apply_with_features`, without them."""
    logits, rest = models.apply(*args, train=train)
    return logits, None, rest


def _normalize(problem: Problem, images: jax.Array) -> jax.Array:
    leading = range(images.ndim - 1)
    mean, std = (jnp.expand_dims(jnp.float32(values), leading) for values in (problem.mean, problem.std))
    return (images.astype(jnp.float32) - mean) / std


def _task_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The cross-entropy of each example."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
