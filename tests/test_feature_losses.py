"""The losses of features: their formulas in NumPy, the published code's arithmetic in PyTorch, and their edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dot_optax import losses
from tests.tiers import slow_but

OF_MAPS = {
    "feature_loss": functools.partial(losses.feature_loss, axis=(1, 2, 3)),
    "attention_transfer_loss": losses.attention_transfer_loss,
    "similarity_loss": losses.similarity_loss,
}
WITHOUT_SCALE = ("attention_transfer_loss", "similarity_loss")


def maps(seed=0, channels=(3, 3), dtype=np.float64):
    """Feature maps of a student and a teacher, for six examples with 4 x 5 places."""
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(6, 4, 5, c)).astype(dtype) for c in channels)


def in_numpy(name, student, teacher):
    """Each formula as its docstring has it, in float64."""
    student, teacher = np.float64(student), np.float64(teacher)
    if name == "feature_loss":
        return ((student - teacher) ** 2).mean((1, 2, 3))

    def attention(x):
        a = (x**2).mean(-1).reshape(len(x), -1)
        return a / np.sqrt((a**2).sum(-1, keepdims=True))

    def similarities(x):
        g = np.array([[(a * b).sum() for a in x] for b in x])
        return g / np.sqrt((g**2).sum(-1, keepdims=True))

    of = {"attention_transfer_loss": attention, "similarity_loss": similarities}[name]
    return ((of(student) - of(teacher)) ** 2).mean(-1)


def in_pytorch(name, student, teacher):
    """The arithmetic of the published code, whose result is one number for the batch; channels come second there."""
    functional = pytest.importorskip("torch").nn.functional
    student, teacher = student.movedim(-1, 1), teacher.movedim(-1, 1)
    if name == "feature_loss":
        return functional.mse_loss(student, teacher)
    if name == "attention_transfer_loss":
        attention = [functional.normalize(x.pow(2).mean(1).flatten(1)) for x in (student, teacher)]
        return (attention[0] - attention[1]).pow(2).mean()
    rows = [x.flatten(1) for x in (student, teacher)]
    similarities = [functional.normalize(x @ x.T) for x in rows]
    return (similarities[1] - similarities[0]).pow(2).sum() / len(student) ** 2


@functools.partial(jax.jit, static_argnums=0)
def value_and_grads(loss, student, teacher):
    """The loss of each example, and the gradients of their mean in both arguments."""

    def mean(*features):
        values = loss(*features)
        return values.astype(jnp.promote_types(values.dtype, jnp.float32)).mean(), values

    (_, values), grads = jax.value_and_grad(mean, argnums=(0, 1), has_aux=True)(student, teacher)
    return values, grads


@pytest.mark.parametrize("name", OF_MAPS)
def test_the_formula_in_float64(name):
    with jax.enable_x64(True):
        student, teacher = maps(channels=(3, 3) if name == "feature_loss" else (3, 7))
        # Sums of 100 terms of order one, whose float64 roundings are 1e-16.
        np.testing.assert_allclose(
            OF_MAPS[name](student, teacher), in_numpy(name, student, teacher), rtol=1e-13, atol=0
        )


@pytest.mark.parametrize("name", OF_MAPS)
def test_the_published_code_in_float64(name):
    """The mean over the batch is the published loss, and so are its gradients."""
    torch = pytest.importorskip("torch")
    with jax.enable_x64(True):
        features = maps(1, channels=(3, 3) if name == "feature_loss" else (3, 7))
        theirs = [torch.tensor(x, requires_grad=True) for x in features]
        expected = in_pytorch(name, *theirs)
        expected.backward()
        values, grads = value_and_grads(OF_MAPS[name], *features)
        np.testing.assert_allclose(values.mean(), expected.item(), rtol=1e-13)
        for grad, x in zip(grads, theirs, strict=True):
            np.testing.assert_allclose(grad, x.grad, rtol=1e-11, atol=1e-15)


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
