"""The losses of logits against their formulas, and at the edges of the number formats; `test_dot.py` has the published values."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dot_optax import losses
from tests.reference import losses as reference
from tests.tiers import slow_but


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


def test_float64_of_numpy_is_float32_where_jax_has_no_float64():
    student, teacher, labels = reference.examples()
    for value in (
        losses.kd_loss(student, teacher),
        losses.dkd_loss(student, teacher, labels),
        losses.chunked_kd_loss(student, teacher, chunk_size=4),
        losses.feature_loss(student, teacher),
    ):
        assert value.dtype == jnp.float32


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


@pytest.mark.parametrize(
    ("loss", "factor"),
    [
        (losses.jsd_loss, 0.5 * 0.5),  # beta (1 - beta)
        (losses.skew_kl_loss, 0.9**2),  # (1 - alpha)^2
        (losses.jeffreys, 2.0),
    ],
)
def test_second_derivatives_where_student_and_teacher_are_equal(loss, factor):
    """The Hessian is that of KL(q || p), diag(p) - p p^T, times what the second derivative in p has there."""
    logits = jnp.array([1.0, 2.0, 0.5, 0.3])
    p = np.asarray(jax.nn.softmax(logits / 2))
    hessian = jax.jit(jax.hessian(loss))(logits, logits, 2.0)
    # Float32 rounding of numbers of order one.
    np.testing.assert_allclose(hessian, factor * (np.diag(p) - np.outer(p, p)), rtol=0, atol=1e-6)


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


VARIANTS = {"jsd_loss, beta 0.1", "jsd_loss, beta 0.9", "skew_kl_loss, alpha 0.9", "deepkd_losses, summed"}
NAMES = slow_but(reference.STATEMENTS, *set(reference.STATEMENTS) - VARIANTS)
FEW_NAMES = slow_but(reference.STATEMENTS, "kd_loss", "jsd_loss, beta 0.5", "dkd_loss", "top_k_kd_loss")
OF_LABELS = ("tckd_loss", "nckd_loss", "dkd_loss", "deepkd_losses")
WITH_WHERE = {
    "kd_loss": losses.kd_loss,
    "reverse_kl_loss": losses.reverse_kl_loss,
    "jeffreys": losses.jeffreys,
    "jsd_loss": losses.jsd_loss,
    "skew_kl_loss": losses.skew_kl_loss,
    "bernoulli_kd_loss": losses.bernoulli_kd_loss,
    "tckd_loss": losses.tckd_loss,
    "nckd_loss": losses.nckd_loss,
    "dkd_loss": losses.dkd_loss,
    "deepkd_losses": lambda *args, **kw: losses.deepkd_losses(*args, **kw, k=2)[1],
    "chunked_kd_loss": functools.partial(losses.chunked_kd_loss, chunk_size=4),
    "top_k_kd_loss": lambda s, t, **kw: losses.top_k_kd_loss(s, *jax.lax.top_k(jax.nn.log_softmax(t), 3), 1.0, **kw),
}


# Logits of one shape, so that each loss is compiled once for a dtype.
NEAR, MIDDLE, FAR = {"noise": 1e-2}, {}, {"scale": 30.0, "noise": 30.0}


@pytest.mark.parametrize("name", FEW_NAMES)
def test_the_formula_in_float64(name):
    with jax.enable_x64(True):
        for kind in (NEAR, MIDDLE, FAR):
            student, teacher, labels = reference.examples(**kind)
            actual = reference.with_gradients(reference.STATEMENTS[name].ours, student, teacher, labels, 2.0)[0]
            expected = reference.STATEMENTS[name].in_numpy(student, teacher, labels, 2.0)
            # 1e-16 of each term of the formula, of which some are of order 10 where the value is of order 1e-5.
            np.testing.assert_allclose(actual, expected, rtol=1e-13, atol=2e-14)


@pytest.mark.parametrize("name", NAMES)
def test_the_formula_in_float32(name):
    for kind in (NEAR, MIDDLE, FAR):
        # On the numbers that float32 can hold, so that only the arithmetic is compared.
        student, teacher, labels = reference.examples(**kind)
        student, teacher = np.float32(student), np.float32(teacher)
        actual = reference.with_gradients(reference.STATEMENTS[name].ours, student, teacher, labels, 2.0)[0]
        expected = reference.STATEMENTS[name].in_numpy(np.float64(student), np.float64(teacher), labels, 2.0)
        assert actual.dtype == jnp.float32
        # A few roundings of 6e-8. Three losses see rounded probabilities or logits, and not their differences of 1e-2.
        rounded = kind == NEAR and name in ("top_k_kd_loss", "standardize_logits", "dist_loss")
        np.testing.assert_allclose(actual, expected, rtol=1e-4 if rounded else 1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_ten_thousand(name):
    check_logits_of_ten_thousand(name, jnp.float32)


@pytest.mark.parametrize("name", FEW_NAMES)
def test_logits_of_ten_thousand_in_bfloat16(name):
    check_logits_of_ten_thousand(name, jnp.bfloat16)


def check_logits_of_ten_thousand(name, dtype):
    rng = np.random.default_rng(0)
    student, teacher = (jnp.asarray(rng.choice([-1e4, 0.0, 1e4], size=(16, 10)), dtype) for _ in range(2))
    student = student.at[0].set(teacher[0]).at[1].set(1e4).at[2].set(-teacher[2])
    values, *grads = reference.with_gradients(
        reference.STATEMENTS[name].ours, student, teacher, np.arange(16) % 10, 1.0
    )
    assert values.dtype == dtype and jnp.isfinite(values).all() and (values >= 0).all()
    for grad in grads[:2]:
        assert grad.dtype == dtype and jnp.isfinite(grad).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_value_is_negative(name):
    for noise in (0.0, 1e-6, 1e-3):
        for temperature in (1.0, 20.0):
            student, teacher, labels = reference.examples(noise=noise)
            given = (np.float32(student), np.float32(teacher), labels, temperature)
            values = reference.with_gradients(reference.STATEMENTS[name].ours, *given)[0]
            assert (values >= 0).all()
            if not noise and name != "top_k_kd_loss":  # which is given probabilities, rounded
                # Compilers may scale student and teacher in other orders: the square of some 6e-8, times T^2.
                scaled = name in ("dist_loss", "standardize_logits")
                assert (values <= (1e-11 if scaled else 0)).all()


@pytest.mark.parametrize(
    "name", slow_but(WITH_WHERE, "kd_loss", "jsd_loss", "dkd_loss", "chunked_kd_loss", "top_k_kd_loss")
)
def test_padding_has_no_influence(name):
    """Not even with NaN in it, on values and on gradients."""
    student, teacher, _ = map(jnp.float32, reference.examples(batch=4, num_classes=10))
    is_token = jnp.array([True, False, True, False])
    labels = {"labels": jnp.zeros(4, int)} if name in OF_LABELS else {}

    def total(student, teacher):
        values = WITH_WHERE[name](student, teacher, **labels, where=is_token[:, None])
        return values.sum(), values

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    expected = run(student, teacher)
    found = run(student.at[1].set(jnp.nan).at[3].set(jnp.nan), teacher.at[3].set(jnp.inf))
    chex.assert_trees_all_equal(found[0][1], expected[0][1])
    chex.assert_trees_all_equal(found[1][0], expected[1][0])
    # Of infinite logits of a teacher, the `log_softmax` that makes a teacher's log probabilities makes NaN itself.
    rows = slice(0, 3) if name == "top_k_kd_loss" else slice(None)
    chex.assert_trees_all_equal(found[1][1][rows], expected[1][1][rows])
    for result in (found[0][1], found[1][0], found[1][1][rows]):
        assert not result[1::2].any() and result[::2].any()
    alone = jax.jit(functools.partial(WITH_WHERE[name], **labels))(student, teacher)
    # The same numbers in another program: one or two roundings.
    np.testing.assert_allclose(found[0][1][::2], alone[::2], rtol=1e-6)


def test_padding_of_a_batch_of_correlations():
    student, teacher, _ = reference.examples(batch=4, num_classes=10)
    expected = jax.jit(losses.dist_loss)(jnp.float32(student[:3]), jnp.float32(teacher[:3]), 2.0)
    student[3] = np.nan
    where = jnp.arange(4)[:, None] < 3

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(student):
        values = losses.dist_loss(student, jnp.float32(teacher), 2.0, where=where)
        return values.sum(), values

    (_, found), grad = run(jnp.float32(student))
    np.testing.assert_allclose(found[:3], expected, rtol=1e-5)
    assert not grad[3].any() and grad[:3].any() and jnp.isfinite(grad).all()


@pytest.mark.parametrize(
    "name",
    slow_but([n for n in WITH_WHERE if n not in ("chunked_kd_loss", "top_k_kd_loss")], "bernoulli_kd_loss", "dkd_loss"),
)
def test_classes_along_the_first_axis_and_left_out(name):
    student, teacher, _ = map(jnp.float32, reference.examples(batch=3, num_classes=6))
    labels = {"labels": jnp.zeros(3, int)} if name in OF_LABELS else {}
    loss = jax.jit(functools.partial(WITH_WHERE[name], **labels), static_argnames="axis")
    expected = loss(student[:, :4], teacher[:, :4])
    where = jnp.broadcast_to(jnp.arange(6) < 4, (3, 6))
    # float32 rounding of sums of a few terms of order one.
    np.testing.assert_allclose(loss(student, teacher, where=where), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(loss(student.T, teacher.T, axis=0, where=where.T), expected, rtol=1e-5, atol=1e-6)


def test_what_one_side_excludes():
    inf = jnp.inf
    student, teacher = jnp.array([1.0, 2.0, -inf]), jnp.array([0.0, 1.0, 0.0])
    assert losses.kd_loss(student, teacher, 2.0) == losses.jeffreys(student, teacher, 2.0) == inf
    assert losses.reverse_kl_loss(teacher, student, 2.0) == inf
    np.testing.assert_allclose(
        losses.reverse_kl_loss(student, teacher, 2.0), losses.kd_loss(teacher, student, 2.0), rtol=1e-6
    )
    for loss in (losses.jsd_loss, losses.skew_kl_loss):
        value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(student, teacher, 2.0)
        assert 0 < value < inf and all(jnp.isfinite(grad).all() for grad in grads)
    both = jnp.array([0.0, 1.0, -inf])
    for loss in (losses.jeffreys, losses.reverse_kl_loss, losses.jsd_loss, losses.skew_kl_loss):
        expected = loss(student[:2], both[:2], 2.0)
        np.testing.assert_allclose(loss(student, both, 2.0), expected, rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_the_bounds_of_the_mixtures(scale):
    student, teacher = scale * jnp.array([[5.0, -5.0], [-5.0, 5.0]])
    for alpha in (0.1, 0.9):
        bound = float(np.log(1 / alpha))
        assert 0 < losses.skew_kl_loss(student, teacher, 1.0, alpha) <= bound * (1 + 1e-6)
    np.testing.assert_allclose(losses.jsd_loss(student, teacher, 1.0), np.log(2.0), rtol=1e-3)


@pytest.mark.parametrize("beta", [0.0, 1.0, 1e-5])
def test_the_ends_of_the_jensen_shannon_divergence(beta):
    """TRL's convention: at 0 it is the forward divergence, to which JSD / beta tends there."""
    student, teacher, _ = map(jnp.float32, reference.examples(batch=8))
    end = losses.kd_loss if beta < 0.5 else losses.reverse_kl_loss
    # Up to a term of the order of beta times the square of the ratio of the probabilities.
    scale, rtol = (1, 0) if beta in (0, 1) else (beta, 2e-2)
    np.testing.assert_allclose(losses.jsd_loss(student, teacher, 2.0, beta) / scale, end(student, teacher, 2.0), rtol)


def test_a_traced_weight_of_the_mixture():
    student, teacher, _ = map(jnp.float32, reference.examples(batch=8))
    for loss in (losses.jsd_loss, losses.skew_kl_loss):
        np.testing.assert_allclose(
            jax.jit(loss)(student, teacher, 2.0, 0.3), loss(student, teacher, 2.0, 0.3), rtol=1e-6
        )


def test_skew_reverse_kl_is_the_exchange_of_both():
    student, teacher, _ = reference.examples()
    with jax.enable_x64(True):
        q, p = reference.probabilities(student, teacher, 2.0)
        found = losses.skew_kl_loss(jnp.asarray(teacher), jnp.asarray(student), 2.0, 0.3)
        np.testing.assert_allclose(found, 4 * reference.kl(p, 0.3 * p + 0.7 * q), rtol=1e-12)


def test_sigmoid_models_of_one_class_and_class_by_class():
    student, teacher, _ = map(jnp.float32, reference.examples(batch=8, num_classes=3))
    each = losses.bernoulli_kd_loss(student, teacher, 2.0, axis=())
    assert each.shape == (8, 3)
    np.testing.assert_allclose(each.sum(-1), losses.bernoulli_kd_loss(student, teacher, 2.0), rtol=1e-6)
    one = losses.bernoulli_kd_loss(student[:, :1], teacher[:, :1], 2.0)
    np.testing.assert_allclose(one, each[:, 0], rtol=1e-6)
    pair = (jnp.stack([z[:, 0], jnp.zeros(8)], -1) for z in (student, teacher))
    np.testing.assert_allclose(one, losses.kd_loss(*pair, 2.0), rtol=1e-6)


def test_a_constant_correlates_with_nothing():
    constant, other = (
        jnp.zeros((3, 4)),
        jnp.arange(12.0).reshape(3, 4) ** 2 / 20,
    )  # 1/4 for all: no sum of it is rounded
    value, grad = jax.jit(jax.value_and_grad(lambda s: losses.dist_loss(s, other).sum()))(constant)
    np.testing.assert_allclose(value, 3 * 2.0)  # 1 for each of the two parts
    assert jnp.isfinite(grad).all()


def test_standardized_logits():
    logits = jnp.float32(reference.examples(batch=4)[0])
    for dtype in (jnp.float32, jnp.bfloat16):
        found = losses.standardize_logits(logits.astype(dtype))
        assert found.dtype == dtype
        np.testing.assert_allclose(np.float32(found).mean(-1), 0.0, atol=2**-8)  # bfloat16 has 8 bits
        np.testing.assert_allclose(np.float32(found).std(-1), 1.0, atol=2**-8)
    np.testing.assert_allclose(
        losses.standardize_logits(1e4 * logits + 1e4), losses.standardize_logits(logits), atol=1e-5
    )
    # A constant has no direction to be stretched in: zeros, and no gradient.
    value, grad = jax.jit(jax.value_and_grad(lambda z: losses.standardize_logits(z)[0]))(jnp.full(5, 3.0))
    assert value == 0 and not grad.any()
    where = jnp.arange(10)[None] < 7
    np.testing.assert_allclose(
        losses.standardize_logits(logits.at[:, 8].set(jnp.nan), where=where)[:, :7],
        losses.standardize_logits(logits[:, :7]),
        rtol=1e-5,
        atol=1e-6,
    )


def test_soft_labels_and_smooth_ones_are_those_of_optax():
    """A teacher that is a table of probabilities: Optax's cross-entropy, of which KL differs by a constant."""
    student, teacher, labels = map(jnp.asarray, reference.examples(batch=8))
    student, soft = jnp.float32(student), jax.nn.softmax(jnp.float32(teacher))
    grad = jax.grad(lambda s: optax.losses.softmax_cross_entropy(s, soft).sum())(student)
    of_kd = jax.grad(lambda s: losses.kd_loss(s, jnp.log(soft), 1.0).sum())(student)
    np.testing.assert_allclose(grad, of_kd, atol=1e-6)
    smooth = optax.smooth_labels(jax.nn.one_hot(labels, 10), 0.1)
    expected = -(smooth * jax.nn.log_softmax(student)).sum(-1)
    np.testing.assert_allclose(optax.losses.softmax_cross_entropy(student, smooth), expected, rtol=1e-6)
