"""What the optimizers of the methods are made of: weights, momenta, decay, and learning rates."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import dot_optax
from examples.trainer.errors import UserError

NAMES = ("sgd", "adamw", "muon")

_RMS_OF_ADAMW = 0.2  # of an update: https://arxiv.org/abs/2502.16982
_MAX_STEPS = 2**31 - 1  # Optax counts them in int32.


class Recipe(NamedTuple):
    """What the optimizer of a method is made of."""

    config: ConfigDict  # the section `optimizer` of a config
    weights: Any  # of the losses, in their container: numbers, or schedules from the number of updates so far
    learning_rate: optax.Schedule  # from the number of updates so far, warm-up and drops included
    steps_per_epoch: int
    deltas: Any = None  # in the same container: of an objective whose momenta are not DOT's, see `Objective`
    reached: Any = None  # likewise: which loss reaches which parameter, see `dot_optax.dot`; None: all reach all
    # (params) -> which of them layers multiply with, as Muon's dimension numbers; the others are None. By default, those
    # that Flax calls kernels decay, and those with two axes are matrices for Muon.
    matrices: Callable[[Any], Any] | None = None


def weight_losses(weights: Any) -> optax.GradientTransformationExtraArgs:
    """Multiplies the gradient of each loss by its weight, a number or a schedule."""
    scaled = (optax.scale_by_schedule(weight) if callable(weight) else optax.scale(weight) for weight in weights)
    return dot_optax.per_loss(type(weights)(*scaled))


def betas(config: ConfigDict) -> dot_optax.PerLoss:
    """DOT's two momenta, after any warm-up; `config` is the section `optimizer` of a config."""
    try:
        momenta = dot_optax.betas(config.momentum, config.delta)
    except ValueError as error:
        raise UserError(f"bad --config.optimizer.delta={config.delta}: {error}") from error
    if np.float32(momenta.kd) == 1 or np.float32(momenta.task) == 1:
        raise UserError(
            f"bad --config.optimizer.delta={config.delta}: with a momentum of {config.momentum} it makes one that is 1"
            " in float32; give a smaller one"
        )
    return momenta


def trace(beta: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """The momentum of one loss, a number or a schedule."""
    return optax.inject_hyperparams(optax.trace)(decay=beta) if callable(beta) else optax.trace(beta)


def learning_rate_schedule(config: ConfigDict, steps_per_epoch: int, epochs: int | None = None) -> optax.Schedule:
    """Constant with drops, or a cosine down to 0 at the end of the last epoch; after a linear warm-up from 0.

    A drop at 150 takes effect in epoch 151, counted from 1, as papers count; a warm-up does not move it.
    """
    warmup = config.warmup_epochs * steps_per_epoch
    if epochs is not None and epochs * steps_per_epoch > _MAX_STEPS:
        raise UserError(
            f"{epochs} epochs of {steps_per_epoch} steps are more than {_MAX_STEPS} steps: give fewer epochs"
        )
    if config.schedule == "cosine":
        if epochs is None:
            raise ValueError("a cosine schedule depends on the number of epochs: give `epochs`")
        cosine = optax.cosine_decay_schedule(config.learning_rate, epochs * steps_per_epoch - warmup)
        if not warmup:
            return cosine
        return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), cosine], [warmup])
    drops = {epoch * steps_per_epoch: config.drop_factor for epoch in config.drop_epochs}
    reached = {step: factor for step, factor in drops.items() if step <= _MAX_STEPS}
    steps = optax.piecewise_constant_schedule(config.learning_rate, reached)
    if not warmup:
        return steps
    return lambda count: steps(count) * jnp.minimum(1.0, count / warmup)


def why_not_longer(config: ConfigDict) -> str | None:
    """Why a finished run cannot be trained for more epochs; None if it can.

    It can where the learning rates of its epochs do not depend on how many follow; `config` is the section `optimizer`.
    """
    if config.schedule == "steps":
        return None
    return (
        f"its {config.schedule} schedule ended with the last epoch: with more epochs, every epoch would have had another"
        " learning rate; choose another --workdir to train anew"
    )


def optimize_the_sum(recipe: Recipe) -> tuple[optax.GradientTransformation, ...]:
    """What follows `sum_losses`."""
    config, mask = recipe.config, decay_mask(recipe)
    if config.name == "adamw":
        return (
            optax.adamw(
                recipe.learning_rate,
                config.momentum,
                config.b2,
                config.eps,
                weight_decay=config.weight_decay,
                mask=mask,
            ),
        )
    if config.name == "muon":
        return (muon(recipe, config.momentum),)
    return (
        optax.add_decayed_weights(config.weight_decay, mask),
        optax.sgd(recipe.learning_rate, momentum=config.momentum),
    )


def muon(recipe: Recipe, momentum: float) -> optax.GradientTransformation:
    """Muon, whose steps have the size of AdamW's; what is no matrix gets Adam.

    Without Nesterov's momentum, so that `momentum` can be 0 for what has its momenta already. Decay is decoupled, as in AdamW.
    """
    config = recipe.config
    directions = optax.contrib.muon(
        -1.0,  # It flips the sign, and so does what follows the decay.
        beta=momentum,
        eps=config.eps,
        nesterov=False,
        adam_b1=momentum,
        adam_b2=config.b2,
        muon_weight_dimension_numbers=recipe.matrices,
        consistent_rms=_RMS_OF_ADAMW,
    )
    return optax.chain(
        directions,
        # Its own decay would leave out kernels that get Adam, such as those of convolutions.
        optax.add_decayed_weights(config.weight_decay, decay_mask(recipe)),
        optax.scale_by_learning_rate(recipe.learning_rate),
    )


def decay_mask(recipe: Recipe) -> Callable[[Any], Any] | None:
    """Which parameters decay; None: all of them."""
    kind = recipe.config.decay_mask or ("all" if recipe.config.name == "sgd" else "kernels")
    if kind == "all":
        return None
    if recipe.matrices is None:
        return _is_kernel
    return lambda params: jax.tree.map(
        lambda found, _: found is not None, recipe.matrices(params), params, is_leaf=_is_no_tree
    )


def _is_no_tree(found: Any) -> bool:
    return found is None or isinstance(found, optax.contrib.MuonDimensionNumbers)


def _is_kernel(params: Any) -> Any:
    """A mask of the weights that layers multiply with, which Flax calls kernels."""
    return jax.tree.map_with_path(lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) == "kernel", params)


def one_momentum(recipe: Recipe) -> Any:
    """The same momentum for each loss: that of methods which add up the gradients first."""
    return type(recipe.weights)(*[recipe.config.momentum] * len(recipe.weights))


def scheduled_betas(recipe: Recipe) -> dot_optax.PerLoss:
    """DOT's two momenta: numbers, or with a warm-up of `delta` schedules."""
    config, momenta = recipe.config, betas(recipe.config)
    if not config.delta_warmup_epochs:
        return momenta
    warmup = optax.linear_schedule(0.0, config.delta, config.delta_warmup_epochs * recipe.steps_per_epoch)
    return dot_optax.betas(config.momentum, warmup)


def momenta_of(recipe: Recipe) -> Any:
    """The momentum of each loss of an objective with `deltas`: numbers, or with a warm-up of these schedules."""
    config, steps = recipe.config, recipe.config.delta_warmup_epochs * recipe.steps_per_epoch

    def momentum(delta: float) -> optax.ScalarOrSchedule:
        end = config.momentum + delta
        return optax.linear_schedule(config.momentum, end, steps) if steps else end

    return type(recipe.deltas)(*map(momentum, recipe.deltas))


def relative_gains(momenta: dot_optax.PerLoss) -> dot_optax.PerLoss:
    """How much more than their mean the two momenta amplify the gradients of their losses, as schedules."""

    def at(count: Any) -> dot_optax.PerLoss:
        now = [beta(count) if callable(beta) else beta for beta in momenta]
        return jax.tree.map(lambda gain: gain * (1 - sum(now) / 2), dot_optax.gains(*now))

    return dot_optax.PerLoss(task=lambda count: at(count).task, kd=lambda count: at(count).kd)


def scale_by_gain_matched_adam(
    gains: dot_optax.PerLoss, b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    r"""Adam with one first moment, and the gains of `dot_optax.scale_by_dot_adam`: container in, tree out.

    .. math::
        m &\leftarrow b_1 m + (1 - b_1) (a_{task} g_{task} + a_{kd} g_{kd}), \qquad
            a_i = \frac{1 - b_1}{1 - \beta_i} \\
        \nu &\leftarrow b_2 \nu + (1 - b_2) (g_{task} + g_{kd})^2 \\
        u &= \hat{m} \Big/ (\sqrt{\hat{\nu}} + \epsilon)

    The second moment is that of the plain sum, as DOT has it. Adam on :math:`\sum_i a_i g_i` would divide by the size of
    that sum: of the gains only their ratio would be left, and DOT would have the larger steps.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        mu, nu = optax.tree.zeros_like(params), optax.tree.zeros_like(params)  # The train step wants both memories.
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        del params
        a_task, a_kd = gains.task(state.count), gains.kd(state.count)
        amplified = jax.tree.map(lambda task, kd: a_task * task + a_kd * kd, *grads)
        mu = optax.tree.update_moment(amplified, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(jax.tree.map(jnp.add, *grads), state.nu, b2, 2)
        count = optax.safe_increment(state.count)
        mu_hat, nu_hat = optax.tree.bias_correction(mu, b1, count), optax.tree.bias_correction(nu, b2, count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu_hat, nu_hat)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)
