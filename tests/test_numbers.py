"""What DOT's arithmetic promises: linearity, the collapse to one momentum, independence of layout, and precision."""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis.extra import numpy as hnp

import dot_optax
from dot_optax import PerLoss
from tests.tiers import slow_but

BETAS = st.floats(0.0, 0.99)
# Up to four steps of some ten float64 roundings of numbers below 1e4.
EXACT = {"rtol": 0.0, "atol": 1e4 * 40 * np.finfo(np.float64).eps}


@st.composite
def streams(draw, count):
    """`count` streams of per-loss gradients of one shape: arrays [count, steps, losses, ...]."""
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=2, max_side=3))
    numbers = st.floats(-100, 100, width=32)
    return draw(hnp.arrays(np.float64, (count, draw(st.integers(1, 4)), 2, *shape), elements=numbers))


def run(tx, stream):
    """The updates of every step, for parameters that are one array."""
    params = jnp.zeros(stream.shape[2:])
    state, result = tx.init(params), []
    for task, kd in stream:
        updates, state = tx.update((jnp.asarray(task), jnp.asarray(kd)), state, params)
        result.append(updates)
    return np.stack(result)


@hypothesis.given(streams(2), BETAS, BETAS, st.booleans())
@hypothesis.settings(max_examples=30)
def test_the_update_of_a_sum_is_the_sum_of_updates(stream, beta_task, beta_kd, nesterov):
    with jax.enable_x64(True):
        tx = dot_optax.dot(0.1, beta_task, beta_kd, nesterov=nesterov)
        np.testing.assert_allclose(run(tx, stream[0] + stream[1]), run(tx, stream[0]) + run(tx, stream[1]), **EXACT)


@hypothesis.given(streams(1), BETAS, st.booleans())
@hypothesis.settings(max_examples=30)
def test_equal_betas_collapse_to_one_momentum(stream, beta, nesterov):
    with jax.enable_x64(True):
        one = optax.chain(dot_optax.sum_losses(), optax.sgd(0.1, momentum=beta, nesterov=nesterov))
        for tx in (
            dot_optax.dot(0.1, beta, beta, nesterov=nesterov),
            dot_optax.gain_matched_sgd(0.1, beta, beta, nesterov=nesterov),
        ):
            np.testing.assert_allclose(run(tx, stream[0]), run(one, stream[0]), **EXACT)


@hypothesis.given(
    st.permutations(range(4)), st.integers(0, 2**16), st.sampled_from(["tuple", "nested", "list", "dict"])
)
@hypothesis.settings(max_examples=40)
def test_the_layout_of_the_parameters_does_not_matter(order, seed, layout):
    leaves = [np.random.default_rng(seed + i).standard_normal((i + 1, 2)).astype(np.float32) for i in range(4)]
    arrange = {
        "tuple": lambda x: tuple(x[i] for i in order),
        "list": lambda x: [x[i] for i in order],
        "dict": lambda x: {f"leaf{i}": x[i] for i in order},
        "nested": lambda x: {"a": (x[order[0]], {"b": [x[order[1]]]}), "c": {"d": {"e": (x[order[2]], x[order[3]])}}},
    }[layout]

    def update(arranged):
        tx = dot_optax.dot(0.1, 0.5, 0.75, weight_decay=0.1)
        params = arranged(leaves)
        state = tx.init(params)
        for scale in (1.0, -2.0):
            grads = PerLoss(arranged([scale * x for x in leaves]), arranged([x + scale for x in leaves]))
            updates, state = tx.update(grads, state, params)
        return updates

    chex.assert_trees_all_equal(update(arrange), arrange(update(list)))


@pytest.mark.parametrize("accumulator_dtype", [None, jnp.float32])
@pytest.mark.parametrize("params_dtype", [jnp.bfloat16, jnp.float32])
def test_a_thousand_steps_in_bfloat16(params_dtype, accumulator_dtype):
    """bfloat16 gradients (and parameters) on a noisy quadratic, against the same run in float32.

    bfloat16 parameters stop where an update is less than half the distance to the next bfloat16 number, 2**-8 for
    numbers in [1, 2): where the gradient is below 2**-8 / (learning rate x gain). float32 parameters only see the
    relative error of at most 2**-8 of each gradient, which averages out: 2**-12 is twice what was measured.
    """
    learning_rate, betas = 0.002, dot_optax.betas()
    noise = 0.1 * jax.random.normal(jax.random.key(0), (1000, 2, 64))

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def train(params_dtype, grads_dtype, accumulator_dtype):
        tx = dot_optax.dot(learning_rate, *betas, accumulator_dtype=accumulator_dtype)

        def step(carry, noise):
            params, state = carry
            wide = params.astype(jnp.float32)
            grads = PerLoss(0.5 * (wide - 1.25) + noise[0], 0.5 * (wide - 1.5) + noise[1])
            updates, state = tx.update(optax.tree.cast(grads, grads_dtype), state, params)
            return (optax.apply_updates(params, updates), state), None

        params = jnp.full(64, 1.9, params_dtype)
        return jax.lax.scan(step, (params, tx.init(params)), noise)[0][0].astype(jnp.float32)

    difference = jnp.abs(
        train(params_dtype, jnp.bfloat16, accumulator_dtype) - train(jnp.float32, jnp.float32, None)
    ).max()
    # The two gradients differ by the weights 1/2, so the gain of their sum is the mean of the two.
    stall = 2**-8 / (learning_rate * sum(dot_optax.gains(*betas)) / 2)
    print(f"{params_dtype.__name__}, accumulators {accumulator_dtype}: {difference:.4f}, stall {stall:.4f}")
    assert difference <= (stall if params_dtype == jnp.bfloat16 else 2**-12)


@pytest.mark.parametrize("beta", slow_but([0.825, 0.975, 0.999], 0.975))
def test_a_hundred_thousand_steps_in_float32(beta):
    """A rounding error of a buffer fades with its momentum, so that it never grows beyond gain x 2**-24 of its size."""

    @functools.partial(jax.jit, static_argnums=0)
    def train(dtype):
        tx = dot_optax.scale_by_dot(beta, beta)

        def step(carry, key):
            state, largest = carry
            g = jax.random.normal(key, (2, 16), jnp.float32).astype(dtype)
            updates, state = tx.update((g[0], g[1]), state, jnp.zeros(16, dtype))
            return (state, jnp.maximum(largest, jnp.abs(updates).max())), None

        start = tx.init(jnp.zeros(16, dtype)), jnp.zeros((), dtype)
        (state, largest), _ = jax.lax.scan(step, start, jax.random.split(jax.random.key(0), 100_000))
        return state.task.trace + state.kd.trace, largest

    with jax.enable_x64(True):
        single, _ = train(jnp.float32)
        double, largest = train(jnp.float64)
        error = jnp.abs(single - double).max() / largest
        # Three roundings a step (product, sum, total) of half a unit in the last place each.
        bound = 3 * 2**-24 / (1 - beta)
        print(f"beta {beta}: relative error {error:.1e}, bound {bound:.1e}")
        assert error <= bound
