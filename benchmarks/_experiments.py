"""The protocol of the comparisons: one student per arm and seed, each arm at the learning rate that suits it.

A cosine schedule; a learning rate for each arm, of a common grid (a factor of 2 apart): the one whose mean validation loss is
lower than at half and at twice of it.  All arms have the same batches and initial weights, seed by seed.

Every cell (an arm, a learning rate, a number of steps) is one JSON file of the directory: a benchmark goes on where it was
stopped, and with all cells there it only prints.  A cell of other settings is run anew; one of other code is not.
"""

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

import dot_optax
from dot_optax import PerLoss
from examples.distill import methods
from examples.distill.configs import default

BATCH, TEMPERATURE, WEIGHTS, DELTA = 64, 4.0, PerLoss(0.1, 0.9), 0.075


class Problem(NamedTuple):
    """A student to distil."""

    optimizer: str
    weight_decay: float
    learning_rate: float  # where the search begins
    epochs: int
    seeds: int
    init: Callable[[Any], tuple[Any, Any]]  # key -> params, statistics
    apply: Callable[..., tuple[Any, Any]]  # (params, statistics, x, train) -> logits, statistics
    load: Callable[[], dict[str, Any]]  # x, y of the splits, and the teacher's logits of the training split
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
    watch: Callable[[Any], dict[str, Any]] = lambda state: {}  # what to note of the optimizer's state at each step


def _exact(f):
    exact = dot_optax.value_and_grads(f, has_aux=True)
    return lambda step, *args: exact(*args)


EXACT = Form(_exact, lambda t, n: t + 1 + 2 * n)


def recipe(problem, learning_rate, steps, weights=WEIGHTS, deltas=None, **options):
    config = default().optimizer
    config.name, config.weight_decay, config.delta = problem.optimizer, problem.weight_decay, DELTA
    config.update(options)
    return methods.Recipe(config, weights, schedule(learning_rate, steps), steps_per_epoch=1, deltas=deltas)


def optimizer_of(problem, method, learning_rate, steps):
    return methods.METHODS[method](recipe(problem, learning_rate, steps))


def schedule(learning_rate, steps):
    """A twentieth of the steps to warm up, and a cosine down to 0; the rate may be traced."""
    factor = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 20, steps)
    return lambda count: learning_rate * factor(count)


def train(problem, method, form, learning_rate, key, rows, data):
    """Trains one student on the batches `rows` of shape (steps, batch).

    Returns its parameters and statistics, and what the form watches, stacked over the steps.
    """
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
        return (optax.apply_updates(params, updates), statistics, state), form.watch(state)

    params, statistics = problem.init(key)
    carry = (params, statistics, tx.init(params))
    (params, statistics, _), watched = jax.lax.scan(step, carry, (jnp.arange(len(rows)), rows))
    return (params, statistics), watched


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


# Running and reading cells.


class Cells:
    """The cells of a problem, each a JSON file with what was measured for every seed."""

    def __init__(self, name, problem, directory, forms):
        self.name, self._problem, self._directory, self._forms = name, problem, directory, forms
        self._runs, self._data = {}, None
        # What a cell depends on, besides its name and the code.
        fields = {field: value for field, value in problem._asdict().items() if not callable(value)}
        self._settings = json.loads(json.dumps([TEMPERATURE, WEIGHTS, DELTA, fields]))

    def read(self, method, form, learning_rate, steps):
        path = self._path(method, form, learning_rate, steps)
        found = json.loads(path.read_text()) if path.exists() else {}
        return found if found.pop("settings", None) == self._settings else None

    def get(self, method, form, learning_rate, steps):
        """The figures of a cell, which is run if it is not there."""
        found = self.read(method, form, learning_rate, steps)
        if found is None:
            found = self._run(method, form, learning_rate, steps)
            path = self._path(method, form, learning_rate, steps)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps({"settings": self._settings} | found))
            partial.rename(path)
        return found

    def steps(self, cost=1.0):
        """The steps that plain KD's FLOPs pay for."""
        return round(self._problem.epochs * (self._examples() // self._problem.batch) / cost)

    def classes(self):
        return self._number("classes", lambda data: data["teacher"].shape[-1])

    def _examples(self):
        return self._number("examples", lambda data: len(data["train y"]))

    def _number(self, name, of):
        """A number that the data has. A file has it as well, so that nothing is loaded where all cells are there."""
        path = self._folder() / f"{name}.txt"
        if not path.exists():
            self._load()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{of(self._data)}\n")
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
                variables, watched = train(self._problem, method, self._forms[form], learning_rate, key, rows, data)
                medians = {name: jnp.nanmedian(values) for name, values in watched.items()}
                return measure(self._problem, variables, data) | medians

            self._runs[method, form, steps] = jax.jit(jax.vmap(one, in_axes=(None, 0, 0, None)))
        examples, batch = len(self._data["train y"]), self._problem.batch
        rows = jnp.stack([batches(examples, steps, seed, batch) for seed in seeds])
        keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        found = self._runs[method, form, steps](learning_rate, keys, rows, self._data)
        return {name: np.asarray(values, float).tolist() for name, values in found.items()}


def search(cells, method, form, start, steps=None, further=()):
    """The learning rate with the lowest mean validation loss, between half and twice of it; the search begins at `start`.

    There may be more than one such rate.  So it also looks at the multiples `further` of the one that it found, and goes on
    from a better one.  Rates at which students are no better than a guess are left out: otherwise the best of the failed ones
    could be chosen.
    """
    tried, steps, failed = {}, steps or cells.steps(), np.log(cells.classes())

    def validation(rate):
        if rate not in tried:
            mean = np.mean(cells.get(method, form, rate, steps)["validation loss"])
            tried[rate] = mean if mean < failed else np.inf
        return tried[rate]

    best = start
    while validation(best) == np.inf:
        if best < 1e-6:
            raise RuntimeError(f"{method}, {form}: no learning rate makes students better than a guess")
        best /= 2
    while True:
        better = min([best, best / 2, best * 2], key=validation)
        if better == best:
            better = min([best, *(best * factor for factor in further)], key=validation)
        if better == best:
            return best
        best = better


# Statistics and tables.


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
    return by_seed.mean(), by_seed.std(ddof=1) / len(by_seed) ** 0.5, 1.0 if np.isnan(p) else p  # of a seed that failed


def holm(found):
    """The same with p-values that Holm's method corrects for their number; the smallest comes first."""
    order = sorted(found, key=lambda key: found[key][-1])
    corrected = np.minimum(1, np.maximum.accumulate([found[k][-1] * (len(order) - i) for i, k in enumerate(order)]))
    return {key: (*found[key][:-1], p) for key, p in zip(order, corrected, strict=True)}
