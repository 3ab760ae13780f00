"""Every use of DOT in an Optax pipeline, beside the same thing written by hand; the README's table is made of it.

    python -m tests.uses

prints the table.  A line of the table is a Python expression that `test_uses.py` evaluates and runs against `by_hand`:
a function that makes a NumPy step `(theta, task, kd, **extra) -> update` over dicts of arrays.  `instead_of` is what one
might have written first: it raises, in Optax's own code or ours, and the error names `PerLoss`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dot_optax
from tests import by_hand

FLOAT32 = 1e-6  # Optax evaluates its schedules and accumulates micro-batches in float32
NAMESPACE = {name: getattr(dot_optax, name) for name in dir(dot_optax) if not name.startswith("_")}
NAMESPACE |= {
    "optax": optax,
    "jax": jax,
    "jnp": jnp,
    "functools": functools,
    "lr": by_hand.LEARNING_RATE,
    "mask": by_hand.MASK,
}


class Use(NamedTuple):
    what: str
    line: str
    by_hand: Callable[[], Callable[..., Any]]
    instead_of: str | None = None
    nan: bool = False  # also run with a NaN in the gradient of either loss
    params: Any = None  # other parameters than the usual
    extra: Any = None  # the keywords of the update at each step
    tolerance: float = 1e-12  # in float64
    init: Callable[[Any], Any] = lambda params: params
    view: Callable[[Any], Any] = lambda params: params  # undoes `init`


COMPLEX = {"w": np.array([1.0 + 2.0j, -1.0j]), "b": np.array([0.5])}

USES = [
    Use("the paper", "dot(lr)", by_hand.plain),
    Use(
        "decoupled weight decay",
        "optax.chain(scale_by_dot(), optax.add_decayed_weights(0.01), optax.scale_by_learning_rate(lr))",
        by_hand.after(lambda v, theta: by_hand.each(lambda x, p: x + 0.01 * p, v, theta)),
    ),
    Use(
        "... of some parameters",
        "optax.chain(scale_by_dot(), optax.add_decayed_weights(0.01, mask), optax.scale_by_learning_rate(lr))",
        by_hand.after(lambda v, theta: {k: x + 0.01 * by_hand.MASK[k] * theta[k] for k, x in v.items()}),
    ),
    Use(
        "coupled L2 (the paper's) of some parameters",
        "dot(lr, weight_decay=0.01, mask=mask)",
        by_hand.before(
            lambda task, kd, theta: ({k: x + 0.01 * by_hand.MASK[k] * theta[k] for k, x in task.items()}, kd)
        ),
    ),
    Use(
        "L2 on one loss by hand",
        "optax.chain(per_loss(optax.identity(), optax.add_decayed_weights(0.01)), dot(lr))",
        by_hand.before(lambda task, kd, theta: (task, by_hand.each(lambda x, p: x + 0.01 * p, kd, theta))),
        instead_of="optax.chain(optax.add_decayed_weights(0.01), dot(lr))",
    ),
    Use(
        "clip the update's norm",
        "optax.chain(scale_by_dot(), optax.clip_by_global_norm(1.0), optax.scale_by_learning_rate(lr))",
        by_hand.after(lambda v, theta: by_hand.clipped(v, by_hand.norm(v))),
    ),
    Use(
        "clip the norm of both gradients together",
        "optax.chain(joint(optax.clip_by_global_norm(1.0)), dot(lr))",
        by_hand.before(
            lambda task, kd, theta: (
                by_hand.clipped(task, by_hand.norm(task, kd)),
                by_hand.clipped(kd, by_hand.norm(task, kd)),
            )
        ),
    ),
    Use(
        "... the same, without `joint`",
        "optax.chain(optax.clip_by_global_norm(1.0), dot(lr))",
        by_hand.before(
            lambda task, kd, theta: (
                by_hand.clipped(task, by_hand.norm(task, kd)),
                by_hand.clipped(kd, by_hand.norm(task, kd)),
            )
        ),
    ),
    Use(
        "clip the norm of each gradient",
        "optax.chain(per_loss(optax.clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0)), dot(lr))",
        by_hand.before(
            lambda task, kd, theta: (by_hand.clipped(task, by_hand.norm(task)), by_hand.clipped(kd, by_hand.norm(kd)))
        ),
    ),
    Use(
        "clip each element of both gradients",
        "optax.chain(optax.clip(0.5), dot(lr))",
        by_hand.before(
            lambda task, kd, theta: tuple(by_hand.each(lambda x: np.clip(x, -0.5, 0.5), g) for g in (task, kd))
        ),
    ),
    Use(
        "adaptive gradient clipping of the update",
        "optax.chain(scale_by_dot(), optax.adaptive_grad_clip(0.1), optax.scale_by_learning_rate(lr))",
        by_hand.after(lambda v, theta: by_hand.each(lambda x, p: by_hand.clipped_by_unit(x, p, 0.1), v, theta)),
    ),
    Use(
        "adaptive gradient clipping of the gradients",
        "optax.chain(per_loss(optax.adaptive_grad_clip(0.1), optax.adaptive_grad_clip(0.1)), dot(lr))",
        by_hand.before(
            lambda task, kd, theta: tuple(
                by_hand.each(lambda x, p: by_hand.clipped_by_unit(x, p, 0.1), g, theta) for g in (task, kd)
            )
        ),
        instead_of="optax.chain(optax.adaptive_grad_clip(0.1), dot(lr))",
    ),
    Use(
        "NaNs in gradients become zeros",
        "optax.chain(joint(optax.zero_nans()), dot(lr))",
        by_hand.with_zero_nans,
        nan=True,
    ),
    Use(
        "centralized gradients",
        "optax.chain(optax.centralize(), dot(lr))",
        by_hand.before(
            lambda task, kd, theta: tuple(
                by_hand.each(lambda x: x - x.mean(axis=1, keepdims=True) if x.ndim > 1 else x, g) for g in (task, kd)
            )
        ),
    ),
    Use("freeze some parameters", "optax.chain(dot(lr), optax.freeze(mask))", by_hand.frozen_w),
    Use(
        "... before DOT",
        "optax.chain(per_loss(optax.freeze(mask), optax.freeze(mask)), dot(lr))",
        by_hand.frozen_w,
        instead_of="optax.chain(optax.freeze(mask), dot(lr))",
    ),
    Use("a moving average of the updates", "optax.chain(dot(lr), optax.ema(0.9))", by_hand.with_ema),
    Use("apply every second update", "optax.chain(dot(lr), optax.apply_every(2))", by_hand.with_apply_every),
    Use("record the update's norm", "optax.chain(dot(lr), optax.snapshot('norm', optax.tree.norm))", by_hand.plain),
    Use(
        "reduce the learning rate on a plateau",
        "optax.chain(dot(lr), optax.contrib.reduce_on_plateau(factor=0.5, patience=2))",
        by_hand.with_plateau,
        extra=[{"value": value} for value in (1.0, 0.9, 0.9, 0.9, 0.95, 0.95, 0.8, 0.8)],
    ),
    Use("named stages", "optax.named_chain(('clip', optax.clip(1e3)), ('dot', dot(lr)))", by_hand.plain),
    Use(
        "a learning-rate schedule",
        "dot(optax.linear_schedule(lr, 0.0, 10))",
        by_hand.with_falling_rate,
        tolerance=FLOAT32,
    ),
    Use(
        "momenta that move apart during a warm-up",
        "dot(lr, *betas(0.9, optax.linear_schedule(0.0, 0.075, 4)))",
        by_hand.with_schedules(lambda count: 0.075 * min(1.0, count / 4)),
        tolerance=FLOAT32,
    ),
    Use(
        "hyperparameters in the state (in float32: in bfloat16 0.975 would be 0.9766, and its gain 43 instead of 40)",
        "optax.inject_hyperparams(dot, hyperparam_dtype=jnp.float32)(learning_rate=lr, beta_task=0.825, beta_kd=0.975)",
        by_hand.plain,
        tolerance=FLOAT32,
    ),
    Use(
        "... and a mask that is a function",
        "optax.inject_hyperparams(dot, static_args='mask')(lr, weight_decay=0.01, mask=lambda p: mask)",
        by_hand.before(
            lambda task, kd, theta: ({k: x + 0.01 * by_hand.MASK[k] * theta[k] for k, x in task.items()}, kd)
        ),
        instead_of="optax.inject_hyperparams(dot)(lr, weight_decay=0.01, mask=lambda p: jax.tree.map(jnp.isscalar, p))",
    ),
    Use(
        "... that follow schedules",
        "optax.inject_hyperparams(dot)(lr, optax.linear_schedule(0.9, 0.825, 4), optax.linear_schedule(0.9, 0.975, 4))",
        by_hand.with_schedules(lambda count: 0.075 * min(1.0, count / 4)),
        tolerance=FLOAT32,
    ),
    Use(
        "only some parameters (the others' updates are their summed gradients, uphill: for what follows in a chain)",
        "wrap(lambda tx: optax.masked(tx, mask), dot(lr))",
        by_hand.only_w(lambda: lambda g: g),
        instead_of="optax.masked(dot(lr), mask)",
    ),
    Use(
        "another optimizer for some parameters",
        "wrap(lambda tx: optax.partition({True: tx, False: optax.adam(0.1)}, mask), dot(lr))",
        by_hand.only_w(by_hand.adam),
        instead_of="optax.partition({True: dot(lr), False: optax.adam(0.1)}, mask)",
    ),
    Use(
        "train only some parameters",
        "wrap(lambda tx: optax.selective_transform(tx, freeze_mask={'w': False, 'b': True}), dot(lr))",
        by_hand.only_w(lambda: np.zeros_like),
        instead_of="optax.selective_transform(dot(lr), freeze_mask={'w': False, 'b': True})",
    ),
    Use(
        "accumulate gradients",
        "wrap(functools.partial(optax.MultiSteps, every_k_schedule=2), dot(lr))",
        by_hand.with_multi_steps,
        tolerance=FLOAT32,
        instead_of="optax.MultiSteps(dot(lr), every_k_schedule=2)",
    ),
    Use(
        "... and leave out those with a NaN",
        "wrap(lambda tx: optax.MultiSteps(tx, 2, should_skip_update_fn=optax.skip_not_finite), dot(lr))",
        functools.partial(by_hand.with_multi_steps, skip=True),
        tolerance=FLOAT32,
        instead_of="optax.MultiSteps(dot(lr), 2, should_skip_update_fn=optax.skip_not_finite)",
        nan=True,
    ),
    Use(
        "skip steps with a NaN (around `wrap(MultiSteps, ...)`, not inside it, where the NaN stays in the accumulator)",
        "wrap(lambda tx: optax.apply_if_finite(tx, 5), dot(lr))",
        by_hand.skipping,
        instead_of="optax.apply_if_finite(dot(lr), 5)",
        nan=True,
    ),
    Use(
        "DOT at some steps, the summed gradient at others",
        "wrap(lambda tx: optax.conditionally_transform(tx, lambda step: step % 2 == 0), dot(lr))",
        by_hand.every_other(lambda task, kd: by_hand.each(np.add, task, kd)),
        instead_of="optax.conditionally_transform(dot(lr), lambda step: step % 2 == 0)",
    ),
    Use(
        "DOT at some steps, nothing at others",
        "wrap(lambda tx: optax.conditionally_mask(tx, lambda step: step % 2 == 0), dot(lr))",
        by_hand.every_other(lambda task, kd: by_hand.each(np.zeros_like, task)),
        instead_of="optax.conditionally_mask(dot(lr), lambda step: step % 2 == 0)",
    ),
    Use(
        "one flat vector per loss",
        "optax.chain(per_loss(optax.flatten(optax.trace(0.825)), optax.flatten(optax.trace(0.975))), sum_losses(), "
        "optax.scale_by_learning_rate(lr))",
        by_hand.plain,
        instead_of="optax.flatten(dot(lr))",
    ),
    Use(
        "schedule-free averaging of DOT",
        "optax.contrib.schedule_free(dot(lr), learning_rate=lr, b1=0.9)",
        by_hand.with_schedule_free(by_hand.Dot),
    ),
    Use(
        "an optimizer of Optax on the summed gradient",
        "optax.chain(sum_losses(), optax.contrib.schedule_free_sgd(lr, b1=0.9))",
        by_hand.with_schedule_free(lambda: lambda task, kd: by_hand.each(np.add, task, kd)),
        instead_of="optax.contrib.schedule_free_sgd(lr, b1=0.9)",
    ),
    Use(
        "a learning rate tuned online",
        "wrap(optax.contrib.mechanize, dot(lr))",
        by_hand.with_mechanic,
        instead_of="optax.contrib.mechanize(dot(lr))",
    ),
    Use(
        "lookahead (its parameters are a pair: fast and slow)",
        "optax.lookahead(dot(lr), sync_period=2, slow_step_size=0.5)",
        by_hand.with_lookahead,
        init=optax.LookaheadParams.init_synced,
        view=lambda params: params.fast,
    ),
    Use(
        "sharpness-aware DOT",
        "wrap(lambda tx: optax.contrib.sam(tx, optax.chain(optax.contrib.normalize(), optax.sgd(0.05))), dot(lr))",
        by_hand.with_sam,
        instead_of="optax.contrib.sam(dot(lr), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)))",
    ),
    Use(
        "complex parameters as pairs of reals",
        "optax.contrib.split_real_and_imaginary(dot(lr))",
        by_hand.plain,
        params=COMPLEX,
    ),
    Use(
        "any number of named losses",
        "optax.chain(scale_by_momenta({'ce': 0.825, 'hint': 0.95, 'kd': 0.975}), optax.scale_by_learning_rate(lr))",
        by_hand.momenta_of_losses(0.825, 0.95, 0.975, which=(0, 0, 1)),
    ),
    Use(
        "... the same, of a transformation for each",
        "optax.chain(per_loss({'ce': optax.trace(0.825), 'hint': optax.trace(0.95), 'kd': optax.trace(0.975)}), "
        "sum_losses(), optax.scale_by_learning_rate(lr))",
        by_hand.momenta_of_losses(0.825, 0.95, 0.975, which=(0, 0, 1)),
    ),
    Use("DeepKD", "deepkd(lr)", by_hand.momenta_of_losses(0.975, 0.825, 0.975, which=(0, 0, 1))),
    Use(
        "... as its released code has it",
        "deepkd(lr, variant='code')",
        by_hand.momenta_of_losses(0.825, 0.825, 0.95, which=(0, 0, 1)),
    ),
    Use(
        "AdamW (**not** `per_loss(adam, adam)` or `joint(adam)`: they run, but the weights of the losses cancel in them)",
        "dot_adamw(lr, b2=0.99, weight_decay=0.01, mask=mask)",
        by_hand.adam_of_losses(0.825, 0.975, decay=0.01),
        tolerance=FLOAT32,
    ),
    Use(
        "... with any number of named losses",
        "optax.chain(scale_by_adam_momenta({'ce': 0.825, 'hint': 0.95, 'kd': 0.975}, b2=0.99), "
        "optax.add_decayed_weights(0.01, mask), optax.scale_by_learning_rate(lr))",
        by_hand.adam_of_losses(0.825, 0.95, 0.975, decay=0.01, which=(0, 0, 1)),
        tolerance=FLOAT32,
    ),
    Use(
        "... accumulated",
        "wrap(functools.partial(optax.MultiSteps, every_k_schedule=2), dot_adamw(lr, b2=0.99, weight_decay=0.0))",
        functools.partial(by_hand.with_multi_steps, inner=by_hand.adam_of_both),
        tolerance=FLOAT32,
        instead_of="optax.MultiSteps(dot_adamw(lr), every_k_schedule=2)",
    ),
    Use(
        "Muon: DOT's momenta, orthogonalized (what is no matrix: divided by its root mean square)",
        "optax.chain(scale_by_dot(), optax.contrib.muon(lr, beta=0.0, nesterov=False, adam_b1=0.0))",
        by_hand.with_muon,
        tolerance=FLOAT32,
    ),
    Use(
        "Lion: the sign of DOT's momenta",
        "optax.chain(scale_by_dot(nesterov=True), optax.scale_by_sign(), optax.add_decayed_weights(0.01), "
        "optax.scale_by_learning_rate(lr))",
        by_hand.with_sign,
    ),
    Use(
        "RMSProp: DOT's momenta, divided by their root mean square",
        "optax.chain(scale_by_dot(), optax.scale_by_rms(0.9), optax.scale_by_learning_rate(lr))",
        by_hand.with_rms,
    ),
    Use(
        "Adafactor: the same with a factored second moment",
        "optax.chain(scale_by_dot(), optax.scale_by_factored_rms(min_dim_size_to_factor=2), "
        "optax.scale_by_learning_rate(lr))",
        by_hand.with_factored_rms,
        tolerance=FLOAT32,
    ),
    Use(
        "plain distillation",
        "optax.chain(sum_losses(), optax.sgd(lr))",
        lambda: lambda theta, task, kd: by_hand.down(by_hand.each(np.add, task, kd)),
    ),
    Use("... with DOT's gains, as a baseline", "gain_matched_sgd(lr)", lambda: by_hand.gain_matched()),
    Use(
        "... and with the L2 of some parameters",
        "gain_matched_sgd(lr, weight_decay=0.01, mask=mask)",
        by_hand.gain_matched_with_l2,
    ),
]


class Elsewhere(NamedTuple):
    """A use that is no single optimizer: the line to write, and the test that runs it."""

    what: str
    line: str
    test: str


ELSEWHERE = [
    Elsewhere(
        "micro-batches in one step",
        "optax.microbatching.microbatch(value_and_grads(loss_fn), ...)",
        "test_flax.test_micro_batches_equal_the_full_batch",
    ),
    Elsewhere(
        "... of a network with BatchNorm",
        "optax.microbatching.microbatch(value_and_grads(loss_fn, has_aux=True), ...)",
        "test_flax.test_micro_batches_with_batch_norm",
    ),
    Elsewhere("Flax NNX", "nnx.Optimizer(model, dot(lr), wrt=nnx.Param)", "test_flax.test_nnx_optimizer"),
    Elsewhere(
        "... its gradients",
        "dot_optax.nnx.value_and_grads(loss_fn)(model, batch)",
        "test_nnx.test_two_calls_against_gradients_by_hand",
    ),
    Elsewhere(
        "Equinox: what can be trained",
        "params, static = eqx.partition(model, eqx.is_inexact_array)",
        "examples.test_recipes.test_equinox",
    ),
    Elsewhere(
        "Flax Linen",
        "TrainState.create(apply_fn=..., params=..., tx=dot(lr)).apply_gradients(grads=grads)",
        "test_flax.test_linen_train_state",
    ),
    Elsewhere(
        "a projector that one loss alone reaches",
        "scale_by_momenta(betas, reached=reached(loss_fn, params, batch))",
        "test_reach.test_reached_agrees_with_the_gradients_and_serves_dot",
    ),
    Elsewhere(
        "many seeds or learning rates at once",
        "jax.vmap(lambda rate: train(dot(rate)))(rates)",
        "test_acceptance.test_vmap_over_seeds_and_over_learning_rates",
    ),
    Elsewhere(
        "a training loop in one program",
        "jax.lax.scan(step, (params, optimizer.init(params)), batches)",
        "test_acceptance.test_scan_over_steps_with_donated_state",
    ),
    Elsewhere(
        "save and restore with Orbax",
        "StandardCheckpointer().restore(path, optimizer.init(params))",
        "test_acceptance.test_orbax_saves_and_restores_bit_for_bit",
    ),
    Elsewhere("read a momentum of `dot`", "optax.tree.get(state, 'kd').trace", "test_uses.test_tree_get_and_set"),
    Elsewhere("... of `dot_adamw`", "optax.tree.get(state, 'mu').kd", "test_dot_adam.test_optax_finds_the_moments"),
    Elsewhere(
        "set a hyperparameter, without compiling anew",
        "optax.tree.set(state, learning_rate=jnp.asarray(0.01))  # of inject_hyperparams(dot)(...)",
        "test_uses.test_tree_get_and_set",
    ),
    Elsewhere(
        "a function over the buffers, such as their sharding",
        "optax.tree.map_params(optimizer, function, state)",
        "test_acceptance.test_map_params_finds_the_buffers",
    ),
]


def table() -> str:
    rows = ["| to have | write | instead of, which raises |", "| --- | --- | --- |"]
    for use in USES:
        rows.append(f"| {use.what} | `{use.line}` | {f'`{use.instead_of}`' if use.instead_of else ''} |")
    rows += [f"| {use.what} | `{use.line}` | |" for use in ELSEWHERE]
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
