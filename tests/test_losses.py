"""The distillation losses at the edges of the number formats; `test_dot.py` has the published values."""

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
    for grad in jax.grad(total, argnums=(0, 1))(student, teacher):
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

    grad = jax.grad(masked)(student)
    np.testing.assert_array_equal(grad[:, 3:], 0.0)
    np.testing.assert_allclose(
        grad[:, :3],
        jax.grad(lambda s: losses.kd_loss(s, teacher[:, :3], 2.0).sum())(student[:, :3]),
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
