"""DeepKD: three momenta, written by hand; the paper's and the released code's."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dot_optax
from dot_optax import DeepKDLosses

PARAMS = {"w": jnp.ones((2, 3)), "head": jnp.ones(3)}
PUBLISHED = {"paper": (0.975, 0.825, 0.975), "code": (0.825, 0.825, 0.95)}


def run(tx, steps, params=PARAMS, pack=DeepKDLosses):
    state = tx.init(params)
    for grads in steps:
        updates, state = jax.jit(tx.update)(pack(*grads), state, params)
        params = optax.apply_updates(params, updates)
    return params


def random_steps(count):
    keys = jax.random.split(jax.random.key(0), (count, 3))
    return [[optax.tree.random_like(key, PARAMS) for key in row] for row in keys]


def numpy_deepkd(steps, betas, rate=0.1, weight_decay=0.0, task_reaches_head=True):
    params = {k: np.float64(p) for k, p in PARAMS.items()}
    v = {}
    for grads in steps:
        for k, p in params.items():
            reaches = [task_reaches_head or k != "head", k != "head", k != "head"]
            total, first = 0.0, True
            for i in range(3):
                if reaches[i]:
                    g = np.float64(grads[i][k]) + first * weight_decay * p
                    beta = betas[i] if sum(reaches) > 1 else sum(betas) / 3
                    v[i, k] = g + beta * v.get((i, k), 0.0)
                    total, first = total + v[i, k], False
            params[k] = p - rate * total
    return params


@pytest.mark.parametrize("variant", PUBLISHED)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_published_momenta(variant, weight_decay):
    steps = random_steps(8)
    reached = DeepKDLosses(True, {"w": True, "head": False}, {"w": True, "head": False})
    tx = dot_optax.deepkd(0.1, variant=variant, weight_decay=weight_decay, reached=reached)
    # Eight steps of a few float32 roundings of numbers of order ten.
    chex.assert_trees_all_close(
        run(tx, steps), numpy_deepkd(steps, PUBLISHED[variant], weight_decay=weight_decay), rtol=0, atol=2e-5
    )


def test_the_paper_is_the_default_and_momenta_may_be_given():
    steps = random_steps(3)
    chex.assert_trees_all_equal(run(dot_optax.deepkd(0.1), steps), run(dot_optax.deepkd(0.1, variant="paper"), steps))
    custom = dot_optax.deepkd(0.1, beta_target=0.5, variant="code")
    explicit = dot_optax.scale_by_momenta(DeepKDLosses(0.9 - 0.075, 0.5, 0.9 + 0.05))
    expected = run(optax.chain(explicit, optax.scale_by_learning_rate(0.1)), steps)
    chex.assert_trees_all_equal(run(custom, steps), expected)


@pytest.mark.parametrize(
    "pack",
    [
        lambda task, target, non_target: (task, target, non_target),
        lambda task, target, non_target: {"non_target": non_target, "task": task, "target": target},
        lambda task, target, non_target: {0: task, 1: target, 2: non_target},
    ],
)
def test_every_container_of_three(pack):
    steps = random_steps(2)
    chex.assert_trees_all_equal(run(dot_optax.deepkd(0.1), steps, pack=pack), run(dot_optax.deepkd(0.1), steps))


def test_equal_momenta_are_sgd_of_the_sum():
    steps = random_steps(20)
    sgd = optax.chain(dot_optax.sum_losses(), optax.sgd(0.1, momentum=0.9))
    chex.assert_trees_all_close(
        run(dot_optax.deepkd(0.1, beta_task=0.9, beta_target=0.9, beta_non_target=0.9), steps),
        run(sgd, steps),
        rtol=1e-5,
        atol=1e-4,
    )
