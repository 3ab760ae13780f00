"""The distillation losses at the edges of the number formats; `test_dot.py` has the published values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dot_optax import losses


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_is_finite_for_extreme_logits(dtype, temperature):
    student = jnp.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [1e4, 1e4, 1e4]], dtype)
    teacher = jnp.array([[-1e4, 1e4, 0.0], [-1e4, 1e4, 1e4], [-1e4, 0.0, 1e4]], dtype)

    def total(s, t):
        return losses.kd_loss(s, t, temperature).astype(jnp.float32).sum()

    value = losses.kd_loss(student, teacher, temperature)
    assert value.dtype == dtype
    for grad in jax.jit(jax.grad(total, argnums=(0, 1)))(student, teacher):
        assert grad.dtype == dtype
        assert jnp.isfinite(grad).all()
    if dtype != jnp.float16:  # 16 * 2e4 / 4 is beyond float16's largest number, 65504
        assert jnp.isfinite(value).all()
    np.testing.assert_allclose(np.asarray(value[1], np.float32), 0.0, atol=1e-6)


def test_bfloat16_logits_lose_nothing_inside():
    """The two logarithms nearly cancel: in bfloat16 throughout, this loss would be wrong by more than its size."""
    key = jax.random.key(0)
    student = jax.random.normal(key, (64, 10)).astype(jnp.bfloat16)
    teacher = (student + 0.05 * jax.random.normal(jax.random.key(1), (64, 10))).astype(jnp.bfloat16)
    exact = losses.kd_loss(student.astype(jnp.float32), teacher.astype(jnp.float32), 4.0)
    # One rounding to bfloat16, 8 bits of precision: relative error at most 2**-8.
    np.testing.assert_allclose(np.float32(losses.kd_loss(student, teacher, 4.0)), exact, rtol=2**-8)


def test_axis_and_where_select_the_classes():
    key_student, key_teacher = jax.random.split(jax.random.key(0))
    student, teacher = jax.random.normal(key_student, (3, 5)), jax.random.normal(key_teacher, (3, 5))
    expected = losses.kd_loss(student[:, :3], teacher[:, :3], 2.0)
    where = jnp.broadcast_to(jnp.arange(5) < 3, (3, 5))
    # float32 rounding of sums of five terms of order one.
    np.testing.assert_allclose(losses.kd_loss(student, teacher, 2.0, where=where), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        losses.kd_loss(student.T, teacher.T, 2.0, axis=0, where=where.T), expected, rtol=1e-5, atol=1e-6
    )

    def masked(s):
        return losses.kd_loss(s, teacher, 2.0, where=where).sum()

    grad = jax.jit(jax.grad(masked))(student)
    np.testing.assert_array_equal(grad[:, 3:], 0.0)
    np.testing.assert_allclose(
        grad[:, :3],
        jax.jit(jax.grad(lambda s: losses.kd_loss(s, teacher[:, :3], 2.0).sum()))(student[:, :3]),
        rtol=1e-5,
        atol=1e-6,
    )


def test_the_default_temperature_is_four():
    student, teacher = jnp.array([0.0, 1.0]), jnp.array([1.0, -1.0])
    np.testing.assert_array_equal(losses.kd_loss(student, teacher), losses.kd_loss(student, teacher, 4.0))


@pytest.mark.parametrize(
    "temperature", [np.int8(20), np.uint8(20), 20, np.float16(20), jnp.bfloat16(20), jnp.int32(20)]
)
def test_the_type_of_the_temperature_does_not_matter(temperature):
    """T squared would overflow in the small types."""
    student, teacher = jnp.array([0.0, 1.0]), jnp.array([1.0, -1.0])
    np.testing.assert_array_equal(losses.kd_loss(student, teacher, temperature), losses.kd_loss(student, teacher, 20.0))


def test_excluded_classes_may_hold_anything_finite():
    logits = jnp.array([[0.0, 1.0, 3e38]])
    where = jnp.array([[True, True, False]])

    def total(student, teacher):
        return losses.kd_loss(student, teacher, 1.0, where=where).sum()

    with jax.debug_nans(True):  # not even in between
        value, grads = jax.value_and_grad(total, argnums=(0, 1))(logits, -logits)
    assert jnp.isfinite(value)
    for grad in grads:
        assert jnp.isfinite(grad).all() and grad[0, 2] == 0.0 and grad[0, 0] != 0.0


def in_float64(student, teacher, temperature):
    """T^2 KL(q || p) of each row and its gradients in both logits, as the formula has it, in NumPy."""
    student, teacher = np.float64(student) / temperature, np.float64(teacher) / temperature
    log_p, log_q = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (student, teacher))
    p, q = np.exp(log_p), np.exp(log_q)
    ratio = np.where(q > 0, log_q - np.where(p > 0, log_p, 0.0), 0.0) if (q == 0).any() else log_q - log_p
    kl = (q * ratio).sum(-1, keepdims=True)
    return (temperature**2 * kl)[..., 0], temperature * (p - q), temperature * q * (ratio - kl)


@functools.partial(jax.jit, static_argnums=2)
def with_gradients(student, teacher, temperature):
    def total(student, teacher):
        values = losses.kd_loss(student, teacher, temperature)
        return values.sum(), values

    (_, values), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(student, teacher)
    return values, *grads


@pytest.mark.parametrize("noise", [1e-3, 0.1, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_a_student_close_to_its_teacher_has_a_loss_that_is_exact_and_positive(temperature, noise):
    """64 examples of 1,000 classes. As the difference of two logarithms, half of such values were negative."""
    keys = jax.random.split(jax.random.key(0))
    teacher = 3.0 * jax.random.normal(keys[0], (64, 1000))
    student = teacher + noise * jax.random.normal(keys[1], (64, 1000))
    results, exact = with_gradients(student, teacher, temperature), in_float64(student, teacher, temperature)
    assert (results[0] > 0).all()
    for result, expected in zip(results, exact, strict=True):
        # A float32 is exact to 6e-8 of its size; a few roundings, most of them in 1,000 terms of either sign.
        np.testing.assert_allclose(result, expected, rtol=3e-6, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("scale", [1.0, 10.0, 50.0])
def test_students_far_from_their_teachers(scale):
    student, teacher = scale * jax.random.normal(jax.random.key(1), (2, 200, 20))
    for result, expected in zip(with_gradients(student, teacher, 1.0), in_float64(student, teacher, 1.0), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_float64_is_exact_near_and_far():
    """Across |log p / q| = 0.5, where one form of a term gives way to the other."""
    with jax.enable_x64(True):
        teacher = np.zeros(2)
        for gap in (1e-3, 0.1, 0.49, 0.5, 0.51, 0.9, 1.0, 1.1, 2.0, 3.0, 5.0):
            student = np.array([0.0, gap])
            q, p = 0.5, 1 / (1 + np.exp(-gap))
            expected = -q * np.log(p / q) - q * np.log((1 - p) / q)
            # The expected value itself cancels: 1e-16 of numbers of order one.
            np.testing.assert_allclose(
                losses.kd_loss(jnp.asarray(student), jnp.asarray(teacher), 1.0), expected, atol=3e-16, rtol=1e-14
            )


def test_a_class_that_the_teacher_excludes():
    student, teacher = jnp.array([1.0, 2.0, 0.5, 0.3]), jnp.array([0.0, 1.0, 3.0, -jnp.inf])
    value, student_grad, teacher_grad = with_gradients(student[None], teacher[None], 1.0)
    np.testing.assert_allclose(value, 1.356499, rtol=1e-6)
    _, expected_student, expected_teacher = in_float64(student[None], teacher[None], 1.0)
    np.testing.assert_allclose(student_grad, expected_student, rtol=1e-5)
    np.testing.assert_allclose(teacher_grad, expected_teacher, rtol=1e-5, atol=1e-7)


def test_a_class_that_the_student_or_both_exclude():
    inf = jnp.inf
    alone = losses.kd_loss(jnp.array([1.0, 2.0, -inf]), jnp.array([0.0, 1.0, 0.0]), 2.0)
    assert alone == inf
    both = losses.kd_loss(jnp.array([1.0, 4.0, -inf]), jnp.array([0.0, 1.0, -inf]), 2.0)
    np.testing.assert_allclose(both, losses.kd_loss(jnp.array([1.0, 4.0]), jnp.array([0.0, 1.0]), 2.0), rtol=1e-6)


def test_the_same_logits_have_no_loss_and_no_gradient():
    logits = 100.0 * jax.random.normal(jax.random.key(2), (50, 10))
    for result in with_gradients(logits, logits + 7.0, 4.0):
        # 100 + 7 is rounded to 24 bits: differences of up to 8e-6 between logits, and their square in the loss.
        np.testing.assert_allclose(result, 0.0, atol=2e-5)
    value, *grads = with_gradients(logits, logits, 4.0)
    assert not value.any() and not any(grad.any() for grad in grads)


def test_second_derivatives_and_those_in_the_temperature():
    """The Hessian in the student's logits is diag(p) - p p^T, whatever the form of the sum."""
    student, teacher = jnp.array([1.0, 2.0, 0.5, 0.3]), jnp.array([0.0, 1.0, 3.0, -1.0])
    for logits in (teacher, teacher.at[3].set(-jnp.inf)):
        p = np.exp(np.float64(student) / 2) / np.exp(np.float64(student) / 2).sum()
        hessian = jax.jit(jax.hessian(losses.kd_loss))(student, logits, 2.0)
        np.testing.assert_allclose(hessian, np.diag(p) - np.outer(p, p), rtol=0, atol=1e-6)
        first = jax.grad(losses.kd_loss, 2)
        for order, function in ((1, jax.jit(first)), (2, jax.jit(jax.grad(first, 2)))):
            step, plain = 1e-2, lambda t, logits=logits: in_float64(student[None], logits[None], t)[0][0]
            expected = (
                (plain(2 + step) - plain(2 - step)) / (2 * step)
                if order == 1
                else (plain(2 + step) - 2 * plain(2) + plain(2 - step)) / step**2
            )
            # Central differences of float64: their error is the square of the step times a derivative of order one.
            np.testing.assert_allclose(function(student, logits, 2.0), expected, rtol=2e-3)


def test_the_gradient_in_the_temperature_does_not_see_excluded_classes():
    student, teacher, where = jnp.array([1.0, 2.0, 0.5]), jnp.array([0.0, 1.0, 3.0]), jnp.array([True, True, False])
    masked = jax.jit(jax.grad(lambda t: losses.kd_loss(student, teacher, t, where=where)))(2.0)
    expected = jax.jit(jax.grad(losses.kd_loss, 2))(student[:2], teacher[:2], 2.0)
    np.testing.assert_allclose(masked, expected, rtol=1e-5)


@pytest.mark.parametrize("offset", [3.0, 100.0])
def test_an_offset_of_all_logits_changes_nothing(offset):
    teacher = 3.0 * jax.random.normal(jax.random.key(0), (16, 100))
    student = teacher + 1e-2 * jax.random.normal(jax.random.key(1), (16, 100))
    plain = losses.kd_loss(student, teacher, 4.0)
    # The sum of logits and offset is rounded to 24 bits: up to 6e-8 of it, on differences of 1e-2.
    np.testing.assert_allclose(losses.kd_loss(student + offset, teacher, 4.0), plain, rtol=10 * 6e-8 * offset / 1e-2)
