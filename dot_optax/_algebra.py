"""Gradients per loss, and the transformations that work on them.

An ordinary Optax transformation maps one gradient tree to one update tree.  A transformation *in loss space* is fed a
container with one gradient tree per loss, `PerLoss(task=..., kd=...)`, while `params` stays the plain tree:

    per_loss     container -> container   one transformation for each loss
    joint        container -> container   one transformation over all losses together
    sum_losses   container -> tree        back to ordinary Optax

Nothing here knows about momentum: the optimizers built from this algebra live in their own modules.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dot_optax._checks import _check_transformation
from dot_optax._containers import LossNames, PerLoss


def per_loss(
    *transformations: optax.GradientTransformation
    | tuple[optax.GradientTransformation, ...]
    | Mapping[Any, optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
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
