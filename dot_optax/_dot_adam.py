"""DOT for transformers: Adam with one first moment per loss, and one second moment of the summed gradient."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dot_optax import _momenta
from dot_optax._checks import _check_scalar, _check_trainable
from dot_optax._containers import LossNames, PerLoss
from dot_optax._momenta import Betas, _widest
from dot_optax._reach import Mask, Masks, Plan, _leaf_mask, _plans


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
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
    reached: Masks = None,
    normalize: bool = False,
) -> optax.GradientTransformationExtraArgs:
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
    momenta = _wide_adam_momenta(betas, b2, eps, eps_root, mu_dtype, nesterov, reached, normalize)
    return _momenta._in_the_dtypes_of_params(momenta)


def _wide_adam_momenta(
    betas: Betas, b2: Any, eps: Any, eps_root: Any, mu_dtype: Any, nesterov: bool, reached: Any, normalize: bool
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_adam_momenta` with updates of 32 bits or more, so that no small decay is lost in them."""
    losses = LossNames.of(betas, "betas")
    for name, value, high in (("b2", b2, 1), ("eps", eps, jnp.inf), ("eps_root", eps_root, jnp.inf)):
        _check_scalar(name, value, 0, high)
    _momenta._check_flag("nesterov", nesterov)
    _momenta._check_flag("normalize", normalize)
    mu_dtype = _momenta._canonical_dtype(mu_dtype, "mu_dtype")

    step = functools.partial(_adam_step, b2=b2, eps=eps, eps_root=eps_root, nesterov=nesterov)

    def make(*now: Any) -> optax.GradientTransformationExtraArgs:
        plan_for = functools.partial(_plans, losses, now, reached, False)

        def init(params: optax.Params) -> ScaleByAdamMomentaState:
            _check_trainable(params, "params")
            *mu, nu = _momenta._kept(plan_for(params), len(now))
            first_moments = losses.pack([_momenta._init_buffers(params, keeps, mu_dtype) for keeps in mu])
            count = jnp.zeros([], jnp.int32)
            return ScaleByAdamMomentaState(count, first_moments, _momenta._init_buffers(params, nu, None))

        def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
            count = optax.safe_increment(state.count)
            rate = None if normalize else 1 - sum(now) / len(now)
            step_now = functools.partial(step, t=count, rate=rate)
            buffers = [*losses.entries(state.mu, "state").values(), state.nu]
            total, *mu, nu = _momenta._update_parameters(step_now, losses, plan_for, updates, buffers, params)
            return total, ScaleByAdamMomentaState(count, losses.pack(mu), nu)

        return optax.GradientTransformationExtraArgs(init, update)

    return _momenta._with_schedules(make, losses, betas)


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


def scale_by_dot_adam(
    beta_task: optax.ScalarOrSchedule = 0.825,
    beta_kd: optax.ScalarOrSchedule = 0.975,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
    reached: Masks = None,
    normalize: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with the two momenta of DOT: container in, tree out.

    .. math::
        m_i &\leftarrow \beta_i m_i + (1 - \beta_0) \, g_i \quad \text{for task and kd}, \qquad
            \beta_0 = (\beta_{task} + \beta_{kd}) / 2 \\
        \nu &\leftarrow b_2 \nu + (1 - b_2) \, (g_{task} + g_{kd})^2 \\
        u &= \left( \frac{m_{task}}{1 - \beta_{task}^t} + \frac{m_{kd}}{1 - \beta_{kd}^t} \right) \Big/
            \left( \sqrt{\frac{\nu}{1 - b_2^t} + \epsilon_{root}} + \epsilon \right)

    It is `scale_by_adam_momenta` of two losses, which says why there is one second moment and one factor.

    Args:
        beta_task: :math:`\beta_{task}`, in [0, 1), or a schedule.
        beta_kd: :math:`\beta_{kd}`, in [0, 1), or a schedule. See `betas`.
        b2: :math:`b_2`, the decay of the second moment, in [0, 1).
        eps: :math:`\epsilon`, added to the root.
        eps_root: :math:`\epsilon_{root}`, added inside the root.
        mu_dtype: the dtype of the first moments, as for `scale_by_adam_momenta`.
        nesterov: whether to use Nesterov momentum for each loss.
        reached: which loss reaches which parameter; see `scale_by_dot`.
        normalize: use :math:`1 - \beta_i` in the place of :math:`1 - \beta_0`.

    Returns:
        A transformation from a container of two gradient trees to one update tree with the dtypes of `params`.

    Raises:
        TypeError: as `scale_by_adam_momenta`.
        ValueError: as `scale_by_adam_momenta`.

    Example:
        >>> import dot_optax
        >>> tx = dot_optax.scale_by_dot_adam(*dot_optax.betas(0.9, 0.075))
        >>> params = {'w': 0.0}
        >>> updates, _ = tx.update(({'w': 1.0}, {'w': 3.0}), tx.init(params), params)
        >>> print(f"{updates['w']:.3f}")  # ((1 - 0.9) / (1 - 0.825) * 1 + (1 - 0.9) / (1 - 0.975) * 3) / (1 + 3)
        3.143

    References:
        As `scale_by_adam_momenta`.
    """
    betas = PerLoss(beta_task, beta_kd)
    momenta = _wide_adam_momenta(betas, b2, eps, eps_root, mu_dtype, nesterov, reached, normalize)
    return _momenta._in_the_dtypes_of_params(momenta)


def dot_adamw(
    learning_rate: optax.ScalarOrSchedule,
    beta_task: optax.ScalarOrSchedule = 0.825,
    beta_kd: optax.ScalarOrSchedule = 0.975,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: jax.typing.ArrayLike = 1e-4,
    mask: Mask | None = None,
    *,
    nesterov: bool = False,
    reached: Masks = None,
    normalize: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""DOT for transformers: AdamW with a first moment for each loss and one second moment.

    .. math::
        \theta \leftarrow \theta - \eta \, (u + \lambda \theta)

    where :math:`u` is the update of `scale_by_dot_adam`. With equal betas this is `optax.adamw` of the summed gradient.

    `optax.inject_hyperparams` takes every callable for a schedule, and keeps numbers in the dtype of the parameters, where
    in bfloat16 a `b2` of 0.999 is 1 and the updates are NaN: give it `static_args=('mask', 'mu_dtype')`, and
    `hyperparam_dtype=jnp.float32` where parameters have 16 bits.

    A steady gradient of the task is amplified by :math:`(1 - \beta_0) / (1 - \beta_{task})` = 0.57 and one of the
    distillation loss by 4 with the default momenta, where `optax.adamw` has 1 and 1: tune the learning rate anew.

    Args:
        learning_rate: :math:`\eta`, a scalar or a schedule.
        beta_task: as for `scale_by_dot_adam`, in [0, 1), or a schedule.
        beta_kd: as for `scale_by_dot_adam`, in [0, 1), or a schedule.
        b2: the decay of the second moment, in [0, 1).
        eps: :math:`\epsilon`, added to the root.
        eps_root: :math:`\epsilon_{root}`, added inside the root.
        mu_dtype: the dtype of the first moments, as for `scale_by_dot_adam`.
        weight_decay: :math:`\lambda \geq 0`, the decoupled decay of AdamW; it needs `params` in `update`.
        mask: which parameters are decayed: a pytree of bools of the structure of `params` or a prefix of it (but no
            single bool), or a function from `params` to the mask. By default all.
        nesterov: whether to use Nesterov momentum for each loss.
        reached: which loss reaches which parameter; see `scale_by_dot`.
        normalize: as for `scale_by_dot_adam`.

    Returns:
        A transformation from a container of two gradient trees to one update tree for `optax.apply_updates`.

    Raises:
        TypeError: as `scale_by_dot_adam`.
        ValueError: as `scale_by_dot_adam`, and if `weight_decay` is negative, the mask does not fit the parameters, or
            `weight_decay` is used without `params`.

    Example:
        >>> import jax.numpy as jnp, dot_optax
        >>> params = {'w': jnp.ones(2)}
        >>> optimizer = dot_optax.dot_adamw(1e-3, weight_decay=0.1)
        >>> grads = dot_optax.PerLoss(task={'w': jnp.ones(2)}, kd={'w': jnp.ones(2)})
        >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
        >>> print(updates['w'].round(6))  # -0.001 * ((0.5714 + 4) / 2 + 0.1 * 1)
        [-0.002386 -0.002386]

    References:
        Loshchilov and Hutter, `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_, 2019, and
        as `scale_by_adam_momenta`.
    """
    betas = PerLoss(beta_task, beta_kd)
    momenta = _wide_adam_momenta(betas, b2, eps, eps_root, mu_dtype, nesterov, reached, normalize)
    return _momenta._optimizer(learning_rate, momenta, _add_decayed_weights(weight_decay, mask))


def _add_decayed_weights(weight_decay: Any, mask: Mask | None) -> optax.GradientTransformation:
    """`optax.add_decayed_weights` whose mask is one of ours; it adds in 32 bits or more."""
    decayed = _momenta._decay_mask(weight_decay, mask)
    if decayed is False:
        return optax.identity()

    def add(updates: Any, params: Any) -> Any:
        _momenta._check_params(params, decayed)

        def leaf(u: Any, p: Any, is_decayed: bool) -> Any:
            dtype = _widest(u, p)
            decay = jnp.asarray(weight_decay, dtype) * jnp.asarray(p, dtype)
            return u.astype(dtype) + decay if is_decayed else u

        is_decayed = jax.tree.structure(params).unflatten(_leaf_mask(decayed, params, "mask"))
        return jax.tree.map(leaf, updates, params, is_decayed)

    return optax.stateless(add)
