"""Divergences between the predictions of student and teacher."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dot_optax._checks import _check_scalar, _describe, _kind


def kd_loss(
    student_logits: jax.typing.ArrayLike,
    teacher_logits: jax.typing.ArrayLike,
    temperature: jax.typing.ArrayLike = 4.0,
    *,
    axis: int | tuple[int, ...] = -1,
    where: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    r"""The distillation loss: how far the student's softened predictions are from the teacher's.

    .. math::
        T^2 \, \mathrm{KL}(q \,\|\, p) = T^2 \sum_c q_c (\log q_c - \log p_c), \qquad
        q = \mathrm{softmax}(z_{teacher} / T), \quad p = \mathrm{softmax}(z_{student} / T)

    The factor :math:`T^2` keeps the size of the gradient comparable between temperatures. The difference of the two
    logarithms cancels where the student is close to the teacher, so what is summed is

    .. math::
        \mathrm{KL}(q \,\|\, p) = \sum_c q_c \, (e^{d_c} - 1 - d_c), \qquad d_c = \log p_c - \log q_c

    which is the same, since :math:`\sum_c q_c e^{d_c} = \sum_c p_c = 1`, and of which no term is negative. Logits of
    less than 32 bits are promoted to float32 inside; the result has the dtype of the logits. Gradients flow into both
    arguments: use `jax.lax.stop_gradient` on a teacher that is part of the parameters.

    Args:
        student_logits: unnormalised log probabilities, of shape `[..., num_classes]`.
        teacher_logits: the teacher's, of the same shape. A class at minus infinity is one that the teacher excludes: it
            adds nothing to the sum over :math:`q`. Where the student alone excludes a class, the loss is infinite.
        temperature: :math:`T > 0`.
        axis: the axis, or axes, of the classes.
        where: which classes to include, of a shape that broadcasts to the logits. The others have no probability; at
            least one must be included.

    Returns:
        The loss of each example in nats, of shape `[...]`.

    Raises:
        ValueError: if the shapes differ, `where` is not of bools or does not fit them, there are fewer than two classes,
            or `temperature` is a Python number that is not positive and finite.
        TypeError: if the logits are not real floating point numbers, or `temperature` is not a scalar.

    Example:
        >>> import jax.numpy as jnp, dot_optax
        >>> student = jnp.array([[0.0, 0.0], [2.0, 0.0]])
        >>> teacher = jnp.array([[2.0, 0.0], [2.0, 0.0]])
        >>> print(dot_optax.losses.kd_loss(student, teacher, temperature=1.0).round(4))
        [0.3278 0.    ]

    References:
        Hinton et al., `Distilling the Knowledge in a Neural Network <https://arxiv.org/abs/1503.02531>`_, 2015.
    """
    student_logits, teacher_logits = _check_logits(student_logits, teacher_logits, axis)
    _check_scalar("temperature", temperature, float(jnp.finfo(jnp.float32).tiny))
    if where is not None:
        where = jnp.asarray(where)
        if where.dtype != bool:
            raise ValueError(f"where must be bools, got {_describe(where)}")
        where = jnp.broadcast_to(where, student_logits.shape)
    # Not jnp.promote_types, which the strict mode of JAX's type promotion forbids for 16 bits.
    dtype = max(student_logits.dtype, teacher_logits.dtype, key=lambda dtype: jnp.finfo(dtype).bits)
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    temperature = jnp.asarray(temperature, wide)
    kl = _kl_divergence(student_logits.astype(wide), teacher_logits.astype(wide), temperature, axis, where)
    return (temperature**2 * kl).astype(dtype)


@functools.partial(
    jax.jit, static_argnames="axis"
)  # as jax.nn has it: some forty operations, one by one, would be slow
def _kl_divergence(student: Any, teacher: Any, temperature: Any, axis: Any, where: Any) -> jax.Array:
    """KL(q || p) of `teacher` to `student`, two arrays of logits, as exact as their differences are."""
    if where is not None:
        student, teacher = (jnp.where(where, logits, -jnp.inf) for logits in (student, teacher))
    # The teacher's largest logit is taken from all, so that large logits lose nothing: their differences count.
    top = jax.lax.stop_gradient(jnp.max(teacher, axis=axis, keepdims=True))
    excluded = teacher == -jnp.inf
    difference = (jnp.where(excluded, 0.0, student) - jnp.where(excluded, 0.0, teacher)) / temperature

    def softened(logits: jax.Array) -> jax.Array:
        infinite = logits == -jnp.inf  # divided by the temperature, it would make its gradient NaN
        return jnp.where(infinite, -jnp.inf, jnp.where(infinite, 0.0, logits - top) / temperature)

    student, teacher = softened(student), softened(teacher)
    log_z = jax.nn.logsumexp(teacher, axis=axis, keepdims=True)
    q = jnp.exp(teacher - log_z)

    def compared(log_ratio: jax.Array) -> tuple[jax.Array, ...]:
        """p; where log(p / q) is near 0; and this logarithm there, and where it is not."""
        log_p_q, p = difference - log_ratio, jnp.exp(student - log_z - log_ratio)
        near = (jnp.abs(log_p_q) < 0.5) & ~excluded
        return p, near, jnp.where(near, log_p_q, 0.0), jnp.where(near, 0.0, log_p_q)

    # The logarithm of the ratio of both normalisers, and one Newton step towards sum(p) = sum(q), which makes its
    # rounding as small as the differences of the logits. In exact arithmetic the step is 0, and so are its gradients.
    log_ratio = jax.nn.logsumexp(student, axis=axis, keepdims=True) - log_z
    p, near, small, _ = compared(log_ratio)
    excess = jnp.sum(jnp.where(near, q * jnp.expm1(small), p - q), axis=axis, keepdims=True)
    p, near, small, large = compared(log_ratio + jax.lax.stop_gradient(jnp.log1p(excess)))
    far = p - jnp.where(excluded, 0.0, q * (1 + large))
    return jnp.sum(jnp.where(near, q * _exp_minus_1_minus_x(small), far), axis=axis)


def _exp_minus_1_minus_x(x: jax.Array) -> jax.Array:
    """:math:`e^x - 1 - x` for |x| < 0.5 by its series, whose terms after these are below 2e-16 of it."""
    series = jnp.ones_like(x)
    for k in range(14, 2, -1):
        series = 1 + x * series / k
    return x * x / 2 * series


def _check_logits(student: Any, teacher: Any, axis: int | tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if _kind(logits) is not jnp.floating or not hasattr(logits, "dtype"):
            raise TypeError(f"{name} must be an array of real floating point numbers, got {_describe(logits)}")
    examples = jax.eval_shape(functools.partial(jnp.sum, axis=axis), student)
    if student.shape != teacher.shape or 0 < student.size < 2 * examples.size:
        raise ValueError(
            "student_logits and teacher_logits must have the same shape [..., num_classes], with two classes or more, "
            f"got {student.shape} and {teacher.shape}"
        )
    return jnp.asarray(student), jnp.asarray(teacher)
