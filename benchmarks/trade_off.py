"""Does DOT help, against plain distillation with a learning rate, weights and a momentum chosen as carefully?

    apt-get install dataset-fashion-mnist
    pip install -e ".[examples]" && python -m benchmarks.trade_off --directory=runs/trade_off

The protocol is that of `sampled_gradients.py`: every arm has the learning rate, of one grid with a factor of 2 between two
rates, whose mean validation loss is lower than at half and at twice of it; all arms of a problem have the same number of
steps, the same batches and the same initial weights, seed by seed (20 seeds on the digits, 5 elsewhere); the test split is
shown at the chosen rate alone; differences are paired by seed, with Holm's correction over the arms of a problem.  Sampled
arms are trained for as many steps as plain KD's FLOPs pay for, where a teacher's forward pass costs T = 7.2 F.

What a student of a kind (one momentum; two) can reach is the arm of that kind with the lowest validation loss.

Every cell (an arm, a learning rate, a number of steps) is one JSON file of the directory: the command goes on where it was
stopped, and with all cells there it only prints.  `--cells_only` runs them and prints no tables, so that two processes can
share the problems.
"""

import argparse
import functools
import json
import pathlib
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import dot_optax
from benchmarks import _trade_off_report as report
from benchmarks import digits_learning_rates as digits
from benchmarks import sampled_gradients as sampled
from dot_optax import DeepKDLosses, PerLoss
from examples.distill import methods, optimizers
from examples.distill.configs import default
from examples.language_model import model

MOMENTUM, DELTA, KD_WEIGHT, TEMPERATURE = 0.9, sampled.DELTA, sampled.WEIGHTS.kd, sampled.TEMPERATURE
TEACHER = 7.2  # T / F


# The arms.


def weights_of(kd_weight):
    return PerLoss(1 - kd_weight, kd_weight)


def recipe(problem, learning_rate, steps, weights=sampled.WEIGHTS, deltas=None, **options):
    config = default().optimizer
    config.name, config.weight_decay, config.delta = problem.optimizer, problem.weight_decay, DELTA
    config.update(options)
    return methods.Recipe(config, weights, sampled.schedule(learning_rate, steps), steps_per_epoch=1, deltas=deltas)


def one_backward_pass(weights):
    """The gradient of the weighted sum of the losses, in the place of theirs."""

    def make(loss_fn):
        def total(*args):
            losses, statistics = loss_fn(*args)
            return sum(w * loss for w, loss in zip(weights, losses, strict=True)), statistics

        gradient = jax.value_and_grad(total, has_aux=True)
        return lambda step, *args: gradient(*args)

    return make


def one_momentum(weights=sampled.WEIGHTS, momentum=MOMENTUM, losses=sampled.losses_of):
    """SGD or AdamW on the weighted sum."""

    def optimizer(problem, method, learning_rate, steps):
        del method
        return optax.chain(*optimizers.optimize_the_sum(recipe(problem, learning_rate, steps, momentum=momentum)))

    return sampled.Form(one_backward_pass(weights), _cost(1), optimizer, losses=losses)


def of_method(name, form="exact", losses=sampled.losses_of, **options):
    """A method of the example, with a gradient for each loss."""

    def optimizer(problem, method, learning_rate, steps):
        del method
        own = {key: value(steps) if callable(value) else value for key, value in options.items()}
        return methods.METHODS[name](recipe(problem, learning_rate, steps, **own))

    form = sampled.FORMS[form]
    passes = 1 if name == "kd" else 2
    return form._replace(cost=lambda t, n: form.cost(t, passes), optimizer=optimizer, losses=losses)


def normalized_dot(delta=DELTA, kd_weight=KD_WEIGHT):
    """DOT whose momenta remember differently long, and amplify alike."""
    momenta = dot_optax.betas(MOMENTUM, delta)

    def optimizer(problem, method, learning_rate, steps):
        del method
        own, decay = recipe(problem, learning_rate, steps), problem.weight_decay
        first = methods.weight_losses(weights_of(kd_weight))
        if problem.optimizer == "adamw":
            adamw = dot_optax.dot_adamw(
                own.learning_rate,
                *momenta,
                own.config.b2,
                own.config.eps,
                weight_decay=decay,
                mask=optimizers.decay_mask(own),
                normalize=True,
            )
            return optax.chain(first, adamw)
        alike = dot_optax.per_loss(*(optax.scale((1 - beta) / (1 - MOMENTUM)) for beta in momenta))
        penalty = dot_optax.per_loss(optax.add_decayed_weights(decay), optax.identity())
        return optax.chain(first, penalty, alike, dot_optax.dot(own.learning_rate, *momenta))

    return sampled.FORMS["exact"]._replace(optimizer=optimizer)


def _cost(passes):
    return lambda t, n: t + 1 + 2 * passes


def dkd_losses(logits, y, teacher_logits):
    """With the weight of the non-target classes that suits 10 classes; the published 8 is for 100."""
    task = sampled.losses_of(logits, y, teacher_logits).task
    return PerLoss(task, dot_optax.losses.dkd_loss(logits, teacher_logits, y, TEMPERATURE, alpha=1.0, beta=2.0))


def deepkd_losses(logits, y, teacher_logits):
    """Of all classes: there are too few to begin with the teacher's likeliest."""
    task = sampled.losses_of(logits, y, teacher_logits).task
    return DeepKDLosses(task, *dot_optax.losses.deepkd_losses(logits, teacher_logits, y, TEMPERATURE))


KD_WEIGHTS = (0.5, 0.8, 0.9, 0.95, 0.984, 0.995)  # 0.984 has the ratio of DOT's gains: 0.1 x 5.71 to 0.9 x 40
DELTAS = (0.025, 0.05, 0.075, 0.09)
DEEPKD = DeepKDLosses(0.075, -0.075, 0.075)
ONES = PerLoss(1.0, 1.0)

ARMS = {
    "CE": one_momentum(PerLoss(1.0, 0.0))._replace(cost=lambda t, n: 3),
    **{f"KD {weight}": one_momentum(weights_of(weight)) for weight in KD_WEIGHTS},
    "KD 0.9, momentum 0.8": one_momentum(momentum=0.8),
    "KD 0.9, momentum 0.95": one_momentum(momentum=0.95),
    "KD 0.9, momentum 0.975": one_momentum(momentum=0.975),
    "KD 0.984, momentum 0.95": one_momentum(weights_of(0.984), momentum=0.95),
    "KD 0.984, momentum 0.975": one_momentum(weights_of(0.984), momentum=0.975),
    "KD, gain-matched": of_method("kd_gain_matched"),
    "KD, gain-matched, -0.075": of_method("kd_gain_matched", delta=-0.075),
    **{f"DOT {delta}": of_method("dot", delta=delta) for delta in DELTAS},
    "DOT -0.075": of_method("dot", delta=-0.075),  # the momenta exchanged: the task remembers longer
    "DOT, warm-up": of_method("dot", delta_warmup_epochs=lambda steps: steps // 4),
    "DOT, normalised": normalized_dot(),
    "DOT, normalised, 0.984": normalized_dot(kd_weight=0.984),
    "DOT, normalised, reversed": normalized_dot(-DELTA),
    "DeepKD": of_method("deepkd", losses=deepkd_losses, weights=DeepKDLosses(0.1, 1.0, 1.0), deltas=DEEPKD),
    "DKD": one_momentum(ONES, losses=dkd_losses),
    "DKD + DOT": of_method("dot", losses=dkd_losses, weights=ONES),
    "KD, min-norm": of_method("kd_min_norm"),
    "KD, alternating": of_method("kd", "alternating"),
    "DOT, alternating": of_method("dot", "alternating"),
    "KD 0.9, every 4th": of_method("kd", "losses, k=4"),
    "KD, gain-matched, every 4th": of_method("kd_gain_matched", "losses, k=4"),
    "DOT, every 4th": of_method("dot", "losses, k=4"),
}
ONE = ("KD ", "KD, gain-matched")  # the beginnings of the names of arms with one momentum, and of those with two
TWO = ("DOT 0", "DOT -", "DOT, normalised", "DOT, warm-up")
SAMPLED = ("KD, alternating", "DOT, alternating", "KD 0.9, every 4th", "KD, gain-matched, every 4th", "DOT, every 4th")
FEW = (
    *("CE", "KD 0.5", "KD 0.9", "KD 0.984", "KD 0.9, momentum 0.8", "KD 0.9, momentum 0.95", "KD, gain-matched"),
    *("DOT 0.05", "DOT 0.075", "DOT -0.075", "DOT, warm-up", "DOT, normalised", "DOT, normalised, reversed"),
    "KD, gain-matched, -0.075",
)
FEWEST = (
    *("CE", "KD 0.5", "KD 0.9", "KD 0.9, momentum 0.8", "KD, gain-matched", "KD, gain-matched, -0.075"),
    *("DOT 0.05", "DOT 0.075", "DOT -0.075"),
)


# The problems.


def digits_data(examples):
    """The first `examples` of the 1,797 digits in a random order to train on, 197 to validate, the others to test."""
    found = load_digits()
    images, labels = jnp.float32(found.data / 16), jnp.int32(found.target)
    order = np.random.default_rng(0).permutation(len(labels))
    parts = dict(zip(("train", "validation", "test"), np.split(order, [examples, examples + 197]), strict=True))
    splits = {name: (images[rows], labels[rows]) for name, rows in parts.items()}
    teacher, _ = digits.train_teacher(splits)
    data = {f"{name} {what}": part for name, pair in splits.items() for what, part in zip("xy", pair, strict=True)}
    return data | {"teacher": teacher}


def _digits_mlp(examples, epochs, **fields):
    problem = sampled.PROBLEMS["digits, MLP"]
    return problem._replace(epochs=epochs, load=functools.partial(digits_data, examples), **fields)


def _digits_cnn(examples, epochs, **fields):
    def load():
        data = digits_data(examples)
        return {key: part.reshape(-1, 8, 8, 1) if key.endswith("x") else part for key, part in data.items()}

    return sampled.cnn_problem((8, 16), 8, learning_rate=0.04, epochs=epochs, seeds=20, load=load)._replace(**fields)


def _fashion_cnn(examples, epochs, teacher_widths=(16, 32), learning_rate=0.04, **fields):
    load = functools.partial(sampled.fashion, 14, teacher_widths, examples, **fields)
    return sampled.cnn_problem((8, 16), 14, learning_rate=learning_rate, epochs=epochs, seeds=5, load=load)


def _fashion_vit(examples, epochs):
    problem = sampled.PROBLEMS["Fashion-MNIST, ViT"]
    return problem._replace(
        epochs=epochs, load=functools.partial(sampled.fashion, sampled.VIT_SIDE, (32, 64), examples)
    )


SEQUENCE, CHARACTERS = 48, 128


def text_data(train=2048, evaluation=384):
    """Sequences of characters of Python's standard library, each file in one split, and a trained decoder's logits."""
    files = sorted(path for path in pathlib.Path(json.__file__).parent.parent.glob("*.py"))
    order = np.random.default_rng(0).permutation(len(files))
    texts = [np.frombuffer(files[i].read_bytes(), np.uint8) for i in order]
    sequences = [text[: len(text) // (SEQUENCE + 1) * (SEQUENCE + 1)].reshape(-1, SEQUENCE + 1) for text in texts]
    sequences = [part[(part < CHARACTERS).all(1)].astype(np.int32) for part in sequences]
    data = {}
    for split, size in (("test", evaluation), ("validation", evaluation), ("train", train)):
        found = []
        while sum(map(len, found)) < size:
            found.append(sequences.pop())
        rows = jnp.asarray(np.concatenate(found)[:size])
        data |= {f"{split} x": rows[:, :-1], f"{split} y": rows[:, 1:]}
    data["teacher"] = jnp.zeros((train, SEQUENCE, CHARACTERS))
    teacher, steps = language_model(64), 20 * (train // sampled.BATCH)
    rows = sampled.batches(train, steps, seed=1000)
    run = functools.partial(sampled.train, teacher, "ce", ARMS["CE"], 4e-3)
    params, _ = jax.jit(run)(jax.random.key(1000), rows, data)
    data["teacher"] = jnp.concatenate(
        [teacher.apply(params, {}, part, train=False)[0] for part in jnp.split(data["train x"], 16)]
    )
    return data


def language_model(width, layers=2):
    """The decoder of `examples.language_model`, on characters."""
    architecture = model.Architecture(CHARACTERS, width, layers, 2, 1, width // 2, 5 * width // 2)
    graphdef, _ = model.split(model.build(architecture, rngs=nnx.Rngs(0)))

    def init(key):
        return model.split(model.build(architecture, rngs=nnx.Rngs(key)))[1], {}

    def apply(params, statistics, x, train):
        del train
        return model.apply(graphdef, params, x, separator=0), statistics

    return sampled.Problem("adamw", 0.0, 8e-3, epochs=4, seeds=5, init=init, apply=apply, load=text_data, batch=16)


class Setting(NamedTuple):
    """A problem, and the arms that are run on it."""

    problem: sampled.Problem
    arms: tuple[str, ...] = tuple(ARMS)


PROBLEMS = {
    "digits, MLP, 300": Setting(_digits_mlp(300, epochs=240)),
    "digits, MLP, 1,400": Setting(_digits_mlp(1400, epochs=60), FEW),
    "digits, CNN, 300": Setting(_digits_cnn(300, epochs=240)),
    "digits, CNN, 1,400": Setting(_digits_cnn(1400, epochs=60), FEWEST),
    "digits, CNN, 300, batches of 8": Setting(_digits_cnn(300, epochs=40, batch=8), FEW),
    "Fashion, CNN, 10,000": Setting(_fashion_cnn(10_000, epochs=8)),
    "Fashion, CNN, larger teacher": Setting(_fashion_cnn(10_000, 8, (64, 128, 128), 0.16, teacher_epochs=15), FEWEST),
    "Fashion, CNN, 20% wrong labels": Setting(_fashion_cnn(10_000, epochs=8, wrong_labels=0.2), FEW),
    "Fashion, CNN, 60,000": Setting(_fashion_cnn(57_500, epochs=2, learning_rate=0.16), FEWEST),
    "Fashion, ViT, 10,000": Setting(_fashion_vit(10_000, epochs=6), FEW),
    "text, decoder": Setting(language_model(32), FEWEST),
}


def run(name, setting, directory, arms):
    """For each arm its learning rate, and its figures at that rate."""
    cells, results, best = sampled.Cells(name, setting.problem, directory, ARMS), {}, {}
    for arm in (arm for arm in setting.arms if arm in arms):
        steps = cells.steps(ARMS[arm].cost(TEACHER, 1) / (TEACHER + 3)) if arm in SAMPLED else cells.steps()
        start = best.get(arm[:3], setting.problem.learning_rate)
        best[arm[:3]] = rate = sampled.search(cells, arm, arm, start, steps)
        results[arm] = {"learning rate": rate, "steps": steps} | cells.get(arm, arm, rate, steps)
        loss = np.mean(results[arm]["test loss"])
        print(f"{name}: {arm}: learning rate {rate:g}, test loss {loss:.4f}", file=sys.stderr, flush=True)
    return results


CAUSES = ("digits, MLP, 300", "digits, MLP, 1,400", "digits, CNN, 300", "digits, CNN, 1,400", "Fashion, CNN, 10,000")
GAIN = report.total_gain(report.MATCHED)


def causes(name, setting, directory, tuned):
    """From KD to DOT one change at a time, at an eighth of the learning rate that suits KD."""
    cells, rate = sampled.Cells(name, setting.problem, directory, ARMS), tuned / 8
    steps = {
        "KD 0.9": ("KD 0.9", rate),
        f"{GAIN:.2f} x the learning rate": ("KD 0.9", GAIN * rate),
        "and the losses in the ratio of DOT's gains": ("KD 0.984", GAIN * rate),
        "and L2 with the task's gain: gain-matched": ("KD, gain-matched", rate),
        "and two memories: DOT 0.075": ("DOT 0.075", rate),
        "KD 0.9, tuned": ("KD 0.9", tuned),
    }
    return {step: cells.get(arm, arm, at, cells.steps()) for step, (arm, at) in steps.items()}


BREAKING = ("digits, MLP, 300", "digits, CNN, 300")
BREAKING_ARMS = (
    *("KD 0.9", "KD 0.9, momentum 0.95", "KD 0.9, momentum 0.975", "KD, gain-matched"),
    *("DOT 0.05", "DOT 0.075", "DOT, normalised", "DOT, normalised, reversed", "KD 0.9, every 4th", "DOT, every 4th"),
)


def breaking(name, setting, directory):
    """The smallest learning rate, in steps of 2, at which the task loss of one of 5 students ends above log 10, after 1/4 of the epochs."""
    problem = setting.problem._replace(seeds=5, epochs=max(1, setting.problem.epochs // 4))
    cells = sampled.Cells(f"{name}, breaking", problem, directory, ARMS)

    def fails(arm, rate):
        return not np.max(cells.get(arm, arm, rate, cells.steps())["train task"]) < np.log(10)

    rates = [0.02 * 2**i for i in range(10)]
    return {arm: next((rate for rate in rates if fails(arm, rate)), None) for arm in BREAKING_ARMS}


def tables(results, cause, limits):
    report.summary_table(results)
    for name, found in results.items():
        report.problem_table(name, found)
    deltas = [f"DOT {delta}" for delta in DELTAS]
    two = (*deltas, "DOT, warm-up", "DOT, normalised", "DOT, normalised, reversed")
    report.front_table(results, two)
    if cause:
        report.cause_table(cause)
    report.winner_table(results, ONE, TWO, SAMPLED)
    report.tied_table(results, SAMPLED)
    normalised = (("DOT 0.075", "KD 0.9"), ("DOT, normalised", "KD 0.9"), ("DOT, normalised", "DOT 0.075"))
    report.pair_table("Which normalisation?", results, normalised)
    memory = (
        *(("DOT, normalised", "DOT, normalised, reversed"), ("DOT, normalised, reversed", "KD 0.9")),
        *(("DOT -0.075", "KD 0.9"), ("DOT -0.075", "KD 0.5"), ("DOT -0.075", "KD, gain-matched, -0.075")),
    )
    report.pair_table("Which loss should remember longer?", results, memory)
    warm = (("DOT, warm-up", "DOT 0.075"), ("DOT, warm-up", "KD 0.9"), ("DOT 0.025", "KD 0.9"))
    report.pair_table("A warm-up of delta, and a small delta", results, warm)
    others = [(f"KD 0.9, momentum {momentum}", "KD 0.9") for momentum in (0.8, 0.95, 0.975)]
    report.pair_table("Another momentum for both losses", results, others)
    others = (("DKD", "KD 0.9"), ("DKD + DOT", "DKD"), ("DeepKD", "KD 0.9"), ("KD, min-norm", "KD 0.9"))
    report.pair_table("Relatives", results, others)
    rare = (
        *(("KD, alternating", "KD 0.9"), ("DOT, alternating", "DOT 0.075"), ("DOT, alternating", "KD, alternating")),
        ("DOT, every 4th", "KD 0.9, every 4th"),
    )
    report.pair_table("Fewer gradients, at the cost of plain KD", results, rare)
    single = ("KD 0.9, momentum 0.95", "KD 0.9, momentum 0.975", "KD, gain-matched")
    report.rate_table(results, (*single, *deltas))
    if limits:
        report.breaking_table(limits)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=pathlib.Path, default=pathlib.Path("runs/trade_off"))
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument(
        "--causes", nargs="*", choices=CAUSES, default=CAUSES, help="problems on which DOT is taken apart"
    )
    parser.add_argument(
        "--breaking", nargs="*", choices=BREAKING, default=BREAKING, help="whose limits are searched for"
    )
    parser.add_argument("--seeds", type=int, help="of every problem; at least 2: the standard error needs them")
    parser.add_argument("--epochs", type=int, help="of every problem")
    parser.add_argument("--cells_only", action="store_true", help="run what is missing, and print no tables")
    parser.add_argument("--json", type=pathlib.Path, help="also write every seed's figures to this file")
    parser.add_argument("--picture", type=pathlib.Path, help="where to draw the picture; default: in the directory")
    args = parser.parse_args(argv)
    if missing := {report.KD, report.MATCHED, report.DOT}.difference(args.arms):
        parser.error(f"--arms: give {', '.join(map(repr, sorted(missing)))} as well: the tables compare with them")

    results, cause, limits = {}, {}, {}
    for name in args.problems:
        setting = PROBLEMS[name]
        problem = setting.problem
        problem = problem._replace(seeds=args.seeds or problem.seeds, epochs=args.epochs or problem.epochs)
        setting = setting._replace(problem=problem)
        results[name] = run(name, setting, args.directory, args.arms)
        if name in args.causes:
            cause[name] = causes(name, setting, args.directory, results[name][report.KD]["learning rate"])
        if name in args.breaking:
            limits[name] = breaking(name, setting, args.directory)
    if args.cells_only:
        return
    tables(results, cause, limits)
    report.picture(results, args.picture or args.directory / "trade_off.png")
    if args.json:
        args.json.write_text(json.dumps({"results": results, "causes": cause, "breaking": limits}, indent=1))


if __name__ == "__main__":
    main()
