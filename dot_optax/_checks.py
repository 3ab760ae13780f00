"""The checks behind the error messages: what was found, where, and what to do instead.

All run on shapes, dtypes and structures, so that they cost nothing in compiled code and work on tracers.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr

LOOKS_SINGLE = (
    "this looks like one gradient tree instead of one per loss: take the gradients with dot_optax.value_and_grads, "
    "or pass PerLoss(task_grads, kd_grads)"
)
SPLIT_OFF = "split it off, for example with equinox.partition(model, equinox.is_inexact_array) or nnx.split"


def _describe(value: Any) -> str:
    """A value in a few words, on one line, for an error message."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array of shape {tuple(value.shape)} and dtype {value.dtype}"
    if isinstance(value, (tuple, list, Mapping)):
        keys = getattr(value, "_fields", list(value) if isinstance(value, Mapping) else [])
        return f"a {type(value).__name__} of {len(value)}{': ' * bool(keys)}{_listed(keys)}"
    return f"{value!r:.60}".partition("\n")[0]


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(map(repr, names))


def _check_transformation(tx: Any, where: str) -> optax.GradientTransformationExtraArgs:
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(f"{where}: expected an optax.GradientTransformation, got {_describe(tx)}")
    return optax.with_extra_args_support(tx)


def _check_scalar(name: str, value: Any, low: float = -np.inf, high: float = np.inf) -> None:
    """Numbers must lie in [low, high); scalar arrays, which may be traced, are taken as they are."""
    if _is_number(value):
        if not low <= value < high:
            raise ValueError(f"{name} must be in [{low:g}, {high:g}), got {value}")
    elif np.shape(value) or _kind(value, (jnp.floating, jnp.integer)) is None:
        raise TypeError(f"{name} must be a number or a scalar array, got {_describe(value)}")


def _check_count(name: str, value: Any, low: int) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be a whole number of {low} or more, got {_describe(value)}")


def _is_number(value: Any) -> TypeGuard[float]:
    """A number that is known before tracing, and so can be range-checked."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _kind(leaf: Any, kinds: tuple[Any, ...] = (jnp.floating, jnp.complexfloating)) -> Any:
    """Which of these kinds of number an array or a number is, abstract or not; None if it is of another."""
    dtype = getattr(leaf, "dtype", type(leaf))
    return next((kind for kind in kinds if jnp.issubdtype(dtype, kind)), None)


def _check_trainable(tree: Any, what: str) -> None:
    """Raises where a tree has something else than arrays and numbers that have a gradient."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if _kind(leaf) is None:
            path = keystr(path)
            raise TypeError(f"{what}{path} must be floating point or complex, got {_describe(leaf)}; {SPLIT_OFF}")


def _check_like(tree: Any, reference: Any, name: str, what: str, hint: str) -> None:
    """Raises where `tree` differs from `reference` in structure, shape or kind of number; dtypes may differ in size."""
    _check_trainable(reference, name if tree is reference else what)
    found, wanted = ({keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(t)} for t in (tree, reference))
    for path in wanted | found:
        leaf, like = (_describe(leaves[path]) if path in leaves else "no leaf" for leaves in (found, wanted))
        if (path in found) != (path in wanted) or _form(found[path]) != _form(wanted[path]):
            raise ValueError(f"{name}{path}: expected what {what} has there, {like}; got {leaf}{hint}")
    if jax.tree.structure(tree) != jax.tree.structure(reference):
        raise ValueError(f"{name}: its containers differ from those of {what}: {jax.tree.structure(tree)!s:.200}{hint}")


def _form(leaf: Any) -> Any:
    return None if _kind(leaf) is None else (_kind(leaf), np.shape(leaf))
