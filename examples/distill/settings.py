"""A config whose values were judged: whatever can be, without the data and before anything is read or written."""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

import dot_optax
from examples.distill import methods, models
from examples.distill.images import PREPROCESSING
from examples.trainer import settings
from examples.trainer.errors import UserError
from examples.trainer.settings import COUNT, COUNTS, NOT_NEGATIVE, POSITIVE, WHOLE, Rule, each, number, one_of, rising


class Settings(NamedTuple):
    """A config that makes sense."""

    config: ConfigDict
    fields: dict[str, Any]  # the same by their names on the command line, such as `optimizer.delta`
    methods: list[str]  # to be trained
    betas: dot_optax.PerLoss  # DOT's momenta


def validated(config: ConfigDict) -> Settings:
    """Returns the settings of a config; raises if a value makes no sense, with the flag that sets it."""
    fields = settings.fields(config)
    settings.check(fields, _RULES)
    if config.distillation.task_weight == config.distillation.kd_weight == 0:
        raise UserError(
            "bad --config.distillation.task_weight and --config.distillation.kd_weight: both are 0, so that there is"
            " no loss; give at least one of them above 0"
        )
    for network in (config.teacher.model, config.student.model):
        models.check_name(network.name)
    # The report needs the momenta, whichever methods are trained.
    return Settings(config, fields, methods.parse(config.method), methods.betas(config.optimizer))


_RULES = settings.TRAINING | {
    "image_size": COUNT,
    "workers": WHOLE,
    "preprocessing": one_of(*PREPROCESSING),
    "hidden": COUNTS,
    "drop_epochs": Rule(rising(COUNTS.holds), "whole numbers of at least 1, each larger than the one before"),
    "drop_factor": POSITIVE,
    "learning_rate": POSITIVE,
    "temperature": POSITIVE,
    "weight_decay": NOT_NEGATIVE,
    "task_weight": NOT_NEGATIVE,
    "kd_weight": NOT_NEGATIVE,
    "momentum": Rule(number(lambda value: 0 <= value < 1), "a number of at least 0 and below 1"),
    "mean": Rule(each(number()), "finite numbers, one for each channel"),
    "std": Rule(each(POSITIVE.holds), "finite numbers above 0, one for each channel"),
}
