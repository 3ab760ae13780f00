"""One momentum for each loss and parameter, and the L2 penalty that joins one of the gradients."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dot_optax._algebra import per_loss, sum_losses
from dot_optax._checks import _LOOKS_SINGLE, _check_scalar, _describe, _difference, _is_number, _leaf_difference
from dot_optax._containers import _TASK_AND_KD
from dot_optax._reach import _LeafDecay, _LeafMask, _where


class ScheduledState(NamedTuple):
    """The state of a transformation whose hyperparameters follow schedules.

    Attributes:
        count: the number of updates so far, int32.
        inner_state: the state of the transformation.
    """

    count: Any
    inner_state: Any


def _with_schedules(
    make: Callable[..., optax.GradientTransformationExtraArgs], *hyperparams: Any
) -> optax.GradientTransformationExtraArgs:
    """`make(*hyperparams)`, with those that are schedules evaluated at the number of updates so far."""
    if not any(map(callable, hyperparams)):
        return make(*hyperparams)

    def at(count: Any) -> optax.GradientTransformationExtraArgs:
        return make(*(h(count) if callable(h) else h for h in hyperparams))

    def init(params: optax.Params) -> ScheduledState:
        count = jnp.zeros([], jnp.int32)
        return ScheduledState(count, at(count).init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, ScheduledState]:
        updates, inner_state = at(state.count).update(updates, state.inner_state, params, **extra_args)
        return updates, ScheduledState(optax.safe_increment(state.count), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _scale_by_dot(
    beta_task: Any, beta_kd: Any, nesterov: bool, accumulator_dtype: Any, task: _LeafMask, kd: _LeafMask
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_dot` of leaf masks."""

    def make(beta_task: Any, beta_kd: Any) -> optax.GradientTransformationExtraArgs:
        _check_scalar("beta_task", beta_task, 0, 1)
        _check_scalar("beta_kd", beta_kd, 0, 1)
        mean = (beta_task + beta_kd) / 2

        def decay(beta: Any) -> Callable[[bool, bool], Any]:
            return lambda mine, other: (beta if other else mean) if mine else None

        return optax.chain(
            per_loss(
                _trace(_where(decay(beta_task), task, kd), nesterov, accumulator_dtype),
                _trace(_where(decay(beta_kd), kd, task), nesterov, accumulator_dtype),
            ),
            sum_losses(),
        )

    return _with_schedules(make, beta_task, beta_kd)


def _trace(decay: _LeafDecay, nesterov: bool, accumulator_dtype: Any) -> optax.GradientTransformation:
    """`optax.trace` with a momentum for each leaf, or no buffer and a zero update where that is None.

    It computes in float32 or wider: rounded to bfloat16, a momentum of 0.975 is 0.9766, whose gain is not 40 but 43.
    The new state has the dtypes of the old one, also where a traced momentum is wider than the buffers.
    """
    accumulator_dtype = _canonical_accumulator_dtype(accumulator_dtype)
    if not isinstance(nesterov, bool):
        raise TypeError(f"nesterov must be True or False, got {_describe(nesterov)}")

    def init(params: optax.Params) -> optax.TraceState:
        leaves, treedef = jax.tree.flatten(params)

        def buffer(p: Any, beta: Any) -> Any:
            if beta is None:
                return optax.MaskedNode()
            dtype = jnp.result_type(p) if accumulator_dtype is None else accumulator_dtype
            # A real accumulator would drop the imaginary part.
            return jnp.zeros_like(p, dtype=jnp.promote_types(dtype, jnp.complex64) if jnp.iscomplexobj(p) else dtype)

        return optax.TraceState(treedef.unflatten(map(buffer, leaves, decay(params))))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.TraceState]:
        del params
        grads, treedef = jax.tree.flatten(updates)

        def step(g: Any, v: Any, beta: Any) -> tuple[Any, Any]:
            if beta is None:
                return jnp.zeros_like(g), v
            new_v = _widen(g) + beta * _widen(v)
            u = _widen(g) + beta * new_v if nesterov else new_v
            return u.astype(jnp.result_type(g, v)), new_v.astype(v.dtype)

        betas = decay(updates)
        steps = list(map(step, grads, _buffers_for(updates, state.trace, betas), betas))
        return treedef.unflatten([u for u, _ in steps]), optax.TraceState(treedef.unflatten([v for _, v in steps]))

    return optax.GradientTransformation(init, update)


def _keep_dtypes(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx`, whose updates would take the dtype of a hyperparameter that is an array."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        new_updates, state = tx.update(updates, state, params)
        return optax.tree.cast_like(new_updates, updates), state

    return optax.GradientTransformation(tx.init, update)


def _widen(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def _buffers_for(updates: Any, trace: Any, decay: Sequence[Any]) -> list[Any]:
    """The buffers, one for each gradient, with the `MaskedNode` of a gradient that has none."""

    def structure(tree: Any) -> Any:
        return jax.tree.structure(tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode))

    if structure(updates) != structure(trace):
        raise ValueError(f"the updates of one loss{_difference(updates, trace, 'the state')}; {_LOOKS_SINGLE}")
    buffers = jax.tree.structure(updates).flatten_up_to(trace)
    for (path, g), v, beta in zip(jax.tree.leaves_with_path(updates), buffers, decay, strict=True):
        where = f"the updates of one loss{jax.tree_util.keystr(path)}"
        if isinstance(v, optax.MaskedNode) != (beta is None):
            raise ValueError(f"{where}: the state was made with other masks than `reached` and `mask` give now")
        problem = "" if beta is None else _leaf_difference(g, v, "the state")
        if problem:
            raise ValueError(f"{where}: {problem}")
    return buffers


def _add_l2(
    weight_decay: Any, on_task: _LeafMask, on_kd: _LeafMask, task: _LeafMask, kd: _LeafMask
) -> optax.GradientTransformation:
    """Adds `weight_decay * params` to the gradient of one loss, for each parameter that a mask selects."""
    if _is_number(weight_decay) and weight_decay == 0:
        return optax.identity()

    def add(updates: Any, params: Any) -> Any:
        if params is None:
            raise ValueError("dot: weight_decay needs the parameters: call update(grads, state, params)")
        grads, repack = _TASK_AND_KD.unpack(updates, params)
        theta, treedef = jax.tree.flatten(params)

        def penalized(tree: Any, joins: _LeafMask, reaches: _LeafMask) -> Any:
            def leaf(g: Any, p: Any, join: bool, reach: bool) -> Any:
                # Not rounded to the gradient's dtype again: in bfloat16 a small penalty would vanish in the sum.
                return _widen(g if reach else jnp.zeros_like(g)) + weight_decay * _widen(p) if join else g

            return treedef.unflatten(map(leaf, jax.tree.leaves(tree), theta, joins(params), reaches(params)))

        return repack([penalized(grads[0], on_task, task), penalized(grads[1], on_kd, kd)])

    return optax.stateless(add)


def _canonical_accumulator_dtype(dtype: Any) -> Any:
    if dtype is None:
        return None
    try:
        canonical = jax.dtypes.canonicalize_dtype(dtype)
    except TypeError:
        canonical = None
    if canonical is None or not jnp.issubdtype(canonical, jnp.inexact):
        raise TypeError(f"accumulator_dtype must be None or a floating point or complex dtype, got {_describe(dtype)}")
    return canonical
