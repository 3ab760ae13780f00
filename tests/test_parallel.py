"""Momenta that stay on their devices: the same parameters as with averaged gradients, for the traffic of one gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import dot_optax
from tests.tiers import slow_but

DEVICES = 4
MESH = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), ("data",))
STEPS = 50


def _params():
    rng = np.random.default_rng(0)
    return {"w": rng.normal(size=(5, 16)).astype(np.float32), "v": 0.1 * rng.normal(size=(16, 3)).astype(np.float32)}


def _batch(step):
    rng = np.random.default_rng(step)
    return tuple(rng.normal(size=(4 * DEVICES, width)).astype(np.float32) for width in (5, 3, 3))


def _loss_fn(params, x, labels, teacher):
    outputs = jnp.tanh(x @ params["w"]) @ params["v"]
    return dot_optax.PerLoss(task=jnp.mean((outputs - labels) ** 2), kd=jnp.mean((outputs - teacher) ** 2))


OPTIMIZERS = {
    "dot": functools.partial(dot_optax.dot, 0.02),
    "dot, L2, Nesterov": functools.partial(dot_optax.dot, 0.02, weight_decay=1e-3, nesterov=True),
    "dot, schedule": lambda: dot_optax.dot(optax.linear_schedule(0.05, 0.0, STEPS)),
    "gain-matched": functools.partial(dot_optax.gain_matched_sgd, 0.02),
}


def _on_one_device(optimizer):
    @jax.jit
    def step(params, state, *batch):
        _, grads = dot_optax.value_and_grads(_loss_fn)(params, *batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def _in_shard_map(optimizer, average_grads=lambda grads: grads, **options):
    """Each device has parameters like the others' and a state of its own, stacked along a new first axis."""

    def body(params, state, *batch):
        state = jax.tree.map(lambda leaf: leaf[0], state)
        mine = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "data", to="varying"), params)
        _, grads = dot_optax.value_and_grads(_loss_fn)(mine, *batch)
        updates, state = optimizer.update(average_grads(grads), state, mine)
        return optax.apply_updates(params, updates), jax.tree.map(lambda leaf: leaf[None], state)

    sharded = P("data")
    return jax.jit(
        jax.shard_map(body, mesh=MESH, in_specs=(P(), sharded, *3 * [sharded]), out_specs=(P(), sharded), **options)
    )


def _stacked(state):
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (DEVICES, *jnp.shape(leaf))), state)


@functools.cache
def _trained_on_one_device(name):
    optimizer = OPTIMIZERS[name]()
    step, params, state = _on_one_device(optimizer), _params(), optimizer.init(_params())
    for i in range(STEPS):
        params, state = jax.block_until_ready(step(params, state, *_batch(i)))
    return params, state


def _assert_same(actual, expected):
    """Up to sums in another order: about 100 roundings of numbers around 1, which mostly cancel."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), actual, expected)


@pytest.mark.parametrize("name", slow_but(OPTIMIZERS, "dot, L2, Nesterov"))
def test_shard_map_ends_where_one_device_ends(name):
    optimizer = optax.chain(OPTIMIZERS[name](), dot_optax.average_over("data"))
    step, params, state = _in_shard_map(optimizer), _params(), _stacked(optimizer.init(_params()))
    for i in range(STEPS):
        params, state = jax.block_until_ready(step(params, state, *_batch(i)))
    expected, expected_state = _trained_on_one_device(name)
    _assert_same(params, expected)
    moved = max(np.abs(expected[key] - value).max() for key, value in _params().items())
    assert moved > 0.1  # else there would be nothing to compare
    means = jax.tree.map(lambda leaf: leaf.mean(axis=0), state[0])
    _assert_same(means, expected_state)


def test_the_momenta_stay_on_their_devices():
    optimizer = optax.chain(dot_optax.dot(0.02), dot_optax.average_over("data"))
    step = _in_shard_map(optimizer)
    _, state = jax.block_until_ready(step(_params(), _stacked(optimizer.init(_params())), *_batch(0)))
    momentum = np.asarray(jax.tree.leaves(state)[0])
    assert momentum.shape[0] == DEVICES
    assert len(np.unique(momentum.reshape(DEVICES, -1), axis=0)) == DEVICES


def test_pmap_ends_where_one_device_ends():
    optimizer = optax.chain(dot_optax.dot(0.02), dot_optax.average_over("data"))

    def body(params, state, *batch):
        _, grads = dot_optax.value_and_grads(_loss_fn)(params, *batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.pmap(body, axis_name="data", in_axes=(None, 0, 0, 0, 0), out_axes=(None, 0), devices=jax.devices()[:4])
    params, state = _params(), _stacked(optimizer.init(_params()))
    for i in range(STEPS):
        batch = [array.reshape(DEVICES, 4, -1) for array in _batch(i)]
        params, state = jax.block_until_ready(step(params, state, *batch))
    _assert_same(params, _trained_on_one_device("dot")[0])


def _all_reduced_bytes(step, optimizer):
    """The bytes that the all-reduces of a compiled step return, read off their shapes."""
    compiled = step.lower(_params(), _stacked(optimizer.init(_params())), *_batch(0)).compile().as_text()
    reduces = re.findall(r"= (.*?) all-reduce(?:-start)?\(", compiled)
    return sum(
        4 * np.prod([int(n) for n in dims.split(",")]) for s in reduces for dims in re.findall(r"f32\[([\d,]+)\]", s)
    )


def test_it_moves_the_bytes_of_one_gradient():
    def averaged(grads):
        return jax.lax.pmean(grads, "data")

    one_tree = sum(leaf.nbytes for leaf in _params().values())
    local = optax.chain(dot_optax.dot(0.02), dot_optax.average_over("data"))
    assert _all_reduced_bytes(_in_shard_map(local), local) == one_tree
    plain = optax.chain(dot_optax.sum_losses(), optax.sgd(0.02, 0.9), dot_optax.average_over("data"))
    assert _all_reduced_bytes(_in_shard_map(plain), plain) == one_tree
    naive = dot_optax.dot(0.02)
    assert _all_reduced_bytes(_in_shard_map(naive, averaged, check_vma=False), naive) == 2 * one_tree


def test_where_there_is_no_such_axis():
    optimizer = optax.chain(dot_optax.dot(0.02), dot_optax.average_over("data"))
    params = _params()
    with pytest.raises(NameError, match="unbound axis name: data"):
        optimizer.update((params, params), optimizer.init(params), params)


@pytest.mark.parametrize("check_vma", [True, False])
def test_parameters_that_were_not_made_to_vary(check_vma):
    """With checks JAX adds up the gradients of all devices by itself: four times the mean, which is refused."""
    optimizer = optax.chain(dot_optax.dot(0.02), dot_optax.average_over("data"))

    def body(params, *batch):
        _, grads = dot_optax.value_and_grads(_loss_fn)(params, *batch)
        return optimizer.update(grads, optimizer.init(params), params)[0]

    step = jax.jit(jax.shard_map(body, mesh=MESH, in_specs=(P(), *3 * [P("data")]), out_specs=P(), check_vma=check_vma))
    if check_vma:
        with pytest.raises(
            ValueError, match=r"the update\['\w'\] is the same on all devices: .* jax.lax.pcast\(params"
        ):
            step(_params(), *_batch(0))
    else:
        updates = jax.block_until_ready(step(_params(), *_batch(0)))
        _, grads = dot_optax.value_and_grads(_loss_fn)(_params(), *_batch(0))
        _assert_same(updates, dot_optax.dot(0.02).update(grads, dot_optax.dot(0.02).init(_params()), _params())[0])


def test_a_parameter_that_no_loss_reaches_may_be_averaged():
    """Its gradient is a zero that JAX made up."""
    optimizer = optax.chain(dot_optax.dot(0.02), dot_optax.average_over("data"))
    params = _params() | {"unused": np.ones(2, np.float32)}

    def body(params, *batch):
        mine = jax.lax.pcast(params, "data", to="varying")
        _, grads = dot_optax.value_and_grads(_loss_fn)(mine, *batch)
        return optimizer.update(grads, optimizer.init(mine), mine)[0]

    step = jax.jit(jax.shard_map(body, mesh=MESH, in_specs=(P(), *3 * [P("data")]), out_specs=P()))
    assert not jax.block_until_ready(step(params, *_batch(0)))["unused"].any()


def test_pmap_must_not_call_differing_momenta_replicated():
    """With `out_axes=None` they look so, but through the host all devices get the first one's: another training."""
    optimizer = optax.chain(dot_optax.dot(0.02), dot_optax.average_over("data"))

    def body(params, state, *batch):
        _, grads = dot_optax.value_and_grads(_loss_fn)(params, *batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def trained(state_axis, state):
        axes = (None, state_axis)
        step = jax.pmap(body, "data", in_axes=(*axes, 0, 0, 0), out_axes=axes, devices=jax.devices()[:DEVICES])
        params = _params()
        for i in range(STEPS):
            batch = [array.reshape(DEVICES, 4, -1) for array in _batch(i)]
            params, state = jax.block_until_ready(step(params, state, *batch))
            if i == STEPS // 2:  # a checkpoint
                params, state = jax.device_get((params, state))
        return params

    right, wrong = trained(0, _stacked(optimizer.init(_params()))), trained(None, optimizer.init(_params()))
    expected, _ = _trained_on_one_device("dot")
    _assert_same(right, expected)
    error = max(np.abs(expected[key] - value).max() for key, value in wrong.items())
    print(f"error with out_axes=None: {error:.3f}")
    assert error > 0.01
