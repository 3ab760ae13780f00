"""DOT-AdamW: Optax's AdamW where the betas are equal, and the equations written by hand where they are not."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dot_optax
from dot_optax import PerLoss
from tests.tiers import slow_but

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.ones(3)}
NAMES = ("ce", "hint", "kd")


def random_grads(step, losses=2):
    keys = jax.random.split(jax.random.key(step), losses)
    return [optax.tree.random_like(key, PARAMS) for key in keys]


@functools.cache
def a_thousand_random_grads():
    """Of both losses, stacked over the steps."""
    return jax.jit(jax.vmap(lambda step: PerLoss(*random_grads(step))))(jnp.arange(1000))


def trained(tx):
    @jax.jit
    def train(params, state, all_grads):
        def step(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), all_grads)[0][0]

    return train(PARAMS, tx.init(PARAMS), a_thousand_random_grads())


OPTIONS = {
    "defaults": {},
    "Nesterov": {"nesterov": True},
    "eps": {"eps": 1e-3, "eps_root": 1e-6, "b2": 0.99},
    "decay": {"weight_decay": 0.1, "mask": {"w": True, "b": False}},
    "bfloat16": {"mu_dtype": jnp.bfloat16},
}


@pytest.mark.parametrize("name", slow_but(OPTIONS, "defaults", "decay"))
@pytest.mark.parametrize("normalize", [False, True])
def test_equal_betas_are_optax_adamw_over_a_thousand_steps(name, normalize):
    options = OPTIONS[name]
    ours = dot_optax.dot_adamw(0.01, 0.9, 0.9, **options, normalize=normalize)
    theirs = optax.chain(dot_optax.sum_losses(), optax.adamw(0.01, 0.9, **options))
    # Two first moments instead of one: each of 1,000 steps of at most 0.01 is rounded to 24 bits a few times, which adds
    # up like a random walk; a first moment in bfloat16 is rounded to 8 bits, in both parts for itself.
    tolerance = 2e-2 if "mu_dtype" in options else 1e-5
    chex.assert_trees_all_close(trained(ours), trained(theirs), rtol=0, atol=tolerance)


def numpy_adam(
    params, grads, betas, *, b2=0.999, eps=1e-8, eps_root=0.0, normalize=False, nesterov=False, reached=None
):
    """The updates of every step in float64: `grads` is a list of dicts of arrays, one for each loss, for each step."""
    mean = sum(betas) / len(betas)
    m, nu = {}, {k: 0.0 for k in params}
    for t, of_losses in enumerate(grads, 1):
        updates = {}
        for k in params:
            reaches = [reached is None or reached[i][k] for i in range(len(betas))]
            own = [beta if sum(reaches) > 1 else mean for beta in betas]
            g = [np.float64(tree[k]) * r for tree, r in zip(of_losses, reaches, strict=True)]
            nu[k] = b2 * nu[k] + (1 - b2) * sum(g) ** 2
            numerator = 0.0
            for i, beta in enumerate(own):
                rate = 1 - beta if normalize else 1 - mean
                m[i, k] = beta * m.get((i, k), 0.0) + rate * g[i]
                m_hat = m[i, k] / (1 - beta**t)
                if nesterov:
                    m_hat = beta * m[i, k] / (1 - beta ** (t + 1)) + rate * g[i] / (1 - beta**t)
                numerator = numerator + m_hat * reaches[i]
            updates[k] = numerator / (np.sqrt(nu[k] / (1 - b2**t) + eps_root) + eps) * any(reaches)
        yield updates


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("betas", [PerLoss(0.825, 0.975), {"kd": 0.975, "ce": 0.8, "hint": 0.9}], ids=["two", "three"])
def test_unequal_betas_are_the_equations(betas, normalize, nesterov):
    names = list(betas) if isinstance(betas, dict) else PerLoss._fields
    values = list(betas.values()) if isinstance(betas, dict) else list(betas)
    reached = [{"w": True, "b": i == 1} for i in range(len(names))]
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: np.asarray(p, np.float64), PARAMS)
        tx = dot_optax.scale_by_adam_momenta(
            betas,
            b2=0.99,
            eps=1e-3,
            eps_root=1e-4,
            nesterov=nesterov,
            normalize=normalize,
            reached=dict(zip(names, reached, strict=True)),
        )
        steps = [[jax.tree.map(np.float64, g) for g in random_grads(i, len(names))] for i in range(12)]
        state = tx.init(params)
        expected = numpy_adam(
            params,
            steps,
            values,
            b2=0.99,
            eps=1e-3,
            eps_root=1e-4,
            normalize=normalize,
            nesterov=nesterov,
            reached=reached,
        )
        for grads, by_equation in zip(steps, expected, strict=True):
            updates, state = tx.update(dict(zip(names, grads, strict=True)), state, params)
            # Some 20 float64 roundings of numbers of order ten.
            chex.assert_trees_all_close(updates, by_equation, rtol=1e-12, atol=1e-13)


def test_the_two_losses_are_the_function_of_a_container():
    two = dot_optax.scale_by_dot_adam(0.8, 0.95, 0.99, 1e-4, 1e-5, jnp.bfloat16, nesterov=True, normalize=True)
    many = dot_optax.scale_by_adam_momenta((0.8, 0.95), 0.99, 1e-4, 1e-5, jnp.bfloat16, nesterov=True, normalize=True)
    states = [tx.init(PARAMS) for tx in (two, many)]
    for step in range(3):
        grads = tuple(random_grads(step))
        (a, states[0]), (b, states[1]) = (
            tx.update(grads, s, PARAMS) for tx, s in zip((two, many), states, strict=True)
        )
        chex.assert_trees_all_equal(a, b)


def test_the_defaults_are_those_of_adamw_and_dot():
    grads = tuple(random_grads(0))
    results = [
        tx.update(grads, tx.init(PARAMS), PARAMS)[0]
        for tx in (
            dot_optax.dot_adamw(0.1),
            dot_optax.dot_adamw(0.1, *dot_optax.betas(), b2=0.999, eps=1e-8, eps_root=0.0, weight_decay=1e-4),
        )
    ]
    chex.assert_trees_all_close(*results, rtol=1e-6)


def test_a_steady_gradient_is_amplified_in_the_proportions_of_dot():
    """Each loss by (1 - beta_0) / (1 - beta_i); with `normalize` alike."""
    params = {"w": jnp.zeros(())}
    for normalize, expected in ((False, (0.1 / 0.175 * 1 + 0.1 / 0.025 * 3) / 4), (True, 1.0)):
        tx = dot_optax.scale_by_dot_adam(0.825, 0.975, normalize=normalize)
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(400):
            updates, state = update(({"w": jnp.float32(1.0)}, {"w": jnp.float32(3.0)}), state, params)
        # float32: 1 - 0.999**t has lost some 1e-4 of its size at t = 1, less later.
        np.testing.assert_allclose(updates["w"], expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("what", "make"),
    [
        (
            "per_loss",
            lambda: optax.chain(dot_optax.per_loss(optax.adam(0.01), optax.adam(0.01)), dot_optax.sum_losses()),
        ),
        ("joint", lambda: optax.chain(dot_optax.joint(optax.adam(0.01)), dot_optax.sum_losses())),
        ("dot_adamw", lambda: dot_optax.dot_adamw(0.01)),
    ],
)
def test_adam_of_each_loss_by_itself_cancels_the_weights(what, make):
    """With weights 0.1 and 0.9, or 0.9 and 0.1, such a student trains alike: each gradient is divided by its size."""

    def loss_fn(w, weights):
        return PerLoss(weights[0] * jnp.sum((w - 1.0) ** 2), weights[1] * jnp.sum((w + 1.0) ** 2))

    def end(weights):
        tx = make()

        def step(carry, _):
            w, state = carry
            updates, state = tx.update(dot_optax.value_and_grads(loss_fn)(w, weights)[1], state, w)
            return (optax.apply_updates(w, updates), state), None

        start = jnp.array([0.3, -0.2])
        return jax.lax.scan(step, (start, tx.init(start)), length=100)[0][0]

    ends = end((0.1, 0.9)), end((0.9, 0.1))
    difference = float(jnp.abs(ends[0] - ends[1]).max())
    if what == "dot_adamw":
        assert difference > 0.5
    else:
        # eps = 1e-8 against gradients of at least 0.1.
        assert difference < 1e-5


def test_one_first_moment_and_no_second_where_nothing_reaches():
    reached = PerLoss(task={"w": True, "b": False}, kd=False)
    state = dot_optax.scale_by_dot_adam(reached=reached).init(PARAMS)
    shapes = [len(jax.tree.leaves(tree)) for tree in (state.mu.task, state.mu.kd, state.nu)]
    assert shapes == [1, 0, 1]
    tx = dot_optax.dot_adamw(0.1, weight_decay=0.5, reached=reached)
    updates, _ = tx.update(tuple(random_grads(0)), tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["b"], -0.1 * 0.5 * PARAMS["b"], rtol=1e-6)  # decay needs no gradient


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_moments_of_16_bit_parameters_are_float32(dtype):
    params = optax.tree.cast(PARAMS, dtype)
    tx = dot_optax.dot_adamw(0.1)
    grads = tuple(optax.tree.cast(g, dtype) for g in random_grads(0))
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert {x.dtype for x in jax.tree.leaves((state[0].mu, state[0].nu))} == {jnp.dtype(jnp.float32)}
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    state = dot_optax.scale_by_dot_adam(mu_dtype=jnp.bfloat16).init(params)
    assert {x.dtype for x in jax.tree.leaves(state.mu)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(state.nu)} == {jnp.dtype(jnp.float32)}


def test_momenta_may_follow_schedules():
    delta = optax.linear_schedule(0.0, 0.075, 4)
    tx = dot_optax.scale_by_dot_adam(*dot_optax.betas(0.9, delta))
    state = tx.init(PARAMS)
    for step in range(4):
        grads = tuple(random_grads(step))
        now = dot_optax.scale_by_dot_adam(*dot_optax.betas(0.9, float(delta(step))))
        expected, _ = now.update(grads, state.inner_state, PARAMS)
        updates, state = jax.jit(tx.update)(grads, state, PARAMS)
        chex.assert_trees_all_close(updates, expected, rtol=1e-4)


def test_optax_finds_the_moments():
    tx = dot_optax.dot_adamw(0.1)
    state = tx.update(tuple(random_grads(0)), tx.init(PARAMS), PARAMS)[1]
    assert isinstance(optax.tree.get(state, "mu"), PerLoss)
    chex.assert_trees_all_equal_shapes(optax.tree.get(state, "nu"), PARAMS)
    assert optax.tree.get(state, "count") == 1


def test_with_inject_hyperparams():
    make = functools.partial(optax.inject_hyperparams(dot_optax.dot_adamw), learning_rate=0.1)
    tx = make(beta_task=0.8, beta_kd=0.95, b2=0.99)
    grads = tuple(random_grads(0))
    expected, _ = dot_optax.dot_adamw(0.1, 0.8, 0.95, 0.99).update(grads, dot_optax.dot_adamw(0.1).init(PARAMS), PARAMS)
    updates, state = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(updates, expected, rtol=1e-4)
    assert {"beta_task", "beta_kd", "b2", "eps", "weight_decay"} <= set(state.hyperparams)
