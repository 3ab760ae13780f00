"""Every use of DOT in an Optax pipeline, beside the same thing written by hand; the README's table is made of it.

    python -m tests.uses

prints the table.  A line of the table is a Python expression that `test_uses.py` evaluates and runs against `by_hand`:
a function that makes a NumPy step `(theta, task, kd, **extra) -> update` over dicts of arrays.  `instead_of` is what one
might have written first: it raises, in Optax's own code or ours, and the error names `PerLoss`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

import dot_optax

LEARNING_RATE, BETA_TASK, BETA_KD = 0.1, 0.825, 0.975
FLOAT32 = 1e-6  # Optax evaluates its schedules and accumulates micro-batches in float32
MASK = {"w": True, "b": False}
NAMESPACE = {name: getattr(dot_optax, name) for name in dir(dot_optax) if not name.startswith("_")}
NAMESPACE |= {"optax": optax, "jnp": jnp, "functools": functools, "lr": LEARNING_RATE, "mask": MASK}


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


def each(function, *trees):
    return {k: function(*(tree[k] for tree in trees)) for k in trees[0]}


def norm(*trees):
    return np.sqrt(sum((np.abs(x) ** 2).sum() for tree in trees for x in tree.values()))


def clipped(tree, size, limit=1.0):
    return each(lambda x: x * min(1.0, limit / size), tree)


def clipped_by_unit(g, p, limit):
    """Adaptive gradient clipping: by the norms over the first axis of a matrix, or of a whole vector."""
    sizes = [np.sqrt((x**2).sum(axis=0 if x.ndim > 1 else None, keepdims=x.ndim > 1)) for x in (g, p)]
    largest = limit * np.maximum(sizes[1], 1e-3)
    return np.where(sizes[0] > largest, g * largest / np.maximum(sizes[0], 1e-6), g)


class Momentum:
    def __init__(self, beta):
        self.beta, self.v = beta, 0.0

    def __call__(self, g):
        self.v = each(lambda x, v: x + self.beta * v, g, self.v or each(np.zeros_like, g))
        return self.v


class Dot:
    """The two momenta, summed."""

    def __init__(self):
        self.task, self.kd = Momentum(BETA_TASK), Momentum(BETA_KD)

    def __call__(self, task, kd):
        return each(np.add, self.task(task), self.kd(kd))


def down(v):
    return each(lambda x: -LEARNING_RATE * x, v)


def after(function):
    """By hand: DOT's summed momentum, `function(v, theta)` of it, the learning rate."""

    def make():
        dot = Dot()
        return lambda theta, task, kd, **_: down(function(dot(task, kd), theta))

    return make


def before(function):
    """By hand: `function(task, kd, theta)` of the gradients, then DOT."""

    def make():
        dot = Dot()
        return lambda theta, task, kd, **_: down(dot(*function(task, kd, theta)))

    return make


plain = after(lambda v, theta: v)


def with_ema():
    dot, average = Dot(), None

    def step(theta, task, kd):
        nonlocal average
        v = dot(task, kd)
        average = each(lambda a, x: 0.9 * a + 0.1 * x, average or each(np.zeros_like, v), v)
        step.count += 1
        return down(each(lambda a: a / (1 - 0.9**step.count), average))

    step.count = 0
    return step


def with_apply_every():
    dot, total, count = Dot(), None, 0

    def step(theta, task, kd):
        nonlocal total, count
        v = down(dot(task, kd))
        total = v if count % 2 == 0 else each(np.add, total, v)
        count += 1
        return total if count % 2 == 0 else each(np.zeros_like, v)

    return step


def with_multi_steps(skip=False):
    dot, seen = Dot(), []

    def step(theta, task, kd):
        if not (skip and not finite(task, kd)):
            seen.append((task, kd))
        if len(seen) < 2:
            return each(np.zeros_like, task)
        tasks, kds = zip(*seen, strict=True)
        seen.clear()
        return down(dot(*(each(lambda *x: np.mean(x, axis=0), *g) for g in (tasks, kds))))

    return step


def finite(*trees):
    return all(np.isfinite(x).all() for tree in trees for x in tree.values())


def skipping():
    dot = Dot()
    return lambda theta, task, kd: down(dot(task, kd)) if finite(task, kd) else each(np.zeros_like, task)


def every_other(otherwise):
    """By hand: DOT at every second step, `otherwise(task, kd)` at the others."""

    def make():
        dot, count = Dot(), -1

        def step(theta, task, kd):
            nonlocal count
            count += 1
            return down(dot(task, kd)) if count % 2 == 0 else otherwise(task, kd)

        return step

    return make


def with_schedules(delta):
    """By hand: betas and learning rate that change with the step."""

    def make():
        v, count = [None, None], 0

        def step(theta, task, kd):
            nonlocal count
            for i, (g, sign) in enumerate(((task, -1), (kd, 1))):
                beta = 0.9 + sign * delta(count)
                v[i] = each(lambda x, b, beta=beta: x + beta * b, g, v[i] or each(np.zeros_like, g))
            count += 1
            return down(each(np.add, *v))

        return step

    return make


def with_falling_rate():
    dot, count = Dot(), 0

    def step(theta, task, kd):
        nonlocal count
        rate = LEARNING_RATE * max(0.0, 1 - count / 10)
        count += 1
        return each(lambda x: -rate * x, dot(task, kd))

    return step


def only_w(otherwise):
    """By hand: DOT on `w`, `otherwise(g)` of the summed gradient on `b`."""

    def make():
        dot, other = Dot(), otherwise()

        def step(theta, task, kd):
            return down({"w": dot(task, kd)["w"]}) | {"b": other(task["b"] + kd["b"])}

        return step

    return make


def adam(rate=0.1, b1=0.9, b2=0.999, eps=1e-8):
    m = v = count = 0.0

    def step(g):
        nonlocal m, v, count
        count += 1
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        return -rate * (m / (1 - b1**count)) / (np.sqrt(v / (1 - b2**count)) + eps)

    return step


def with_plateau():
    dot, best, bad, scale = Dot(), np.inf, 0, 1.0

    def step(theta, task, kd, value):
        nonlocal best, bad, scale
        if value < best * (1 - 1e-4):
            best, bad = value, 0
        else:
            bad += 1
        if bad >= 2:
            scale, bad = scale * 0.5, 0
        return each(lambda x: scale * x, down(dot(task, kd)))

    return step


def with_zero_nans():
    clean = functools.partial(each, np.nan_to_num)
    return before(lambda task, kd, theta: (clean(task), clean(kd)))()


def three():
    buffers = [Momentum(beta) for beta in (0.825, 0.9, 0.975)]

    def step(theta, task, kd):
        return down(each(lambda *x: sum(x), *(m(g) for m, g in zip(buffers, (task, task, kd), strict=True))))

    return step


def with_sam():
    """Sharpness-aware: an ascent step along the normalized summed gradient, then DOT's step from where it began."""
    dot, start = Dot(), None

    def step(theta, task, kd):
        nonlocal start
        if start is None:
            start, g = theta, each(np.add, task, kd)
            return each(lambda x: 0.05 * x / norm(g), g)
        update = each(lambda s, t, u: s - t + u, start, theta, down(dot(task, kd)))
        start = None
        return update

    return step


def with_schedule_free(base):
    """The sequence z follows the base optimizer, x is its mean, and y = theta lies between them."""

    def make():
        dot, z, weights = base(), None, 0.0

        def step(theta, task, kd):
            nonlocal z, weights
            z = z or theta
            x = each(lambda y, z: (y - (1 - 0.9) * z) / 0.9, theta, z)
            z = each(np.add, z, down(dot(task, kd)))
            weight = LEARNING_RATE**2
            weights += weight
            x = each(lambda x, z: (1 - weight / weights) * x + weight / weights * z, x, z)
            return each(lambda x, z, y: 0.9 * x + 0.1 * z - y, x, z, theta)

        return step

    return make


def frozen_w():
    step = plain()
    return lambda theta, task, kd: step(theta, task, kd) | {"w": np.zeros_like(theta["w"])}


def gain_matched():
    momentum = Momentum(0.9)
    weigh = lambda x, y: 0.1 / 0.175 * x + 0.1 / 0.025 * y  # noqa: E731
    return lambda theta, task, kd: down(momentum(each(weigh, task, kd)))


def with_lookahead():
    """The slow parameters go half the way to the fast ones at every second step, and the fast ones begin there."""
    dot, slow, count = Dot(), None, 0

    def step(theta, task, kd):
        nonlocal slow, count
        slow = slow or theta
        fast = each(np.add, theta, down(dot(task, kd)))
        count += 1
        if count % 2 == 0:
            fast = slow = each(lambda s, f: s + 0.5 * (f - s), slow, fast)
        return each(np.subtract, fast, theta)

    return step


def with_mechanic(s_init=1e-6, decay=1e-2, eps=1e-8):
    """Mechanic tunes the scale of DOT's updates online (Cutkosky et al., 2023)."""
    dot, start = Dot(), None
    betas = 1 - 0.1 ** np.arange(1, 7)
    r = v = m = np.zeros(6)
    s = s_init * np.ones(6)

    def step(theta, task, kd):
        nonlocal start, r, v, m, s
        start = start or theta
        update, g = down(dot(task, kd)), each(np.add, task, kd)
        g = each(lambda x, p: x + decay * s.sum() * norm(g) / (norm(theta) + eps) * p, g, theta)
        previous = each(lambda x, x0: (x0 - x) / (s.sum() + eps), theta, start)
        delta = each(np.subtract, previous, update)
        h = sum((g[k] * previous[k]).sum() for k in g)
        clipped_h = np.clip(h, -m, m)
        m = np.maximum(betas * m, np.abs(h) + eps)
        v = betas**2 * v + h**2
        r = betas * r + clipped_h * s
        s = (s_init / 6 * m + np.maximum(0, r)) / (np.sqrt(v) + eps)
        return each(lambda x0, d, x: x0 - s.sum() * d - x, start, delta, theta)

    return step


COMPLEX = {"w": np.array([1.0 + 2.0j, -1.0j]), "b": np.array([0.5])}

USES = [
    Use("the paper", "dot(lr)", plain),
    Use(
        "decoupled weight decay",
        "optax.chain(scale_by_dot(), optax.add_decayed_weights(0.01), optax.scale_by_learning_rate(lr))",
        after(lambda v, theta: each(lambda x, p: x + 0.01 * p, v, theta)),
    ),
    Use(
        "... of some parameters",
        "optax.chain(scale_by_dot(), optax.add_decayed_weights(0.01, mask), optax.scale_by_learning_rate(lr))",
        after(lambda v, theta: {k: x + 0.01 * MASK[k] * theta[k] for k, x in v.items()}),
    ),
    Use(
        "coupled L2 (the paper's) of some parameters",
        "dot(lr, weight_decay=0.01, mask=mask)",
        before(lambda task, kd, theta: ({k: x + 0.01 * MASK[k] * theta[k] for k, x in task.items()}, kd)),
    ),
    Use(
        "L2 on one loss by hand",
        "optax.chain(per_loss(optax.identity(), optax.add_decayed_weights(0.01)), dot(lr))",
        before(lambda task, kd, theta: (task, each(lambda x, p: x + 0.01 * p, kd, theta))),
        instead_of="optax.chain(optax.add_decayed_weights(0.01), dot(lr))",
    ),
    Use(
        "clip the update's norm",
        "optax.chain(scale_by_dot(), optax.clip_by_global_norm(1.0), optax.scale_by_learning_rate(lr))",
        after(lambda v, theta: clipped(v, norm(v))),
    ),
    Use(
        "clip the norm of both gradients together",
        "optax.chain(joint(optax.clip_by_global_norm(1.0)), dot(lr))",
        before(lambda task, kd, theta: (clipped(task, norm(task, kd)), clipped(kd, norm(task, kd)))),
    ),
    Use(
        "... the same, without `joint`",
        "optax.chain(optax.clip_by_global_norm(1.0), dot(lr))",
        before(lambda task, kd, theta: (clipped(task, norm(task, kd)), clipped(kd, norm(task, kd)))),
    ),
    Use(
        "clip the norm of each gradient",
        "optax.chain(per_loss(optax.clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0)), dot(lr))",
        before(lambda task, kd, theta: (clipped(task, norm(task)), clipped(kd, norm(kd)))),
    ),
    Use(
        "clip each element of both gradients",
        "optax.chain(optax.clip(0.5), dot(lr))",
        before(lambda task, kd, theta: tuple(each(lambda x: np.clip(x, -0.5, 0.5), g) for g in (task, kd))),
    ),
    Use(
        "adaptive gradient clipping of the update",
        "optax.chain(scale_by_dot(), optax.adaptive_grad_clip(0.1), optax.scale_by_learning_rate(lr))",
        after(lambda v, theta: each(lambda x, p: clipped_by_unit(x, p, 0.1), v, theta)),
    ),
    Use(
        "adaptive gradient clipping of the gradients",
        "optax.chain(per_loss(optax.adaptive_grad_clip(0.1), optax.adaptive_grad_clip(0.1)), dot(lr))",
        before(
            lambda task, kd, theta: tuple(each(lambda x, p: clipped_by_unit(x, p, 0.1), g, theta) for g in (task, kd))
        ),
        instead_of="optax.chain(optax.adaptive_grad_clip(0.1), dot(lr))",
    ),
    Use("NaNs in gradients become zeros", "optax.chain(joint(optax.zero_nans()), dot(lr))", with_zero_nans, nan=True),
    Use(
        "centralized gradients",
        "optax.chain(optax.centralize(), dot(lr))",
        before(
            lambda task, kd, theta: tuple(
                each(lambda x: x - x.mean(axis=1, keepdims=True) if x.ndim > 1 else x, g) for g in (task, kd)
            )
        ),
    ),
    Use("freeze some parameters", "optax.chain(dot(lr), optax.freeze(mask))", frozen_w),
    Use(
        "... before DOT",
        "optax.chain(per_loss(optax.freeze(mask), optax.freeze(mask)), dot(lr))",
        frozen_w,
        instead_of="optax.chain(optax.freeze(mask), dot(lr))",
    ),
    Use("a moving average of the updates", "optax.chain(dot(lr), optax.ema(0.9))", with_ema),
    Use("apply every second update", "optax.chain(dot(lr), optax.apply_every(2))", with_apply_every),
    Use("record the update's norm", "optax.chain(dot(lr), optax.snapshot('norm', optax.tree.norm))", plain),
    Use(
        "reduce the learning rate on a plateau",
        "optax.chain(dot(lr), optax.contrib.reduce_on_plateau(factor=0.5, patience=2))",
        with_plateau,
        extra=[{"value": value} for value in (1.0, 0.9, 0.9, 0.9, 0.95, 0.95, 0.8, 0.8)],
    ),
    Use("named stages", "optax.named_chain(('clip', optax.clip(1e3)), ('dot', dot(lr)))", plain),
    Use("a learning-rate schedule", "dot(optax.linear_schedule(lr, 0.0, 10))", with_falling_rate, tolerance=FLOAT32),
    Use(
        "momenta that move apart during a warm-up",
        "dot(lr, *betas(0.9, optax.linear_schedule(0.0, 0.075, 4)))",
        with_schedules(lambda count: 0.075 * min(1.0, count / 4)),
        tolerance=FLOAT32,
    ),
    Use(
        "hyperparameters in the state",
        "optax.inject_hyperparams(dot)(learning_rate=lr, beta_task=0.825, beta_kd=0.975)",
        plain,
    ),
    Use(
        "... that follow schedules",
        "optax.inject_hyperparams(dot)(lr, optax.linear_schedule(0.9, 0.825, 4), optax.linear_schedule(0.9, 0.975, 4))",
        with_schedules(lambda count: 0.075 * min(1.0, count / 4)),
        tolerance=FLOAT32,
    ),
    Use(
        "only some parameters (the others' updates are their summed gradients)",
        "wrap(lambda tx: optax.masked(tx, mask), dot(lr))",
        only_w(lambda: lambda g: g),
        instead_of="optax.masked(dot(lr), mask)",
    ),
    Use(
        "another optimizer for some parameters",
        "wrap(lambda tx: optax.partition({True: tx, False: optax.adam(0.1)}, mask), dot(lr))",
        only_w(adam),
        instead_of="optax.partition({True: dot(lr), False: optax.adam(0.1)}, mask)",
    ),
    Use(
        "train only some parameters",
        "wrap(lambda tx: optax.selective_transform(tx, freeze_mask={'w': False, 'b': True}), dot(lr))",
        only_w(lambda: np.zeros_like),
        instead_of="optax.selective_transform(dot(lr), freeze_mask={'w': False, 'b': True})",
    ),
    Use(
        "accumulate gradients",
        "wrap(functools.partial(optax.MultiSteps, every_k_schedule=2), dot(lr))",
        with_multi_steps,
        tolerance=FLOAT32,
        instead_of="optax.MultiSteps(dot(lr), every_k_schedule=2)",
    ),
    Use(
        "... and leave out those with a NaN",
        "wrap(lambda tx: optax.MultiSteps(tx, 2, should_skip_update_fn=optax.skip_not_finite), dot(lr))",
        functools.partial(with_multi_steps, skip=True),
        tolerance=FLOAT32,
        instead_of="optax.MultiSteps(dot(lr), 2, should_skip_update_fn=optax.skip_not_finite)",
        nan=True,
    ),
    Use(
        "skip steps with a NaN",
        "wrap(lambda tx: optax.apply_if_finite(tx, 5), dot(lr))",
        skipping,
        instead_of="optax.apply_if_finite(dot(lr), 5)",
        nan=True,
    ),
    Use(
        "DOT at some steps, the summed gradient at others",
        "wrap(lambda tx: optax.conditionally_transform(tx, lambda step: step % 2 == 0), dot(lr))",
        every_other(lambda task, kd: each(np.add, task, kd)),
        instead_of="optax.conditionally_transform(dot(lr), lambda step: step % 2 == 0)",
    ),
    Use(
        "DOT at some steps, nothing at others",
        "wrap(lambda tx: optax.conditionally_mask(tx, lambda step: step % 2 == 0), dot(lr))",
        every_other(lambda task, kd: each(np.zeros_like, task)),
        instead_of="optax.conditionally_mask(dot(lr), lambda step: step % 2 == 0)",
    ),
    Use(
        "one flat vector per loss",
        "optax.chain(per_loss(optax.flatten(optax.trace(0.825)), optax.flatten(optax.trace(0.975))), sum_losses(), "
        "optax.scale_by_learning_rate(lr))",
        plain,
        instead_of="optax.flatten(dot(lr))",
    ),
    Use(
        "schedule-free averaging of DOT",
        "optax.contrib.schedule_free(dot(lr), learning_rate=lr, b1=0.9)",
        with_schedule_free(Dot),
    ),
    Use(
        "an optimizer of Optax on the summed gradient",
        "optax.chain(sum_losses(), optax.contrib.schedule_free_sgd(lr, b1=0.9))",
        with_schedule_free(lambda: lambda task, kd: each(np.add, task, kd)),
        instead_of="optax.contrib.schedule_free_sgd(lr, b1=0.9)",
    ),
    Use(
        "a learning rate tuned online",
        "wrap(optax.contrib.mechanize, dot(lr))",
        with_mechanic,
        instead_of="optax.contrib.mechanize(dot(lr))",
    ),
    Use(
        "lookahead (its parameters are a pair: fast and slow)",
        "optax.lookahead(dot(lr), sync_period=2, slow_step_size=0.5)",
        with_lookahead,
        init=optax.LookaheadParams.init_synced,
        view=lambda params: params.fast,
    ),
    Use(
        "sharpness-aware DOT",
        "optax.contrib.sam(dot(lr), optax.chain(sum_losses(), optax.contrib.normalize(), optax.sgd(0.05)))",
        with_sam,
        instead_of="optax.contrib.sam(dot(lr), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)))",
    ),
    Use(
        "complex parameters as pairs of reals",
        "optax.contrib.split_real_and_imaginary(dot(lr))",
        plain,
        params=COMPLEX,
    ),
    Use(
        "three named losses",
        "optax.chain(per_loss({'ce': optax.trace(0.825), 'hint': optax.trace(0.9), 'kd': optax.trace(0.975)}), "
        "sum_losses(), optax.scale_by_learning_rate(lr))",
        three,
    ),
    Use(
        "plain distillation",
        "optax.chain(sum_losses(), optax.sgd(lr))",
        lambda: lambda theta, task, kd: down(each(np.add, task, kd)),
    ),
    Use("... with DOT's gains, as a baseline", "gain_matched_sgd(lr)", lambda: gain_matched()),
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
        "Flax Linen",
        "TrainState.create(apply_fn=..., params=..., tx=dot(lr)).apply_gradients(grads=grads)",
        "test_flax.test_linen_train_state",
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
    Elsewhere("read a momentum", "optax.tree.get(state, 'kd').trace", "test_uses.test_tree_get_and_set"),
    Elsewhere(
        "set a hyperparameter",
        "optax.tree.set(state, learning_rate=0.01)  # of inject_hyperparams(dot)(...)",
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
