r"""What the losses do to each other, and to the weights: to be logged during training, or measured at its end.

    record                     a transformation that writes down norms, angles, shares and noise of the gradients
    compare                    the same of one container, without noise: a pure function
    effective_learning_rate    what a steady gradient is multiplied by, for each loss, under schedules
    gains_over_time            how the momenta come to amplify it, from the first step on
    update_to_weight           how long updates are, in terms of the weights
    scale_invariant_rate       the learning rate that a weight in front of a normalization sees
    filter_normalized          a random direction, as long as the weights
    landscape                  the losses along one direction, or on a plane of two
    sharpness, hessian_trace   the curvature of a loss: the largest eigenvalue, and the sum of all

All of them can be compiled, and none draws. A function with the argument `groups` returns one row for each of K groups of
parameters, in the order in which the groups come in the tree. `groups` is "all", for one group; "layer", where those with
the same parent are a group, such as a kernel and its bias; "leaf", where each parameter is one; or a function from the
path of a parameter, such as `('body', 0, 'kernel')`, to what names its group. Sums over parameters are taken in float32,
or in float64 where a parameter is. In float32 the square of a norm above 1e19 is infinite, and that of one below 1e-22 is
zero. Each parameter may be sharded in its own way.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dot_optax._aggregate import Groups, _grams, _group_function, _grouped, _wide
from dot_optax._checks import _check_count, _check_like, _check_scalar, _check_trainable, _describe, _kind
from dot_optax._containers import LossNames, PerLoss
from dot_optax._momenta import Betas, _init_buffers, _widest
from dot_optax.weightings import _norms_and_cosines

__all__ = ["Comparison", "RecordState", "compare", "effective_learning_rate", "filter_normalized", "gains_over_time"]
__all__ += ["hessian_trace", "landscape", "record", "scale_invariant_rate", "sharpness", "update_to_weight"]


class Comparison(NamedTuple):
    """What `compare` finds, for each of K groups of parameters, with N losses.

    Attributes:
        norms: `[K, N]`, the norms of the gradients.
        cosines: `[K, N, N]`, the cosines of the angles between them; below 0 two losses are in conflict. A gradient that
            is zero has a cosine of 0 with every other.
        shares: `[K, N]`, what each contributes to the sum. They add up to 1, and are NaN where the sum is zero. Where
            gradients nearly cancel, rounding shows: in float32 by some percent, if the sum is a thousandth of them in length.
    """

    norms: Any
    cosines: Any
    shares: Any


class RecordState(NamedTuple):
    """The state of `record`, for each of K groups of parameters, with N losses; zeros before the first update.

    Attributes:
        norms: `[K, N]`, the norms of the last gradients.
        cosines: `[K, N, N]`, the cosines of the angles between the last gradients.
        shares: `[K, N]`, what each of the last gradients contributes to their sum.
        conflicts: `[K, N, N]`, the conflict rate: how often the angle was above 90 degrees, a running mean.
        signal_to_noise: `[K, N]`, see `record`; NaN before the second update, and for a gradient that was always zero;
            infinite for another that was always the same.
        memory: the sum of the weights of all updates in a running mean, where the last one has a weight of 1.
        variances: `[K, N]`, the running variances of the gradients, not corrected.
        means: the running means of the gradients, a tuple of one tree like the parameters for each loss. It has no names, so
            that `optax.tree.get(state, 'kd')` still finds the momentum of `dot` behind it.
    """

    norms: Any
    cosines: Any
    shares: Any
    conflicts: Any
    signal_to_noise: Any
    memory: Any
    variances: Any
    means: Any


def record(
    decay: jax.typing.ArrayLike = 0.99, *, losses: int | Sequence[str] = PerLoss._fields, groups: Groups = "all"
) -> optax.GradientTransformationExtraArgs:
    r"""Writes down how the gradients of the losses compare, and passes them on unchanged: container in, container out.

    .. math::
        \rho_i = \frac{|\mu_i|^2}{\operatorname{E} |g_i - \mu_i|^2}, \qquad \mu_i = \operatorname{E} g_i

    is the signal-to-noise ratio of a gradient over a whole group of parameters. It is estimated from running moments with
    weights :math:`\beta^k`, :math:`\beta` the `decay` and k the age of a gradient. With :math:`\alpha = 1 /
    \sum_k \beta^k` after t updates,

    .. math::
        \delta &= g_t - m, \qquad m \leftarrow m + \alpha \delta, \qquad v \leftarrow (1 - \alpha) (v + \alpha |\delta|^2) \\
        q &= \frac{\sum_k \beta^{2k}}{(\sum_k \beta^k)^2}
            = \frac{1 - \beta}{1 + \beta} \cdot \frac{1 + \beta^t}{1 - \beta^t}, \qquad
        \rho = \max\Big(0, \frac{|m|^2 - q s}{s}\Big), \quad s = \frac{v}{1 - q}

    Here m and v are the weighted mean and variance from the first update on, so that there is no bias towards the zeros
    before it. The mean m has noise of its own, q times that of a gradient: it makes :math:`|m|^2` too large and v too
    small. Both are corrected: :math:`|m|^2 - q s` and s are unbiased if gradients are independent from step to step and
    their mean stays. A mean that moves within :math:`1 / (1 - \beta)` updates counts as noise. Where the noise is spread
    evenly over d numbers, the standard error of the ratio is about :math:`\sqrt{(2 q^2 + 4 \rho q + 2 \rho^2 q) / d}`.

    It keeps one tree like the parameters per loss.

    Args:
        decay: :math:`\beta` of the running means, in [0, 1). At 0 the last gradient alone counts: `conflicts` are its
            own, and `signal_to_noise` is NaN, as one gradient has no variance.
        losses: the names of the losses in order, or their number for an unnamed tuple of losses.
        groups: which parameters are taken together, as for all of `dot_optax.diagnostics`.

    Returns:
        A transformation from container to container with a `RecordState`, so that `optax.tree.get(state, 'cosines')`
        reads it. In front of the momenta it is about gradients. Behind `per_loss(trace, trace)` it is about momenta, and
        `shares` say what each loss contributes to the update; `signal_to_noise` has no meaning there, where each value
        remembers those before it. In `jax.shard_map` put it behind `average_over`, or it is about each device's part of
        the batch. A gradient that is not finite, or whose square is not, stays in the running means: skip such steps
        with `optax.apply_if_finite` in `wrap`, or scale the losses. Together with `aggregate`, whose state has `cosines`
        too, read `optax.tree.get(state, 'RecordState').cosines`.

    Raises:
        TypeError: from `init` if a leaf of the parameters cannot be trained; from `update` if the updates are not a
            container.
        ValueError: if `decay` is out of range, or `losses` or `groups` is none of these; from `update` as `per_loss`, or
            if the gradients differ from the parameters that `init` was given.

    Example:
        >>> import jax.numpy as jnp, optax, dot_optax
        >>> tx = optax.chain(
        ...     dot_optax.per_loss(optax.trace(0.825), optax.trace(0.975)),
        ...     dot_optax.diagnostics.record(),
        ...     dot_optax.sum_losses(),
        ...     optax.scale_by_learning_rate(0.1),
        ... )
        >>> params = {'w': jnp.zeros(2)}
        >>> grads = dot_optax.PerLoss(task={'w': jnp.array([3.0, 0.0])}, kd={'w': jnp.array([0.0, 1.0])})
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> print(optax.tree.get(state, 'norms'), optax.tree.get(state, 'cosines')[0, 0, 1])
        [[3. 1.]] 0.0

    References:
        McCandlish et al., `An Empirical Model of Large-Batch Training <https://arxiv.org/abs/1812.06162>`_, 2018, whose
        simple noise scale is the batch size over :math:`\rho`. West, `Updating mean and variance estimates: an improved
        method <https://doi.org/10.1145/359146.359153>`_, 1979, for the running variance.
    """
    names, group_of = LossNames.named(losses, "record"), _group_function(groups, "record")
    _check_scalar("decay", decay, 0, 1)

    def init(params: optax.Params) -> RecordState:
        _check_trainable(params, "params")
        leaves, n = jax.tree.leaves(params), len(names.names)
        dtype, (_, k) = jnp.finfo(_widest(*leaves)).dtype, _grouped(group_of, params, [True] * len(leaves))
        shapes = ([k, n], [k, n, n], [k, n], [k, n, n], [k, n], [], [k, n])
        means = tuple(_init_buffers(params, [True] * len(leaves), None) for _ in names.names)
        return RecordState(*(jnp.zeros(shape, dtype) for shape in shapes), means=means)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, RecordState]:
        trees, _ = names.gradients(updates, state.means[0])
        means, dtype, beta = state.means, state.norms.dtype, jnp.asarray(decay, state.norms.dtype)
        gram, memory = _grams_of(trees, group_of).astype(dtype), 1 + beta * state.memory
        alpha = 1 / memory
        deltas = [optax.tree.sub(optax.tree.cast_like(g, m), m) for m, g in zip(means, trees, strict=True)]
        moved = [_add_scaled(m, alpha, delta) for m, delta in zip(means, deltas, strict=True)]
        lengths = jnp.stack([_grams_of([tree], group_of)[:, 0, 0] for tree in moved + deltas], 1).astype(dtype)
        squared, of_deltas = jnp.split(lengths, 2, 1)
        spread = state.variances + alpha * of_deltas
        # s: in v / (1 - q) with 1 - q = 2 (1 - alpha) / (1 + beta), a factor 1 - alpha cancels, which is 0 at first.
        noise = (1 + beta) / 2 * spread
        signal = jnp.maximum(0, squared - (alpha - (1 - beta) / 2) * spread)
        ratio = jnp.where(memory > 1, signal / noise, jnp.nan)
        conflicting = jnp.where(jnp.isfinite(gram), gram < 0, jnp.nan).astype(dtype)
        conflicts = state.conflicts + alpha * (conflicting - state.conflicts)
        return updates, RecordState(*_comparison(gram), conflicts, ratio, memory, (1 - alpha) * spread, tuple(moved))

    return optax.GradientTransformationExtraArgs(init, update)


def compare(grads: Any, *, groups: Groups = "all") -> Comparison:
    r"""The norms of gradients, the angles between them, and what each contributes to their sum.

    .. math::
        n_i = |g_i|, \qquad c_{ij} = \frac{\langle g_i, g_j \rangle}{n_i n_j}, \qquad
        s_i = \frac{\langle g_i, \sum_j g_j \rangle}{|\sum_j g_j|^2}

    Given the momenta in place of the gradients, the :math:`s_i` are each loss's share of the update. A share is negative
    where the sum goes against the gradient of the loss, and that of another is above 1 then.

    Args:
        grads: a container with one tree per loss: gradients of *weighted* losses, or momenta.
        groups: which parameters are taken together, as for all of `dot_optax.diagnostics`.

    Returns:
        A `Comparison` with one row for each group. For complex gradients the real part of the inner product counts.

    Raises:
        TypeError: if `grads` is not a container, or one of its leaves is not of floating point or complex numbers.
        ValueError: if its entries differ in structure, shape or kind of number, or `groups` is none of these. The momenta
            of `dot(reached=...)` differ in structure: they are `optax.MaskedNode` where a loss does not reach. Put zeros
            there.

    Example:
        What each loss contributes to the updates of `dot`, read from its state:

        >>> import jax.numpy as jnp, optax, dot_optax
        >>> params, optimizer = {'w': jnp.zeros(2)}, dot_optax.dot(0.1, 0.5, 0.9)
        >>> state = optimizer.init(params)
        >>> grads = dot_optax.PerLoss(task={'w': jnp.array([2.0, 0.0])}, kd={'w': jnp.array([-1.0, 1.0])})
        >>> for _ in range(2):
        ...     updates, state = optimizer.update(grads, state, params)
        >>> momenta = dot_optax.PerLoss(*(optax.tree.get(state, name).trace for name in ('task', 'kd')))
        >>> found = dot_optax.diagnostics.compare(momenta)
        >>> print('shares {:.3f} {:.3f}, cosine {:.3f}'.format(*found.shares[0], found.cosines[0, 0, 1]))
        shares 0.685 0.315, cosine -0.707

    References:
        Yu et al., `Gradient Surgery for Multi-Task Learning <https://arxiv.org/abs/2001.06782>`_, 2020, who call an angle
        of more than 90 degrees a conflict.
    """
    names = LossNames.of(grads, "grads")
    _check_trainable(grads, "grads")
    trees, _ = names.gradients(grads, None, "grads")
    return _comparison(_grams_of(trees, _group_function(groups, "compare")))


def _comparison(gram: Any) -> Comparison:
    norms, _, cosines = jax.vmap(_norms_and_cosines)(gram)
    with_sum = gram.sum(2)
    return Comparison(norms, cosines, with_sum / with_sum.sum(1, keepdims=True))


def _grams_of(trees: Sequence[Any], group_of: Any) -> Any:
    """The inner products `[K, N, N]` of the trees, in each group."""
    rows = [_wide(row, [True] * len(row)) for row in zip(*map(jax.tree.leaves, trees), strict=True)]
    group, k = _grouped(group_of, trees[0], [True] * len(rows))
    dtype = jnp.finfo(_widest(*jax.tree.leaves(trees))).dtype
    return _grams(rows, group, jnp.zeros([k, len(trees), len(trees)], dtype))


def _add_scaled(tree: Any, factor: Any, other: Any) -> Any:
    """`tree + factor * other`, added in 32 bits or more, with the dtypes of `tree`."""
    return optax.tree.cast_like(optax.tree.add_scale(tree, factor, other), tree)


def effective_learning_rate(learning_rate: optax.ScalarOrSchedule, betas: Betas, step: Any = 0) -> Any:
    r"""The learning rate of each loss, times the gain of its momentum: what a steady gradient is multiplied by.

    .. math::
        \eta_i(t) = \frac{\eta(t)}{1 - \beta_i(t)}

    Two optimizers with equal :math:`\eta_i` take the same steps under gradients that stay, so compare these, not
    :math:`\eta`. If the weights of the losses differ as well, compare each weight times :math:`\eta_i`. For `dot_adamw`,
    whose gains are relative, multiply by :math:`1 - \beta_0`, the mean of the momenta.

    Args:
        learning_rate: :math:`\eta`, a number, or a schedule from the number of updates so far.
        betas: the momenta, in [0, 1), numbers or schedules, in a container.
        step: t, the number of updates so far; an array of them if the schedules take arrays, as those of Optax do.

    Returns:
        A container like `betas` (a `PerLoss` for a plain 2-tuple). Each value is that of momenta which have stayed where
        they are at step t for some :math:`1 / (1 - \beta_i)` steps; see `gains_over_time` for the way there.

    Raises:
        TypeError: if `betas` is not a container of numbers, scalar arrays or schedules, or `learning_rate` is none of
            these.
        ValueError: if a momentum given as a Python number is outside [0, 1).

    Example:
        >>> import jax.numpy as jnp, optax, dot_optax
        >>> learning_rate = optax.piecewise_constant_schedule(0.05, {100: 0.1})
        >>> rates = dot_optax.diagnostics.effective_learning_rate(
        ...     learning_rate, dot_optax.betas(0.9, 0.075), jnp.array([0, 200]))
        >>> for task, kd in zip(rates.task, rates.kd):  # where SGD with momentum 0.9 has 0.5 and 0.05
        ...     print(f'{task:.4f} {kd:.4f}')
        0.2857 2.0000
        0.0286 0.2000

    References:
        Zhao et al., `DOT: A Distillation-Oriented Trainer <https://arxiv.org/abs/2307.08436>`_, 2023, whose momenta have
        these gains.
    """
    names = LossNames.of(betas, "betas")
    _check_scalar("learning_rate", 0.0 if callable(learning_rate) else learning_rate)
    rate = learning_rate(step) if callable(learning_rate) else learning_rate
    return names.pack([rate / (1 - beta) for beta in _momenta_at(names, betas, step)])


def gains_over_time(betas: Betas, steps: int) -> Any:
    r"""How far each momentum amplifies a gradient that has been the same since the first step.

    .. math::
        G_i(t) = 1 + \beta_i(t) \, G_i(t - 1), \qquad G_i(-1) = 0

    With a momentum that stays this is :math:`(1 - \beta^{t + 1}) / (1 - \beta)`. It takes some :math:`1 / (1 - \beta)`
    steps to follow a momentum that moves. Times the learning rate it is the effective learning rate of SGD, start included.
    It does not hold for Adam, whose correction of the bias gives a steady gradient its whole gain at the first step.

    Args:
        betas: as for `effective_learning_rate`.
        steps: how many.

    Returns:
        A container like `betas` of arrays `[steps]`.

    Raises:
        TypeError, ValueError: as `effective_learning_rate`; ValueError also if `steps` is not a whole number of 0 or more.

    Example:
        A warm-up of delta: the gain of the momentum of the distillation loss, 40 in the end, comes later.

        >>> import optax, dot_optax
        >>> betas = dot_optax.betas(0.9, optax.linear_schedule(0.0, 0.075, 50))
        >>> gains = dot_optax.diagnostics.gains_over_time(betas, 400).kd
        >>> print(*(f'{gains[t]:.1f}' for t in (0, 50, 100, 399)))
        1.0 20.7 34.6 40.0

    References:
        Zhao et al., `DOT: A Distillation-Oriented Trainer <https://arxiv.org/abs/2307.08436>`_, 2023.
    """
    names = LossNames.of(betas, "betas")
    _check_count("steps", steps, 0)

    def amplify(gains: Any, step: Any) -> tuple[Any, Any]:
        gains = [1 + beta * gain for beta, gain in zip(_momenta_at(names, betas, step), gains, strict=True)]
        return gains, gains

    return names.pack(jax.lax.scan(amplify, [jnp.zeros([]) for _ in names.names], jnp.arange(steps))[1])


def _momenta_at(names: LossNames, betas: Any, step: Any) -> list[Any]:
    momenta = list(names.entries(betas, "betas").values())
    for name, beta in zip(names.names, momenta, strict=True):
        _check_scalar(f"beta_{name}", 0.0 if callable(beta) else beta, 0, 1)
    return [beta(step) if callable(beta) else beta for beta in momenta]


def update_to_weight(updates: Any, params: Any, *, groups: Groups = "all") -> jax.Array:
    r"""How long the updates are, where the weights have the length 1.

    .. math::
        r = |u| / |\theta|

    In front of a normalization, which hides the length of the weights, a small ratio is the angle of a step in radians if
    the update is orthogonal to the weights, as a gradient is there. Momentum and weight decay also have a part along the
    weights, so with them the angle is smaller. Where the ratio differs much between layers, one learning rate does not
    suit all.

    Args:
        updates: what the optimizer returns.
        params: the parameters, a tree of the same structure.
        groups: which parameters are taken together, as for all of `dot_optax.diagnostics`.

    Returns:
        An array `[K]`. Where the parameters are zero it is infinite, or NaN if the updates are zero as well.

    Raises:
        TypeError: if a parameter cannot be trained.
        ValueError: if the trees differ in structure, shape or kind of number, or `groups` is none of these.

    Example:
        >>> import jax.numpy as jnp, dot_optax
        >>> params = {'a': jnp.array([3.0, 4.0]), 'b': jnp.array([1.0])}
        >>> updates = {'a': jnp.array([0.0, 0.05]), 'b': jnp.array([0.1])}
        >>> print(dot_optax.diagnostics.update_to_weight(updates, params, groups='leaf'))
        [0.01 0.1 ]

    References:
        You et al., `Large Batch Training of Convolutional Networks <https://arxiv.org/abs/1708.03888>`_, 2017, who look
        at its inverse by layer.
    """
    _check_like(updates, params, "updates", "params", "")
    gram = _grams_of([updates, params], _group_function(groups, "update_to_weight"))
    return jnp.sqrt(gram[:, 0, 0] / gram[:, 1, 1])


def scale_invariant_rate(learning_rate: jax.typing.ArrayLike, params: Any, *, groups: Groups = "leaf") -> jax.Array:
    r"""The learning rate that a weight in front of a normalization sees.

    .. math::
        \tilde\eta = \eta / |w|^2

    A loss that does not depend on the length of w has a gradient that is orthogonal to w and as long as :math:`1 / |w|`.
    So a step of SGD with :math:`\eta` moves the direction :math:`w / |w|` as one with :math:`\tilde\eta` would at
    :math:`|w| = 1`. The length grows with each step, and weight decay shrinks it: :math:`\tilde\eta` changes during
    training although :math:`\eta` does not. It means nothing for weights that are not in front of BatchNorm, LayerNorm
    or the like, and it is for SGD: Adam's steps do not shrink with the gradient, there see `update_to_weight`.

    Args:
        learning_rate: :math:`\eta`, a scalar; with momentum, one of `effective_learning_rate`.
        params: the parameters, or those in front of a normalization.
        groups: which parameters are one w, as for all of `dot_optax.diagnostics`: by default each by itself.

    Returns:
        An array `[K]`, infinite where the weights are zero.

    Raises:
        TypeError: if `learning_rate` is not a number, but a schedule for example: give its value at the step in question;
            or if a parameter cannot be trained.
        ValueError: if `groups` is none of these.

    Example:
        DOT multiplies the rate of the distillation loss by 40, and weights that are twice as long divide it by 4:

        >>> import jax, jax.numpy as jnp, dot_optax
        >>> params = {'conv1': jnp.ones((3, 3, 1, 4)), 'conv2': 2 * jnp.ones((3, 3, 1, 4))}
        >>> rates = dot_optax.diagnostics.effective_learning_rate(0.05, dot_optax.betas())
        >>> print(dot_optax.diagnostics.scale_invariant_rate(rates.kd, params).round(4))
        [0.0556 0.0139]

    References:
        Hoffer et al., `Norm matters: efficient and accurate normalization schemes in deep networks
        <https://arxiv.org/abs/1803.01814>`_, 2018. Li and Arora, `An Exponential Learning Rate Schedule for Deep Learning
        <https://arxiv.org/abs/1910.07454>`_, 2020.
    """
    _check_scalar("learning_rate", learning_rate)
    _check_trainable(params, "params")
    return learning_rate / _grams_of([params], _group_function(groups, "scale_invariant_rate"))[:, 0, 0]


def filter_normalized(key: jax.Array, params: Any) -> Any:
    r"""A random direction whose filters are as long as those of the network.

    .. math::
        d_f \leftarrow \frac{|\theta_f|}{|d_f|} \, d_f, \qquad d \sim \mathcal{N}(0, 1)

    A filter f is what makes one output: all but the last axis of a kernel of `Linear`, `Dense` or `Conv` of Flax. So the
    landscapes of networks whose weights differ in length can be compared, as those of networks with BatchNorm or ReLU do
    without differing as functions. What has no or one axis (biases, and the scales of normalizations) does not move: there
    the direction is 0. For other layouts it is only a convention: a kernel of attention `(in, heads, features)` has one
    filter for each feature of all heads, an embedding one for each feature of all words.

    Args:
        key: a random key.
        params: the parameters, whose kernels have their outputs on the last axis.

    Returns:
        A tree like `params`, of 32 bits or more.

    Raises:
        TypeError: if a parameter cannot be trained.

    Example:
        >>> import jax, jax.numpy as jnp, dot_optax
        >>> params = {'kernel': jnp.array([[3.0, 0.0], [4.0, 1.0]]), 'bias': jnp.ones(2)}
        >>> direction = dot_optax.diagnostics.filter_normalized(jax.random.key(0), params)
        >>> print(jnp.linalg.norm(direction['kernel'], axis=0).round(3), direction['bias'])
        [5. 1.] [0. 0.]

    References:
        Li et al., `Visualizing the Loss Landscape of Neural Nets <https://arxiv.org/abs/1712.09913>`_, 2018.
    """
    _check_trainable(params, "params")

    def normalize(d: Any, p: Any) -> Any:
        d, p = _wide([d, p], (True, True))
        if d.ndim < 2:
            return jnp.zeros_like(d)
        of_d, of_p = (jnp.sqrt(jnp.sum(jnp.abs(x) ** 2, range(d.ndim - 1), keepdims=True)) for x in (d, p))
        return d * (of_p / of_d)

    return jax.tree.map(normalize, optax.tree.random_like(key, jax.tree.map(jnp.asarray, params)), params)


def landscape(loss_fn: Callable[[Any], Any], params: Any, directions: Sequence[Any], distances: Any) -> Any:
    r"""The losses around the parameters: along one direction, or on the plane of two.

    .. math::
        L_{ab} = \ell(\theta + x_a d_1 + x_b d_2)

    The loss is compiled once, and computed at one point after the other.

    **BatchNorm.** Away from :math:`\theta` the running statistics are those of other weights: with them one measures how
    wrong they are. So let `loss_fn` compute those of the batch, as in training, at every point; take a batch that is
    large enough, always the same. The example shows it. The same holds for `sharpness` and `hessian_trace`.

    Args:
        loss_fn: from the parameters alone to a loss, or to any tree of them, such as `PerLoss`.
        params: :math:`\theta`.
        directions: a list of one tree like `params` or of two (or more), such as `filter_normalized` makes; or the way
            to other parameters, `optax.tree.sub(others, params)`, with 0 and 1 among the distances.
        distances: the x, an array `[n]` or a list, along every direction. Choose them odd in number to have 0 among them.

    Returns:
        What `loss_fn` returns, with an array `[n]` in the place of each loss, or `[n, n]` for two directions, whose first
        axis is that of the first direction. Parameters of 16 bits are rounded behind the sum.

    Raises:
        TypeError: if `directions` is not a list or tuple with one tree or more, or if a parameter cannot be trained.
        ValueError: if a direction differs from `params` in structure, shape or kind of number, or if `distances` is not of
            one axis of real numbers.

    Example:
        A network of Flax with BatchNorm. The copy's new statistics are dropped:

        >>> import jax, jax.numpy as jnp, optax, dot_optax
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
        >>> x = y = jax.random.normal(jax.random.key(1), (64, 4))
        >>> graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        >>> def loss_fn(params):
        ...     network = nnx.merge(graphdef, params, rest, copy=True)
        ...     network.train()  # the statistics of this batch and of these weights
        ...     return jnp.mean((network(x)[:, :4] - y) ** 2)
        >>> direction = dot_optax.diagnostics.filter_normalized(jax.random.key(2), params)
        >>> losses = dot_optax.diagnostics.landscape(loss_fn, params, [direction], jnp.linspace(-1, 1, 5))
        >>> print(losses.shape, bool(losses[2] == jax.jit(loss_fn)(params)))
        (5,) True

    References:
        Li et al., `Visualizing the Loss Landscape of Neural Nets <https://arxiv.org/abs/1712.09913>`_, 2018. Goodfellow
        et al., `Qualitatively characterizing neural network optimization problems <https://arxiv.org/abs/1412.6544>`_,
        2015, for the way between two networks.
    """
    if not isinstance(directions, (list, tuple)) or not directions:
        raise TypeError(f"directions must be a list of one tree like params or of more, got {_describe(directions)}")
    for i, direction in enumerate(directions):
        _check_like(direction, params, f"directions[{i}]", "params", "")
    if np.ndim(distances) != 1 or jnp.iscomplexobj(axis := jnp.asarray(distances)):
        raise ValueError(f"distances must be an array [n] or a list of numbers, got {_describe(distances)}")
    grid = jnp.stack(jnp.meshgrid(*[axis] * len(directions), indexing="ij"), -1)

    def at(point: Any) -> Any:
        moved = jax.tree.map(lambda p: jnp.asarray(p, _widest(p)), params)
        for x, direction in zip(point, directions, strict=True):
            moved = _add_scaled(moved, x, optax.tree.cast_like(direction, moved))
        return loss_fn(optax.tree.cast_like(moved, params))

    losses = jax.lax.map(at, grid.reshape(-1, len(directions)))
    return jax.tree.map(lambda x: x.reshape(grid.shape[:-1] + x.shape[1:]), losses)


def sharpness(loss_fn: Callable[[Any], Any], params: Any, key: jax.Array, *, num_iters: int = 100) -> jax.Array:
    r"""The largest eigenvalue of the Hessian, by power iteration.

    .. math::
        \lambda_{max}(H), \qquad H = \nabla^2 \ell(\theta)

    Plain gradient descent with a learning rate above :math:`2 / \lambda_{max}` does not stay here; with a momentum
    :math:`\beta`, above :math:`2 (1 + \beta) / \lambda_{max}`.

    Args:
        loss_fn: from the parameters alone to one loss. With BatchNorm see `landscape`.
        params: :math:`\theta`. Those of 16 bits are given to it in float32.
        key: a random key, for the first vector.
        num_iters: at most so many products of H and a vector in each of two searches.

    Returns:
        A scalar :math:`\lambda`. The first search finds the largest magnitude: an eigenvalue of either sign, or a mixture of
        two with opposite signs. The second one, for :math:`H + c I` with c 1.1 times as large, where all eigenvalues
        are positive, finds the largest. With the unit vector v of its end, :math:`\lambda = v^\top H v` is at most
        :math:`\lambda_{max}`. An eigenvalue lies within :math:`r = |H v - \lambda v|` of it, and the result is NaN unless
        :math:`r \le 10^{-2} |\lambda|`. If all others are further than g from :math:`\lambda`, the error is at most
        :math:`r^2 / g`. All this holds up to rounding. That this eigenvalue is the largest is not certain, but likely: the
        first vector is random. NaN comes from too few iterations, and where H is 0 or :math:`\lambda_{max}` is nearly 0
        in comparison with the magnitude of the others.

    Raises:
        TypeError: if `params` has no leaf, or one that is not of real floating point numbers, or if `loss_fn` returns
            anything but one real number.
        ValueError: if `num_iters` is below 1.

    Example:
        >>> import jax, jax.numpy as jnp, dot_optax
        >>> def loss_fn(w):
        ...     return 2.0 * w[0] ** 2 - 3.0 * w[1] ** 2
        >>> print(dot_optax.diagnostics.sharpness(loss_fn, jnp.ones(2), jax.random.key(0)).round(3))  # of 4 and -6
        4.0

    References:
        Cohen et al., `Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability
        <https://arxiv.org/abs/2103.00065>`_, 2021, also for the limit with momentum. Parlett, `The Symmetric
        Eigenvalue Problem <https://doi.org/10.1137/1.9781611971163>`_, 1998, for what the residual says of the error.
        `optax.power_iteration` does the work; for more than the largest eigenvalue `matfree
        <https://pnkraemer.github.io/matfree/>`_ has Lanczos' method.
    """
    _check_scalar("num_iters", num_iters, 1)
    product, params = _hessian(loss_fn, params, "sharpness")

    def search(start: Any, shift: Any, tolerance: float) -> tuple[Any, Any]:
        """Where power iteration for `H + shift` ends: the vector, and the product of H and it."""
        found: Any = optax.power_iteration(
            lambda v: _add_scaled(product(v), shift, v), v0=start, num_iters=num_iters, error_tolerance=tolerance
        )
        return found[1], product(found[1])

    start = optax.tree.random_like(key, params)
    v, hv = search(start, 0.0, 1e-3)
    # |H v| is at most the largest magnitude, and near it long before v is: eigenvectors of both signs count for it.
    shift = 1.1 * optax.tree.norm(hv)
    # Where v is an eigenvector already, the search ends soon; where it is that of the lowest eigenvalue, the random part,
    # which is too short to cancel it, takes over. Tolerances are relative to the sum with the shift, so this one is less.
    v, hv = search(optax.tree.add_scale(v, 0.5 / optax.tree.norm(start), start), shift, 1e-4)
    largest: Any = optax.tree.vdot(v, hv)
    residual = optax.tree.norm(_add_scaled(hv, -largest, v))
    return jnp.where(residual <= 1e-2 * jnp.abs(largest), largest, jnp.nan)


def hessian_trace(loss_fn: Callable[[Any], Any], params: Any, key: jax.Array, *, num_samples: int = 64) -> Any:
    r"""The trace of the Hessian, the sum of its eigenvalues, by Hutchinson's method.

    .. math::
        \operatorname{tr} H = \operatorname{E} \, z^\top H z, \qquad z_j = \pm 1 \text{ at random}

    Args:
        loss_fn: from the parameters alone to one loss. With BatchNorm see `landscape`.
        params: the parameters. Those of 16 bits are given to it in float32.
        key: a random key.
        num_samples: how many z, two or more.

    Returns:
        `(trace, standard_error)`: the mean over the z, and its standard error. The variance of one sample is twice the sum
        of the squares beside the diagonal; so a diagonal Hessian is exact with any z.

    Raises:
        TypeError: if `params` has no leaf, or one that is not of real floating point numbers, or if `loss_fn` returns
            anything but one real number.
        ValueError: if there are less than two z, which have no standard error.

    Example:
        >>> import jax, jax.numpy as jnp, dot_optax
        >>> def loss_fn(w):
        ...     return 2.0 * w[0] ** 2 - 3.0 * w[1] ** 2
        >>> trace, standard_error = dot_optax.diagnostics.hessian_trace(loss_fn, jnp.ones(2), jax.random.key(0))
        >>> print(trace, standard_error)  # 4 - 6
        -2.0 0.0

    References:
        Hutchinson, `A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines
        <https://doi.org/10.1080/03610918908812806>`_, 1989.
    """
    _check_count("num_samples", num_samples, 2)
    product, params = _hessian(loss_fn, params, "hessian_trace")

    def sample(key: Any) -> Any:
        z = optax.tree.random_like(key, params, jax.random.rademacher)
        return optax.tree.vdot(z, product(z))

    values = jax.lax.map(sample, jax.random.split(key, num_samples))
    return values.mean(), values.std(ddof=1) / num_samples**0.5


def _hessian(loss_fn: Callable[[Any], Any], params: Any, where: str) -> tuple[Callable[[Any], Any], Any]:
    """The product of the Hessian and a tree, forward over reverse, and the parameters in 32 bits or more."""
    _check_trainable(params, f"{where}: params")
    if not jax.tree.leaves(params) or any(map(jnp.iscomplexobj, jax.tree.leaves(params))):
        raise TypeError(f"{where}: params must have real numbers and no complex ones, got {_describe(params)}")
    params = jax.tree.map(lambda p: jnp.asarray(p, _widest(p)), params)
    found = jax.eval_shape(loss_fn, params)
    if getattr(found, "shape", None) != () or _kind(found, (jnp.floating,)) is None:
        raise TypeError(f"{where}: loss_fn must return one real number, a loss or the sum; got {_describe(found)}")
    return lambda v: jax.jvp(jax.grad(loss_fn), (params,), (v,))[1], params
