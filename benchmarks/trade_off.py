"""Does DOT help, against plain distillation with a learning rate, weights and a momentum chosen as carefully?

    apt-get install dataset-fashion-mnist
    pip install -e ".[examples]" && python -m benchmarks.trade_off --directory=runs/trade_off

The protocol is that of `_experiments.py`, with 20 seeds on the digits, 10 on the problems "unseen ...", and 5 elsewhere.  The
search for a learning rate also looks at 1/16, 1/4, 4 and 16 times the rate that it found.  The test split is shown at the chosen
learning rate alone.  Differences are paired by seed.  Holm's correction is over all arms of a problem where they are compared with
KD or with the best arm, and over all differences of a table or a column elsewhere: each table says so.  Sampled arms are trained
for as many steps as plain KD's FLOPs pay for, where a teacher's forward pass costs T = 7.2 F.

What a student of a kind (one momentum; two) can reach is the arm of that kind with the lowest validation loss.

Some arms were added after test losses had been seen.  So three comparisons were fixed before the problems "unseen ..." and
"other digits ..." were run: DOT -0.075 less KD 0.9, less its gain-matched control, and less the arm with one momentum (another
KD weight, another momentum, gain-matched) that has the lowest validation loss.  The arms `LATER` were added after that.

With --json it writes the figures of every seed to a file, and with --read it prints the tables of such a file, in seconds:

    python -m benchmarks.trade_off --read=benchmarks/trade_off.json

`--cells_only` runs what is missing and prints no tables, so that two processes can share the problems.  Give each its own core
(`taskset`), or their threads get in each other's way.
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
from benchmarks import _experiments as experiments
from benchmarks import _students as students
from benchmarks import _trade_off_report as report
from benchmarks import digits_learning_rates as digits
from benchmarks import sampled_gradients as sampled
from dot_optax import DeepKDLosses, PerLoss
from examples.distill import methods, optimizers
from examples.language_model import model

MOMENTUM, DELTA, KD_WEIGHT, TEMPERATURE = 0.9, experiments.DELTA, experiments.WEIGHTS.kd, experiments.TEMPERATURE
TEACHER = 7.2  # T / F


# The arms.


def weights_of(kd_weight):
    return PerLoss(1 - kd_weight, kd_weight)


def one_backward_pass(weights):
    """The gradient of the weighted sum of the losses, in the place of theirs."""

    def make(loss_fn):
        def total(*args):
            losses, statistics = loss_fn(*args)
            return sum(w * loss for w, loss in zip(weights, losses, strict=True)), statistics

        gradient = jax.value_and_grad(total, has_aux=True)
        return lambda step, *args: gradient(*args)

    return make


def one_momentum(weights=experiments.WEIGHTS, momentum=MOMENTUM, losses=experiments.losses_of):
    """SGD or AdamW on the weighted sum."""

    def optimizer(problem, method, learning_rate, steps):
        del method
        return optax.chain(
            *optimizers.optimize_the_sum(experiments.recipe(problem, learning_rate, steps, momentum=momentum))
        )

    return experiments.Form(one_backward_pass(weights), lambda t, n: t + 3, optimizer, losses=losses)


def of_method(name, form="exact", losses=experiments.losses_of, **options):
    """A method of the example, with a gradient for each loss."""

    def optimizer(problem, method, learning_rate, steps):
        del method
        own = {key: value(steps) if callable(value) else value for key, value in options.items()}
        return methods.METHODS[name](experiments.recipe(problem, learning_rate, steps, **own))

    form = sampled.FORMS[form]
    passes = 1 if name == "kd" else 2
    return form._replace(cost=lambda t, n: form.cost(t, passes), optimizer=optimizer, losses=losses)


def normalized_dot(delta=DELTA, kd_weight=KD_WEIGHT, form="exact"):
    """DOT whose momenta remember differently long, and amplify alike."""
    momenta = dot_optax.betas(MOMENTUM, delta)

    def optimizer(problem, method, learning_rate, steps):
        del method
        own, decay = experiments.recipe(problem, learning_rate, steps), problem.weight_decay
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

    return sampled.FORMS[form]._replace(optimizer=optimizer)


def watched():
    """KD with a gradient for each loss; at each step their cosine, and noise and conflict rate over the last 100 or so."""
    kd = of_method("kd")

    def optimizer(*args):
        return optax.chain(dot_optax.diagnostics.record(), kd.optimizer(*args))

    def watch(state):
        signal, cosine, conflict = (
            optax.tree.get(state, name)[0] for name in ("signal_to_noise", "cosines", "conflicts")
        )
        return {"task SNR": signal[0], "KD SNR": signal[1], "cosine": cosine[0, 1], "conflict": conflict[0, 1]}

    return kd._replace(optimizer=optimizer, watch=watch)


def dkd_losses(logits, y, teacher_logits):
    """With the weight 2 of the non-target classes where there are 10, and the published 8, for 100 classes, elsewhere."""
    task = experiments.losses_of(logits, y, teacher_logits).task
    beta = 2.0 if logits.shape[-1] == 10 else 8.0
    return PerLoss(task, dot_optax.losses.dkd_loss(logits, teacher_logits, y, TEMPERATURE, alpha=1.0, beta=beta))


def deepkd_losses(logits, y, teacher_logits):
    """Of all classes: there are too few to begin with the teacher's likeliest."""
    task = experiments.losses_of(logits, y, teacher_logits).task
    return DeepKDLosses(task, *dot_optax.losses.deepkd_losses(logits, teacher_logits, y, TEMPERATURE))


# 0.984 has the ratio of DOT's gains: 0.1 x 5.71 to 0.9 x 40.
KD_WEIGHTS = (0.1, 0.2, 0.3, 0.5, 0.8, 0.9, 0.95, 0.984, 0.995)
DELTAS = (0.025, 0.05, 0.075, 0.09)
DEEPKD = DeepKDLosses(0.075, -0.075, 0.075)
ONES, EVEN = PerLoss(1.0, 1.0), PerLoss(0.5, 0.5)

ARMS = {
    "CE": one_momentum(PerLoss(1.0, 0.0))._replace(cost=lambda t, n: 3),
    **{f"KD {weight}": one_momentum(weights_of(weight)) for weight in KD_WEIGHTS},
    **{f"KD 0.5, momentum {beta}": one_momentum(weights_of(0.5), momentum=beta) for beta in (0.5, 0.7, 0.8)},
    "KD 0.9, momentum 0.8": one_momentum(momentum=0.8),
    "KD 0.9, momentum 0.95": one_momentum(momentum=0.95),
    "KD 0.9, momentum 0.975": one_momentum(momentum=0.975),
    "KD 0.984, momentum 0.95": one_momentum(weights_of(0.984), momentum=0.95),
    "KD 0.984, momentum 0.975": one_momentum(weights_of(0.984), momentum=0.975),
    "KD, gain-matched": of_method("kd_gain_matched"),
    "KD, gain-matched, -0.075": of_method("kd_gain_matched", delta=-0.075),
    **{f"DOT {delta}": of_method("dot", delta=delta) for delta in DELTAS},
    # The momenta exchanged: the task remembers longer.
    **{f"DOT {-delta}": of_method("dot", delta=-delta) for delta in (0.05, 0.075, 0.09)},
    **{f"DOT {delta}, weight 0.5": of_method("dot", delta=delta, weights=EVEN) for delta in (0.075, 0.09, -0.075)},
    "DOT, warm-up": of_method("dot", delta_warmup_epochs=lambda steps: steps // 4),
    "DOT, normalised": normalized_dot(),
    "DOT, normalised, 0.984": normalized_dot(kd_weight=0.984),
    "DOT, normalised, reversed": normalized_dot(-DELTA),
    "DOT, normalised, 0.1": normalized_dot(kd_weight=0.1),
    "DOT, normalised, reversed, 0.1": normalized_dot(-DELTA, kd_weight=0.1),
    "DOT, normalised, 1/8 of the rows": normalized_dot(form="examples, 1/8"),
    "DOT, normalised, reversed, 1/8 of the rows": normalized_dot(-DELTA, form="examples, 1/8"),
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
ONE = ("KD 0", "KD, gain-matched")  # the beginnings of the names of arms with one momentum, and of those with two
TWO = ("DOT 0", "DOT -", "DOT, normalised", "DOT, warm-up")
SAMPLED = ("KD, alternating", "DOT, alternating", "KD 0.9, every 4th", "KD, gain-matched, every 4th", "DOT, every 4th")
NOISY = ("DOT, normalised, 1/8 of the rows", "DOT, normalised, reversed, 1/8 of the rows")
LIGHT = ("DOT, normalised, 0.1", "DOT, normalised, reversed, 0.1")
LEFT_OUT = (*SAMPLED, *NOISY)  # where the best arm is looked for
NORMALIZED = ("DOT, normalised", "DOT, normalised, reversed")
LATER = ("KD 0.2", *NORMALIZED)  # on the problems of `UNSEEN_PROBLEMS`
FEW = (
    *("CE", "KD 0.2", "KD 0.5", "KD 0.9", "KD 0.984"),
    *("KD 0.5, momentum 0.8", "KD 0.9, momentum 0.8", "KD 0.9, momentum 0.95"),
    *("KD, gain-matched", "KD, gain-matched, -0.075", "DOT 0.05", "DOT 0.075", "DOT -0.075"),
    *("DOT 0.075, weight 0.5", "DOT -0.075, weight 0.5"),
    *("DOT, warm-up", *NORMALIZED),
)
RELATIVES = ("DeepKD", "DKD", "DKD + DOT", "KD, min-norm")
MOST = (*FEW, *RELATIVES, "KD, alternating", "DOT, alternating")
FEWEST = (
    *("CE", "KD 0.2", "KD 0.5", "KD 0.9", "KD 0.5, momentum 0.8", "KD 0.9, momentum 0.8"),
    *("KD, gain-matched", "KD, gain-matched, -0.075", "DOT 0.05", "DOT 0.075", "DOT -0.075", "DOT -0.075, weight 0.5"),
)
EIGHT = ("CE", "KD 0.2", "KD 0.5", "KD 0.5, momentum 0.8", "KD 0.9", "KD, gain-matched", "DOT -0.075", "DOT 0.075")
UNSEEN = (
    *("CE", "KD 0.2", "KD 0.5", "KD 0.9", "KD 0.5, momentum 0.8", "KD 0.9, momentum 0.8"),
    *("KD, gain-matched, -0.075", "KD, gain-matched", "DOT -0.075", "DOT 0.075"),
)


# The problems.


def digits_data(examples, order=0):
    """The first `examples` of the 1,797 digits in a random order to train on, 197 to validate, the others to test."""
    found = load_digits()
    images, labels = jnp.float32(found.data / 16), jnp.int32(found.target)
    order = np.random.default_rng(order).permutation(len(labels))
    parts = dict(zip(("train", "validation", "test"), np.split(order, [examples, examples + 197]), strict=True))
    splits = {name: (images[rows], labels[rows]) for name, rows in parts.items()}
    teacher, _ = digits.train_teacher(splits)
    data = {f"{name} {what}": part for name, pair in splits.items() for what, part in zip("xy", pair, strict=True)}
    return data | {"teacher": teacher}


def _digits_mlp(examples, epochs, order=0, **fields):
    problem = students.PROBLEMS["digits, MLP"]
    return problem._replace(epochs=epochs, load=functools.partial(digits_data, examples, order), **fields)


def _digits_cnn(examples, epochs, order=0, **fields):
    def load():
        data = digits_data(examples, order)
        return {key: part.reshape(-1, 8, 8, 1) if key.endswith("x") else part for key, part in data.items()}

    return students.cnn_problem((8, 16), 8, learning_rate=0.04, epochs=epochs, seeds=20, load=load)._replace(**fields)


def _fashion_cnn(examples, epochs, teacher_widths=(16, 32), learning_rate=0.04, **fields):
    load = functools.partial(students.fashion, 14, teacher_widths, examples, **fields)
    return students.cnn_problem((8, 16), 14, learning_rate=learning_rate, epochs=epochs, seeds=5, load=load)


def _fashion_vit(examples, epochs, learning_rate=8e-3, **fields):
    load = functools.partial(students.fashion, students.VIT_SIDE, (32, 64), examples, **fields)
    return students.PROBLEMS["Fashion-MNIST, ViT"]._replace(epochs=epochs, learning_rate=learning_rate, load=load)


SEQUENCE, CHARACTERS = 48, 128


def text_data(pattern="*.py", train=2048, evaluation=384):
    """Sequences of characters of Python's standard library, each file in one split, and a trained decoder's logits."""
    files = sorted(pathlib.Path(json.__file__).parent.parent.glob(pattern))
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
    teacher, steps = language_model(64), 20 * (train // experiments.BATCH)
    rows = experiments.batches(train, steps, seed=1000)
    run = functools.partial(experiments.train, teacher, "ce", ARMS["CE"], 4e-3)
    (params, _), _ = jax.jit(run)(jax.random.key(1000), rows, data)
    data["teacher"] = jnp.concatenate(
        [teacher.apply(params, {}, part, train=False)[0] for part in jnp.split(data["train x"], 16)]
    )
    return data


def language_model(width, learning_rate=8e-3, load=text_data):
    """The decoder of `examples.language_model`, on characters."""
    architecture = model.Architecture(CHARACTERS, width, 2, 2, 1, width // 2, 5 * width // 2)
    graphdef, _ = model.split(model.build(architecture, rngs=nnx.Rngs(0)))

    def init(key):
        return model.split(model.build(architecture, rngs=nnx.Rngs(key)))[1], {}

    def apply(params, statistics, x, train):
        del train
        return model.apply(graphdef, params, x, separator=0), statistics

    return experiments.Problem(
        "adamw", 0.0, learning_rate, epochs=4, seeds=5, init=init, apply=apply, load=load, batch=16
    )


class Setting(NamedTuple):
    """A problem, and the arms that are run on it."""

    problem: experiments.Problem
    arms: tuple[str, ...] = tuple(ARMS)


PROBLEMS = {
    "digits, MLP, 300": Setting(_digits_mlp(300, epochs=240)),
    "digits, MLP, 1,400": Setting(_digits_mlp(1400, epochs=60), FEW),
    "digits, CNN, 300": Setting(_digits_cnn(300, epochs=240)),
    "digits, CNN, 1,400": Setting(_digits_cnn(1400, epochs=60), FEWEST),
    "digits, CNN, 300, batches of 8": Setting(_digits_cnn(300, epochs=40, batch=8), FEW),
    "Fashion, CNN, 10,000": Setting(_fashion_cnn(10_000, epochs=8)),
    "Fashion, CNN, 32 epochs": Setting(_fashion_cnn(10_000, epochs=32, learning_rate=0.16), FEWEST),
    "Fashion, CNN, larger teacher": Setting(_fashion_cnn(10_000, 8, (64, 128, 128), 0.16, teacher_epochs=15), FEWEST),
    "Fashion, CNN, 20% wrong labels": Setting(_fashion_cnn(10_000, epochs=8, wrong_labels=0.2), FEW),
    "Fashion, CNN, 60,000": Setting(_fashion_cnn(57_500, epochs=2, learning_rate=0.16), FEWEST),
    "Fashion, ViT, 10,000": Setting(_fashion_vit(10_000, epochs=6), MOST),
    "Fashion, ViT, 60,000": Setting(_fashion_vit(57_500, epochs=2, learning_rate=0.016), EIGHT),
    "text, decoder": Setting(language_model(32), (*FEWEST, "DOT, warm-up", *NORMALIZED, *RELATIVES)),
}
# The comparisons that were fixed beforehand are made on these.  The Fashion images are in no split of the problems above, except
# those with 60,000, which use all.  The text is that of packages, where "text, decoder" has modules.  The digits are the same
# 1,797 in another order: most of their test images are in a split above.
UNSEEN_PROBLEMS = {
    "unseen Fashion, CNN": _fashion_cnn(10_000, epochs=8, learning_rate=0.16, skip=12_500)._replace(seeds=10),
    "unseen Fashion, ViT": _fashion_vit(10_000, epochs=6, learning_rate=0.016, skip=12_500)._replace(seeds=10),
    "unseen text, decoder": language_model(
        32, learning_rate=4e-3, load=functools.partial(text_data, "[ahmu]*/*.py")
    )._replace(seeds=10),
    "other digits, MLP, 300": _digits_mlp(300, epochs=240, order=1, learning_rate=0.16),
    "other digits, CNN, 300": _digits_cnn(300, epochs=240, order=1, learning_rate=0.16),
}
PROBLEMS |= {name: Setting(problem, UNSEEN) for name, problem in UNSEEN_PROBLEMS.items()}
PROBLEMS["unseen Fashion, ViT"] = Setting(UNSEEN_PROBLEMS["unseen Fashion, ViT"], (*UNSEEN, *NORMALIZED))


NOISE = "KD 0.9, watched"


def noise(name, setting, directory, rate):
    """How noisy the gradients are that KD sees at its learning rate, and how often they conflict."""
    cells = experiments.Cells(name, setting.problem, directory, {NOISE: watched()})
    return cells.get(NOISE, NOISE, rate, cells.steps())


FURTHER = (1 / 16, 1 / 4, 4, 16)  # where the search looks beside the best rate that it found


def run(name, setting, directory, arms):
    """For each arm its learning rate, and its figures at that rate."""
    cells, results, best = experiments.Cells(name, setting.problem, directory, ARMS), {}, {}
    for arm in (arm for arm in setting.arms if arm in arms):
        steps = cells.steps(ARMS[arm].cost(TEACHER, 1) / (TEACHER + 3)) if arm in SAMPLED else cells.steps()
        start = best.get(arm[:3], setting.problem.learning_rate)
        best[arm[:3]] = rate = experiments.search(cells, arm, arm, start, steps, FURTHER)
        results[arm] = {"learning rate": rate, "steps": steps} | cells.get(arm, arm, rate, steps)
        loss = np.mean(results[arm]["test loss"])
        print(f"{name}: {arm}: learning rate {rate:g}, test loss {loss:.4f}", file=sys.stderr, flush=True)
    return results


CAUSES = ("digits, MLP, 300", "digits, MLP, 1,400", "digits, CNN, 300", "digits, CNN, 1,400", "Fashion, CNN, 10,000")
GAIN = report.total_gain(report.MATCHED)


def causes(name, setting, directory, tuned):
    """From KD to DOT one change at a time, at an eighth of the learning rate that suits KD."""
    cells, rate = experiments.Cells(name, setting.problem, directory, ARMS), tuned / 8
    steps = {
        "KD 0.9": ("KD 0.9", rate),
        f"{GAIN:.2f} x the learning rate": ("KD 0.9", GAIN * rate),
        "and the losses in the ratio of DOT's gains": ("KD 0.984", GAIN * rate),
        "and L2 with the task's gain: gain-matched": ("KD, gain-matched", rate),
        "and two memories: DOT 0.075": ("DOT 0.075", rate),
        "KD 0.9, tuned": ("KD 0.9", tuned),
    }
    return {step: cells.get(arm, arm, at, cells.steps()) for step, (arm, at) in steps.items()}


BREAKING = ("digits, MLP, 300", "digits, CNN, 300", "Fashion, CNN, 10,000")
BREAKING_ARMS = (
    *("KD 0.9", "KD 0.9, momentum 0.95", "KD 0.9, momentum 0.975", "KD, gain-matched"),
    *("DOT 0.05", "DOT 0.075", "DOT -0.075", "DOT, normalised", "DOT, normalised, reversed"),
    *("KD 0.9, every 4th", "DOT, every 4th"),
)


def breaking(name, setting, directory):
    """The smallest learning rate, in steps of 2, at which one of 5 students fails: its task loss ends above log 10.

    The students are trained for a quarter of the epochs.
    """
    problem = setting.problem._replace(seeds=5, epochs=max(1, setting.problem.epochs // 4))
    cells = experiments.Cells(f"{name}, breaking", problem, directory, ARMS)

    def fails(arm, rate):
        return not np.max(cells.get(arm, arm, rate, cells.steps())["train task"]) < np.log(10)

    rates = [0.02 * 2**i for i in range(10)]
    return {arm: next((rate for rate in rates if fails(arm, rate)), None) for arm in BREAKING_ARMS}


def tables(results, noise, causes, breaking):
    report.summary_table(results)
    for name, found in results.items():
        report.problem_table(name, found)
    deltas = [f"DOT {delta}" for delta in DELTAS]
    two = (*deltas, "DOT, warm-up", "DOT, normalised", "DOT, normalised, reversed", "DOT -0.075")
    report.front_table(results, two, ONE, LEFT_OUT)
    if causes:
        report.cause_table(causes)
    report.winner_table(results, ONE, TWO, LEFT_OUT)
    unseen = {
        name: {arm: result for arm, result in of.items() if arm not in LATER}
        for name, of in results.items()
        if name in UNSEEN_PROBLEMS and set(report.EXCHANGED) <= set(of)
    }
    if unseen:
        report.confirmation_table(unseen, ONE)
    report.tied_table(results, LEFT_OUT)
    normalised = (
        *(("DOT 0.075", "KD 0.9"), ("DOT, normalised", "KD 0.9"), ("DOT, normalised", "DOT 0.075")),
        ("DOT, normalised, reversed", "DOT -0.075"),
    )
    report.pair_table("Which normalisation?", results, normalised)
    even = [(f"DOT {delta}, weight 0.5", "KD 0.5") for delta in (0.075, 0.09, -0.075)]
    even += [("DOT 0.075, weight 0.5", "DOT 0.075")]
    even += [("DOT -0.075, weight 0.5", other) for other in ("DOT -0.075", "KD 0.5, momentum 0.8", "KD 0.2")]
    report.pair_table("DOT with even weights", results, even)
    smaller = [("KD 0.2", "KD 0.5"), ("KD 0.1", "KD 0.2"), ("CE", "KD 0.2"), ("DOT -0.075", "KD 0.2")]
    report.pair_table("A small weight of the KD loss", results, smaller)
    memory = (
        *(("DOT, normalised", "DOT, normalised, reversed"), ("DOT, normalised, reversed", "KD 0.9")),
        *(("DOT -0.075", "KD 0.9"), ("DOT -0.075", "KD 0.5"), ("DOT -0.075", "KD, gain-matched, -0.075")),
    )
    report.pair_table("Which loss should remember longer?", results, memory)
    report.noise_table(noise, results)
    altered = (("DOT, normalised", "DOT, normalised, reversed"), NOISY, LIGHT, ("DOT, normalised, 0.1", "KD 0.1"))
    report.pair_table("And if the KD loss is made noisier, or has a small weight?", results, altered)
    resembled = (
        *(("DOT 0.075", "KD 0.984, momentum 0.975"), ("DOT, normalised", "KD 0.9, momentum 0.975")),
        ("DOT -0.075", "KD 0.5, momentum 0.8"),
    )
    report.pair_table("Is DOT more than the momentum of its KD loss?", results, resembled)
    warm = (("DOT, warm-up", "DOT 0.075"), ("DOT, warm-up", "KD 0.9"), ("DOT 0.025", "KD 0.9"))
    report.pair_table("A warm-up of delta, and a small delta", results, warm)
    others = [(f"DOT {-delta}", "DOT -0.075") for delta in (0.05, 0.09)]
    report.pair_table("Another delta below 0", results, others)
    others = [(f"KD 0.9, momentum {momentum}", "KD 0.9") for momentum in (0.8, 0.95, 0.975)]
    others += [(f"KD 0.5, momentum {momentum}", "KD 0.5") for momentum in (0.5, 0.7, 0.8)]
    report.pair_table("Another momentum for both losses", results, others)
    others = (("DKD", "KD 0.9"), ("DKD + DOT", "DKD"), ("DeepKD", "KD 0.9"), ("KD, min-norm", "KD 0.9"))
    report.pair_table("Relatives", results, others)
    rare = (
        *(("KD, alternating", "KD 0.9"), ("DOT, alternating", "DOT 0.075"), ("DOT, alternating", "KD, alternating")),
        ("DOT, every 4th", "KD 0.9, every 4th"),
    )
    report.pair_table("Fewer gradients, at the cost of plain KD", results, rare)
    single = (
        "KD 0.2",
        "KD 0.5",
        "KD 0.5, momentum 0.8",
        "KD 0.9, momentum 0.8",
        "KD 0.9, momentum 0.95",
        "KD 0.9, momentum 0.975",
    )
    arms = (*single, "KD, gain-matched", "KD, gain-matched, -0.075", *deltas, "DOT -0.075", "DOT -0.075, weight 0.5")
    for optimizer, shown in (("sgd", "SGD"), ("adamw", "AdamW")):
        found = {name: of for name, of in results.items() if PROBLEMS[name].problem.optimizer == optimizer}
        if found:  # The gains of AdamW's momenta are relative.
            report.rate_table(found, arms, shown, with_gains=optimizer == "sgd")
    if breaking:
        report.breaking_table(breaking)


def write(path, figures):
    """One line for each arm, and six digits of each number."""

    def shorter(value):
        if isinstance(value, dict):
            return {key: shorter(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [shorter(part) for part in value]
        return float(f"{value:.6g}") if isinstance(value, float) else value

    def lines(value, depth):
        if not depth or not isinstance(value, dict):
            return json.dumps(shorter(value))
        inner = (f"{json.dumps(key)}: {lines(part, depth - 1)}" for key, part in value.items())
        return "{\n" + ",\n".join(inner) + "\n}"

    path.write_text(lines(figures, 3) + "\n")


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
    parser.add_argument("--read", type=pathlib.Path, help="such a file, whose tables to print; nothing is run")
    parser.add_argument("--picture", type=pathlib.Path, help="where to draw the picture; default: in the directory")
    args = parser.parse_args(argv)
    if args.read:
        figures = json.loads(args.read.read_text())
        tables(**figures)
        if args.picture:
            report.picture(figures["results"], args.picture)
        return
    if missing := {report.KD, report.MATCHED, report.DOT}.difference(args.arms):
        parser.error(f"--arms: give {', '.join(map(repr, sorted(missing)))} as well: the tables compare with them")

    results, noises, cause, limits = {}, {}, {}, {}
    for name in args.problems:
        setting = PROBLEMS[name]
        problem = setting.problem
        problem = problem._replace(seeds=args.seeds or problem.seeds, epochs=args.epochs or problem.epochs)
        setting = setting._replace(problem=problem)
        results[name] = run(name, setting, args.directory, args.arms)
        noises[name] = noise(name, setting, args.directory, results[name][report.KD]["learning rate"])
        if name in args.causes:
            cause[name] = causes(name, setting, args.directory, results[name][report.KD]["learning rate"])
        if name in args.breaking:
            limits[name] = breaking(name, setting, args.directory)
    if args.cells_only:
        return
    tables(results, noises, cause, limits)
    report.picture(results, args.picture or args.directory / "trade_off.png")
    if args.json:
        write(args.json, {"results": results, "noise": noises, "causes": cause, "breaking": limits})


if __name__ == "__main__":
    main()
