"""Kauldron's `MultiTrainStep` and dot_optax side by side: the same momenta, the same numbers.

Kauldron's contrib has one optimizer for each loss: `multi_optimizer(task=optax.sgd(...), kd=optax.sgd(...))`. Each has
its own momentum, and the updates are summed: with SGD this is DOT. If you use Kauldron and need no more, use it.

What it traces: for each loss a forward pass of its own, and in it once more the gradients of the losses before it,
which a loss may read. That is 3 forward passes for 2 losses and 7 for 3, instead of 1. Here XLA merges them: the
compiled step has as many matrix products as ours. All start from the same statistics and seeds: BatchNorm moves once.

What it has no place for is anything over both losses, because each optimizer sees one: a clip norm of both gradients
(`joint`), or a check that skips the step for both if one gradient is not finite (`wrap`).

    pip install uv && uv pip install kauldron==1.4.2
    python -m examples.recipes.with_kauldron

It checks itself, and stops with an error if the two differ. It printed:

    with_kauldron: largest deviation from NumPy 5.7e-07
    with_dot_optax: largest deviation from NumPy 4.5e-07
    BatchNorm's means differ by 7.5e-09
    Kauldron, 2 losses: 3 forward passes traced, 8 matrix products compiled
    Kauldron, 3 losses: 7 forward passes traced, 8 matrix products compiled
    dot_optax, 2 losses: 1 forward passes traced, 8 matrix products compiled
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np
import optax
from kauldron import kd
from kauldron.contrib.train import MultiTrainStep, multi_optimizer

import dot_optax
from examples.recipes import numpy_reference
from examples.recipes.problem import (
    CLASSES,
    HIDDEN,
    KD_WEIGHT,
    LEARNING_RATE,
    TASK_WEIGHT,
    TEMPERATURE,
    batches,
    losses,
)

traced = []


class Student(nn.Module):
    """Two layers with BatchNorm between them; it notes that it is traced."""

    x: kd.kontext.Key = "batch.x"

    @nn.compact
    def __call__(self, x):
        traced.append(1)
        h = nn.BatchNorm(use_running_average=False, name="norm")(nn.Dense(HIDDEN, name="body")(x))
        return nn.Dense(CLASSES, name="head")(nn.relu(h))


@dataclasses.dataclass(kw_only=True, frozen=True, eq=True)
class TaskLoss(kd.losses.Loss):
    """The task loss of each example."""

    logits: kd.kontext.Key = "preds"
    labels: kd.kontext.Key = "batch.labels"

    def get_values(self, logits, labels):
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


@dataclasses.dataclass(kw_only=True, frozen=True, eq=True)
class DistillationLoss(kd.losses.Loss):
    """The distillation loss of each example."""

    logits: kd.kontext.Key = "preds"
    teacher_logits: kd.kontext.Key = "batch.teacher_logits"

    def get_values(self, logits, teacher_logits):
        return dot_optax.losses.kd_loss(logits, teacher_logits, TEMPERATURE)


def with_kauldron(model: Student, variables: dict, steps: int) -> dict:
    """The variables after training with one `optax.sgd` for each loss."""
    optimizers = {
        "task": optax.sgd(LEARNING_RATE, momentum=0.825),
        "kd": optax.sgd(LEARNING_RATE, momentum=0.975),
    }
    train_step, state = kauldron_step(model, variables, optimizers)
    for batch in batches(steps):
        state, _ = train_step.step(state, named(batch))
    return {"params": state.params} | state.collections


def kauldron_step(model: Student, variables: dict, optimizers: dict) -> tuple[MultiTrainStep, kd.train.TrainState]:
    """What `kd.train.Trainer` makes of a config: the step and its first state. A third loss is the task's again."""
    optimizer = multi_optimizer(**optimizers)
    losses = {
        "task": TaskLoss(weight=TASK_WEIGHT),
        "kd": DistillationLoss(weight=KD_WEIGHT),
        "third": TaskLoss(weight=TASK_WEIGHT),
    }
    train_step = MultiTrainStep(
        model=model,
        optimizer=optimizer,
        rng_streams=kd.train.RngStreams((), seed=0),
        sharding=kd.sharding.ShardingStrategy(),
        init_transform=kd.ckpts.NoopTransform(),
        aux=kd.train.Auxiliaries(losses={name: losses[name] for name in optimizers}, metrics={}, summaries={}),
    )
    state = kd.train.TrainState(
        step=jax.numpy.asarray(0),
        params=variables["params"],
        collections={"batch_stats": variables["batch_stats"]},
        opt_state=optimizer.init(variables["params"]),
    )
    return train_step, state


def named(batch: tuple) -> dict:
    """A batch by the names that the losses look for."""
    return dict(zip(("x", "labels", "teacher_logits"), batch, strict=True))


def with_dot_optax(model: Student, variables: dict, steps: int) -> dict:
    """The same with one optimizer, of both gradients of one forward pass."""
    train_step, state = dot_optax_step(model, variables)
    for batch in batches(steps):
        state = train_step(*state, *batch)
    return {"params": state[0], "batch_stats": state[1]}


def dot_optax_step(model: Student, variables: dict) -> tuple[Callable, tuple]:
    """The step and its first state: parameters, statistics, optimizer state."""
    optimizer = dot_optax.dot(LEARNING_RATE)

    @jax.jit
    def train_step(params, batch_stats, opt_state, x, labels, teacher_logits):
        def loss_fn(params):
            logits, updated = model.apply({"params": params, "batch_stats": batch_stats}, x, mutable=["batch_stats"])
            return losses(logits, labels, teacher_logits), updated["batch_stats"]

        (_, new_batch_stats), grads = dot_optax.value_and_grads(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), new_batch_stats, opt_state

    return train_step, (variables["params"], variables["batch_stats"], optimizer.init(variables["params"]))


def arrays(params: dict) -> dict[str, np.ndarray]:
    """The parameters under the names of `numpy_reference`."""
    theta = {f"w{i}": params[name]["kernel"] for i, name in ((1, "body"), (2, "head"))}
    theta |= {f"b{i}": params[name]["bias"] for i, name in ((1, "body"), (2, "head"))}
    return theta | params["norm"]


def count(lower: Callable[[], jax.stages.Lowered]) -> str:
    """How often a step traces the network, and how many matrix products its compiled program has."""
    traced.clear()
    products = lower().compile().as_text().count(" dot(")
    return f"{len(traced)} forward passes traced, {products} matrix products compiled"


def main() -> None:
    """Trains with both, compares both with NumPy, and counts what each traces and compiles."""
    model, batch = Student(), batches(1)[0]
    variables = jax.tree.map(np.asarray, model.init(jax.random.key(0), batch[0]))
    expected = numpy_reference.train(arrays(variables["params"]), batches(20))
    means = []
    for train in (with_kauldron, with_dot_optax):
        trained = train(model, jax.tree.map(jax.numpy.asarray, variables), steps=20)
        off = numpy_reference.deviation(arrays(trained["params"]), expected)
        print(f"{train.__name__}: largest deviation from NumPy {off:.1e}")
        if off > 1e-5:
            raise SystemExit(f"{train.__name__} and NumPy differ")
        means.append(trained["batch_stats"]["norm"]["mean"])
    print(f"BatchNorm's means differ by {np.abs(means[0] - means[1]).max():.1e}")

    for names in (("task", "kd"), ("task", "kd", "third")):
        step, state = kauldron_step(model, variables, {name: optax.sgd(0.1, momentum=0.9) for name in names})
        lower = functools.partial(MultiTrainStep.step.lower, step, state, named(batch))
        print(f"Kauldron, {len(names)} losses: {count(lower)}")
    train_step, state = dot_optax_step(Student(), variables)
    print(f"dot_optax, 2 losses: {count(functools.partial(train_step.lower, *state, *batch))}")


if __name__ == "__main__":
    main()
