"""Distillation losses in Optax's conventions: one value per example, no reduction, safe for any finite logits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dot_optax._checks import _check_scalar, _describe, _is_number

__all__ = ["kd_loss"]


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
        ValueError: if the shapes differ, `where` does not fit them, or `temperature` is a Python number that is not
            positive and finite.
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
    dtype = jnp.result_type(student_logits, teacher_logits)
    compute_dtype = jnp.float64 if dtype == jnp.float64 else jnp.float32
    temperature = jnp.asarray(_check_temperature(temperature), compute_dtype)
    where = _check_where(where, student_logits.shape)

    def log_softmax(logits: jax.Array) -> jax.Array:
        log_probs = jax.nn.log_softmax(logits.astype(compute_dtype) / temperature, axis=axis, where=where)
        # Outside `where` they are -inf, whose difference is NaN; two equal logarithms add nothing to the divergence.
        return log_probs if where is None else jnp.where(where, log_probs, 0.0)

    log_p, log_q = log_softmax(student_logits), log_softmax(teacher_logits)
    kl = optax.losses.kl_divergence_with_log_targets(log_p, log_q, axis=axis)
    return (temperature**2 * kl).astype(dtype)


def _check_logits(student: Any, teacher: Any) -> tuple[jax.Array, jax.Array]:
    arrays = []
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        try:
            array = jnp.asarray(logits)
        except (TypeError, ValueError):
            raise TypeError(f"{name} must be an array, got {_describe(logits)}") from None
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be real floating point numbers, got {array.dtype}")
        arrays.append(array)
    shapes = [array.shape for array in arrays]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise ValueError(
            "student_logits and teacher_logits must have the same shape [..., num_classes], got "
            f"{shapes[0]} and {shapes[1]}"
        )
    return arrays[0], arrays[1]


def _check_temperature(temperature: Any) -> Any:
    _check_scalar("temperature", temperature, 0)
    if _is_number(temperature) and temperature == 0:
        raise ValueError("temperature must be greater than 0")
    return temperature


def _check_where(where: Any, shape: tuple[int, ...]) -> jax.Array | None:
    if where is None:
        return None
    try:
        array = jnp.asarray(where)
        if array.dtype == bool and np.broadcast_shapes(array.shape, shape) == shape:
            return array
    except (TypeError, ValueError):
        pass
    raise ValueError(f"where must be bools of a shape that broadcasts to {shape}, got {_describe(where)}")
