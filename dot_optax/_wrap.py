"""Wrappers of optimizers (`optax.MultiSteps`, `optax.apply_if_finite`, ...) around an optimizer of gradients per loss."""

import contextvars
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from dot_optax._algebra import _params_in_state, _sum_like, joint, sum_losses
from dot_optax._checks import _check_transformation, _describe
from dot_optax._containers import LossNames, PerLoss, _same_structure


def wrap(
    wrapper: Callable[[optax.GradientTransformationExtraArgs], Any],
    tx: optax.GradientTransformation,
    *,
    losses: int | Sequence[str] = PerLoss._fields,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs an Optax wrapper of optimizers around a loss-space optimizer.

    Wrappers such as `optax.apply_if_finite` or `optax.partition` expect updates that look like the parameters. So the
    wrapper is given the summed gradient, and everything in it (masks, labels, norms, other optimizers) means what it
    means without losses; `tx`, where the wrapper calls it, gets the gradient of each loss instead:

    .. math::
        u = \mathrm{wrapper}\Big[\textstyle\sum_i g_i \mapsto \mathrm{tx}(g_1, \ldots, g_N)\Big]\Big(\textstyle\sum_i g_i\Big)

    `optax.MultiSteps` changes the gradients before it hands them on; around `tx` alone, it accumulates those of each
    loss. To put more inside it, nest: `wrap(MultiSteps, wrap(other, tx))`. What skips steps goes around it instead,
    `wrap(apply_if_finite, wrap(MultiSteps, tx))`: inside, a NaN would stay in the accumulator for ever.

    Args:
        wrapper: a function from a transformation to the wrapped one, e.g. `lambda tx: optax.masked(tx, mask)`, or
            `functools.partial(optax.MultiSteps, every_k_schedule=4)`. It may be called twice.
        tx: the loss-space optimizer, from container to tree, such as `dot(...)`, or another `wrap`.
        losses: the names of the losses in order, or their number for an unnamed tuple of losses.

    Returns:
        A transformation from container to tree, with the state of the wrapper. For `MultiSteps` that holds one
        accumulator per loss, and its `should_skip_update_fn` is given the container.

    Raises:
        TypeError: if `tx` or what `wrapper` returns is not a gradient transformation.
        ValueError: if `MultiSteps` holds more than `tx`; from `update`, as `per_loss`, and if the wrapper hands `tx`
            other arrays than the summed gradient that it was given, so that the losses cannot be told apart.
            `optax.flatten` belongs inside `per_loss`; `optax.lookahead` and `optax.contrib.split_real_and_imaginary`
            need no `wrap`.

    Example:
        Skip a step if either gradient has a NaN:

        >>> import jax.numpy as jnp, optax, dot_optax
        >>> tx = dot_optax.wrap(lambda tx: optax.apply_if_finite(tx, max_consecutive_errors=5), dot_optax.dot(0.1))
        >>> params = {'w': jnp.zeros(())}
        >>> state = tx.init(params)
        >>> for kd in (2.0, jnp.nan, 2.0):
        ...     updates, state = tx.update(({'w': jnp.ones(())}, {'w': jnp.asarray(kd)}), state, params)
        ...     print(f"{updates['w']:.4f}")
        -0.3000
        0.0000
        -0.5775

    References:
        `Optax's wrappers <https://optax.readthedocs.io/en/latest/api/transformations.html>`_.
    """
    container = LossNames.named(losses, "wrap")
    inner = _check_transformation(tx, "wrap")

    # What `update` below was given, for the calls of `update_inner` that it makes by way of the wrapper. A context
    # variable, because keywords do not reach SAM's inner optimizer, and leak into the predicates of users.
    current: contextvars.ContextVar[tuple[Any, Any]] = contextvars.ContextVar("the sum and the gradients")

    def update_inner(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        grads = container.pack(_grads_of(updates, *current.get()))
        total, state = inner.update(grads, state, params, **extra_args)
        return _check_tree(total, updates), state

    wrapped = wrapper(optax.GradientTransformationExtraArgs(inner.init, update_inner))
    if isinstance(wrapped, optax.MultiSteps):
        return _accumulated(wrapper, inner, container, losses)
    outer = _check_transformation(wrapped, "wrap: `wrapper`")

    def update(updates: Any, state: Any, params: optax.Params | None = None, **extra_args: Any) -> tuple[Any, Any]:
        grads, _ = container.gradients(updates, _params_in_state(outer.init, state) if params is None else params)
        total = _sum_like(grads, params)
        token = current.set((total, grads))
        try:
            return outer.update(total, state, params, **extra_args)
        finally:
            current.reset(token)

    return optax.GradientTransformationExtraArgs(outer.init, update)


def _check_tree(total: Any, like: Any) -> Any:
    if not _same_structure(total, like):
        raise ValueError(f"wrap: `tx` must return one tree, such as sum_losses() makes; got {_describe(total)}")
    return total


def _grads_of(updates: Any, total: Any, grads: Sequence[Any]) -> list[Any]:
    """The gradient of each loss, a tree of the structure of `updates`, whose arrays are those of the summed gradient.

    They are found by identity, since a wrapper may drop some of the arrays or put them in another tree.
    """
    ids = map(id, jax.tree.leaves(total))
    found = dict(zip(ids, zip(*map(jax.tree.leaves, grads), strict=True), strict=True))
    if not all(id(leaf) in found for leaf in jax.tree.leaves(updates)):
        raise ValueError(
            "wrap: the wrapper changed the summed gradient, so that the losses cannot be told apart. Put it inside "
            "per_loss(...) or joint(...), or use it without wrap; return optax.MultiSteps, not what it converts to"
        )
    return [jax.tree.map(lambda leaf, i=i: found[id(leaf)][i], updates) for i in range(len(grads))]


def _accumulated(wrapper: Any, tx: Any, container: LossNames, losses: Any) -> optax.GradientTransformationExtraArgs:
    """`wrap` of `optax.MultiSteps`, which accumulates any tree: here, the container."""
    to_container = _to_container(tx, container)
    multi_steps = wrapper(to_container)
    if multi_steps.inner_opt is not to_container:
        remedy = "nest, wrap(MultiSteps, wrap(other, tx))"
        raise ValueError(f"wrap: optax.MultiSteps must hold the optimizer alone: {remedy}")
    steps = joint(optax.GradientTransformationExtraArgs(multi_steps.init, multi_steps.update), losses=losses)

    def update(updates: Any, state: Any, params: optax.Params | None = None, **extra_args: Any) -> tuple[Any, Any]:
        updates, state = steps.update(updates, state, params, **extra_args)
        return sum_losses().update(updates, optax.EmptyState(), params)[0], state

    return optax.GradientTransformationExtraArgs(steps.init, update)


def _to_container(tx: Any, container: LossNames) -> optax.GradientTransformationExtraArgs:
    """`tx` from container to container: its update in the place of the first loss, and zeros.

    `optax.MultiSteps` wants updates that look like the gradients.
    """

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        params = None if params is None else first(params)
        total, state = tx.update(updates, state, params, **extra_args)
        zeros = optax.tree.zeros_like(first(updates))
        return container.pack([_check_tree(total, zeros)] + [zeros] * (len(container.names) - 1)), state

    def first(entries: Any) -> Any:
        return next(iter(container.entries(entries).values()))

    return optax.GradientTransformationExtraArgs(lambda params: tx.init(first(params)), update)
