"""The distillation loss in two parts: the probability of the target class, and the distribution over all others."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dot_optax._checks import _check_scalar, _describe, _is_number
from dot_optax.losses._logits import Array, _Checked, _checked, _compare, _kl_terms, _soften, _sum_of_terms


def tckd_loss(
    student_logits: Array, teacher_logits: Array, labels: Array, temperature: Array = 4.0, *,
    axis: int = -1, where: Any = None
) -> jax.Array:  # fmt: skip
    r"""Target-class distillation: how far apart student and teacher are on whether the label is right.

    .. math::
        T^2 \, \mathrm{KL}([q_y, 1 - q_y] \,\|\, [p_y, 1 - p_y])

    for the label :math:`y`, with :math:`q` and :math:`p` as in `kd_loss`. It is computed from logarithms, since :math:`1 - p_y` of a student that
    is sure would be rounded to 0.

    Args:
        student_logits: unnormalised log probabilities, of shape `[..., num_classes]`.
        teacher_logits: the teacher's, of the same shape.
        labels: the target classes, integers of shape `[...]`. One that is no class makes the loss of its example NaN,
            unless `where` leaves the whole example out.
        temperature: :math:`T > 0`.
        axis: the axis of the classes.
        where: which classes to include, as for `kd_loss`; the target must be one of them.

    Returns:
        The loss of each example in nats, of shape `[...]`.

    Raises:
        ValueError: as `kd_loss`, or if the labels do not have the shape of the examples.
        TypeError: as `kd_loss`, or if the labels are not integers.

    Example:
        >>> import jax.numpy as jnp, dot_optax
        >>> student, teacher = jnp.array([0.0, 0.0, 0.0]), jnp.array([2.0, 0.0, -1.0])
        >>> print(f'{dot_optax.losses.tckd_loss(student, teacher, jnp.array(0), temperature=1.0):.4f}')
        0.5570

    References:
        Zhao et al., `Decoupled Knowledge Distillation <https://arxiv.org/abs/2203.08679>`_, 2022.
    """
    found, is_target, _ = _targets(student_logits, teacher_logits, labels, temperature, axis, where, least=2)
    return found.result(_tckd(found, is_target))


def nckd_loss(
    student_logits: Array, teacher_logits: Array, labels: Array, temperature: Array = 4.0, *,
    axis: int = -1, where: Any = None
) -> jax.Array:  # fmt: skip
    r"""Non-target-class distillation: what the teacher would say if the label were none of the choices.

    .. math::
        T^2 \, \mathrm{KL}(\hat{q} \,\|\, \hat{p}), \qquad
        \hat{q}_c = \frac{q_c}{1 - q_y}, \quad \hat{p}_c = \frac{p_c}{1 - p_y} \quad \text{for } c \neq y

    `kd_loss` is :math:`\mathrm{TCKD} + (1 - q_y) \, \mathrm{NCKD}`: where the teacher is sure of the label, it hides
    what the teacher knows of the other classes.

    Args:
        student_logits: as for `tckd_loss`.
        teacher_logits: likewise.
        labels: likewise.
        temperature: likewise.
        axis: likewise.
        where: which classes to include; `top_k_mask` gives those of DeepKD. Where it leaves one class besides the
            target, the loss is 0.

    Returns:
        The loss of each example in nats, of shape `[...]`.

    Raises:
        ValueError: as `tckd_loss`, or if there are only two classes, of which one is left beside the target.
        TypeError: as `tckd_loss`.

    Example:
        >>> import jax.numpy as jnp, dot_optax
        >>> student, teacher = jnp.array([0.0, 0.0, 0.0]), jnp.array([2.0, 0.0, -1.0])
        >>> print(f'{dot_optax.losses.nckd_loss(student, teacher, jnp.array(0), temperature=1.0):.4f}')
        0.1109

    References:
        Zhao et al., `Decoupled Knowledge Distillation <https://arxiv.org/abs/2203.08679>`_, 2022.
    """
    found, _, others = _targets(student_logits, teacher_logits, labels, temperature, axis, where, least=3)
    return found.result(_nckd(found, others))


def dkd_loss(
    student_logits: Array, teacher_logits: Array, labels: Array, temperature: Array = 4.0,
    alpha: Array = 1.0, beta: Array = 8.0, *, axis: int = -1, where: Any = None
) -> jax.Array:  # fmt: skip
    r"""Decoupled knowledge distillation: the two parts of `kd_loss`, with weights of their own.

    .. math::
        \alpha \, \mathrm{TCKD} + \beta \, \mathrm{NCKD}

    Args:
        student_logits: as for `tckd_loss`.
        teacher_logits: likewise.
        labels: likewise.
        temperature: likewise; 4 for CIFAR-100, 1 for ImageNet.
        alpha: :math:`\alpha`, the weight of `tckd_loss`.
        beta: :math:`\beta`, the weight of `nckd_loss`; 8 for CIFAR-100 (from 1 to 12 with the networks), 0.5 for
            ImageNet. The more the teacher is sure of the labels, the larger.
        axis: as for `tckd_loss`.
        where: as for `nckd_loss`.

    Returns:
        The loss of each example in nats, of shape `[...]`.

    Raises:
        ValueError: as `nckd_loss`.
        TypeError: as `nckd_loss`.

    Example:
        >>> import jax.numpy as jnp, dot_optax
        >>> student, teacher = jnp.array([0.0, 0.0, 0.0]), jnp.array([2.0, 0.0, -1.0])
        >>> print(f'{dot_optax.losses.dkd_loss(student, teacher, jnp.array(0), temperature=1.0):.4f}')
        1.4446

    References:
        Zhao et al., `Decoupled Knowledge Distillation <https://arxiv.org/abs/2203.08679>`_, 2022.
    """
    for name, weight in (("alpha", alpha), ("beta", beta)):
        _check_scalar(name, weight)
    found, is_target, others = _targets(student_logits, teacher_logits, labels, temperature, axis, where, least=3)
    return found.result(alpha * _tckd(found, is_target) + beta * _nckd(found, others))


def dkd_warmup(steps_per_epoch: int, epochs: int = 20) -> optax.Schedule:
    r"""The weight of DKD's distillation loss, which rises over the first epochs.

    .. math::
        w = \min\!\left(\frac{e}{E}, 1\right), \qquad e = \lfloor \text{step} / \text{steps per epoch} \rfloor + 1

    Args:
        steps_per_epoch: in how many steps an epoch is trained.
        epochs: :math:`E`, the epoch from which on the weight is 1.

    Returns:
        A schedule: from the number of steps so far to the weight, the same for all steps of an epoch.

    Raises:
        ValueError: if either number is below 1.

    Example:
        >>> import dot_optax
        >>> weight = dot_optax.losses.dkd_warmup(steps_per_epoch=100)
        >>> print(weight(0), weight(150), weight(5000))
        0.05 0.1 1.0

    References:
        Zhao et al., `Decoupled Knowledge Distillation <https://arxiv.org/abs/2203.08679>`_, 2022.
    """
    _check_scalar("steps_per_epoch", steps_per_epoch, 1)
    _check_scalar("epochs", epochs, 1)
    return lambda step: jnp.minimum((jnp.asarray(step) // steps_per_epoch + 1) / epochs, 1.0)


def deepkd_losses(
    student_logits: Array, teacher_logits: Array, labels: Array, temperature: Array = 4.0, *,
    k: Array | None = None, axis: int = -1, where: Any = None
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    r"""The two distillation losses of DeepKD, for the optimizer `deepkd`.

    .. math::
        \mathrm{TCKD}, \qquad (1 - q_y) \, \mathrm{NCKD}_k

    where :math:`\mathrm{NCKD}_k` compares student and teacher only on the teacher's :math:`k` likeliest classes besides
    the target. Without :math:`k` the sum of both is `kd_loss`. Both need the teacher: with `sampled_losses` give them the
    same period and the same offset.

    Args:
        student_logits: as for `tckd_loss`.
        teacher_logits: likewise.
        labels: likewise.
        temperature: likewise.
        k: how many classes to keep, an integer, which may be traced: `top_k_schedule` of the step. Default: all.
        axis: as for `tckd_loss`.
        where: likewise.

    Returns:
        The losses `target` and `non_target` of each example in nats, each of shape `[...]`.

    Raises:
        ValueError: as `nckd_loss`, or if `k` is a Python number below 1.
        TypeError: as `nckd_loss`.

    Example:
        >>> import jax.numpy as jnp, dot_optax
        >>> student, teacher = jnp.array([0.0, 0.0, 0.0]), jnp.array([2.0, 0.0, -1.0])
        >>> target, non_target = dot_optax.losses.deepkd_losses(student, teacher, jnp.array(0), temperature=1.0)
        >>> total = dot_optax.losses.kd_loss(student, teacher, temperature=1.0)
        >>> print(f'{target:.4f} + {non_target:.4f} = {total:.4f}')
        0.5570 + 0.0173 = 0.5743

    References:
        Huang et al., `DeepKD <https://arxiv.org/abs/2505.15133>`_, 2025.
    """
    found, is_target, others = _targets(student_logits, teacher_logits, labels, temperature, axis, where, least=3)
    nckd = _nckd(found, others if k is None else _top_k(found, others, k))
    q, _, _ = _compare(_soften(*found[:5]), axis)[0]
    return found.result(_tckd(found, is_target)), found.result(jnp.sum(q, axis, where=~is_target) * nckd)


def top_k_mask(teacher_logits: Array, labels: Array, k: Array, *, axis: int = -1) -> jax.Array:
    """DeepKD's dynamic mask: the teacher's k likeliest classes besides the target.

    Args:
        teacher_logits: of shape `[..., num_classes]`.
        labels: the target classes, integers of shape `[...]`.
        k: how many classes to keep, an integer, which may be traced. Of equally likely classes the first are kept.
        axis: the axis of the classes.

    Returns:
        Bools of the shape of the logits: the `where` of `nckd_loss`.

    Raises:
        ValueError: as `nckd_loss`, or if `k` is a Python number below 1.
        TypeError: as `nckd_loss`.

    Example:
        >>> import jax.numpy as jnp, dot_optax
        >>> print(dot_optax.losses.top_k_mask(jnp.array([5.0, 1.0, 3.0, 2.0]), jnp.array(0), k=2))
        [False False  True  True]

    References:
        Huang et al., `DeepKD <https://arxiv.org/abs/2505.15133>`_, 2025.
    """
    found, _, others = _targets(teacher_logits, teacher_logits, labels, 1.0, axis, None, least=3)
    return _top_k(found, others, k)


def top_k_schedule(num_classes: int, begin: int, end: int, fraction: float = 0.05) -> optax.Schedule:
    r"""DeepKD's curriculum of classes in three phases: few of them, more with every step, all.

    .. math::
        k = k_0 + (C - 1 - k_0) \, \mathrm{clip}\!\left(\frac{\text{step} - b}{e - b}, 0, 1\right),
        \qquad k_0 = \max(2, \lceil f C \rceil)

    rounded down. At least two classes are kept, since one alone has nothing to tell.

    Args:
        num_classes: :math:`C`, the target included.
        begin: :math:`b`, the step up to which :math:`k_0` classes are kept.
        end: :math:`e > b`, the step from which on all :math:`C - 1` are.
        fraction: :math:`f`, the part of the classes to begin with.

    Returns:
        A schedule: from the number of steps so far to the `k` of `deepkd_losses` and `top_k_mask`, an int32.

    Raises:
        ValueError: if there are fewer than three classes, `end` is not above `begin`, or `fraction` not in [0, 1).

    Example:
        >>> import dot_optax
        >>> k = dot_optax.losses.top_k_schedule(num_classes=100, begin=1000, end=2000)
        >>> print(k(0), k(1500), k(9999))
        5 52 99

    References:
        Huang et al., `DeepKD <https://arxiv.org/abs/2505.15133>`_, 2025, which leaves the lengths of the phases open.
    """
    _check_scalar("num_classes", num_classes, 3)
    _check_scalar("fraction", fraction, 0, 1)
    _check_scalar("end", end, begin + 1)
    least = max(2, math.ceil(round(fraction * num_classes, 6)))
    rise = optax.linear_schedule(least, num_classes - 1, end - begin, begin)
    return lambda step: jnp.asarray(rise(step), jnp.int32)


def _targets(student: Any, teacher: Any, labels: Any, temperature: Any, axis: int, where: Any, least: int) -> Any:
    """The checked logits, where their targets are, and where the other classes that are included."""
    found = _checked(student, teacher, temperature, axis, where, least)
    shape = list(found.student.shape)
    num_classes = shape.pop(axis)
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer) or list(jnp.shape(labels)) != shape:
        raise ValueError(f"labels must be integers of shape {tuple(shape)}, one per example; got {_describe(labels)}")
    is_target = jax.nn.one_hot(labels, num_classes, dtype=bool, axis=axis)
    # A label that is no class makes its loss NaN, as in Optax, where the example counts.
    known = jnp.any(is_target, axis, keepdims=True) | ~jnp.any(found.where, axis, keepdims=True)
    found = found._replace(student=jnp.where(known, found.student, jnp.nan))
    return found, is_target, found.where & ~is_target


def _nckd(found: _Checked, others: jax.Array) -> jax.Array:
    return _sum_of_terms(_kl_terms, *found[:4], others)


def _tckd(found: _Checked, is_target: jax.Array) -> jax.Array:
    """Between two classes: the target, and all others in one, whose logit is the logarithm of their summed exponentials."""
    soft, axis = _soften(*found[:5]), found.axis
    without = [jnp.where(is_target, fill, logits) for fill, logits in zip((-jnp.inf, -jnp.inf, 0.0), soft, strict=True)]
    _, of_others = _compare(without, axis)
    of_target = [jnp.sum(logits, axis, keepdims=True, where=is_target) for logits in soft]
    pair = [jnp.concatenate(both, axis) for both in zip(of_target, of_others, strict=True)]
    return jnp.sum(_kl_terms(*_compare(pair, axis)[0]), axis)


def _top_k(found: _Checked, others: jax.Array, k: Any) -> jax.Array:
    if jnp.ndim(k) or not jnp.issubdtype(jnp.result_type(k), jnp.integer):
        raise TypeError(f"k must be an integer, got {_describe(k)}")
    if _is_number(k):
        _check_scalar("k", k, 1)
    order = jnp.argsort(jnp.where(others, -found.teacher, jnp.inf), found.axis)
    return (jnp.argsort(order, found.axis) < k) & others
