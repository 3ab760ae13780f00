"""Any number of losses, and the precision that the buffers keep."""

import collections

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dot_optax
from dot_optax import PerLoss
from tests.tiers import slow_but

PARAMS = {"body": jnp.ones((2, 3)), "pair": jnp.ones(3), "head": jnp.ones(2), "idle": jnp.ones(1)}
BETAS = {"kd": 0.95, "ce": 0.8, "hint": 0.5}
IN_ORDER = collections.namedtuple("Losses", BETAS)(**BETAS)
REACHED = {
    "ce": {"body": True, "pair": True, "head": True, "idle": False},
    "hint": {"body": True, "pair": False, "head": False, "idle": False},
    "kd": {"body": True, "pair": True, "head": False, "idle": False},
}


def random_grads(step):
    keys = jax.random.split(jax.random.key(step), 3)
    return {name: optax.tree.random_like(key, PARAMS) for name, key in zip(("ce", "hint", "kd"), keys, strict=True)}


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("mask", [None, {"body": True, "pair": False, "head": True, "idle": True}], ids=["all", "some"])
def test_three_named_losses_are_a_loop_by_hand(nesterov, weight_decay, mask):
    """The mean momentum where one loss reaches, and its own for each where two do; L2 joins the first loss that does."""
    tx = dot_optax.scale_by_momenta(
        IN_ORDER if weight_decay else BETAS, reached=REACHED, weight_decay=weight_decay, mask=mask, nesterov=nesterov
    )
    state, v = tx.init(PARAMS), {}
    mean = sum(BETAS.values()) / 3
    for step in range(5):
        grads = random_grads(step)
        updates, state = jax.jit(tx.update)(grads, state, PARAMS)
        for k, p in PARAMS.items():
            decayed = weight_decay and (mask is None or mask[k])
            moving = [name for name in BETAS if REACHED[name][k]]
            if not moving and decayed:
                moving = ["kd"]  # the first of `betas`
            total = np.zeros(p.shape)
            for name in moving:
                g = np.float64(grads[name][k]) * REACHED[name][k]
                g = g + weight_decay * np.float64(p) * bool(decayed and name == moving[0])
                beta = BETAS[name] if len(moving) > 1 else mean
                v[name, k] = g + beta * v.get((name, k), 0.0)
                total = total + (g + beta * v[name, k] if nesterov else v[name, k])
            # Five steps of a few float32 roundings of numbers below ten.
            np.testing.assert_allclose(updates[k], total, rtol=0, atol=2e-5, err_msg=k)


def test_a_buffer_for_each_loss_that_reaches():
    state = dot_optax.scale_by_momenta(BETAS, reached=REACHED).init(PARAMS)
    kept = {
        name: sorted(k for k, v in entry.trace.items() if isinstance(v, jax.Array)) for name, entry in state.items()
    }
    assert kept == {"ce": ["body", "head", "pair"], "hint": ["body"], "kd": ["body", "pair"]}


def test_two_losses_are_scale_by_dot():
    for betas in ((0.8, 0.95), PerLoss(0.8, 0.95), {"kd": 0.95, "task": 0.8}):
        tx, dot = dot_optax.scale_by_momenta(betas), dot_optax.scale_by_dot(0.8, 0.95)
        grads = PerLoss(random_grads(0)["ce"], random_grads(0)["kd"])
        chex.assert_trees_all_equal(*(t.update(grads, t.init(PARAMS), PARAMS)[0] for t in (tx, dot)))


def test_one_loss_is_optax_trace():
    tx = dot_optax.scale_by_momenta({"ce": 0.9})
    g = random_grads(0)["ce"]
    state, trace = tx.init(PARAMS), optax.trace(0.9)
    trace_state = trace.init(PARAMS)
    for _ in range(3):
        ours, state = tx.update({"ce": g}, state, PARAMS)
        theirs, trace_state = trace.update(g, trace_state)
        chex.assert_trees_all_equal(ours, theirs)


def gain(optimizer, dtype, losses, steps=1500):
    """How far a steady gradient of 1 is amplified, of parameters of a dtype."""
    params = {"w": jnp.zeros((), dtype)}
    grads = {name: {"w": jnp.asarray(name == "kd", dtype)} for name in losses}

    def step(state, _):
        updates, state = optimizer.update(grads, state, params)
        return state, updates["w"]

    return float(jax.lax.scan(step, optimizer.init(params), length=steps)[1][-1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_gain_is_that_of_the_momentum_in_every_dtype(dtype):
    """40 for 0.975; with buffers in bfloat16, where 39 + 1 is 40 but 35 * 0.975 + 1 is 35 again, it would be 35."""
    two, three = ("task", "kd"), ("ce", "hint", "kd")
    for optimizer, losses in (
        (dot_optax.scale_by_dot(), two),
        (dot_optax.scale_by_momenta({"ce": 0.8, "hint": 0.9, "kd": 0.975}), three),
        (optax.inject_hyperparams(dot_optax.scale_by_dot, hyperparam_dtype=jnp.float32)(0.825, 0.975), two),
        (dot_optax.scale_by_dot(jnp.float32(0.825), lambda count: jnp.float32(0.975)), two),
    ):
        # 0.975 is rounded to 24 bits, and so is 1 - 0.975: 2**-24 / 0.025 of the gain. The update is rounded to `dtype`.
        assert gain(optimizer, dtype, losses) == pytest.approx(40, rel=1e-4 + float(jnp.finfo(dtype).eps))
    if dtype == jnp.bfloat16:
        narrow = dot_optax.scale_by_dot(accumulator_dtype=jnp.bfloat16)
        assert gain(narrow, dtype, two) == pytest.approx(35, abs=0.5)
        # Without `hyperparam_dtype`, inject_hyperparams rounds 0.975 to 0.9766, whose gain is 42.7.
        rounded = optax.inject_hyperparams(dot_optax.scale_by_dot)(0.825, 0.975)
        assert gain(rounded, dtype, two) == pytest.approx(42.7, abs=0.3)


def test_the_update_is_not_rounded_to_the_dtype_of_the_buffers():
    tx = dot_optax.scale_by_dot(accumulator_dtype=jnp.bfloat16)
    g = {"w": jnp.float32(1 + 2**-20)}
    updates, state = tx.update((g, {"w": jnp.float32(0.0)}), tx.init(g), g)
    assert updates["w"] == g["w"]
    assert state.task.trace["w"].dtype == jnp.bfloat16


def test_the_penalty_joins_in_float32():
    """1 + 2**-10 is 1 in bfloat16: a penalty a thousandth as large as the gradient would vanish."""
    params = {"w": jnp.ones(1, jnp.bfloat16)}
    for make in (dot_optax.dot, dot_optax.gain_matched_sgd):
        tx = make(1.0, 0.5, 0.5, weight_decay=2**-10)
        _, state = tx.update((params, {"w": jnp.zeros(1, jnp.bfloat16)}), tx.init(params), params)
        (_, first), *_ = optax.tree.get_all_with_path(state, "trace")
        assert first["w"][0] == 1 + 2**-10


def test_gain_matched_weighs_and_sums_in_float32_into_one_buffer():
    """1 + 2**-10 is 1 in bfloat16, and 1.5 times 1 + 2**-7 has no bfloat16."""
    params = {"w": jnp.zeros((), jnp.bfloat16)}
    grads = PerLoss({"w": jnp.asarray(1 + 2**-7, jnp.bfloat16)}, {"w": jnp.asarray(2**-10, jnp.bfloat16)})
    tx = dot_optax.gain_matched_sgd(1.0, 0.5, 0.0)
    _, state = tx.update(grads, tx.init(params), params)
    [(_, trace)] = optax.tree.get_all_with_path(state, "trace")
    assert trace["w"] == 1.5 * (1 + 2**-7) + 0.75 * 2**-10


def test_nothing_overflows_or_vanishes_before_the_learning_rate():
    """A momentum of 80,000 has no float16, and a decay of 2**-10 beside an update of 2 no bfloat16."""
    params = {"w": jnp.zeros((), jnp.float16)}
    grads = PerLoss({"w": jnp.zeros((), jnp.float16)}, {"w": jnp.full((), 2000.0, jnp.float16)})
    tx = dot_optax.dot(1e-3)
    state = tx.init(params)
    for _ in range(400):
        updates, state = tx.update(grads, state, params)
    np.testing.assert_allclose(np.float32(updates["w"]), -80.0, rtol=2**-10)
    params = {"w": jnp.ones(1, jnp.bfloat16)}
    ends = []
    for weight_decay in (0.0, 2**-10):
        tx = dot_optax.dot_adamw(2.0**-10, weight_decay=weight_decay)
        updates, _ = tx.update(PerLoss(params, params), tx.init(params), params)
        wide = optax.chain(
            dot_optax.scale_by_dot_adam(),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(2.0**-10),
        )
        single = optax.tree.cast(params, jnp.float32)
        exact, _ = wide.update(PerLoss(single, single), wide.init(single), single)
        assert updates["w"] == exact["w"].astype(jnp.bfloat16)  # rounded once
        ends.append(float(exact["w"][0]))
    assert ends[0] != ends[1]


@pytest.mark.parametrize("dtype", slow_but([jnp.bfloat16, jnp.float16, jnp.float32], jnp.bfloat16))
@pytest.mark.parametrize(
    "make",
    [
        lambda: dot_optax.dot(0.1, weight_decay=0.1, nesterov=True),
        lambda: dot_optax.dot(optax.linear_schedule(0.1, 0.0, 9), *dot_optax.betas(0.9, lambda count: 0.05)),
        lambda: dot_optax.gain_matched_sgd(0.1, weight_decay=0.1),
        lambda: dot_optax.dot_adamw(0.1, nesterov=True),
        lambda: dot_optax.dot_adamw(0.1, *dot_optax.betas(0.9, optax.linear_schedule(0.0, 0.05, 9))),
        lambda: dot_optax.gain_matched_sgd(jnp.float32(0.1), jnp.float32(0.8), jnp.float32(0.9)),
        lambda: optax.chain(dot_optax.sum_losses(), optax.sgd(0.1)),
    ],
    ids=["dot", "dot, schedules", "gain-matched", "dot_adamw", "dot_adamw, schedules", "arrays", "optax.sgd"],
)
def test_strict_promotion_of_types(make, dtype):
    params = {"w": jnp.ones(3, dtype)}
    with jax.numpy_dtype_promotion("strict"):
        tx = make()
        state = tx.init(params)
        for _ in range(2):
            updates, state = jax.jit(tx.update)(PerLoss(params, params), state, params)
    assert updates["w"].dtype == dtype


def test_kd_loss_under_strict_promotion_of_types():
    with jax.numpy_dtype_promotion("strict"):
        loss = dot_optax.losses.kd_loss(jnp.ones((2, 3), jnp.bfloat16), jnp.zeros((2, 3), jnp.float32), 4.0)
    assert loss.dtype == jnp.float32


def test_a_parameter_that_no_loss_reaches_has_its_buffer_with_the_first_loss():
    reached = PerLoss(*[{"w": True, "idle": False}] * 2)
    params = {"w": jnp.ones(2), "idle": jnp.ones(2)}
    state = dot_optax.scale_by_momenta(PerLoss(0.5, 0.9), weight_decay=0.1, reached=reached).init(params)
    assert isinstance(state.task.trace["idle"], jax.Array)
    assert isinstance(state.kd.trace["idle"], optax.MaskedNode)


@pytest.mark.parametrize(
    ("dtype", "accumulator_dtype", "kept"),
    [
        (jnp.complex64, None, jnp.complex64),
        (jnp.complex64, jnp.float32, jnp.complex64),
        (jnp.complex64, jnp.float64, jnp.complex128),
        (jnp.complex128, None, jnp.complex128),
        (jnp.complex128, jnp.complex64, jnp.complex64),
        (jnp.float32, jnp.float64, jnp.float64),
        (jnp.float64, None, jnp.float64),
    ],
)
def test_wide_and_complex_buffers(dtype, accumulator_dtype, kept):
    with jax.enable_x64(True):
        params = {"w": jnp.ones(2, dtype)}
        tx = dot_optax.dot(0.1, 0.5, 0.75, accumulator_dtype=accumulator_dtype)
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(PerLoss(params, params), state, params)
        assert {x.dtype for x in jax.tree.leaves(state[0])} == {jnp.dtype(kept)}
        assert updates["w"].dtype == dtype
        np.testing.assert_allclose(updates["w"], -0.325, rtol=1e-6)
