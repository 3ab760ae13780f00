"""Divergences between the predictions of student and teacher, and the one comparison of both that all of them share."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dot_optax._checks import _check_scalar, _describe, _is_number, _kind

Array = jax.typing.ArrayLike
Axis = int | tuple[int, ...]


def kd_loss(
    student_logits: Array, teacher_logits: Array, temperature: Array = 4.0, *, axis: Axis = -1, where: Any = None
) -> jax.Array:
    r"""The distillation loss: how far the student's softened predictions are from the teacher's.

    .. math::
        T^2 \, \mathrm{KL}(q \,\|\, p) = T^2 \sum_c q_c (\log q_c - \log p_c), \qquad
        q = \mathrm{softmax}(z_{teacher} / T), \quad p = \mathrm{softmax}(z_{student} / T)

    The factor :math:`T^2` keeps the size of the gradient comparable between temperatures. The difference of the two
    logarithms cancels where the student is close to the teacher, so what is summed is

    .. math::
        \mathrm{KL}(q \,\|\, p) = \sum_c q_c \, (e^{d_c} - 1 - d_c), \qquad d_c = \log p_c - \log q_c

    This is the same, since :math:`\sum_c q_c e^{d_c} = \sum_c p_c = 1`, and no term of it is negative. Logits of
    less than 32 bits are promoted to float32 inside; the result has the dtype of the logits. Gradients flow into both
    arguments: use `jax.lax.stop_gradient` on a teacher that is part of the parameters.

    Args:
        student_logits: unnormalised log probabilities, of shape `[..., num_classes]`; `[batch, length, vocabulary]` for
            sequences.
        teacher_logits: the teacher's, of the same shape. A class at minus infinity is one that the teacher excludes: it
            adds nothing to the sum over :math:`q`. Where the student alone excludes a class, the loss is infinite.
        temperature: :math:`T > 0`.
        axis: the axis, or axes, of the classes.
        where: which classes to include, of a shape that broadcasts to the logits. The others have no probability, and
            their logits may hold anything, even NaN. An example without any class has a loss of 0 and no gradient, so
            padding is `where=is_token[..., None]`. Then average with `jnp.mean(loss, where=is_token)`.

    Returns:
        The loss of each example in nats, of shape `[...]`. In float16 a loss above 65,504 is infinite.

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
    return _divergence(_kl_terms, student_logits, teacher_logits, temperature, axis, where)


def reverse_kl_loss(
    student_logits: Array, teacher_logits: Array, temperature: Array = 4.0, *, axis: Axis = -1, where: Any = None
) -> jax.Array:
    r"""The divergence from the student's side, which punishes what the teacher finds unlikely.

    .. math::
        T^2 \, \mathrm{KL}(p \,\|\, q) = T^2 \sum_c p_c (\log p_c - \log q_c)

    A small student then concentrates on the likeliest of the teacher's modes, where `kd_loss` spreads it over all.

    Args:
        student_logits: as for `kd_loss`.
        teacher_logits: likewise. Where the teacher alone excludes a class, the loss is infinite.
        temperature: likewise. Language models are usually distilled at 1, where the factor is 1, too.
        axis: likewise.
        where: likewise.

    Returns:
        The loss of each example in nats, of shape `[...]`.

    Raises:
        ValueError: as `kd_loss`.
        TypeError: as `kd_loss`.

    Example:
        >>> import jax.numpy as jnp, dot_optax
        >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([2.0, 0.0])
        >>> print(f'{dot_optax.losses.reverse_kl_loss(student, teacher, temperature=1.0):.4f}')
        0.4338

    References:
        Gu et al., `MiniLLM <https://arxiv.org/abs/2306.08543>`_, 2024.
    """
    return _divergence(_reverse_kl_terms, student_logits, teacher_logits, temperature, axis, where)


def jeffreys(
    student_logits: Array, teacher_logits: Array, temperature: Array = 4.0, *, axis: Axis = -1, where: Any = None
) -> jax.Array:
    r"""Jeffreys' divergence: the sum of both Kullback-Leibler divergences.

    .. math::
        T^2 \, (\mathrm{KL}(q \,\|\, p) + \mathrm{KL}(p \,\|\, q)) = T^2 \sum_c (p_c - q_c) (\log p_c - \log q_c)

    Args:
        student_logits: as for `kd_loss`.
        teacher_logits: likewise. Where one of both alone excludes a class, the loss is infinite.
        temperature: likewise. Language models are usually distilled at 1, where the factor is 1, too.
        axis: likewise.
        where: likewise.

    Returns:
        The loss of each example in nats, of shape `[...]`.

    Raises:
        ValueError: as `kd_loss`.
        TypeError: as `kd_loss`.

    Example:
        >>> import jax.numpy as jnp, dot_optax
        >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([2.0, 0.0])
        >>> print(f'{dot_optax.losses.jeffreys(student, teacher, temperature=1.0):.4f}')
        0.7616

    References:
        Jeffreys, `An Invariant Form for the Prior Probability in Estimation Problems
        <https://doi.org/10.1098/rspa.1946.0056>`_, 1946.
    """
    return _divergence(_jeffreys_terms, student_logits, teacher_logits, temperature, axis, where)


def jsd_loss(
    student_logits: Array, teacher_logits: Array, temperature: Array = 4.0, beta: Array = 0.5, *,
    axis: Axis = -1, where: Any = None
) -> jax.Array:  # fmt: skip
    r"""The generalised Jensen-Shannon divergence, between forward and reverse KL.

    .. math::
        T^2 \, (\beta \, \mathrm{KL}(q \,\|\, m) + (1 - \beta) \, \mathrm{KL}(p \,\|\, m)), \qquad
        m = \beta q + (1 - \beta) p

    At both ends this formula is 0, so there another one takes over: `kd_loss` for :math:`\beta = 0` and
    `reverse_kl_loss` for :math:`\beta = 1`, the limits of the formula over :math:`\beta` and over :math:`1 - \beta`. That is TRL's convention; EasyDeL's is
    the other way round: its :math:`\beta = 0` is the reverse divergence, and its mixture :math:`(1 - \beta) q + \beta p`.

    Args:
        student_logits: as for `kd_loss`.
        teacher_logits: likewise. The loss is finite whatever is excluded, for :math:`0 < \beta < 1`.
        temperature: likewise. TRL has no factor :math:`T^2`. Language models are usually distilled at 1, where it is 1.
        beta: :math:`\beta \in [0, 1]`. A traced one must lie between the ends.
        axis: as for `kd_loss`.
        where: likewise.

    Returns:
        The loss of each example in nats, of shape `[...]`; symmetric for the default :math:`\beta = 1/2`.

    Raises:
        ValueError: as `kd_loss`, or if `beta` is a Python number outside [0, 1].
        TypeError: as `kd_loss`.

    Example:
        >>> import jax.numpy as jnp, dot_optax
        >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([2.0, 0.0])
        >>> print(f'{dot_optax.losses.jsd_loss(student, teacher, temperature=1.0):.4f}')
        0.0895

    References:
        Agarwal et al., `On-Policy Distillation of Language Models <https://arxiv.org/abs/2306.13649>`_, 2024, equation 1.
    """
    if not isinstance(beta, jax.core.Tracer) and jnp.ndim(beta) == 0 and beta in (0, 1):
        end = _kl_terms if beta == 0 else _reverse_kl_terms
        return _divergence(end, student_logits, teacher_logits, temperature, axis, where)
    _check_scalar("beta", beta)
    if _is_number(beta) and not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
    return _divergence(_jsd_terms, student_logits, teacher_logits, temperature, axis, where, beta)


def skew_kl_loss(
    student_logits: Array, teacher_logits: Array, temperature: Array = 4.0, alpha: Array = 0.1, *,
    axis: Axis = -1, where: Any = None
) -> jax.Array:  # fmt: skip
    r"""The divergence of the teacher from a mixture of itself and the student, which is never infinite.

    .. math::
        T^2 \, \mathrm{KL}(q \,\|\, \alpha q + (1 - \alpha) p)

    With teacher and student exchanged it is the skew reverse KL of the same paper,
    :math:`\mathrm{KL}(p \,\|\, \alpha p + (1 - \alpha) q)`.

    Args:
        student_logits: as for `kd_loss`.
        teacher_logits: likewise.
        temperature: likewise. Language models are usually distilled at 1, where the factor is 1, too.
        alpha: :math:`\alpha \in [0, 1)`. With 0 it is `kd_loss`.
        axis: as for `kd_loss`.
        where: likewise.

    Returns:
        The loss of each example in nats, of shape `[...]`, at most :math:`T^2 \log(1 / \alpha)`.

    Raises:
        ValueError: as `kd_loss`, or if `alpha` is a Python number outside [0, 1).
        TypeError: as `kd_loss`.

    Example:
        >>> import jax.numpy as jnp, dot_optax
        >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([2.0, 0.0])
        >>> print(f'{dot_optax.losses.skew_kl_loss(student, teacher, temperature=1.0):.4f}')
        0.2726

    References:
        Ko et al., `DistiLLM <https://arxiv.org/abs/2402.03898>`_, 2024, with its default of 0.1.
    """
    _check_scalar("alpha", alpha, 0, 1)
    return _divergence(_skew_terms, student_logits, teacher_logits, temperature, axis, where, alpha)


def bernoulli_kd_loss(
    student_logits: Array, teacher_logits: Array, temperature: Array = 1.0, *, axis: Axis = -1, where: Any = None
) -> jax.Array:
    r"""`kd_loss` for sigmoid models, whose classes are independent of each other: multi-label or binary ones.

    .. math::
        T^2 \sum_c \mathrm{KL}([q_c, 1 - q_c] \,\|\, [p_c, 1 - p_c]), \qquad
        q = \mathrm{sigmoid}(z_{teacher} / T), \quad p = \mathrm{sigmoid}(z_{student} / T)

    Args:
        student_logits: the log odds of each class, of shape `[..., num_classes]`; one class is enough.
        teacher_logits: the teacher's, of the same shape.
        temperature: :math:`T > 0`.
        axis: the axis, or axes, of the classes, which are summed over; `()` leaves one value for each class.
        where: which classes to include, of a shape that broadcasts to the logits; the others count 0.

    Returns:
        The loss of each example in nats, of shape `[...]`.

    Raises:
        ValueError: as `kd_loss`, but one class is enough.
        TypeError: as `kd_loss`.

    Example:
        >>> import jax.numpy as jnp, dot_optax
        >>> student, teacher = jnp.array([[0.0, 1.0]]), jnp.array([[2.0, 1.0]])
        >>> print(dot_optax.losses.bernoulli_kd_loss(student, teacher).round(4))
        [0.3278]

    References:
        Hinton et al., `Distilling the Knowledge in a Neural Network <https://arxiv.org/abs/1503.02531>`_, 2015, for two
        classes in the place of all.
    """
    found = _checked(student_logits, teacher_logits, temperature, axis, where, least=1)
    pair = [jnp.stack([logits, jnp.zeros_like(logits)], axis=-1) for logits in found[:2]]
    kl = _sum_of_terms(_kl_terms, *pair, found.temperature, -1, found.where[..., None])
    return found.result(jnp.sum(kl, axis=axis))


def dist_loss(
    student_logits: Array, teacher_logits: Array, temperature: Array = 1.0,
    beta: Array = 1.0, gamma: Array = 1.0, *, axis: int = -1, where: Any = None
) -> jax.Array:  # fmt: skip
    r"""DIST: the student's predictions should correlate with the teacher's, between the classes and within each.

    .. math::
        T^2 \Big( \beta \, (1 - \rho(q_{b \cdot}, p_{b \cdot}))
            + \frac{\gamma}{C} \sum_c (1 - \rho(q_{\cdot c}, p_{\cdot c})) \Big)

    for example :math:`b`, where :math:`\rho` is Pearson's correlation: of the probabilities of an example over the
    classes, and of those of a class over the examples of the batch. The second sum is the same for all examples, so the
    mean over the batch is the published loss. With `pmap` and `shard_map` the batch is that of one device. A correlation with a constant is undefined and counts as 0.

    Args:
        student_logits: unnormalised log probabilities, of shape `[batch, num_classes]`. All axes but `axis` are
            examples.
        teacher_logits: the teacher's, of the same shape.
        temperature: :math:`T > 0`.
        beta: :math:`\beta`, the weight of the correlation between classes.
        gamma: :math:`\gamma`, the weight of that within classes.
        axis: the axis of the classes.
        where: which classes of which examples to include, as for `kd_loss`. Average over the examples that count.

    Returns:
        The loss of each example, of shape `[batch]`; for one without any class, the part within classes.

    Raises:
        ValueError: as `kd_loss`.
        TypeError: as `kd_loss`.

    Example:
        Two examples whose probabilities correlate:

        >>> import jax.numpy as jnp, dot_optax
        >>> student = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> teacher = jnp.array([[3.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
        >>> print(dot_optax.losses.dist_loss(student, teacher).round(4))
        [0.3366 0.3366]

    References:
        Huang et al., `Knowledge Distillation from A Stronger Teacher <https://arxiv.org/abs/2205.10536>`_, 2022.
    """
    for name, weight in (("beta", beta), ("gamma", gamma)):
        _check_scalar(name, weight)
    found = _checked(student_logits, teacher_logits, temperature, axis, where)
    q, p, _ = _compare(_soften(*found[:5]), axis)[0]
    others = tuple(i for i in range(q.ndim) if i != axis % q.ndim)
    between, within = (_one_minus_correlation(q, p, over, found.where) for over in (axis, others))
    classes = jnp.maximum(jnp.sum(jnp.any(found.where, axis=others)), 1)
    return found.result(beta * between + gamma * jnp.sum(within) / classes)


def standardize_logits(logits: Array, *, axis: Axis = -1, where: Any = None) -> jax.Array:
    r"""Logits with a mean of 0 and a standard deviation of 1 over the classes, to be given to any loss of logits.

    .. math::
        \frac{z_c - \bar{z}}{\sigma(z)}, \qquad \sigma(z)^2 = \frac{1}{C} \sum_c (z_c - \bar{z})^2

    The student then need not match the size of the teacher's logits, only their relations. The temperature of the loss
    that follows is the base temperature of the paper. (Its code divides by :math:`C - 1` in the variance.)

    Args:
        logits: of shape `[..., num_classes]`, the student's or the teacher's.
        axis: the axis, or axes, of the classes.
        where: which classes to include; the others come out as 0, so give the loss the same `where`.

    Returns:
        Logits of the same shape and dtype; zeros where all classes have the same logit.

    Raises:
        TypeError: if the logits are not an array of real floating point numbers.

    Example:
        >>> import jax.numpy as jnp, dot_optax
        >>> print(dot_optax.losses.standardize_logits(jnp.array([1.0, 5.0, 9.0])).round(4))
        [-1.2247  0.      1.2247]

    References:
        Sun et al., `Logit Standardization in Knowledge Distillation <https://arxiv.org/abs/2403.01427>`_, 2024.
    """
    found = _checked(logits, logits, 1.0, axis, where, least=1)
    count = jnp.sum(found.where, axis=axis, keepdims=True)
    return (jnp.sqrt(count) * _unit(_centred(found.student, axis, found.where), axis)).astype(found.dtype)


class _Checked(NamedTuple):
    """Two arrays of logits with what belongs to them, in float32 or wider."""

    student: jax.Array
    teacher: jax.Array
    temperature: jax.Array
    axis: Any
    where: jax.Array  # of the shape of the logits
    dtype: Any  # of the result

    def result(self, loss: Any) -> jax.Array:
        return (self.temperature**2 * loss).astype(self.dtype)


def _checked(student: Any, teacher: Any, temperature: Any, axis: Axis, where: Any, least: int = 2) -> _Checked:
    _check_logits(student, teacher, axis, least)
    _check_temperature(temperature)
    dtype, wide = _dtypes(student, teacher)
    student, teacher, temperature = (jnp.asarray(x, wide) for x in (student, teacher, temperature))
    return _Checked(student, teacher, temperature, axis, _included(where, student.shape), dtype)


def _included(where: Any, shape: tuple[int, ...]) -> jax.Array:
    """`where` in full: by default everything is included."""
    where = jnp.asarray(True if where is None else where)
    if where.dtype != bool:
        raise ValueError(f"where must be bools, got {_describe(where)}")
    try:
        return jnp.broadcast_to(where, shape)
    except (TypeError, ValueError) as error:
        raise ValueError(f"where of shape {where.shape} does not fit {shape}; for padding: [..., None]") from error


def _dtypes(student: Any, teacher: Any) -> tuple[Any, Any]:
    """The dtype of the loss of two arrays, and the one to compute it in."""
    # Of each by itself: to promote them, the strict mode of JAX's type promotion forbids for 16 bits.
    dtype = max(map(jnp.result_type, (student, teacher)), key=lambda dtype: jnp.finfo(dtype).bits)
    return dtype, jnp.float64 if dtype == jnp.float64 else jnp.float32


def _divergence(terms: Any, student: Any, teacher: Any, temperature: Any, axis: Any, where: Any, *args: Any) -> Any:
    """T^2 times the sum of `terms(q, p, log(p / q), *args)` over the classes, for each example."""
    found = _checked(student, teacher, temperature, axis, where)
    weights = [jnp.asarray(arg, found.student.dtype) for arg in args]
    return found.result(_sum_of_terms(terms, *found[:5], *weights))


# As jax.nn has it: some forty operations, one by one, would be slow.
@functools.partial(jax.jit, static_argnames=("terms", "axis"))
def _sum_of_terms(terms: Any, student: Any, teacher: Any, temperature: Any, axis: Any, where: Any, *args: Any) -> Any:
    compared, _ = _compare(_soften(student, teacher, temperature, axis, where), axis)
    return jnp.sum(terms(*compared, *args), axis=axis)


def _soften(student: Any, teacher: Any, temperature: Any, axis: Axis, where: Any, top: Any = None) -> Any:
    """Both logits over T, minus infinity where a class is excluded; and their difference, which cancels nothing.

    The difference is plus or minus infinity where one of both alone excludes the class, and 0 where both do.
    """
    # An example without a class gets equal logits, which have no loss and no gradient.
    excluded = jnp.where(jnp.any(where, axis=axis, keepdims=True), -jnp.inf, 0.0)
    student, teacher = (jnp.where(where, logits, excluded) for logits in (student, teacher))
    # The teacher's largest logit is taken from all, so that large logits lose nothing: their differences count.
    top = jax.lax.stop_gradient(jnp.max(teacher, axis=axis, keepdims=True)) if top is None else top
    no_student, no_teacher = student == -jnp.inf, teacher == -jnp.inf
    # Divided by the temperature, an infinity would make its gradient NaN.
    finite_student, finite_teacher = jnp.where(no_student, 0.0, student), jnp.where(no_teacher, 0.0, teacher)
    difference = (finite_student - finite_teacher) / temperature
    difference = jnp.where(no_student & no_teacher, 0.0, jnp.where(no_student, -jnp.inf, difference))
    difference = jnp.where(no_teacher & ~no_student, jnp.inf, difference)
    student = jnp.where(no_student, -jnp.inf, (finite_student - jnp.where(no_student, 0.0, top)) / temperature)
    teacher = jnp.where(no_teacher, -jnp.inf, (finite_teacher - jnp.where(no_teacher, 0.0, top)) / temperature)
    return student, teacher, difference


def _compare(soft: Any, axis: Axis) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """What all losses of two predictions are made of, as exact as the difference of their logits in `_soften` is.

    Returns:
        The teacher's probabilities q, the student's p, and log(p / q) of each class, plus or minus infinity where one
        of both alone excludes the class; and the logarithms of the normalisers of student and teacher, and of their ratio.
    """
    student, teacher, difference = soft
    log_z = jax.nn.logsumexp(teacher, axis=axis, keepdims=True)
    q = jnp.exp(teacher - log_z)
    log_z_student = jax.nn.logsumexp(student, axis=axis, keepdims=True)
    # The logarithm of the ratio of both normalisers, and one Newton step towards sum(p) = sum(q), which makes its
    # rounding as small as the differences of the logits. In exact arithmetic the step is 0, and so are its gradients.
    log_z_ratio = log_z_student - log_z
    near, small, _ = _near_or_far(difference - log_z_ratio)
    p = jnp.exp(student - log_z - log_z_ratio)
    excess = jnp.sum(jnp.where(near, q * jnp.expm1(small), p - q), axis=axis, keepdims=True)
    log_z_ratio = log_z_ratio + jax.lax.stop_gradient(jnp.log1p(excess))
    p = jnp.exp(student - log_z - log_z_ratio)
    return (q, p, difference - log_z_ratio), (log_z_student, log_z, log_z_ratio)


def _near_or_far(log_ratio: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where a logarithm of a ratio is near 0; its value there, and where it is not, with 0 in the other places."""
    near = jnp.abs(log_ratio) < 0.5
    return near, jnp.where(near, log_ratio, 0.0), jnp.where(near, 0.0, log_ratio)


def _kl_terms(q: jax.Array, p: jax.Array, log_ratio: jax.Array) -> jax.Array:
    """The terms of KL(q || p), of which none is negative: q (e^d - 1 - d) with d = log(p / q)."""
    near, small, large = _near_or_far(log_ratio)
    return jnp.where(near, q * _exp_minus_1_minus_x(small), p - q * (1 + jnp.where(q == 0, 0.0, large)))


def _reverse_kl_terms(q: jax.Array, p: jax.Array, log_ratio: jax.Array) -> jax.Array:
    return _kl_terms(p, q, -log_ratio)


def _jeffreys_terms(q: jax.Array, p: jax.Array, log_ratio: jax.Array) -> jax.Array:
    return _kl_terms(q, p, log_ratio) + _reverse_kl_terms(q, p, log_ratio)


def _jsd_terms(q: jax.Array, p: jax.Array, log_ratio: jax.Array, beta: jax.Array) -> jax.Array:
    m, log_m_q, log_m_p = _mixture(q, p, log_ratio, beta)
    return beta * _kl_terms(q, m, log_m_q) + (1 - beta) * _kl_terms(p, m, log_m_p)


def _skew_terms(q: jax.Array, p: jax.Array, log_ratio: jax.Array, alpha: jax.Array) -> jax.Array:
    return _kl_terms(q, *_mixture(q, p, log_ratio, alpha)[:2])


def _mixture(q: jax.Array, p: jax.Array, log_ratio: jax.Array, beta: jax.Array) -> tuple[jax.Array, ...]:
    """m = beta q + (1 - beta) p, log(m / q) and log(m / p): each from the exponential of what is not positive."""
    more = log_ratio > 0
    weight, distance = jnp.where(more, beta, 1 - beta), jnp.where(more, -log_ratio, log_ratio)
    log_m = jnp.log1p(weight * jnp.expm1(distance))  # less the logarithm of the larger one of q and p
    return beta * q + (1 - beta) * p, log_m + jnp.where(more, log_ratio, 0.0), log_m - jnp.where(more, 0.0, log_ratio)


def _exp_minus_1_minus_x(x: jax.Array) -> jax.Array:
    """:math:`e^x - 1 - x` for |x| < 0.5 by its series, whose terms after these are below 2e-16 of it."""
    series = jnp.ones_like(x)
    for k in range(14, 2, -1):
        series = 1 + x * series / k
    return x * x / 2 * series


def _centred(x: jax.Array, axis: Axis, where: jax.Array) -> jax.Array:
    """What is left of x without its mean; zeros where that is no more than rounding, which should have no direction."""
    x = jnp.where(where, x, 0.0)
    mean = jnp.sum(x, axis=axis, keepdims=True) / jnp.maximum(jnp.sum(where, axis=axis, keepdims=True), 1)
    centred = jnp.where(where, x - mean, 0.0)
    left, size = (jnp.max(jnp.abs(y), axis=axis, keepdims=True) for y in (centred, x))
    return jnp.where(left > 8 * jnp.finfo(x.dtype).eps * size, centred, 0.0)


def _one_minus_correlation(q: jax.Array, p: jax.Array, axis: Axis, where: jax.Array) -> jax.Array:
    """1 - rho = |q^ - p^|^2 / 2 of the unit vectors, which does not cancel; 1 for a constant, 0 where nothing counts."""
    q, p = (_unit(_centred(x, axis, where), axis) for x in (q, p))
    defined = jnp.any(q != 0, axis=axis) & jnp.any(p != 0, axis=axis)
    return jnp.where(defined, jnp.sum((q - p) ** 2, axis=axis) / 2, jnp.any(where, axis=axis))


def _unit(x: Any, axis: Any) -> jax.Array:
    """x / ||x||_2, whatever the scale of x; zero, with a gradient of zero, where x is zero."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0.0))
    # Exact for the gradient too: the result does not depend on the scale. Zeros are divided by infinity.
    x = x / jnp.where(largest > 0, largest, jnp.inf)
    # Now at least 1, or 0. (A maximum with 1 would halve the gradient where both are 1.)
    return x / jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=axis, keepdims=True), 0.5))


def _check_logits(student: Any, teacher: Any, axis: Axis, least: int = 2) -> None:
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if _kind(logits) is not jnp.floating or not hasattr(logits, "dtype"):
            raise TypeError(f"{name} must be an array of real floating point numbers, got {_describe(logits)}")
    examples = jax.eval_shape(functools.partial(jnp.sum, axis=axis), student)
    if student.shape != teacher.shape or 0 < student.size < least * examples.size:
        classes = ("one class", "two classes", "three classes")[least - 1]
        wanted = f"must have the same shape [..., num_classes], with {classes} or more"
        raise ValueError(f"student_logits and teacher_logits {wanted}, got {student.shape} and {teacher.shape}")


def _check_temperature(temperature: Any) -> None:
    _check_scalar("temperature", temperature, float(jnp.finfo(jnp.float32).tiny))
