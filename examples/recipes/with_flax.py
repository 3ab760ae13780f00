"""A plain loop: Flax Linen, `jax.jit` and Optax, nothing else.

Where a step has `jax.value_and_grad` of one loss, it gets `dot_optax.value_and_grads` of both. BatchNorm's statistics
are auxiliary data, as before. The teacher's variables are an argument: what is captured would be a constant of the
compiled program.

    python -m examples.recipes.with_flax
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax

import dot_optax
from examples.recipes import numpy_reference
from examples.recipes.problem import CLASSES, HIDDEN, LEARNING_RATE, TEACHER, batches, losses


class Student(nn.Module):
    """Two layers with BatchNorm between them."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        h = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(HIDDEN, name="body")(x))
        return nn.Dense(CLASSES, name="head")(nn.relu(h))


class State(NamedTuple):
    """What a step changes."""

    params: dict
    batch_stats: dict
    opt_state: optax.OptState


student, teacher = Student(), nn.Dense(CLASSES, use_bias=False)
teacher_variables = {"params": {"kernel": TEACHER}}
optimizer = dot_optax.dot(LEARNING_RATE)


def init() -> State:
    """A new student, and its optimizer's state."""
    variables = student.init(jax.random.key(0), batches(1)[0][0], train=False)
    return State(variables["params"], variables["batch_stats"], optimizer.init(variables["params"]))


@jax.jit
def train_step(state, teacher_variables, x, labels):
    """One step: the new state, and the two losses."""
    teacher_logits = teacher.apply(teacher_variables, x)

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = student.apply(variables, x, train=True, mutable=["batch_stats"])
        return losses(logits, labels, teacher_logits), updated["batch_stats"]

    (values, batch_stats), grads = dot_optax.value_and_grads(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return State(optax.apply_updates(state.params, updates), batch_stats, opt_state), values


def train(steps: int) -> State:
    """The state after so many steps."""
    state = init()
    for x, labels, _ in batches(steps):
        state, _ = train_step(state, teacher_variables, x, labels)
    return state


def arrays(params: dict) -> dict[str, np.ndarray]:
    """The parameters under the names of `numpy_reference`."""
    layers = {"1": params["body"], "2": params["head"]}
    theta = {f"w{i}": layer["kernel"] for i, layer in layers.items()}
    theta |= {f"b{i}": layer["bias"] for i, layer in layers.items()}
    return theta | params["norm"]


def main() -> None:
    """Trains, and compares with NumPy."""
    expected = numpy_reference.train(arrays(init().params), batches(20))
    off = numpy_reference.deviation(arrays(train(20).params), expected)
    print(f"20 steps, largest deviation from NumPy {off:.1e}")


if __name__ == "__main__":
    main()
