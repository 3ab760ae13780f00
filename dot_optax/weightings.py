r"""How much of each loss's gradient goes into the update: the weightings for `dot_optax.aggregate`.

With :math:`g_i` the gradient of loss i, the update is :math:`d = \sum_i w_i g_i`, and a weighting finds the :math:`w_i`
from the inner products :math:`G_{ij} = g_i \cdot g_j` alone, an N x N matrix. In the formulas :math:`n_i =
\sqrt{G_{ii}}` are the norms of the gradients, :math:`u_i = g_i / n_i` their directions, :math:`c_{ij} = u_i \cdot u_j`
the cosines and c that of two losses.

    projected         each gradient without its part against the others (PCGrad; of two losses twice UPGrad)
    min_norm          the shortest convex combination (MGDA; of log losses DTO-KD)
    bisector          the direction with the same angle to each gradient (ConFIG, IMTL-G; Nash-MTL)
    conflict_averse   near the mean gradient, the best for the worst-off loss (CAGrad)
    aligned           gradients made orthogonal and equally long (Aligned-MTL)
    priority          the first loss, as far as each other one still gets its share (PCD)

Two losses have closed forms (`conflict_averse` as its systems of one and two equations have it). With more losses,
`min_norm`, `conflict_averse` and `priority` solve the N equations of every subset of the losses, 2^N small systems at
once, and take the one solution that satisfies all conditions: exact to rounding, with neither loops nor a solver on the
host, and meant for a handful of losses. `bisector` and `aligned` take eigenvectors of an N x N matrix,
`bisector("nash")` 40 steps of Newton's method.

All compute with directions, whose cosines have no scale, so that norms may lie as far apart as their squares in
:math:`G` allow: in float32 between 1e-18 and 1e18. A shorter gradient counts as zero. The square of a longer one
overflows, and `aggregate` returns NaN. Cosines are rounded: what differs from -1 or 1 by some rounding errors counts as
opposite or parallel.

A weighting of your own is a `Weighting` of two functions.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dot_optax._checks import _check_scalar, _describe

__all__ = ["Weighting", "aligned", "bisector", "conflict_averse", "min_norm", "priority", "projected"]


class Weighting(NamedTuple):
    """Two pure functions that `aggregate` calls for each group of parameters, under `jax.vmap`.

    Attributes:
        init: from the number of losses to a state, a pytree of arrays; `()` if there is none.
        weights: `weights(gram, losses, state) -> (w, state)`. `gram` is the N x N matrix of inner products, in float32
            or float64; `losses` are the N values that `update` was given by the keyword `losses`, or None; `w` are N
            weights. A matrix product in here is computed in full precision, also on a TPU.

    Example:
        Each gradient divided by its norm:

        >>> import jax.numpy as jnp, dot_optax
        >>> def weights(gram, losses, state):
        ...     return 1.0 / jnp.sqrt(jnp.diagonal(gram)), state
        >>> tx = dot_optax.aggregate(dot_optax.weightings.Weighting(lambda num_losses: (), weights))
        >>> params = jnp.zeros(2)
        >>> updates, _ = tx.update((jnp.array([3.0, 0.0]), jnp.array([0.0, 7.0])), tx.init(params), params)
        >>> print(updates)
        [1. 1.]
    """

    init: Callable[[int], Any]
    weights: Callable[[jax.Array, jax.Array | None, Any], tuple[jax.Array, Any]]


def projected(key: jax.Array | int = 0) -> Weighting:
    r"""Each gradient without its part against the others, summed.

    .. math::
        w_i = 1 + \max(0, -c) \, n_j / n_i \qquad \text{for two losses, } j \text{ the other one}

    With more losses, for each i: start from :math:`v = g_i`, and for the others j in random order take from v its part
    along :math:`g_j` where :math:`v \cdot g_j < 0`; the update is the sum of these v. Of two losses no gradient is
    opposed, :math:`d \cdot g_i \geq 0`, and the update is twice that of UPGrad without its regularisation. Of more
    losses that is not promised. Where no two gradients are in conflict this is `sum_losses`, so a learning rate that
    suits the one suits the other.

    Args:
        key: a random key or a seed, for the order of three losses or more. The state holds its
            `jax.random.key_data`, and those of a new one after each update.

    Returns:
        A `Weighting`. A gradient that is zero has the weight 1. The state is `()` for two losses, else the key.

    Example:
        >>> import jax.numpy as jnp, dot_optax
        >>> w, _ = dot_optax.weightings.projected().weights(jnp.array([[1.0, -1.0], [-1.0, 4.0]]), None, ())
        >>> print(w)  # g_1 in full and a unit along g_2's ...
        [2.   1.25]

    References:
        Yu et al., `Gradient Surgery for Multi-Task Learning <https://arxiv.org/abs/2001.06782>`_, 2020 (PCGrad).
        Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization <https://arxiv.org/abs/2406.16232>`_, 2024
        (UPGrad).
    """

    def weights(gram: Any, losses: Any, state: Any) -> tuple[Any, Any]:
        n, inverse, cosines = _norms_and_cosines(gram)
        if len(n) == 2:
            return 1 + jnp.maximum(0, -cosines[0, 1]) * n[::-1] * inverse, state

        state, *keys = jax.random.split(jax.random.wrap_key_data(state, impl=jax.random.key_impl(first())), len(n) + 1)
        orders = jnp.stack([jax.random.permutation(k, len(n)) for k in keys], 1)

        # For each loss i the coefficients y of the directions in what is left of g_i, and j, whom it meets next.
        def project(y: Any, j: Any) -> tuple[Any, None]:
            along = jnp.where(j == jnp.arange(len(n)), 0, jnp.minimum(0, (cosines[j] * y).sum(1)))
            return y.at[jnp.arange(len(n)), j].add(-along), None

        y, _ = jax.lax.scan(project, jnp.diag(n), orders)
        return jnp.where(n > 0, y.sum(0) * inverse, 1), jax.random.key_data(state)

    def first() -> jax.Array:  # not made before it is needed: it would start the backends
        return jax.random.key(key) if isinstance(key, int) else key

    return Weighting(lambda num_losses: () if num_losses == 2 else jax.random.key_data(first()), weights)


def min_norm(log: bool = False) -> Weighting:
    r"""The shortest convex combination of the gradients.

    .. math::
        w = \operatorname{argmin}_{w \geq 0, \; \sum_i w_i = 1} \Big| \sum_i w_i g_i \Big|, \qquad
        w_1 = \operatorname{clip}\Big(\frac{G_{22} - G_{12}}{G_{11} + G_{22} - 2 G_{12}}, 0, 1\Big)
        \quad \text{for two losses}

    No gradient is opposed: :math:`d \cdot g_i \geq |d|^2`. The shortest one rules, so that a loss which is nearly at
    its minimum stops the training of all, and one whose gradient is zero has the whole weight: no update. So it does
    not go behind `sampled_losses`, which gives zeros at most steps. The update is at most as long as the shortest
    gradient.

    Args:
        log: take the gradients of the logarithms of the losses, :math:`g_i / \ell_i`, in the place of :math:`g_i`, so
        that a factor of a loss does not matter. `update` then needs the values: `update(grads, state, params,
        losses=values)`. The weights in the state are those of :math:`g_i`, and do not sum to 1. A loss that is not
        positive counts as one whose gradient is zero.

    Returns:
        A `Weighting` without state. The weights are those of the :math:`g_i`: with `log` each is divided by its loss.

    Raises:
        ValueError: from `update`, with `log`, where the values of the losses are missing.

    Example:
        >>> import jax.numpy as jnp, dot_optax
        >>> gram = jnp.array([[1.0, 0.0], [0.0, 4.0]])
        >>> print(dot_optax.weightings.min_norm().weights(gram, None, ())[0])
        [0.8 0.2]
        >>> print(dot_optax.weightings.min_norm(log=True).weights(gram, jnp.array([1.0, 2.0]), ())[0])
        [0.5  0.25]

    References:
        Desideri, `Multiple-gradient descent algorithm (MGDA) <https://doi.org/10.1016/j.crma.2012.03.014>`_, 2012.
        Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization <https://arxiv.org/abs/1810.04650>`_,
        2018. Hayder et al., `DTO-KD: Dynamic Trade-off Optimization for Effective Knowledge Distillation
        <https://openreview.net/forum?id=QMItTyQW92>`_, ICLR 2026.
    """

    def weights(gram: Any, losses: Any, state: Any) -> tuple[Any, Any]:
        if log and losses is None:
            raise ValueError("min_norm(log=True) needs losses: call update(grads, state, params, losses=values)")
        n, _, cosines = _norms_and_cosines(gram)
        per_loss = jnp.where(losses <= 0, 0, (1 + 0 * losses) / _or_one(losses)) if log else jnp.ones_like(n)
        m = n * per_loss / _or_one((n * per_loss).max())  # scaled, so that no power of it overflows
        if len(n) == 2:
            # The difference of the gradients, squared, as a sum of what is not negative: nothing cancels.
            length = (m[0] - m[1]) ** 2 + 2 * m[0] * m[1] * (1 - cosines[0, 1])
            w = jnp.clip(m[::-1] * (m[::-1] - m * cosines[0, 1]) / _or_one(length), 0, 1) + (length == 0) / 2
        else:
            # With x_i = w_i n_i and a_i = min(n) / n_i: the least x'Cx, x >= 0, where a'x is fixed.
            a = _shortness(m)
            w = a * _nonnegative(cosines + a[:, None] * a[None, :], a)
        w = jnp.where((m > 0).all(), w, m == 0)
        return w / w.sum() * per_loss, state

    return Weighting(lambda num_losses: (), weights)


def bisector(length: str = "config") -> Weighting:
    r"""The direction that has the same angle to each gradient.

    .. math::
        d \propto \sum_i b_i u_i, \quad C b = 1, \qquad \text{of two losses: } d \propto u_1 + u_2

    where :math:`C` holds the cosines. Three lengths are known:

    .. math::
        \text{config: } \Big|d\Big| = \sum_i g_i \cdot \frac{d}{|d|}; \qquad
        \text{imtl: } \sum_i w_i = 1; \qquad
        \text{nash: } w_i \, (g_i \cdot d) = 1

    of two losses :math:`w_i = (n_1 + n_2) / (2 n_i)`, :math:`w_1 = n_2 / (n_1 + n_2)` and :math:`w_i = 1 / (n_i \sqrt{1
    + c})`. `config` is as long as the sum if the gradients are equally long, so it suits the same learning rate. `imtl`
    is at most as long as the shortest gradient; with more than two losses it may point backwards, since the weights may
    sum to less than 0 before they are scaled. `nash` does not get shorter at a minimum: lower its learning rate. With
    more than two losses it is the bargaining solution, which also has another direction.

    Args:
        length: "config", "imtl" or "nash".

    Returns:
        A `Weighting` without state. A loss whose gradient is zero takes no part: its weight is 0. Opposite gradients
        have no bisector: of two, `config` and `imtl` give an update of at most a rounding error, and the weights of
        `nash` stay below 1,100 / n_i in float32. With more losses, where gradients depend on each other, `config` and
        `imtl` take the least-squares solution b, whose update may then oppose a gradient.

    Raises:
        ValueError: if `length` is none of the three.

    Example:
        >>> import jax.numpy as jnp, dot_optax
        >>> gram = jnp.array([[1.0, 0.0], [0.0, 9.0]])
        >>> for length in ('config', 'imtl', 'nash'):
        ...     w, _ = dot_optax.weightings.bisector(length).weights(gram, None, ())
        ...     print(f'{w[0]:.3f} {w[1]:.3f}')
        2.000 0.667
        0.750 0.250
        1.000 0.333

    References:
        Liu et al., `ConFIG <https://arxiv.org/abs/2408.11104>`_, 2024. Liu et al., `Towards Impartial Multi-task
        Learning <https://openreview.net/forum?id=IMPnRXEWpvr>`_, 2021 (IMTL-G). Navon et al., `Multi-Task Learning as a
        Bargaining Game <https://arxiv.org/abs/2202.01017>`_, 2022 (Nash-MTL).
    """
    if length not in ("config", "imtl", "nash"):
        raise ValueError(f"bisector: length must be 'config', 'imtl' or 'nash', got {_describe(length)}")

    def weights(gram: Any, losses: Any, state: Any) -> tuple[Any, Any]:
        n, inverse, cosines = _norms_and_cosines(gram)
        c, some = cosines[0, 1] if len(n) == 2 else None, (n > 0).astype(n.dtype)
        if length == "nash":
            b = _bargain(cosines) if c is None else 1 / jnp.sqrt(jnp.maximum(1 + c, _rounding(n)))
            return some * b * inverse, state
        b = some if c is not None else jnp.linalg.pinv(cosines, rtol=_rounding(n), hermitian=True) @ some
        if length == "imtl":
            b = b * _shortness(n)
            return jnp.where(jnp.abs(b.sum()) > _rounding(n) * jnp.abs(b).sum(), b / _or_one(b.sum()), 0), state
        share = n @ cosines @ b / _or_one(b @ cosines @ b) if c is None else n.sum() / _or_one(some.sum())
        return share * b * inverse, state

    return Weighting(lambda num_losses: (), weights)


def conflict_averse(kappa: float = 0.5) -> Weighting:
    r"""Near the mean gradient, the best direction for the loss that it serves worst.

    .. math::
        d = \operatorname{argmax}_d \min_i g_i \cdot d \quad \text{where } |d - g_0| \leq \kappa |g_0|, \qquad
        d = g_0 + \kappa |g_0| \frac{g_v}{|g_v|}

    with :math:`g_0` the mean of the gradients and :math:`g_v = \sum_i v_i g_i` the convex combination for which
    :math:`g_v \cdot g_0 + \kappa |g_0| |g_v|` is least. So :math:`w_i = 1/N + \kappa v_i |g_0| / |g_v|`.

    Args:
        kappa: :math:`\kappa`, in [0, 1): how far from the mean; 0 is the mean itself, and the closer to 1, the less the
            update opposes any gradient.

    Returns:
        A `Weighting` without state. A loss whose gradient is zero counts in the mean only. Where :math:`g_v` is zero to
        rounding the update is :math:`g_0`.

    Raises:
        TypeError, ValueError: if `kappa` is not a number, or outside [0, 1).

    Example:
        >>> import jax.numpy as jnp, dot_optax
        >>> print(dot_optax.weightings.conflict_averse(0.5).weights(jnp.array([[1.0, 0.0], [0.0, 1.0]]), None, ())[0])
        [0.75 0.75]

    References:
        Liu et al., `Conflict-Averse Gradient Descent for Multi-task Learning <https://arxiv.org/abs/2110.14048>`_, 2021
        (CAGrad).
    """
    _check_scalar("kappa", kappa, 0, 1)

    def weights(gram: Any, losses: Any, state: Any) -> tuple[Any, Any]:
        n, _, cosines = _norms_and_cosines(gram)
        m, a = n / _or_one(n.max()), _shortness(n)
        g0 = cosines @ m / len(n)  # its products with the directions
        radius = kappa * jnp.sqrt(jnp.maximum(m @ g0, 0) / len(n))
        # A d with each g_i . d >= theta min(n) is g_0 + g_y with C y >= b, y >= 0; the greatest theta for which |g_y| = radius.
        rise, fall = _solutions(cosines, a)[1:], _solutions(cosines, g0)[1:]
        square, half = rise @ a, rise @ g0
        # Where the root is negative, |g_y| > radius for any theta.
        root = jnp.where(square > 0, half**2 - square * (fall @ g0 - radius**2), -1)
        theta = ((half + jnp.sqrt(jnp.maximum(root, 0))) / _or_one(square))[:, None]
        y = theta * rise - fall
        y = _valid(y, jnp.minimum(y @ cosines - theta * a[None] + g0[None], root[:, None]))
        length = jnp.sqrt(jnp.maximum(y @ cosines @ y, 0))
        found = (length > jnp.sqrt(_rounding(n)) * y.max()) | (radius == 0)
        return 1 / len(n) + jnp.where(found, radius / _or_one(length) * y / _or_one(m), 0), state

    return Weighting(lambda num_losses: (), weights)


def aligned() -> Weighting:
    r"""The mean gradient after the gradients were made orthogonal and equally long.

    .. math::
        w = \sqrt{\lambda_{min}} \, G^{-1/2} \, (1/N, \ldots, 1/N)^T

    with :math:`\lambda_{min}` the least eigenvalue of :math:`G` other than zero; :math:`G^{-1/2}` leaves the eigenvalue
    zero out. Of two losses, with :math:`s = \sqrt{\det G}`: :math:`G^{1/2} = (G + s I) /
    \sqrt{\operatorname{tr} G + 2 s}`. The update is about as long as the shortest gradient over N. It may oppose a
    gradient that is shorter than the others.

    Returns:
        A `Weighting` without state. It jumps where gradients become parallel (with more losses: linearly dependent) or
        one becomes zero: then another eigenvalue is the least, and of two losses the update is the mean gradient. With
        more than two losses an eigenvalue counts as zero below 1e-6 of the largest, and so do gradients 1,000 times
        shorter than others.

    Example:
        >>> import jax.numpy as jnp, dot_optax
        >>> print(dot_optax.weightings.aligned().weights(jnp.array([[1.0, 0.0], [0.0, 16.0]]), None, ())[0])
        [0.5   0.125]

    References:
        Senushkin et al., `Independent Component Alignment for Multi-Task Learning <https://arxiv.org/abs/2305.19000>`_,
        2023 (Aligned-MTL).
    """

    def weights(gram: Any, losses: Any, state: Any) -> tuple[Any, Any]:
        n, _, cosines = _norms_and_cosines(gram)
        m = n / _or_one(n.max())
        gram = cosines * m[:, None] * m[None, :]
        if len(n) > 2:
            values, vectors = jnp.linalg.eigh(gram)
            values = jnp.where(values > _rounding(n) * values[-1], values, jnp.inf)
            return vectors @ (jnp.sqrt(jnp.nan_to_num(values.min() / values)) * vectors.mean(0)), state
        trace, sine2 = m @ m, 1 - cosines[0, 1] ** 2
        s, gap = m[0] * m[1] * jnp.sqrt(sine2), jnp.hypot(m[0] ** 2 - m[1] ** 2, 2 * gram[0, 1])
        # sqrt(least) G^(-1/2) without a division by s: adj(G + s I) sqrt(2 / ((trace + gap) (trace + 2 s))).
        full = (m[::-1] ** 2 + s - gram[0, 1]) * jnp.sqrt(2 / _or_one((trace + gap) * (trace + 2 * s)))
        alone = gram.sum(1) / _or_one(trace)  # of rank one: G / trace
        return jnp.where((s > 0) & (sine2 > _rounding(n)), full, alone) / 2, state

    return Weighting(lambda num_losses: (), weights)


def priority(tau: float = 0.02, decay: float = 0.999, eps: float = 1e-8) -> Weighting:
    r"""The gradient of the first loss, changed as little as gives each other loss its share.

    .. math::
        \tilde g_i = g_i / \sqrt{\hat v_i + \epsilon}, \qquad
        \tilde d = \operatorname{argmin}_d |d - \tilde g_1|^2 \quad
        \text{where } \tilde g_j \cdot d \geq \tau |\tilde g_j|^2 \text{ for } j > 1, \qquad
        d = \frac{|g_1|}{|\tilde d|} \tilde d

    with :math:`\hat v_i` the moving average of :math:`|g_i|^2`, without bias as Adam's. Of two losses :math:`\tilde d =
    \tilde g_1 + \max(0, \tau - \tilde g_1 \cdot \tilde g_2 / |\tilde g_2|^2) \, \tilde g_2`. In distillation one loss
    is what counts and the other one serves it; for the other order give `aggregate` its `losses` in that order.

    Args:
        tau: :math:`\tau`, in [0, 1): how much of the progress along its own gradient each other loss is sure of.
        decay: of the moving average, in [0, 1).
        eps: :math:`\epsilon \geq 0`. Gradients with norms near its root or below count for less.

    Returns:
        A `Weighting` with an `optax.EmaState`: the moving average before the correction of its bias. There is no update
        where the first gradient, or :math:`\tilde d` to rounding, is zero. Where the others cannot all have their
        share, the update is the first gradient. Gradients that oppose the first one can turn the update against it, at
        full length. A gradient that is not finite stays in the average: skip such steps with `optax.apply_if_finite` in
        `wrap`.

    Raises:
        TypeError, ValueError: if an argument is not a number, or out of its range.

    Example:
        >>> import jax.numpy as jnp, dot_optax
        >>> priority = dot_optax.weightings.priority(tau=0.5)
        >>> w, _ = priority.weights(jnp.array([[1.0, 0.0], [0.0, 4.0]]), None, priority.init(2))
        >>> print(f'{w[0]:.4f} {w[1]:.4f}')  # d = (g_1 + g_2 / 4) / sqrt(1.25)
        0.8944 0.2236

    References:
        `Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical Multi-Objective Optimization
        <https://arxiv.org/abs/2606.29521>`_, 2026 (PCD).
    """
    for name, value, high in (("tau", tau, 1), ("decay", decay, 1), ("eps", eps, jnp.inf)):
        _check_scalar(name, value, 0, high)

    def weights(gram: Any, losses: Any, state: Any) -> tuple[Any, Any]:
        n, inverse, cosines = _norms_and_cosines(gram)
        count: Any = optax.safe_increment(state.count)
        average = decay * state.ema.astype(n.dtype) + (1 - decay) * jnp.diagonal(gram)
        size = jnp.sqrt(average / (1 - decay ** count.astype(n.dtype)) + eps)
        m, others = n / _or_one(size), cosines[1:, 1:]
        wanted = tau * m[1:] - m[0] * cosines[0, 1:]  # what g~_1 lacks along each direction
        y = _nonnegative(others, wanted)
        lacks = (wanted - others @ y).max() > jnp.sqrt(_rounding(n)) * m.max()
        y = jnp.concatenate([m[:1], jnp.where(lacks, 0, y)])
        length = jnp.sqrt(jnp.maximum(y @ cosines @ y, 0))
        w = jnp.where(length > jnp.sqrt(_rounding(n)) * y.sum(), y * n[0] * inverse / _or_one(length), 0)
        return w, optax.EmaState(count, average.astype(state.ema.dtype))

    return Weighting(lambda num_losses: optax.EmaState(jnp.zeros([], jnp.int32), jnp.zeros(num_losses)), weights)


def _norms_and_cosines(gram: Any) -> tuple[Any, Any, Any]:
    """The norms, their reciprocals and the cosines; of a gradient that is zero the last two are zero."""
    n = jnp.sqrt(jnp.diagonal(gram))
    inverse = jnp.where(n > 0, 1 / _or_one(n), 0)
    return n, inverse, jnp.clip(gram * inverse[:, None] * inverse[None, :], -1, 1)


def _or_one(x: Any) -> Any:
    """A divisor: 1 in the place of 0."""
    return jnp.where(x == 0, 1, x)


def _rounding(x: Any) -> Any:
    """What rounding may make of an eigenvalue 0 of the cosines of N directions."""
    return 4 * len(x) * jnp.finfo(x.dtype).eps


def _shortness(n: Any) -> Any:
    """The least norm of a gradient that is not zero, divided by each norm."""
    return jnp.where(n > 0, jnp.where(n > 0, n, jnp.inf).min() / _or_one(n), 0)


def _solutions(a: Any, b: Any) -> Any:
    """`[2^N, N]`: for each subset of N directions, the first one empty, the y with A y = b in it, and 0 outside."""
    inside = np.array(list(itertools.product([False, True], repeat=len(b))))[:, :, None]
    eye = jnp.eye(len(b), dtype=b.dtype)
    systems = jnp.where(inside & inside.mT, (a + _rounding(b) * eye)[None], eye[None])  # positive definite: no pivots
    systems = jnp.concatenate([systems, jnp.where(inside, b[None, :, None], 0)], 2)
    for i in range(len(b)):
        row = systems[:, i : i + 1] / systems[:, i : i + 1, i : i + 1]
        systems = jnp.where(np.arange(len(b))[None, :, None] == i, row, systems - systems[:, :, i : i + 1] * row)
    return systems[:, :, -1]


def _valid(y: Any, slack: Any) -> Any:
    """Of the solutions of all subsets the one where neither y nor its slack is negative: convex problems have one."""
    return jnp.maximum(y[jnp.minimum(y, slack).min(1).argmax()], 0)


def _nonnegative(a: Any, b: Any) -> Any:
    """The y >= 0 with the least y'Ay / 2 - b'y, of which A y >= b where y = 0."""
    y = _solutions(a, b)
    return _valid(y, y @ a - b[None])


def _bargain(cosines: Any) -> Any:
    """The b > 0 with C b = 1 / b: the least b'Cb / 2 - sum log b, by Newton's method, damped where it is far off."""
    a = cosines + _rounding(cosines) * jnp.eye(len(cosines), dtype=cosines.dtype)

    def step(_: Any, b: Any) -> Any:
        slope = a @ b - 1 / b
        move = jnp.linalg.solve(a + jnp.diag(b**-2), -slope)
        decrement = jnp.sqrt(jnp.maximum(-move @ slope, 0))
        return b + move / jnp.where(decrement > 0.25, 1 + decrement, 1)

    return jax.lax.fori_loop(0, 40, step, jnp.ones_like(cosines[0]))
