"""A config whose values were judged: whatever can be, without the data and before anything is read or written."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

import dot_optax
from examples.distill import methods, models
from examples.distill.configs import default
from examples.trainer import settings
from examples.trainer.errors import UserError
from examples.trainer.sampling import Sampling
from examples.trainer.settings import (
    COUNT,
    COUNTS,
    NOT_NEGATIVE,
    POSITIVE,
    TEXT,
    WHOLE,
    YES_OR_NO,
    Rule,
    each,
    number,
    one_of,
    rising,
)


class Settings(NamedTuple):
    """A config that makes sense."""

    config: ConfigDict
    fields: dict[str, Any]  # the same by their names on the command line, such as `optimizer.delta`
    methods: list[str]  # to be trained
    betas: dot_optax.PerLoss  # DOT's momenta


def validated(config: ConfigDict) -> Settings:
    """Returns the settings of a config; raises if a value makes no sense, with the flag that sets it."""
    fields = settings.fields(config)
    settings.check_names(fields, settings.fields(default()), free=("dataset.split_sizes", "optimizer"))
    settings.check(fields, _RULES | _model_rules(fields), free=_MODELS)
    for section, names in _WEIGHTS.items():
        if not any(config[section][name] for name in names):
            flags = [f"--config.{section}.{name}" for name in names]
            raise UserError(
                f"bad {', '.join(flags[:-1])} and {flags[-1]}: {'both' if len(flags) == 2 else 'all'} are 0, so that there is"
                " no loss; give at least one of them above 0"
            )
    for section, network in zip(_MODELS, (config.teacher.model, config.student.model), strict=True):
        if "name" not in network:
            raise UserError(f"the config lacks the field '{section}.name', the name of a model")
        models.check_name(network.name)
        not_options = _NOT_OPTIONS.intersection(network)
        if not_options:
            raise UserError(
                f"--config.{section}.{min(not_options)} is no option of a model: the dataset and other fields say it"
            )
    wanted = methods.parse(config.method)
    methods.check(config, wanted)
    # Of fields that have the same effect one form, since they tell what a working directory belongs to.
    fields |= {f"sampling.{field}": value for field, value in Sampling.from_config(config.sampling)._asdict().items()}
    # The report needs the momenta, whichever methods are trained.
    return Settings(config, fields, wanted, methods.betas(config.optimizer))


def _model_rules(fields: dict[str, Any]) -> dict[str, Rule]:
    """The rules of the options of `mlp`; other models judge their own."""
    return {f"{section}.hidden": COUNTS for section in _MODELS if fields.get(f"{section}.name") == "mlp"}


def _whole(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and least <= value <= most


def _fits_float32(value: float) -> bool:
    """Whether it is neither lost nor infinite in float32, in which networks are trained."""
    return value == 0 or float(_FLOAT32.tiny) <= abs(value) <= float(_FLOAT32.max)


_MODELS = ("teacher.model", "student.model")
_NOT_OPTIONS = frozenset(("num_classes", "input_shape", "dtype", "axis_name", "rngs"))  # of a model; see `models.build`
_WEIGHTS = {
    "distillation": ("task_weight", "kd_weight"),
    "dkd": ("task_weight", "alpha", "beta"),
    "deepkd": ("task_weight", "target_weight", "non_target_weight"),
    "crd": ("task_weight", "crd_weight"),
}
_FLOAT32 = np.finfo(np.float32)
_MAX_EPOCHS = 1_000_000

_POSITIVE = Rule(number(lambda value: value > 0 and _fits_float32(value)), f"{POSITIVE.expected} that float32 can hold")
_NOT_NEGATIVE = Rule(
    number(lambda value: value >= 0 and _fits_float32(value)), f"{NOT_NEGATIVE.expected} and that float32 can hold"
)
_NUMBER = Rule(number(), "a finite number")
_MOMENTUM = Rule(
    number(lambda value: 0 <= value < 1 and np.float32(value) < 1),
    "a number of at least 0 and below 1, in float32 too",
)
_EPOCHS = Rule(_whole(1, _MAX_EPOCHS), f"a whole number of at least 1 and at most {_MAX_EPOCHS:,}")
_WARMUP = Rule(_whole(0, _MAX_EPOCHS), f"a whole number that is not negative, of at most {_MAX_EPOCHS:,}")

_SPLIT = Rule(TEXT.holds, "a split, in the syntax of TFDS")
_MODEL = Rule(lambda value: False, "a ConfigDict with the name of a model and its options")
# Of any distillation, whatever it is of.
DISTILLATION = {
    "method": Rule(TEXT.holds, "names of methods, separated by commas"),
    "report_note": TEXT,
    "seed": Rule(_whole(0, 2**32 - 1), "a whole number that is not negative, of at most 4,294,967,295"),
    "epochs": _EPOCHS,
    "schedule": one_of("steps", "cosine"),
    "warmup_epochs": _WARMUP,
    "delta_warmup_epochs": _WARMUP,
    "drop_epochs": Rule(
        rising(each(_EPOCHS.holds)),
        f"whole numbers of at least 1 and at most {_MAX_EPOCHS:,}, each larger than the one before",
    ),
    "drop_factor": _POSITIVE,
    "learning_rate": _POSITIVE,
    "temperature": Rule(number(lambda value: 1e-3 <= value <= 1e4), "a finite number from 0.001 to 10,000"),
    "weight_decay": _NOT_NEGATIVE,
    "decay_mask": Rule(lambda value: value in ("", "all", "kernels"), "all, kernels, or nothing"),
    "task_weight": _NOT_NEGATIVE,
    "kd_weight": _NOT_NEGATIVE,
    "momentum": _MOMENTUM,
    "b2": _MOMENTUM,
    "eps": _POSITIVE,
    "delta": _NUMBER,
}
_RULES = (
    settings.TRAINING
    | DISTILLATION
    | {
        "dataset.name": TEXT,
        "dataset.train": _SPLIT,
        "dataset.validation": _SPLIT,
        "dataset.test": _SPLIT,
        "preprocessing": TEXT,
        "in_memory": YES_OR_NO,
        "prepare": YES_OR_NO,
        "synthetic": YES_OR_NO,
        "data_dir": TEXT,
        "teacher.model": _MODEL,
        "teacher.model.name": TEXT,
        "teacher.checkpoint": TEXT,
        "teacher.train": YES_OR_NO,
        "student.model": _MODEL,
        "student.model.name": TEXT,
        "image_size": COUNT,
        "workers": WHOLE,
        "alpha": _NOT_NEGATIVE,
        "beta": _NOT_NEGATIVE,
        "target_weight": _NOT_NEGATIVE,
        "non_target_weight": _NOT_NEGATIVE,
        "crd_weight": _NOT_NEGATIVE,
        "dim": COUNT,
        "negatives": COUNT,
        "delta_task": _NUMBER,
        "delta_target": _NUMBER,
        "delta_non_target": _NUMBER,
        "top_k_fraction": Rule(number(lambda value: 0 <= value <= 1), "a number from 0 to 1"),
        "top_k_phases": Rule(
            lambda value: each(number(lambda part: 0 <= part <= 1))(value) and len(value) == 2 and value[0] < value[1],
            "two numbers from 0 to 1, the second larger than the first",
        ),
        "mean": Rule(each(number(_fits_float32)), "finite numbers, one for each channel"),
        "std": Rule(each(_POSITIVE.holds), "finite numbers above 0, one for each channel"),
    }
)
