"""DKD and DeepKD; `test_losses.py` has what these share with the other losses of logits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dot_optax import losses
from tests.reference import losses as reference

# Where no other reason stands beside it, a tolerance is that of a few float32 roundings, of 6e-8, in sums of eight terms.
STUDENT, TEACHER, LABELS = (jnp.asarray(x) for x in reference.examples(batch=6, num_classes=8))
STUDENT, TEACHER = jnp.float32(STUDENT), jnp.float32(TEACHER)
GIVEN = (STUDENT, TEACHER, LABELS, 2.0)


def test_kd_is_the_sum_of_its_parts():
    """The identity of the paper: KD = TCKD + (1 - q_y) NCKD."""
    q_y = jnp.take_along_axis(jax.nn.softmax(TEACHER / 2.0), LABELS[:, None], -1)[:, 0]
    tckd, nckd = losses.tckd_loss(*GIVEN), losses.nckd_loss(*GIVEN)
    np.testing.assert_allclose(losses.kd_loss(STUDENT, TEACHER, 2.0), tckd + (1 - q_y) * nckd, rtol=1e-5)
    target, non_target = losses.deepkd_losses(*GIVEN)
    np.testing.assert_allclose(target, tckd, rtol=1e-6)
    np.testing.assert_allclose(non_target, (1 - q_y) * nckd, rtol=1e-5)
    np.testing.assert_allclose(losses.dkd_loss(*GIVEN, alpha=2.0, beta=3.0), 2 * tckd + 3 * nckd, rtol=1e-6)


def test_a_student_that_is_sure():
    """1 - p_y is below what float32 can tell from 0, and the published form is infinite."""
    student, teacher = jnp.array([200.0, 0.0, 0.0]), jnp.array([1.0, 0.0, 0.5])
    value, grad = jax.jit(jax.value_and_grad(losses.tckd_loss))(student, teacher, jnp.array(0), 1.0)
    q = np.exp([1.0, 0.0, 0.5]) / np.exp([1.0, 0.0, 0.5]).sum()
    expected = q[0] * np.log(q[0]) + (1 - q[0]) * (np.log(1 - q[0]) + 200 - np.log(2))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, [1 - q[0], -(1 - q[0]) / 2, -(1 - q[0]) / 2], rtol=1e-5)


def test_two_classes_have_no_other_classes():
    two = jnp.zeros((3, 2))
    for loss in (losses.nckd_loss, losses.dkd_loss, losses.deepkd_losses):
        with pytest.raises(ValueError, match=r"must have the same shape .* with three classes or more, got \(3, 2\)"):
            loss(two, two, jnp.zeros(3, int))
    assert not losses.tckd_loss(two, two, jnp.zeros(3, int)).any()


def test_the_mask_keeps_the_likeliest_but_the_target():
    for k in (1, 3, 7, 20):
        for mask in (losses.top_k_mask(TEACHER, LABELS, k), jax.jit(losses.top_k_mask)(TEACHER, LABELS, k)):
            for row, teacher, label in zip(np.asarray(mask), np.asarray(TEACHER), np.asarray(LABELS), strict=True):
                others = [c for c in np.argsort(-teacher) if c != label]
                assert set(np.flatnonzero(row)) == set(others[:k])
    np.testing.assert_array_equal(losses.top_k_mask(TEACHER.T, LABELS, 3, axis=0).T, mask_of(3))
    equal = losses.top_k_mask(jnp.zeros((1, 5)), jnp.array([1]), 2)
    np.testing.assert_array_equal(equal, [[True, False, True, False, False]])


def mask_of(k):
    return losses.top_k_mask(TEACHER, LABELS, k)


def test_deepkd_sees_the_likeliest_alone():
    _, non_target = jax.jit(losses.deepkd_losses)(*GIVEN, k=3)
    q_y = jnp.take_along_axis(jax.nn.softmax(TEACHER / 2.0), LABELS[:, None], -1)[:, 0]
    np.testing.assert_allclose(non_target, (1 - q_y) * losses.nckd_loss(*GIVEN, where=mask_of(3)), rtol=1e-5)
    for i, mask in enumerate(np.asarray(mask_of(3))):  # by hand, on the classes that are left
        # NumPy's float32 cancels: 6e-8 of terms of order one.
        expected = 4 * reference.kl(*reference.probabilities(STUDENT[i, mask], TEACHER[i, mask], 2.0))
        np.testing.assert_allclose(losses.nckd_loss(*GIVEN, where=mask_of(3))[i], expected, rtol=1e-5, atol=1e-6)
    everything = losses.deepkd_losses(*GIVEN, k=7)
    np.testing.assert_allclose(everything[1], losses.deepkd_losses(*GIVEN)[1], rtol=1e-6)
    assert not losses.deepkd_losses(*GIVEN, k=1)[1].any()  # of one class there is nothing to learn


def test_the_schedule_of_classes_has_three_phases():
    schedule = losses.top_k_schedule(100, begin=10, end=30)
    k = [int(schedule(step)) for step in range(40)]
    assert k[:11] == [5] * 11 and k[30:] == [99] * 10
    assert all(0 < later - earlier <= 5 for earlier, later in itertools.pairwise(k[10:31]))
    assert schedule(0).dtype == jnp.int32 and jax.jit(schedule)(20) == k[20] == 52  # 5 + 94 / 2
    assert losses.top_k_schedule(100, 0, 1, fraction=0.07)(0) == 7  # 0.07 * 100 is above 7 in float64
    assert losses.top_k_schedule(10, 0, 1)(0) == 2 and losses.top_k_schedule(1000, 0, 5, fraction=0.1)(0) == 100


def test_the_warm_up_of_dkd():
    weight = losses.dkd_warmup(steps_per_epoch=7, epochs=4)
    expected = [min((step // 7 + 1) / 4, 1.0) for step in range(40)]
    np.testing.assert_array_equal([weight(step) for step in range(40)], np.float32(expected))
    assert jax.jit(weight)(7) == 0.5


def test_a_label_that_is_no_class_is_nan_where_its_example_counts():
    labels, where = LABELS.at[0].set(-100).at[1].set(8).at[2].set(-1), jnp.arange(6)[:, None] != 2
    for loss in (losses.tckd_loss, losses.nckd_loss, losses.dkd_loss):
        np.testing.assert_array_equal(jnp.isnan(loss(STUDENT, TEACHER, labels, where=where)), [1, 1, 0, 0, 0, 0])
        assert loss(STUDENT, TEACHER, labels, where=where)[2] == 0
