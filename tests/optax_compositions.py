"""What DOT is composed with in Optax, beside the same thing in NumPy; the tables of a page are made of it.

    python -m tests.optax_compositions

prints the tables of `examples/optax/README.md`.  A line of the first is a Python expression, which `test_optax_compositions.py` evaluates and runs
against its `reference`: a function that makes a NumPy step `(theta, task, kd, **extra) -> update` over dicts of arrays.
`instead_of` is what one might have written first: it raises, in Optax or here, and the error names `PerLoss`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dot_optax
from tests.reference import numpy_optimizers

FLOAT32 = 1e-6  # Optax evaluates its schedules and accumulates micro-batches in float32
NAMESPACE = {name: getattr(dot_optax, name) for name in dir(dot_optax) if not name.startswith("_")}
NAMESPACE |= {
    "optax": optax,
    "jax": jax,
    "jnp": jnp,
    "functools": functools,
    "lr": numpy_optimizers.LEARNING_RATE,
    "mask": numpy_optimizers.MASK,
}


class Composition(NamedTuple):
    what: str
    line: str
    reference: Callable[[], Callable[..., Any]]
    instead_of: str | None = None
    nan: bool = False  # also run with a NaN in the gradient of either loss
    params: Any = None  # other parameters than the usual
    extra: Any = None  # the keywords of the update at each step
    tolerance: float = 1e-12  # in float64
    init: Callable[[Any], Any] = lambda params: params
    view: Callable[[Any], Any] = lambda params: params  # undoes `init`


COMPLEX = {"w": np.array([1.0 + 2.0j, -1.0j]), "b": np.array([0.5])}

COMPOSITIONS = [
    Composition("the paper", "dot(lr)", numpy_optimizers.plain),
    Composition(
        "decoupled weight decay",
        "optax.chain(scale_by_dot(), optax.add_decayed_weights(0.01), optax.scale_by_learning_rate(lr))",
        numpy_optimizers.after(lambda v, theta: numpy_optimizers.each(lambda x, p: x + 0.01 * p, v, theta)),
    ),
    Composition(
        "... of some parameters",
        "optax.chain(scale_by_dot(), optax.add_decayed_weights(0.01, mask), optax.scale_by_learning_rate(lr))",
        numpy_optimizers.after(
            lambda v, theta: {k: x + 0.01 * numpy_optimizers.MASK[k] * theta[k] for k, x in v.items()}
        ),
    ),
    Composition(
        "coupled L2 of some parameters, as in the paper",
        "dot(lr, weight_decay=0.01, mask=mask)",
        numpy_optimizers.before(
            lambda task, kd, theta: ({k: x + 0.01 * numpy_optimizers.MASK[k] * theta[k] for k, x in task.items()}, kd)
        ),
    ),
    Composition(
        "L2 on one loss only",
        "optax.chain(per_loss(optax.identity(), optax.add_decayed_weights(0.01)), dot(lr))",
        numpy_optimizers.before(
            lambda task, kd, theta: (task, numpy_optimizers.each(lambda x, p: x + 0.01 * p, kd, theta))
        ),
        instead_of="optax.chain(optax.add_decayed_weights(0.01), dot(lr))",
    ),
    Composition(
        "clip the update's norm",
        "optax.chain(scale_by_dot(), optax.clip_by_global_norm(1.0), optax.scale_by_learning_rate(lr))",
        numpy_optimizers.after(lambda v, theta: numpy_optimizers.clipped(v, numpy_optimizers.norm(v))),
    ),
    Composition(
        "clip the norm of both gradients together",
        "optax.chain(joint(optax.clip_by_global_norm(1.0)), dot(lr))",
        numpy_optimizers.before(
            lambda task, kd, theta: (
                numpy_optimizers.clipped(task, numpy_optimizers.norm(task, kd)),
                numpy_optimizers.clipped(kd, numpy_optimizers.norm(task, kd)),
            )
        ),
    ),
    Composition(
        "... the same, without `joint`",
        "optax.chain(optax.clip_by_global_norm(1.0), dot(lr))",
        numpy_optimizers.before(
            lambda task, kd, theta: (
                numpy_optimizers.clipped(task, numpy_optimizers.norm(task, kd)),
                numpy_optimizers.clipped(kd, numpy_optimizers.norm(task, kd)),
            )
        ),
    ),
    Composition(
        "clip the norm of each gradient",
        "optax.chain(per_loss(optax.clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0)), dot(lr))",
        numpy_optimizers.before(
            lambda task, kd, theta: (
                numpy_optimizers.clipped(task, numpy_optimizers.norm(task)),
                numpy_optimizers.clipped(kd, numpy_optimizers.norm(kd)),
            )
        ),
    ),
    Composition(
        "clip each element of both gradients",
        "optax.chain(optax.clip(0.5), dot(lr))",
        numpy_optimizers.before(
            lambda task, kd, theta: tuple(numpy_optimizers.each(lambda x: np.clip(x, -0.5, 0.5), g) for g in (task, kd))
        ),
    ),
    Composition(
        "adaptive gradient clipping of the update",
        "optax.chain(scale_by_dot(), optax.adaptive_grad_clip(0.1), optax.scale_by_learning_rate(lr))",
        numpy_optimizers.after(
            lambda v, theta: numpy_optimizers.each(lambda x, p: numpy_optimizers.clipped_by_unit(x, p, 0.1), v, theta)
        ),
    ),
    Composition(
        "adaptive gradient clipping of the gradients",
        "optax.chain(per_loss(optax.adaptive_grad_clip(0.1), optax.adaptive_grad_clip(0.1)), dot(lr))",
        numpy_optimizers.before(
            lambda task, kd, theta: tuple(
                numpy_optimizers.each(lambda x, p: numpy_optimizers.clipped_by_unit(x, p, 0.1), g, theta)
                for g in (task, kd)
            )
        ),
        instead_of="optax.chain(optax.adaptive_grad_clip(0.1), dot(lr))",
    ),
    Composition(
        "NaNs in gradients become zeros",
        "optax.chain(joint(optax.zero_nans()), dot(lr))",
        numpy_optimizers.with_zero_nans,
        nan=True,
    ),
    Composition(
        "centralized gradients",
        "optax.chain(optax.centralize(), dot(lr))",
        numpy_optimizers.before(
            lambda task, kd, theta: tuple(
                numpy_optimizers.each(lambda x: x - x.mean(axis=1, keepdims=True) if x.ndim > 1 else x, g)
                for g in (task, kd)
            )
        ),
    ),
    Composition("freeze some parameters", "optax.chain(dot(lr), optax.freeze(mask))", numpy_optimizers.frozen_w),
    Composition(
        "... before DOT",
        "optax.chain(per_loss(optax.freeze(mask), optax.freeze(mask)), dot(lr))",
        numpy_optimizers.frozen_w,
        instead_of="optax.chain(optax.freeze(mask), dot(lr))",
    ),
    Composition("a moving average of the updates", "optax.chain(dot(lr), optax.ema(0.9))", numpy_optimizers.with_ema),
    Composition(
        "add up two updates, then apply them",
        "optax.chain(dot(lr), optax.apply_every(2))",
        numpy_optimizers.with_apply_every,
    ),
    Composition(
        "record the update's norm",
        "optax.chain(dot(lr), optax.snapshot('norm', optax.tree.norm))",
        numpy_optimizers.plain,
    ),
    Composition(
        "reduce the learning rate on a plateau",
        "optax.chain(dot(lr), optax.contrib.reduce_on_plateau(factor=0.5, patience=2))",
        numpy_optimizers.with_plateau,
        extra=[{"value": value} for value in (1.0, 0.9, 0.9, 0.9, 0.95, 0.95, 0.8, 0.8)],
    ),
    Composition(
        "named stages", "optax.named_chain(('clip', optax.clip(1e3)), ('dot', dot(lr)))", numpy_optimizers.plain
    ),
    Composition(
        "a learning-rate schedule",
        "dot(optax.linear_schedule(lr, 0.0, 10))",
        numpy_optimizers.with_falling_rate,
        tolerance=FLOAT32,
    ),
    Composition(
        "momenta that move apart during a warm-up",
        "dot(lr, *betas(0.9, optax.linear_schedule(0.0, 0.075, 4)))",
        numpy_optimizers.with_schedules(lambda count: 0.075 * min(1.0, count / 4)),
        tolerance=FLOAT32,
    ),
    Composition(
        "hyperparameters in the state (in float32: in bfloat16 0.975 would be 0.9766, and its gain 43 instead of 40)",
        "optax.inject_hyperparams(dot, hyperparam_dtype=jnp.float32)(learning_rate=lr, beta_task=0.825, beta_kd=0.975)",
        numpy_optimizers.plain,
        tolerance=FLOAT32,
    ),
    Composition(
        "... and a mask that is a function",
        "optax.inject_hyperparams(dot, static_args='mask')(lr, weight_decay=0.01, mask=lambda p: mask)",
        numpy_optimizers.before(
            lambda task, kd, theta: ({k: x + 0.01 * numpy_optimizers.MASK[k] * theta[k] for k, x in task.items()}, kd)
        ),
        instead_of="optax.inject_hyperparams(dot)(lr, weight_decay=0.01, mask=lambda p: jax.tree.map(jnp.isscalar, p))",
    ),
    Composition(
        "... that follow schedules",
        "optax.inject_hyperparams(dot)(lr, optax.linear_schedule(0.9, 0.825, 4), optax.linear_schedule(0.9, 0.975, 4))",
        numpy_optimizers.with_schedules(lambda count: 0.075 * min(1.0, count / 4)),
        tolerance=FLOAT32,
    ),
    Composition(
        "DOT for some parameters only (the others get their summed gradient as the update, not negated: "
        "put a transformation for them after this one)",
        "wrap(lambda tx: optax.masked(tx, mask), dot(lr))",
        numpy_optimizers.only_w(lambda: lambda g: g),
        instead_of="optax.masked(dot(lr), mask)",
    ),
    Composition(
        "another optimizer for some parameters",
        "wrap(lambda tx: optax.partition({True: tx, False: optax.adam(0.1)}, mask), dot(lr))",
        numpy_optimizers.only_w(numpy_optimizers.adam),
        instead_of="optax.partition({True: dot(lr), False: optax.adam(0.1)}, mask)",
    ),
    Composition(
        "train only some parameters",
        "wrap(lambda tx: optax.selective_transform(tx, freeze_mask={'w': False, 'b': True}), dot(lr))",
        numpy_optimizers.only_w(lambda: np.zeros_like),
        instead_of="optax.selective_transform(dot(lr), freeze_mask={'w': False, 'b': True})",
    ),
    Composition(
        "accumulate gradients",
        "wrap(functools.partial(optax.MultiSteps, every_k_schedule=2), dot(lr))",
        numpy_optimizers.with_multi_steps,
        tolerance=FLOAT32,
        instead_of="optax.MultiSteps(dot(lr), every_k_schedule=2)",
    ),
    Composition(
        "... and leave out those with a NaN",
        "wrap(lambda tx: optax.MultiSteps(tx, 2, should_skip_update_fn=optax.skip_not_finite), dot(lr))",
        functools.partial(numpy_optimizers.with_multi_steps, skip=True),
        tolerance=FLOAT32,
        instead_of="optax.MultiSteps(dot(lr), 2, should_skip_update_fn=optax.skip_not_finite)",
        nan=True,
    ),
    Composition(
        "skip steps with a NaN (put this around `wrap(MultiSteps, ...)`: inside it, the NaN would stay in the accumulator)",
        "wrap(lambda tx: optax.apply_if_finite(tx, 5), dot(lr))",
        numpy_optimizers.skipping,
        instead_of="optax.apply_if_finite(dot(lr), 5)",
        nan=True,
    ),
    Composition(
        "DOT at some steps, the summed gradient at others",
        "wrap(lambda tx: optax.conditionally_transform(tx, lambda step: step % 2 == 0), dot(lr))",
        numpy_optimizers.every_other(lambda task, kd: numpy_optimizers.each(np.add, task, kd)),
        instead_of="optax.conditionally_transform(dot(lr), lambda step: step % 2 == 0)",
    ),
    Composition(
        "DOT at some steps, nothing at others",
        "wrap(lambda tx: optax.conditionally_mask(tx, lambda step: step % 2 == 0), dot(lr))",
        numpy_optimizers.every_other(lambda task, kd: numpy_optimizers.each(np.zeros_like, task)),
        instead_of="optax.conditionally_mask(dot(lr), lambda step: step % 2 == 0)",
    ),
    Composition(
        "one flat vector per loss",
        "optax.chain(per_loss(optax.flatten(optax.trace(0.825)), optax.flatten(optax.trace(0.975))), sum_losses(), "
        "optax.scale_by_learning_rate(lr))",
        numpy_optimizers.plain,
        instead_of="optax.flatten(dot(lr))",
    ),
    Composition(
        "schedule-free averaging of DOT",
        "optax.contrib.schedule_free(dot(lr), learning_rate=lr, b1=0.9)",
        numpy_optimizers.with_schedule_free(numpy_optimizers.Dot),
    ),
    Composition(
        "an optimizer of Optax on the summed gradient",
        "optax.chain(sum_losses(), optax.contrib.schedule_free_sgd(lr, b1=0.9))",
        numpy_optimizers.with_schedule_free(lambda: lambda task, kd: numpy_optimizers.each(np.add, task, kd)),
        instead_of="optax.contrib.schedule_free_sgd(lr, b1=0.9)",
    ),
    Composition(
        "a learning rate tuned online",
        "wrap(optax.contrib.mechanize, dot(lr))",
        numpy_optimizers.with_mechanic,
        instead_of="optax.contrib.mechanize(dot(lr))",
    ),
    Composition(
        "lookahead (the parameters are then a pair: fast and slow)",
        "optax.lookahead(dot(lr), sync_period=2, slow_step_size=0.5)",
        numpy_optimizers.with_lookahead,
        init=optax.LookaheadParams.init_synced,
        view=lambda params: params.fast,
    ),
    Composition(
        "sharpness-aware DOT",
        "wrap(lambda tx: optax.contrib.sam(tx, optax.chain(optax.contrib.normalize(), optax.sgd(0.05))), dot(lr))",
        numpy_optimizers.with_sam,
        instead_of="optax.contrib.sam(dot(lr), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)))",
    ),
    Composition(
        "complex parameters as pairs of reals",
        "optax.contrib.split_real_and_imaginary(dot(lr))",
        numpy_optimizers.plain,
        params=COMPLEX,
    ),
    Composition(
        "any number of named losses",
        "optax.chain(scale_by_momenta({'ce': 0.825, 'hint': 0.95, 'kd': 0.975}), optax.scale_by_learning_rate(lr))",
        numpy_optimizers.momenta_of_losses(0.825, 0.95, 0.975, which=(0, 0, 1)),
    ),
    Composition(
        "... the same, with a transformation for each loss",
        "optax.chain(per_loss({'ce': optax.trace(0.825), 'hint': optax.trace(0.95), 'kd': optax.trace(0.975)}), "
        "sum_losses(), optax.scale_by_learning_rate(lr))",
        numpy_optimizers.momenta_of_losses(0.825, 0.95, 0.975, which=(0, 0, 1)),
    ),
    Composition("DeepKD", "deepkd(lr)", numpy_optimizers.momenta_of_losses(0.975, 0.825, 0.975, which=(0, 0, 1))),
    Composition(
        "... as in its released code",
        "deepkd(lr, variant='code')",
        numpy_optimizers.momenta_of_losses(0.825, 0.825, 0.95, which=(0, 0, 1)),
    ),
    Composition(
        "AdamW (**not** `per_loss(adam, adam)` or `joint(adam)`: these run, but cancel the weights of the losses)",
        "dot_adamw(lr, b2=0.99, weight_decay=0.01, mask=mask)",
        numpy_optimizers.adam_of_losses(0.825, 0.975, decay=0.01),
        tolerance=FLOAT32,
    ),
    Composition(
        "... with any number of named losses",
        "optax.chain(scale_by_adam_momenta({'ce': 0.825, 'hint': 0.95, 'kd': 0.975}, b2=0.99), "
        "optax.add_decayed_weights(0.01, mask), optax.scale_by_learning_rate(lr))",
        numpy_optimizers.adam_of_losses(0.825, 0.95, 0.975, decay=0.01, which=(0, 0, 1)),
        tolerance=FLOAT32,
    ),
    Composition(
        "... accumulated",
        "wrap(functools.partial(optax.MultiSteps, every_k_schedule=2), dot_adamw(lr, b2=0.99, weight_decay=0.0))",
        functools.partial(numpy_optimizers.with_multi_steps, inner=numpy_optimizers.adam_of_both),
        tolerance=FLOAT32,
        instead_of="optax.MultiSteps(dot_adamw(lr), every_k_schedule=2)",
    ),
    Composition(
        "Muon on DOT's summed momentum (parameters that are not matrices are divided by their root mean square instead)",
        "optax.chain(scale_by_dot(), optax.contrib.muon(lr, beta=0.0, nesterov=False, adam_b1=0.0))",
        numpy_optimizers.with_muon,
        tolerance=FLOAT32,
    ),
    Composition(
        "Lion: the sign of DOT's summed momentum",
        "optax.chain(scale_by_dot(nesterov=True), optax.scale_by_sign(), optax.add_decayed_weights(0.01), "
        "optax.scale_by_learning_rate(lr))",
        numpy_optimizers.with_sign,
    ),
    Composition(
        "RMSProp: DOT's summed momentum, divided by its root mean square",
        "optax.chain(scale_by_dot(), optax.scale_by_rms(0.9), optax.scale_by_learning_rate(lr))",
        numpy_optimizers.with_rms,
    ),
    Composition(
        "Adafactor: the same with a factored second moment",
        "optax.chain(scale_by_dot(), optax.scale_by_factored_rms(min_dim_size_to_factor=2), "
        "optax.scale_by_learning_rate(lr))",
        numpy_optimizers.with_factored_rms,
        tolerance=FLOAT32,
    ),
    Composition(
        "plain distillation",
        "optax.chain(sum_losses(), optax.sgd(lr))",
        lambda: lambda theta, task, kd: numpy_optimizers.down(numpy_optimizers.each(np.add, task, kd)),
    ),
    Composition(
        "... with DOT's gains: gain-matched KD, the baseline",
        "gain_matched_sgd(lr)",
        lambda: numpy_optimizers.gain_matched(),
    ),
    Composition(
        "... and with L2 of some parameters",
        "gain_matched_sgd(lr, weight_decay=0.01, mask=mask)",
        numpy_optimizers.gain_matched_with_l2,
    ),
]


class Snippet(NamedTuple):
    """A row of the second table, of other uses: the line to write, and the test that runs it."""

    what: str
    line: str
    test: str


SNIPPETS = [
    Snippet(
        "micro-batches in one step",
        "optax.microbatching.microbatch(value_and_grads(loss_fn), ...)",
        "test_flax.test_micro_batches_equal_the_full_batch",
    ),
    Snippet(
        "... of a network with BatchNorm",
        "optax.microbatching.microbatch(value_and_grads(loss_fn, has_aux=True), ...)",
        "test_flax.test_micro_batches_with_batch_norm",
    ),
    Snippet(
        "the teacher at every fourth step",
        "values, grads = sampled_losses(loss_fn, {'kd': 4})(step, params, batch)",
        "test_sampling.test_a_loop_in_one_program",
    ),
    Snippet(
        "... on every fourth row",
        "values, grads = sampled_examples(loss_fn, {'kd': 4}, batch_argnums=1)(step, params, batch)",
        "test_sampling.test_each_step_is_what_it_is_by_hand",
    ),
    Snippet("Flax NNX", "nnx.Optimizer(model, dot(lr), wrt=nnx.Param)", "test_flax.test_nnx_optimizer"),
    Snippet(
        "... its gradients",
        "dot_optax.nnx.value_and_grads(loss_fn)(model, batch)",
        "test_nnx.test_two_calls_against_gradients_by_hand",
    ),
    Snippet(
        "Equinox: the parameters to train",
        "params, static = eqx.partition(model, eqx.is_inexact_array)",
        "examples.test_recipes.test_equinox",
    ),
    Snippet(
        "Flax Linen",
        "TrainState.create(apply_fn=..., params=..., tx=dot(lr)).apply_gradients(grads=grads)",
        "test_flax.test_linen_train_state",
    ),
    Snippet(
        "a projector that only one loss reaches",
        "scale_by_momenta(betas, reached=reached(loss_fn, params, batch))",
        "test_reach.test_reached_agrees_with_the_gradients_and_serves_dot",
    ),
    Snippet(
        "train with many seeds or learning rates at once",
        "jax.vmap(lambda rate: train(dot(rate)))(rates)",
        "test_acceptance.test_vmap_over_seeds_and_over_learning_rates",
    ),
    Snippet(
        "a training loop in one program",
        "jax.lax.scan(step, (params, optimizer.init(params)), batches)",
        "test_acceptance.test_scan_over_steps_with_donated_state",
    ),
    Snippet(
        "save and restore with Orbax",
        "StandardCheckpointer().restore(path, optimizer.init(params))",
        "test_acceptance.test_orbax_saves_and_restores_bit_for_bit",
    ),
    Snippet(
        "read a momentum of `dot`", "optax.tree.get(state, 'kd').trace", "test_optax_compositions.test_tree_get_and_set"
    ),
    Snippet("... of `dot_adamw`", "optax.tree.get(state, 'mu').kd", "test_dot_adam.test_optax_finds_the_moments"),
    Snippet(
        "record norms, cosines, conflicts and noise of the gradients",
        "optax.chain(diagnostics.record(), dot(lr))  # optax.tree.get(state, 'conflicts')",
        "test_diagnostics.test_the_names_of_the_losses_lead_to_the_momenta_behind_it",
    ),
    Snippet(
        "... shares of the update",
        "optax.chain(per_loss(optax.trace(0.825), optax.trace(0.975)), diagnostics.record(), sum_losses(), optax.scale(-lr))",
        "test_diagnostics.test_behind_the_momenta_shares_are_of_the_update",
    ),
    Snippet(
        "set a hyperparameter, without compiling anew",
        "optax.tree.set(state, learning_rate=jnp.asarray(0.01))  # of inject_hyperparams(dot)(...)",
        "test_optax_compositions.test_tree_get_and_set",
    ),
    Snippet(
        "a function over the buffers, such as their sharding",
        "optax.tree.map_params(optimizer, function, state)",
        "test_acceptance.test_map_params_finds_the_buffers",
    ),
]


def tables() -> list[str]:
    """That of the optimizers, and that of other uses."""
    optimizers = ["| what | write this | not this (raises an error) |", "| --- | --- | --- |"]
    for row in COMPOSITIONS:
        optimizers.append(f"| {row.what} | `{row.line}` | {f'`{row.instead_of}`' if row.instead_of else ''} |")
    others = ["| what | write this |", "| --- | --- |", *(f"| {row.what} | `{row.line}` |" for row in SNIPPETS)]
    return ["\n".join(optimizers), "\n".join(others)]


if __name__ == "__main__":
    print("\n\n".join(tables()))
