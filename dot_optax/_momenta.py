"""One momentum for each loss and parameter: the steps that every optimizer of this package takes.

SGD takes that of `scale_by_momenta`, Adam that of `scale_by_adam_momenta`.  The optimizers are in `_dot.py`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike
from optax import ScalarOrSchedule

from dot_optax._checks import LOOKS_SINGLE, _check_scalar, _check_trainable, _describe, _is_number
from dot_optax._containers import LossNames, _same_structure
from dot_optax._reach import Mask, Masks, Plan, _leaf_mask, _plans

# A momentum for each loss: numbers, scalar arrays, or schedules from the number of updates so far.
Betas = tuple[ScalarOrSchedule, ...] | Mapping[Any, ScalarOrSchedule]


def scale_by_momenta(
    betas: Betas, *, weight_decay: ArrayLike = 0.0, mask: Mask | None = None, reached: Masks = None,
    nesterov: bool = False, accumulator_dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    r"""One momentum for each of any number of losses, summed: container in, tree out.

    .. math::
        v_i &\leftarrow g_i + \beta_i v_i \quad \text{for each loss } i \\
        u &= \textstyle\sum_i v_i

    Where exactly one loss reaches a parameter, that parameter has one buffer, with the mean of all momenta. Where
    several do, each of them has a buffer with its own momentum.

    Args:
        betas: the momentum of each loss, in [0, 1), in a container: a dict such as `{"ce": 0.825, "kd": 0.975}`, a
            NamedTuple, or a tuple (two losses in a plain tuple are called `task` and `kd`). A momentum may be a
            schedule, from the number of updates so far to the momentum.
        weight_decay: :math:`\lambda \geq 0`, a coupled L2 penalty: :math:`\lambda \theta` joins, before the momentum,
            the gradient of the first loss that reaches the parameter (so `betas` must have an order: no dict). A
            parameter that no loss reaches is moved by its penalty alone. For a decoupled decay chain
            `optax.add_decayed_weights` after this.
        mask: which parameters `weight_decay` applies to: a pytree of bools of the structure of `params` or a prefix of
            it (but no single bool), or a function from `params` to the mask. By default all.
        reached: which loss reaches which parameter: a container with one mask per loss. The function `reached` computes
            it. By default every loss reaches every parameter. A parameter that no loss reaches has no buffer and a zero
            update. A gradient where its loss is said not to reach is not read.
        nesterov: use :math:`g_i + \beta_i v_i` of the new :math:`v_i` in the sum, as `optax.trace` has it.
        accumulator_dtype: the dtype of the buffers. By default that of the parameters, but float32 for those of 16
            bits: in bfloat16 a momentum of 0.975 amplifies a steady gradient 35-fold instead of 40-fold. All arithmetic
            is done in float32 or wider, and without `params` so are the updates.

    Returns:
        A transformation from a container with one gradient tree per loss to one update tree with the dtypes of
        `params`. Its state is a container of `optax.TraceState`, so that `optax.tree.get(state, 'kd').trace` reads a
        buffer, with an `optax.MaskedNode` where there is none (so `optax.tree.map_params` with further trees wants
        `is_leaf=lambda x: isinstance(x, optax.MaskedNode)`).

    Raises:
        TypeError: if `betas` is not a container of numbers, scalar arrays or schedules; from `init` if a leaf of the
            parameters cannot be trained; from `update` if the updates are not a container.
        ValueError: if a momentum given as a Python number is outside [0, 1), `weight_decay` is negative or given with a
            dict of betas, or a mask does not fit the parameters; from `update` if a loss is missing or unknown, if an entry differs from `params` in
            structure, shape or kind of number, or if `params` is needed (for `weight_decay`, or a mask that is a
            function) and missing.

    Example:
        >>> import dot_optax
        >>> tx = dot_optax.scale_by_momenta({'ce': 0.5, 'hint': 0.0, 'kd': 0.75})
        >>> params = {'w': 0.0}
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     grads = {'ce': {'w': 1.0}, 'hint': {'w': 100.0}, 'kd': {'w': 10.0}}
        ...     updates, state = tx.update(grads, state, params)
        >>> print(updates['w'])  # (1 + 0.5 * 1) + 100 + (10 + 0.75 * 10)
        119.0

    References:
        Zhao et al., `DOT: A Distillation-Oriented Trainer <https://arxiv.org/abs/2307.08436>`_, 2023, for two losses.
    """
    return _in_the_dtypes_of_params(_wide_momenta(betas, weight_decay, mask, reached, nesterov, accumulator_dtype))


def _wide_momenta(betas: Any, weight_decay: Any, mask: Any, reached: Any, nesterov: Any, accumulator_dtype: Any) -> Any:
    """`scale_by_momenta` with updates of 32 bits or more, so that nothing is rounded or lost before the learning rate."""
    losses = LossNames.of(betas, "betas")
    buffer_dtype = _canonical_dtype(accumulator_dtype, "accumulator_dtype")
    decayed = _decay_mask(weight_decay, mask)
    if decayed is not False and isinstance(betas, Mapping):
        raise ValueError("weight_decay joins the first loss, but a mapping of betas has no first: give a NamedTuple")
    _check_flag("nesterov", nesterov)
    step = functools.partial(_momentum_step, weight_decay=weight_decay, nesterov=nesterov)

    def make(*now: Any) -> optax.GradientTransformationExtraArgs:
        plan_for = functools.partial(_plans, losses, now, reached, decayed)

        def init(params: optax.Params) -> Any:
            _check_trainable(params, "params")
            *kept, _ = _kept(plan_for(params), len(now))
            return losses.pack([optax.TraceState(_init_buffers(params, keeps, buffer_dtype)) for keeps in kept])

        def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
            _check_params(params, decayed)
            traces = [entry.trace for entry in losses.entries(state, "state").values()]
            total, *traces = _update_parameters(step, losses, plan_for, updates, traces, params)
            return total, losses.pack([optax.TraceState(trace) for trace in traces])

        return optax.GradientTransformationExtraArgs(init, update)

    return _with_schedules(make, losses, betas)


def _momentum_step(plan: Plan, grads: Any, buffers: Any, theta: Any, *, weight_decay: Any, nesterov: bool) -> list[Any]:
    """The update of one parameter, and its new buffers: v_i <- g_i + beta_i v_i for each loss i, u = sum_i v_i."""
    dtype = _widest(*grads, *buffers)
    total, new_buffers = None, list(buffers)
    for i, beta in enumerate(plan.momenta):
        if beta is None:
            continue
        g = jnp.asarray(grads[i], dtype) if plan.reads[i] else jnp.zeros_like(grads[i], dtype)
        if plan.l2 == i:
            g = g + jnp.asarray(weight_decay, dtype) * jnp.asarray(theta, dtype)
        beta = jnp.asarray(beta, dtype)
        v = g + beta * buffers[i].astype(dtype)
        u = g + beta * v if nesterov else v
        total = u if total is None else total + u
        new_buffers[i] = v.astype(buffers[i].dtype)
    return [jnp.zeros_like(grads[0]) if total is None else total, *new_buffers]


class ScaleByAdamMomentaState(NamedTuple):
    """The state of `scale_by_adam_momenta`.

    Attributes:
        count: the number of updates so far, int32.
        mu: the first moments: a container with a tree for each loss, with an `optax.MaskedNode` where there is none.
        nu: the second moment of the summed gradient, a tree.
    """

    count: Any
    mu: Any
    nu: Any


def scale_by_adam_momenta(
    betas: Betas,
    b2: ArrayLike = 0.999, eps: ArrayLike = 1e-8, eps_root: ArrayLike = 0.0, mu_dtype: DTypeLike | None = None, *,
    nesterov: bool = False, reached: Masks = None, normalize: bool = False
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    r"""Adam with a first moment for each of any number of losses: container in, tree out.

    .. math::
        m_i &\leftarrow \beta_i m_i + (1 - \beta_0) \, g_i, \qquad \beta_0 = \tfrac{1}{N} \textstyle\sum_i \beta_i \\
        \nu &\leftarrow b_2 \nu + (1 - b_2) \, (\textstyle\sum_i g_i)^2 \\
        u &= \sum_i \hat{m}_i \Big/ \left( \sqrt{\frac{\nu}{1 - b_2^t} + \epsilon_{root}} + \epsilon \right),
            \qquad \hat{m}_i = \frac{m_i}{1 - \beta_i^t}

    With `nesterov`, :math:`\hat{m}_i = \beta_i m_i / (1 - \beta_i^{t+1}) + (1 - \beta_0) \, g_i / (1 - \beta_i^t)`.

    Adam's own first moment is normalised: its weights add up to 1 whatever its momentum is, so that a larger momentum
    would remember longer without amplifying more. Here all losses share the factor :math:`1 - \beta_0`, so that a steady
    gradient of loss :math:`i` is amplified by :math:`(1 - \beta_0) / (1 - \beta_i)`, in the proportions of DOT. With
    equal betas this is `optax.scale_by_adam` of the summed gradient. `per_loss(adam, adam)` and `joint(adam)` are
    something else: they divide each gradient by its own size, so that the weights of the losses cancel.

    Where exactly one loss reaches a parameter, that parameter has one first moment, with the mean of all momenta.

    Args:
        betas: the momentum of each loss, in [0, 1), in a container, as for `scale_by_momenta`; numbers, scalar arrays or
            schedules. The bias correction takes a scheduled momentum as it is now, as Optax does.
        b2: :math:`b_2`, the decay of the second moment, in [0, 1).
        eps: :math:`\epsilon`, added to the root.
        eps_root: :math:`\epsilon_{root}`, added inside the root.
        mu_dtype: the dtype of the first moments. By default all moments have that of the parameters, but float32 for
            those of 16 bits. All arithmetic is done in float32 or wider.
        nesterov: whether to look one step ahead in each first moment, as `optax.scale_by_adam` does.
        reached: which loss reaches which parameter, as for `scale_by_momenta`.
        normalize: use the factor :math:`1 - \beta_i` for loss :math:`i`, so that the losses remember differently long
            and are amplified alike: it tells the two effects apart.

    Returns:
        A transformation from a container with one gradient tree per loss to one update tree with the dtypes of `params`.
        `optax.tree.get(state, 'mu')` is the container of the first moments, and `'nu'` the tree of the second.

    Raises:
        TypeError: if a hyperparameter is not a number (or a scalar array); from `update` if the updates are not a
            container.
        ValueError: if a beta or `b2` given as a Python number is outside [0, 1), or `eps` or `eps_root` is negative;
            from `update`, as `scale_by_momenta`.

    Example:
        AdamW with three losses:

        >>> import optax, dot_optax
        >>> optimizer = optax.chain(
        ...     dot_optax.scale_by_adam_momenta({'ce': 0.825, 'hint': 0.9, 'kd': 0.975}),
        ...     optax.add_decayed_weights(1e-4),
        ...     optax.scale_by_learning_rate(1e-3),
        ... )
        >>> params = {'w': 1.0}
        >>> grads = {'ce': {'w': 2.0}, 'hint': {'w': 1.0}, 'kd': {'w': 3.0}}
        >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
        >>> print(f"{updates['w']:.6f}")
        -0.002357

    References:
        Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2014, with the momenta of Zhao et al.,
        `DOT <https://arxiv.org/abs/2307.08436>`_, 2023; the combination is ours.
    """
    return _in_the_dtypes_of_params(_wide_adam(betas, b2, eps, eps_root, mu_dtype, nesterov, reached, normalize))


def _wide_adam(
    betas: Betas, b2: Any, eps: Any, eps_root: Any, mu_dtype: Any, nesterov: bool, reached: Any, normalize: bool
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_adam_momenta` with updates of 32 bits or more, so that no small decay is lost in them."""
    losses = LossNames.of(betas, "betas")
    for name, value, high in (("b2", b2, 1), ("eps", eps, jnp.inf), ("eps_root", eps_root, jnp.inf)):
        _check_scalar(name, value, 0, high)
    _check_flag("nesterov", nesterov)
    _check_flag("normalize", normalize)
    mu_dtype = _canonical_dtype(mu_dtype, "mu_dtype")

    step = functools.partial(_adam_step, b2=b2, eps=eps, eps_root=eps_root, nesterov=nesterov)

    def make(*now: Any) -> optax.GradientTransformationExtraArgs:
        plan_for = functools.partial(_plans, losses, now, reached, False)

        def init(params: optax.Params) -> ScaleByAdamMomentaState:
            _check_trainable(params, "params")
            *mu, nu = _kept(plan_for(params), len(now))
            first_moments = losses.pack([_init_buffers(params, keeps, mu_dtype) for keeps in mu])
            return ScaleByAdamMomentaState(jnp.zeros([], jnp.int32), first_moments, _init_buffers(params, nu, None))

        def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
            count = optax.safe_increment(state.count)
            rate = None if normalize else 1 - sum(now) / len(now)
            step_now = functools.partial(step, t=count, rate=rate)
            buffers = [*losses.entries(state.mu, "state").values(), state.nu]
            total, *mu, nu = _update_parameters(step_now, losses, plan_for, updates, buffers, params)
            return total, ScaleByAdamMomentaState(count, losses.pack(mu), nu)

        return optax.GradientTransformationExtraArgs(init, update)

    return _with_schedules(make, losses, betas)


def _adam_step(
    plan: Plan, grads: Any, buffers: Any, _: Any, *, t: Any, rate: Any, b2: Any, eps: Any, eps_root: Any, nesterov: bool
) -> list[Any]:
    """The update of one parameter, and its new moments: those of each loss, and the second one."""
    *mu, nu = buffers
    if not any(plan.reads):
        return [jnp.zeros_like(grads[0]), *buffers]
    dtype = _widest(*grads, *mu, nu)

    def corrected(x: Any, decay: Any, count: Any) -> Any:
        return x / jnp.asarray(1 - decay ** count.astype(float), dtype)

    numerator, total = 0.0, 0.0
    for i, beta in enumerate(plan.momenta):
        if beta is None:
            continue
        g = jnp.asarray(grads[i], dtype)
        factor = jnp.asarray(1 - beta if rate is None else rate, dtype)
        m = factor * g + jnp.asarray(beta, dtype) * mu[i].astype(dtype)
        m_hat = corrected(m, beta, t)
        if nesterov:
            m_hat = jnp.asarray(beta, dtype) * corrected(m, beta, t + 1) + factor * corrected(g, beta, t)
        numerator, total = numerator + m_hat, total + g
        mu[i] = m.astype(mu[i].dtype)
    new_nu = jnp.asarray(1 - b2, dtype) * jnp.square(jnp.abs(total)) + jnp.asarray(b2, dtype) * nu.astype(dtype)
    root = jnp.sqrt(corrected(new_nu, b2, t) + jnp.asarray(eps_root, dtype))
    return [numerator / (root + jnp.asarray(eps, dtype)), *mu, new_nu.astype(nu.dtype)]


def _kept(plans: Sequence[Plan], n: int) -> list[list[bool]]:
    """For each of n losses, and last for what they share: at which parameters a buffer is kept."""
    of_losses = [[plan.momenta[i] is not None for plan in plans] for i in range(n)]
    return [*of_losses, [any(plan.reads) for plan in plans]]


def _init_buffers(params: Any, kept: Sequence[bool], dtype: Any) -> Any:
    """A tree of zeros like the parameters, with an `optax.MaskedNode` where no buffer is kept."""
    leaves, treedef = jax.tree.flatten(params)

    def buffer(p: Any, keep: bool) -> Any:
        if not keep:
            return optax.MaskedNode()
        wanted = _widest(p) if dtype is None else dtype
        if jnp.issubdtype(jnp.result_type(p), jnp.complexfloating):  # a real buffer would drop the imaginary part
            wanted = jnp.complex128 if jnp.finfo(wanted).bits == 64 else jnp.complex64
        return jnp.zeros_like(p, wanted)

    return treedef.unflatten(map(buffer, leaves, kept))


def _update_parameters(step: Any, losses: LossNames, plan_for: Any, updates: Any, buffers: Any, params: Any) -> Any:
    """The update, and then the new buffers, from one `step(plan, gradients, buffers, value)` for each parameter."""
    grads, _ = losses.gradients(updates, params)
    leaves, treedef = jax.tree.flatten(grads[0])
    plan = plan_for(params, grads[0])
    for tree, keeps in zip(buffers, _kept(plan, len(grads)), strict=False):
        expected = treedef.unflatten([g if keep else optax.MaskedNode() for g, keep in zip(leaves, keeps, strict=True)])
        if _shapes(tree) != _shapes(expected):
            hint = "" if _same_structure(grads[0], params) else f"; {LOOKS_SINGLE}"
            made = "the state was made for other parameters, or with other masks for `reached` or `mask`"
            raise ValueError(f"updates: {made}: {_shapes(tree)!s:.200}, not {_shapes(expected)!s:.200}{hint}")
    values = [None] * len(plan) if params is None else jax.tree.leaves(params)
    columns = [*map(jax.tree.leaves, grads), *map(treedef.flatten_up_to, buffers)]
    n = len(grads)
    results = [step(leaf, row[:n], row[n:], value) for leaf, value, *row in zip(plan, values, *columns, strict=True)]
    return [treedef.unflatten(column) for column in zip(*results, strict=True)] or [grads[0], *buffers]


def _shapes(tree: Any) -> Any:
    return jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]


def _widest(*arrays: Any) -> Any:
    """The widest dtype among the arrays, but at least float32.

    Without promoting: `jax.numpy_dtype_promotion("strict")` forbids that for 16 bits.
    """
    dtypes = [jnp.result_type(x) for x in arrays if not isinstance(x, optax.MaskedNode)]
    return max([*dtypes, jnp.dtype(jnp.float32)], key=lambda dtype: jnp.finfo(dtype).bits)


class ScheduledState(NamedTuple):
    """The state of a transformation whose momenta follow schedules.

    Attributes:
        count: the number of updates so far, int32.
        inner_state: the state of the transformation.
    """

    count: Any
    inner_state: Any


def _with_schedules(make: Callable[..., Any], losses: LossNames, betas: Any) -> optax.GradientTransformationExtraArgs:
    """`make(*betas)`, with those that are schedules evaluated at the number of updates so far."""
    momenta = list(losses.entries(betas, "betas").values())

    def at(count: Any) -> optax.GradientTransformationExtraArgs:
        now = [beta(count) if callable(beta) else beta for beta in momenta]
        for name, beta in zip(losses.names, now, strict=True):
            _check_scalar(f"beta_{name}", beta, 0, 1)
        return make(*now)

    if not any(map(callable, momenta)):
        return at(None)

    def init(params: optax.Params) -> ScheduledState:
        count = jnp.zeros([], jnp.int32)
        return ScheduledState(count, at(count).init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, ScheduledState]:
        updates, inner_state = at(state.count).update(updates, state.inner_state, params, **extra_args)
        return updates, ScheduledState(optax.safe_increment(state.count), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _optimizer(learning_rate: ScalarOrSchedule, *steps: optax.GradientTransformation) -> Any:
    """Chains the steps and the learning rate: all in float32 or wider, and one rounding to the dtypes of parameters."""
    if not callable(learning_rate):  # `optax.scale_by_learning_rate` would take a string, a bool or any array
        _check_scalar("learning_rate", learning_rate)
    return _in_the_dtypes_of_params(optax.chain(*steps, optax.scale_by_learning_rate(learning_rate)))


def _in_the_dtypes_of_params(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx`, whose updates are rounded to the dtypes of the parameters, if these are given, at the end."""
    inner = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        updates, state = inner.update(updates, state, params, **extra_args)
        return updates if params is None else optax.tree.cast_like(updates, params), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _add_decayed_weights(weight_decay: Any, mask: Mask | None) -> optax.GradientTransformation:
    """`optax.add_decayed_weights` whose mask is one of ours; it adds in 32 bits or more."""
    decayed = _decay_mask(weight_decay, mask)
    if decayed is False:
        return optax.identity()

    def add(updates: Any, params: Any) -> Any:
        _check_params(params, decayed)

        def leaf(u: Any, p: Any, is_decayed: bool) -> Any:
            dtype = _widest(u, p)
            decay = jnp.asarray(weight_decay, dtype) * jnp.asarray(p, dtype)
            return u.astype(dtype) + decay if is_decayed else u

        is_decayed = jax.tree.structure(params).unflatten(_leaf_mask(decayed, params, "mask"))
        return jax.tree.map(leaf, updates, params, is_decayed)

    return optax.stateless(add)


def _decay_mask(weight_decay: Any, mask: Mask | None) -> Mask:
    """Which parameters are decayed: False if none ever is."""
    _check_scalar("weight_decay", weight_decay, low=0)
    if isinstance(mask, (bool, np.bool_)):
        remedy = "if inject_hyperparams called your function, give it static_args='mask'"
        raise ValueError(f"mask must be a tree of bools or a function of the parameters, got {mask}; {remedy}")
    if _is_number(weight_decay) and weight_decay == 0:
        return False
    return True if mask is None else mask


def _check_params(params: Any, decayed: Mask) -> None:
    if params is None and decayed is not False:
        raise ValueError("weight_decay needs the parameters: call update(grads, state, params)")


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {_describe(value)}")


def _canonical_dtype(dtype: Any, name: str) -> Any:
    if dtype is not None and not jnp.issubdtype(jax.dtypes.canonicalize_dtype(dtype), jnp.inexact):
        raise TypeError(f"{name} must be None or a floating point or complex dtype, got {_describe(dtype)}")
    return None if dtype is None else jax.dtypes.canonicalize_dtype(dtype)
