"""Distillation losses in Optax's conventions: one value per example, no reduction, safe for any finite logits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dot_optax._checks import check_scalar, is_number

__all__ = ["kd_loss"]


def kd_loss(
    student_logits: jax.typing.ArrayLike,
    teacher_logits: jax.typing.ArrayLike,
    temperature: Any = 4.0,
    *,
    axis: int | tuple[int, ...] = -1,
    where: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    r"""The distillation loss: how far the student's softened predictions are from the teacher's.

    .. math::
        T^2 \, \mathrm{KL}(q \,\|\, p) = T^2 \sum_c q_c (\log q_c - \log p_c), \qquad
        q = \mathrm{softmax}(z_{teacher} / T), \quad p = \mathrm{softmax}(z_{student} / T)

    The factor :math:`T^2` keeps the size of the gradient comparable between temperatures. Logits of less than 32 bits
    are promoted to float32 inside, since the two logarithms nearly cancel; the result has the dtype of the logits.
    Gradients flow into both arguments: use `jax.lax.stop_gradient` on a teacher that is part of the parameters.

    Args:
        student_logits: unnormalised log probabilities, of shape `[..., num_classes]`.
        teacher_logits: the teacher's, of the same shape.
        temperature: :math:`T > 0`.
        axis: the axis, or axes, of the classes.
        where: which classes to include, of a shape that broadcasts to the logits. The others have no probability; at
            least one must be included.

    Returns:
        The loss of each example in nats, of shape `[...]`.

    Raises:
        ValueError: if the shapes differ, or `temperature` is a Python number that is not positive and finite.
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
    student_logits, teacher_logits = _check_logits(student_logits, teacher_logits)
    _check_temperature(temperature)
    dtype = jnp.result_type(student_logits, teacher_logits)
    compute_dtype = jnp.promote_types(dtype, jnp.float32)

    def log_softmax(logits: jax.Array) -> jax.Array:
        log_probs = jax.nn.log_softmax(logits.astype(compute_dtype) / temperature, axis=axis, where=where)
        # Outside `where` they are -inf, and -inf - -inf would poison the gradient although it is not summed.
        return log_probs if where is None else jnp.where(where, log_probs, 0.0)

    log_p, log_q = log_softmax(student_logits), log_softmax(teacher_logits)
    kl = optax.losses.kl_divergence_with_log_targets(log_p, log_q, axis=axis, where=where)
    return (temperature**2 * kl).astype(dtype)


def _check_logits(student: Any, teacher: Any) -> tuple[jax.Array, jax.Array]:
    arrays = []
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if not jnp.issubdtype(jnp.result_type(logits), jnp.floating):
            raise TypeError(f"{name} must be real floating point numbers, got {jnp.result_type(logits)}")
        arrays.append(jnp.asarray(logits))
    if np.shape(student) != np.shape(teacher):
        shapes = f"{np.shape(student)} and {np.shape(teacher)}"
        raise ValueError(f"student_logits and teacher_logits must have the same shape, got {shapes}")
    return arrays[0], arrays[1]


def _check_temperature(temperature: Any) -> None:
    check_scalar("temperature", temperature, 0)
    if is_number(temperature) and temperature == 0:
        raise ValueError("temperature must be greater than 0")
