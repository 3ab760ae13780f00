"""The training methods that the example compares; each is one Optax transformation over per-loss gradients.

Every method is fed `PerLoss(task, kd)`, the gradients of the two *unweighted* losses, and begins by weighting them:
weighting a gradient is weighting its loss. So one train step serves all methods, and the losses that it reports mean
the same in all of them.
"""

from collections.abc import Callable

import optax
from ml_collections import ConfigDict

import dot_optax
from examples.trainer.errors import UserError

_PerLossOptimizer = optax.GradientTransformationExtraArgs


def learning_rate_schedule(config: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """Piecewise constant. A drop at 150 takes effect in epoch 151, counted from 1, as papers count."""
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


def kd_gain_matched(
    config: ConfigDict, weights: dot_optax.PerLoss, learning_rate: optax.ScalarOrSchedule
) -> _PerLossOptimizer:
    """Plain knowledge distillation with DOT's gains, but not its two momenta: it tells the two apart."""
    matched = dot_optax.gain_matched_sgd(learning_rate, *betas(config), weight_decay=config.weight_decay)
    return optax.chain(_weight(weights), matched)


def dot(config: ConfigDict, weights: dot_optax.PerLoss, learning_rate: optax.ScalarOrSchedule) -> _PerLossOptimizer:
    """The Distillation-Oriented Trainer: a momentum for each of the two weighted losses."""
    return optax.chain(_weight(weights), dot_optax.dot(learning_rate, *betas(config), weight_decay=config.weight_decay))


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


def betas(config: ConfigDict) -> dot_optax.PerLoss:
    """DOT's two momenta; `config` is an `optimizer` part of a config."""
    try:
        return dot_optax.betas(config.momentum, config.delta)
    except ValueError as error:
        raise UserError(f"bad --config.optimizer.delta={config.delta}: {error}") from error


def build(method: str, config: ConfigDict, weights: dot_optax.PerLoss, steps_per_epoch: int) -> _PerLossOptimizer:
    """Returns the optimizer of `method`; `config` is an `optimizer` part of a config."""
    return METHODS[method](config, weights, learning_rate_schedule(config, steps_per_epoch))


def _weight(weights: dot_optax.PerLoss) -> optax.GradientTransformationExtraArgs:
    return dot_optax.per_loss(optax.scale(weights.task), optax.scale(weights.kd))
