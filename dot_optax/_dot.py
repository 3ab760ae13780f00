"""DOT: one momentum per loss, the larger one for the distillation loss.

The optimizer is a sentence in the algebra of `_per_loss.py`: a trace for each loss, their sum, the learning rate.  What
is said here beyond that is which loss reaches which parameter, and which gradient the L2 penalty joins.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dot_optax._checks import _LOOKS_SINGLE, _check_scalar, _describe, _difference, _is_number, _leaf_difference
from dot_optax._containers import _TASK_AND_KD, PerLoss
from dot_optax._masks import Mask, _l2_masks, _LeafDecay, _LeafMask, _reach, _where
from dot_optax._per_loss import per_loss, sum_losses


def betas(momentum: optax.ScalarOrSchedule = 0.9, delta: optax.ScalarOrSchedule = 0.075) -> PerLoss:
    r"""The two momenta of DOT.

    .. math::
        \beta_{task} = \mu - \delta, \qquad \beta_{kd} = \mu + \delta

    Args:
        momentum: :math:`\mu`, the momentum that plain SGD would use; a number, a scalar array or a schedule.
        delta: :math:`\delta`, how far the two momenta move apart: 0.075 on CIFAR-100 and Tiny-ImageNet, 0.09 on
            ImageNet in the paper. A number, a scalar array or a schedule. See `gains` for what it does to a steady
            gradient.

    Returns:
        `PerLoss(task, kd)` of the two momenta, or of two schedules if an argument is one.

    Raises:
        TypeError: if an argument is neither a number, nor a scalar array, nor a schedule.
        ValueError: if both are Python numbers and a momentum would leave [0, 1).

    Example:
        >>> import dot_optax
        >>> dot_optax.betas(momentum=0.5, delta=0.25)
        PerLoss(task=0.25, kd=0.75)

        A warm-up, from equal momenta to the paper's within 1,000 steps:

        >>> import optax
        >>> optimizer = dot_optax.dot(0.05, *dot_optax.betas(0.9, optax.linear_schedule(0.0, 0.075, 1000)))

    References:
        Zhao et al., `DOT: A Distillation-Oriented Trainer <https://arxiv.org/abs/2307.08436>`_, 2023.
    """
    if callable(momentum) or callable(delta):

        def at(count: Any) -> PerLoss:
            now: list[Any] = [h(count) if callable(h) else h for h in (momentum, delta)]
            return betas(*now)

        return PerLoss(task=lambda count: at(count).task, kd=lambda count: at(count).kd)
    _check_scalar("momentum", momentum)
    _check_scalar("delta", delta)
    result = PerLoss(task=momentum - delta, kd=momentum + delta)
    for sign, beta in zip("-+", result, strict=True):
        if _is_number(beta) and not 0 <= beta < 1:
            raise ValueError(
                f"betas: momentum {sign} delta must lie in [0, 1), got {beta:g} from momentum={momentum:g} and "
                f"delta={delta:g}"
            )
    return result


def scale_by_dot(
    beta_task: optax.ScalarOrSchedule = 0.825,
    beta_kd: optax.ScalarOrSchedule = 0.975,
    *,
    nesterov: bool = False,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
    reached: PerLoss | tuple[Mask, Mask] | Mapping[Any, Mask] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The two momenta of DOT, summed: container in, tree out.

    .. math::
        v_{task} &\leftarrow g_{task} + \beta_{task} v_{task} \\
        v_{kd} &\leftarrow g_{kd} + \beta_{kd} v_{kd} \\
        u &= v_{task} + v_{kd}

    A parameter that only one of the losses reaches has one buffer, with the mean momentum
    :math:`(\beta_{task} + \beta_{kd}) / 2`, as in the published code.

    Args:
        beta_task: :math:`\beta_{task}`, in [0, 1), or a schedule (from the number of updates so far to the momentum).
        beta_kd: :math:`\beta_{kd}`, in [0, 1), or a schedule. See `betas` for the paper's choice, and its example for a
            warm-up.
        nesterov: use :math:`g_i + \beta_i v_i` of the new :math:`v_i` in the sum, as `optax.trace` has it.
        accumulator_dtype: the dtype of the buffers; by default that of the parameters.
        reached: which loss reaches which parameter, as `PerLoss(task=mask, kd=mask)`. A mask is a pytree of bools of
            the structure of `params` or a prefix of it, or a callable from such a tree to the mask. The function
            `reached` computes it. By default both losses reach every parameter. A parameter that no loss reaches has
            no buffer and a zero update. A gradient where its loss is said not to reach is not read.

    Returns:
        A transformation from a container of two gradient trees (`PerLoss`, a 2-tuple, or a mapping) to one update tree
        with the dtypes of `params`. The buffers are `optax.tree.get(state, 'task').trace` and
        `optax.tree.get(state, 'kd').trace`, with an `optax.MaskedNode` where there is none (so `optax.tree.map_params`
        with further trees wants `is_leaf=lambda x: isinstance(x, optax.MaskedNode)`).

    Raises:
        TypeError: if a beta is not a number or a scalar array; from `update` if the updates are not a container.
        ValueError: if a beta given as a Python number is outside [0, 1), or if `reached` does not fit the parameters;
            from `update`, as `per_loss`.

    Example:
        >>> import dot_optax
        >>> tx = dot_optax.scale_by_dot(beta_task=0.5, beta_kd=0.75)
        >>> params = {'w': 0.0}
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update(({'w': 1.0}, {'w': 10.0}), state, params)
        >>> print(updates['w'])  # (1 + 0.5 * 1) + (10 + 0.75 * 10)
        19.0

    References:
        Zhao et al., `DOT: A Distillation-Oriented Trainer <https://arxiv.org/abs/2307.08436>`_, 2023.
    """
    return _scale_by_dot(beta_task, beta_kd, nesterov, accumulator_dtype, *_reach(reached))


def dot(
    learning_rate: optax.ScalarOrSchedule,
    beta_task: optax.ScalarOrSchedule = 0.825,
    beta_kd: optax.ScalarOrSchedule = 0.975,
    *,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    reached: PerLoss | tuple[Mask, Mask] | Mapping[Any, Mask] | None = None,
    nesterov: bool = False,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The Distillation-Oriented Trainer: SGD with one momentum per loss.

    .. math::
        g_{task} &\leftarrow g_{task} + \lambda \theta \\
        v_{task} &\leftarrow g_{task} + \beta_{task} v_{task} \\
        v_{kd} &\leftarrow g_{kd} + \beta_{kd} v_{kd} \\
        \theta &\leftarrow \theta - \eta (v_{task} + v_{kd})

    Both gradients are taken at the same parameters, of losses that the caller has weighted. With equal betas this is
    `optax.sgd(learning_rate, momentum=beta)` on the summed gradient.

    Args:
        learning_rate: :math:`\eta`, a scalar or a schedule. It multiplies the summed buffers, so that a drop acts at
            once.
        beta_task: :math:`\beta_{task} = \mu - \delta`, in [0, 1), or a schedule.
        beta_kd: :math:`\beta_{kd} = \mu + \delta`, in [0, 1), or a schedule. The default is `betas(0.9, 0.075)`.
        weight_decay: :math:`\lambda \geq 0`, the coupled L2 penalty of the paper. It joins the task gradient before the
            momentum; where only the distillation loss reaches a parameter, it joins that gradient. For decoupled decay
            chain `scale_by_dot`, `optax.add_decayed_weights` and `optax.scale_by_learning_rate`.
        mask: which parameters `weight_decay` applies to: a pytree of bools of the structure of `params` or a prefix of
            it (but no single bool), or a callable from such a tree to the mask. By default all, norms and biases
            included, as in the paper.
        reached: which loss reaches which parameter; see `scale_by_dot`. A decayed parameter that no loss reaches is
            moved by its L2 penalty alone.
        nesterov: whether to use Nesterov momentum for each loss.
        accumulator_dtype: the dtype of the buffers; by default that of the parameters.

    `optax.inject_hyperparams` takes every callable for a schedule: give it `static_args=('mask', 'accumulator_dtype')`.

    Returns:
        A transformation from a container of two gradient trees (`PerLoss`, a 2-tuple, or a mapping with the keys
        `task` and `kd`, or 0 and 1) to one update tree for `optax.apply_updates`.

    Raises:
        TypeError: if a hyperparameter is not a number (or a scalar array); from `update` if the updates are not a
            container.
        ValueError: if a beta given as a Python number is outside [0, 1), `weight_decay` is negative, or a mask does not
            fit the parameters; from `update`, as `per_loss`, or if `weight_decay` is used without `params`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, dot_optax
        >>> def loss_fn(w):
        ...     return dot_optax.PerLoss(task=jnp.sum((w - 1.0) ** 2), kd=jnp.sum((w - 1.1) ** 2))
        >>> tx = dot_optax.dot(0.01, *dot_optax.betas(momentum=0.8, delta=0.1))
        >>> w = jnp.zeros(2)
        >>> state = tx.init(w)
        >>> for _ in range(200):
        ...     losses, grads = dot_optax.value_and_grads(loss_fn)(w)
        ...     updates, state = tx.update(grads, state, w)
        ...     w = optax.apply_updates(w, updates)
        >>> print(f'{w[0]:.3f}')  # between the two minima, nearer to the distillation loss's
        1.075

    References:
        Zhao et al., `DOT: A Distillation-Oriented Trainer <https://arxiv.org/abs/2307.08436>`_, 2023.
    """
    _check_learning_rate(learning_rate)
    task, kd = _reach(reached)
    l2_on_task, l2_on_kd = _l2_masks(weight_decay, mask, task, kd)
    moved_by_task = _where(operator.or_, task, l2_on_task)
    return optax.chain(
        _add_l2(weight_decay, l2_on_task, l2_on_kd, task, kd),
        _scale_by_dot(beta_task, beta_kd, nesterov, accumulator_dtype, moved_by_task, kd),
        _keep_dtypes(optax.scale_by_learning_rate(learning_rate)),
    )


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


def _check_learning_rate(learning_rate: Any) -> None:
    if not callable(learning_rate):
        _check_scalar("learning_rate", learning_rate)


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
