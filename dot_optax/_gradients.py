"""Gradients of several losses from one forward pass."""

import functools
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dot_optax._checks import _check_trainable, _describe, _kind
from dot_optax._containers import _entries_by_key

LossFn = Callable[..., Any]  # returns a container of losses, or with `has_aux` a pair of one and auxiliary data
Argnums = int | Sequence[int]


def value_and_grads(loss_fn: LossFn, argnums: Argnums = 0, has_aux: bool = False) -> Callable[..., tuple[Any, Any]]:
    r"""Like `jax.value_and_grad`, for a function that returns several losses: one gradient tree for each.

    .. math::
        (\ell_1, \ldots, \ell_N) = f(\theta), \qquad g_i = \nabla_\theta \, \ell_i(\theta)

    The forward pass runs once and is shared by one backward pass per loss. A backward pass follows only what its own
    loss depends on: a loss that overflows does not put NaNs in the gradient of another.

    Args:
        loss_fn: a function that returns a container of real scalars: `PerLoss(task, kd)`, any other tuple, or a
            mapping; with `has_aux`, a pair of that container and any auxiliary data.
        argnums: which positional argument to differentiate with respect to; several give a tuple of trees per loss.
        has_aux: whether `loss_fn` returns auxiliary data (such as BatchNorm statistics).

    Returns:
        A function with the arguments of `loss_fn` that returns `(values, grads)`, or `((values, aux), grads)`. Both
        `values` and `grads` are containers of the type that `loss_fn` returned; each entry of `grads` has the structure
        of the differentiated argument, and is conjugated for complex parameters as in `jax.grad`.

    Raises:
        TypeError: when called, if `loss_fn` does not return a container of real floating point scalars, or if a
            differentiated argument is not floating point or complex.

    Example:
        >>> import dot_optax
        >>> def loss_fn(params, x):
        ...     y = params['w'] * x
        ...     return dot_optax.PerLoss(task=(y - 1.0) ** 2, kd=(y - 2.0) ** 2)
        >>> values, grads = dot_optax.value_and_grads(loss_fn)({'w': 3.0}, 1.0)
        >>> print(values.task, grads.task['w'], grads.kd['w'])
        4.0 4.0 2.0

    References:
        Zhao et al., `DOT: A Distillation-Oriented Trainer <https://arxiv.org/abs/2307.08436>`_, 2023, which
        takes the same gradients with two backward passes.
    """

    @functools.wraps(loss_fn)
    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        forward = _forward(loss_fn, argnums, has_aux, "value_and_grads", args, kwargs)
        return _output(forward, {key: forward.gradient([key]) for key in forward.losses}, has_aux)

    return wrapped


class _Forward(NamedTuple):
    """A forward pass, from which the backward passes of its losses start."""

    losses: dict[Any, Any]  # by key; NaN for a loss that is not asked for
    aux: Any
    rebuild: Callable[[Mapping[Any, Any]], Any]  # the user's container
    gradient: Callable[..., Any]  # of the sum of the losses with these keys, times a factor


def _forward(
    loss_fn: LossFn, argnums: Argnums, has_aux: bool, where: str, args: Any, kwargs: Any, wanted: Any = None
) -> _Forward:
    """Runs `loss_fn`; of the losses that are not `wanted` nothing is kept, so that a compiler drops what they need."""
    indices = _differentiated(argnums, args, where)

    def losses_and_aux(*primals: Any) -> tuple[Any, Any]:
        replaced = list(args)
        for index, primal in zip(indices, primals, strict=True):
            replaced[index] = primal
        losses, aux = _split_losses(loss_fn(*replaced, **kwargs), has_aux, where)
        entries, rebuild = _entries_by_key(losses)
        skipped = set() if wanted is None else entries.keys() - wanted
        nans = {key: jnp.full_like(entries[key], jnp.nan, entries[key].dtype) for key in skipped}
        return rebuild(entries | nans), aux

    primals = [args[index] for index in indices]
    values, jvp, aux = jax.linearize(losses_and_aux, *primals, has_aux=True)
    losses, rebuild = _entries_by_key(values)

    def gradient(keys: Collection[Any], factor: float = 1) -> Any:
        # Transposing some outputs leaves the other losses out, where a zero cotangent for them would be multiplied
        # through their backward passes.
        def outputs(*tangents: Any) -> list[Any]:
            tangents_out, _ = _entries_by_key(jvp(*tangents))
            return [tangents_out[key] for key in keys]

        grads = jax.linear_transpose(outputs, *primals)([jnp.full_like(losses[key], factor) for key in keys])
        return grads[0] if isinstance(argnums, int) else grads

    return _Forward(losses, aux, rebuild, gradient)


def _output(forward: _Forward, grads: Mapping[Any, Any], has_aux: bool) -> tuple[Any, Any]:
    values = forward.rebuild(forward.losses)
    return ((values, forward.aux) if has_aux else values), forward.rebuild(grads)


def _differentiated(argnums: Any, args: Sequence[Any], where: str) -> list[int]:
    """The positions of the arguments to differentiate, counted from the first, if these can be differentiated."""
    try:
        positions = [range(len(args))[index] for index in jax.tree.leaves(argnums)]
    except (IndexError, TypeError):
        positions = []
    if not positions or len(set(positions)) < len(positions):
        raise TypeError(f"{where}: argnums={argnums!r} must name some of the {len(args)} arguments, each once")
    for index in positions:
        _check_no_nnx_module(args[index], f"{where}: argument {index}", where)
        _check_trainable(args[index], f"{where}: argument {index}")
    return positions


def _check_no_nnx_module(tree: Any, what: str, name: str) -> None:
    # Flax is imported by any program that has one of its modules.
    module = getattr(getattr(sys.modules.get("flax"), "nnx", None), "Module", ())
    if any(isinstance(x, module) for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, module))):
        raise TypeError(f"{what}: a Flax NNX module goes to dot_optax.nnx.{name}, since a pytree cannot hold its ties")


def _split_losses(output: Any, has_aux: bool, where: str) -> tuple[Any, Any]:
    """What a `loss_fn` returned: the container of losses as arrays, if each is a real scalar, and the auxiliary data."""
    if has_aux and not (isinstance(output, tuple) and len(output) == 2 and _entries_by_key(output[0])[0]):
        raise TypeError(f"{where}: with has_aux, loss_fn must return (losses, aux), got {_describe(output)}")
    losses, aux = output if has_aux else (output, None)
    entries, rebuild = _entries_by_key(losses)
    expected = f"{where}: loss_fn must return one real scalar per loss, such as PerLoss(task=..., kd=...); got"
    if not entries:
        raise TypeError(f"{expected} {_describe(losses)}: return them apart, in a tuple")
    for key, loss in entries.items():
        if _kind(loss) is not jnp.floating or np.shape(loss):
            remedy = "reduce it, as by jnp.mean (has_aux=True if it is no loss)"
            raise TypeError(f"{expected} {_describe(loss)} for the loss {key!r}: {remedy}")
    return rebuild({key: jnp.asarray(loss) for key, loss in entries.items()}), aux
