"""Why one forward pass: a framework's `grad` called once for each loss runs the network once for each loss.

With Flax NNX the statistics of BatchNorm then move twice in a step, and Dropout draws another mask for each loss, as if
the losses had two different networks. `value_and_grads` runs the network once.

    python -m examples.recipes.one_forward_pass
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dot_optax
from examples.recipes.problem import CLASSES, FEATURES, HIDDEN, batches, losses


class Student(nnx.Module):
    """Two layers with BatchNorm and Dropout between them; it remembers which units Dropout kept."""

    def __init__(self, rngs: nnx.Rngs):
        self.body = nnx.Linear(FEATURES, HIDDEN, rngs=rngs)
        self.norm = nnx.BatchNorm(HIDDEN, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        kept = self.dropout(jnp.ones((len(x), HIDDEN)))
        return self.head(kept * nnx.relu(self.norm(self.body(x)))), kept


def make() -> Student:
    """A new student."""
    return Student(nnx.Rngs(params=0, dropout=1))


@nnx.jit
def one_grad_for_each_loss(student, x, labels, teacher_logits):
    """Wrong: two forward passes. The gradients, and the mask of each pass."""

    def one_loss(student, name):
        logits, kept = student(x)
        return getattr(losses(logits, labels, teacher_logits), name), kept

    task, task_mask = nnx.grad(lambda s: one_loss(s, "task"), has_aux=True)(student)
    kd, kd_mask = nnx.grad(lambda s: one_loss(s, "kd"), has_aux=True)(student)
    return dot_optax.PerLoss(task, kd), (task_mask, kd_mask)


@nnx.jit
def value_and_grads(student, x, labels, teacher_logits):
    """Right: one forward pass. The gradients, and the mask that both losses saw."""
    graphdef, params, rest = nnx.split(student, nnx.Param, ...)

    def loss_fn(params):
        model = nnx.merge(graphdef, params, rest, copy=True)
        logits, kept = model(x)
        return losses(logits, labels, teacher_logits), (nnx.state(model, nnx.Not(nnx.Param)), kept)

    (_, (rest, kept)), grads = dot_optax.value_and_grads(loss_fn, has_aux=True)(params)
    nnx.update(student, rest)
    return grads, (kept, kept)


def measure(step) -> tuple[float, int]:
    """How often a step moves BatchNorm's mean, and how many units are dropped for one loss but not for the other."""
    batch, student = batches(1)[0], make()
    hidden = np.asarray(student.body(batch[0]))
    _, masks = step(student, *batch)
    momentum = student.norm.momentum
    # After n moves towards m, a mean that was 0 is (1 - momentum^n) m.
    moved = np.asarray(student.norm.mean[...]) / hidden.mean(0)
    moves = np.log(1 - moved) / np.log(momentum)
    return float(np.median(moves)), int((np.asarray(masks[0]) != np.asarray(masks[1])).sum())


def main() -> None:
    """Prints what each step does."""
    for step in (one_grad_for_each_loss, value_and_grads):
        moves, different = measure(step)
        name = step.__wrapped__.__name__
        print(f"{name}: the mean moves {moves:.2f} times, {different} of {8 * HIDDEN} units differ between the losses")


if __name__ == "__main__":
    main()
