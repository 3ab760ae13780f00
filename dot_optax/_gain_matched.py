"""The baseline that DOT should beat: one momentum, and the gains of DOT."""

from collections.abc import Sequence
from typing import Any

import jax
import optax

from dot_optax._checks import _check_scalar
from dot_optax._containers import _TASK_AND_KD, PerLoss
from dot_optax._dot import _add_l2, _check_learning_rate, _keep_dtypes, _trace, _widen
from dot_optax._masks import Mask, _l2_masks, _reach, _where


def gains(beta_task: jax.typing.ArrayLike = 0.825, beta_kd: jax.typing.ArrayLike = 0.975) -> PerLoss:
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
    beta_task: jax.typing.ArrayLike = 0.825,
    beta_kd: jax.typing.ArrayLike = 0.975,
    *,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    nesterov: bool = False,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The baseline that DOT should beat: one momentum, and the gains of DOT.

    .. math::
        g &\leftarrow \frac{1 - \mu}{1 - \beta_{task}} (g_{task} + \lambda \theta)
            + \frac{1 - \mu}{1 - \beta_{kd}} \, g_{kd}, \qquad \mu = (\beta_{task} + \beta_{kd}) / 2 \\
        v &\leftarrow g + \mu v \\
        \theta &\leftarrow \theta - \eta v

    Under a steady gradient of either loss, the steps become those of `dot` with the same arguments, so what `dot` does
    better than this is due to its two momenta and not to its larger effective learning rate.

    Args:
        learning_rate: :math:`\eta`, a scalar or a schedule.
        beta_task: as for `dot`, in [0, 1).
        beta_kd: as for `dot`, in [0, 1).
        weight_decay: :math:`\lambda \geq 0`, the coupled L2 penalty, as for `dot`.
        mask: which parameters `weight_decay` applies to, as for `dot`.
        nesterov: whether to use Nesterov momentum.
        accumulator_dtype: the dtype of the buffer; by default that of the parameters.

    Returns:
        A transformation from a container of two gradient trees to one update tree.

    Raises:
        TypeError: as `dot`.
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
    _check_learning_rate(learning_rate)
    both = gains(beta_task, beta_kd)
    mu = (beta_task + beta_kd) / 2
    task, kd = _reach(None)
    tx = optax.chain(
        _add_l2(weight_decay, *_l2_masks(weight_decay, mask, task, kd), task, kd),
        _weighted_sum([(1 - mu) * gain for gain in both]),
        _trace(_where(lambda _: mu, task), nesterov, accumulator_dtype),
        _keep_dtypes(optax.scale_by_learning_rate(learning_rate)),
    )

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        like = _TASK_AND_KD.unpack(updates, params)[0][0] if params is None else params
        new_updates, state = tx.update(updates, state, params, **extra_args)
        return optax.tree.cast_like(new_updates, like), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _weighted_sum(weights: Sequence[Any]) -> optax.GradientTransformation:
    """The sum of the losses' gradients with weights, in float32 or wider: the momentum rounds it."""

    def weighted(updates: Any, params: Any) -> Any:
        grads, _ = _TASK_AND_KD.unpack(updates, params)
        return jax.tree.map(lambda *g: sum(w * _widen(x) for w, x in zip(weights, g, strict=True)), *grads)

    return optax.stateless(weighted)
