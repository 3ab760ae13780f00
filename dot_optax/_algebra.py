"""Gradients per loss, and the transformations that work on them.

An ordinary Optax transformation maps one gradient tree to one update tree.  A transformation *in loss space* is fed a
container with one gradient tree per loss, `PerLoss(task=..., kd=...)`, while `params` stays the plain tree:

    per_loss     container -> container   one transformation for each loss
    joint        container -> container   one transformation over all losses together
    sum_losses   container -> tree        back to ordinary Optax
    wrap         container -> tree        a wrapper of optimizers (`optax.MultiSteps`, ...) around an optimizer in loss space

Nothing here knows about momentum: the optimizers built from this algebra live in their own modules.
"""

import contextvars
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dot_optax._checks import _check_transformation, _describe
from dot_optax._containers import LossNames, PerLoss, _same_structure

# One transformation for each loss.
Transformations = tuple[optax.GradientTransformation, ...] | Mapping[Any, optax.GradientTransformation]


def per_loss(*transformations: optax.GradientTransformation | Transformations) -> optax.GradientTransformationExtraArgs:
    r"""Gives each loss its own transformation: container in, container out.

    .. math::
        u_i, s_i \leftarrow \mathrm{update}_i(g_i, s_i, \theta)

    A transformation that divides a gradient by its own size, such as `optax.scale_by_adam`, cancels the weight of its
    loss: `per_loss(adam, adam)` trains with weights 0.1 and 0.9 as with 0.9 and 0.1. Use `dot_adamw`.

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
    single = len(transformations) == 1 and not isinstance(transformations[0], optax.GradientTransformation)
    container = transformations[0] if single else transformations
    losses = LossNames.of(container, "per_loss: transformations")
    given = losses.entries(container, "transformations").values()
    txs = [_check_transformation(tx, f"per_loss, {name!r}") for name, tx in zip(losses.names, given, strict=True)]

    def init(params: optax.Params) -> Any:
        return losses.pack([tx.init(params) for tx in txs])

    def update(updates: Any, state: Any, params: optax.Params | None = None, **extra_args: Any) -> tuple[Any, Any]:
        grads, repack = losses.gradients(updates, _params_in_state(init, state) if params is None else params)
        states = losses.entries(state, "state").values()
        results = [tx.update(g, s, params, **extra_args) for tx, g, s in zip(txs, grads, states, strict=True)]
        new_updates, new_state = zip(*results, strict=True)
        return repack(new_updates), losses.pack(new_state)

    return optax.GradientTransformationExtraArgs(init, update)


def sum_losses() -> optax.GradientTransformationExtraArgs:
    r"""Adds the entries of the container: one update tree for ordinary Optax.

    .. math::
        u = \sum_i u_i

    Returns:
        A stateless transformation from a container (any tuple, NamedTuple or mapping, with one entry or more) to a
        tree of the structure of the entries. Pass `params` to `update`: then the sum has their dtypes, and a dict of
        parameters that is no container of losses is told from one.

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

    References:
        Zhao et al., `DOT: A Distillation-Oriented Trainer <https://arxiv.org/abs/2307.08436>`_, 2023.
    """

    def add(updates: Any, params: Any) -> Any:
        trees, _ = LossNames.of(updates, "updates").gradients(updates, params)
        return _sum_like(trees, params)

    return optax.with_extra_args_support(optax.stateless(add))


def joint(
    tx: optax.GradientTransformation, *, losses: int | Sequence[str] = PerLoss._fields
) -> optax.GradientTransformationExtraArgs:
    r"""Applies one ordinary transformation to the whole container: one norm, one check, one state over all losses.

    .. math::
        (u_1, \ldots, u_N), s \leftarrow \mathrm{update}((g_1, \ldots, g_N), s, (\theta, \ldots, \theta))

    What treats each number by itself, such as `optax.scale_by_adam`, still does: `joint(adam)` divides each gradient by
    its own size, so that the weights of the losses cancel. Use `dot_adamw`.

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

    References:
        Pascanu et al., `On the difficulty of training recurrent neural networks <https://arxiv.org/abs/1211.5063>`_,
        2013, for the norm over all gradients of the example.
    """
    container = LossNames.named(losses, "joint")
    inner = _check_transformation(tx, "joint")

    def repeat(params: optax.Params) -> Any:
        return container.pack([params] * len(container.names))

    def init(params: optax.Params) -> Any:
        return inner.init(repeat(params))

    def update(updates: Any, state: Any, params: optax.Params | None = None, **extra_args: Any) -> tuple[Any, Any]:
        grads, repack = container.gradients(updates, _params_in_state(init, state) if params is None else params)
        repeated = None if params is None else repeat(params)
        new_updates, state = inner.update(container.pack(grads), state, repeated, **extra_args)
        return repack(list(container.entries(new_updates).values())), state

    return optax.GradientTransformationExtraArgs(init, update)


def wrap(
    wrapper: Callable[[Any], Any], tx: optax.GradientTransformation, *, losses: int | Sequence[str] = PerLoss._fields
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
        found = "the wrapper changed the summed gradient, so that the losses cannot be told apart"
        remedy = "Put it inside per_loss(...) or joint(...), or use it without wrap"
        raise ValueError(f"wrap: {found}. {remedy}; return optax.MultiSteps, not what it converts to")
    return [jax.tree.map(lambda leaf, i=i: found[id(leaf)][i], updates) for i in range(len(grads))]


def _accumulated(wrapper: Any, tx: Any, container: LossNames, losses: Any) -> optax.GradientTransformationExtraArgs:
    """`wrap` of `optax.MultiSteps`, which accumulates any tree: here, the container."""
    to_container = _to_container(tx, container)
    multi_steps = wrapper(to_container)
    if multi_steps.inner_opt is not to_container:
        raise ValueError("wrap: optax.MultiSteps must hold the optimizer alone: nest, wrap(MultiSteps, wrap(..., tx))")
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


def _params_in_state(init: Callable[[Any], Any], state: Any) -> Any:
    """A tree in the state that looks like the parameters (a momentum), to check gradients against without them."""
    found: list[Any] = []
    try:
        optax.tree.map_params(init, found.append, state, is_leaf=lambda _: True)
    except Exception:  # an `init` that looks into the parameters does not take Optax's placeholder for them
        return None
    leaves = jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    return found[0] if found and not any(isinstance(x, optax.MaskedNode) for x in leaves) else None


def _sum_like(trees: Sequence[Any], params: Any) -> Any:
    total = jax.tree.map(lambda *leaves: functools.reduce(jnp.add, leaves), *trees)
    return total if params is None else optax.tree.cast_like(total, params)
