"""Equinox: a student with BatchNorm, with frozen layers, and on several devices.

`eqx.partition` splits a model into the arrays to train and all the rest, and dot_optax takes the former as it takes any
pytree. BatchNorm's statistics are an `eqx.nn.State`, which the loss function returns as auxiliary data.

    python -m examples.recipes.with_equinox
"""

import equinox as eqx
import jax
import numpy as np

import dot_optax
from examples.recipes import numpy_reference
from examples.recipes.problem import CLASSES, FEATURES, HIDDEN, LEARNING_RATE, batches, losses

optimizer = dot_optax.dot(LEARNING_RATE)


class Student(eqx.Module):
    """Two layers with BatchNorm between them, for one example."""

    body: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        body_key, head_key = jax.random.split(key)
        self.body = eqx.nn.Linear(FEATURES, HIDDEN, key=body_key)
        self.norm = eqx.nn.BatchNorm(HIDDEN, axis_name="batch", mode="batch")
        self.head = eqx.nn.Linear(HIDDEN, CLASSES, key=head_key)

    def __call__(self, x: jax.Array, state: eqx.nn.State) -> tuple[jax.Array, eqx.nn.State]:
        h, state = self.norm(self.body(x), state)
        return self.head(jax.nn.relu(h)), state


def make() -> tuple[Student, eqx.nn.State]:
    """A new student, and the statistics of its BatchNorm."""
    return eqx.nn.make_with_state(Student)(jax.random.key(0))


def all_but_the_body(model: Student) -> Student:
    """A filter that freezes the first layer: True for each array to train."""
    trained = jax.tree.map(eqx.is_inexact_array, model)
    return eqx.tree_at(lambda m: m.body, trained, replace_fn=lambda body: jax.tree.map(lambda _: False, body))


@eqx.filter_jit
def train_step(params, static, state, opt_state, x, labels, teacher_logits):
    """One step; `static` is an argument, so that frozen arrays in it are no constants of the compiled program."""

    def loss_fn(params):
        model = jax.vmap(eqx.combine(params, static), axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        logits, new_state = model(x, state)
        return losses(logits, labels, teacher_logits), new_state

    (values, state), grads = dot_optax.value_and_grads(loss_fn, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = eqx.apply_updates(params, updates)
    return params, state, opt_state, values


def train(steps: int, frozen: bool = False, devices: int = 1):
    """The trained student, the statistics, and the losses of the last step. The batch is divided among the devices."""
    model, state = make()
    trained = all_but_the_body(model) if frozen else eqx.is_inexact_array
    params, static = eqx.partition(model, trained)
    opt_state = optimizer.init(params)

    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    everywhere, divided = (jax.NamedSharding(mesh, spec) for spec in (jax.P(), jax.P("data")))
    params, static, state, opt_state = eqx.filter_shard((params, static, state, opt_state), everywhere)
    for batch in batches(steps):
        batch = jax.device_put(batch, divided)
        params, state, opt_state, values = train_step(params, static, state, opt_state, *batch)
        jax.block_until_ready(params)  # virtual devices share few threads: let one step's collectives finish
    return eqx.combine(params, static), state, values


def arrays(model: Student) -> dict[str, np.ndarray]:
    """The parameters under the names of `numpy_reference`."""
    return {
        "w1": model.body.weight.T,
        "b1": model.body.bias,
        "scale": model.norm.weight,
        "bias": model.norm.bias,
        "w2": model.head.weight.T,
        "b2": model.head.bias,
    }


def main() -> None:
    """Trains three times, and compares with NumPy."""
    jax.config.update("jax_num_cpu_devices", 4)
    start = arrays(make()[0])
    for name, frozen, devices in (("all layers", False, 1), ("a frozen layer", True, 1), ("4 devices", False, 4)):
        model, _, values = train(steps=20, frozen=frozen, devices=devices)
        expected = numpy_reference.train(start, batches(20), frozen=("w1", "b1") if frozen else ())
        off = numpy_reference.deviation(arrays(model), expected)
        print(f"{name}: task {values.task:.4f}, kd {values.kd:.4f}, largest deviation from NumPy {off:.1e}")


if __name__ == "__main__":
    main()
