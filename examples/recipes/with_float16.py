"""Float16: scale the losses, so that small gradients do not round to zero, and skip the steps that overflow.

Flax's `DynamicScale` multiplies what the loss function returns, and so cannot take a container of losses. This is the
same in a few lines: one scale, one check over the gradients of all losses, and a skipped step leaves the parameters and
both momenta as they were. A check of each loss alone would let one momentum move on without the other.

    python -m examples.recipes.with_float16
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

import dot_optax
from examples.recipes import numpy_reference
from examples.recipes.problem import CLASSES, FEATURES, HIDDEN, LEARNING_RATE, batches, losses

optimizer = dot_optax.dot(LEARNING_RATE)


class LossScale(NamedTuple):
    """What the losses are multiplied by, and the number of finite steps since it last changed."""

    scale: jax.Array
    finite_steps: jax.Array

    def adjusted(self, finite: jax.Array, interval: int = 2000) -> "LossScale":
        """Half as large after an overflow, twice as large after `interval` finite steps."""
        grow = finite & (self.finite_steps + 1 >= interval)
        scale = jnp.where(finite, jnp.where(grow, 2.0 * self.scale, self.scale), jnp.maximum(0.5 * self.scale, 1.0))
        return LossScale(scale, jnp.where(finite & ~grow, self.finite_steps + 1, 0))


def loss_scale(initial: float = 2.0**15) -> LossScale:
    """A new one, for the state of the training loop."""
    return LossScale(jnp.float32(initial), jnp.int32(0))


def all_finite(tree) -> jax.Array:
    """Whether every number in every array is finite."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def model(params, x):
    """The student, for one example, in the dtype of its parameters."""
    return jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def loss_fn(params, x, labels, teacher_logits, dtype=jnp.float16):
    """The network runs in `dtype`, the losses in float32: a scaled loss would not fit into float16."""
    low = jax.tree.map(lambda p: p.astype(dtype), params)
    logits = jax.vmap(model, in_axes=(None, 0))(low, x.astype(dtype)).astype(jnp.float32)
    return losses(logits, labels, teacher_logits)


@jax.jit
def scaled_value_and_grads(params, scale, *batch):
    """The losses times `scale`, and their gradients."""

    def scaled_losses(params):
        return jax.tree.map(lambda loss: scale * loss, loss_fn(params, *batch))

    return dot_optax.value_and_grads(scaled_losses)(params)


@jax.jit
def train_step(params, opt_state, scaling, *batch):
    """One step. The parameters and momenta are float32."""
    scaled = scaled_value_and_grads(params, scaling.scale, *batch)
    values, grads = jax.tree.map(lambda x: x / scaling.scale, scaled)
    finite = all_finite(grads)  # over both losses
    updates, new_opt_state = optimizer.update(grads, opt_state, params)
    new_params = jax.tree.map(jnp.add, params, updates)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (new_params, new_opt_state), (params, opt_state)
    )
    return params, opt_state, scaling.adjusted(finite), values


def init():
    """New float32 parameters, under the names of `numpy_reference`."""
    w1, w2 = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(FEATURES, HIDDEN), (HIDDEN, 5)]))
    return {"w1": w1, "b1": jnp.zeros(HIDDEN), "w2": w2, "b2": jnp.zeros(CLASSES)}


def train(steps: int, initial_scale: float):
    """The parameters, the loss scale and the number of skipped steps."""
    params, scaling, skipped = init(), loss_scale(initial_scale), 0
    opt_state = optimizer.init(params)
    for batch in batches(steps):
        before = scaling.scale
        params, opt_state, scaling, _ = train_step(params, opt_state, scaling, *batch)
        skipped += int(scaling.scale < before)
    return params, scaling, skipped


def zeros(weight: float, scale: float) -> int:
    """How many of the gradients' numbers vanish if the losses have a small weight."""
    _, grads = scaled_value_and_grads(init(), weight * scale, *batches(1)[0])
    return sum(int((g == 0).sum()) for g in jax.tree.leaves(grads))


def main() -> None:
    """Trains from two scales, and shows what vanishes without one."""
    expected = numpy_reference.train(init(), batches(20))
    params, scaling, skipped = train(20, initial_scale=2.0**10)
    off = numpy_reference.deviation(params, expected)
    print(f"scale 2^10: {skipped} steps skipped, largest deviation from NumPy {off:.1e}")
    _, scaling, skipped = train(20, initial_scale=2.0**20)
    print(f"scale 2^20: {skipped} steps skipped, the scale is now 2^{int(jnp.log2(scaling.scale))}")
    total = 2 * sum(p.size for p in jax.tree.leaves(init()))
    print(f"losses times 1e-6: {zeros(1e-6, 1.0)} of {total} gradients are zero, {zeros(1e-6, 2.0**15)} if scaled")


if __name__ == "__main__":
    main()
