"""The checks behind the error messages: what was found, where, and what to do instead.

All run on shapes, dtypes and structures, so that they cost nothing in compiled code and work on tracers.
"""

from collections.abc import Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax

_LOOKS_SINGLE = (
    "this looks like one gradient tree instead of one per loss: take the gradients with dot_optax.value_and_grads, "
    "or pass PerLoss(task_grads, kd_grads)"
)


def _describe(value: Any) -> str:
    """A value in a few words, on one line, for an error message."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array of shape {tuple(value.shape)} and dtype {value.dtype}"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return f"{type(value).__name__} with the fields {', '.join(value._fields) or '(none)'}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {', '.join(map(repr, value)) or '(none)'}"
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return f"{value!r:.60}"
    return f"an object of type {type(value).__name__}"


def _check_transformation(tx: Any, where: str) -> optax.GradientTransformation:
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(f"{where}: expected an optax.GradientTransformation, got {_describe(tx)}")
    return tx


def _check_scalar(name: str, value: Any, low: float = -np.inf, high: float = np.inf) -> None:
    """Numbers must lie in [low, high); scalar arrays, which may be traced, are taken as they are."""
    if _is_number(value):
        if not low <= value < high:
            bounds = f"in [{low:g}, {high:g})" if high < np.inf else f"finite and at least {low:g}"
            raise ValueError(f"{name} must be {bounds}, got {value}")
    elif not (hasattr(value, "dtype") and np.shape(value) == () and _is_real(value.dtype)):
        raise TypeError(f"{name} must be a number or a scalar array, got {_describe(value)}")


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def _is_number(value: Any) -> TypeGuard[float]:
    """A number that is known before tracing, and so can be range-checked."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _difference(tree: Any, reference: Any, what: str) -> str:
    """Where `tree` first differs from `reference` in structure, shape or kind of number; empty if nowhere."""
    found = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    wanted = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(reference)}
    for path, leaf in wanted.items():
        if path not in found:
            return f"{path}: missing, but {what} has a leaf of shape {np.shape(leaf)} there"
    for path, leaf in found.items():
        if path not in wanted:
            return f"{path}: unexpected leaf ({_describe(leaf)}), {what} has none there"
        problem = _leaf_difference(leaf, wanted[path], what)
        if problem:
            return f"{path}: {problem}"
    if jax.tree.structure(tree) != jax.tree.structure(reference):
        return f": its containers differ from those of {what}: {jax.tree.structure(tree)!s:.200}"
    return ""


def _leaf_difference(leaf: Any, reference: Any, what: str) -> str:
    kind, wanted = _shape_and_dtype(leaf), _shape_and_dtype(reference)
    if kind is None or wanted is None:
        return f"expected an array, got {_describe(leaf if kind is None else reference)}"
    (shape, dtype), (wanted_shape, wanted_dtype) = kind, wanted
    if shape != wanted_shape:
        return f"shape {shape}, but {what} has shape {wanted_shape} there"
    if not jnp.issubdtype(wanted_dtype, jnp.inexact):
        return f"{what} is {wanted_dtype} there, which cannot be moved: leave it out, for example with optax.partition"
    if not jnp.issubdtype(dtype, jnp.inexact):
        return f"a gradient must be floating point or complex, got {dtype}"
    if jnp.issubdtype(dtype, jnp.complexfloating) and not jnp.issubdtype(wanted_dtype, jnp.complexfloating):
        return f"a complex gradient ({dtype}), but {what} is real there"
    return ""


def _shape_and_dtype(leaf: Any) -> tuple[tuple[int, ...], Any] | None:
    """The shape and dtype of an array or a number, abstract or not; None of anything else."""
    if leaf is None or isinstance(leaf, (str, bytes)):
        return None
    try:
        return np.shape(leaf), jnp.result_type(leaf)
    except (TypeError, ValueError):
        return None
