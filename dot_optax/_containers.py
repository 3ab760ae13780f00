"""The container with one entry per loss, and how a transformation finds its losses in one.

A user's container may be a tuple, a NamedTuple or a mapping; `LossNames` matches it to the losses that a transformation
knows, by name or by position but never by the order of a dict, and checks the gradients in it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dot_optax._checks import LOOKS_SINGLE, _check_like, _describe, _listed


class PerLoss(NamedTuple):
    """One entry for each loss: gradients, momenta, masks, betas or loss values.

    Wherever a `PerLoss` is expected a plain 2-tuple in this order is accepted too, and so is a mapping with the keys
    `'task'` and `'kd'`, or 0 and 1.

    If an error of JAX names this class ("pytree structure error: different types", "cond branch outputs must have the
    same pytree structure"), a transformation or wrapper of Optax met gradients per loss where it expected one tree like
    the parameters. The remedy is a line: put a transformation inside `per_loss` or `joint`, a wrapper inside `wrap`, or
    either behind `sum_losses`.

    Attributes:
        task: the entry of the task loss (cross-entropy with the labels).
        kd: the entry of the distillation loss (closeness to the teacher).

    Example:
        >>> import dot_optax
        >>> grads = dot_optax.PerLoss(task={'w': 1.0}, kd={'w': 3.0})
        >>> grads.kd
        {'w': 3.0}
    """

    task: Any
    kd: Any


PerLoss.__module__ = "dot_optax"  # where errors and pickles should look for it


class LossNames:
    """The losses that a transformation knows: their names, and how containers are matched to them.

    Attributes:
        names: what the losses are called, in order: strings, or 0, 1, ... in a tuple.
        ordered: whether a plain tuple may be matched by this order, and so a mapping with the keys 0, 1, ...:
            `nnx.Optimizer` makes one of a tuple.
    """

    def __init__(self, template: Any, *, ordered: bool | None = None):
        self._template = template
        # JAX sorts the keys of a dict; where order matters it is that in which they were given.
        self.names = tuple(template) if isinstance(template, Mapping) else tuple(_entries_by_key(template)[0])
        self.ordered = isinstance(template, tuple) if ordered is None else ordered

    @classmethod
    def of(cls, container: Any, what: str) -> "LossNames":
        """From a container with one entry per loss; two losses in a plain tuple are called `task` and `kd`."""
        if not _entries_by_key(container)[0]:
            raise _mismatch(what, "a container with one entry per loss (a tuple or a mapping)", container)
        return cls(PerLoss(*container) if type(container) is tuple and len(container) == 2 else container)

    @classmethod
    def named(cls, losses: int | Sequence[str], where: str) -> "LossNames":
        """From the `losses` argument of a transformation: names, or how many there are."""
        counted = isinstance(losses, (int, np.integer)) and not isinstance(losses, bool)
        names = tuple(range(losses) if counted else losses if isinstance(losses, (list, tuple)) else ())
        if not all(isinstance(name, (str, int)) for name in names) or len(set(names)) < max(len(names), 1):
            raise ValueError(f"{where}: `losses` must be a tuple of distinct names, or their number; got {losses!r}")
        if names == PerLoss._fields:
            return cls(PerLoss(None, None))
        return cls(names) if counted else cls(dict.fromkeys(names), ordered=True)

    def pack(self, entries: Sequence[Any]) -> Any:
        """The container of `entries`, which come in the order of `names`."""
        return _entries_by_key(self._template)[1](dict(zip(self.names, entries, strict=True)))

    def entries(self, container: Any, what: str = "updates", params: Any = None) -> dict[Any, Any]:
        """The entries of a user's container by the user's keys, in the order of `names`."""
        found, n = _entries_by_key(container)[0], len(self.names)
        orders = [self.names, range(n)] if self.ordered else [self.names]
        if self.names == tuple(range(n)) and isinstance(container, tuple) and len(found) == n:
            orders.append(tuple(found))  # a NamedTuple for losses without names
        for keys in orders:
            if set(found) == set(keys):
                return {key: found[key] for key in keys}
        by_name = f"a mapping with the keys {_listed(self.names)}"
        in_order = f", or a {n}-tuple in this order" if self.ordered else ""
        per_loss = "PerLoss(task=..., kd=...), " if self.names == PerLoss._fields else ""
        raise _mismatch(what, per_loss + by_name + in_order, container, _hint(container, params))

    def gradients(self, updates: Any, params: Any, name: str = "updates") -> tuple[list[Any], Callable[..., Any]]:
        """The checked gradients of a user's container, and the function that puts new ones in a container like it."""
        entries = self.entries(updates, name, params)
        if isinstance(updates, Mapping) and not all(_same_structure(entry, params) for entry in entries.values()):
            # Flax's mappings keep plain dicts inside and only give them their type when one asks for them by key.
            entries = {key: updates[key] for key in entries}
        reference, what = (next(iter(entries.values())), "the first loss") if params is None else (params, "params")
        for key, entry in entries.items():
            path = f"{name}.{key}" if hasattr(updates, "_fields") else f"{name}[{key!r}]"
            _check_like(entry, reference, path, what, _hint(updates, params))
        rebuild = _entries_by_key(updates)[1]
        return list(entries.values()), lambda new: rebuild(dict(zip(entries, new, strict=True)))


def _key_of(entry: Any) -> Any:
    """The plain key, name or index of one entry of a JAX key path."""
    return next((getattr(entry, name) for name in ("key", "name", "idx") if hasattr(entry, name)), str(entry))


def _entries_by_key(container: Any) -> tuple[dict[Any, Any], Callable[[Mapping[Any, Any]], Any]]:
    """The entries of a container by key, and the function that rebuilds it from a dict with the same keys.

    There are none in what is neither a tuple nor a mapping, and in a mapping that JAX does not know.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(container, is_leaf=lambda x: x is not container)
    found = {_key_of(path[0]): child for path, child in paths if path and isinstance(container, (tuple, Mapping))}
    return found, lambda new: treedef.unflatten([new[key] for key in found])


def _same_structure(tree: Any, params: Any) -> bool:
    return params is not None and jax.tree.structure(tree) == jax.tree.structure(params)


def _mismatch(what: str, expected: str, container: Any, hint: str = "") -> Exception:
    is_container = bool(_entries_by_key(container)[0])
    if what == "updates" and not is_container:
        hint = f"; {LOOKS_SINGLE}"
    return (ValueError if is_container else TypeError)(f"{what}: expected {expected}, got {_describe(container)}{hint}")


def _hint(updates: Any, params: Any) -> str:
    if isinstance(updates, tuple) and updates and all(isinstance(entry, PerLoss) for entry in updates):
        return "; this looks like all that value_and_grads returned: unpack it, `values, grads = ...`"
    return f"; {LOOKS_SINGLE}" if _same_structure(updates, params) else ""
