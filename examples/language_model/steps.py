"""What the steps of this example compute: the losses of each prediction, and the evaluation of a batch."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import dot_optax
from examples.language_model import losses, model
from examples.language_model.losses import Likeliest, Loss
from examples.trainer import step
from examples.trainer.parallel import Layout
from examples.trainer.sampling import EXACT, Losses, Sampling, flops
from examples.trainer.step import Metrics, TrainState

LOSSES = Losses(("task", "kd"))


class Teacher(NamedTuple):
    """A trained network. Its parameters are arguments of the compiled steps, not constants inside them."""

    graphdef: nnx.GraphDef
    params: Any


class Problem(NamedTuple):
    """What a step computes: the two networks, and how tokens become losses."""

    student: nnx.GraphDef
    teacher: nnx.GraphDef | None  # None: there is none, or its predictions come with the batches
    loss: Loss | None  # of distillation; without one there is no teacher
    separator: int  # between documents
    remat: bool = False
    mesh: jax.sharding.Mesh | None = None  # on which activations are divided
    kd_gradient: bool = True  # else the distillation loss is there for the log alone
    unroll: bool = False  # no loop over layers, of which XLA would count the operations of one

    def logits(self, graphdef: nnx.GraphDef, params: Any, tokens: jax.Array, *, remat: bool = False) -> jax.Array:
        """The logits [batch, length, vocabulary] of what follows each of the tokens."""
        options = {"remat": remat, "mesh": self.mesh, "unroll": self.unroll}
        return model.apply(graphdef, params, tokens, separator=self.separator, **options)


def make_train_step(
    problem: Problem, optimizer: optax.GradientTransformation, layout: Layout, **options: Any
) -> Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]:
    """Returns `train_step(state, teacher_params, batch) -> (state, metrics)`, see `step.make_train_step`.

    The metrics are the losses, as unweighted means over the predictions of the batch, and with `gradient_metrics` the
    norms of their gradients and the cosine between these; without a teacher, only those of the task.
    """
    return step.make_train_step(
        functools.partial(_train_losses, problem),
        optimizer,
        layout,
        losses=LOSSES,
        container=dot_optax.PerLoss,
        reported=LOSSES.trained if problem.loss else ("task",),
        **options,
    )


def relative_flops(problem: Problem, plain: Problem, sampling: Sampling, summed: Any, *args: Any) -> float | None:
    """The operations of a step up to its gradients, where those of plain distillation, the problem `plain`, are 1.

    These are one gradient of the sum of both losses, with the teacher's forward pass. The last arguments are the student's
    params and rest, the teacher's params and a batch for each of the problems, or their shapes. None where XLA does not
    count.
    """
    params, rest, teacher, batch, plain_batch = args
    both = dot_optax.PerLoss(1.0, 1.0)
    here, there = (functools.partial(_train_losses, each._replace(mesh=None, unroll=True)) for each in (problem, plain))
    found = flops(here, LOSSES, sampling, summed, params, rest, teacher, batch)
    of_kd = flops(there, LOSSES, EXACT, both, params, rest, teacher, plain_batch)
    return found / of_kd if found and of_kd else None


def make_eval_step(problem: Problem) -> Callable[[Any, Any, Any], Metrics]:
    """Returns `eval_step(params, teacher_params, batch)`, which gives sums over the predictions that count.

    `top1` counts the tokens that are the likeliest ones, and `sequences` the sequences. Of the task losses of these and
    their lengths, `squares`, `products` and `lengths` are the sums of the squares and products.
    """

    @jax.jit
    def eval_step(params: Any, teacher_params: Any, batch: Any) -> Metrics:
        inputs, targets, valid = batch["tokens"][:, :-1], batch["tokens"][:, 1:], batch["valid"]
        logits = problem.logits(problem.student, params, inputs)
        task = jnp.sum(_task_loss(logits, targets), axis=1, where=valid)
        length = jnp.sum(valid, axis=1, dtype=jnp.float32)
        sums = {
            "task_loss": jnp.sum(task),
            "squares": jnp.sum(task**2),
            "products": jnp.sum(task * length),
            "lengths": jnp.sum(length**2),
            "sequences": jnp.sum(jnp.any(valid, axis=1)),
            "top1": jnp.sum(jnp.argmax(logits, axis=-1) == targets, where=valid),
            "count": jnp.sum(valid),
        }
        if problem.loss:
            sums["kd_loss"] = jnp.sum(_kd_loss(problem, logits, teacher_params, batch), where=valid)
        return sums

    return eval_step


def make_predict(problem: Problem, k: int) -> Callable[[Any, jax.Array], Likeliest]:
    """Returns `predict(teacher_params, tokens)`: what a cache keeps of the predictions of a problem's teacher."""

    @jax.jit
    def predict(teacher_params: Any, tokens: jax.Array) -> Likeliest:
        assert problem.loss
        return losses.likeliest(problem.logits(problem.teacher, teacher_params, tokens), problem.loss.temperature, k)

    return predict


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """A sum of task losses in bits, over the bytes of the text that was predicted."""
    return nats / math.log(2) / num_bytes


def _train_losses(
    problem: Problem, params: Any, rest: Any, teacher_params: Any, batch: Any, step: Any
) -> tuple[dict[str, jax.Array], Any]:
    del step
    inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    logits = problem.logits(problem.student, params, inputs, remat=problem.remat)
    task = jnp.mean(_task_loss(logits, targets))
    if problem.loss is None:
        return {"task": task, "kd": jnp.zeros_like(task)}, rest
    if not problem.kd_gradient:
        logits = jax.lax.stop_gradient(logits)
    return {"task": task, "kd": jnp.mean(_kd_loss(problem, logits, teacher_params, batch))}, rest


def _kd_loss(problem: Problem, logits: jax.Array, teacher_params: Any, batch: Any) -> jax.Array:
    """The distillation loss of each prediction: [batch, length]."""
    assert problem.loss
    if problem.teacher is None:
        return problem.loss.of_likeliest(logits, Likeliest(batch["teacher_log_probs"], batch["teacher_indices"]))
    teacher_logits = problem.logits(problem.teacher, teacher_params, batch["tokens"][:, :-1])
    return problem.loss.of_logits(logits, jax.lax.stop_gradient(teacher_logits), problem.loss.temperature)


def _task_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The cross-entropy of each prediction."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
