"""Gradients per loss: the container, and the transformations that work on it.  Start reading here.

An ordinary Optax transformation maps one gradient tree to one update tree.  A transformation *in loss space* is fed a
container with one gradient tree per loss, `PerLoss(task=..., kd=...)`, while `params` stays the plain tree:

    per_loss     container -> container   one transformation for each loss
    joint        container -> container   one transformation over all losses together
    sum_losses   container -> tree        back to ordinary Optax
    wrap         container -> tree        a wrapper of optimizers (MultiSteps, ...) around a loss-space optimizer

Nothing here knows about momentum: the optimizers built from this algebra live in their own modules.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dot_optax._checks import LOOKS_SINGLE, check_transformation, describe, difference


class PerLoss(NamedTuple):
    """One entry for each loss: gradients, momenta, masks, betas or loss values.

    Wherever a `PerLoss` is expected a plain 2-tuple in this order is accepted too, and so is a mapping with the keys
    `'task'` and `'kd'`, or 0 and 1.

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


def per_loss(*transformations: Any) -> optax.GradientTransformationExtraArgs:
    r"""Gives each loss its own transformation: container in, container out.

    .. math::
        u_i, s_i \leftarrow \mathrm{update}_i(g_i, s_i, \theta)

    Args:
        *transformations: one `optax.GradientTransformation` per loss, in order (two are named `task` and `kd`), or a
            single container of them: a `PerLoss`, any tuple or NamedTuple, or a dict with one key per loss.

    Returns:
        A transformation whose updates are a container with one tree per loss, each of the structure of `params`. The
        container that comes in keeps its type. The state is a container too: `state.kd` is the state of the second
        transformation. A dict is always matched by its keys, never by its order.

    Raises:
        TypeError: from `per_loss` if an argument is not a gradient transformation; from `update` if the updates are
            not a container.
        ValueError: from `update` if a loss is missing or unknown, or if an entry differs from `params` in structure,
            shape or kind of number. The message names the tree path and both shapes.

    Example:
        Clip the distillation gradient only:

        >>> import optax, dot_optax
        >>> tx = optax.chain(
        ...     dot_optax.per_loss(optax.identity(), optax.clip(1.0)),
        ...     dot_optax.sum_losses(),
        ... )
        >>> params = {'w': 0.0}
        >>> updates, _ = tx.update(({'w': 5.0}, {'w': 7.0}), tx.init(params), params)
        >>> print(updates['w'])
        6.0

    References:
        Zhao et al., `DOT: A Distillation-Oriented Trainer <https://arxiv.org/abs/2307.08436>`_, 2023, whose update is
        `per_loss` of two traces.
    """
    losses = _Losses(_as_container(transformations))
    for name, tx in zip(losses.names, losses.values(losses.template), strict=True):
        if not isinstance(tx, optax.GradientTransformation):
            raise TypeError(f"per_loss: expected an optax.GradientTransformation for {name!r}, got {describe(tx)}")
    txs = [optax.with_extra_args_support(tx) for tx in losses.values(losses.template)]

    def init(params: optax.Params) -> Any:
        return losses.pack([tx.init(params) for tx in txs])

    def update(updates: Any, state: Any, params: optax.Params | None = None, **extra_args: Any) -> tuple[Any, Any]:
        grads, repack = losses.unpack(updates, params)
        results = [
            tx.update(g, s, params, **extra_args) for tx, g, s in zip(txs, grads, losses.values(state), strict=True)
        ]
        new_updates, new_state = zip(*results, strict=True)
        return repack(new_updates), losses.pack(new_state)

    return optax.GradientTransformationExtraArgs(init, update)


def sum_losses() -> optax.GradientTransformationExtraArgs:
    r"""Adds the entries of the container: one update tree for ordinary Optax.

    .. math::
        u = \sum_i u_i

    Returns:
        A stateless transformation from a container (any tuple, NamedTuple or mapping, with one entry or more) to a
        tree of the structure of the entries. Where `params` is given to `update`, the sum has the dtypes of `params`.

    Raises:
        TypeError: from `update` if the updates are not a container.
        ValueError: from `update` if the entries differ from `params`, or from each other.

    Example:
        Plain distillation, from the same gradients as DOT's:

        >>> import optax, dot_optax
        >>> tx = optax.chain(dot_optax.sum_losses(), optax.sgd(0.1, momentum=0.9))
        >>> params = {'w': 0.0}
        >>> updates, _ = tx.update(({'w': 1.0}, {'w': 3.0}), tx.init(params), params)
        >>> print(updates['w'])
        -0.4
    """

    def update(updates: Any, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any) -> Any:
        del extra_args
        trees, _ = _Losses(_check_container(updates)).unpack(updates, params)
        return _sum_like(trees, params), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def joint(
    tx: optax.GradientTransformation, *, losses: int | Sequence[str] = PerLoss._fields
) -> optax.GradientTransformationExtraArgs:
    r"""Applies one ordinary transformation to the whole container: one norm, one check, one state over all losses.

    .. math::
        (u_1, \ldots, u_N), s \leftarrow \mathrm{update}((g_1, \ldots, g_N), s, (\theta, \ldots, \theta))

    Args:
        tx: the transformation. It sees every gradient tree as if they were parts of one larger tree, with the
            parameters repeated for each.
        losses: the names of the losses in order, or their number for an unnamed tuple of losses.

    Returns:
        A transformation from container to container, of the type that came in.

    Raises:
        TypeError: if `tx` is not a gradient transformation, or, from `update`, if the updates are not a container.
        ValueError: from `update`, as `per_loss`.

    Example:
        Clip the norm of both gradients taken together, which keeps their ratio:

        >>> import jax.numpy as jnp, optax, dot_optax
        >>> tx = dot_optax.joint(optax.clip_by_global_norm(1.0))
        >>> params = {'w': jnp.zeros(1)}
        >>> updates, _ = tx.update(({'w': jnp.array([3.0])}, {'w': jnp.array([4.0])}), tx.init(params), params)
        >>> print(updates[0]['w'], updates[1]['w'])
        [0.6] [0.8]
    """
    container = _Losses.named(losses, "joint")
    inner = optax.with_extra_args_support(check_transformation(tx, "joint"))

    def repeat(params: optax.Params) -> Any:
        return container.pack([params] * len(container.names))

    def update(updates: Any, state: Any, params: optax.Params | None = None, **extra_args: Any) -> tuple[Any, Any]:
        grads, repack = container.unpack(updates, params)
        new_updates, state = inner.update(
            container.pack(grads), state, None if params is None else repeat(params), **extra_args
        )
        return repack(container.values(new_updates)), state

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(repeat(params)), update)


def wrap(
    wrapper: Callable[[optax.GradientTransformationExtraArgs], Any],
    tx: optax.GradientTransformation,
    *,
    losses: int | Sequence[str] = PerLoss._fields,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs an Optax wrapper of optimizers around a loss-space optimizer.

    Wrappers such as `optax.MultiSteps` or `optax.apply_if_finite` expect updates that look like the parameters, before
    and after the optimizer that they wrap. Here every leaf of the parameters becomes a small node that holds the summed
    gradient and the gradient of each loss, so that the wrapper accumulates, checks, masks or skips them all alike:

    .. math::
        \theta_j \mapsto \Big(\sum_i g_{ij},\; g_{1j}, \ldots, g_{Nj}\Big)

    `tx` reads the gradients of the losses and answers with its update in the place of the sum. A leaf that the wrapper
    keeps from `tx` (`optax.masked`) passes its summed gradient through, and another transformation in the wrapper
    (`optax.partition`) sees, elementwise, the summed gradient as it would without losses.

    Args:
        wrapper: a function from a transformation to the wrapped one, e.g.
            `functools.partial(optax.MultiSteps, every_k_schedule=4)` or `lambda tx: optax.masked(tx, mask)`. Masks and
            labels have the structure of `params` (or a prefix, or are callables, for which a key path has one more key
            at its end).
        tx: the loss-space optimizer, from container to tree, such as `dot(...)`.
        losses: the names of the losses in order, or their number for an unnamed tuple of losses.

    Returns:
        A transformation from container to tree. `MultiSteps` keeps one accumulator per loss and one for the sum.

    Raises:
        TypeError: if `tx` or what `wrapper` returns is not a gradient transformation.
        ValueError: from `update`, as `per_loss`; also if the wrapper hands `tx` updates that are no longer one node
            per parameter (as `optax.flatten` does, which would mix the losses). Wrappers that reduce over all leaves
            (a global norm) would count the sum and its parts: use `joint` or put them after `tx` instead.

    Example:
        Accumulate the gradients of two micro-batches:

        >>> import functools, optax, dot_optax
        >>> tx = dot_optax.wrap(functools.partial(optax.MultiSteps, every_k_schedule=2), dot_optax.dot(0.1))
        >>> params = {'w': 0.0}
        >>> state = tx.init(params)
        >>> for task, kd in [(1.0, 2.0), (3.0, 4.0)]:
        ...     updates, state = tx.update(({'w': task}, {'w': kd}), state, params)
        ...     print(round(float(updates['w']), 6))
        0.0
        -0.5
    """
    container = _Losses.named(losses, "wrap")
    inner = optax.with_extra_args_support(check_transformation(tx, "wrap"))

    def inner_init(params: Any) -> optax.OptState:
        return inner.init(_component(params, 0))

    def inner_update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        grads = container.pack([_component(updates, i + 1) for i in range(len(container.names))])
        params = None if params is None else _component(params, 0)
        total, state = inner.update(grads, state, params, **extra_args)
        return jax.tree.map(_Node.answer, updates, total, is_leaf=_is_node), state

    wrapped = wrapper(optax.GradientTransformationExtraArgs(inner_init, inner_update))
    if isinstance(wrapped, optax.MultiSteps):
        wrapped = wrapped.gradient_transformation()
    outer = optax.with_extra_args_support(check_transformation(wrapped, "wrap: `wrapper`"))

    def spread(params: optax.Params) -> Any:
        # Zeros beside the parameters: a norm of them is still the norm of the parameters.
        zeros = [optax.tree.zeros_like(params)] * len(container.names)
        return jax.tree.map(_Node, params, *zeros)

    def init(params: optax.Params) -> optax.OptState:
        return outer.init(spread(params))

    def update(updates: Any, state: Any, params: optax.Params | None = None, **extra_args: Any) -> tuple[Any, Any]:
        grads, _ = container.unpack(updates, params)
        nodes = jax.tree.map(_Node, _sum_like(grads, params), *grads)
        nodes, state = outer.update(nodes, state, None if params is None else spread(params), **extra_args)
        return _component(nodes, 0), state

    return optax.GradientTransformationExtraArgs(init, update)


@jax.tree_util.register_pytree_with_keys_class
class _Node:
    """One parameter as the wrapper in `wrap` sees it: the summed gradient, then that of each loss."""

    def __init__(self, *components: Any):
        self.components = components

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], None]:
        return tuple((jax.tree_util.SequenceKey(i), c) for i, c in enumerate(self.components)), None

    @classmethod
    def tree_unflatten(cls, _: None, components: Sequence[Any]) -> "_Node":
        return cls(*components)

    def answer(self, update: Any) -> "_Node":
        """The node that goes back to the wrapper: `update` in the place of the sum."""
        return _Node(update, *map(optax.tree.zeros_like, self.components[1:]))


def _is_node(x: Any) -> bool:
    return isinstance(x, _Node)


def _component(nodes: Any, index: int) -> Any:
    """The tree of the `index`-th components; nodes that a mask removed stay as the mask left them."""

    def pick(node: Any) -> Any:
        if isinstance(node, _Node):
            return node.components[index]
        raise ValueError(
            "wrap: the wrapper changed the tree so that the losses cannot be told apart any more (got "
            f"{describe(node)} instead of one node per parameter). Put it inside per_loss(...), or after the optimizer"
        )

    return jax.tree.map(pick, nodes, is_leaf=_is_node)


class _Losses:
    """The losses that a transformation knows: their names, and how containers are matched to them."""

    def __init__(self, template: Any, *, ordered: bool | None = None):
        self.template = template
        self.names = tuple(_children(template)[0])
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

    def match(self, container: Any, what: str = "updates") -> tuple[Any, ...]:
        """The keys of a user's container, in the order of `names`."""
        children, _ = _children(_check_container(container, self, what=what))
        keys = self._keys(tuple(children), isinstance(container, tuple))
        if keys is None:
            raise ValueError(f"{what}: expected {self._expected()}, got {describe(container)}")
        return keys

    def unpack(self, updates: Any, params: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
        """The checked gradients of a user's container, and the function that puts new ones in a container like it."""
        hint = f"; {LOOKS_SINGLE}" if _same_structure(updates, params) else ""
        try:
            keys = self.match(updates)
        except ValueError as error:
            raise ValueError(f"{error}{hint}") from None
        children, rebuild = _children(updates)
        entries = [children[key] for key in keys]
        reference, what = (entries[0], "the first loss") if params is None else (params, "params")
        for key, entry in zip(keys, entries, strict=True):
            problem = difference(entry, reference, what)
            if problem:
                raise ValueError(f"updates{_entry_name(updates, key)}{problem}{hint}")
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


def _as_container(transformations: tuple[Any, ...]) -> Any:
    """The container that the arguments of `per_loss` mean."""
    if len(transformations) == 1 and not isinstance(transformations[0], optax.GradientTransformation):
        return _check_container(transformations[0], what="transformations", entry="gradient transformation")
    if not transformations:
        raise TypeError("per_loss: expected one gradient transformation for each loss, got none")
    return PerLoss(*transformations) if len(transformations) == 2 else transformations


def _check_container(
    container: Any, losses: _Losses | None = None, *, what: str = "updates", entry: str = "gradient tree"
) -> Any:
    if isinstance(container, (tuple, Mapping)) and len(container):
        return container
    expected = losses._expected() if losses else f"a container with one {entry} per loss (a tuple or a mapping)"
    hint = f"; {LOOKS_SINGLE}" if what == "updates" else ""
    raise TypeError(f"{what}: expected {expected}, got {describe(container)}{hint}")


def _sum_like(trees: Sequence[Any], params: Any) -> Any:
    total = jax.tree.map(lambda *leaves: functools.reduce(jnp.add, leaves), *trees)
    return total if params is None else optax.tree.cast_like(total, params)


def _entry_name(container: Any, key: Any) -> str:
    return f".{key}" if hasattr(container, "_fields") else f"[{key!r}]"


def _same_structure(tree: Any, params: Any) -> bool:
    return params is not None and jax.tree.structure(tree) == jax.tree.structure(params)
