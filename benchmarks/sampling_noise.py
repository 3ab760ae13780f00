"""Can the noise of sampled gradients be lessened at the same cost, and where do their bursts become unstable?

    pip install -e ".[examples]" && python -m benchmarks.sampling_noise --directory=runs/sampling_noise

First, arithmetic: the largest learning rate times curvature at which a momentum converges on a quadratic, for a gradient that is
taken at every k-th step, and used in four ways.  Then DOT on the digits by the protocol of `sampled_gradients.py`, 20 seeds: the
distillation loss at every 4th step, or on every 4th row, and what ought to be better than that at about the same cost.

- offset 3: the first burst comes at step 3, and not at step 0;
- a random step: one step of each turn, drawn by a key;
- the gradient held: g at each of the k steps until the next one, in the place of k g at once;
- the momentum held: where the gradient is not due, the momentum itself stands for it, which estimates its mean,
  (1 - beta) v, so that v stays as it is; where it is due, k (g - (1 - beta) v) is added to that;
- twice the rows at every 8th step: a larger batch for the rarer loss;
- rows by importance: a quarter of the rows is drawn, with replacement, with probabilities in proportion to their
  cross-entropy, which the student's forward pass on all rows gives for nothing, and weighted so that the mean is right.
"""

import argparse
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dot_optax
from benchmarks import _experiments as experiments
from benchmarks import _students as students
from benchmarks import sampled_gradients as sampled
from dot_optax import PerLoss
from examples.distill import methods

K = 4
BETAS = dot_optax.betas(0.9, experiments.DELTA)


# The arithmetic.


def growth(use, rate, beta, k):
    """By how much a turn of k steps multiplies (x, v, last gradient) at most, on x^2 / 2 and from learning rate `rate`."""
    x, v, last = np.eye(3)
    for step in range(k):
        due = step == 0
        if use == "k times, at once":
            v = beta * v + k * due * x
        elif use == "held":
            last = x if due else last
            v = beta * v + last
        elif use == "the momentum held":
            v = (1 - k * (1 - beta)) * v + k * x if due else v
        else:  # at every step, as on a part of the rows
            v = beta * v + x
        x = x - rate * v
    turn = np.stack([x, v, last])
    turn = turn if use == "held" else turn[:2, :2]
    return np.abs(np.linalg.eigvals(turn)).max()


USES = ("at every step", "k times, at once", "held", "the momentum held")


def largest_rate(use, beta, k):
    """The largest learning rate, times curvature, that does not diverge."""
    low, high = 0.0, 4.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if growth(use, middle, beta, k) < 1 else (low, middle)
    return low


def formula(beta, k):
    """What the docstring of `sampled_losses` says of a burst."""
    return 2 * (1 + beta**k) * (1 - beta) / (k * (1 - beta**k))


# The digits.


def held_gradient(k):
    """Uses the last gradient that was due, k g / k, at each of the k steps."""

    def update(updates, state, params=None):
        count, last = state
        last = jax.tree.map(lambda new, old: jnp.where(count % k == 0, new / k, old), updates, last)
        return last, (count + 1, last)

    return optax.GradientTransformation(lambda params: (0, optax.tree.zeros_like(params)), update)


def held_momentum(beta, k):
    def update(updates, state, params=None):
        count, v = state
        v = jax.tree.map(lambda kg, v: jnp.where(count % k == 0, (1 - k * (1 - beta)) * v + kg, v), updates, v)
        return v, (count + 1, v)

    return optax.GradientTransformation(lambda params: (0, optax.tree.zeros_like(params)), update)


def dot_with(kd_momentum):
    """DOT with another momentum of the distillation loss, as `sampled_gradients.optimizer_of`."""

    def optimizer_of(problem, method, learning_rate, steps):
        del method
        return optax.chain(
            methods.weight_losses(experiments.WEIGHTS),
            dot_optax.per_loss(optax.add_decayed_weights(problem.weight_decay), optax.identity()),
            dot_optax.per_loss(optax.trace(BETAS.task), kd_momentum),
            dot_optax.sum_losses(),
            optax.scale_by_learning_rate(experiments.schedule(learning_rate, steps)),
        )

    return optimizer_of


def _random(f):
    call = dot_optax.sampled_losses(f, {"kd": K}, has_aux=True)
    return lambda step, *args: call(jax.random.fold_in(jax.random.key(7), step), *args)


def _more_rows(f):
    """The task on the step's own batch, the distillation loss on two batches."""

    def losses(params, statistics, *batch):
        own = [part[: experiments.BATCH] for part in batch]
        task, statistics_ = f(params, statistics, *own)
        kd, _ = f(params, statistics, *batch)
        return PerLoss(task.task, kd.kd), statistics_

    return dot_optax.sampled_losses(losses, {"kd": 2 * K}, has_aux=True)


def _importance(f):
    """The task on all rows, the distillation loss on a quarter of them, drawn in proportion to their cross-entropy."""

    def gradients(step, params, statistics, x, y, teacher_logits):
        logits = students.PROBLEMS["digits, MLP"].apply(params, {}, x, train=True)[0]
        entropy = optax.losses.softmax_cross_entropy_with_integer_labels(jax.lax.stop_gradient(logits), y)
        p = entropy + entropy.mean()  # the second half of it uniform: no weight is above 2
        p = p / p.sum()
        rows = jax.random.choice(jax.random.fold_in(jax.random.key(7), step), len(y), (len(y) // K,), p=p)
        weights = 1 / (len(y) * p[rows])

        def kd(params):
            part = students.PROBLEMS["digits, MLP"].apply(params, {}, x[rows], train=True)[0]
            losses = dot_optax.losses.kd_loss(part, teacher_logits[rows], experiments.TEMPERATURE)
            return jnp.mean(weights * losses)

        def losses(params):
            (both, statistics_) = f(params, statistics, x, y, teacher_logits)
            return PerLoss(both.task, kd(params)), statistics_

        return dot_optax.value_and_grads(losses, has_aux=True)(params)

    return gradients


def _forms():
    every, rows = sampled.FORMS[f"losses, k={K}"], sampled.FORMS[f"examples, 1/{K}"]
    late = functools.partial(dot_optax.sampled_losses, periods={"kd": K}, offsets={"kd": K - 1}, has_aux=True)
    return {
        "exact": sampled.FORMS["exact"],
        "every 4th step": every,
        "..., offset 3": every._replace(make=late),
        "..., a random step": every._replace(make=_random),
        "..., the gradient held": every._replace(
            optimizer=dot_with(optax.chain(held_gradient(K), optax.trace(BETAS.kd)))
        ),
        "..., the momentum held": every._replace(optimizer=dot_with(held_momentum(BETAS.kd, K))),
        "twice the rows, every 8th step": experiments.Form(_more_rows, lambda t, n: 3 + (t + 3) / K, batches=2),
        "every 4th row": rows,
        "..., by importance": rows._replace(make=_importance),
    }


FORMS = _forms()


def breaking_rates(problem, directory, forms):
    """For each method and form: the smallest learning rate, in steps of sqrt(2), at which training fails; None if none does.

    It fails where one of 5 seeds ends, after a quarter of the epochs, with a task loss above that of a student that
    knows nothing, or with NaN.
    """
    problem = problem._replace(seeds=5, epochs=max(1, problem.epochs // 4))
    cells, found = experiments.Cells("digits, breaking", problem, directory, sampled.FORMS), {}
    print("\nThe smallest learning rate at which students of the digits fail, and as a part of the exact one\n")
    experiments.row(["method", *forms])
    experiments.row(["---"] * (len(forms) + 1))
    rates = [0.005 * 2 ** (i / 2) for i in range(-4, 20)]

    def fails(method, form, rate):
        return not np.max(cells.get(method, form, rate, cells.steps())["train task"]) < np.log(10)

    def shown(method, form):
        if form not in found[method]:
            return "-"
        rate, exact = found[method][form], found[method]["exact"]
        if rate is None:
            return f"above {rates[-1]:.3g}"
        return f"{rate:.3g} (1 / {exact / rate:.3g})" if exact else f"{rate:.3g}"

    for method in ("kd", "kd_gain_matched", "dot"):
        found[method] = {
            form: next((rate for rate in rates if fails(method, form, rate)), None)
            for form in forms
            if method != "kd" or not form.startswith("difference")  # which leaves plain KD as it is
        }
        experiments.row([sampled.METHODS[method], *(shown(method, form) for form in forms)])
    return found


BREAKING = (*(f"losses, k={k}" for k in (2, 4, 8)), "examples, 1/4", "difference, k=4")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=pathlib.Path, default=pathlib.Path("runs/sampling_noise"))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--teacher", type=float, default=7.2, help="T / F, the teacher's forward pass in the student's")
    parser.add_argument("--json", type=pathlib.Path, help="also write all figures to this file")
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=list(FORMS), help="ways to lessen the noise")
    parser.add_argument(
        "--breaking", nargs="*", choices=sampled.FORMS, default=BREAKING, help="whose limits are searched for"
    )
    args = parser.parse_args(argv)

    print("The largest learning rate times curvature at which a momentum converges\n")
    limits = []
    experiments.row(["momentum", "k", *USES, "formula"])
    experiments.row(["---"] * (len(USES) + 3))
    for beta in (0.9, BETAS.kd):
        for k in (1, 2, 4, 8, 16):
            rates = [largest_rate(use, beta, k) for use in USES]
            limits.append({"beta": beta, "k": k, "formula": formula(beta, k)} | dict(zip(USES, rates, strict=True)))
            experiments.row([f"{beta:g}", str(k), *(f"{rate:.4f}" for rate in rates), f"{formula(beta, k):.4f}"])

    problem = students.PROBLEMS["digits, MLP"]._replace(seeds=args.seeds, epochs=args.epochs)
    cells = experiments.Cells("digits, MLP", problem, args.directory, FORMS)
    results = {}
    for form in args.forms:
        rate = experiments.search(cells, "dot", form, problem.learning_rate / 2)
        results[form] = {
            "cost": sampled.cost(problem, "dot", FORMS[form], args.teacher),
            "learning rate": rate,
            "equal steps": cells.get("dot", form, rate, cells.steps()),
        }
    breaking = breaking_rates(problem, args.directory, ("exact", *args.breaking)) if args.breaking else {}
    print(f"\nDOT on the digits, {args.seeds} seeds, mean ± standard error\n")
    experiments.row(["form", "cost", "learning rate", *experiments.SHOWN])
    experiments.row(["---"] * (len(experiments.SHOWN) + 3))
    for form, result in results.items():
        figures = [experiments.figure(result["equal steps"][name]) for name in experiments.SHOWN]
        experiments.row([form, f"{result['cost']:.2f}", f"{result['learning rate']:g}", *figures])
    if args.json:
        args.json.write_text(json.dumps({"limits": limits, "breaking": breaking, "digits": results}, indent=1))


if __name__ == "__main__":
    main()
