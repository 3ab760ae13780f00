"""Gradients of several losses from one forward pass."""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dot_optax._checks import _describe, _shape_and_dtype
from dot_optax._containers import _children, _entry_name


def value_and_grads(
    loss_fn: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
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
    _check_callable(loss_fn, "value_and_grads")
    argnums = _check_argnums(argnums)

    @functools.wraps(loss_fn)
    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        primals, call = _differentiated(loss_fn, argnums, args, kwargs)

        def losses_and_aux(*primals: Any) -> tuple[Any, Any]:
            output = call(*primals)
            losses, aux = _split_aux(output, "value_and_grads") if has_aux else (output, None)
            return _check_losses(losses, "value_and_grads"), aux

        values, jvp, aux = jax.linearize(losses_and_aux, *primals, has_aux=True)
        entries, rebuild = _children(values)

        def gradient(key: Any) -> Any:
            # Transposing one output at a time leaves the other losses out, where a zero cotangent for them would be
            # multiplied through their backward passes.
            transpose = jax.linear_transpose(lambda *tangents: _children(jvp(*tangents))[0][key], *primals)
            grads = transpose(jnp.ones_like(entries[key]))
            return grads[0] if isinstance(argnums, int) else grads

        grads = rebuild({key: gradient(key) for key in entries})
        return ((values, aux) if has_aux else values), grads

    return wrapped


def _differentiated(
    loss_fn: Callable[..., Any], argnums: int | Sequence[int], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[Any], Callable[..., Any]]:
    """The arguments to differentiate, and `loss_fn` as a function of them alone."""
    indices = [argnums] if isinstance(argnums, int) else list(argnums)
    for index in indices:
        if not -len(args) <= index < len(args):
            raise TypeError(f"value_and_grads: argnums={argnums} needs that positional argument, got {len(args)}")
        _check_differentiable(args[index], f"value_and_grads: argument {index}")

    def call(*primals: Any) -> Any:
        replaced = list(args)
        for index, primal in zip(indices, primals, strict=True):
            replaced[index] = primal
        return loss_fn(*replaced, **kwargs)

    return [args[index] for index in indices], call


def _check_argnums(argnums: Any) -> int | tuple[int, ...]:
    try:
        checked = tuple(map(operator.index, argnums)) if isinstance(argnums, Sequence) else operator.index(argnums)
    except TypeError:
        raise TypeError(f"value_and_grads: argnums must be an int or several, got {_describe(argnums)}") from None
    if isinstance(checked, tuple) and (not checked or len(set(checked)) < len(checked)):
        raise ValueError(f"value_and_grads: argnums must name one argument or more, each once; got {checked}")
    return checked


def _check_callable(loss_fn: Any, where: str) -> None:
    if not callable(loss_fn):
        raise TypeError(f"{where}: expected a function that returns one scalar per loss, got {_describe(loss_fn)}")


def _check_differentiable(tree: Any, what: str) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        kind = _shape_and_dtype(leaf)
        if kind is None:
            raise TypeError(f"{what}{jax.tree_util.keystr(path)}: expected an array, got {_describe(leaf)}")
        if not jnp.issubdtype(kind[1], jnp.inexact):
            path = jax.tree_util.keystr(path)
            raise TypeError(f"{what}{path} must be floating point or complex to be differentiated, got {kind[1]}")


def _split_aux(output: Any, where: str) -> tuple[Any, Any]:
    if not (isinstance(output, tuple) and len(output) == 2):
        raise TypeError(f"{where}: with has_aux, loss_fn must return (losses, aux), got {_describe(output)}")
    return output


def _check_losses(losses: Any, where: str) -> Any:
    """The container of losses as arrays, if each is a real scalar."""
    if not isinstance(losses, (tuple, Mapping)) or not len(losses):
        raise TypeError(
            f"{where}: loss_fn must return one scalar per loss, such as PerLoss(task=..., kd=...), got "
            f"{_describe(losses)}. Return the losses apart instead of their sum (has_aux=True if it also returns more)"
        )
    entries, rebuild = _children(losses)
    for key, value in entries.items():
        kind = _shape_and_dtype(value)
        if kind is None or kind[0] != () or not jnp.issubdtype(kind[1], jnp.floating):
            raise TypeError(
                f"{where}: the loss{_entry_name(losses, key)} must be a real floating point scalar, got "
                f"{_describe(value)}: reduce it, for example with jnp.mean (has_aux=True if it is auxiliary data)"
            )
    return rebuild({key: jnp.asarray(value) for key, value in entries.items()})
