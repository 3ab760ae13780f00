"""DOT: one momentum per loss, the larger one for the distillation loss; and the baseline to compare it with.

`dot` is SGD, `dot_adamw` is Adam for transformers, and `deepkd` has three losses.

DOT is the sum of two ordinary momenta, each of the gradient of its own loss.  In the words of the algebra:

>>> import optax, dot_optax
>>> dot = optax.chain(
...     dot_optax.per_loss(optax.trace(0.825), optax.trace(0.975)),  # v_i <- g_i + beta_i v_i for each loss
...     dot_optax.sum_losses(),                                      # u = sum_i v_i
...     optax.scale_by_learning_rate(0.05),                          # theta <- theta - lr u
... )

This equals `dot(0.05)`, except that `dot` also handles parameters that one loss alone reaches, an L2 penalty that joins one
of the gradients, momenta that follow schedules, and parameters of 16 bits, for which it keeps float32 buffers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike
from optax import ScalarOrSchedule

from dot_optax import _momenta
from dot_optax._checks import _check_scalar, _is_number, _listed
from dot_optax._containers import LossNames, PerLoss
from dot_optax._momenta import _add_decayed_weights, _optimizer, _wide_adam, _wide_momenta, _widest
from dot_optax._reach import Mask, Masks


def scale_by_dot(
    beta_task: ScalarOrSchedule = 0.825, beta_kd: ScalarOrSchedule = 0.975, *,
    nesterov: bool = False, accumulator_dtype: DTypeLike | None = None, reached: Masks = None
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    r"""The two momenta of DOT, summed: container in, tree out.

    .. math::
        v_{task} &\leftarrow g_{task} + \beta_{task} v_{task} \\
        v_{kd} &\leftarrow g_{kd} + \beta_{kd} v_{kd} \\
        u &= v_{task} + v_{kd}

    A parameter that only one of the losses reaches, according to `reached`, has one buffer, with the mean momentum
    :math:`(\beta_{task} + \beta_{kd}) / 2`, as in the published code.

    Args:
        beta_task: :math:`\beta_{task}`, in [0, 1), or a schedule (from the number of updates so far to the momentum).
        beta_kd: :math:`\beta_{kd}`, in [0, 1), or a schedule. See `betas` for the paper's choice, and its example for a
            warm-up.
        nesterov: use :math:`g_i + \beta_i v_i` of the new :math:`v_i` in the sum, as `optax.trace` has it.
        accumulator_dtype: the dtype of the buffers; by default that of the parameters, or float32 if they have 16 bits.
        reached: which loss reaches which parameter, as `PerLoss(task=mask, kd=mask)`. A mask is a pytree of bools of
            the structure of `params` or a prefix of it, or a callable from such a tree to the mask. The function
            `reached` computes it. By default both losses reach every parameter. A parameter that no loss reaches has
            no buffer and a zero update. A gradient where its loss is said not to reach is not read.

    Returns:
        A transformation from a container of two gradient trees (`PerLoss`, a 2-tuple, or a mapping) to one update tree
        with the dtypes of `params`. The buffers are `optax.tree.get(state, 'task').trace` and
        `optax.tree.get(state, 'kd').trace`, with an `optax.MaskedNode` where there is none (so `optax.tree.map_params`
        with further trees wants `is_leaf=lambda x: isinstance(x, optax.MaskedNode)`).

    Raises:
        TypeError: if a beta is not a number, a scalar array or a schedule; from `update` if the updates are not a container.
        ValueError: if a beta given as a Python number is outside [0, 1), or if `reached` does not fit the parameters;
            from `update`, as `per_loss`.

    Example:
        >>> import dot_optax
        >>> tx = dot_optax.scale_by_dot(beta_task=0.5, beta_kd=0.75)
        >>> params = {'w': 0.0}
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update(({'w': 1.0}, {'w': 10.0}), state, params)
        >>> print(updates['w'])  # (1 + 0.5 * 1) + (10 + 0.75 * 10)
        19.0

    References:
        Zhao et al., `DOT: A Distillation-Oriented Trainer <https://arxiv.org/abs/2307.08436>`_, 2023.
    """
    momenta = PerLoss(beta_task, beta_kd)
    return _momenta.scale_by_momenta(momenta, reached=reached, nesterov=nesterov, accumulator_dtype=accumulator_dtype)


def dot(
    learning_rate: ScalarOrSchedule, beta_task: ScalarOrSchedule = 0.825, beta_kd: ScalarOrSchedule = 0.975, *,
    weight_decay: ArrayLike = 0.0, mask: Mask | None = None, reached: Masks = None,
    nesterov: bool = False, accumulator_dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    r"""The Distillation-Oriented Trainer: SGD with one momentum per loss.

    .. math::
        g_{task} &\leftarrow g_{task} + \lambda \theta \\
        v_{task} &\leftarrow g_{task} + \beta_{task} v_{task} \\
        v_{kd} &\leftarrow g_{kd} + \beta_{kd} v_{kd} \\
        \theta &\leftarrow \theta - \eta (v_{task} + v_{kd})

    Take both gradients at the same parameters, and apply the weights of the losses before. With equal betas and no penalty
    this is `optax.sgd(learning_rate, momentum=beta)` on the summed gradient. A parameter that only one of the losses
    reaches, according to `reached`, has one buffer, with the mean momentum.

    `optax.inject_hyperparams` takes every callable for a schedule, and keeps numbers in the dtype of the parameters, where
    in bfloat16 0.975 is 0.9766 and its gain 43 instead of 40: give it `static_args=('mask', 'accumulator_dtype')`, and
    `hyperparam_dtype=jnp.float32` where parameters have 16 bits.

    Args:
        learning_rate: :math:`\eta`, a scalar or a schedule. It multiplies the summed buffers, so that a drop acts at
            once.
        beta_task: :math:`\beta_{task} = \mu - \delta`, in [0, 1), or a schedule.
        beta_kd: :math:`\beta_{kd} = \mu + \delta`, in [0, 1), or a schedule. The default is `betas(0.9, 0.075)`.
        weight_decay: :math:`\lambda \geq 0`, the coupled L2 penalty of the paper. It joins the task gradient before the
            momentum; where only the distillation loss reaches a parameter, it joins that gradient. For decoupled decay
            chain `scale_by_dot`, `optax.add_decayed_weights` and `optax.scale_by_learning_rate`.
        mask: which parameters `weight_decay` applies to: a pytree of bools of the structure of `params` or a prefix of
            it (but no single bool), or a callable from such a tree to the mask. By default all, norms and biases
            included, as in the paper.
        reached: which loss reaches which parameter; see `scale_by_dot`. A decayed parameter that no loss reaches is
            moved by its L2 penalty alone.
        nesterov: whether to use Nesterov momentum for each loss.
        accumulator_dtype: the dtype of the buffers; by default that of the parameters, or float32 if they have 16 bits.

    Returns:
        A transformation from a container of two gradient trees (`PerLoss`, a 2-tuple, or a mapping with the keys
        `task` and `kd`, or 0 and 1) to one update tree for `optax.apply_updates`.

    Raises:
        TypeError: if a hyperparameter is not a number (or a scalar array, or a schedule where that is allowed); from `update` if the updates are not a
            container.
        ValueError: if a beta given as a Python number is outside [0, 1), `weight_decay` is negative, or a mask does not
            fit the parameters; from `update`, as `per_loss`, or if `weight_decay` is used without `params`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, dot_optax
        >>> def loss_fn(w):
        ...     return dot_optax.PerLoss(task=jnp.sum((w - 1.0) ** 2), kd=jnp.sum((w - 1.1) ** 2))
        >>> tx = dot_optax.dot(0.01, *dot_optax.betas(momentum=0.8, delta=0.1))
        >>> w = jnp.zeros(2)
        >>> state = tx.init(w)
        >>> for _ in range(200):
        ...     losses, grads = dot_optax.value_and_grads(loss_fn)(w)
        ...     updates, state = tx.update(grads, state, w)
        ...     w = optax.apply_updates(w, updates)
        >>> print(f'{w[0]:.3f}')  # between the two minima, nearer to the distillation loss's
        1.075

    References:
        Zhao et al., `DOT: A Distillation-Oriented Trainer <https://arxiv.org/abs/2307.08436>`_, 2023.
    """
    momenta = PerLoss(beta_task, beta_kd)
    return _optimizer(learning_rate, _wide_momenta(momenta, weight_decay, mask, reached, nesterov, accumulator_dtype))


def scale_by_dot_adam(
    beta_task: ScalarOrSchedule = 0.825, beta_kd: ScalarOrSchedule = 0.975,
    b2: ArrayLike = 0.999, eps: ArrayLike = 1e-8, eps_root: ArrayLike = 0.0, mu_dtype: DTypeLike | None = None, *,
    nesterov: bool = False, reached: Masks = None, normalize: bool = False
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    r"""Adam with the two momenta of DOT: container in, tree out.

    .. math::
        m_i &\leftarrow \beta_i m_i + (1 - \beta_0) \, g_i \quad \text{for task and kd}, \qquad
            \beta_0 = (\beta_{task} + \beta_{kd}) / 2 \\
        \nu &\leftarrow b_2 \nu + (1 - b_2) \, (g_{task} + g_{kd})^2 \\
        u &= \left( \frac{m_{task}}{1 - \beta_{task}^t} + \frac{m_{kd}}{1 - \beta_{kd}^t} \right) \Big/
            \left( \sqrt{\frac{\nu}{1 - b_2^t} + \epsilon_{root}} + \epsilon \right)

    It is `scale_by_adam_momenta` of two losses, which says why there is one second moment and one factor.

    Args:
        beta_task: :math:`\beta_{task}`, in [0, 1), or a schedule.
        beta_kd: :math:`\beta_{kd}`, in [0, 1), or a schedule. See `betas`.
        b2: :math:`b_2`, the decay of the second moment, in [0, 1).
        eps: :math:`\epsilon`, added to the root.
        eps_root: :math:`\epsilon_{root}`, added inside the root.
        mu_dtype: the dtype of the first moments, as for `scale_by_adam_momenta`.
        nesterov: whether to use Nesterov momentum for each loss.
        reached: which loss reaches which parameter; see `scale_by_dot`.
        normalize: use :math:`1 - \beta_i` in the place of :math:`1 - \beta_0`. On three small problems it had lower test losses
            than the default for the paper's momenta, and on two of them higher ones with the momenta exchanged (see `betas`).

    Returns:
        A transformation from a container of two gradient trees to one update tree with the dtypes of `params`.

    Raises:
        TypeError: as `scale_by_adam_momenta`.
        ValueError: as `scale_by_adam_momenta`.

    Example:
        >>> import dot_optax
        >>> tx = dot_optax.scale_by_dot_adam(*dot_optax.betas(0.9, 0.075))
        >>> params = {'w': 0.0}
        >>> updates, _ = tx.update(({'w': 1.0}, {'w': 3.0}), tx.init(params), params)
        >>> print(f"{updates['w']:.3f}")  # ((1 - 0.9) / (1 - 0.825) * 1 + (1 - 0.9) / (1 - 0.975) * 3) / (1 + 3)
        3.143

    References:
        As `scale_by_adam_momenta`.
    """
    moments = PerLoss(beta_task, beta_kd), b2, eps, eps_root, mu_dtype
    return _momenta.scale_by_adam_momenta(*moments, nesterov=nesterov, reached=reached, normalize=normalize)


def dot_adamw(
    learning_rate: ScalarOrSchedule, beta_task: ScalarOrSchedule = 0.825, beta_kd: ScalarOrSchedule = 0.975,
    b2: ArrayLike = 0.999, eps: ArrayLike = 1e-8, eps_root: ArrayLike = 0.0, mu_dtype: DTypeLike | None = None,
    weight_decay: ArrayLike = 1e-4, mask: Mask | None = None, *,
    nesterov: bool = False, reached: Masks = None, normalize: bool = False
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    r"""DOT for transformers: AdamW with a first moment for each loss and one second moment.

    .. math::
        \theta \leftarrow \theta - \eta \, (u + \lambda \theta)

    where :math:`u` is the update of `scale_by_dot_adam`. With equal betas this is `optax.adamw` of the summed gradient.

    `optax.inject_hyperparams` takes every callable for a schedule, and keeps numbers in the dtype of the parameters, where
    in bfloat16 a `b2` of 0.999 is 1 and the updates are NaN: give it `static_args=('mask', 'mu_dtype')`, and
    `hyperparam_dtype=jnp.float32` where parameters have 16 bits.

    A steady gradient of the task is amplified by :math:`(1 - \beta_0) / (1 - \beta_{task})` = 0.57 and one of the
    distillation loss by 4 with the default momenta, where `optax.adamw` has 1 and 1: tune the learning rate anew.

    Args:
        learning_rate: :math:`\eta`, a scalar or a schedule.
        beta_task: as for `scale_by_dot_adam`, in [0, 1), or a schedule.
        beta_kd: as for `scale_by_dot_adam`, in [0, 1), or a schedule.
        b2: the decay of the second moment, in [0, 1).
        eps: :math:`\epsilon`, added to the root.
        eps_root: :math:`\epsilon_{root}`, added inside the root.
        mu_dtype: the dtype of the first moments, as for `scale_by_dot_adam`.
        weight_decay: :math:`\lambda \geq 0`, the decoupled decay of AdamW; it needs `params` in `update`.
        mask: which parameters are decayed: a pytree of bools of the structure of `params` or a prefix of it (but no
            single bool), or a function from `params` to the mask. By default all.
        nesterov: whether to use Nesterov momentum for each loss.
        reached: which loss reaches which parameter; see `scale_by_dot`.
        normalize: as for `scale_by_dot_adam`.

    Returns:
        A transformation from a container of two gradient trees to one update tree for `optax.apply_updates`.

    Raises:
        TypeError: as `scale_by_dot_adam`.
        ValueError: as `scale_by_dot_adam`, and if `weight_decay` is negative, the mask does not fit the parameters, or
            `weight_decay` is used without `params`.

    Example:
        >>> import jax.numpy as jnp, dot_optax
        >>> params = {'w': jnp.ones(2)}
        >>> optimizer = dot_optax.dot_adamw(1e-3, weight_decay=0.1)
        >>> grads = dot_optax.PerLoss(task={'w': jnp.ones(2)}, kd={'w': jnp.ones(2)})
        >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
        >>> print(updates['w'].round(6))  # -0.001 * ((0.5714 + 4) / 2 + 0.1 * 1)
        [-0.002386 -0.002386]

    References:
        Loshchilov and Hutter, `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_, 2019, and
        as `scale_by_adam_momenta`.
    """
    betas = PerLoss(beta_task, beta_kd)
    momenta = _wide_adam(betas, b2, eps, eps_root, mu_dtype, nesterov, reached, normalize)
    return _optimizer(learning_rate, momenta, _add_decayed_weights(weight_decay, mask))


class DeepKDLosses(NamedTuple):
    """One entry for each loss of DeepKD: gradients, momenta, masks or loss values.

    Wherever one is expected a 3-tuple in this order is accepted too, and so is a mapping with these names as keys.

    Attributes:
        task: the entry of the task loss (cross-entropy with the labels).
        target: the entry of the target-class part of the distillation loss (TCKD).
        non_target: the entry of its non-target-class part (NCKD).

    Example:
        >>> import dot_optax
        >>> dot_optax.DeepKDLosses(task=0.1, target=0.2, non_target=0.3).target
        0.2
    """

    task: Any
    target: Any
    non_target: Any


DeepKDLosses.__module__ = "dot_optax"  # where errors and pickles should look for it

_DELTAS = {  # from a momentum of 0.9
    "paper": DeepKDLosses(task=0.075, target=-0.075, non_target=0.075),
    "code": DeepKDLosses(task=-0.075, target=-0.075, non_target=0.05),
}


def deepkd(
    learning_rate: ScalarOrSchedule, *, variant: str = "paper", beta_task: ScalarOrSchedule | None = None,
    beta_target: ScalarOrSchedule | None = None, beta_non_target: ScalarOrSchedule | None = None,
    weight_decay: ArrayLike = 0.0, mask: Mask | None = None, reached: Masks = None,
    nesterov: bool = False, accumulator_dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    r"""SGD with the three momenta of DeepKD: task, target-class and non-target-class gradients.

    .. math::
        v_{task} &\leftarrow g_{task} + \beta_{task} v_{task} \\
        v_{target} &\leftarrow g_{target} + \beta_{target} v_{target} \\
        v_{non} &\leftarrow g_{non} + \beta_{non} v_{non} \\
        \theta &\leftarrow \theta - \eta \, (v_{task} + v_{target} + v_{non})

    The distillation loss comes in two parts: TCKD, between the probabilities of the target class and of all others, and
    NCKD, between the distributions over the other classes. All gradients are taken at the same parameters, of losses
    that the caller has weighted. With equal momenta this is `optax.sgd` on the summed gradient.

    Args:
        learning_rate: :math:`\eta`, a scalar or a schedule.
        variant: where the default momenta come from, with :math:`\mu` = 0.9. `"paper"`: :math:`\mu + 0.075`,
            :math:`\mu - 0.075`, :math:`\mu + 0.075`. `"code"`, what the released optimizer does to a parameter that all
            losses reach: :math:`\mu - 0.075` for the task and the target classes, :math:`\mu + 0.05` for the others.
        beta_task: the momentum of the task gradient, in [0, 1), or a schedule; by default that of the `variant`.
        beta_target: the momentum of the target-class gradient, likewise.
        beta_non_target: the momentum of the non-target-class gradient, likewise.
        weight_decay: :math:`\lambda \geq 0`, the coupled L2 penalty: it joins the gradient of the first loss that
            reaches the parameter. (The released optimizer adds it to the target-class gradient, which makes no
            difference there: with `"code"` both have the same momentum.)
        mask: which parameters `weight_decay` applies to, as for `dot`.
        reached: which loss reaches which parameter: a container of three masks; see `scale_by_momenta`.
        nesterov: whether to use Nesterov momentum for each loss.
        accumulator_dtype: the dtype of the buffers, as for `dot`.

    Returns:
        A transformation from a container of three gradient trees (`DeepKDLosses`, a 3-tuple in this order, or a mapping
        with the keys `task`, `target` and `non_target`) to one update tree for `optax.apply_updates`.

    Raises:
        TypeError: as `dot`.
        ValueError: as `dot`, and if there is no such `variant`.

    Example:
        >>> import jax.numpy as jnp, dot_optax
        >>> optimizer = dot_optax.deepkd(0.1)
        >>> w = jnp.zeros(())
        >>> grads, state = dot_optax.DeepKDLosses(task=1.0, target=1.0, non_target=1.0), optimizer.init(w)
        >>> for _ in range(2):
        ...     updates, state = optimizer.update(grads, state, w)
        >>> print(f'{updates:.4f}')  # -0.1 * (1.975 + 1.825 + 1.975)
        -0.5775

    References:
        Huang et al., `DeepKD <https://arxiv.org/abs/2505.15133>`_, 2025.
    """
    if variant not in _DELTAS:
        raise ValueError(f"deepkd: variant must be one of {_listed(_DELTAS)}, got {variant!r}")
    given = zip((beta_task, beta_target, beta_non_target), _DELTAS[variant], strict=True)
    betas = DeepKDLosses(*(0.9 + delta if beta is None else beta for beta, delta in given))
    return _optimizer(learning_rate, _wide_momenta(betas, weight_decay, mask, reached, nesterov, accumulator_dtype))


def betas(momentum: ScalarOrSchedule = 0.9, delta: ScalarOrSchedule = 0.075) -> PerLoss:
    r"""The two momenta of DOT.

    .. math::
        \beta_{task} = \mu - \delta, \qquad \beta_{kd} = \mu + \delta

    The default :math:`\delta` is that of the paper, and no recommendation. With a learning rate chosen for each method, its test
    loss was significantly above that of plain distillation on 17 of 18 small problems. With the momenta exchanged,
    :math:`\delta = -0.075`, it was significantly below on 9, and above on none. In a clone of the repository,
    `python -m benchmarks.trade_off --read=benchmarks/trade_off.json` prints the figures.

    Args:
        momentum: :math:`\mu`, the momentum that plain SGD would use; a number, a scalar array or a schedule.
        delta: :math:`\delta`, how far the two momenta move apart: 0.075 on CIFAR-100 and Tiny-ImageNet, 0.09 on
            ImageNet in the paper. A number, a scalar array or a schedule. See `gains` for what it does to a steady
            gradient.

    Returns:
        `PerLoss(task, kd)` of the two momenta, or of two schedules if an argument is one.

    Raises:
        TypeError: if an argument is neither a number, nor a scalar array, nor a schedule.
        ValueError: if both are Python numbers and a momentum would leave [0, 1).

    Example:
        >>> import dot_optax
        >>> dot_optax.betas(momentum=0.5, delta=0.25)
        PerLoss(task=0.25, kd=0.75)

        A warm-up, from equal momenta to the paper's within 1,000 steps:

        >>> import optax
        >>> optimizer = dot_optax.dot(0.05, *dot_optax.betas(0.9, optax.linear_schedule(0.0, 0.075, 1000)))

    References:
        Zhao et al., `DOT: A Distillation-Oriented Trainer <https://arxiv.org/abs/2307.08436>`_, 2023.
    """
    if callable(momentum) or callable(delta):

        def at(count: Any) -> PerLoss:
            values: list[Any] = [given(count) if callable(given) else given for given in (momentum, delta)]
            return betas(*values)

        return PerLoss(task=lambda count: at(count).task, kd=lambda count: at(count).kd)
    _check_scalar("momentum", momentum)
    _check_scalar("delta", delta)
    result = PerLoss(task=momentum - delta, kd=momentum + delta)
    for sign, beta in zip("-+", result, strict=True):  # task, kd
        if _is_number(beta) and not 0 <= beta < 1:
            raise ValueError(f"betas: momentum {sign} delta must lie in [0, 1), got {momentum:g} {sign} {delta:g}")
    return result


def gains(beta_task: float | jax.Array = 0.825, beta_kd: float | jax.Array = 0.975) -> PerLoss:
    r"""How far the momenta amplify a steady gradient.

    .. math::
        \mathrm{gain}(\beta) = \sum_{t=0}^\infty \beta^t = \frac{1}{1 - \beta}

    A learning rate that was tuned for plain momentum :math:`\mu` is in effect multiplied by
    :math:`\mathrm{gain}(\beta) / \mathrm{gain}(\mu)` for each loss: look here before you tune DOT.

    Args:
        beta_task: the momentum of the task loss, in [0, 1).
        beta_kd: the momentum of the distillation loss, in [0, 1).

    Returns:
        `PerLoss(task, kd)` of the two gains, without unit.

    Raises:
        TypeError: if a beta is not a number or a scalar array.
        ValueError: if a beta given as a Python number is outside [0, 1).

    Example:
        >>> import dot_optax
        >>> task, kd = dot_optax.gains(*dot_optax.betas(momentum=0.9, delta=0.075))
        >>> print(f'{task:.2f} {kd:.2f}')  # where SGD with momentum 0.9 has 10 and 10
        5.71 40.00

    References:
        Zhao et al., `DOT: A Distillation-Oriented Trainer <https://arxiv.org/abs/2307.08436>`_, 2023, whose two
        momenta these are the gains of.
    """
    _check_scalar("beta_task", beta_task, 0, 1)
    _check_scalar("beta_kd", beta_kd, 0, 1)
    return PerLoss(task=1 / (1 - beta_task), kd=1 / (1 - beta_kd))


def gain_matched_sgd(
    learning_rate: ScalarOrSchedule, beta_task: float | jax.Array = 0.825, beta_kd: float | jax.Array = 0.975, *,
    weight_decay: ArrayLike = 0.0, mask: Mask | None = None,
    nesterov: bool = False, accumulator_dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    r"""The baseline to compare DOT with: one momentum, and the gains of DOT.

    .. math::
        g &\leftarrow \frac{1 - \mu}{1 - \beta_{task}} (g_{task} + \lambda \theta)
            + \frac{1 - \mu}{1 - \beta_{kd}} \, g_{kd}, \qquad \mu = (\beta_{task} + \beta_{kd}) / 2 \\
        v &\leftarrow g + \mu v \\
        \theta &\leftarrow \theta - \eta v

    Under steady gradients of both losses the steps converge to those of `dot` with the same arguments. So what `dot` does
    better than this is due to its two momenta, and not to its other effective learning rates. It knows no `reached`.

    Args:
        learning_rate: :math:`\eta`, a scalar or a schedule.
        beta_task: as for `dot`, in [0, 1).
        beta_kd: as for `dot`, in [0, 1).
        weight_decay: :math:`\lambda \geq 0`, the coupled L2 penalty, as for `dot`.
        mask: which parameters `weight_decay` applies to, as for `dot`.
        nesterov: whether to use Nesterov momentum.
        accumulator_dtype: the dtype of the buffer, as for `dot`.

    Returns:
        A transformation from a container of two gradient trees to one update tree.

    Raises:
        TypeError: as `dot`, and if a beta is a schedule.
        ValueError: as `dot`.

    Example:
        >>> import jax.numpy as jnp, dot_optax
        >>> params, grads = jnp.zeros(()), (jnp.ones(()), jnp.ones(()))
        >>> for optimizer in (dot_optax.dot(0.1), dot_optax.gain_matched_sgd(0.1)):
        ...     state = optimizer.init(params)
        ...     for _ in range(1000):
        ...         updates, state = optimizer.update(grads, state, params)
        ...     print(f'{updates:.3f}')
        -4.571
        -4.571

    References:
        A control of ours; `python -m benchmarks.digits_learning_rates` compares it with `dot`.
    """
    _check_scalar("weight_decay", weight_decay, low=0)
    gain = gains(beta_task, beta_kd)
    mu = (beta_task + beta_kd) / 2
    loss_weights = [(1 - mu) * g for g in gain]

    def weighted_sum(updates: Any, params: Any) -> Any:
        grads, _ = LossNames.of(gain, "updates").gradients(updates, params)

        def add(*g: Any) -> Any:
            dtype = _widest(*g)
            return sum(jnp.asarray(w, dtype) * jnp.asarray(x, dtype) for w, x in zip(loss_weights, g, strict=True))

        return (jax.tree.map(add, *grads),)  # a container of one loss

    momentum = _wide_momenta((mu,), loss_weights[0] * weight_decay, mask, None, nesterov, accumulator_dtype)
    return _optimizer(learning_rate, optax.stateless(weighted_sum), momentum)
