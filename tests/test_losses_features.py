"""The losses of features against their formulas, and at their edges; `test_losses_torch.py` has the published code's."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dot_optax
from dot_optax import losses
from tests.reference.feature_losses import (
    BATCH,
    DIM,
    OF_MAPS,
    WITHOUT_SCALE,
    K,
    N,
    Run,
    crd_in_numpy,
    in_numpy,
    maps,
    trajectory,
    unit,
    value_and_grads,
)
from tests.tiers import slow_but


@pytest.mark.parametrize("name", OF_MAPS)
def test_the_formula_in_float64(name):
    with jax.enable_x64(True):
        student, teacher = maps(channels=(3, 3) if name == "feature_loss" else (3, 7))
        # Sums of 100 terms of order one, whose float64 roundings are 1e-16.
        np.testing.assert_allclose(
            OF_MAPS[name](student, teacher), in_numpy(name, student, teacher), rtol=1e-13, atol=0
        )


@pytest.mark.parametrize("name", OF_MAPS)
def test_float32_is_exact_to_a_few_roundings(name):
    student, teacher = maps(2, dtype=np.float32)
    # 6e-8 a rounding, in sums of 60 to 100 terms, and in differences of unit vectors that are about as large as these.
    np.testing.assert_allclose(OF_MAPS[name](student, teacher), in_numpy(name, student, teacher), rtol=3e-6)


@pytest.mark.parametrize("dtype", slow_but([jnp.bfloat16, jnp.float16], jnp.bfloat16))
@pytest.mark.parametrize("name", OF_MAPS)
def test_16_bits_lose_nothing_inside(name, dtype):
    student, teacher = (jnp.asarray(x, dtype) for x in maps(3))
    expected = in_numpy(name, np.asarray(student, np.float32), np.asarray(teacher, np.float32))
    value = OF_MAPS[name](student, teacher)
    assert value.dtype == dtype
    # One rounding of the result: half of the distance of two numbers, relative to the smaller.
    np.testing.assert_allclose(np.asarray(value, np.float32), expected, rtol=float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", OF_MAPS)
def test_is_finite_for_extreme_features(name, dtype):
    student, teacher = (jnp.asarray(np.where(x < 0.5, 1e4 * np.sign(x), x), dtype) for x in maps(4))
    teacher = teacher.at[0].set(0.0).at[1].set(student[1])
    values, grads = value_and_grads(OF_MAPS[name], student, teacher)
    assert values.dtype == dtype and jnp.isfinite(values).all() and (values >= 0).all()
    for grad in grads:
        assert grad.dtype == dtype and jnp.isfinite(grad).all() and grad.any()


@pytest.mark.parametrize("scale", slow_but([1e-30, 1e-10, 1e10, 1e30], 1e-30, 1e30))
@pytest.mark.parametrize("name", WITHOUT_SCALE)
def test_the_scale_of_the_features_does_not_matter(name, scale):
    """Their fourth powers, which the formulas have, would be 0 or infinite in float32."""
    student, teacher = maps(5, dtype=np.float32)
    values, (grad, _) = value_and_grads(OF_MAPS[name], student, teacher)
    scaled, (scaled_grad, _) = value_and_grads(OF_MAPS[name], np.float32(scale) * student, teacher)
    # The product is rounded: 6e-8 of each feature. The gradient is 1 / scale as large.
    np.testing.assert_allclose(scaled, values, rtol=3e-6)
    largest = np.abs(grad).max()
    np.testing.assert_allclose(scaled_grad * np.float32(scale), grad, rtol=0, atol=3e-6 * largest)


@pytest.mark.parametrize("name", OF_MAPS)
def test_features_that_are_the_same_have_no_loss_and_no_gradient(name):
    student, _ = maps(6, dtype=np.float32)
    with jax.debug_nans(True):
        values, grads = value_and_grads(OF_MAPS[name], student, student)
    # A compiler may take the two sums in different orders: entries of unit vectors that differ by 6e-8, and the squares.
    np.testing.assert_allclose(values, 0.0, atol=6e-8**2)
    for grad in grads:
        np.testing.assert_allclose(grad, 0.0, atol=6e-8)


@pytest.mark.parametrize("name", WITHOUT_SCALE)
def test_features_that_are_zero_have_no_gradient(name):
    """Neither where one example is zero nor where all are; the others have theirs."""
    student, teacher = maps(7, dtype=np.float32)
    student[2] = 0.0
    with jax.debug_nans(True):  # not even in between
        values, (grad, _) = value_and_grads(OF_MAPS[name], student, teacher)
        zeros, (zero_grad, _) = value_and_grads(OF_MAPS[name], 0.0 * student, teacher)
    assert jnp.isfinite(values).all() and jnp.isfinite(grad).all() and grad[0].any()
    assert name == "similarity_loss" or not grad[2].any()  # of the batch, the other rows know the example
    assert not zero_grad.any()
    unit = 1 / 20 if name == "attention_transfer_loss" else 1 / 6  # the teacher's unit vectors remain
    np.testing.assert_allclose(zeros, unit, rtol=1e-6)


def test_examples_that_are_like_no_other():
    """Rows with one entry other than zero, the largest and all of the norm: a maximum with 1 would halve a gradient."""
    student, teacher, step = np.eye(3), np.array([[1.0, 1.0], [1.0, 0.0], [2.0, 1.0]]), 1e-5
    moves = step * np.eye(9).reshape(9, 3, 3)
    expected = [
        (
            in_numpy("similarity_loss", student + move, teacher) - in_numpy("similarity_loss", student - move, teacher)
        ).mean()
        for move in moves
    ]
    _, (grad, _) = value_and_grads(losses.similarity_loss, jnp.eye(3), jnp.asarray(teacher, jnp.float32))
    # Central differences: 1e-10, the square of the step, and float32's 1e-7.
    np.testing.assert_allclose(grad.ravel(), np.array(expected) / (2 * step), rtol=0, atol=1e-6)


def test_the_axes_of_the_features():
    student, teacher = maps(8, dtype=np.float32)
    each = losses.feature_loss(student, teacher)
    assert each.shape == (6, 4, 5)
    np.testing.assert_allclose(each.mean((1, 2)), losses.feature_loss(student, teacher, axis=(1, 2, 3)), rtol=1e-6)
    first = losses.feature_loss(np.moveaxis(student, -1, 1), np.moveaxis(teacher, -1, 1), axis=1)
    np.testing.assert_allclose(first, each, rtol=1e-6)
    stacked = np.stack([student, teacher]), np.stack([teacher, teacher])
    attention = losses.attention_transfer_loss(*stacked)
    assert attention.shape == (2, 6)
    np.testing.assert_allclose(attention[0], losses.attention_transfer_loss(student, teacher), rtol=1e-6)
    np.testing.assert_array_equal(attention[1], 0.0)


@pytest.mark.parametrize("padding", slow_but([3e38, np.inf, np.nan], np.nan))
def test_padding_has_no_influence(padding):
    """Tokens of `feature_loss` and examples of `similarity_loss`, on value or gradient."""
    student, teacher = (x.reshape(6, 20, 3) for x in maps(9, dtype=np.float32))
    tokens = np.arange(20) < np.array([[20], [3], [1], [0], [7], [20]])
    examples = np.array([True, False, True, True, False, True])
    of_tokens = functools.partial(losses.feature_loss, where=tokens[..., None])
    of_examples = functools.partial(losses.similarity_loss, where=examples)
    squares = np.where(tokens[..., None], (student - teacher) ** 2, 0.0)
    counts = np.maximum(tokens.sum(1), 1)
    of_rows = functools.partial(losses.feature_loss, axis=(1, 2), where=tokens[..., None])
    for loss, kept, expected in (
        (of_tokens, tokens[..., None], squares.mean(-1)),
        (of_rows, tokens[..., None], squares.mean(-1).sum(1) / counts),
        (of_examples, examples[:, None, None], None),
    ):
        clean_values, clean_grads = value_and_grads(loss, student, teacher)
        padded = (np.where(kept, x, np.float32(padding)) for x in (student, teacher))
        values, grads = value_and_grads(loss, *padded)
        if expected is not None:
            np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(values, clean_values)
        for grad, clean in zip(grads, clean_grads, strict=True):
            np.testing.assert_array_equal(grad, clean)
            assert not np.where(kept, 0.0, grad).any() and grad.any()
    alone, _ = value_and_grads(losses.similarity_loss, student[examples], teacher[examples])
    np.testing.assert_allclose(values[examples], alone, rtol=1e-5)
    np.testing.assert_allclose(jnp.mean(values, where=examples), alone.mean(), rtol=1e-5)
    assert not values[~examples].any()


def test_where_nothing_is_included_the_loss_is_zero():
    student, teacher = maps(10, dtype=np.float32)
    nothing = np.zeros(6, bool)
    for loss in (
        functools.partial(losses.feature_loss, where=False),
        functools.partial(losses.similarity_loss, where=nothing),
    ):
        values, grads = value_and_grads(loss, student, teacher)
        assert not values.any() and not any(grad.any() for grad in grads)


@pytest.mark.parametrize("name", OF_MAPS)
def test_strict_promotion_of_two_dtypes(name):
    """The result has the larger of both, each gradient that of its features."""
    student, teacher = maps(11, dtype=np.float32)
    with jax.numpy_dtype_promotion("strict"):
        values, grads = value_and_grads(OF_MAPS[name], jnp.asarray(student, jnp.bfloat16), teacher)
    assert (values.dtype, grads[0].dtype, grads[1].dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)


@pytest.fixture(scope="module")
def in_float64():
    with jax.enable_x64(True):
        return trajectory(Run(), jnp.float64)


def test_crd_in_numpy(in_float64):
    """Values, Z and memory follow the formulas through eight steps."""
    run = Run()
    memory, z = run.memory.copy(), np.full(2, -1.0)
    for (indices, negatives), (values, log_z, remembered, params) in zip(run.batches, in_float64, strict=True):
        projected = (x[indices] @ p for x, p in zip(run.features, params, strict=True))
        # Exponentials of up to 1 / 0.07: their relative rounding is 14 times 1e-16.
        np.testing.assert_allclose(values, crd_in_numpy(*projected, indices, negatives, memory, z), rtol=1e-12)
        np.testing.assert_allclose(np.exp(log_z), z, rtol=1e-13)
        np.testing.assert_allclose(remembered, memory, rtol=0, atol=1e-14)
    assert np.abs(params[0] - run.projectors[0]).max() > 0.1  # else there would be nothing to compare


def test_what_the_published_epsilon_adds():
    """To either half of the loss at most 1e-7 n (k + 1) / k."""
    run = Run()
    for indices, negatives in run.batches:
        projected = [x[indices] @ p for x, p in zip(run.features, run.projectors, strict=True)]
        without, with_it = (
            crd_in_numpy(*projected, indices, negatives, run.memory.copy(), np.full(2, -1.0), eps=eps)
            for eps in (0, 1e-7)
        )
        assert (with_it > without).all()
        assert (with_it - without < 2 * 1e-7 * N * (K + 1) / K).all()


def test_crd_in_float32(in_float64):
    for ours, exact in zip(trajectory(Run(), jnp.float32), in_float64, strict=True):
        for value, expected in zip(ours[:3], exact[:3], strict=True):
            # 6e-8 of each embedding, times 1 / 0.07 in the logits, and eight steps that pass it on.
            np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-5)


def crd_inputs(dtype=jnp.float32, k=K):
    keys = jax.random.split(jax.random.key(0), 4)
    embeddings = [jax.random.normal(key, (BATCH, DIM)).astype(dtype) for key in keys[:2]]
    negatives = jax.random.randint(keys[2], (BATCH, k), BATCH, N)
    return (*embeddings, jnp.arange(BATCH), negatives, losses.crd_init(keys[3], N, DIM))


crd = jax.jit(losses.crd_loss)


@jax.jit
def crd_grads(student, teacher, *args, **options):
    def total(student, teacher):
        values, state = losses.crd_loss(student, teacher, *args, **options)
        return values.astype(jnp.float32).sum(), (values, state)

    (_, (values, state)), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(student, teacher)
    return values, state, grads


@pytest.mark.parametrize("temperature", [0.07, 0.001])  # exponentials of 1000 would overflow, also in float64
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_crd_is_finite_for_extreme_embeddings(dtype, temperature):
    student, teacher, *others = crd_inputs(dtype)
    student, teacher = (1e4 * jnp.sign(x).at[0].set(0.0) for x in (student, teacher))
    with jax.debug_nans(True):
        values, state, grads = crd_grads(student, teacher, *others, temperature=temperature)
    assert values.dtype == dtype and jnp.isfinite(values).all() and (values >= 0).all()
    assert all(leaf.dtype == jnp.float32 and jnp.isfinite(leaf).all() for leaf in state)
    for grad in grads:
        assert grad.dtype == dtype and jnp.isfinite(grad).all() and not grad[0].any()


def test_crd_in_bfloat16_loses_nothing_inside():
    inputs = crd_inputs(jnp.bfloat16)
    values, state, _ = crd_grads(*inputs)
    expected, expected_state, _ = crd_grads(*(x.astype(jnp.float32) for x in inputs[:2]), *inputs[2:])
    # One rounding to 8 bits of precision.
    np.testing.assert_allclose(np.float32(values), expected, rtol=2**-8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state, expected_state)


def test_crd_keeps_the_dtypes_of_its_state():
    *inputs, state = crd_inputs()
    state = losses.CRDState(state.memory.astype(jnp.bfloat16), state.log_z)
    with jax.numpy_dtype_promotion("strict"):
        _, after = crd(*inputs, state)
    assert [leaf.dtype for leaf in after] == [jnp.bfloat16, jnp.float32]


def test_no_gradient_flows_into_the_state():
    *inputs, state = crd_inputs()
    for before in (state, crd(*inputs, state)[1]):
        grads = jax.jit(jax.grad(lambda state: losses.crd_loss(*inputs, state)[0].sum()))(before)
        assert not any(leaf.any() for leaf in grads)
    jacobian = jax.jit(jax.jacobian(lambda student: losses.crd_loss(student, *inputs[1:], state)[1]))(inputs[0])
    assert not any(leaf.any() for leaf in jacobian)


def test_only_the_rows_of_the_batch_move():
    *inputs, state = crd_inputs()
    after = crd(*inputs, state, momentum=0.0)[1]
    np.testing.assert_array_equal(after.memory[:, BATCH:], state.memory[:, BATCH:])
    for side in (0, 1):
        np.testing.assert_allclose(after.memory[side, :BATCH], unit(np.asarray(inputs[side])), rtol=1e-6)


@pytest.mark.parametrize("place", ["indices", "negatives"])
@pytest.mark.parametrize("index", [-1, N])
def test_an_index_out_of_range_is_not_silent(place, index):
    student, teacher, indices, negatives, state = crd_inputs()
    indices = indices.at[1].set(index) if place == "indices" else indices
    negatives = negatives.at[1, 2].set(index) if place == "negatives" else negatives
    state = state._replace(log_z=jnp.ones(2))  # after the first batch, whose Z it would enter
    values, _ = crd(student, teacher, indices, negatives, state)
    np.testing.assert_array_equal(np.isnan(values), np.arange(BATCH) == 1)


def test_a_batch_that_is_not_finite_leaves_the_memory_as_it_is():
    student, teacher, indices, negatives, state = crd_inputs()
    for bad in (student.at[0, 0].set(jnp.nan), student.at[0, 0].set(jnp.inf)):
        values, after = losses.crd_loss(bad, teacher, indices, negatives, state)
        assert not jnp.isfinite(values).all()
        for new, old in zip(after, state, strict=True):
            np.testing.assert_array_equal(new, old)


def test_the_initial_memory():
    memory, log_z = losses.crd_init(jax.random.key(0), 1000, 48)
    assert memory.shape == (2, 1000, 48) and memory.dtype == jnp.float32
    np.testing.assert_array_equal(log_z, -jnp.inf)
    assert jnp.abs(memory).max() <= 0.25 and jnp.abs(memory).max() > 0.2499  # sqrt(3 / 48), of 96,000 numbers
    # Each square has mean 1 / 48 and a standard deviation of 0.9 of that; 96,000 of them.
    np.testing.assert_allclose(jnp.square(memory).sum(-1).mean(), 1.0, atol=5 * 0.9 / 96_000**0.5)
    assert (memory[0] != memory[1]).any()


LABELS = jnp.array([0] * 5 + [1] * 3 + [2] * 2)
draw = jax.jit(losses.crd_negatives, static_argnums=3)


def test_negatives_are_all_of_other_classes_and_different():
    for k in (4, 5):
        negatives = np.asarray(draw(jax.random.key(k), LABELS, LABELS, k))
        assert negatives.shape == (10, k)
        for row, label in zip(negatives, LABELS, strict=True):
            assert (LABELS[row] != label).all() and len(set(row)) == k
    # Of the first class exactly five are not.
    assert (np.sort(negatives[:5]) == np.arange(5, 10)).all()
    assert len(np.unique(negatives[:5], axis=0)) > 1  # each example draws for itself


def test_negatives_are_drawn_with_the_same_probability():
    """4,000 draws: without replacement for the second and third class; with it for the first, which is half."""
    draws, k = 4000, 6
    keys = jax.random.split(jax.random.key(1), draws)
    batch = jnp.array([0, 1, 2])
    negatives = np.asarray(jax.jit(jax.vmap(lambda key: losses.crd_negatives(key, batch, LABELS, k)))(keys))
    for label in range(3):
        counts = np.bincount(negatives[:, label].ravel(), minlength=10)
        others = np.asarray(LABELS != label)
        assert not counts[~others].any()
        mean = draws * k / others.sum()
        # Binomial or narrower: five standard deviations.
        np.testing.assert_allclose(counts[others], mean, rtol=0, atol=5 * mean**0.5)
    repeats = [len(set(row)) < k for row in negatives[:, 0]]
    assert all(repeats)  # six of five
    assert not any(len(set(row)) < k for row in negatives[:, 1])
    pairs = np.bincount(10 * negatives[:, 0, 0] + negatives[:, 0, 1], minlength=100).reshape(10, 10)[5:, 5:]
    np.testing.assert_allclose(pairs, draws / 25, rtol=0, atol=5 * (draws / 25) ** 0.5)  # independent, too


def test_more_negatives_than_examples():
    negatives = draw(jax.random.key(2), LABELS[:1], LABELS, 50)
    assert set(np.asarray(negatives)[0]) == set(range(5, 10))


def test_a_class_without_others_has_no_loss():
    negatives = draw(jax.random.key(3), jnp.zeros(2, int), jnp.zeros(N, int), K)
    np.testing.assert_array_equal(negatives, N)
    student, teacher, indices, _, state = crd_inputs()
    values, _ = crd(student[:2], teacher[:2], indices[:2], negatives, state)
    assert jnp.isnan(values).all()


def classes(n=24, width=6, number=3):
    """A small problem: inputs, labels, and a teacher's features."""
    rng = np.random.default_rng(1)
    labels = np.arange(n) % number
    x = rng.normal(size=(n, width)) + 2 * np.eye(width)[labels]
    return jnp.asarray(x, jnp.float32), jnp.asarray(labels), jnp.asarray(np.tanh(x), jnp.float32)


def distillation(params, memory, key, indices, data):
    x, labels, teacher_features = data
    features = jnp.tanh(x[indices] @ params["body"])
    task = optax.losses.softmax_cross_entropy_with_integer_labels(features @ params["head"], labels[indices])
    negatives = losses.crd_negatives(key, labels[indices], labels, 5)
    projected = features @ params["student_projector"], teacher_features[indices] @ params["teacher_projector"]
    crd, memory = losses.crd_loss(*projected, indices, negatives, memory)
    return dot_optax.PerLoss(task=task.mean(), kd=0.8 * crd.mean()), memory


def training(batch=8, dim=4):
    keys = jax.random.split(jax.random.key(5), 3)
    shapes = {"body": (6, 7), "head": (7, 3), "student_projector": (7, dim), "teacher_projector": (6, dim)}
    params = {k: jnp.zeros(shape) for k, shape in shapes.items()}
    params = jax.tree.map(lambda p: 0.5 * p, optax.tree.random_like(keys[0], params))
    data, memory = classes(), losses.crd_init(keys[1], 24, dim)
    reached = dot_optax.reached(distillation, params, memory, keys[2], jnp.arange(batch), data, has_aux=True)
    return params, memory, data, reached


def train_step(optimizer, data, carry, batch):
    params, opt_state, memory = carry
    gradients = dot_optax.value_and_grads(distillation, has_aux=True)
    (values, memory), grads = gradients(params, memory, *batch, data)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state, memory), values


def batches(steps, batch=8):
    starts = batch * jnp.arange(steps)[:, None] + jnp.arange(batch)[None]
    return jax.random.split(jax.random.key(6), steps), starts % 24


@pytest.mark.slow
def test_dot_with_crd_by_reach():
    """The head is the task's, both projectors are CRD's, and each has one buffer, with the mean momentum."""
    params, memory, data, reached = training()
    assert reached.task == {k: k in ("body", "head") for k in params}
    assert reached.kd == {k: k != "head" for k in params}
    optimizer = dot_optax.dot(0.05, 0.825, 0.975, reached=reached)
    opt_state = optimizer.init(params)
    buffers = sorted(leaf.shape for leaf in jax.tree.leaves(opt_state) if leaf.ndim)
    assert buffers == sorted(p.shape for p in [*params.values(), params["body"]])  # two for the body alone
    momenta = jax.tree.map(lambda p: np.zeros(p.shape, np.float32), {"task": params, "kd": params})
    carry = params, opt_state, memory
    step = jax.jit(functools.partial(train_step, optimizer, data))
    gradients = jax.jit(dot_optax.value_and_grads(distillation, has_aux=True))
    history = []
    for batch in zip(*batches(20), strict=True):
        before = carry[0]
        _, grads = jax.tree.map(np.asarray, gradients(before, carry[2], *batch, data))
        carry, values = step(carry, batch)
        history.append(values)
        for name, p in before.items():
            mean, both = 0.9, name == "body"
            beta = {"task": 0.825 if both else mean, "kd": 0.975 if both else mean}
            for loss in momenta:
                momenta[loss][name] = getattr(grads, loss)[name] + beta[loss] * momenta[loss][name]
            expected = np.asarray(p) - 0.05 * (momenta["task"][name] + momenta["kd"][name])
            # Gradients of two compilations: a few roundings of 6e-8, added up over 20 steps by the momenta.
            np.testing.assert_allclose(carry[0][name], expected, rtol=0, atol=2e-5)
    first, last = (np.mean([np.array(v) for v in part], 0) for part in (history[:3], history[-3:]))
    assert (last < first).all()


def test_scan_and_donation_are_the_loop():
    params, memory, data, reached = training()
    optimizer = dot_optax.dot(0.05, reached=reached)
    start = params, optimizer.init(params), memory
    step = functools.partial(train_step, optimizer, data)
    donating = jax.jit(step, donate_argnums=0)
    carry, values = jax.tree.map(jnp.copy, start), []
    for batch in zip(*batches(6), strict=True):
        carry, value = donating(carry, batch)
        values.append(value)
    scanned, scanned_values = jax.jit(lambda start, batches: jax.lax.scan(step, start, batches))(start, batches(6))
    # Two compilations: roundings of 6e-8, times 1 / 0.07 in the logits, over six steps.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), carry, scanned)
    np.testing.assert_allclose([v.kd for v in values], scanned_values.kd, rtol=2e-5)
    assert (scanned[2].memory != memory.memory).any()


def test_a_sharded_batch_has_the_loss_and_memory_of_one_device():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    params, memory, data, reached = training()
    optimizer = dot_optax.dot(0.05, reached=reached)
    carry = sharded = params, optimizer.init(params), memory
    step = jax.jit(functools.partial(train_step, optimizer))
    sharded, data_there = jax.device_put((sharded, data), NamedSharding(mesh, P()))
    for key, indices in zip(*batches(4), strict=True):
        carry, values = jax.block_until_ready(step(data, carry, (key, indices)))
        there = key, jax.device_put(indices, NamedSharding(mesh, P("data")))
        sharded, sharded_values = jax.block_until_ready(step(data_there, sharded, there))
        # Means in another order.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), values, sharded_values)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), carry, sharded)


def test_a_sharded_batch_moves_embeddings_and_no_scores_or_draws():
    """Each device scores and draws for its own examples; all learn the embeddings, to remember them."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))

    def array(shape, dtype=jnp.float32, axis="data"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(axis)))

    def loss(student, teacher, indices, key, labels, all_labels, state):
        negatives = losses.crd_negatives(key, labels, all_labels, 50)
        values, state = losses.crd_loss(student, teacher, indices, negatives, state)
        return values.mean(), state

    state = losses.CRDState(array((2, 1000, 8), axis=None), array((2,), axis=None))
    ids, all_ids = array((16,), jnp.int32), array((1000,), jnp.int32, None)
    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    key = jax.eval_shape(lambda: jax.random.key(0))
    program = step.lower(array((16, 8)), array((16, 8)), ids, key, ids, all_ids, state).compile().as_text()
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", program)
    assert gathered and all(math.prod(map(int, shape.split(","))) <= 2 * 16 * 8 for shape in gathered), gathered


def test_crd_holds_no_rows_of_the_memory_for_each_example():
    """At the sizes of CIFAR-100 these are 64 * 16385 * 128 numbers, 537 MB; the scores of all examples are 26 MB."""
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    int32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    state = jax.eval_shape(lambda: losses.crd_init(jax.random.key(0), 50_000, 128))

    def loss(student, teacher, indices, negatives, state):
        values, state = losses.crd_loss(student, teacher, indices, negatives, state)
        return values.mean(), state

    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), donate_argnums=4)
    compiled = step.lower(float32((64, 128)), float32((64, 128)), int32((64,)), int32((64, 16384)), state).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 16385 * 128 * 4 / 2
