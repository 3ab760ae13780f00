"""The distillation loss for large vocabularies: of a teacher's likeliest tokens, and without logits of all tokens at once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dot_optax._checks import _check_scalar
from dot_optax.losses import _logits
from dot_optax.losses._logits import Array


def top_k_kd_loss(
    student_logits: Array, teacher_log_probs: Array, teacher_indices: Array, temperature: Array, *,
    remainder: str = "other", where: Any = None
) -> jax.Array:  # fmt: skip
    r"""`kd_loss` of a teacher that is known by its k likeliest tokens, as a cache on disk has them.

    .. math::
        T^2 \Big( \sum_{c \in K} q_c \log \frac{q_c}{p_c} + q_r \log \frac{q_r}{p_r} \Big), \qquad
        q_r = 1 - \sum_{c \in K} q_c, \quad p_r = \sum_{c \notin K} p_c

    All tokens outside :math:`K` are one more class: only its probability as a whole is compared. So the loss is never
    above that of the full distributions, it is equal for :math:`k` = all, and a student that equals its teacher has none.
    A cache belongs to one temperature: one of `jax.nn.log_softmax(teacher_logits)` can only be used with 1. With `remainder="zero"` the teacher's probabilities of :math:`K` are scaled to a sum of 1 and the
    others are 0: then the student learns to be surer than the teacher is.

    Args:
        student_logits: unnormalised log probabilities, of shape `[..., vocabulary]`.
        teacher_log_probs: :math:`\log q_c` of the k likeliest tokens, of shape `[..., k]`: the first result of
            `jax.lax.top_k(jax.nn.log_softmax(teacher_logits / temperature), k)`.
        teacher_indices: which tokens these are, distinct integers of the same shape: its second result.
        temperature: :math:`T > 0`. Language models are usually distilled at 1, where the factor is 1, too.
        remainder: what becomes of the probability outside: `"other"` or `"zero"`. Where rounding makes the sum of the
            given ones exceed 1, they are scaled down and nothing remains.
        where: which examples to include, bools that broadcast to `[..., 1]`: `is_token[..., None]` for padding, where
            all else may hold anything. The others have a loss of 0 and no gradient.

    Returns:
        The loss of each token in nats, of shape `[...]`.

    Raises:
        ValueError: as `kd_loss`, if the shapes do not fit together, or if there is no such `remainder`.
        TypeError: as `kd_loss`, or if the indices are not integers.

    Example:
        >>> import jax, jax.numpy as jnp, dot_optax
        >>> student, teacher = jnp.array([1.0, 1.0, 0.0, 0.0]), jnp.array([3.0, 1.0, 0.0, 0.0])
        >>> log_probs, indices = jax.lax.top_k(jax.nn.log_softmax(teacher), 2)
        >>> loss = dot_optax.losses.top_k_kd_loss(student, log_probs, indices, temperature=1.0)
        >>> print(f'{loss:.4f} of {dot_optax.losses.kd_loss(student, teacher, temperature=1.0):.4f}')
        0.4150 of 0.4150

    References:
        Anshumann et al., `Sparse Logit Sampling <https://arxiv.org/abs/2503.16870>`_, 2025, who compare both ways and
        call the further class a ghost token.
    """
    if remainder not in ("other", "zero"):
        raise ValueError(f"remainder must be 'other' or 'zero', got {remainder!r}")
    found = _logits._checked(student_logits, student_logits, temperature, -1, None)
    included = _logits._included(where, (*found.student.shape[:-1], 1))
    known, wide = jnp.asarray(teacher_log_probs), found.student.dtype
    if known.shape[:-1] != found.student.shape[:-1] or known.shape != jnp.shape(teacher_indices):
        wanted = f"must have the same shape [..., k] beside logits of shape {found.student.shape}, got {known.shape}"
        raise ValueError(f"teacher_log_probs and teacher_indices {wanted} and {jnp.shape(teacher_indices)}")
    teacher_indices = jnp.where(included, teacher_indices, jnp.arange(known.shape[-1])[(None,) * (known.ndim - 1)])
    outside = jnp.put_along_axis(found.where, teacher_indices, False, axis=-1, inplace=False)
    any_outside = jnp.any(outside, -1, keepdims=True)
    student = jnp.where(included, found.student, 0.0) / found.temperature
    of_rest = jax.nn.logsumexp(jnp.where(outside | ~any_outside, student, -jnp.inf), axis=-1, keepdims=True)
    known = jnp.where(included, known.astype(wide), -jnp.inf)
    left = 1 - jnp.sum(jnp.exp(known), -1, keepdims=True)
    left = jnp.where(any_outside & (left > 0) & (remainder == "other"), left, 0.0)
    student = jnp.concatenate([jnp.take_along_axis(student, teacher_indices, -1), of_rest], -1)
    log_left = jnp.where(left > 0, jnp.log(jnp.where(left > 0, left, 1.0)), -jnp.inf)
    teacher = jnp.concatenate([known, log_left], -1)
    counted = jnp.concatenate([jnp.broadcast_to(included, known.shape), included & any_outside], -1)
    return found.result(_logits._sum_of_terms(_logits._kl_terms, student, teacher, jnp.ones((), wide), -1, counted))


def chunked_kd_loss(
    student: Array, teacher: Array, temperature: Array = 4.0, *,
    student_kernel: Array | None = None, teacher_kernel: Array | None = None, chunk_size: int = 4096, where: Any = None
) -> jax.Array:  # fmt: skip
    r"""`kd_loss` over a large vocabulary, a chunk of which is in memory at a time.

    .. math::
        T^2 \, \mathrm{KL}(q \,\|\, p), \qquad
        q = \mathrm{softmax}(h_{teacher} W_{teacher} / T), \quad p = \mathrm{softmax}(h_{student} W_{student} / T)

    With kernels, logits of `[batch, length, vocabulary]` are never formed, neither forward nor backward; of logits that
    are given no copy in float32 is made (but by the CPU's compiler, for logits of 16 bits; `python -m
    benchmarks.vocabulary` prints the memory). The value takes two passes over the chunks, one for the normalisers and one
    for the loss, and the gradient one more, in which the logits of a chunk are computed again. Value and gradients are
    those of `kd_loss`, in all arguments, but for rounding where all logits have a large offset in common: `kd_loss`
    takes it out before it divides by T, and this does not. Forward-mode differentiation (`jax.jvp`, `jax.hessian`) is not possible.

    Args:
        student: with `student_kernel` the features before the output layer, of shape `[..., width]`; else the logits, of
            shape `[..., vocabulary]`.
        teacher: the teacher's, likewise; its width may differ.
        temperature: :math:`T > 0`. Language models are usually distilled at 1, where the factor is 1, too.
        student_kernel: the weights of the output layer, of shape `[width, vocabulary]`: a transposed embedding where the
            two are tied. For a bias, append it to the kernel as a row, and a 1 to the features.
        teacher_kernel: the teacher's, likewise.
        chunk_size: how many tokens of the vocabulary to take at a time; it need not divide their number.
        where: which examples to include, bools that broadcast to `[..., 1]`: `is_token[..., None]` for padding, whose
            features may hold anything, even NaN. The others have a loss of 0 and no gradient.

    Returns:
        The loss of each token in nats, of shape `[...]`.

    Raises:
        ValueError: if vocabularies or leading axes differ, a kernel does not fit its features, `chunk_size` is below 1,
            or as `kd_loss`.
        TypeError: as `kd_loss`.

    Example:
        >>> import jax, jax.numpy as jnp, dot_optax
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> features, teacher = jax.random.normal(keys[0], (2, 8)), jax.random.normal(keys[1], (2, 1000))
        >>> kernel = jax.random.normal(keys[2], (8, 1000))
        >>> loss = dot_optax.losses.chunked_kd_loss(features, teacher, student_kernel=kernel, chunk_size=256)
        >>> print(jnp.allclose(loss, dot_optax.losses.kd_loss(features @ kernel, teacher)))
        True

    References:
        Hsu et al., `Liger Kernel <https://arxiv.org/abs/2410.10989>`_, 2024, which chunks over the tokens of the text.
    """
    _check_scalar("chunk_size", chunk_size, 1)
    _logits._check_temperature(temperature)
    pairs = ((student, student_kernel), (teacher, teacher_kernel))
    for name, (x, kernel) in zip(("student", "teacher"), pairs, strict=True):
        if kernel is not None and (jnp.ndim(kernel) != 2 or jnp.shape(x)[-1:] != jnp.shape(kernel)[:1]):
            wanted = f"[width, vocabulary] for features of shape {jnp.shape(x)}"
            raise ValueError(f"{name}_kernel must have the shape {wanted}, got {jnp.shape(kernel)}")
    operands = [(None, x) if kernel is None else (jnp.asarray(x), kernel) for x, kernel in pairs]
    logits = [jax.eval_shape(_output, *operand) for operand in operands]
    _logits._check_logits(logits[0], logits[1], -1)
    included = _logits._included(where, (*logits[0].shape[:-1], 1))
    dtype, wide = _logits._dtypes(*logits)
    temperature = jnp.asarray(temperature, wide)
    features = [None if x is None else jnp.where(included, x, 0) for x, _ in operands]
    cut = [jnp.asarray(last) for _, last in operands]
    kl = _chunked_kl(min(chunk_size, logits[0].shape[-1]), included, [temperature, *features], cut)
    return (temperature**2 * kl[..., 0]).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_kl(size: int, included: jax.Array, whole: Any, cut: Any) -> Any:
    """KL(q || p) of each token, of shape [..., 1].

    `whole` is the temperature with the features of student and teacher, None where there are logits; `cut` is the arrays
    whose last axis is the vocabulary: their kernels or logits.
    """
    return _chunked_forward(size, included, whole, cut)[0]


def _chunked_forward(size: int, included: jax.Array, whole: Any, cut: Any) -> Any:
    def normalise(log_z: Any, start: Any, counted: Any, parts: Any) -> Any:
        soft = _soften_chunk(counted, whole, parts)
        return [jnp.logaddexp(z, jax.nn.logsumexp(x, -1, keepdims=True)) for z, x in zip(log_z, soft, strict=False)]

    def add(kl: Any, start: Any, counted: Any, parts: Any) -> Any:
        return kl + _kl_of_chunk(counted, log_z, zero, whole, parts)

    # Of something that varies over the devices of a `shard_map` where the operands do, as what is added to it will.
    first = [_output(x, last[..., :1]) for x, last in zip(whole[1:], cut, strict=True)]
    zero = jnp.zeros_like(included & (first[0] == first[1]), whole[0].dtype)
    log_z = _scan_chunks(size, included, cut, normalise, [zero - jnp.inf] * 2)
    kl = _scan_chunks(size, included, cut, add, zero)
    return kl, (included, whole, cut, log_z, kl)


def _chunked_backward(size: int, residuals: Any, cotangent: jax.Array) -> Any:
    included, whole, cut, log_z, kl = residuals

    def add(grads: Any, start: Any, counted: Any, parts: Any) -> Any:
        def add_part(total: Any, part: Any) -> Any:
            part = part + jax.lax.dynamic_slice_in_dim(total, start, size, -1)
            return jax.lax.dynamic_update_slice_in_dim(total, part, start, -1)

        of_chunk = functools.partial(_kl_of_chunk, counted, log_z, kl)
        for_whole, for_parts = jax.vjp(of_chunk, whole, parts)[1](cotangent)
        return jax.tree.map(jnp.add, grads[0], for_whole), jax.tree.map(add_part, grads[1], for_parts)

    # What every chunk adds to is summed in float32.
    zeros = optax.tree.zeros_like(whole, kl.dtype), optax.tree.zeros_like(cut)
    return None, *optax.tree.cast_like(_scan_chunks(size, included, cut, add, zeros), (whole, cut))


_chunked_kl.defvjp(_chunked_forward, _chunked_backward)


def _scan_chunks(size: int, included: jax.Array, cut: Any, add: Callable[..., Any], init: Any) -> Any:
    """Adds up over ranges of the vocabulary; the last one begins earlier where the size does not divide it.

    `add` is given the total, where the range begins, which of its tokens count, and the arrays cut to the range.
    """
    vocabulary = cut[0].shape[-1]

    def step(total: Any, first: jax.Array) -> tuple[Any, None]:
        start = jnp.minimum(first, vocabulary - size)
        new = jnp.expand_dims(start + jnp.arange(size) >= first, range(included.ndim - 1))
        parts = [jax.lax.dynamic_slice_in_dim(x, start, size, -1) for x in cut]
        return add(total, start, included & new, parts), None

    return jax.lax.scan(step, init, jnp.arange(0, vocabulary, size))[0]


def _kl_of_chunk(counted: jax.Array, log_z: Any, kl: jax.Array, whole: Any, parts: Any) -> jax.Array:
    """The chunk's part of KL(q || p), less `kl` times its part of sum(q).

    With normalisers and `kl` as constants, the gradient of this is that of KL(q || p): the derivative of KL(q || p) is
    0 in the logarithm of the student's normaliser, and minus `kl` in that of the teacher's.
    """
    student, teacher, difference = _soften_chunk(counted, whole, parts)
    q, p = jnp.exp(teacher - log_z[1]), jnp.exp(student - log_z[0])
    return jnp.sum(_logits._kl_terms(q, p, difference - (log_z[0] - log_z[1])) - kl * q, axis=-1, keepdims=True)


def _soften_chunk(counted: jax.Array, whole: Any, parts: Any) -> Any:
    temperature, *features = whole
    student, teacher = (_output(*pair).astype(temperature.dtype) for pair in zip(features, parts, strict=True))
    return _logits._soften(student, teacher, temperature, -1, counted, top=0.0)


def _output(features: jax.Array | None, last: jax.Array) -> jax.Array:
    return last if features is None else jnp.matmul(features, last)
