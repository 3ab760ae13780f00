"""The losses of large vocabularies; `test_losses.py` has what these share with the other losses of logits."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dot_optax import losses

KEYS = jax.random.split(jax.random.key(0), 4)
BATCH, LENGTH, WIDTH, TEACHER_WIDTH, VOCABULARY = 2, 3, 8, 6, 50
FEATURES = jax.random.normal(KEYS[0], (BATCH, LENGTH, WIDTH))
KERNEL = jax.random.normal(KEYS[1], (WIDTH, VOCABULARY))
TEACHER_FEATURES = jax.random.normal(KEYS[2], (BATCH, LENGTH, TEACHER_WIDTH))
TEACHER_KERNEL = jax.random.normal(KEYS[3], (TEACHER_WIDTH, VOCABULARY))
STUDENT, TEACHER = FEATURES @ KERNEL, TEACHER_FEATURES @ TEACHER_KERNEL
WEIGHTS = jnp.arange(1.0, 1 + BATCH * LENGTH).reshape(BATCH, LENGTH)


def whole(temperature, features, kernel, teacher_features, teacher_kernel):
    return (WEIGHTS * losses.kd_loss(features @ kernel, teacher_features @ teacher_kernel, temperature)).sum()


def chunked(chunk_size, temperature, features, kernel, teacher_features, teacher_kernel):
    kernels = {"student_kernel": kernel, "teacher_kernel": teacher_kernel}
    values = losses.chunked_kd_loss(features, teacher_features, temperature, chunk_size=chunk_size, **kernels)
    return (WEIGHTS * values).sum()


@pytest.mark.parametrize("chunk_size", [7, 25, 100])
def test_chunks_give_the_value_and_the_gradients_of_the_whole(chunk_size):
    """Where the size divides the vocabulary, where it does not, and where it is larger."""
    arguments = (2.0, FEATURES, KERNEL, TEACHER_FEATURES, TEACHER_KERNEL)
    expected = jax.jit(jax.value_and_grad(whole, argnums=range(5)))(*arguments)
    run = jax.jit(jax.value_and_grad(functools.partial(chunked, chunk_size), argnums=range(5)))
    for actual, of_whole in zip(jax.tree.leaves(run(*arguments)), jax.tree.leaves(expected), strict=True):
        # Sums of 50 terms in another order: 6e-8 of the largest, in the derivative in T of terms that cancel.
        np.testing.assert_allclose(actual, of_whole, rtol=1e-4, atol=1e-5)


def test_logits_on_one_side_features_on_the_other():
    found = losses.chunked_kd_loss(FEATURES, TEACHER, 2.0, student_kernel=KERNEL, chunk_size=8)
    np.testing.assert_allclose(found, losses.kd_loss(STUDENT, TEACHER, 2.0), rtol=1e-5)
    found = losses.chunked_kd_loss(STUDENT, TEACHER_FEATURES, 2.0, teacher_kernel=TEACHER_KERNEL, chunk_size=8)
    np.testing.assert_allclose(found, losses.kd_loss(STUDENT, TEACHER, 2.0), rtol=1e-5)


def test_second_derivatives_of_chunks():
    def direction(loss):
        return jax.jit(jax.grad(lambda s: jnp.vdot(jax.grad(lambda s: loss(s).sum())(s), FEATURES @ KERNEL)))

    chunks = direction(lambda s: losses.chunked_kd_loss(s, TEACHER, 2.0, chunk_size=20))
    expected = direction(lambda s: losses.kd_loss(s, TEACHER, 2.0))(STUDENT)
    # Second derivatives are sums of products of 50 rounded probabilities.
    np.testing.assert_allclose(chunks(STUDENT), expected, rtol=1e-4, atol=1e-5)


def test_features_of_padding_may_be_anything():
    is_token = jnp.arange(BATCH * LENGTH).reshape(BATCH, LENGTH, 1) % 3 > 0

    def total(features, kernel):
        kernels = {"student_kernel": kernel, "teacher_kernel": TEACHER_KERNEL}
        values = losses.chunked_kd_loss(features, TEACHER_FEATURES, chunk_size=20, where=is_token, **kernels)
        return values.sum()

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    expected, found = run(FEATURES, KERNEL), run(jnp.where(is_token, FEATURES, jnp.nan), KERNEL)
    for actual, of_numbers in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(actual, of_numbers)
    assert not jnp.where(is_token, 0.0, found[1][0]).any()


def test_a_token_that_no_one_can_say():
    """A vocabulary that is filled up with logits of minus infinity, in chunks that hold nothing else."""
    filled = jnp.pad(STUDENT, [(0, 0), (0, 0), (0, 14)], constant_values=-jnp.inf)
    teacher = jnp.pad(TEACHER, [(0, 0), (0, 0), (0, 14)], constant_values=-jnp.inf)
    run = jax.jit(jax.value_and_grad(lambda s: losses.chunked_kd_loss(s, teacher, 2.0, chunk_size=8).sum()))
    value, grad = run(filled)
    np.testing.assert_allclose(value, losses.kd_loss(STUDENT, TEACHER, 2.0).sum(), rtol=1e-5)
    assert jnp.isfinite(grad).all() and not grad[..., VOCABULARY:].any()


@pytest.mark.parametrize("with_kernels", [False, True])
def test_chunks_never_hold_all_logits_in_float32(with_kernels):
    """The figures of SmolLM2: 49,152 tokens, a width of 576."""
    tokens, width, vocabulary = (1, 256), 576, 49_152
    logits = jax.ShapeDtypeStruct((*tokens, vocabulary), jnp.float32)
    features, kernel = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((*tokens, width), (width, vocabulary)))

    def temporary(loss, *arguments):
        step = jax.jit(jax.value_and_grad(lambda *args: loss(*args).mean()))
        found = step.lower(*arguments).compile().memory_analysis()
        return found.temp_size_in_bytes / (4 * np.prod(logits.shape))

    if with_kernels:
        plain = temporary(lambda f, t, k: losses.kd_loss(f @ k, t @ k, 2.0), features, features, kernel)
        in_chunks = temporary(
            lambda f, t, k: losses.chunked_kd_loss(f, t, 2.0, student_kernel=k, teacher_kernel=k),
            *(features, features, kernel),
        )
    else:
        plain = temporary(lambda s, t: losses.kd_loss(s, t, 2.0), logits, logits)
        in_chunks = temporary(lambda s, t: losses.chunked_kd_loss(s, t, 2.0), logits, logits)
    # Besides arguments and results; in units of the logits. A chunk is a twelfth of them.
    assert plain > 2 and in_chunks < 1


def known(k, temperature=2.0):
    return jax.lax.top_k(jax.nn.log_softmax(TEACHER / temperature), k)


def test_a_teacher_known_by_all_its_tokens_is_the_teacher():
    expected = losses.kd_loss(STUDENT, TEACHER, 2.0)
    for remainder in ("other", "zero"):
        found = losses.top_k_kd_loss(STUDENT, *known(VOCABULARY), 2.0, remainder=remainder)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_more_tokens_tell_more():
    @jax.jit
    def all_of_them(student):
        by_k = [losses.top_k_kd_loss(student, *known(k), 2.0) for k in (1, 2, 10, 49)]
        return [*by_k, losses.kd_loss(student, TEACHER, 2.0)]

    for less, more in itertools.pairwise(all_of_them(STUDENT)):
        assert (less <= more * (1 + 1e-5)).all()
    equal = jax.jit(jax.value_and_grad(lambda s: losses.top_k_kd_loss(s, *known(5), 2.0).sum()))(TEACHER)
    # The rest is 1 - sum(q), rounded to 6e-8 of 1, and so a difference of about 1e-6 of itself.
    np.testing.assert_allclose(equal[0], 0.0, atol=1e-9)
    np.testing.assert_allclose(equal[1], 0.0, atol=1e-6)


def test_no_remainder_is_a_teacher_that_excludes_all_others():
    log_probs, indices = known(5)
    excluded = jnp.full_like(TEACHER, -jnp.inf)
    excluded = jnp.put_along_axis(excluded, indices, 2.0 * log_probs, -1, inplace=False)
    found = losses.top_k_kd_loss(STUDENT, log_probs, indices, 2.0, remainder="zero")
    np.testing.assert_allclose(found, losses.kd_loss(STUDENT, excluded, 2.0), rtol=1e-5)


def test_a_cache_in_float16():
    """Its probabilities can add up to more than 1: then nothing remains, and nothing is NaN."""
    log_probs, indices = known(VOCABULARY - 1)
    for shift in (-1e-3, 0.0, 1e-3):
        rounded = jnp.float16(log_probs + shift)
        value, grad = jax.jit(
            jax.value_and_grad(lambda s, known=rounded: losses.top_k_kd_loss(s, known, indices, 2.0).sum())
        )(STUDENT)
        # float16 keeps 11 bits of logarithms of up to 10: 5e-3.
        np.testing.assert_allclose(value, losses.kd_loss(STUDENT, TEACHER, 2.0).sum(), rtol=2e-2)
        assert jnp.isfinite(grad).all()


@pytest.mark.parametrize("given", ["features", "logits"])
def test_chunks_in_a_shard_map(given):
    """With its checks of what varies over the devices: a kernel does not, features and logits do."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    rows, everywhere = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def of_features(kernel, features, teacher):
        return losses.chunked_kd_loss(features, teacher, student_kernel=kernel, chunk_size=20).mean()

    def of_logits(offset, features, teacher):
        return losses.chunked_kd_loss(features @ KERNEL + offset[None, None], teacher, chunk_size=20).mean()

    loss, argument = {"features": (of_features, KERNEL), "logits": (of_logits, jnp.zeros(VOCABULARY))}[given]

    def step(argument, features, teacher):
        return jax.value_and_grad(lambda a: jax.lax.pmean(loss(a, features, teacher), "data"))(argument)

    sharded = jax.shard_map(step, mesh=mesh, in_specs=(everywhere, rows, rows), out_specs=(everywhere, everywhere))
    found = jax.block_until_ready(jax.jit(sharded)(argument, FEATURES, TEACHER))
    expected = jax.jit(jax.value_and_grad(loss))(argument, FEATURES, TEACHER)
    for actual, of_one in zip(found, expected, strict=True):
        # The mean of two means, in float32.
        np.testing.assert_allclose(actual, of_one, rtol=1e-5, atol=1e-6)


def test_indices_of_padding_may_be_anything():
    log_probs, indices = known(5)
    is_token = jnp.arange(LENGTH)[None, :, None] < 2
    expected = losses.top_k_kd_loss(STUDENT, log_probs, indices, 2.0)
    found = losses.top_k_kd_loss(
        jnp.where(is_token, STUDENT, jnp.nan),
        jnp.where(is_token, log_probs, jnp.nan),
        jnp.where(is_token, indices, -100),
        2.0,
        where=jnp.broadcast_to(is_token, (BATCH, LENGTH, 1)),
    )
    np.testing.assert_allclose(found, jnp.where(is_token[..., 0], expected, 0.0), rtol=1e-6)
