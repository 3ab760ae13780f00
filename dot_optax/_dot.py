"""DOT: one momentum per loss, the larger one for the distillation loss.

The optimizer is a sentence in the algebra of `_per_loss.py`: a trace for each loss, their sum, the learning rate.  What
is said here beyond that is which loss reaches which parameter, and which gradient the L2 penalty joins.
"""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dot_optax._checks import LOOKS_SINGLE, check_scalar, describe, difference, is_number
from dot_optax._per_loss import PerLoss, _children, _key, _Losses, per_loss, sum_losses

_TASK_AND_KD = _Losses(PerLoss(None, None))

# From a tree to one bool, or one momentum, for each of its leaves in order.
_LeafMask = Callable[[Any], list[bool]]
_LeafDecay = Callable[[Any], list[Any]]


def betas(momentum: Any = 0.9, delta: Any = 0.075) -> PerLoss:
    r"""The two momenta of DOT.

    .. math::
        \beta_{task} = \mu - \delta, \qquad \beta_{kd} = \mu + \delta

    Args:
        momentum: :math:`\mu`, the momentum that plain SGD would use.
        delta: :math:`\delta`, how far the two momenta move apart: 0.075 on CIFAR-100 and Tiny-ImageNet, 0.09 on
            ImageNet in the paper. A momentum :math:`\beta` amplifies a steady gradient by :math:`1/(1-\beta)`.

    Returns:
        `PerLoss(task, kd)` of the two momenta.

    Raises:
        TypeError: if an argument is neither a number nor a scalar array.
        ValueError: if both are Python numbers and a momentum would leave [0, 1).

    Example:
        >>> import dot_optax
        >>> dot_optax.betas(momentum=0.5, delta=0.25)
        PerLoss(task=0.25, kd=0.75)

    References:
        Zhao et al., `DOT: A Distillation-Oriented Trainer <https://arxiv.org/abs/2307.08436>`_, 2023.
    """
    check_scalar("momentum", momentum)
    check_scalar("delta", delta)
    result = PerLoss(task=momentum - delta, kd=momentum + delta)
    for sign, beta in zip("-+", result, strict=True):
        if is_number(beta) and not 0 <= beta < 1:
            raise ValueError(
                f"betas: momentum {sign} delta must lie in [0, 1), got {beta:g} from momentum={momentum:g} and "
                f"delta={delta:g}: choose a delta closer to 0"
            )
    return result


def scale_by_dot(
    beta_task: Any = 0.825,
    beta_kd: Any = 0.975,
    *,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    reached: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The two momenta of DOT, summed: container in, tree out.

    .. math::
        v_{task} &\leftarrow g_{task} + \beta_{task} v_{task} \\
        v_{kd} &\leftarrow g_{kd} + \beta_{kd} v_{kd} \\
        u &= v_{task} + v_{kd}

    A parameter that only one of the losses reaches has one buffer, with the mean momentum
    :math:`(\beta_{task} + \beta_{kd}) / 2`, as in the published code.

    Args:
        beta_task: :math:`\beta_{task}`, in [0, 1).
        beta_kd: :math:`\beta_{kd}`, in [0, 1). See `betas` for the paper's choice.
        nesterov: use :math:`g_i + \beta_i v_i` of the new :math:`v_i` in the sum, as `optax.trace` has it.
        accumulator_dtype: the dtype of the buffers; by default that of the parameters.
        reached: which loss reaches which parameter, as `PerLoss(task=mask, kd=mask)`. A mask is a pytree of bools of
            the structure of `params` or a prefix of it, or a callable from such a tree to the mask. The function
            `reached` computes it. By default both losses reach every parameter. A parameter that no loss reaches has
            no buffer and a zero update. A gradient where its loss is said not to reach is not read.

    Returns:
        A transformation from a container of two gradient trees (`PerLoss`, a 2-tuple, or a mapping) to one update tree
        with the dtypes of `params`. Its state holds the buffers in `state[0].task.trace` and `state[0].kd.trace`, with
        an `optax.MaskedNode` where there is none.

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
    beta_task: Any = 0.825,
    beta_kd: Any = 0.975,
    *,
    weight_decay: Any = 0.0,
    mask: Any = None,
    reached: Any = None,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
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
        beta_task: :math:`\beta_{task} = \mu - \delta`, in [0, 1).
        beta_kd: :math:`\beta_{kd} = \mu + \delta`, in [0, 1). `dot(lr, *betas(0.9, 0.075))` is the default.
        weight_decay: :math:`\lambda \geq 0`, the coupled L2 penalty of the paper. It joins the task gradient before the
            momentum; where only the distillation loss reaches a parameter, it joins that gradient. For decoupled decay
            chain `scale_by_dot`, `optax.add_decayed_weights` and `optax.scale_by_learning_rate`.
        mask: which parameters `weight_decay` applies to: a pytree of bools of the structure of `params` or a prefix of
            it, or a callable from such a tree to the mask. By default all, norms and biases included, as in the paper.
        reached: which loss reaches which parameter; see `scale_by_dot`. A decayed parameter that no loss reaches is
            moved by its L2 penalty alone.
        nesterov: whether to use Nesterov momentum for each loss.
        accumulator_dtype: the dtype of the buffers; by default that of the parameters.

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
        optax.scale_by_learning_rate(learning_rate),
    )


def _scale_by_dot(
    beta_task: Any, beta_kd: Any, nesterov: bool, accumulator_dtype: Any, task: _LeafMask, kd: _LeafMask
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_dot` of leaf masks."""
    check_scalar("beta_task", beta_task, 0, 1)
    check_scalar("beta_kd", beta_kd, 0, 1)
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


def _trace(decay: _LeafDecay, nesterov: bool, accumulator_dtype: Any) -> optax.GradientTransformation:
    """`optax.trace` with a momentum for each leaf, or no buffer and a zero update where that is None.

    The new state has the dtypes of the old one, also where a traced float32 momentum meets bfloat16 buffers.
    """
    accumulator_dtype = _canonical_accumulator_dtype(accumulator_dtype)

    def init(params: optax.Params) -> optax.TraceState:
        leaves, treedef = jax.tree.flatten(params)

        def buffer(p: Any, beta: Any) -> Any:
            if beta is None:
                return optax.MaskedNode()
            return jnp.zeros_like(p, dtype=accumulator_dtype or jnp.result_type(p))

        return optax.TraceState(treedef.unflatten(map(buffer, leaves, decay(params))))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.TraceState]:
        del params
        grads, treedef = jax.tree.flatten(updates)

        def step(g: Any, v: Any, beta: Any) -> tuple[Any, Any]:
            if beta is None:
                return jnp.zeros_like(g), v
            dtype = jnp.result_type(g, v)
            new_v = jnp.asarray(g + beta * v, dtype)
            return jnp.asarray(g + beta * new_v, dtype) if nesterov else new_v, new_v.astype(v.dtype)

        steps = list(map(step, grads, _leaves_up_to(state.trace, updates), decay(updates)))
        return treedef.unflatten([u for u, _ in steps]), optax.TraceState(treedef.unflatten([v for _, v in steps]))

    return optax.GradientTransformation(init, update)


def _leaves_up_to(trace: Any, updates: Any) -> list[Any]:
    """The buffers, one for each gradient, with the `MaskedNode` of a gradient that has none."""
    try:
        buffers = jax.tree.structure(updates).flatten_up_to(trace)
    except ValueError:
        buffers = None
    if buffers is None or any(
        not isinstance(v, optax.MaskedNode) and np.shape(v) != np.shape(g)
        for v, g in zip(buffers, jax.tree.leaves(updates), strict=True)
    ):
        raise ValueError(f"the updates of one loss{difference(updates, trace, 'the state')}; {LOOKS_SINGLE}")
    return buffers


def _l2_masks(weight_decay: Any, mask: Any, task: _LeafMask, kd: _LeafMask) -> tuple[_LeafMask, _LeafMask]:
    """Which gradient the L2 penalty joins: the task's, or the other where only the distillation loss reaches."""
    check_scalar("weight_decay", weight_decay, low=0)
    if is_number(weight_decay) and weight_decay == 0:
        return _leaf_mask(False, "mask"), _leaf_mask(False, "mask")
    decayed = _leaf_mask(True if mask is None else mask, "mask")
    only_kd = _where(lambda t, k: k and not t, task, kd)
    return _where(lambda d, o: d and not o, decayed, only_kd), _where(operator.and_, decayed, only_kd)


def _add_l2(
    weight_decay: Any, on_task: _LeafMask, on_kd: _LeafMask, task: _LeafMask, kd: _LeafMask
) -> optax.GradientTransformation:
    """Adds `weight_decay * params` to the gradient of one loss, for each parameter that a mask selects."""
    if is_number(weight_decay) and weight_decay == 0:
        return optax.identity()

    def add(updates: Any, params: Any) -> Any:
        if params is None:
            raise ValueError("dot: weight_decay needs the parameters: call update(grads, state, params)")
        grads, repack = _TASK_AND_KD.unpack(updates, params)
        theta, treedef = jax.tree.flatten(params)

        def penalized(tree: Any, joins: _LeafMask, reaches: _LeafMask) -> Any:
            def leaf(g: Any, p: Any, join: bool, reach: bool) -> Any:
                return (g if reach else jnp.zeros_like(g)) + weight_decay * p if join else g

            return treedef.unflatten(map(leaf, jax.tree.leaves(tree), theta, joins(params), reaches(params)))

        return repack([penalized(grads[0], on_task, task), penalized(grads[1], on_kd, kd)])

    return optax.stateless(add)


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
        return [_rule(rules, path, name) for path in paths]

    return leaves


def _rules(mask: Any, name: str) -> Any:
    for path, value in jax.tree_util.tree_leaves_with_path(mask):
        if not isinstance(value, (bool, np.bool_)):
            where = jax.tree_util.keystr(path)
            raise ValueError(f"{name}{where}: expected True or False, known before tracing; got {describe(value)}")
        yield _plain(path), bool(value)


def _rule(rules: dict[tuple[Any, ...], bool], path: tuple[Any, ...], name: str) -> bool:
    for length in range(len(path), -1, -1):
        if path[:length] in rules:
            return rules[path[:length]]
    raise ValueError(f"{name}: no entry for the parameter {'/'.join(map(str, path))}; give one for it or for a prefix")


def _plain(path: Any) -> tuple[Any, ...]:
    return tuple(map(_key, path))


def _check_learning_rate(learning_rate: Any) -> None:
    if not callable(learning_rate):
        check_scalar("learning_rate", learning_rate)


def _canonical_accumulator_dtype(dtype: Any) -> Any:
    if dtype is None:
        return None
    try:
        canonical = jax.dtypes.canonicalize_dtype(dtype)
    except TypeError:
        canonical = None
    if canonical is None or not jnp.issubdtype(canonical, jnp.inexact):
        raise TypeError(f"accumulator_dtype must be None or a floating point or complex dtype, got {describe(dtype)}")
    return canonical
