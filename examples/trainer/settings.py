"""The fields of a config: their names on the command line, and the values that they may have."""

import difflib
import itertools
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from examples.trainer.errors import UserError
from examples.trainer.sampling import FORMS


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


def check_names(values: Mapping[str, Any], known: Collection[str], free: Sequence[str] = ()) -> None:
    """Raises if a config lacks a field or has one that would go unnoticed, as a file of a user's can.

    Args:
        values: the fields of a config.
        known: the names of those that it must have; of `model`, a section may be there in its place.
        free: the sections that may have further fields, unless these look like a known one.
    """
    for name in known:
        if name not in values and not any(field.startswith(f"{name}.") for field in values):
            raise UserError(f"the config lacks the field {name!r}; begin with configs.default()")
    for field in values:
        if field in known or any(field.startswith(f"{name}.") for name in known):
            continue
        close = difflib.get_close_matches(field, known, n=1, cutoff=0.85)
        if close or not any(field.startswith(f"{section}.") for section in free):
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            raise UserError(f"the config has no field {field!r}; {hint}")


def check(values: Mapping[str, Any], rules: Mapping[str, Rule], free: Sequence[str] = ()) -> None:
    """Raises if a value makes no sense, with the flag that sets it.

    Args:
        values: the fields of a config.
        rules: by a field's name, or by the last part of it: most mean the same in every section.
        free: the sections whose fields may mean anything: for these, a rule holds by the whole name only.
    """
    for field, value in values.items():
        is_free = any(field.startswith(f"{section}.") for section in free)
        rule = rules.get(field) or (None if is_free else rules.get(field.rpartition(".")[2]))
        if value is None and (rule or not is_free):
            raise UserError(f"--config.{field} is not set, and this config gives no default")
        if not _can_be_kept(value):
            raise UserError(
                f"bad --config.{field}={value!r}: give Python's own numbers and texts, or tuples of them, which JSON can"
                " hold"
            )
        if rule and not rule.holds(value):
            raise UserError(f"bad --config.{field}={value!r}: give {rule.expected}")


def _can_be_kept(value: Any) -> bool:
    """Whether it can stand in the `config.json` of a working directory."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


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


TEXT = Rule(lambda value: isinstance(value, str), "a text")
YES_OR_NO = Rule(lambda value: isinstance(value, bool), "True or False")
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
    "shard_params": YES_OR_NO,
    "gradient_metrics": YES_OR_NO,
    "diagnostics": YES_OR_NO,
    "diagnostics_by": one_of("all", "layer"),
    "dtype": one_of("float32", "bfloat16"),
    "sampling.form": Rule(lambda value: value in FORMS, f"one of {', '.join(filter(None, FORMS))}"),
    "sampling.period": Rule(lambda value: whole(1)(value) and value <= 2**16, "a whole number from 1 to 65,536"),
}
