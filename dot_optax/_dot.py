"""DOT: one momentum per loss, the larger one for the distillation loss; and the baseline to compare it with.

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

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dot_optax._checks import _check_scalar, _is_number
from dot_optax._containers import LossNames, PerLoss
from dot_optax._momenta import _optimizer, _wide_momenta, _widest, scale_by_momenta
from dot_optax._reach import Mask, Masks


def scale_by_dot(
    beta_task: optax.ScalarOrSchedule = 0.825,
    beta_kd: optax.ScalarOrSchedule = 0.975,
    *,
    nesterov: bool = False,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
    reached: Masks = None,
) -> optax.GradientTransformationExtraArgs:
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
    return scale_by_momenta(momenta, reached=reached, nesterov=nesterov, accumulator_dtype=accumulator_dtype)


def dot(
    learning_rate: optax.ScalarOrSchedule,
    beta_task: optax.ScalarOrSchedule = 0.825,
    beta_kd: optax.ScalarOrSchedule = 0.975,
    *,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    reached: Masks = None,
    nesterov: bool = False,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
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


def betas(momentum: optax.ScalarOrSchedule = 0.9, delta: optax.ScalarOrSchedule = 0.075) -> PerLoss:
    r"""The two momenta of DOT.

    .. math::
        \beta_{task} = \mu - \delta, \qquad \beta_{kd} = \mu + \delta

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
    learning_rate: optax.ScalarOrSchedule,
    beta_task: float | jax.Array = 0.825,
    beta_kd: float | jax.Array = 0.975,
    *,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    nesterov: bool = False,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
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
