"""Which loss reaches which parameter: `reached` finds it by tracing, `plans` turns it into a plan for each parameter."""

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dot_optax._checks import _check_trainable, _describe, _kind
from dot_optax._containers import LossNames, _entries_by_key, _key_of
from dot_optax._gradients import _check_no_nnx_module, _split_losses

# A pytree of bools of the structure of the parameters or a prefix of it, or a function from the parameters to the mask.
Mask = Any | Callable[[Any], Any]
Masks = tuple[Mask, ...] | Mapping[Any, Mask] | None  # one for each loss


def reached(loss_fn: Callable[..., Any], params: Any, *args: Any, has_aux: bool = False, **kwargs: Any) -> Any:
    r"""Which loss reaches which parameter: whether its gradient can be other than zero.

    .. math::
        r_{ij} = [\, \partial \ell_i / \partial \theta_j \text{ is not identically } 0 \,]

    It is found by tracing the backward pass of each loss; nothing is computed, whatever the sizes. A parameter that
    enters a `jax.lax.scan`, `cond` or `while_loop` counts as reached by every loss that depends on the result.

    Args:
        loss_fn: as for `value_and_grads`: `loss_fn(params, *args, **kwargs)` returns a container of scalars.
        params: the parameters: arrays, or `jax.ShapeDtypeStruct`.
        *args: the other arguments. Arrays may be given as `jax.ShapeDtypeStruct`.
        has_aux: whether `loss_fn` returns a pair of the losses and auxiliary data.
        **kwargs: the keyword arguments, likewise.

    Returns:
        A container of the type that `loss_fn` returns, with one tree of bools of the structure of `params` per loss:
        the `reached` argument of `dot`.

    Raises:
        TypeError: as `value_and_grads`.

    Example:
        A head that only the task loss reads, and a projector that only the distillation loss reads:

        >>> import dot_optax
        >>> def loss_fn(params, x):
        ...     features = params['body'] * x
        ...     return dot_optax.PerLoss(task=features * params['head'], kd=features * params['projector'])
        >>> params = {'body': 1.0, 'head': 1.0, 'projector': 1.0}
        >>> dot_optax.reached(loss_fn, params, 2.0).kd
        {'body': True, 'head': False, 'projector': True}

    References:
        Zhao et al., `DOT: A Distillation-Oriented Trainer <https://arxiv.org/abs/2307.08436>`_, 2023, whose
        published optimizer finds it by which gradients are missing.
    """
    leaves, treedef = jax.tree.flatten(params)
    if len({id(leaf) for leaf in leaves}) < len(leaves) or any(_kind(leaf) is None for leaf in leaves):
        _check_no_nnx_module(params, "reached: params", "reached")
    _check_trainable(params, "reached: params")
    arg_leaves, args_treedef = jax.tree.flatten((args, kwargs))
    # Python and NumPy scalars may be static: a flag, a number of layers.
    arrays = [leaf if isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)) else None for leaf in arg_leaves]

    def call(leaves: Sequence[Any], arrays: Sequence[Any]) -> Any:
        filled = [leaf if array is None else array for leaf, array in zip(arg_leaves, arrays, strict=True)]
        positional, keywords = args_treedef.unflatten(filled)
        return _split_losses(loss_fn(treedef.unflatten(leaves), *positional, **keywords), has_aux, "reached")[0]

    entries, rebuild = _entries_by_key(jax.eval_shape(call, leaves, arrays))

    def reaches(key: Any) -> Any:
        found: set[int] = set()

        def loss(leaves: Sequence[Any], arrays: Sequence[Any]) -> Any:
            tapped = [_tap(functools.partial(found.add, i))(leaf) for i, leaf in enumerate(leaves)]
            return _entries_by_key(call(tapped, arrays))[0][key]

        jax.eval_shape(jax.grad(loss), leaves, arrays)
        return treedef.unflatten([i in found for i in range(len(leaves))])

    return rebuild({key: reaches(key) for key in entries})


def _tap(on_gradient: Callable[[], None]) -> Callable[[Any], Any]:
    """The identity, which calls `on_gradient` when a cotangent that is not known to be zero is traced through it."""

    def backward(_: None, cotangent: Any) -> tuple[Any]:
        if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
            return (None,)
        on_gradient()
        return (cotangent,)

    tap = jax.custom_vjp(lambda x: x)
    tap.defvjp(lambda x: (x.value, None), backward, symbolic_zeros=True)
    return tap


class Plan(NamedTuple):
    """What an optimizer does with one parameter.

    Attributes:
        momenta: the momentum of each loss, or None where the loss keeps no buffer for this parameter.
        reads: for each loss, whether its gradient is read.
        l2: which loss's gradient the L2 penalty joins, by position; None: there is no penalty.
    """

    momenta: tuple[Any, ...]
    reads: tuple[bool, ...]
    l2: int | None


def _plans(losses: LossNames, betas: Any, reached: Any, decayed: Mask, params: Any, like: Any = None) -> list[Plan]:
    """The plan of each parameter, in the order of the leaves of `params`, or of a tree `like` them where that is None.

    Where several losses move a parameter each has a buffer with its own momentum. Where exactly one does, this has the
    mean of all momenta, as in the published code. The L2 penalty joins the first loss that reaches the parameter; where
    none does, it joins the first of all, whose gradient is not read there.
    """
    n = len(losses.names)
    mean = sum(betas) / n

    def plan(is_decayed: bool, reads: tuple[bool, ...]) -> Plan:
        l2 = (reads.index(True) if any(reads) else 0) if is_decayed else None
        has_buffer = [read or i == l2 for i, read in enumerate(reads)]
        momenta = [mean] * n if sum(has_buffer) == 1 else betas
        return Plan(tuple(m if kept else None for m, kept in zip(momenta, has_buffer, strict=True)), reads, l2)

    return list(map(plan, _leaf_mask(decayed, params, "mask", like), _reads(losses, reached, params, like)))


def _reads(losses: LossNames, reached: Any, params: Any, like: Any = None) -> list[tuple[bool, ...]]:
    """For each parameter, in the order of the leaves, whether each loss reaches it."""
    masks = [True] * len(losses.names) if reached is None else losses.entries(reached, "reached").values()
    reads = [_leaf_mask(mask, params, f"reached, {name}", like) for name, mask in zip(losses.names, masks, strict=True)]
    return list(zip(*reads, strict=True))


def _leaf_mask(mask: Mask, params: Any, name: str, like: Any = None) -> list[bool]:
    """One bool for each leaf of `params` (or of `like`), from the mask's entry for the leaf or for a part of the tree that holds it.

    Entries are matched by name, so that containers may differ in type. Two differences are allowed besides: a mask may
    speak of an empty or masked-out part of the tree, and may be one level deeper than it, since the `nnx.Param` of a
    Flax state is a level that optimizers are not shown.
    """
    tree = like if params is None else params
    if not jax.tree.leaves(tree):  # also the placeholder with which optax.tree.map_params looks for parameters
        return []
    if callable(mask) and not _is_tree_of_bools(mask):
        if params is None:
            raise ValueError(f"{name} is a function of the parameters: call update(grads, state, params)")
        mask = mask(params)
    entries, below = {}, defaultdict(set)  # `below` has the values of the entries within a part of the tree
    for path, value in jax.tree.leaves_with_path(mask):
        if not _is_tree_of_bools(value):
            where = f"{name}{jax.tree_util.keystr(path)}"
            raise ValueError(f"{where}: expected True or False, known before tracing; got {_describe(value)}")
        entries[_names(path)] = bool(value)
        for part in _prefixes(_names(path)):
            below[part].add(bool(value))
    leaves = [_names(path) for path, _ in jax.tree.leaves_with_path(tree)]
    values = {path: {entries[part] for part in _prefixes(path) if part in entries} or below[path] for path in leaves}
    parts = jax.tree.leaves_with_path(tree, is_leaf=lambda x: not jax.tree.leaves(x))
    ends = {_names(path) for path, _ in parts}  # of leaves, and of parts that are empty or masked out
    within = {part for path in ends for part in _prefixes(path)}
    wrong = [f"no entry for the parameter {_slashes(path)}" for path in leaves if len(values[path]) != 1]
    strays = [path for path in entries if path not in within and ends.isdisjoint(_prefixes(path))]
    wrong += [f"the entry {_slashes(path)} belongs to no parameter" for path in strays]
    if wrong:
        raise ValueError(f"{name}: {wrong[0]}")
    return [min(values[path]) for path in leaves]


def _prefixes(path: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    return [path[:length] for length in range(len(path) + 1)]


def _names(path: Any) -> tuple[Any, ...]:
    return tuple(map(_key_of, path))


def _slashes(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _is_tree_of_bools(mask: Mask) -> bool:
    """Also a module of Equinox or Flax with bools in the place of arrays, although it can be called."""
    leaves = jax.tree.leaves(mask)
    return bool(leaves) and all(isinstance(leaf, (bool, np.bool_)) for leaf in leaves)
