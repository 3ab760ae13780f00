"""The fields of a config: their names on the command line, and the values that they may have."""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from examples.trainer.errors import UserError


class Rule(NamedTuple):
    """The values that a field may have."""

    holds: Callable[[Any], bool]
    expected: str  # in words, after "give"


def fields(config: ConfigDict) -> dict[str, Any]:
    """The fields of a config by their names on the command line, such as `optimizer.delta`."""
    flat = {}
    for name, value in config.items():
        nested = isinstance(value, ConfigDict)
        flat |= {f"{name}.{field}": v for field, v in fields(value).items()} if nested else {name: value}
    return flat


def check(values: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Raises if a value makes no sense, with the flag that sets it.

    Args:
        values: the fields of a config.
        rules: by the last part of a field's name: it means the same in every section.
    """
    for field, value in values.items():
        if value is None:
            raise UserError(f"--config.{field} is not set, and this config gives no default")
        rule = rules.get(field.rpartition(".")[2])
        if rule and not rule.holds(value):
            raise UserError(f"bad --config.{field}={value!r}: give {rule.expected}")


def whole(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and value >= least


def number(holds: Callable[[float], bool] = lambda value: True) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (int, float)) and math.isfinite(value) and holds(value)


def each(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, (tuple, list)) and all(map(holds, values))


def rising(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: holds(values) and all(a < b for a, b in itertools.pairwise(values))


def one_of(*names: str) -> Rule:
    return Rule(lambda value: value in names, f"one of {', '.join(names)}")


WHOLE = Rule(whole(0), "a whole number that is not negative")
COUNT = Rule(whole(1), "a whole number of at least 1")
COUNTS = Rule(each(whole(1)), "whole numbers of at least 1, separated by commas")
POSITIVE = Rule(number(lambda value: value > 0), "a finite number above 0")
NOT_NEGATIVE = Rule(number(lambda value: value >= 0), "a finite number that is not negative")

TRAINING = {
    "seed": WHOLE,
    "epochs": COUNT,
    "batch_size": COUNT,
    "eval_batch_size": COUNT,
    "checkpoint_every_steps": COUNT,
    "keep_checkpoints": COUNT,
    "max_consecutive_skips": COUNT,
    "parallel": one_of("jit", "pmap", "shard_map"),
    "devices": WHOLE,
    "dtype": one_of("float32", "bfloat16"),
}
