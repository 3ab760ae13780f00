"""Distances between the features of student and teacher; `_contrastive.py` has the one that needs a memory."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dot_optax._checks import _describe, _kind
from dot_optax.losses._logits import _dtypes, _unit


def feature_loss(
    student_features: ArrayLike, teacher_features: ArrayLike, *, axis: Any = -1, where: Any = None
) -> jax.Array:
    r"""How far the student's features are from the teacher's: the hint loss of FitNets.

    .. math::
        \frac{1}{C} \sum_c (s_c - t_c)^2

    Where the student is narrower than the teacher, it needs a projector: parameters that only this loss reaches, which
    are thrown away after training. `dot` gives them the mean momentum when it is told so with `reached`. Features of less
    than 32 bits are promoted to float32 inside; the result has the dtype of the features. Gradients flow into both
    arguments: use `jax.lax.stop_gradient` on a teacher that is part of the parameters.

    Args:
        student_features: of shape `[..., C]`.
        teacher_features: of the same shape.
        axis: the axis, or axes, of the features that are averaged. With -1, feature maps of shape
            `[batch, height, width, channels]` get one value for each position, and those of a sequence one for each
            token; `axis=(1, 2, 3)` gives one for each example. Their mean is the same.
        where: which features to include, bools of a shape that broadcasts to that of the features. What is left out has
            no influence on value or gradient, NaNs included; where all is left out, the loss is 0.

    Returns:
        The loss of each example, of shape `[...]`.

    Raises:
        ValueError: if the shapes differ, or `where` is not of bools or does not fit them.
        TypeError: if the features are not arrays of real floating point numbers.

    Example:
        A student of width 2, a teacher of width 3, and a linear projector, which the task does not reach:

        >>> import jax, jax.numpy as jnp, dot_optax
        >>> def loss_fn(params, x, teacher_features):
        ...     features = x @ params['body']
        ...     hint = dot_optax.losses.feature_loss(features @ params['projector'], teacher_features)
        ...     return dot_optax.PerLoss(task=jnp.mean((features @ params['head'] - 1.0) ** 2), kd=hint.mean())
        >>> params = {'body': jnp.eye(2), 'head': jnp.ones((2, 1)), 'projector': jnp.ones((2, 3))}
        >>> batch = (jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.array([[1.0, 1.0, 1.0], [2.0, 2.0, 5.0]]))
        >>> print(loss_fn(params, *batch))
        PerLoss(task=Array(0.5, dtype=float32), kd=Array(1.5, dtype=float32))
        >>> reached = dot_optax.reached(loss_fn, params, *batch)
        >>> print(reached.kd)
        {'body': True, 'head': False, 'projector': True}
        >>> optimizer = dot_optax.dot(0.05, reached=reached)  # one momentum for head and projector, two for the body

    References:
        Romero et al., `FitNets: Hints for Thin Deep Nets <https://arxiv.org/abs/1412.6550>`_, 2015.
    """
    student, teacher, dtype = _widened(student_features, teacher_features, slice(None))
    where = jnp.broadcast_to(True if where is None else where, student.shape)
    # Selected before it is squared: the gradient of the square of a NaN is NaN, even times zero.
    squares = jnp.square(jnp.where(where, student - teacher, 0.0))
    return (jnp.sum(squares, axis, where=where) / jnp.maximum(jnp.sum(where, axis, squares.dtype), 1)).astype(dtype)


def attention_transfer_loss(student_features: ArrayLike, teacher_features: ArrayLike) -> jax.Array:
    r"""How far the places that the student looks at are from those that the teacher looks at.

    .. math::
        \frac{1}{HW} \Big\| \frac{a(s)}{\|a(s)\|_2} - \frac{a(t)}{\|a(t)\|_2} \Big\|_2^2, \qquad
        a(x)_{hw} = \frac{1}{C} \sum_c x_{hwc}^2

    It compares no channels, so the two may have different numbers of them, and their scales do not matter. Feature maps
    that are zero throughout have attention zero, and get no gradient. Features of less than 32 bits are promoted to
    float32 inside; the result has the dtype of the features. Gradients flow into both arguments.

    Args:
        student_features: feature maps of shape `[..., H, W, C]`: height, width, channels.
        teacher_features: the teacher's, of the same shape but for the channels.

    Returns:
        The loss of each example, of shape `[...]`. It is summed over the layers that are compared; mean squares of
        unit vectors are small, and published weights accordingly large (1000 in the experiments that DOT extends).

    Raises:
        ValueError: if the maps have fewer than three axes, or other shapes than each other's but for the channels.
        TypeError: if the features are not arrays of real floating point numbers.

    Example:
        The student looks at one of two places, the teacher at both:

        >>> import jax.numpy as jnp, dot_optax
        >>> student = jnp.array([[[[3.0], [0.0]]]])  # one example, 1 x 2 places, 1 channel
        >>> teacher = jnp.array([[[[1.0, 1.0], [1.0, -1.0]]]])
        >>> print(dot_optax.losses.attention_transfer_loss(student, teacher).round(4))
        [0.2929]

    References:
        Zagoruyko & Komodakis, `Paying More Attention to Attention <https://arxiv.org/abs/1612.03928>`_, 2017; the mean
        over places, instead of the norm in the paper's formula, is that of the published code.
    """
    student, teacher, dtype = _widened(student_features, teacher_features, slice(-1))

    def attention(features: jax.Array) -> jax.Array:
        # The scale of the features is taken out first: the fourth powers of large ones would overflow.
        return _unit(jnp.mean(jnp.square(_unit(features, (-3, -2, -1))), axis=-1), (-2, -1))

    return jnp.mean(jnp.square(attention(student) - attention(teacher)), axis=(-2, -1)).astype(dtype)


def similarity_loss(student_features: ArrayLike, teacher_features: ArrayLike, *, where: Any = None) -> jax.Array:
    r"""How far the student is from finding the same examples of a batch alike as the teacher does.

    .. math::
        \ell_i = \frac{1}{B} \sum_j \Big( \frac{G(s)_{ij}}{\|G(s)_i\|_2} - \frac{G(t)_{ij}}{\|G(t)_i\|_2} \Big)^2,
        \qquad G(x)_{ij} = \langle x_i, x_j \rangle

    The mean over the batch is the published loss. It compares examples with each other and no features, so the two may
    have different shapes but for the batch, and their scales do not matter. An example whose features are zero is like
    no other, and its row has no gradient. Features of less than 32 bits are promoted to float32 inside; the result has
    the dtype of the features. Gradients flow into both arguments.

    In a `jax.jit` over a mesh the batch is the global one; in `jax.shard_map` and `jax.pmap` it is that of a device.

    Args:
        student_features: of shape `[batch, ...]`.
        teacher_features: the teacher's features of the same examples, of shape `[batch, ...]`.
        where: which examples to include, bools of shape `[batch]`. Those that are left out, such as the padding of the
            last batch, have loss 0 and no influence on value or gradient, NaNs included. Average with
            `jnp.mean(loss, where=where)`.

    Returns:
        The loss of each example, of shape `[batch]`.

    Raises:
        ValueError: if the numbers of examples differ, or `where` is not of bools or does not fit them.
        TypeError: if the features are not arrays of real floating point numbers.

    Example:
        The teacher finds the first two examples alike, the student no two:

        >>> import jax.numpy as jnp, dot_optax
        >>> student = jnp.eye(3)
        >>> teacher = jnp.array([[5.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
        >>> print(dot_optax.losses.similarity_loss(student, teacher).round(4))
        [0.1953 0.1953 0.    ]

    References:
        Tung & Mori, `Similarity-Preserving Knowledge Distillation <https://arxiv.org/abs/1907.09682>`_, 2019.
    """
    student, teacher, dtype = _widened(student_features, teacher_features, slice(1))
    where = jnp.broadcast_to(True if where is None else where, student.shape[:1])

    def similarities(features: jax.Array) -> jax.Array:
        rows = _unit(jnp.where(where[:, None], features.reshape(len(features), -1), 0.0), None)
        return _unit(jnp.matmul(rows, rows.T, precision="highest"), -1)

    squares = jnp.square(similarities(student) - similarities(teacher))
    return (jnp.sum(squares, -1, where=where[None]) / jnp.maximum(jnp.sum(where, None, squares.dtype), 1)).astype(dtype)


def _widened(student: Any, teacher: Any, alike: slice) -> tuple[jax.Array, jax.Array, Any]:
    """Both in 32 bits or more, and the dtype of the result. The axes `alike` must have the same sizes."""
    student, teacher = jnp.asarray(student), jnp.asarray(teacher)
    if not _kind(student) is _kind(teacher) is jnp.floating:
        raise TypeError(f"features must be real floating point, got {_describe(student)} and {_describe(teacher)}")
    if student.shape[alike] != teacher.shape[alike]:
        found = f"student of shape {student.shape}, teacher of shape {teacher.shape}"
        raise ValueError(f"features do not fit: {found}; project the student's features first, or resize them")
    dtype, wide = _dtypes(student, teacher)
    return student.astype(wide), teacher.astype(wide), dtype
