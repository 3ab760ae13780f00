"""The checks behind the error messages: what was found, where, and what to do instead.

All run on shapes, dtypes and structures, so that they cost nothing in compiled code and work on tracers.
"""

from collections.abc import Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax

LOOKS_SINGLE = (
    "this looks like one gradient tree instead of one per loss: take the gradients with dot_optax.value_and_grads, "
    "or pass PerLoss(task_grads, kd_grads)"
)


def describe(value: Any) -> str:
    """A value in a few words for an error message; never its numbers."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array of shape {tuple(value.shape)} and dtype {value.dtype}"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return f"{type(value).__name__} with the fields {', '.join(value._fields) or '(none)'}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {', '.join(map(repr, value)) or '(none)'}"
    return f"{value!r:.60} of type {type(value).__name__}"


def check_transformation(tx: Any, where: str) -> optax.GradientTransformation:
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(f"{where}: expected an optax.GradientTransformation, got {describe(tx)}")
    return tx


def check_scalar(name: str, value: Any, low: float = -np.inf, high: float = np.inf) -> None:
    """Numbers must lie in [low, high); scalar arrays, which may be traced, are taken as they are."""
    if is_number(value):
        if not low <= value < high:
            bounds = f"in [{low:g}, {high:g})" if high < np.inf else f"finite and at least {low:g}"
            raise ValueError(f"{name} must be {bounds}, got {value}")
    elif not (hasattr(value, "dtype") and np.shape(value) == () and jnp.issubdtype(value.dtype, jnp.number)):
        raise TypeError(f"{name} must be a number or a scalar array, got {describe(value)}")


def is_number(value: Any) -> TypeGuard[float]:
    """A number that is known before tracing, and so can be range-checked."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def difference(tree: Any, reference: Any, what: str) -> str:
    """Where `tree` first differs from `reference` in structure, shape or kind of number; empty if nowhere."""
    found = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    wanted = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(reference)}
    for path, leaf in wanted.items():
        if path not in found:
            return f"{path}: missing, but {what} has a leaf of shape {np.shape(leaf)} there"
    for path, leaf in found.items():
        if path not in wanted:
            return f"{path}: unexpected leaf ({describe(leaf)}), {what} has none there"
        problem = _leaf_difference(leaf, wanted[path], what)
        if problem:
            return f"{path}: {problem}"
    if jax.tree.structure(tree) != jax.tree.structure(reference):
        return f": its containers differ from those of {what}: {jax.tree.structure(tree)!s:.200}"
    return ""


def _leaf_difference(leaf: Any, reference: Any, what: str) -> str:
    try:
        dtype, shape = jnp.result_type(leaf), np.shape(leaf)
    except (TypeError, ValueError):
        return f"expected an array, got {describe(leaf)}"
    if shape != np.shape(reference):
        return f"shape {shape}, but {what} has shape {np.shape(reference)} there"
    if not jnp.issubdtype(dtype, jnp.inexact):
        return f"a gradient must be floating point or complex, got {dtype}"
    if jnp.issubdtype(dtype, jnp.complexfloating) and not jnp.issubdtype(
        jnp.result_type(reference), jnp.complexfloating
    ):
        return f"a complex gradient ({dtype}), but {what} is real there"
    return ""
