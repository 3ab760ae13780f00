"""`aggregate`: Gram matrices of groups of parameters, on any device and of any dtype, and its place among other transformations."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dot_optax
from dot_optax import PerLoss, aggregate, weightings
from tests.tiers import slow_but

PARAMS = {"body": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "head": {"kernel": jnp.ones(4)}}
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}  # of float32 sums of some products of order one


def gradients(count=2, params=PARAMS, seed=0):
    return tuple(optax.tree.random_like(key, params) for key in jax.random.split(jax.random.key(seed), count))


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


def products(*trees):
    rows = np.stack(list(map(flat, trees)))
    return rows @ rows.T


@functools.cache
def updated(losses, **options):
    tx = aggregate(weightings.min_norm(), losses=losses, **options)
    return tx, jax.jit(tx.update)


@pytest.mark.parametrize("losses", [2, 3])
def test_it_is_the_weighted_sum_of_all(losses):
    grads = gradients(losses)
    tx, update = updated(losses)
    updates, state = update(grads, tx.init(PARAMS), PARAMS)
    gram = products(*grads)
    np.testing.assert_allclose(state.gram, gram[None], **ROUNDING)
    norms = np.sqrt(np.diag(gram))
    np.testing.assert_allclose(state.cosines, (gram / np.outer(norms, norms))[None], **ROUNDING)
    expected, _ = jax.jit(weightings.min_norm().weights)(jnp.asarray(gram, jnp.float32), None, ())
    w = optax.tree.get(state, "weights")
    np.testing.assert_allclose(w, expected[None], **ROUNDING)
    chex.assert_trees_all_close(
        updates, jax.tree.map(lambda *g: sum(a * b for a, b in zip(w[0], g, strict=True)), *grads), **ROUNDING
    )


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("all", [["body/kernel", "body/bias", "head/kernel"]]),
        ("layer", [["body/bias", "body/kernel"], ["head/kernel"]]),
        ("leaf", [["body/bias"], ["body/kernel"], ["head/kernel"]]),
        (lambda path: path[-1], [["body/bias"], ["body/kernel", "head/kernel"]]),
    ],
    ids=["all", "layer", "leaf", "a function"],
)
def test_each_group_has_its_own_weights(groups, members):
    task, kd = gradients()
    tx = aggregate(weightings.projected(), groups=groups)
    updates, state = jax.jit(tx.update)(PerLoss(task, kd), tx.init(PARAMS), PARAMS)
    assert state.weights.shape == (len(members), 2)
    for i, names in enumerate(members):
        parts = [[tree[a][b] for a, b in (name.split("/") for name in names)] for tree in (task, kd, updates)]
        np.testing.assert_allclose(state.gram[i], products(*parts[:2]), **ROUNDING)
        w = np.asarray(state.weights[i])
        np.testing.assert_allclose(flat(parts[2]), w[0] * flat(parts[0]) + w[1] * flat(parts[1]), **ROUNDING)


def test_layers_of_flax():
    """A state of NNX has a level more than the tree that `nnx.Optimizer` shows."""
    _, params, _ = nnx.split(
        nnx.Dict(a=nnx.Linear(2, 2, rngs=nnx.Rngs(0)), b=nnx.Linear(2, 2, rngs=nnx.Rngs(1))), nnx.Param, ...
    )
    for tree in (params, nnx.to_pure_dict(params)):
        assert aggregate(weightings.projected(), groups="layer").init(tree).weights.shape == (2, 2)


REACHED = PerLoss({"body": True, "head": True}, {"body": {"kernel": True, "bias": False}, "head": False})


@pytest.mark.parametrize("groups", ["all", "leaf"])
def test_only_what_several_losses_reach_counts(groups):
    task, kd = gradients()
    kd["body"]["bias"], kd["head"]["kernel"] = jnp.full(2, jnp.nan), jnp.full(4, jnp.inf)  # not read
    tx = aggregate(weightings.projected(), groups=groups, reached=REACHED)
    updates, state = jax.jit(tx.update)((task, kd), tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(state.gram, products(task["body"]["kernel"], kd["body"]["kernel"])[None], **ROUNDING)
    chex.assert_trees_all_equal((updates["body"]["bias"], updates["head"]), (task["body"]["bias"], task["head"]))


def test_parameters_of_some_or_of_no_losses():
    params = {"all": jnp.ones(3), "two": jnp.ones(2), "none": jnp.ones(1)}
    grads = dict(zip("abc", gradients(3, params), strict=True))
    reached = {k: {"all": True, "two": k != "c", "none": False} for k in "abc"}
    tx = aggregate(weightings.min_norm(), losses=("a", "b", "c"), reached=reached)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    seen = [{k: g[k] if reached[name][k] else jnp.zeros_like(g[k]) for k in g} for name, g in grads.items()]
    np.testing.assert_allclose(state.gram[0], products(*seen), **ROUNDING)
    w = state.weights[0]
    chex.assert_trees_all_close(updates["two"], w[0] * grads["a"]["two"] + w[1] * grads["b"]["two"], **ROUNDING)
    assert not updates["none"].any()


@pytest.mark.parametrize("empty", [{}, {"w": None}])
def test_without_shared_parameters_there_are_no_weights(empty):
    for params, reached in ((empty, None), (PARAMS, PerLoss(True, False))):
        grads = gradients(2, params)
        for weighting in (weightings.projected(), weightings.aligned(), weightings.priority()):
            tx = aggregate(weighting, reached=reached)
            updates, state = tx.update(grads, tx.init(params), params)
            assert state.weights.shape == (0, 2)
            chex.assert_trees_all_equal(updates, grads[0])


@pytest.mark.parametrize(
    "name", slow_but([name for name in weightings.__all__ if name != "Weighting"], "min_norm", "projected")
)
@pytest.mark.parametrize("losses", [2, 3])
def test_scan_and_vmap_over_seeds(name, losses):
    """Compiled or not, one seed or many: the weights are the same, and a state fits the next step."""
    tx = aggregate(getattr(weightings, name)(), losses=losses, groups="leaf")

    def run(seed):
        grads = jax.vmap(lambda key: tuple(jax.random.normal(k, (2, 3)) for k in jax.random.split(key, losses)))(
            jax.random.split(jax.random.key(seed), 3)
        )
        return jax.lax.scan(lambda state, g: tx.update(g, state)[::-1], tx.init(jnp.ones((2, 3))), grads)

    both = jax.jit(jax.vmap(run))(jnp.arange(2))
    one = jax.jit(run)(1)
    weights = [optax.tree.get(state, "weights") for state, _ in (both, one)]
    # A system that is nearly singular makes 1e-7 to 1e-4.
    np.testing.assert_allclose(weights[0][1], weights[1], rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(both[1][1], one[1], rtol=1e-4, atol=1e-4)


def test_sharded_parameters_keep_their_shardings():
    """Each in its own way, on four devices: the same numbers as on one."""
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    params = {"rows": jnp.ones((8, 4)), "columns": jnp.ones((2, 8)), "copied": jnp.ones(3)}
    shardings = {k: NamedSharding(mesh, s) for k, s in {"rows": P("x"), "columns": P(None, "x"), "copied": P()}.items()}
    grads = PerLoss(*gradients(2, params))
    tx = aggregate(weightings.projected(), groups="leaf")
    expected, state = tx.update(grads, tx.init(params), params)
    placed = jax.device_put((grads, params), (PerLoss(shardings, shardings), shardings))
    updates, new_state = jax.block_until_ready(jax.jit(tx.update)(placed[0], tx.init(params), placed[1]))
    chex.assert_trees_all_close((updates, new_state), (expected, state), **ROUNDING)
    assert all(updates[k].sharding.is_equivalent_to(shardings[k], updates[k].ndim) for k in params)
    text = jax.jit(tx.update).lower(placed[0], tx.init(params), placed[1]).compile().as_text()
    assert "all-gather" not in text and "all-reduce" in text  # the sums travel, the gradients stay


def test_each_device_sees_the_averages():
    """In `shard_map`, with momenta that stay on their devices and `average_over` before it: what one device makes of the means."""
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    tx = optax.chain(
        dot_optax.per_loss(optax.trace(0.8), optax.trace(0.9)),
        dot_optax.average_over("x"),
        aggregate(weightings.min_norm()),
    )
    alone = optax.chain(dot_optax.per_loss(optax.trace(0.8), optax.trace(0.9)), aggregate(weightings.min_norm()))
    history = jax.random.normal(jax.random.key(0), (3, 2, 4, 5))  # steps, losses, devices, parameters

    def run(tx, history):
        params = jnp.zeros_like(history[0, 0])
        state, updates = tx.init(params), []
        for step in history:
            update, state = tx.update((step[0], step[1]), state, params)
            updates.append(update)
        return jnp.stack(updates)

    def on_a_device(history):
        return run(tx, history[:, :, 0])

    found = jax.jit(jax.shard_map(on_a_device, mesh=mesh, in_specs=P(None, None, "x"), out_specs=P(), check_vma=False))
    np.testing.assert_allclose(jax.block_until_ready(found(history)), run(alone, history.mean(2)), **ROUNDING)


def test_dtypes():
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        params = optax.tree.cast(PARAMS, dtype)
        grads = gradients(2, params)
        tx, update = updated(2)
        updates, state = update(grads, tx.init(params), params)
        assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        assert {x.dtype for x in state[:3]} == {jnp.dtype(jnp.float32)}
        np.testing.assert_allclose(state.gram[0], products(*optax.tree.cast(grads, jnp.float32)), **ROUNDING)
    with jax.enable_x64(True):
        params = {"single": jnp.ones(2, jnp.float32), "double": jnp.ones(3, jnp.float64)}
        grads = gradients(2, params)
        updates, state = updated(2)[1](grads, updated(2)[0].init(params), params)
        assert (updates["single"].dtype, updates["double"].dtype, state.gram.dtype) == (
            jnp.float32,
            jnp.float64,
            jnp.float64,
        )
        np.testing.assert_allclose(state.gram[0], products(*grads), rtol=1e-6)  # the part in float32


def test_complex_gradients_count_by_the_real_part():
    params = jnp.ones(3, jnp.complex64)
    task, kd = gradients(2, params)
    tx, update = updated(2)
    updates, state = update((task, kd), tx.init(params), params)
    pair = [np.stack([g.real, g.imag]) for g in (task, kd)]
    np.testing.assert_allclose(state.gram[0], products(*pair), **ROUNDING)
    assert updates.dtype == jnp.complex64 and state.weights.dtype == jnp.float32


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15, 1e18])
def test_large_and_small_gradients(scale):
    grads = jax.tree.map(lambda g: g * scale, gradients())
    tx, update = updated(2)
    updates, state = update(grads, tx.init(PARAMS), PARAMS)
    expected, _ = update(gradients(), tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(jax.tree.map(lambda u: u / scale, updates), expected, **ROUNDING)
    assert np.isfinite(state.gram).all()


def test_gradients_whose_squares_overflow_are_seen():
    """Not finite, so that `optax.apply_if_finite` skips the step and keeps the state; also where all weights would be 0."""
    for weighting in (weightings.min_norm(), weightings.bisector("imtl"), weightings.conflict_averse()):
        tx = aggregate(weighting)
        update = jax.jit(tx.update)
        for bad in (1e20, jnp.nan):
            grads = jax.tree.map(lambda g, bad=bad: g * bad, gradients())
            updates, state = update(grads, tx.init(PARAMS), PARAMS)
            assert np.isnan(state.weights).all()
            assert not any(np.isfinite(u).any() for u in jax.tree.leaves(updates))
    safe = dot_optax.wrap(lambda tx: optax.apply_if_finite(tx, 5), aggregate(weightings.priority()))
    state = safe.init(PARAMS)
    updates, state = safe.update(grads, state, PARAMS)
    assert not any(u.any() for u in jax.tree.leaves(updates))
    assert not optax.tree.get(state, "ema").any()


def test_momenta_before_and_behind():
    """Before: the momenta of the losses are aggregated. Behind: one momentum of what was aggregated."""
    history = [PerLoss(*gradients(seed=seed)) for seed in range(3)]
    w = weightings.projected()
    before = optax.chain(dot_optax.per_loss(optax.trace(0.8), optax.trace(0.9)), aggregate(w))
    behind = optax.chain(aggregate(w), optax.trace(0.9))
    alone = aggregate(w)
    states, traces, buffer = [before.init(PARAMS), behind.init(PARAMS)], [0.0, 0.0], 0.0
    for grads in history:
        first, states[0] = before.update(grads, states[0], PARAMS)
        second, states[1] = behind.update(grads, states[1], PARAMS)
        traces = [flat(g) + beta * v for g, beta, v in zip(grads, (0.8, 0.9), traces, strict=True)]
        buffer = flat(alone.update(grads, alone.init(PARAMS), PARAMS)[0]) + 0.9 * buffer
        gram = np.stack(traces) @ np.stack(traces).T
        pulled = 1 + max(0, -gram[0, 1]) / np.diag(gram)
        np.testing.assert_allclose(flat(first), pulled @ np.stack(traces), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(flat(second), buffer, rtol=1e-4, atol=1e-5)


def test_multi_steps_aggregates_the_mean_gradients():
    tx, _ = updated(("task", "kd"))
    accumulated = dot_optax.wrap(functools.partial(optax.MultiSteps, every_k_schedule=2), tx)
    history = [PerLoss(*gradients(seed=seed)) for seed in range(2)]
    state = accumulated.init(PARAMS)
    for grads in history:
        updates, state = accumulated.update(grads, state, PARAMS)
    mean = jax.tree.map(lambda *g: sum(g) / 2, *history)
    chex.assert_trees_all_close(updates, tx.update(mean, tx.init(PARAMS), PARAMS)[0], **ROUNDING)


def test_the_values_of_the_losses_reach_the_weighting():
    grads, losses = PerLoss(*gradients()), PerLoss(task=jnp.float32(2.0), kd=jnp.float32(0.5))
    tx = optax.chain(aggregate(weightings.min_norm(log=True)), optax.sgd(1.0))
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS, losses=losses)
    expected, _ = weightings.min_norm(log=True).weights(
        jnp.asarray(products(*grads), jnp.float32), jnp.array([2.0, 0.5]), ()
    )
    np.testing.assert_allclose(optax.tree.get(state, "weights")[0], expected, **ROUNDING)
    mapping = {"kd": losses.kd, "task": losses.task}  # by name, not by the order of a dict
    chex.assert_trees_all_equal(tx.update(grads, tx.init(PARAMS), PARAMS, losses=mapping)[1], state)


def test_the_order_of_the_losses_is_that_of_the_names():
    """`priority` has the first one first."""
    grads = PerLoss(*gradients())
    task, kd = (aggregate(weightings.priority(tau=0.5), losses=names) for names in (("task", "kd"), ("kd", "task")))
    first, _ = task.update(grads, task.init(PARAMS), PARAMS)
    swapped, _ = kd.update(grads, kd.init(PARAMS), PARAMS)
    expected, _ = task.update((grads.kd, grads.task), task.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(swapped, expected, **ROUNDING)
    assert np.abs(flat(first) - flat(swapped)).max() > 0.1


def test_without_params():
    tx, _ = updated(2)
    grads = gradients()
    chex.assert_trees_all_equal(tx.update(grads, tx.init(PARAMS))[0], tx.update(grads, tx.init(PARAMS), PARAMS)[0])


def test_the_tpu_takes_no_matrix_product_of_gradients():
    """Its matrix units would round them to bfloat16."""
    tx, update = updated(2)
    text = update.lower(gradients(), tx.init(PARAMS), PARAMS).as_text()
    assert "dot_general" not in text
