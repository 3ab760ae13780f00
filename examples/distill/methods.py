"""The training methods that the example compares; each is one Optax transformation over per-loss gradients.

Every method is fed `PerLoss(task, kd)`, the gradients of the two *unweighted* losses, and begins by weighting them:
weighting a gradient is weighting its loss. So one train step serves all methods, and the losses that it reports mean
the same in all of them.
"""

from collections.abc import Callable

import optax
from ml_collections import ConfigDict

import dot_optax
from examples.distill.errors import UserError

_PerLossOptimizer = optax.GradientTransformationExtraArgs


def learning_rate_schedule(config: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """Piecewise constant. A drop at 150 takes effect in epoch 151, counted from 1, as papers count."""
    if not all(isinstance(epoch, int) for epoch in config.drop_epochs):
        raise UserError(f"bad drop_epochs {config.drop_epochs!r}: give whole numbers, for example 150,180,210")
    drops = {epoch * steps_per_epoch: config.drop_factor for epoch in config.drop_epochs}
    return optax.piecewise_constant_schedule(config.learning_rate, drops)


def ce(config: ConfigDict, weights: dot_optax.PerLoss, learning_rate: optax.ScalarOrSchedule) -> _PerLossOptimizer:
    """Cross-entropy alone, with weight 1. The teacher is trained like this."""
    del weights  # They weigh two losses against each other.
    return optax.chain(
        dot_optax.per_loss(optax.identity(), optax.set_to_zero()),
        dot_optax.sum_losses(),
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(learning_rate, momentum=config.momentum),
    )


def kd(config: ConfigDict, weights: dot_optax.PerLoss, learning_rate: optax.ScalarOrSchedule) -> _PerLossOptimizer:
    """Plain knowledge distillation: SGD with momentum on the weighted sum."""
    return optax.chain(
        _weight(weights),
        dot_optax.sum_losses(),
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(learning_rate, momentum=config.momentum),
    )


def dot(config: ConfigDict, weights: dot_optax.PerLoss, learning_rate: optax.ScalarOrSchedule) -> _PerLossOptimizer:
    """The Distillation-Oriented Trainer: a momentum for each of the two weighted losses."""
    betas = dot_optax.betas(config.momentum, config.delta)
    return optax.chain(
        _weight(weights), dot_optax.dot(learning_rate, betas.task, betas.kd, weight_decay=config.weight_decay)
    )


def relative_gains(config: ConfigDict) -> dot_optax.PerLoss:
    """How much further DOT's momenta carry a steady gradient than plain momentum does, for each loss.

    A momentum buffer multiplies a steady gradient by its gain 1 / (1 - beta); these are DOT's two gains divided by the
    gain of plain momentum.
    """
    betas = dot_optax.betas(config.momentum, config.delta)
    return dot_optax.PerLoss(*((1 - config.momentum) / (1 - beta) for beta in betas))


def kd_gain_matched(
    config: ConfigDict, weights: dot_optax.PerLoss, learning_rate: optax.ScalarOrSchedule
) -> _PerLossOptimizer:
    """Plain distillation with the loss weights (and the L2 on the task side) multiplied by DOT's relative gains.

    It has DOT's gains but not DOT's two momenta, so it separates the two.
    """
    gains = relative_gains(config)
    matched = config.copy_and_resolve_references()
    matched.weight_decay = config.weight_decay * gains.task
    return kd(matched, dot_optax.PerLoss(weights.task * gains.task, weights.kd * gains.kd), learning_rate)


METHODS: dict[str, Callable[..., _PerLossOptimizer]] = {
    "ce": ce,
    "kd": kd,
    "kd_gain_matched": kd_gain_matched,
    "dot": dot,
}


def parse(method: str) -> list[str]:
    """Splits the comma-separated `config.method` into known names, each once."""
    names = list(dict.fromkeys(name.strip() for name in method.split(",") if name.strip()))
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise UserError(
            f"bad --config.method={method!r}: give one or more of {', '.join(METHODS)}, separated by commas"
        )
    return names


def build(method: str, config: ConfigDict, weights: dot_optax.PerLoss, steps_per_epoch: int) -> _PerLossOptimizer:
    """Returns the optimizer of `method`; `config` is an `optimizer` part of a config."""
    try:
        return METHODS[method](config, weights, learning_rate_schedule(config, steps_per_epoch))
    except ValueError as error:
        raise UserError(f"bad --config.optimizer: {error}") from error


def _weight(weights: dot_optax.PerLoss) -> optax.GradientTransformationExtraArgs:
    return dot_optax.per_loss(optax.scale(weights.task), optax.scale(weights.kd))
