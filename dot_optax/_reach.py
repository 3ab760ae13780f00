"""Which loss reaches which parameter: `reached`, found by tracing, and the masks that say it to an optimizer.

A leaf mask is a function from a tree to one bool for each of its leaves, in their order, so that it applies to params,
to gradients and to either with parts masked out.
"""

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dot_optax._checks import _check_scalar, _describe, _is_number
from dot_optax._containers import _TASK_AND_KD, PerLoss, _children, _key
from dot_optax._gradients import _check_callable, _check_differentiable, _check_losses, _split_aux

# A pytree of bools of the structure of the parameters or a prefix of it, or a function from such a tree to the mask.
Mask = Any | Callable[[Any], Any]
_LeafMask = Callable[[Any], list[bool]]
_LeafDecay = Callable[[Any], list[Any]]  # one momentum, or None, for each leaf


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
    _check_callable(loss_fn, "reached")
    leaves, treedef = jax.tree.flatten(params)
    _check_differentiable(params, "reached: params")
    arg_leaves, args_treedef = jax.tree.flatten((args, kwargs))
    # Python and NumPy scalars may be static: a flag, a number of layers.
    is_array = [isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)) for leaf in arg_leaves]

    def call(leaves: Sequence[Any], arrays: Sequence[Any]) -> Any:
        remaining = iter(arrays)
        filled = [next(remaining) if array else leaf for array, leaf in zip(is_array, arg_leaves, strict=True)]
        positional, keywords = args_treedef.unflatten(filled)
        output = loss_fn(treedef.unflatten(leaves), *positional, **keywords)
        return _check_losses(_split_aux(output, "reached")[0] if has_aux else output, "reached")

    arrays = [leaf for array, leaf in zip(is_array, arg_leaves, strict=True) if array]
    entries, rebuild = _children(jax.eval_shape(call, leaves, arrays))

    def reaches(key: Any) -> Any:
        found: set[int] = set()

        def loss(leaves: Sequence[Any], arrays: Sequence[Any]) -> Any:
            tapped = [_tap(functools.partial(found.add, i))(leaf) for i, leaf in enumerate(leaves)]
            return _children(call(tapped, arrays))[0][key]

        jax.eval_shape(jax.grad(loss), leaves, arrays)
        return treedef.unflatten([i in found for i in range(len(leaves))])

    return rebuild({key: reaches(key) for key in entries})


def _tap(on_gradient: Callable[[], None]) -> Callable[[Any], Any]:
    """The identity, which calls `on_gradient` when a cotangent that is not known to be zero is traced through it."""

    @jax.custom_vjp
    def tap(x: Any) -> Any:
        return x

    def backward(_: None, cotangent: Any) -> tuple[Any]:
        if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
            return (None,)
        on_gradient()
        return (cotangent,)

    tap.defvjp(lambda x: (x.value, None), backward, symbolic_zeros=True)
    return tap


def _reach(reached: Any) -> tuple[_LeafMask, _LeafMask]:
    """The leaf masks of the `reached` argument: by default both losses reach every parameter."""
    if reached is None:
        reached = PerLoss(True, True)
    keys = _TASK_AND_KD.match(reached, "reached")
    masks, _ = _children(reached)
    return _leaf_mask(masks[keys[0]], "reached, task"), _leaf_mask(masks[keys[1]], "reached, kd")


def _where(function: Callable[..., Any], *masks: _LeafMask) -> Callable[[Any], list[Any]]:
    return lambda tree: list(map(function, *(mask(tree) for mask in masks)))


def _leaf_mask(mask: Any, name: str) -> _LeafMask:
    """From a bool pytree prefix, or a callable that gives one, to one bool for each leaf of a tree."""

    def leaves(tree: Any) -> list[bool]:
        paths = [_plain(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        if not paths:  # also the placeholder with which optax.tree.map_params looks for parameters in a state
            return []
        rules = dict(_rules(mask(tree) if callable(mask) else mask, name))
        _check_no_strangers(rules, tree, name)
        return [_rule(rules, path, name) for path in paths]

    return leaves


def _check_no_strangers(rules: dict[tuple[Any, ...], bool], tree: Any, name: str) -> None:
    """Raises if an entry of a mask belongs to nothing in the tree; to an empty or a masked part of it, it may."""
    parts = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: not jax.tree.leaves(x))
    ends = {_plain(path) for path, _ in parts}
    inner = {path[:length] for path in ends for length in range(len(path))}
    for rule in rules:
        if rule not in inner and not any(rule[:length] in ends for length in range(len(rule) + 1)):
            raise ValueError(f"{name}: the entry {'/'.join(map(str, rule))} belongs to no parameter")


def _rules(mask: Any, name: str) -> Iterator[tuple[tuple[Any, ...], bool]]:
    for path, value in jax.tree_util.tree_leaves_with_path(mask):
        if not isinstance(value, (bool, np.bool_)):
            where = jax.tree_util.keystr(path)
            raise ValueError(f"{name}{where}: expected True or False, known before tracing; got {_describe(value)}")
        yield _plain(path), bool(value)


def _rule(rules: dict[tuple[Any, ...], bool], path: tuple[Any, ...], name: str) -> bool:
    for length in range(len(path), -1, -1):
        if path[:length] in rules:
            return rules[path[:length]]
    # A Flax `nnx.Param` is one level deeper than the array that an optimizer is given.
    deeper = {value for rule, value in rules.items() if rule[: len(path)] == path}
    if len(deeper) == 1:
        return deeper.pop()
    raise ValueError(f"{name}: no entry for the parameter {'/'.join(map(str, path))}; give one for it or for a prefix")


def _plain(path: Any) -> tuple[Any, ...]:
    return tuple(map(_key, path))


def _l2_masks(weight_decay: Any, mask: Any, task: _LeafMask, kd: _LeafMask) -> tuple[_LeafMask, _LeafMask]:
    """Which gradient the L2 penalty joins: the task's, or the other where only the distillation loss reaches."""
    _check_scalar("weight_decay", weight_decay, low=0)
    if _is_number(weight_decay) and weight_decay == 0:
        return _leaf_mask(False, "mask"), _leaf_mask(False, "mask")
    if isinstance(mask, (bool, np.bool_)):
        raise ValueError(
            f"mask must be a tree of bools or a function of the parameters, got {mask}; if inject_hyperparams called "
            "your function, give it static_args='mask'"
        )
    decayed = _leaf_mask(True if mask is None else mask, "mask")
    only_kd = _where(lambda t, k: k and not t, task, kd)
    return _where(lambda d, o: d and not o, decayed, only_kd), _where(operator.and_, decayed, only_kd)
