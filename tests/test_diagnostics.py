"""`dot_optax.diagnostics`: against NumPy by hand, known moments, and losses whose Hessian is known."""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dot_optax
from dot_optax import PerLoss, diagnostics
from tests.tiers import slow_but

PARAMS = {"body": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "head": {"kernel": jnp.ones(4)}}
GROUPS = {
    "all": [["body/bias", "body/kernel", "head/kernel"]],
    "layer": [["body/bias", "body/kernel"], ["head/kernel"]],
    "leaf": [["body/bias"], ["body/kernel"], ["head/kernel"]],
}
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}  # of float32 sums of some products of order one


def gradients(count=2, params=PARAMS, seed=0):
    return tuple(optax.tree.random_like(key, params) for key in jax.random.split(jax.random.key(seed), count))


def flat(tree, names=GROUPS["all"][0]):
    leaves = [tree[a][b] for a, b in (name.split("/") for name in names)]
    return np.concatenate([np.ravel(leaf) for leaf in leaves]).astype(np.float64)


def by_hand(grads, names):
    """(norms, cosines, shares) of one group."""
    rows = np.stack([flat(grad, names) for grad in grads])
    norms, total = np.linalg.norm(rows, axis=1), rows.sum(0)
    return norms, rows @ rows.T / np.outer(norms, norms), rows @ total / (total @ total)


@functools.cache
def recorded(losses=PerLoss._fields, decay=0.9, groups="all"):
    tx = diagnostics.record(decay, losses=losses, groups=groups)
    return tx, jax.jit(tx.update)


@pytest.mark.parametrize("groups", slow_but(list(GROUPS), "layer"))
def test_norms_cosines_and_shares(groups):
    for grads in (PerLoss(*gradients()), dict(zip(("ce", "hint", "kd"), gradients(3), strict=True))):
        found = jax.jit(functools.partial(diagnostics.compare, groups=groups))(grads)
        rows = list(grads.values()) if isinstance(grads, dict) else grads
        for i, names in enumerate(GROUPS[groups]):
            for value, expected in zip(found, by_hand(rows, names), strict=True):
                np.testing.assert_allclose(value[i], expected, **ROUNDING)
        tx, update = recorded(tuple(grads) if isinstance(grads, dict) else PerLoss._fields, groups=groups)
        passed, state = update(grads, tx.init(PARAMS), PARAMS)
        chex.assert_trees_all_equal(passed, grads)
        for name in found._fields:
            np.testing.assert_allclose(optax.tree.get(state, name), getattr(found, name), **ROUNDING)


@pytest.mark.slow
@hypothesis.settings(max_examples=20)
@hypothesis.given(st.integers(2, 4), st.integers(0, 2**16), st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=4))
def test_properties(losses, seed, scales):
    """Shares add up to 1; cosines are symmetric and know no scale."""
    grads = np.random.default_rng(seed).normal(size=(losses, 5)).astype(np.float32)
    compare = jax.jit(diagnostics.compare)
    found = compare(tuple(grads))
    gram = grads.astype(np.float64) @ grads.T
    # A share is a sum of inner products, rounded, over the square of the sum, which may be much smaller than they are.
    rounding = 10 * np.finfo(np.float32).eps * np.abs(gram).sum() / gram.sum()
    np.testing.assert_allclose(found.shares.sum(1), 1.0, atol=rounding)
    np.testing.assert_allclose(found.cosines, found.cosines.swapaxes(1, 2), atol=2e-7)  # roundings of two products
    scaled = compare(tuple(np.float32(scale) * grad for scale, grad in zip(scales, grads, strict=False)))
    np.testing.assert_allclose(scaled.cosines, found.cosines, atol=1e-5)


def test_gradients_that_are_zero():
    zero = jnp.zeros(2)
    found = jax.jit(diagnostics.compare)((zero, jnp.ones(2)))
    np.testing.assert_allclose(found.cosines[0], [[0.0, 0.0], [0.0, 1.0]], atol=2e-7)
    np.testing.assert_array_equal(found.shares, [[0.0, 1.0]])
    assert np.isnan(jax.jit(diagnostics.compare)((zero, zero)).shares).all()


def test_conflicts_are_the_running_mean_of_whether_an_angle_is_obtuse():
    tx, update = recorded(decay=0.8)
    state, history = tx.init(jnp.zeros(2)), [-1.0, 1.0, -2.0, 3.0, -1.0]
    for x in history:
        _, state = update((jnp.array([1.0, 0.5]), jnp.array([x, 0.1])), state)
    weights = 0.8 ** np.arange(len(history))[::-1]
    expected = weights @ (np.array(history) < 0) / weights.sum()
    np.testing.assert_allclose(state.conflicts[0], [[0.0, expected], [expected, 0.0]], rtol=1e-6)


def test_gradients_that_are_not_finite():
    """They are noticed in the conflict rate too, although NaN is not below 0."""
    tx, update = recorded()
    g = gradients()
    _, state = update((g[0], jax.tree.map(lambda x: x * jnp.nan, g[1])), tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(np.isnan(state.conflicts[0]), [[False, True], [True, True]])
    _, state = update(g, state, PARAMS)
    np.testing.assert_array_equal(np.isnan(state.conflicts[0]), [[False, True], [True, True]])


def test_without_memory_the_last_gradients_count():
    tx, update = recorded(decay=0.0)
    state, found = tx.init(PARAMS), []
    for seed in range(3):
        grads = PerLoss(*gradients(seed=seed))
        grads = grads._replace(kd=optax.tree.scale((-1) ** seed, grads.kd))
        _, state = update(tuple(grads), state, PARAMS)
        chex.assert_trees_all_close(state.means, tuple(grads), **ROUNDING)
        np.testing.assert_array_equal(state.conflicts, state.cosines < 0)
        found.append(float(state.conflicts[0, 0, 1]))
    assert set(found) == {0.0, 1.0}
    assert np.isnan(state.signal_to_noise).all()  # one gradient has no variance


def test_hyperparameters_may_be_numbers_of_numpy():
    with jax.enable_x64(True):
        tx = diagnostics.record(np.float64(0.99), losses=np.int64(2))
        params = {"w": jnp.ones(2, jnp.float32)}
        state = tx.init(params)
        assert jax.tree.structure(state.means) == jax.tree.structure((params, params))
        _, after = tx.update((params, params), state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)


def test_beside_another_state_with_cosines():
    tx = optax.chain(diagnostics.record(), dot_optax.aggregate(dot_optax.weightings.projected()))
    _, state = tx.update(gradients(), tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(
        optax.tree.get(state, "RecordState").cosines, diagnostics.compare(gradients()).cosines, **ROUNDING
    )


def test_signal_to_noise_is_that_of_weighted_moments():
    """After any number of updates, against the definition."""
    decay, params = 0.9, jnp.zeros(3)
    tx, update = recorded(decay=decay)
    history = np.random.default_rng(0).normal(1.0, 1.0, size=(30, 2, 3)).astype(np.float32)
    state = tx.init(params)
    for t, grads in enumerate(history, 1):
        _, state = update(tuple(grads), state)
        w = decay ** np.arange(t)[::-1]
        w /= w.sum()
        seen = history[:t].astype(np.float64)
        mean = np.einsum("t,tnd->nd", w, seen)
        variance = np.einsum("t,tnd->n", w, (seen - mean) ** 2)
        q = (w**2).sum()
        np.testing.assert_allclose(state.memory, (1 - decay**t) / (1 - decay), rtol=1e-5)
        np.testing.assert_allclose(optax.tree.get(state, "means"), mean, **ROUNDING)
        np.testing.assert_allclose(state.variances[0], variance, **ROUNDING)
        if t == 1:
            assert np.isnan(state.signal_to_noise).all()
        else:
            noise = variance / (1 - q)
            signal = np.maximum(0, (mean**2).sum(1) - q * noise)
            np.testing.assert_allclose(state.signal_to_noise[0], signal / noise, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps_and_decay", slow_but([(5, 0.99), (300, 0.9)], (5, 0.99)))
def test_signal_and_noise_are_unbiased(steps_and_decay):
    """Known mean and variance, over 1,000 runs in parallel; without the corrections both would be wrong by far more."""
    steps, decay = steps_and_decay
    mean, std, size, runs = jnp.array([0.5, 0.0]), jnp.array([1.0, 2.0]), 50, 1000

    def run(key):
        noise = jax.random.normal(key, (steps, 2, size))
        grads = mean[None, :, None] + std[None, :, None] * noise
        tx = diagnostics.record(decay)
        state, _ = jax.lax.scan(
            lambda state, g: (tx.update((g[0], g[1]), state)[1], None), tx.init(jnp.zeros(size)), grads
        )
        alpha = 1 / state.memory
        q = (2 * alpha - (1 - decay)) / (1 + decay)
        squared = jnp.stack([jnp.sum(m**2) for m in state.means])
        noise = state.variances[0] / (1 - q)
        return squared - q * noise, noise, squared, state.variances[0], state.signal_to_noise[0]

    signal, noise, raw_signal, raw_noise, ratio = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), runs))

    def assert_near(samples, expected):
        """Within four standard errors of the mean over the runs, seeds being fixed."""
        errors = np.std(samples, 0) / runs**0.5
        assert (np.abs(np.mean(samples, 0) - expected) < 4 * errors).all()

    assert_near(signal, size * mean**2)
    assert_near(noise, size * std**2)
    # The state has what was taken apart here, but for a signal that is not below 0.
    np.testing.assert_allclose(ratio, np.maximum(0, signal / noise), rtol=1e-3, atol=1e-4)
    if steps > 100:  # the standard error of the docstring, known to some 2% from 1,000 runs
        rho, q = mean[0] ** 2 / std[0] ** 2, (1 - decay) / (1 + decay)
        error = np.sqrt((2 * q**2 + 4 * rho * q + 2 * rho**2 * q) / size)
        np.testing.assert_allclose(np.std(ratio[:, 0]), error, rtol=0.15)
    with pytest.raises(AssertionError):
        assert_near(raw_signal, size * mean**2)
    with pytest.raises(AssertionError):
        assert_near(raw_noise, size * std**2)


def test_recording_leaves_training_as_it_is():
    """Bit for bit, in front of the momenta and behind them."""
    momenta = dot_optax.per_loss(optax.trace(0.8), optax.trace(0.9))
    rest = (dot_optax.sum_losses(), optax.scale_by_learning_rate(0.1))
    record = diagnostics.record(groups="layer")
    results = []
    for steps in ((momenta, *rest), (record, momenta, *rest), (momenta, record, *rest)):
        tx = optax.chain(*steps)

        @jax.jit
        def train(params, tx=tx):
            def step(carry, seed):
                params, state = carry
                grads = PerLoss(*gradients(seed=seed))
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(5))[0][0]

        results.append(train(PARAMS))
    chex.assert_trees_all_equal(*results)


def test_behind_the_momenta_shares_are_of_the_update():
    tx = optax.chain(
        dot_optax.per_loss(optax.trace(0.5), optax.trace(0.9)), diagnostics.record(), dot_optax.sum_losses()
    )
    dot, update = dot_optax.scale_by_dot(0.5, 0.9), jax.jit(tx.update)
    state, of_dot = tx.init(PARAMS), dot.init(PARAMS)
    for seed in range(3):
        grads = PerLoss(*gradients(seed=seed))
        updates, state = update(grads, state, PARAMS)
        _, of_dot = dot.update(grads, of_dot, PARAMS)
    momenta = [optax.tree.get(of_dot, name).trace for name in ("task", "kd")]
    total = flat(updates)
    np.testing.assert_allclose(
        optax.tree.get(state, "shares")[0], [flat(v) @ total / (total @ total) for v in momenta], **ROUNDING
    )


@pytest.mark.slow
def test_dtypes_and_complex_numbers():
    for dtype in (jnp.bfloat16, jnp.complex64):
        params = jnp.ones(3, dtype)
        grads = gradients(2, params)
        tx, update = recorded()
        passed, state = update(grads, tx.init(params), params)
        assert jax.tree.map(jnp.result_type, state) == jax.tree.map(jnp.result_type, tx.init(params))
        assert state.norms.dtype == jnp.float32
        chex.assert_trees_all_equal(passed, grads)
        norms = [np.linalg.norm(np.asarray(g, np.complex128)) for g in grads]
        np.testing.assert_allclose(state.norms[0], norms, **ROUNDING)
    with jax.enable_x64(True):
        params = {"single": jnp.ones(2, jnp.float32), "double": jnp.ones(3, jnp.float64)}
        tx, update = recorded()
        state = tx.init(params)
        after = update(gradients(2, params), state, params)[1]
        assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
        assert after.norms.dtype == jnp.float64


def test_the_names_of_the_losses_lead_to_the_momenta_behind_it():
    tx = optax.chain(diagnostics.record(), dot_optax.dot(0.1))
    params = {"w": jnp.ones(2)}
    _, state = tx.update((params, optax.tree.scale(3.0, params)), tx.init(params), params)
    np.testing.assert_array_equal(optax.tree.get(state, "kd").trace["w"], 3.0)
    np.testing.assert_array_equal(optax.tree.get(state, "conflicts"), 0.0)  # of gradients in the same direction


@pytest.mark.slow
def test_sharded_parameters_keep_their_shardings():
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    params = {"rows": jnp.ones((8, 4)), "columns": jnp.ones((2, 8)), "copied": jnp.ones(3)}
    shardings = {k: NamedSharding(mesh, s) for k, s in {"rows": P("x"), "columns": P(None, "x"), "copied": P()}.items()}
    grads = PerLoss(*gradients(2, params))
    tx, update = recorded(groups="leaf")
    _, expected = update(grads, tx.init(params), params)
    placed = jax.device_put((grads, params), (PerLoss(shardings, shardings), shardings))
    state = tx.init(placed[1])
    chex.assert_trees_all_equal(
        *(jax.tree.map(lambda x: x.sharding.spec, tree) for tree in (state.means[1], placed[1]))
    )
    compiled = jax.jit(tx.update).lower(placed[0], state, placed[1]).compile()
    _, found = jax.block_until_ready(compiled(placed[0], state, placed[1]))
    chex.assert_trees_all_close(found, expected, **ROUNDING)
    assert "all-gather" not in compiled.as_text()  # the sums travel, the gradients stay


def test_optax_finds_its_way_through_the_state():
    tx, _ = recorded()
    state = tx.init(PARAMS)
    chex.assert_trees_all_equal(
        optax.tree.map_params(tx, lambda p: p + 1, state),
        state._replace(means=jax.tree.map(lambda m: m + 1, state.means)),
    )
    shapes = jax.eval_shape(tx.init, PARAMS)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(lambda x: x.shape, shapes)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)  # so that a train step can be given the memory of all


@pytest.mark.parametrize("empty", [{}, {"w": None}])
def test_without_parameters(empty):
    tx, update = recorded()
    updates, state = update((empty, empty), tx.init(empty), empty)
    assert updates == (empty, empty) and state.norms.shape == (0, 2)


def test_effective_learning_rates_follow_schedules():
    momentum = optax.linear_schedule(0.0, 0.9, 10)
    steps = jnp.array([0, 5, 10, 50])
    rates = diagnostics.effective_learning_rate(
        optax.piecewise_constant_schedule(0.1, {20: 0.1}), {"ce": 0.5, "kd": momentum}, steps
    )
    np.testing.assert_allclose(rates["ce"], [0.2, 0.2, 0.2, 0.02], rtol=1e-6)
    np.testing.assert_allclose(rates["kd"], [0.1, 0.1 / 0.55, 1.0, 0.1], rtol=1e-5)
    assert diagnostics.effective_learning_rate(0.1, (0.5, 0.75)) == PerLoss(task=0.2, kd=0.4)


def test_gains_over_time_are_what_the_optimizer_does():
    momenta = dot_optax.betas(0.8, optax.linear_schedule(0.0, 0.1, 10))
    gains = diagnostics.gains_over_time(momenta, 30)
    tx = dot_optax.scale_by_dot(*momenta)
    w = jnp.zeros(())
    for name in ("task", "kd"):
        grads = PerLoss(0.0, 0.0)._replace(**{name: 1.0})
        grads = jax.tree.map(jnp.asarray, grads)
        _, updates = jax.lax.scan(lambda state, _, g=grads: tx.update(g, state, w)[::-1], tx.init(w), None, length=30)
        np.testing.assert_allclose(getattr(gains, name), updates, rtol=1e-5)


def test_lengths_of_updates_and_of_weights():
    updates, params = gradients()
    ratios = jax.jit(functools.partial(diagnostics.update_to_weight, groups="layer"))(updates, params)
    for ratio, names in zip(ratios, GROUPS["layer"], strict=True):
        np.testing.assert_allclose(
            ratio, np.linalg.norm(flat(updates, names)) / np.linalg.norm(flat(params, names)), rtol=1e-5
        )
    assert diagnostics.update_to_weight(jnp.ones(2), jnp.zeros(2)) == np.inf
    rates = diagnostics.scale_invariant_rate(0.1, params)
    expected = [0.1 / np.sum(flat(params, names) ** 2) for names in GROUPS["leaf"]]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_a_scale_invariant_weight_turns_at_the_scale_invariant_rate():
    """A step at length 3 turns the weight as one with the rate that is found there turns it at length 1."""
    target = jnp.array([0.6, 0.8])

    def loss(w):
        return jnp.sum((w / jnp.linalg.norm(w) - target) ** 2)

    def direction(w, rate):
        new = w - rate * jax.grad(loss)(w)
        return new / jnp.linalg.norm(new)

    w = jnp.array([1.0, 0.0])
    (rate,) = diagnostics.scale_invariant_rate(0.5, 3 * w)
    np.testing.assert_allclose(direction(3 * w, 0.5), direction(w, rate), rtol=1e-6)


def test_filters_have_the_lengths_of_those_of_the_network():
    params = {
        "conv": jax.random.normal(jax.random.key(0), (3, 3, 2, 4)),
        "dense": jnp.arange(6.0).reshape(3, 2).astype(jnp.bfloat16),
        "scale": jnp.ones(4),
        "temperature": jnp.ones(()),
    }
    direction = jax.jit(diagnostics.filter_normalized)(jax.random.key(1), params)
    for name, axes in (("conv", (0, 1, 2)), ("dense", 0)):
        lengths = [np.sqrt(np.sum(np.asarray(tree[name], np.float64) ** 2, axes)) for tree in (direction, params)]
        np.testing.assert_allclose(*lengths, rtol=1e-5)
    assert not direction["scale"].any() and not direction["temperature"].any()
    assert direction["dense"].dtype == jnp.float32


def test_landscape():
    params, directions = jnp.array([1.0, 2.0]), [jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])]
    traced = []

    def losses(w):
        traced.append(w)
        return PerLoss(task=w[0] * w[1] ** 2, kd=w[0])

    x = np.linspace(-1.0, 1.0, 3)
    line = diagnostics.landscape(losses, params, directions[:1], list(x))
    np.testing.assert_allclose(line.task, 4 * (1 + x))
    plane = diagnostics.landscape(losses, params, directions, x)
    np.testing.assert_allclose(plane.task, np.outer(1 + x, (2 + x) ** 2))
    np.testing.assert_allclose(plane.kd, np.outer(1 + x, np.ones(3)))
    assert len(traced) == 2  # once for each, not for each point
    small = diagnostics.landscape(lambda w: w.sum(), params.astype(jnp.bfloat16), directions[:1], x)
    assert small.dtype == jnp.bfloat16


def test_a_landscape_of_16_bits_under_strict_promotion():
    params = {"kernel": jnp.full((2, 2), 3.0, jnp.bfloat16)}
    direction = diagnostics.filter_normalized(jax.random.key(0), params)
    with jax.numpy_dtype_promotion("strict"):
        for way in (direction, optax.tree.cast(direction, jnp.bfloat16)):
            found = diagnostics.landscape(lambda p: p["kernel"].astype(jnp.float32), params, [way], [-1.0, 0.0, 1.0])
            expected = 3 + np.array([-1.0, 0.0, 1.0])[:, None, None] * np.asarray(way["kernel"], np.float32)
            np.testing.assert_allclose(found, expected, rtol=2**-8)  # rounded once, to 8 bits


@pytest.mark.slow
def test_with_statistics_of_the_batch_the_length_of_filters_does_not_matter():
    """With running ones it does: they belong to other weights."""
    network = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.BatchNorm(8, epsilon=0.0, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (64, 4))
    network(x)
    graphdef, params, rest = nnx.split(network, nnx.Param, ...)

    def loss(params, train):
        model = nnx.merge(graphdef, params, rest, copy=True)
        model.train() if train else model.eval()
        return jnp.mean((model(x)[:, :4] - x) ** 2)

    longer = jax.tree.map(lambda p: p if p.ndim == 2 else jnp.zeros_like(p), params)  # the kernel alone
    along = functools.partial(diagnostics.landscape, params=params, directions=[longer], distances=jnp.arange(3.0))
    flat_line, line = along(functools.partial(loss, train=True)), along(functools.partial(loss, train=False))
    np.testing.assert_allclose(flat_line, flat_line[0], rtol=1e-5)
    assert line[2] > 1.5 * line[0]


SYMMETRIC = np.random.default_rng(0).normal(size=(6, 6))
SYMMETRIC = jnp.asarray(SYMMETRIC + SYMMETRIC.T, jnp.float32)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_sharpness_of_a_quadratic_loss(sign):
    """The largest eigenvalue, also where one below 0 has the larger magnitude: of one of the signs it has."""
    hessian = sign * SYMMETRIC

    def loss(params):
        w = jnp.concatenate([params["a"], params["b"]])
        return 0.5 * jnp.sum(w[:, None] * hessian * w[None, :])

    params = {"a": jnp.ones(2), "b": jnp.zeros(4)}
    found = jax.jit(functools.partial(diagnostics.sharpness, loss, num_iters=500))(params, jax.random.key(0))
    # The square of the residual, relative to the gap between the eigenvalues, is the error of the largest.
    np.testing.assert_allclose(found, np.linalg.eigvalsh(hessian)[-1], rtol=1e-4)


NEARLY_OPPOSITE = [(6.0, -6.0), (6.0, -5.9), (10.0, -9.8, 1.0, 0.0), (5.9, -6.0)]


@jax.jit
def sharpness_of_diagonal(eigenvalues, num_iters):  # traced, so that one compilation does for all
    """What is found with each of 20 keys."""

    def loss(w):
        return 0.5 * jnp.sum(eigenvalues * w**2)

    def found(key):
        return diagnostics.sharpness(loss, jnp.ones_like(eigenvalues), key, num_iters=num_iters)

    return jax.vmap(found)(jax.random.split(jax.random.key(0), 20))


@pytest.mark.parametrize("eigenvalues", slow_but(NEARLY_OPPOSITE, NEARLY_OPPOSITE[2]))
def test_sharpness_where_eigenvalues_have_nearly_opposite_signs(eigenvalues):
    found = sharpness_of_diagonal(jnp.array(eigenvalues), 100)  # the default of `sharpness`
    # A residual of 1e-4 of an eigenvalue of up to 2.1 x 10 + 1: its square over the gap, and some roundings.
    np.testing.assert_allclose(found, eigenvalues[0], rtol=1e-5)


def test_sharpness_is_unknown_after_too_few_iterations_and_without_curvature():
    assert np.isnan(sharpness_of_diagonal(jnp.array([10.0, -9.8, 1.0, 0.0]), 1)).all()
    assert np.isnan(sharpness_of_diagonal(jnp.zeros(4), 100)).all()


@pytest.mark.slow
def test_trace_of_a_quadratic_loss():
    def loss(w):
        return 0.5 * jnp.sum(w[:, None] * SYMMETRIC * w[None, :])

    trace = jax.jit(functools.partial(diagnostics.hessian_trace, loss, num_samples=400))
    found, standard_error = trace(jnp.ones(6), jax.random.key(0))
    beside = np.asarray(SYMMETRIC - jnp.diag(jnp.diag(SYMMETRIC)))
    # The standard deviation of a sample, known to some 5% from 400 of them.
    np.testing.assert_allclose(standard_error, np.sqrt(2 * np.sum(beside**2) / 400), rtol=0.15)
    assert abs(found - jnp.trace(SYMMETRIC)) < 3 * standard_error
    found, standard_error = diagnostics.hessian_trace(
        lambda w: jnp.sum(jnp.arange(4.0) * w**2), jnp.ones(4, jnp.bfloat16), jax.random.key(0), num_samples=2
    )
    assert (found, standard_error) == (12.0, 0.0)  # a diagonal Hessian: exact


def test_under_vmap_over_seeds():
    def measured(key):
        w = jax.random.normal(key, (3,))
        return diagnostics.sharpness(lambda w: jnp.sum(w**4), w, key)

    keys = jax.random.split(jax.random.key(0), 3)
    found = jax.jit(jax.vmap(measured))(keys)
    expected = [12 * jnp.max(jax.random.normal(key, (3,)) ** 2) for key in keys]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_errors():
    for function in (diagnostics.compare, functools.partial(diagnostics.scale_invariant_rate, 0.1)):
        with pytest.raises(ValueError, match="groups must be 'all', 'layer', 'leaf' or a function, got 'filter'"):
            function((jnp.ones(2), jnp.ones(2)), groups="filter")
    with pytest.raises(TypeError, match="grads: expected a container with one entry per loss"):
        diagnostics.compare(jnp.ones(2))
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        diagnostics.record(1)
    with pytest.raises(ValueError, match=r"beta_kd must be in \[0, 1\), got 1.5"):
        diagnostics.effective_learning_rate(0.1, (0.5, 1.5))
    for steps in (-1, 2.5, True):
        with pytest.raises(ValueError, match=f"steps must be a whole number of 0 or more, got {steps}"):
            diagnostics.gains_over_time((0.5, 0.9), steps)
    with pytest.raises(ValueError, match=r"num_iters must be in \[1, inf\), got 0"):
        diagnostics.sharpness(jnp.sum, jnp.ones(2), jax.random.key(0), num_iters=0)
    for losses in (None, 2.0, "task", 0, True, ("kd", "kd"), {"ce", "hint", "kd"}, [["a"], ["b"]]):
        with pytest.raises(
            ValueError, match="record: `losses` must be a tuple of distinct names, or their number; got "
        ):
            diagnostics.record(losses=losses)
    for distances in (1.0, np.ones((2, 2)), None, "abc", [1j, 2.0]):
        with pytest.raises(ValueError, match=r"distances must be an array \[n\] or a list of numbers, got "):
            diagnostics.landscape(jnp.sum, jnp.ones(2), [jnp.ones(2)], distances)
    with pytest.raises(TypeError, match="learning_rate must be a number or a scalar array, got <function"):
        diagnostics.scale_invariant_rate(optax.constant_schedule(0.1), jnp.ones(2))
    with pytest.raises(TypeError, match="learning_rate must be a number or a scalar array, got None"):
        diagnostics.effective_learning_rate(None, (0.5, 0.9))


def test_errors_about_trees_say_where():
    one, two = {"w": jnp.ones(1)}, {"w": jnp.ones(2)}
    for grads, name in ((PerLoss(one, two), r"grads\.kd\['w'\]"), ({"ce": one, "kd": two}, r"grads\['kd'\]\['w'\]")):
        with pytest.raises(ValueError, match=f"^{name}: expected what the first loss has there, .*; got an array"):
            diagnostics.compare(grads)
    whole, other = {"w": jnp.arange(2)}, {"w": jnp.arange(2)}
    with pytest.raises(TypeError, match=r"^grads\[0\]\['w'\] must be floating point or complex, got an array"):
        diagnostics.compare((whole, whole))
    for function in (
        functools.partial(diagnostics.scale_invariant_rate, 0.1),
        functools.partial(diagnostics.filter_normalized, jax.random.key(0)),
    ):
        with pytest.raises(TypeError, match=r"^params\['w'\] must be floating point or complex, got an array"):
            function(whole)
    with pytest.raises(TypeError, match=r"^params\['w'\] must be floating point or complex, got an array"):
        diagnostics.update_to_weight(other, whole)
    with pytest.raises(TypeError, match=r"^params\['w'\] must be floating point or complex, got an array"):
        diagnostics.landscape(optax.tree.norm, whole, [other], [0.0])
    for updates in (one, {"v": jnp.ones(2)}):
        for tree in (PARAMS, None):
            tx = diagnostics.record()
            with pytest.raises(ValueError, match=r"^updates\[0\]\['.'\]: expected what params has there"):
                tx.update((updates, updates), tx.init(two), tree)
        with pytest.raises(ValueError, match=r"^updates\['.'\]: expected what params has there"):
            diagnostics.update_to_weight(updates, two)
        with pytest.raises(ValueError, match=r"^directions\[1\]\['.'\]: expected what params has there"):
            diagnostics.landscape(optax.tree.norm, two, [two, updates], [0.0, 1.0])
    for directions in ([], two):
        with pytest.raises(TypeError, match="directions must be a list of one tree like params or of more, got"):
            diagnostics.landscape(optax.tree.norm, two, directions, [0.0, 1.0])


@pytest.mark.parametrize("function", [diagnostics.sharpness, diagnostics.hessian_trace])
def test_errors_about_losses_without_a_hessian(function):
    for loss_fn in (lambda w: PerLoss(w.sum(), w.sum()), lambda w: w, lambda w: 2, lambda w: w.sum() * 1j):
        with pytest.raises(
            TypeError, match=f"^{function.__name__}: loss_fn must return one real number, a loss or the"
        ):
            function(loss_fn, jnp.ones(2), jax.random.key(0))


@pytest.mark.parametrize("function", [diagnostics.sharpness, diagnostics.hessian_trace])
def test_errors_about_parameters_without_a_hessian(function):
    for params in ({}, {"w": jnp.ones(2, jnp.complex64)}):
        with pytest.raises(TypeError, match=f"{function.__name__}: params must have real numbers and no complex ones"):
            function(optax.tree.norm, params, jax.random.key(0))
    with pytest.raises(TypeError, match=f"{function.__name__}: params\\['w'\\] must be floating point or complex"):
        function(optax.tree.norm, {"w": jnp.arange(2)}, jax.random.key(0))


def test_one_sample_has_no_standard_error():
    with pytest.raises(ValueError, match="num_samples must be a whole number of 2 or more, got 1"):
        diagnostics.hessian_trace(jnp.sum, jnp.ones(2), jax.random.key(0), num_samples=1)
