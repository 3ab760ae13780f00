"""DeepKD: three momenta, for the task and for both parts of the distillation loss."""

from typing import Any, NamedTuple

import jax
import optax

from dot_optax._checks import _listed
from dot_optax._momenta import _optimizer, _wide_momenta
from dot_optax._reach import Mask, Masks


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

_MOMENTUM = 0.9
_DELTAS = {
    "paper": DeepKDLosses(task=0.075, target=-0.075, non_target=0.075),
    "code": DeepKDLosses(task=-0.075, target=-0.075, non_target=0.05),
}


def deepkd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    variant: str = "paper",
    beta_task: optax.ScalarOrSchedule | None = None,
    beta_target: optax.ScalarOrSchedule | None = None,
    beta_non_target: optax.ScalarOrSchedule | None = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    reached: Masks = None,
    nesterov: bool = False,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
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
    given = DeepKDLosses(beta_task, beta_target, beta_non_target)
    defaults = (_MOMENTUM + delta for delta in _DELTAS[variant])
    betas = DeepKDLosses(*(own if beta is None else beta for beta, own in zip(given, defaults, strict=True)))
    return _optimizer(learning_rate, _wide_momenta(betas, weight_decay, mask, reached, nesterov, accumulator_dtype))
