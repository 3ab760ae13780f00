"""DOT against the published trajectories, against a plain loop in NumPy, and against `optax.sgd`."""

import functools
from typing import ClassVar

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from hypothesis.extra import numpy as hnp

import dot_optax
from dot_optax import PerLoss
from tests.reference import golden


def momenta(state):
    """The buffers in the state of `dot`, a container of trees."""
    return jax.tree.map(lambda s: s.trace, state[0], is_leaf=lambda s: isinstance(s, optax.TraceState))


def check_deviations(deviations):
    assert deviations
    # 1e-12 in float64 is what is asked; `python -m tests.reference.golden` prints at most 4e-15 for numbers of order
    # one and 3e-14 for a loss of 206.
    assert max(deviations.values()) <= 1e-12, deviations


@pytest.mark.parametrize("name", golden.FILES)
def test_every_published_quantity_at_every_step(name):
    check_deviations(golden.deviations(name, jax.jit))


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.FILES)
def test_every_published_quantity_without_jit(name):
    check_deviations(golden.deviations(name))


def plain_dot(params, grads, learning_rate, betas, *, weight_decay=0.0, reached=None, nesterov=False, decayed=None):
    """DOT as a loop over parameters and steps in NumPy: `grads` is a list of (task, kd) dicts of float64 arrays."""
    params = dict(params)
    buffers = {(loss, k): 0.0 for loss in (0, 1) for k in params}
    for step_grads in grads:
        for k, theta in params.items():
            reach = [True, True] if reached is None else [bool(reached[loss][k]) for loss in (0, 1)]
            g = [step_grads[0][k], step_grads[1][k]]
            if weight_decay and (decayed is None or decayed[k]):
                loss = 1 if reach == [False, True] else 0
                g[loss] = g[loss] * reach[loss] + weight_decay * theta
                reach[loss] = True
            total = 0.0
            for loss in (0, 1):
                if not reach[loss]:
                    continue
                beta = betas[loss] if all(reach) else sum(betas) / 2
                v = buffers[loss, k] = g[loss] + beta * buffers[loss, k]
                total = total + (g[loss] + beta * v if nesterov else v)
            params[k] = theta - learning_rate * total
    return params


@st.composite
def problems(draw):
    """A random parameter tree, a few steps of gradients and the hyperparameters of `dot`."""
    names = draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4, unique=True))
    shapes = {k: draw(hnp.array_shapes(min_dims=0, max_dims=2, max_side=3)) for k in names}
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sample = lambda: {k: rng.standard_normal(shapes[k]) for k in names}  # noqa: E731
    masks = st.fixed_dictionaries({k: st.booleans() for k in names})
    beta = st.floats(0.0, 0.99)
    return {
        "params": sample(),
        "grads": [(sample(), sample()) for _ in range(draw(st.integers(1, 4)))],
        "learning_rate": draw(st.floats(1e-4, 1.0)),
        "betas": (draw(beta), draw(beta)),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "reached": draw(st.none() | st.tuples(masks, masks)),
        "nesterov": draw(st.booleans()),
        "decayed": draw(st.none() | masks),
    }


@hypothesis.given(problems(), st.sampled_from([np.float32, np.float64]), st.sampled_from(["PerLoss", "tuple", "dict"]))
@hypothesis.settings(max_examples=60)
def test_equals_a_plain_loop(problem, dtype, container):
    with jax.enable_x64(True):
        params, grads = jax.tree.map(lambda x: jnp.asarray(x, dtype), (problem["params"], problem["grads"]))
        tx = dot_optax.dot(
            problem["learning_rate"],
            *problem["betas"],
            weight_decay=problem["weight_decay"],
            mask=problem["decayed"],
            reached=problem["reached"],
            nesterov=problem["nesterov"],
        )
        pack = {
            "PerLoss": lambda task, kd: PerLoss(task, kd),
            "tuple": lambda task, kd: (task, kd),
            "dict": lambda task, kd: {"kd": kd, "task": task},
        }[container]
        state = tx.init(params)
        for task, kd in grads:
            updates, state = tx.update(pack(task, kd), state, params)
            assert all(u.dtype == dtype for u in jax.tree.leaves(updates))
            params = optax.apply_updates(params, updates)
        expected = plain_dot(
            jax.tree.map(lambda x: np.asarray(x, dtype), problem["params"]),
            jax.tree.map(lambda x: np.asarray(x, dtype).astype(np.float64), problem["grads"]),
            problem["learning_rate"],
            problem["betas"],
            weight_decay=problem["weight_decay"],
            reached=problem["reached"],
            nesterov=problem["nesterov"],
            decayed=problem["decayed"],
        )
        # At most 4 steps of some 10 roundings each, of numbers below 50.
        tolerance = 50 * 40 * np.finfo(dtype).eps
        chex.assert_trees_all_close(params, jax.tree.map(np.asarray, expected), rtol=0, atol=tolerance)


class EqualBetasTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(nesterov=[False, True], weight_decay=[0.0, 0.01])
    def test_delta_zero_is_sgd_for_shared_and_one_loss_parameters(self, nesterov, weight_decay):
        params = {"shared": jnp.ones((2, 3)), "head": jnp.ones(3), "projector": jnp.ones((3, 1))}
        reached = PerLoss(
            task={"shared": True, "head": True, "projector": False},
            kd={"shared": True, "head": False, "projector": True},
        )
        mu = 0.9
        ours = dot_optax.dot(
            0.1, *dot_optax.betas(mu, 0.0), weight_decay=weight_decay, reached=reached, nesterov=nesterov
        )
        sgd = optax.chain(
            dot_optax.sum_losses(),
            optax.add_decayed_weights(weight_decay),
            optax.sgd(0.1, momentum=mu, nesterov=nesterov),
        )
        ours_update, sgd_update = self.variant(ours.update), self.variant(sgd.update)
        ours_params = sgd_params = params
        ours_state, sgd_state = ours.init(params), sgd.init(params)
        for step in range(10):
            keys = jax.random.split(jax.random.key(step), 2)
            task, kd = (optax.tree.random_like(key, params) for key in keys)
            grads = PerLoss(
                task=task | {"projector": jnp.zeros((3, 1))},
                kd=kd | {"head": jnp.zeros(3)},
            )
            updates, ours_state = ours_update(grads, ours_state, ours_params)
            ours_params = optax.apply_updates(ours_params, updates)
            updates, sgd_state = sgd_update(grads, sgd_state, sgd_params)
            sgd_params = optax.apply_updates(sgd_params, updates)
        # One buffer: the same sums in the same order, so the same bits without jit; XLA may fuse multiply and add.
        for name in ("head", "projector"):
            np.testing.assert_allclose(ours_params[name], sgd_params[name], rtol=1e-6)
        # Two buffers: ten steps of numbers of order ten, rounded to 24 bits.
        np.testing.assert_allclose(ours_params["shared"], sgd_params["shared"], rtol=0, atol=1e-5)


def test_delta_zero_with_one_gradient_is_sgd_to_the_last_bit():
    params = {"w": jnp.linspace(-1.0, 1.0, 7)}
    tx, sgd = dot_optax.dot(0.1, *dot_optax.betas(0.9, 0.0)), optax.sgd(0.1, momentum=0.9)
    state, sgd_state = tx.init(params), sgd.init(params)
    for step in range(10):
        g = optax.tree.random_like(jax.random.key(step), params)
        ours, state = tx.update((g, optax.tree.zeros_like(g)), state, params)
        theirs, sgd_state = sgd.update(g, sgd_state, params)
        chex.assert_trees_all_equal(ours, theirs)


def test_a_learning_rate_drop_acts_at_once_and_keeps_the_buffers():
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.1})
    params = {"w": jnp.zeros(1)}
    grads = ({"w": jnp.ones(1)}, {"w": jnp.ones(1)})
    dropped, constant = dot_optax.dot(schedule), dot_optax.dot(1.0)
    state, constant_state = dropped.init(params), constant.init(params)
    for factor in (1.0, 0.1, 0.1):
        updates, state = dropped.update(grads, state, params)
        expected, constant_state = constant.update(grads, constant_state, params)
        np.testing.assert_allclose(updates["w"], factor * expected["w"], rtol=1e-6)
        chex.assert_trees_all_equal(momenta(state), momenta(constant_state))


def test_the_readable_sentence_is_the_optimizer():
    """`dot` is per-loss traces, their sum and the learning rate, in Optax's own words."""
    params = {"w": jnp.linspace(0.0, 1.0, 5)}
    sentence = optax.chain(
        dot_optax.per_loss(
            optax.chain(optax.add_decayed_weights(0.01), optax.trace(0.8)),
            optax.trace(0.95),
        ),
        dot_optax.sum_losses(),
        optax.scale_by_learning_rate(0.1),
    )
    tx = dot_optax.dot(0.1, 0.8, 0.95, weight_decay=0.01)
    state, sentence_state = tx.init(params), sentence.init(params)
    for step in range(5):
        grads = tuple(optax.tree.random_like(key, params) for key in jax.random.split(jax.random.key(step)))
        ours, state = tx.update(grads, state, params)
        expected, sentence_state = sentence.update(grads, sentence_state, params)
        chex.assert_trees_all_equal(ours, expected)


class Reach:
    """A parameter of each kind, and the masks that say so."""

    params: ClassVar = {
        "body": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)},
        "head": jnp.ones(2),
        "proj": jnp.ones(2),
        "idle": jnp.ones(2),
    }
    task: ClassVar = {"body": True, "head": True, "proj": False, "idle": False}
    kd: ClassVar = {"body": True, "head": False, "proj": True, "idle": False}


@pytest.mark.parametrize("as_callable", [False, True])
def test_one_buffer_for_a_parameter_of_one_loss(as_callable):
    case = Reach
    reached = PerLoss(case.task, case.kd)
    if as_callable:
        reached = PerLoss(*(functools.partial(lambda mask, tree: {k: mask[k] for k in tree}, mask) for mask in reached))
    tx = dot_optax.scale_by_dot(0.5, 0.9, reached=reached)
    task, kd = (s.trace for s in tx.init(case.params))
    masked = optax.MaskedNode()
    assert jax.tree.structure(task) == jax.tree.structure({**case.params, "proj": masked, "idle": masked})
    assert jax.tree.structure(kd) == jax.tree.structure({**case.params, "head": masked, "idle": masked})
    state = tx.init(case.params)
    ones = jax.tree.map(jnp.ones_like, case.params)
    for _ in range(2):
        updates, state = tx.update((ones, ones), state, case.params)
    np.testing.assert_allclose(updates["body"]["w"], 1.5 + 1.9, rtol=1e-6)
    np.testing.assert_allclose(updates["head"], 1.7, rtol=1e-6)
    np.testing.assert_allclose(updates["proj"], 1.7, rtol=1e-6)
    np.testing.assert_array_equal(updates["idle"], 0.0)


def test_an_unreached_parameter_is_moved_by_its_l2_alone():
    case = Reach
    grads = PerLoss(*(jax.tree.map(jnp.zeros_like, case.params),) * 2)
    mask = {"body": False, "head": False, "proj": False, "idle": True}
    tx = dot_optax.dot(1.0, 0.5, 0.9, weight_decay=0.1, mask=mask, reached=PerLoss(case.task, case.kd))
    state = tx.init(case.params)
    for _ in range(2):
        updates, state = tx.update(grads, state, case.params)
    np.testing.assert_allclose(updates["idle"], -(0.1 + 0.7 * 0.1), rtol=1e-6)
    for name in ("body", "head", "proj"):
        assert all(not u.any() for u in jax.tree.leaves(updates[name]))


def test_a_mask_may_speak_of_empty_and_of_masked_parts():
    params = {"w": jnp.ones(2), "empty": {}, "none": None, "deep": {"er": jnp.ones(1)}}
    mask = {"w": True, "empty": True, "none": True, "deep": {"er": False}}
    tx = dot_optax.dot(0.1, weight_decay=0.1, mask=mask)
    for wrapper in (
        lambda tx: optax.apply_if_finite(tx, 1),
        lambda tx: optax.masked(tx, {"w": True, "empty": False, "none": None, "deep": False}),
    ):
        wrapped = dot_optax.wrap(wrapper, tx)
        updates, _ = wrapped.update((params, params), wrapped.init(params), params)
        np.testing.assert_allclose(updates["w"], -0.21, rtol=1e-6)


def test_l2_joins_the_distillation_gradient_where_only_that_reaches():
    params = {"shared": jnp.ones(1), "proj": jnp.ones(1)}
    reached = PerLoss(task={"shared": True, "proj": False}, kd=True)
    tx = dot_optax.dot(1.0, 0.5, 0.9, weight_decay=0.1, reached=reached)
    zeros = optax.tree.zeros_like(params)
    _, state = tx.update((zeros, zeros), tx.init(params), params)
    task, kd = momenta(state)
    np.testing.assert_allclose(task["shared"], 0.1)
    np.testing.assert_array_equal(kd["shared"], 0.0)
    np.testing.assert_allclose(kd["proj"], 0.1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("accumulator_dtype", [None, jnp.float32])
@pytest.mark.parametrize("traced_betas", [False, True])
def test_updates_and_state_keep_their_dtypes(dtype, accumulator_dtype, traced_betas):
    params = {"w": jnp.ones(3, dtype)}
    grads = PerLoss(params, params)

    @jax.jit
    def two_steps(beta_task, beta_kd):
        if not traced_betas:
            beta_task, beta_kd = 0.5, 0.75
        tx = dot_optax.dot(0.1, beta_task, beta_kd, weight_decay=0.1, accumulator_dtype=accumulator_dtype)
        state = tx.init(params)
        _, second = tx.update(grads, state, params)
        updates, third = tx.update(grads, second, params)
        return updates, state, third

    updates, state, third = two_steps(jnp.float32(0.5), jnp.float32(0.75))
    assert updates["w"].dtype == dtype
    chex.assert_trees_all_equal_shapes_and_dtypes(state, third)
    assert momenta(third).kd["w"].dtype == (accumulator_dtype or jnp.float32)
    # 1.1 * 1.5 + 1.75, rounded a few times to the precision of the parameters.
    np.testing.assert_allclose(np.float32(updates["w"]), -0.34, rtol=4 * float(jnp.finfo(dtype).eps))


def test_a_bfloat16_buffer_is_rounded_once_a_step():
    """Half a unit in the last place, at most 2**-8 of the exact value; in bfloat16 throughout it would be more."""
    params, g, v = (jax.random.normal(jax.random.key(i), (10_000,)).astype(jnp.bfloat16) for i in range(3))
    tx = dot_optax.scale_by_dot(0.825, 0.975)
    state = optax.tree.map_params(tx, lambda _: v, tx.init(params))
    _, new_state = jax.jit(tx.update)((g, g), state, params)
    for beta, trace in zip((0.825, 0.975), new_state, strict=True):
        exact = np.float64(g) + beta * np.float64(v)
        assert (np.abs(np.float64(trace.trace) - exact) <= 1.001 * 2**-8 * np.maximum(np.abs(exact), 2**-120)).all()


@pytest.mark.parametrize(
    ("params_dtype", "grads_dtype", "accumulator_dtype"),
    [
        (jnp.float32, jnp.float32, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32, None),
        (jnp.float32, jnp.bfloat16, None),
        (jnp.complex64, jnp.complex64, jnp.float32),
    ],
)
def test_mixed_dtypes(params_dtype, grads_dtype, accumulator_dtype):
    params = {"w": jnp.ones(3, params_dtype)}
    grads = PerLoss(*(optax.tree.cast(params, grads_dtype),) * 2)
    tx = dot_optax.dot(0.1, 0.5, 0.75, accumulator_dtype=accumulator_dtype)
    state = tx.init(params)
    updates, new_state = tx.update(grads, state, params)
    assert updates["w"].dtype == params_dtype
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
    np.testing.assert_allclose(np.complex64(updates["w"]), -0.2, rtol=2**-8)


@pytest.mark.parametrize("learning_rate", [np.float64(0.1), jnp.float32(0.1), lambda count: jnp.float32(0.1)])
def test_the_learning_rate_does_not_change_the_dtype(learning_rate):
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    for make in (dot_optax.dot, dot_optax.gain_matched_sgd, dot_optax.dot_adamw):
        tx = make(learning_rate, jnp.float32(0.825), jnp.float32(0.975))
        assert tx.update((params, params), tx.init(params), params)[0]["w"].dtype == jnp.bfloat16
    # Without the parameters nothing is rounded: `optax.apply_updates` does it.
    tx = dot_optax.dot(learning_rate)
    assert tx.update((params, params), tx.init(params))[0]["w"].dtype == jnp.float32


def test_the_defaults_are_the_papers():
    params = {"w": jnp.ones(3)}
    for make in (functools.partial(dot_optax.dot, 0.1), dot_optax.scale_by_dot):
        results = []
        for tx in (make(), make(*dot_optax.betas()), make(0.825, 0.975)):
            state = tx.init(params)
            for _ in range(3):
                updates, state = tx.update((params, params), state, params)
            results.append(updates["w"])
        np.testing.assert_allclose(results[0], results[1], rtol=1e-6)
        np.testing.assert_array_equal(results[0], results[2])


def test_betas():
    assert dot_optax.betas(0.5, 0.25) == PerLoss(task=0.25, kd=0.75)
    assert dot_optax.betas(0.25, 0.25) == PerLoss(task=0.0, kd=0.5)  # no momentum is a momentum too
    assert dot_optax.betas(0.0, 0.0) == PerLoss(task=0.0, kd=0.0)
    np.testing.assert_allclose(dot_optax.betas(), (0.825, 0.975))
    np.testing.assert_allclose(dot_optax.betas(jnp.float32(0.5), 0.25).kd, 0.75)
    warm_up = dot_optax.betas(0.9, optax.linear_schedule(0.0, 0.1, 10))
    np.testing.assert_allclose((warm_up.task(5), warm_up.kd(5)), (0.85, 0.95))


def test_gains():
    np.testing.assert_allclose(dot_optax.gains(0.5, 0.75), (2.0, 4.0))
    with pytest.raises(ValueError, match=r"beta_kd must be in \[0, 1\), got 1.0"):
        dot_optax.gains(0.5, 1.0)


def test_gain_matched_sgd_goes_as_far_as_dot_on_a_steady_gradient():
    params = {"w": jnp.ones(3)}
    grads = PerLoss({"w": jnp.array([1.0, 0.0, 2.0])}, {"w": jnp.array([0.0, 1.0, -1.0])})
    finals = []
    for tx in (dot_optax.dot(0.1, 0.7, 0.9), dot_optax.gain_matched_sgd(0.1, 0.7, 0.9)):
        state = tx.init(params)
        for _ in range(300):
            updates, state = tx.update(grads, state, params)
        finals.append(updates["w"])
    # 0.9**300 is 1e-14: what is left is float32 rounding.
    np.testing.assert_allclose(finals[0], [-1 / 3, -1.0, -2 / 3 + 1], rtol=1e-5)
    np.testing.assert_allclose(finals[0], finals[1], rtol=1e-5)
