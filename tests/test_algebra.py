"""The algebra of losses: every container, `joint`, `wrap`, and the errors of malformed gradients."""

import collections
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

import dot_optax
from dot_optax import PerLoss

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
TASK, KD = (optax.tree.random_like(jax.random.key(seed), PARAMS) for seed in (1, 2))


class Three(NamedTuple):
    task: Any
    hint: Any
    kd: Any


def dot_update(grads, params=PARAMS, **kwargs):
    tx = dot_optax.dot(0.1, 0.5, 0.75, **kwargs)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
    return updates


@pytest.mark.parametrize(
    "container",
    [
        (TASK, KD),
        {"task": TASK, "kd": KD},
        {"kd": KD, "task": TASK},
        {0: TASK, 1: KD},
        FrozenDict({"kd": KD, "task": TASK}),
        collections.OrderedDict(kd=KD, task=TASK),
        collections.namedtuple("Grads", ["kd", "task"])(kd=KD, task=TASK),
    ],
    ids=lambda c: type(c).__name__,
)
def test_every_container_of_two(container):
    chex.assert_trees_all_equal(dot_update(container), dot_update(PerLoss(TASK, KD)))


def test_frozen_containers_of_frozen_parameters():
    """Flax's mappings keep plain dicts inside."""
    deep = FrozenDict({"layer": PARAMS})
    grads = FrozenDict({"task": {"layer": TASK}, "kd": {"layer": KD}})
    chex.assert_trees_all_equal(dot_update(grads, deep), FrozenDict({"layer": dot_update(PerLoss(TASK, KD))}))


@pytest.mark.parametrize(
    ("transformations", "grads"),
    [
        ((optax.scale(1.0), optax.scale(2.0), optax.scale(3.0)), (TASK, TASK, KD)),
        ((Three(optax.scale(1.0), optax.scale(2.0), optax.scale(3.0)),), Three(TASK, TASK, KD)),
        ((Three(optax.scale(1.0), optax.scale(2.0), optax.scale(3.0)),), (TASK, TASK, KD)),
        ((Three(optax.scale(1.0), optax.scale(2.0), optax.scale(3.0)),), {"kd": KD, "hint": TASK, "task": TASK}),
        (({"a": optax.scale(1.0), "z": optax.scale(3.0), "b": optax.scale(2.0)},), {"z": KD, "b": TASK, "a": TASK}),
        (({"a": optax.scale(1.0), "z": optax.scale(3.0), "b": optax.scale(2.0)},), {"a": TASK, "b": TASK, "z": KD}),
        ((optax.scale(1.0), optax.scale(2.0), optax.scale(3.0)), {2: KD, 1: TASK, 0: TASK}),
    ],
)
def test_three_losses(transformations, grads):
    tx = dot_optax.per_loss(*transformations)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    assert jax.tree.structure(updates) == jax.tree.structure(grads)
    total, _ = dot_optax.sum_losses().update(updates, optax.EmptyState(), PARAMS)
    expected = jax.tree.map(lambda task, kd: 3.0 * task + 3.0 * kd, TASK, KD)
    chex.assert_trees_all_close(total, expected, rtol=1e-6)


def test_the_state_is_a_container_by_name():
    state = dot_optax.per_loss(optax.trace(0.5), optax.scale_by_adam()).init(PARAMS)
    assert isinstance(state.task, optax.TraceState) and isinstance(state.kd, optax.ScaleByAdamState)
    state = dot_optax.per_loss({"ce": optax.trace(0.5), "hint": optax.identity()}).init(PARAMS)
    assert isinstance(state["ce"], optax.TraceState)


def test_keywords_reach_the_transformations_that_want_them():
    seen = {}

    def update(updates, state, params=None, *, value, **extra_args):
        seen.update(value=value, **extra_args)
        return updates, state

    wants = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    for tx in (
        dot_optax.per_loss(wants, optax.identity()),
        dot_optax.joint(wants),
        dot_optax.wrap(lambda tx: optax.apply_if_finite(tx, 1), optax.chain(dot_optax.sum_losses(), wants)),
        dot_optax.wrap(lambda tx: optax.MultiSteps(tx, 1), optax.chain(dot_optax.sum_losses(), wants)),
    ):
        seen.clear()
        tx.update((TASK, KD), tx.init(PARAMS), PARAMS, value=3.0, other="x")
        assert seen == {"value": 3.0, "other": "x"}


def test_the_sum_has_the_dtypes_of_the_parameters():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    updates, _ = dot_optax.sum_losses().update((TASK, KD), optax.EmptyState(), params)
    assert updates["w"].dtype == jnp.bfloat16
    updates, _ = dot_optax.sum_losses().update((TASK, KD), optax.EmptyState())
    assert updates["w"].dtype == jnp.float32


@pytest.mark.parametrize("losses", [PerLoss._fields, 2, ("a", "b")])
def test_joint_sees_one_tree(losses):
    tx = dot_optax.joint(optax.clip_by_global_norm(1.0), losses=losses)
    (task, kd), _ = tx.update((TASK, KD), tx.init(PARAMS), PARAMS)
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves((TASK, KD))))
    chex.assert_trees_all_close((task, kd), jax.tree.map(lambda g: g / norm, (TASK, KD)), rtol=1e-5)


def test_joint_keeps_a_state_over_all_losses_and_sees_the_parameters():
    tx = dot_optax.joint(optax.chain(optax.add_decayed_weights(0.5), optax.scale_by_adam()), losses=("a", "b", "c"))
    grads = {"a": TASK, "b": KD, "c": TASK}
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    alone = optax.chain(optax.add_decayed_weights(0.5), optax.scale_by_adam())
    for name, g in grads.items():
        chex.assert_trees_all_close(updates[name], alone.update(g, alone.init(PARAMS), PARAMS)[0], rtol=1e-6)
    assert state[1].count == 1


def average_of_micro_batches(k, grads):
    """What an optimizer should see after `k` micro-batches."""
    return [jax.tree.map(lambda *g: sum(g) / k, *grads[i : i + k]) for i in range(0, len(grads), k)]


def random_grads(n):
    return [PerLoss(*(optax.tree.random_like(jax.random.key(10 * i + j), PARAMS) for j in range(2))) for i in range(n)]


def test_wrap_multi_steps_equals_the_full_batch():
    grads = random_grads(6)
    tx = dot_optax.wrap(functools.partial(optax.MultiSteps, every_k_schedule=3), dot_optax.dot(0.1))
    reference = dot_optax.dot(0.1)
    state, reference_state = tx.init(PARAMS), reference.init(PARAMS)
    update = jax.jit(tx.update)
    full = iter(average_of_micro_batches(3, grads))
    for i, g in enumerate(grads):
        updates, state = update(g, state, PARAMS)
        if i % 3 < 2:
            assert not any(u.any() for u in jax.tree.leaves(updates))
        else:
            expected, reference_state = reference.update(next(full), reference_state, PARAMS)
            chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [0, 1])
def test_wrap_apply_if_finite_sees_both_gradients(loss):
    tx = dot_optax.wrap(lambda tx: optax.apply_if_finite(tx, 5), dot_optax.dot(0.1))
    good = PerLoss(TASK, KD)
    bad = PerLoss(*(g | {"b": g["b"] * jnp.nan} if i == loss else g for i, g in enumerate(good)))
    state = tx.init(PARAMS)
    updates, after_bad = jax.jit(tx.update)(bad, state, PARAMS)
    assert not any(u.any() for u in jax.tree.leaves(updates))
    assert after_bad.notfinite_count == 1
    chex.assert_trees_all_equal(after_bad.inner_state, state.inner_state)
    updates, _ = tx.update(good, after_bad, PARAMS)
    chex.assert_trees_all_close(updates, dot_optax.dot(0.1).update(good, dot_optax.dot(0.1).init(PARAMS), PARAMS)[0])


@pytest.mark.parametrize(
    "mask", [{"w": True, "b": False}, lambda p: jax.tree.map(lambda x: x.ndim > 1, p)], ids=["tree", "callable"]
)
def test_wrap_masked_passes_the_summed_gradient_through(mask):
    tx = dot_optax.wrap(lambda tx: optax.masked(tx, mask), dot_optax.dot(0.1))
    updates, _ = tx.update((TASK, KD), tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["w"], -0.1 * (TASK["w"] + KD["w"]), rtol=1e-6)
    np.testing.assert_allclose(updates["b"], TASK["b"] + KD["b"], rtol=1e-6)


def test_wrap_partition_gives_other_optimizers_the_summed_gradient():
    tx = dot_optax.wrap(
        lambda tx: optax.partition({"dot": tx, "adam": optax.adam(0.1)}, {"w": "dot", "b": "adam"}), dot_optax.dot(0.1)
    )
    adam = optax.adam(0.1)
    state, adam_state = tx.init(PARAMS), adam.init(PARAMS["b"])
    for g in random_grads(3):
        updates, state = tx.update(g, state, PARAMS)
        expected, adam_state = adam.update(g.task["b"] + g.kd["b"], adam_state, PARAMS["b"])
        np.testing.assert_allclose(updates["b"], expected, rtol=1e-5)


def test_wrap_three_named_losses():
    inner = optax.chain(
        dot_optax.per_loss({"ce": optax.trace(0.5), "hint": optax.trace(0.9), "kd": optax.trace(0.9)}),
        dot_optax.sum_losses(),
    )
    tx = dot_optax.wrap(lambda tx: optax.apply_if_finite(tx, 1), inner, losses=("ce", "hint", "kd"))
    grads = {"kd": KD, "ce": TASK, "hint": TASK}
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda t, k: 2 * t + k, TASK, KD), rtol=1e-6)


@pytest.mark.parametrize(
    "wrapper", [lambda tx: optax.apply_if_finite(tx, 1), functools.partial(optax.MultiSteps, every_k_schedule=1)]
)
def test_wrap_takes_a_tuple_in_the_order_of_its_names(wrapper):
    """Not in that of the sorted names."""
    inner = optax.chain(dot_optax.per_loss({"kd": optax.scale(3.0), "ce": optax.identity()}), dot_optax.sum_losses())
    tx = dot_optax.wrap(wrapper, inner, losses=("kd", "ce"))
    updates, _ = tx.update((KD, TASK), tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda t, k: t + 3 * k, TASK, KD), rtol=1e-6)


def test_a_transformation_that_looks_into_the_parameters_needs_no_params_in_update():
    def init(params):
        return {"trace": jnp.zeros_like(params["w"])}

    def update(updates, state, params=None):
        return updates, {"trace": state["trace"] + updates["w"]}

    tx = dot_optax.per_loss(optax.GradientTransformation(init, update), optax.identity())
    _, state = tx.update((TASK, KD), tx.init(PARAMS))
    chex.assert_trees_all_equal(state.task["trace"], TASK["w"])


def in_jit(tx):
    return optax.GradientTransformationExtraArgs(tx.init, lambda u, s, p=None, **extra: jax.jit(tx.update)(u, s, p))


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        (optax.flatten, "wrap: the wrapper changed the summed gradient"),
        (in_jit, "wrap: the wrapper changed the summed gradient"),
        (
            lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
            "return optax.MultiSteps, not what it converts to",
        ),
        (lambda tx: optax.contrib.split_real_and_imaginary(tx), "or use it without wrap"),
    ],
)
def test_wrap_refuses_what_it_cannot_serve(wrapper, message):
    params = jax.tree.map(lambda p: p * (1 + 1j), PARAMS)
    tx = dot_optax.wrap(wrapper, dot_optax.dot(0.1))
    with pytest.raises(ValueError, match=message):
        tx.update((params, params), tx.init(params), params)


@pytest.mark.parametrize(
    "inside",
    [
        lambda tx: optax.chain(tx, optax.add_decayed_weights(0.1)),
        lambda tx: optax.chain(optax.clip_by_global_norm(0.1), tx),
        lambda tx: optax.masked(tx, {"w": True, "b": False}),
    ],
)
def test_multi_steps_holds_the_optimizer_alone(inside):
    """Whatever stood beside it in there would see the gradients of each loss; nested, it sees their sum."""
    with pytest.raises(ValueError, match=r"MultiSteps must hold the optimizer alone.* nest, wrap\(MultiSteps, wrap\("):
        dot_optax.wrap(lambda tx: optax.MultiSteps(inside(tx), 1), dot_optax.dot(0.1))


@pytest.mark.parametrize(
    "inside",
    [
        lambda tx: optax.chain(tx, optax.add_decayed_weights(0.1)),
        lambda tx: optax.masked(tx, {"w": True, "b": False}),
        lambda tx: optax.partition({True: tx, False: optax.adam(0.1)}, {"w": True, "b": False}),
    ],
)
def test_nested_wraps_accumulate_and_then_do_the_rest(inside):
    inner = dot_optax.wrap(inside, dot_optax.dot(0.1))
    nested = dot_optax.wrap(lambda tx: optax.MultiSteps(tx, 1), inner)
    results = [tx.update((TASK, KD), tx.init(PARAMS), PARAMS)[0] for tx in (nested, inner)]
    chex.assert_trees_all_close(*results, rtol=1e-6)


def test_the_state_of_wrapped_multi_steps_is_its_own():
    multi_steps = optax.MultiSteps(optax.identity(), 2)
    tx = dot_optax.wrap(functools.partial(optax.MultiSteps, every_k_schedule=2), dot_optax.dot(0.1))
    state, updated = tx.init(PARAMS), []
    for _ in range(4):
        _, state = tx.update((TASK, KD), state, PARAMS)
        updated.append(bool(multi_steps.has_updated(state)))
    assert updated == [False, True, False, True]


def test_predicates_of_a_wrapper_see_the_users_keywords_alone():
    seen = []

    def predicate(step, **extra):
        seen.append(sorted(extra))
        return extra["value"] > 1

    tx = dot_optax.wrap(
        lambda tx: optax.conditionally_transform(tx, predicate, forward_extra_args=True), dot_optax.dot(0.1)
    )
    for value, expected in ((2.0, -0.1), (0.5, 1.0)):
        updates, _ = tx.update((TASK, KD), tx.init(PARAMS), PARAMS, value=value)
        np.testing.assert_allclose(updates["w"], expected * (TASK["w"] + KD["w"]), rtol=1e-6)
    assert seen == [["value"]] * 2


@pytest.mark.parametrize(
    "wrapper",
    [
        lambda tx: optax.masked(tx, {"w": True, "b": False}),
        lambda tx: optax.conditionally_transform(tx, lambda step: step % 2 == 0),
        lambda tx: optax.apply_if_finite(tx, 2),
        functools.partial(optax.MultiSteps, every_k_schedule=2),
    ],
)
def test_wrap_in_scan_with_wider_gradients_than_parameters(wrapper):
    params = optax.tree.cast(PARAMS, jnp.bfloat16)
    tx = dot_optax.wrap(wrapper, dot_optax.dot(0.1))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update((TASK, KD), state, params)
        return (optax.apply_updates(params, updates), state), updates

    (_, _), updates = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), length=3))()
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    "wrapper", [lambda tx: optax.apply_if_finite(tx, 1), functools.partial(optax.MultiSteps, every_k_schedule=2)]
)
def test_wrap_wants_one_tree_from_the_optimizer(wrapper):
    tx = dot_optax.wrap(wrapper, dot_optax.per_loss(optax.trace(0.9), optax.trace(0.9)))
    with pytest.raises(ValueError, match=r"`tx` must return one tree, such as sum_losses\(\) makes; got"):
        tx.update((TASK, KD), tx.init(PARAMS), PARAMS)


def test_norms_in_a_wrapper_are_those_of_the_summed_gradient():
    tx = dot_optax.wrap(
        lambda tx: optax.partition(
            {"dot": tx, "clipped": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1))},
            {"w": "dot", "b": "clipped"},
        ),
        dot_optax.dot(0.1),
    )
    updates, _ = tx.update((TASK, KD), tx.init(PARAMS), PARAMS)
    total = TASK["b"] + KD["b"]
    np.testing.assert_allclose(updates["b"], -0.1 * total * 0.5 / jnp.linalg.norm(total), rtol=1e-5)


def test_skip_large_updates_sees_the_joint_norm():
    """`MultiSteps` is given the container: the square of its norm is the sum over the losses."""
    square = sum(float((g**2).sum()) for g in jax.tree.leaves((TASK, KD)))
    for limit, skipped in ((0.99 * square, True), (1.01 * square, False)):
        skip = functools.partial(optax.skip_large_updates, max_squared_norm=limit)
        tx = dot_optax.wrap(
            lambda tx, skip=skip: optax.MultiSteps(tx, 1, should_skip_update_fn=skip), dot_optax.dot(0.1)
        )
        updates, _ = tx.update((TASK, KD), tx.init(PARAMS), PARAMS)
        assert updates["w"].any() != skipped


def test_parameters_that_are_a_pair_themselves():
    params = (jnp.ones(3), jnp.ones(3))
    grads = PerLoss(params, params)
    np.testing.assert_allclose(dot_update(grads, params)[0], -0.1 * (1.5 + 1.75), rtol=1e-6)


@pytest.mark.parametrize("params", [{}, {"w": None, "b": jnp.ones(2)}, (), jnp.ones(())], ids=repr)
def test_empty_trees_none_leaves_and_bare_arrays(params):
    updates = dot_update(PerLoss(params, params), params, weight_decay=0.1)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_one_loss_in_a_tuple():
    for tx in (dot_optax.per_loss((optax.scale(2.0),)), dot_optax.per_loss(optax.scale(2.0))):
        (updates,), _ = tx.update((TASK,), tx.init(PARAMS), PARAMS)
        chex.assert_trees_all_close(updates, jax.tree.map(lambda g: 2 * g, TASK))
    total, _ = dot_optax.sum_losses().update((TASK,), optax.EmptyState(), PARAMS)
    chex.assert_trees_all_equal(total, TASK)


def test_losses_without_names_take_a_named_tuple_of_as_many():
    tx = dot_optax.per_loss(optax.scale(1.0), optax.scale(2.0), optax.scale(3.0))
    updates, _ = tx.update(Three(TASK, TASK, KD), tx.init(PARAMS), PARAMS)
    assert isinstance(updates, Three)
    chex.assert_trees_all_close(updates.kd, jax.tree.map(lambda g: 3 * g, KD), rtol=1e-6)
    joint = dot_optax.joint(optax.scale(2.0), losses=3)
    updates, _ = joint.update(Three(TASK, TASK, KD), joint.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(updates.hint, jax.tree.map(lambda g: 2 * g, TASK), rtol=1e-6)
    for fields in ("a b", "a b c d"):
        other = collections.namedtuple("Other", fields)
        with pytest.raises(ValueError, match="updates: expected a mapping with the keys 0, 1, 2, or a 3-tuple"):
            tx.update(other(*[TASK] * len(other._fields)), tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("fails", [False, True])
def test_wrap_forgets_the_gradients_after_the_update(fails):
    """What it gave the inner optimizer must not serve a call that the wrapper does not make."""
    seen = []

    def wrapper(tx):
        seen.append(tx)

        def update(updates, state, params=None):
            result = tx.update(updates, state, params)
            if fails:
                raise ArithmeticError
            return result

        return optax.GradientTransformation(tx.init, update)

    tx = dot_optax.wrap(wrapper, dot_optax.dot(0.1))
    state = tx.init(PARAMS)
    if fails:
        with pytest.raises(ArithmeticError):
            tx.update((TASK, KD), state, PARAMS)
    else:
        tx.update((TASK, KD), state, PARAMS)
    with pytest.raises(LookupError):
        seen[-1].update(TASK, state, PARAMS)


def test_a_nan_is_skipped_around_the_accumulation():
    accumulating = dot_optax.wrap(functools.partial(optax.MultiSteps, every_k_schedule=2), dot_optax.dot(0.1))
    tx = dot_optax.wrap(lambda tx: optax.apply_if_finite(tx, 5), accumulating)
    good, bad = PerLoss(TASK, KD), PerLoss(TASK, KD | {"b": KD["b"] * jnp.nan})
    results = []
    for grads in ([good, bad, good], [good, good]):
        state = tx.init(PARAMS)
        for g in grads:
            updates, state = tx.update(g, state, PARAMS)
        results.append(updates)
    assert results[0]["w"].any()
    chex.assert_trees_all_close(*results)
