"""What do sampled gradients save, and what do they cost?  Results at equal steps, and at an equal number of FLOPs.

    apt-get install dataset-fashion-mnist
    pip install -e ".[examples]" && python -m benchmarks.sampled_gradients --directory=runs/sampled_gradients

Three problems: scikit-learn's digits with an MLP (SGD, 20 seeds), and Fashion-MNIST with a CNN that has BatchNorm (SGD) and
with a vision transformer (AdamW), 5 seeds each.  Arms: CE; plain KD, gain-matched KD and DOT, each with exact gradients and
with every form of `dot_optax.sampled_...`.  Ways to lessen the noise are in `sampling_noise.py`.

The protocol: a cosine schedule; a learning rate for each arm, of a common grid (a factor of 2 apart): the one whose mean
validation loss is lower than at half and at twice of it.  The search begins at the best rate of the same method with a similar
form, or with exact gradients, and follows the lower loss.  The table and the picture show the test split at that rate alone.
"Equal cost" trains for as many steps as plain KD's FLOPs pay for, at the same learning rate.  All arms have the same batches
and initial weights, seed by seed.

A student's forward pass costs F and its backward pass 2F; the teacher's forward pass T = 7.2 F, as for ResNet50 ->
MobileNetV1 (`--teacher` for another ratio).  The teacher's logits are computed once here, since no image is augmented: costs are
counted as if it had run where it is due.  Arms with one momentum need one backward pass for both losses, and are counted so.

Every cell (an arm, a learning rate, a number of steps) is one JSON file of the directory: the command goes on where it was
stopped, and with all cells there it only prints. A cell of other settings is run anew; one of other code is not.
"""

import argparse
import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats

import dot_optax
from benchmarks import digits_learning_rates as digits
from dot_optax import PerLoss
from examples.distill import methods
from examples.distill.configs import default
from examples.distill.datasets.fashion_mnist_idx import fashion_mnist_idx

BATCH, TEMPERATURE, WEIGHTS, DELTA = 64, 4.0, PerLoss(0.1, 0.9), 0.075
MEASURES = ("train task", "train KD", "validation loss", "test loss", "test accuracy")
Arrays = dict[str, Any]


class Problem(NamedTuple):
    """A student to distil."""

    optimizer: str
    weight_decay: float
    learning_rate: float  # where the search begins
    epochs: int
    seeds: int
    init: Callable[[Any], tuple[Any, Any]]  # key -> params, statistics
    apply: Callable[..., tuple[Any, Any]]  # (params, statistics, x, train) -> logits, statistics
    load: Callable[[], Arrays]  # x, y of the splits, and the teacher's logits of the training split
    batch: int = BATCH


def losses_of(logits, y, teacher_logits):
    return PerLoss(
        task=optax.losses.softmax_cross_entropy_with_integer_labels(logits, y),
        kd=dot_optax.losses.kd_loss(logits, teacher_logits, TEMPERATURE),
    )


class Form(NamedTuple):
    """A way to take the gradients."""

    make: Callable[[Any], Callable[..., Any]]  # of a loss function, as dot_optax.value_and_grads
    cost: Callable[[float, int], float]  # (T, backward passes where both losses are due) -> in units of F
    optimizer: Callable[..., optax.GradientTransformation] | None = None  # in the place of that of the method
    batches: int = 1  # that a step is given at once: its own, and that of 4 steps later
    losses: Callable[..., Any] = losses_of  # (logits, y, teacher_logits) -> of each example, in a container


def _every(k):
    return Form(lambda f: dot_optax.sampled_losses(f, {"kd": k}, has_aux=True), lambda t, n: 3 + (t + 2 * (n - 1)) / k)


def _difference(k):
    return Form(lambda f: dot_optax.sampled_difference(f, k, has_aux=True), lambda t, n: t + 3 + 2 * (n - 1) / k)


def _rows(k):
    make = functools.partial(dot_optax.sampled_examples, periods={"kd": k}, batch_argnums=(2, 3, 4), has_aux=True)
    return Form(make, lambda t, n: 3 + (t + 3) / k)


def _exact(f):
    exact = dot_optax.value_and_grads(f, has_aux=True)
    return lambda step, *args: exact(*args)


FORMS = {
    "exact": Form(_exact, lambda t, n: t + 1 + 2 * n),
    **{f"difference, k={k}": _difference(k) for k in (2, 4, 8, 16)},
    **{f"losses, k={k}": _every(k) for k in (2, 4, 8)},
    "alternating": Form(
        lambda f: dot_optax.sampled_losses(f, {"task": 2, "kd": 2}, has_aux=True), lambda t, n: 3 + t / 2
    ),
    **{f"examples, 1/{k}": _rows(k) for k in (2, 4, 8)},
}
METHODS = {"kd": "KD", "kd_gain_matched": "KD, gain-matched", "dot": "DOT"}


def arms(forms):
    """(method, form) of the arms; the sampled difference leaves plain KD as it is."""
    yield "ce", "exact"
    for method in METHODS:
        for form in forms:
            if method != "kd" or not form.startswith("difference"):
                yield method, form


def cost(problem, method, form, teacher):
    """Of a step, in units of plain KD; `form` is a `Form`."""
    if method == "ce":
        return 3 / (teacher + 3)
    # With one momentum the weighted losses have one gradient; gain-matched Adam has two sums of them.
    passes = 1 if method == "kd" or (method == "kd_gain_matched" and problem.optimizer == "sgd") else 2
    return form.cost(teacher, passes) / (teacher + 3)


def optimizer_of(problem, method, learning_rate, steps):
    config = default().optimizer
    config.name, config.weight_decay, config.delta = problem.optimizer, problem.weight_decay, DELTA
    return methods.METHODS[method](methods.Recipe(config, WEIGHTS, schedule(learning_rate, steps), steps_per_epoch=1))


def schedule(learning_rate, steps):
    """A twentieth of the steps to warm up, and a cosine down to 0; the rate may be traced."""
    factor = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 20, steps)
    return lambda count: learning_rate * factor(count)


def train(problem, method, form, learning_rate, key, rows, data):
    """Trains one student on the batches `rows` of shape (steps, batch); returns its parameters and statistics."""
    tx = (form.optimizer or optimizer_of)(problem, method, learning_rate, len(rows))
    rows = jnp.concatenate([jnp.roll(rows, -4 * i, axis=0) for i in range(form.batches)], axis=1)

    def loss_fn(params, statistics, x, y, teacher_logits):
        logits, statistics = problem.apply(params, statistics, x, train=True)
        return jax.tree.map(jnp.mean, form.losses(logits, y, teacher_logits)), statistics

    gradients = form.make(loss_fn)

    def step(carry, inputs):
        params, statistics, state = carry
        number, rows = inputs
        x, y, teacher_logits = data["train x"][rows], data["train y"][rows], data["teacher"][rows]
        (_, statistics), grads = gradients(number, params, statistics, x, y, teacher_logits)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), statistics, state), None

    params, statistics = problem.init(key)
    carry = (params, statistics, tx.init(params))
    return jax.lax.scan(step, carry, (jnp.arange(len(rows)), rows))[0][:2]


def measure(problem, variables, data):
    """The losses of a trained student, whole splits, BatchNorm with its running statistics."""
    splits = ("train", "validation", "test")
    ends = np.cumsum([len(data[f"{split} y"]) for split in splits])[:-1]
    logits, _ = problem.apply(*variables, jnp.concatenate([data[f"{split} x"] for split in splits]), train=False)
    train, validation, test = jnp.split(logits, ends)
    train_losses = losses_of(train, data["train y"], data["teacher"])
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    return {
        "train task": train_losses.task.mean(),
        "train KD": train_losses.kd.mean(),
        "validation loss": cross_entropy(validation, data["validation y"]).mean(),
        "test loss": cross_entropy(test, data["test y"]).mean(),
        "test accuracy": (test.argmax(-1) == data["test y"]).mean(),
    }


def batches(examples, steps, seed, batch=BATCH):
    """Rows of shape (steps, batch), epoch after epoch; the rows that fill no batch are left out."""
    rng, per_epoch = np.random.default_rng(seed), examples // batch
    orders = [rng.permutation(examples)[: per_epoch * batch] for _ in range(math.ceil(steps / per_epoch))]
    return np.concatenate(orders).reshape(-1, batch)[:steps].astype(np.int32)


# The digits.


def _digits():
    splits = digits.load()
    teacher, _ = digits.train_teacher(splits)
    data = {f"{name} {what}": part for name, pair in splits.items() for what, part in zip("xy", pair, strict=True)}
    return data | {"teacher": teacher}


def _mlp(params, statistics, x, train):
    del train
    return digits.mlp(params, x), statistics


# Fashion-MNIST.


def fashion(side, teacher_widths, examples=5000, teacher_epochs=10, wrong_labels=0.0):
    """Images of 28 pixels without the frame that 2 x `side` leaves over, in means of 2 x 2; and a trained CNN's logits.

    Of the labels to train and to validate on, those of the teacher too, the part `wrong_labels` is that of another class.
    """
    (pixels, labels), (test_pixels, test_labels) = fashion_mnist_idx(None).values()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(labels))[: examples + 2500]
    is_wrong = rng.random(len(labels)) < wrong_labels
    labels = np.where(is_wrong, (labels + rng.integers(1, 10, len(labels))) % 10, labels)
    frame = (28 - 2 * side) // 2

    def prepared(pixels):
        inner = pixels[:, frame : frame + 2 * side, frame : frame + 2 * side].astype(np.float32)
        return jnp.asarray(inner.reshape(-1, side, 2, side, 2).mean((2, 4)) / 128 - 1)[..., None]

    splits = {"train": order[:examples], "validation": order[examples:]}
    data = {f"{name} x": prepared(pixels[rows]) for name, rows in splits.items()} | {"test x": prepared(test_pixels)}
    data |= {f"{name} y": jnp.asarray(labels[rows], jnp.int32) for name, rows in splits.items()}
    data |= {"test y": jnp.asarray(test_labels, jnp.int32), "teacher": jnp.zeros((examples, 10))}

    teacher = cnn_problem(teacher_widths, side)
    rows = batches(examples, teacher_epochs * (examples // BATCH), seed=1000)
    variables = jax.jit(functools.partial(train, teacher, "ce", FORMS["exact"], 0.1))(jax.random.key(1000), rows, data)
    data["teacher"] = jnp.concatenate(
        [teacher.apply(*variables, part, train=False)[0] for part in jnp.split(data["train x"], 10)]
    )
    return data


def _init_cnn(widths, side, key):
    keys = jax.random.split(key, len(widths))
    channels = (1, *widths[:-1])
    params = {
        f"conv{i}": {
            "kernel": jax.random.normal(k, (9 * before, width)) * math.sqrt(2 / (9 * before)),
            "scale": jnp.ones(width),
            "bias": jnp.zeros(width),
        }
        for i, (k, before, width) in enumerate(zip(keys, channels, widths, strict=True))
    }
    pixels = math.ceil(side / 2 ** len(widths)) ** 2
    params["head"] = {"kernel": jnp.zeros((pixels * widths[-1], 10)), "bias": jnp.zeros(10)}
    statistics = {f"conv{i}": {"mean": jnp.zeros(width), "var": jnp.ones(width)} for i, width in enumerate(widths)}
    return params, statistics


def _cnn(params, statistics, x, train):
    """Convolutions of 3 x 3 with stride 2, each with BatchNorm and ReLU, and a linear head.

    A convolution is a product with patches: many seeds at once are then one batched product.
    """
    new = {}
    for name in statistics:
        layer = params[name]
        height, width = x.shape[1:3]
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [padded[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)]
        x = jnp.concatenate(shifted, axis=-1) @ layer["kernel"]
        now = {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2))}
        new[name] = jax.tree.map(lambda old, now: 0.9 * old + 0.1 * now, statistics[name], now)
        used = now if train else statistics[name]
        x = jax.nn.relu((x - used["mean"]) * jax.lax.rsqrt(used["var"] + 1e-5) * layer["scale"] + layer["bias"])
    return x.reshape(len(x), -1) @ params["head"]["kernel"] + params["head"]["bias"], new


def cnn_problem(widths, side, **fields):
    fields = {"optimizer": "sgd", "weight_decay": 5e-4, "learning_rate": 0.0, "epochs": 0, "seeds": 0} | fields
    fields = {"load": functools.partial(fashion, side, (32, 64))} | fields
    return Problem(init=functools.partial(_init_cnn, widths, side), apply=_cnn, **fields)


VIT_WIDTH, VIT_HEADS, VIT_DEPTH, VIT_PATCH, VIT_SIDE = 24, 2, 2, 4, 12


def _init_vit(key):
    keys = iter(jax.random.split(key, 2 + 4 * VIT_DEPTH))

    def dense(n_in, n_out):
        return {"kernel": jax.random.normal(next(keys), (n_in, n_out)) / math.sqrt(n_in), "bias": jnp.zeros(n_out)}

    def norm():
        return {"scale": jnp.ones(VIT_WIDTH), "bias": jnp.zeros(VIT_WIDTH)}

    tokens = (VIT_SIDE // VIT_PATCH) ** 2
    params = {
        "embed": dense(VIT_PATCH**2, VIT_WIDTH),
        "position": 0.02 * jax.random.normal(next(keys), (tokens, VIT_WIDTH)),
        "norm": norm(),
        "head": {"kernel": jnp.zeros((VIT_WIDTH, 10)), "bias": jnp.zeros(10)},
    }
    for i in range(VIT_DEPTH):
        params[f"block{i}"] = {
            "norm1": norm(),
            "qkv": dense(VIT_WIDTH, 3 * VIT_WIDTH),
            "out": dense(VIT_WIDTH, VIT_WIDTH),
            "norm2": norm(),
            "expand": dense(VIT_WIDTH, 2 * VIT_WIDTH),
            "project": dense(2 * VIT_WIDTH, VIT_WIDTH),
        }
    return params, {}


def _vit(params, statistics, x, train):
    """A vision transformer with the mean of the tokens as its feature."""
    del train

    def dense(layer, x):
        return x @ layer["kernel"] + layer["bias"]

    def norm(layer, x):
        return jax.nn.standardize(x, epsilon=1e-6) * layer["scale"] + layer["bias"]

    n = VIT_SIDE // VIT_PATCH
    x = x.reshape(-1, n, VIT_PATCH, n, VIT_PATCH).swapaxes(2, 3).reshape(-1, n * n, VIT_PATCH**2)
    x = dense(params["embed"], x) + params["position"]
    for i in range(VIT_DEPTH):
        block = params[f"block{i}"]
        qkv = dense(block["qkv"], norm(block["norm1"], x)).reshape(*x.shape[:2], 3, VIT_HEADS, VIT_WIDTH // VIT_HEADS)
        attended = jax.nn.dot_product_attention(*jnp.unstack(qkv, axis=2)).reshape(x.shape)
        x = x + dense(block["out"], attended)
        x = x + dense(block["project"], jax.nn.gelu(dense(block["expand"], norm(block["norm2"], x))))
    return dense(params["head"], norm(params["norm"], x).mean(1)), statistics


PROBLEMS = {
    "digits, MLP": Problem(
        "sgd",
        weight_decay=5e-4,
        learning_rate=0.02,
        epochs=120,
        seeds=20,
        init=lambda key: (digits.init_mlp(key, (64, 32, 10)), {}),
        apply=_mlp,
        load=_digits,
    ),
    "Fashion-MNIST, CNN": cnn_problem((8, 16), 14, learning_rate=0.04, epochs=6, seeds=5),
    "Fashion-MNIST, ViT": Problem(
        "adamw",
        weight_decay=0.05,
        learning_rate=8e-3,
        epochs=6,
        seeds=5,
        init=_init_vit,
        apply=_vit,
        load=functools.partial(fashion, VIT_SIDE, (32, 64)),
    ),
}


# Running and reading cells.


class Cells:
    """The cells of a problem, each a JSON file with what was measured for every seed."""

    def __init__(self, name, problem, directory, forms=FORMS):
        self.name, self._problem, self._directory, self._forms = name, problem, directory, forms
        self._runs, self._data = {}, None
        # What a cell depends on, besides its name and the code.
        fields = {field: value for field, value in problem._asdict().items() if not callable(value)}
        self._settings = json.loads(json.dumps([TEMPERATURE, WEIGHTS, DELTA, fields]))

    def read(self, method, form, learning_rate, steps):
        path = self._path(method, form, learning_rate, steps)
        found = json.loads(path.read_text()) if path.exists() else None
        return found if found and found.get("settings") == self._settings else None

    def get(self, method, form, learning_rate, steps):
        """The figures of a cell, which is run if it is not there."""
        found = self.read(method, form, learning_rate, steps)
        if found is None:
            found = {"settings": self._settings} | self._run(method, form, learning_rate, steps)
            path = self._path(method, form, learning_rate, steps)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(found))
            partial.rename(path)
        return found

    def steps(self, cost=1.0):
        """The steps that plain KD's FLOPs pay for."""
        return round(self._problem.epochs * (self._examples() // self._problem.batch) / cost)

    def _examples(self):
        """How many there are to train on. A file has it, so that nothing is loaded where all cells are there."""
        path = self._folder() / "examples.txt"
        if not path.exists():
            self._load()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{len(self._data['train y'])}\n")
        return int(path.read_text())

    def _folder(self):
        return self._directory / self.name.translate(str.maketrans(" ,", "__"))

    def _path(self, method, form, learning_rate, steps):
        name = f"{method} {form} lr {learning_rate:g} steps {steps}".translate(str.maketrans(" /,=", "____"))
        return self._folder() / f"{name}.json"

    def _load(self):
        if self._data is None:
            self._data = self._problem.load()

    def _run(self, method, form, learning_rate, steps):
        self._load()
        seeds = range(self._problem.seeds)
        if (method, form, steps) not in self._runs:
            self._runs.clear()  # of the last arm: compiled programs are large

            def one(learning_rate, key, rows, data):
                variables = train(self._problem, method, self._forms[form], learning_rate, key, rows, data)
                return measure(self._problem, variables, data)

            self._runs[method, form, steps] = jax.jit(jax.vmap(one, in_axes=(None, 0, 0, None)))
        examples, batch = len(self._data["train y"]), self._problem.batch
        rows = jnp.stack([batches(examples, steps, seed, batch) for seed in seeds])
        keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        found = self._runs[method, form, steps](learning_rate, keys, rows, self._data)
        return {name: np.asarray(found[name], float).tolist() for name in MEASURES}


def search(cells, method, form, start, steps=None):
    """The learning rate with the lowest mean validation loss, between half and twice of it; the search begins at `start`."""
    tried, steps = {}, steps or cells.steps()

    def validation(rate):
        if rate not in tried:
            mean = np.mean(cells.get(method, form, rate, steps)["validation loss"])
            tried[rate] = mean if np.isfinite(mean) else np.inf
        return tried[rate]

    best = start
    while True:
        while validation(best) == np.inf:
            best /= 2
        better = min([best, best / 2, best * 2], key=validation)
        if better == best:
            return best
        best = better


def run(name, problem, directory, teacher, forms):
    """All cells of a problem: for each arm its cost, its learning rate, and the figures at equal steps and equal cost."""
    cells, results = Cells(name, problem, directory), {}
    for method, form in arms(forms):
        start = results.get((method, "exact"), {"learning rate": problem.learning_rate})["learning rate"]
        family = form.partition(",")[0]
        before = [r["learning rate"] for (m, f), r in results.items() if m == method and f.startswith(family)]
        rate = search(cells, method, form, (before or [start])[-1])
        price = cost(problem, method, FORMS[form], teacher)
        results[method, form] = {
            "cost": price,
            "learning rate": rate,
            "equal steps": cells.get(method, form, rate, cells.steps()),
            "equal cost": cells.get(method, form, rate, cells.steps(price)),
        }
        print(f"{name}: {method}, {form}: learning rate {rate:g}, cost {price:.2f}", flush=True)
    return results


SHOWN = ("train task", "train KD", "test loss", "test accuracy")


def figure(values):
    """Mean and standard error."""
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.4f}"


def row(cells):
    print("| " + " | ".join(cells) + " |")


def paired(ours, theirs):
    """By how much our figures are larger, paired by seed: the mean, its standard error and the p-value."""
    by_seed = np.subtract(ours, theirs)
    p = stats.ttest_1samp(by_seed, 0).pvalue if by_seed.any() else 1.0
    return by_seed.mean(), by_seed.std(ddof=1) / len(by_seed) ** 0.5, p


def holm(found):
    """The same with p-values that Holm's method corrects for their number; the smallest comes first."""
    order = sorted(found, key=lambda key: found[key][-1])
    corrected = np.minimum(1, np.maximum.accumulate([found[k][-1] * (len(order) - i) for i, k in enumerate(order)]))
    return {key: (*found[key][:-1], p) for key, p in zip(order, corrected, strict=True)}


def differences(results, when, base):
    """How much larger an arm's test loss is than that of the arm `base(arm)`, for the arms that have one."""
    pairs = {arm: base(arm) for arm in results if base(arm) in results and base(arm) != arm}
    loss = {arm: result[when]["test loss"] for arm, result in results.items()}
    return holm({arm: paired(loss[arm], loss[other]) for arm, other in pairs.items()})


def table(name, results, when):
    """One row for each arm, with how its test loss differs from plain KD's, and from its own with exact gradients."""
    seeds = len(results["kd", "exact"][when]["test loss"])
    print(f"\n{name}, {when}, {seeds} seeds, mean ± standard error; *: a paired difference with p < 0.05, corrected\n")
    compared = {
        "less that of KD": differences(results, when, lambda arm: ("kd", "exact")),
        "less that of exact gradients": differences(results, when, lambda arm: (arm[0], "exact")),
    }
    row(["method", "gradients", "cost", "learning rate", *SHOWN, *compared])
    row(["---"] * (len(SHOWN) + len(compared) + 4))
    for (method, form), result in results.items():
        figures = [figure(result[when][measure]) for measure in SHOWN]
        for found in compared.values():
            mean, error, p = found.get((method, form), (0, 0, 1))
            figures.append(f"{mean:+.4f} ± {error:.4f}{' *' if p < 0.05 else ''}" if error else "")
        label = methods.STYLES[method].label
        row([label, form, f"{result['cost']:.2f}", f"{result['learning rate']:g}", *figures])


MARKERS = {"exact": "*", "difference": "D", "losses": "o", "alternating": "X", "examples": "s"}
PANELS = (
    ("train task", "equal steps", "train task loss"),
    ("train KD", "equal steps", "train KD loss"),
    ("test accuracy", "equal steps", "test accuracy"),
    ("test accuracy", "equal cost", "test accuracy at equal cost"),
)


def picture(results, path):
    """Losses and accuracies against the cost of a step: one row of panels for each problem."""
    figure_ = Figure(figsize=(15, 3.6 * len(results) + 0.9), layout="constrained")
    FigureCanvasAgg(figure_)
    grid = figure_.subplots(len(results), len(PANELS), squeeze=False)
    for axes_of_row, (name, arms_) in zip(grid, results.items(), strict=True):
        for axes, (measure, when, label) in zip(axes_of_row, PANELS, strict=True):
            axes.set(xlabel="cost of a step (plain KD: 1)", ylabel=label, title=name)
            axes.grid(True, alpha=0.2)
            axes.spines[["top", "right"]].set_visible(False)
            for method, line in zip(METHODS, ("-", "--", ":"), strict=True):
                for family, marker in MARKERS.items():
                    points = [
                        (arm["cost"], np.mean(arm[when][measure]), np.std(arm[when][measure], ddof=1))
                        for (m, form), arm in arms_.items()
                        if m == method and form.startswith(family)
                    ]
                    if points:
                        x, y, deviation = zip(*points, strict=True)
                        error = np.array(deviation) / len(arms_["kd", "exact"][when][measure]) ** 0.5
                        color = methods.STYLES[method].color
                        axes.errorbar(
                            x, y, error, color=color, marker=marker, linestyle=line, linewidth=1, markersize=6
                        )
            ce = arms_["ce", "exact"]
            if measure != "train KD":  # far above all that have a teacher
                axes.plot(ce["cost"], np.mean(ce[when][measure]), color="black", marker="P", markersize=7)
            exact = [np.mean(arm[when][measure]) for (m, form), arm in arms_.items() if form == "exact" and m != "ce"]
            shown = [np.mean(arm[when][measure]) for (m, _), arm in arms_.items() if m != "ce" or measure != "train KD"]
            if measure == "test accuracy":  # forms that fail would leave nothing to see of the others
                axes.set_ylim(max(min(shown), min(exact) - 0.06) - 0.005, max(shown) + 0.005)
            else:
                axes.set_ylim(0.9 * min(shown), min(1.1 * max(shown), 3 * max(exact)))
    handles = [
        Line2D([], [], color=methods.STYLES[m].color, linestyle=line, label=methods.STYLES[m].label)
        for m, line in zip(METHODS, ("-", "--", ":"), strict=True)
    ]
    handles += [Line2D([], [], color="gray", marker=mark, linestyle="", label=name) for name, mark in MARKERS.items()]
    handles.append(Line2D([], [], color="black", marker="P", linestyle="", label="CE, no teacher"))
    figure_.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure_.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=pathlib.Path, default=pathlib.Path("runs/sampled_gradients"))
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--teacher", type=float, default=7.2, help="T / F, the teacher's forward pass in the student's")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="'exact' is to compare with")
    parser.add_argument("--seeds", type=int, help="of every problem; at least 2: the standard error needs them")
    parser.add_argument("--epochs", type=int, help="of every problem")
    parser.add_argument("--json", type=pathlib.Path, help="also write every seed's figures to this file")
    parser.add_argument("--picture", type=pathlib.Path, help="where to draw the picture; default: in the directory")
    args = parser.parse_args(argv)

    results = {}
    for name in args.problems:
        problem = PROBLEMS[name]
        problem = problem._replace(seeds=args.seeds or problem.seeds, epochs=args.epochs or problem.epochs)
        results[name] = run(name, problem, args.directory, args.teacher, args.forms)
    for name, arms_ in results.items():
        for when in ("equal steps", "equal cost"):
            table(name, arms_, when)
    args.directory.mkdir(parents=True, exist_ok=True)
    picture(results, args.picture or args.directory / "sampled_gradients.png")
    if args.json:
        report = {name: {f"{m}, {form}": arm for (m, form), arm in found.items()} for name, found in results.items()}
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
