"""The container with one entry per loss, and how a transformation finds its losses in one.

A user's container may be a tuple, a NamedTuple or a mapping; `_Losses` matches it to the losses that a transformation
knows, by name or by position but never by the order of a dict, and checks the gradients in it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from dot_optax._checks import _LOOKS_SINGLE, _describe, _difference


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


class _Losses:
    """The losses that a transformation knows: their names, and how containers are matched to them."""

    def __init__(self, template: Any, *, ordered: bool | None = None):
        self.template = template
        # JAX sorts the keys of a dict; where order matters it is that in which they were given.
        self.names = tuple(template) if isinstance(template, Mapping) else tuple(_children(template)[0])
        self.ordered = isinstance(template, tuple) if ordered is None else ordered

    @classmethod
    def named(cls, losses: int | Sequence[str], where: str) -> "_Losses":
        """From the `losses` argument of `joint` and `wrap`."""
        if isinstance(losses, int) and not isinstance(losses, bool) and losses > 0:
            return cls((None,) * losses)
        if isinstance(losses, Sequence) and not isinstance(losses, str) and losses and len(set(losses)) == len(losses):
            if tuple(losses) == PerLoss._fields:
                return cls(PerLoss(None, None))
            return cls(dict.fromkeys(losses), ordered=True)
        raise ValueError(f"{where}: `losses` must be distinct names in order, or their number; got {losses!r}")

    def pack(self, entries: Sequence[Any]) -> Any:
        """The container of `entries`, which come in the order of `names`."""
        return _children(self.template)[1](dict(zip(self.names, entries, strict=True)))

    def values(self, container: Any) -> list[Any]:
        """The entries of one of our own containers, in the order of `names`."""
        children, _ = _children(container)
        return [children[name] for name in self.names]

    def match(self, container: Any, what: str = "updates", params: Any = None) -> tuple[Any, ...]:
        """The keys of a user's container, in the order of `names`."""
        children, _ = _children(_check_container(container, self, what=what))
        keys = self._keys(tuple(children), isinstance(container, tuple))
        if keys is None:
            hint = _hint(container, params)
            raise ValueError(f"{what}: expected {self._expected()}, got {_describe(container)}{hint}")
        return keys

    def unpack(self, updates: Any, params: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
        """The checked gradients of a user's container, and the function that puts new ones in a container like it."""
        keys = self.match(updates, params=params)
        children, rebuild = _children(updates)
        entries = [children[key] for key in keys]
        if isinstance(updates, Mapping) and not all(_same_structure(entry, params) for entry in entries):
            # Flax's mappings keep plain dicts inside and only give them their type when one asks for them by key.
            entries = [updates[key] for key in keys]
        reference, what = (entries[0], "the first loss") if params is None else (params, "params")
        for key, entry in zip(keys, entries, strict=True):
            problem = _difference(entry, reference, what)
            if problem:
                raise ValueError(f"updates{_entry_name(updates, key)}{problem}{_hint(updates, params)}")
        return entries, lambda new: rebuild(dict(zip(keys, new, strict=True)))

    def _keys(self, found: tuple[Any, ...], is_tuple: bool) -> tuple[Any, ...] | None:
        """The container's keys in the order of `names`, or None if they do not match."""
        positions = tuple(range(len(self.names)))
        if set(found) == set(self.names):
            return self.names
        if self.ordered and set(found) == set(positions):
            return positions
        if self.names == positions and is_tuple and len(found) == len(positions):
            return found
        return None

    def _expected(self) -> str:
        n = len(self.names)
        if self.names == tuple(range(n)):
            return f"a tuple of {n} gradient trees, one per loss"
        keys = ", ".join(map(repr, self.names))
        if self.names == PerLoss._fields:
            return f"PerLoss(task=..., kd=...), a 2-tuple in this order, or a mapping with the keys {keys}"
        return f"a mapping with the keys {keys}" + (f", or a {n}-tuple in this order" if self.ordered else "")


def _key(entry: Any) -> Any:
    """The plain key, name or index of one entry of a JAX key path."""
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return str(entry)


def _children(container: Any) -> tuple[dict[Any, Any], Callable[[Mapping[Any, Any]], Any]]:
    """The entries of a container by key, and the function that rebuilds it from a dict with the same keys."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(container, is_leaf=lambda x: x is not container)
    children = {_key(path[0]): child for path, child in paths}
    return children, lambda new: treedef.unflatten([new[key] for key in children])


def _check_container(
    container: Any, losses: _Losses | None = None, *, what: str = "updates", entry: str = "gradient tree"
) -> Any:
    if isinstance(container, (tuple, Mapping)) and len(container) and _is_pytree_node(container):
        return container
    expected = losses._expected() if losses else f"a container with one {entry} per loss (a tuple or a mapping)"
    hint = f"; {_LOOKS_SINGLE}" if what == "updates" else ""
    raise TypeError(f"{what}: expected {expected}, got {_describe(container)}{hint}")


def _is_pytree_node(container: Any) -> bool:
    """Whether JAX looks into the container: not into unregistered mappings, nor into dicts whose keys do not compare."""
    try:
        treedef = jax.tree.structure(container, is_leaf=lambda x: x is not container)
    except (TypeError, ValueError):
        return False
    return not jax.tree_util.treedef_is_leaf(treedef)


def _entry_name(container: Any, key: Any) -> str:
    return f".{key}" if hasattr(container, "_fields") else f"[{key!r}]"


def _hint(updates: Any, params: Any) -> str:
    if isinstance(updates, tuple) and updates and all(isinstance(entry, PerLoss) for entry in updates):
        return "; this looks like all that value_and_grads returned: unpack it, `values, grads = ...`"
    return f"; {_LOOKS_SINGLE}" if _same_structure(updates, params) else ""


def _same_structure(tree: Any, params: Any) -> bool:
    return params is not None and jax.tree.structure(tree) == jax.tree.structure(params)


_TASK_AND_KD = _Losses(PerLoss(None, None))  # what `dot` and its parts expect
