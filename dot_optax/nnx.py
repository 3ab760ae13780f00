"""Gradients of several losses of Flax NNX modules.  The only module of the package that imports Flax."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from dot_optax import _gradients, _reach, _sampling
from dot_optax._gradients import Argnums, LossFn
from dot_optax._sampling import Offsets, Periods, Sampled

__all__ = ["reached", "sampled_difference", "sampled_examples", "sampled_losses", "value_and_grads"]

Filter = nnx.filterlib.Filter  # which Variables are differentiated

_TAG = "dot_optax.nnx"  # of the context in which Flax carries over what happens to the copies of the arguments


def value_and_grads(
    loss_fn: LossFn, *, has_aux: bool = False, wrt: Filter = nnx.Param
) -> Callable[..., tuple[Any, Any]]:
    r"""Like `nnx.value_and_grad`, for a function that returns several losses: one gradient for each.

    .. math::
        (\ell_1, \ldots, \ell_N) = f(\mathrm{model}), \qquad g_i = \nabla_\theta \, \ell_i, \quad
        \theta = \text{the Variables of the model that } \mathit{wrt} \text{ selects}

    The forward pass runs once: BatchNorm's statistics move once, and Dropout draws one mask for all losses. Calling
    `nnx.grad` once per loss moves them twice and draws two masks.

    Args:
        loss_fn: `loss_fn(model, *args, **kwargs)` returns a container of real scalars: `PerLoss(task, kd)`, any other
            tuple, or a mapping; with `has_aux`, a pair of that container and any auxiliary data.
        has_aux: whether `loss_fn` returns auxiliary data.
        wrt: which Variables of `model` to differentiate with respect to: a filter of NNX, as for `nnx.Optimizer`.

    Returns:
        A function with the arguments of `loss_fn`, the model by position, that returns `(values, grads)`, or
        `((values, aux), grads)`. Each entry of `grads` is an `nnx.State` of what `wrt` selects; a tied weight is one
        Variable and has one gradient. Whatever else `loss_fn` does to its arguments is kept as by `nnx.value_and_grad`,
        as if it had been called once: statistics, the counters of `nnx.Rngs`, metrics, sown intermediates, attributes.
        Use it inside `nnx.jit`, `nnx.scan` or `jax.shard_map` as `nnx.value_and_grad`, and hand the gradients to
        `nnx.Optimizer(model, dot_optax.dot(...), wrt=wrt)`.

    Raises:
        TypeError: when called, as `dot_optax.value_and_grads`.
        ValueError: when called, if `wrt` selects nothing in `model`.
        flax.errors.TraceContextError: when called, if `loss_fn` changes a module that is not one of its arguments (a
            teacher in training mode, captured), or if an argument was made outside the `nnx.jit` that this is in.

    Example:
        >>> import jax.numpy as jnp, dot_optax, dot_optax.nnx
        >>> from flax import nnx
        >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(model, dot_optax.dot(0.1), wrt=nnx.Param)
        >>> def loss_fn(model, x):
        ...     y = model(x)
        ...     return dot_optax.PerLoss(task=jnp.mean((y - 1.0) ** 2), kd=jnp.mean((y - 2.0) ** 2))
        >>> for _ in range(100):
        ...     losses, grads = dot_optax.nnx.value_and_grads(loss_fn)(model, jnp.eye(2))
        ...     _ = optimizer.update(model, grads)
        >>> print(losses.task.round(2), losses.kd.round(2))
        0.76 0.02

    References:
        `Flax NNX's transformations <https://flax.readthedocs.io/en/latest/guides/transforms.html>`_.
    """

    @functools.wraps(loss_fn)
    def wrapped(model: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        gradients = functools.partial(_gradients.value_and_grads, has_aux=True)
        return _on_modules(gradients, loss_fn, has_aux, wrt, (model, args, kwargs))

    return wrapped


def sampled_losses(
    loss_fn: LossFn, periods: Periods, *, offsets: Offsets = None, has_aux: bool = False, wrt: Filter = nnx.Param
) -> Sampled:
    r"""`dot_optax.sampled_losses` for a function of a Flax NNX module: each loss at every k-th step only.

    .. math::
        \hat g_i^{(t)} = k_i \, \nabla_\theta \, \ell_i \text{ where } t \bmod k_i = o_i, \text{ else } 0

    Whatever the module changes in its forward pass is kept, once a step: statistics, counters of `nnx.Rngs`, metrics.

    Args:
        loss_fn: as for `value_and_grads`.
        periods: as for `dot_optax.sampled_losses`.
        offsets: likewise.
        has_aux: whether `loss_fn` returns auxiliary data.
        wrt: as for `value_and_grads`.

    Returns:
        As `value_and_grads`, a function with the number of the step, or a key, before the model; it has the methods that
        `dot_optax.sampled_losses` names.

    Raises:
        TypeError: as `dot_optax.sampled_losses`.
        ValueError: likewise, and as `value_and_grads`.

    Example:
        >>> import jax.numpy as jnp, dot_optax, dot_optax.nnx
        >>> from flax import nnx
        >>> model = nnx.Dict(w=nnx.Param(jnp.ones(())))
        >>> def loss_fn(model):
        ...     return dot_optax.PerLoss(task=1.0 * model['w'][...], kd=3.0 * model['w'][...])
        >>> sampled = dot_optax.nnx.sampled_losses(loss_fn, {'kd': 2})
        >>> for step in range(2):
        ...     _, grads = sampled(step, model)
        ...     print(grads.task['w'][...], grads.kd['w'][...])
        1.0 6.0
        1.0 0.0

    References:
        As `dot_optax.sampled_losses`.
    """
    return _sampled(_sampling.sampled_losses, loss_fn, has_aux, wrt, periods=periods, offsets=offsets)


def sampled_difference(
    loss_fn: LossFn, period: int, *, reached: Any = None, has_aux: bool = False, wrt: Filter = nnx.Param
) -> Sampled:
    r"""`dot_optax.sampled_difference` for a function of a Flax NNX module: the exact sum, and differences now and then.

    .. math::
        \hat g_i^{(t)} = \tfrac{s}{N} + k \, (\nabla_\theta \, \ell_i - \tfrac{s}{N}) \text{ where } t \bmod k = 0, \text{ else }
        \tfrac{s}{N}

    Args:
        loss_fn: as for `value_and_grads`.
        period: as for `dot_optax.sampled_difference`.
        reached: likewise; that of `dot_optax.nnx.reached`.
        has_aux: whether `loss_fn` returns auxiliary data.
        wrt: as for `value_and_grads`.

    Returns:
        As `sampled_losses`.

    Raises:
        TypeError: as `dot_optax.sampled_difference`.
        ValueError: likewise, and as `value_and_grads`.

    Example:
        >>> import jax.numpy as jnp, dot_optax, dot_optax.nnx
        >>> from flax import nnx
        >>> model = nnx.Dict(w=nnx.Param(jnp.ones(())))
        >>> def loss_fn(model):
        ...     return dot_optax.PerLoss(task=1.0 * model['w'][...], kd=3.0 * model['w'][...])
        >>> _, grads = dot_optax.nnx.sampled_difference(loss_fn, 4)(1, model)
        >>> print(grads.task['w'][...], grads.kd['w'][...])
        2.0 2.0

    References:
        As `dot_optax.sampled_difference`.
    """
    return _sampled(_sampling.sampled_difference, loss_fn, has_aux, wrt, period=period, reached=reached)


def sampled_examples(
    loss_fn: LossFn, periods: Periods, *, batch_argnums: Argnums, has_aux: bool = False, wrt: Filter = nnx.Param
) -> Sampled:
    r"""`dot_optax.sampled_examples` for a function of a Flax NNX module: a loss on every k-th row of the batch.

    .. math::
        \hat g_i^{(t)} = \nabla_\theta \, \ell_i(x_{r}, x_{r + k}, \ldots), \qquad r = t \bmod k

    What the module changes in its forward pass is kept from that of the whole batch.

    Args:
        loss_fn: as for `value_and_grads`.
        periods: as for `dot_optax.sampled_examples`.
        batch_argnums: which positional arguments have the rows, all of them; the model is number 0.
        has_aux: whether `loss_fn` returns auxiliary data.
        wrt: as for `value_and_grads`.

    Returns:
        As `sampled_losses`.

    Raises:
        TypeError: as `dot_optax.sampled_examples`.
        ValueError: likewise, and as `value_and_grads`.

    Example:
        >>> import jax.numpy as jnp, dot_optax, dot_optax.nnx
        >>> from flax import nnx
        >>> model = nnx.Dict(w=nnx.Param(jnp.ones(())))
        >>> def loss_fn(model, x):
        ...     return dot_optax.PerLoss(task=jnp.mean(model['w'] * x), kd=jnp.mean(model['w'] * x))
        >>> _, grads = dot_optax.nnx.sampled_examples(loss_fn, {'kd': 2}, batch_argnums=1)(1, model, jnp.array([1.0, 2.0, 3.0, 4.0]))
        >>> print(grads.task['w'][...], grads.kd['w'][...])
        2.5 3.0

    References:
        As `dot_optax.sampled_examples`.
    """
    indices = {batch_argnums} if isinstance(batch_argnums, int) else set(batch_argnums)

    def cut(arguments: Sequence[Any], part: Callable[[Any, str], Any]) -> list[Any]:
        params, rest = arguments
        paths: Any = nnx.to_flat_state(rest).paths
        found = {path[1] + 1 for path in paths if path[0] == 1}
        if not indices <= found:
            wanted = f"positional arguments with arrays, which are {sorted(found)} here; the model is number 0"
            raise TypeError(f"sampled_examples: batch_argnums={batch_argnums!r} must name {wanted}")

        def cut_leaf(path: Any, leaf: Any) -> Any:
            is_row = path[0] == 1 and path[1] + 1 in indices  # 1: the positional arguments behind the model
            return jax.tree.map(lambda x: part(x, f"argument {path[1] + 1}"), leaf) if is_row else leaf

        return [params, nnx.map_state(cut_leaf, rest)]

    return _sampled(_sampling._sampled_examples, loss_fn, has_aux, wrt, periods=periods, cut=cut, argnums=0)


def reached(
    loss_fn: LossFn, model: Any, /, *args: Any, has_aux: bool = False, wrt: Filter = nnx.Param, **kwargs: Any
) -> Any:
    r"""Which loss reaches which parameter of an NNX module: whether its gradient can be other than zero.

    .. math::
        r_{ij} = [\, \partial \ell_i / \partial \theta_j \text{ is not identically } 0 \,]

    Args:
        loss_fn: as for `value_and_grads`.
        model: the module; also an abstract one, from `nnx.eval_shape`. Nothing is computed, and nothing in it changes.
        *args: the other arguments. Unlike for `dot_optax.reached`, `jax.ShapeDtypeStruct` does not stand for an array.
        has_aux: whether `loss_fn` returns a pair of the losses and auxiliary data.
        wrt: which Variables are parameters, as for `value_and_grads`.
        **kwargs: the keyword arguments.

    Returns:
        A container of the type that `loss_fn` returns, with an `nnx.State` of bools per loss: the `reached` argument of
        an optimizer for `nnx.Optimizer(model, optimizer, wrt=wrt)`.

    Raises:
        TypeError: as `value_and_grads`.
        ValueError: as `value_and_grads`.

    Example:
        >>> import dot_optax, dot_optax.nnx, jax.numpy as jnp
        >>> from flax import nnx
        >>> model = nnx.Dict(head=nnx.Param(jnp.ones(2)), projector=nnx.Param(jnp.ones(2)))
        >>> def loss_fn(model):
        ...     return dot_optax.PerLoss(task=model['head'].sum(), kd=model['projector'].sum())
        >>> nnx.to_pure_dict(dot_optax.nnx.reached(loss_fn, model).kd)
        {'head': False, 'projector': True}

    References:
        As `dot_optax.reached`.
    """
    with nnx.update_context(_TAG):
        pure, params, rest = _pure(loss_fn, has_aux, wrt, (model, args, kwargs))
        return _reach.reached(pure, params, rest, has_aux=True)


def _sampled(sample: Callable[..., Sampled], loss_fn: LossFn, has_aux: bool, wrt: Any, **settings: Any) -> Sampled:
    """What `sample` makes of functions of pytrees, for a function of a module."""

    def call(position: Any, model: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        arguments = model, args, kwargs
        return _on_modules(lambda pure: functools.partial(make(pure), position), loss_fn, has_aux, wrt, arguments)

    make = functools.partial(sample, has_aux=True, **settings)
    sampled = make(loss_fn)
    sampled._call = call
    return sampled


@nnx.update_context(_TAG)
def _on_modules(gradients: Callable[..., Any], loss_fn: LossFn, has_aux: bool, wrt: Any, arguments: Any) -> Any:
    """Calls `gradients(pure)` where `pure` is a function of pytrees, and carries over what happened to the arguments."""
    pure, params, rest = _pure(loss_fn, has_aux, wrt, arguments)
    (values, changed), grads = gradients(pure)(params, rest)
    with nnx.merge_context(_TAG, inner=False) as context:
        _, aux = context.merge(*changed)
    return ((values, aux) if has_aux else values), grads


def _pure(loss_fn: LossFn, has_aux: bool, wrt: Any, arguments: Any) -> tuple[Any, ...]:
    """`pure(params, rest) -> losses, what became of the arguments and aux`, and what to call it with.

    To be called within `nnx.update_context(_TAG)`, as Flax's own transformations do it.
    """
    selects = nnx.filterlib.to_predicate(wrt)

    with nnx.split_context(_TAG) as context:
        graphdef, selected, rest = context.split(arguments, lambda at, leaf: at[0] == 0 and selects(at[1:], leaf), ...)
    if not selected:
        raise ValueError(f"dot_optax.nnx: wrt={wrt!r} selects nothing in the model")

    def pure(params: Any, rest: Any) -> Any:
        with nnx.merge_context(_TAG, inner=True) as context:
            model, args, kwargs = copies = context.merge(graphdef, nnx.State({0: params}), rest)
        losses, aux = _gradients._split_losses(loss_fn(model, *args, **kwargs), has_aux, "dot_optax.nnx")
        with nnx.split_context(_TAG) as context:
            return losses, context.split((copies, aux))

    return pure, selected[0], rest
