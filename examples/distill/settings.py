"""The fields of a config: their names on the command line, and the values that they may have.

Whatever can be judged without the data is judged here, before anything is read, written or trained.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from examples.distill.errors import UserError
from examples.distill.images import PREPROCESSING


def fields(config: ConfigDict) -> dict[str, Any]:
    """The fields of a config by their names on the command line, such as `optimizer.delta`."""
    flat = {}
    for name, value in config.items():
        nested = isinstance(value, ConfigDict)
        flat |= {f"{name}.{field}": v for field, v in fields(value).items()} if nested else {name: value}
    return flat


def check(config: ConfigDict) -> None:
    """Raises if a value makes no sense, with the flag that sets it."""
    for field, value in fields(config).items():
        if value is None:
            raise UserError(f"--config.{field} is not set, and this config gives no default")
        holds, expected = _RULES.get(field.rpartition(".")[2], _ANY)
        if not holds(value):
            raise UserError(f"bad --config.{field}={value!r}: give {expected}")
    if config.distillation.task_weight == config.distillation.kd_weight == 0:
        raise UserError(
            "bad --config.distillation.task_weight and --config.distillation.kd_weight: both are 0, so that there is"
            " no loss; give at least one of them above 0"
        )


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and value >= least


def _number(holds: Callable[[float], bool] = lambda value: True) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (int, float)) and math.isfinite(value) and holds(value)


def _each(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, (tuple, list)) and all(map(holds, values))


def _rising(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: holds(values) and all(a < b for a, b in itertools.pairwise(values))


def _one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in names, f"one of {', '.join(names)}"


_ANY = (lambda value: True, "")
_WHOLE = (_whole(0), "a whole number that is not negative")
_COUNT = (_whole(1), "a whole number of at least 1")
_COUNTS = (_each(_whole(1)), "whole numbers of at least 1, separated by commas")
_POSITIVE = (_number(lambda value: value > 0), "a finite number above 0")
_NOT_NEGATIVE = (_number(lambda value: value >= 0), "a finite number that is not negative")

# By the last part of the name: a field means the same in every section.
_RULES = {
    "seed": _WHOLE,
    "epochs": _COUNT,
    "batch_size": _COUNT,
    "eval_batch_size": _COUNT,
    "checkpoint_every_steps": _COUNT,
    "keep_checkpoints": _COUNT,
    "max_consecutive_skips": _COUNT,
    "image_size": _COUNT,
    "workers": _WHOLE,
    "preprocessing": _one_of(*PREPROCESSING),
    "parallel": _one_of("jit", "pmap", "shard_map"),
    "devices": _WHOLE,
    "dtype": _one_of("float32", "bfloat16"),
    "hidden": _COUNTS,
    "drop_epochs": (_rising(_COUNTS[0]), "whole numbers of at least 1, each larger than the one before"),
    "drop_factor": _POSITIVE,
    "learning_rate": _POSITIVE,
    "temperature": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "task_weight": _NOT_NEGATIVE,
    "kd_weight": _NOT_NEGATIVE,
    "momentum": (_number(lambda value: 0 <= value < 1), "a number of at least 0 and below 1"),
    "mean": (_each(_number()), "finite numbers, one for each channel"),
    "std": (_each(_POSITIVE[0]), "finite numbers above 0, one for each channel"),
}
