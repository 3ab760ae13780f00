"""A trainer that accumulates gradients by wrapping its optimizer in `optax.MultiSteps` itself, as Tunix's does.

`optax.MultiSteps(dot(...))` cannot work: it keeps one tree, of the parameters' structure, and meets a container of two.
Do its wrapping for it: `wrap(MultiSteps)` accumulates the gradient of each loss. There are two ways:

1. Tell the constructor that there is nothing to accumulate, and give it an optimizer that accumulates. A checkpoint
   that the constructor restores then has the right structure. If the trainer counts steps, it counts batches.
2. Let the constructor wrap what it likes, and replace its optimizer. Then restore a checkpoint only afterwards.

And the step that differentiates one summed loss is overridden, to differentiate each.

    python -m examples.recipes.with_accumulating_trainer
"""

import functools
from collections.abc import Iterable

import numpy as np
import optax
from flax import nnx

import dot_optax
from examples.recipes import numpy_reference
from examples.recipes.problem import CLASSES, FEATURES, HIDDEN, LEARNING_RATE, batches, losses


class Trainer:
    """Stands for a trainer that you cannot change."""

    def __init__(self, model: nnx.Module, optimizer: optax.GradientTransformation, accumulate: int | None = None):
        if accumulate is not None:
            optimizer = optax.MultiSteps(optimizer, accumulate)
        self.model, self.optimizer = model, nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    def train_step(self, model: nnx.Module, optimizer: nnx.Optimizer, *batch) -> None:
        """One batch."""
        optimizer.update(model, nnx.grad(lambda m: sum(losses(m(batch[0]), *batch[1:])))(model))

    def train(self, data: Iterable) -> None:
        """All batches."""
        step = nnx.jit(self.train_step)
        for batch in data:
            step(self.model, self.optimizer, *batch)


class PerLossTrainer(Trainer):
    """The same trainer with one gradient for each loss."""

    def train_step(self, model: nnx.Module, optimizer: nnx.Optimizer, *batch) -> None:
        """One batch: one forward pass, and what it changed in the model (BatchNorm, Dropout's counters) put back."""
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def loss_fn(params):
            copy = nnx.merge(graphdef, params, rest, copy=True)
            return losses(copy(batch[0]), *batch[1:]), nnx.state(copy, nnx.Not(nnx.Param))

        (_, rest), grads = dot_optax.value_and_grads(loss_fn, has_aux=True)(params)
        nnx.update(model, rest)
        optimizer.update(model, grads)


class Student(nnx.Module):
    """Two layers with BatchNorm between them."""

    def __init__(self, rngs: nnx.Rngs):
        self.body = nnx.Linear(FEATURES, HIDDEN, rngs=rngs)
        self.norm = nnx.BatchNorm(HIDDEN, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.body(x))))


dot = dot_optax.dot(LEARNING_RATE)
accumulating = dot_optax.wrap(functools.partial(optax.MultiSteps, every_k_schedule=2), dot)


def wrapped_before() -> Trainer:
    """The first way: the constructor is given an optimizer that accumulates."""
    return PerLossTrainer(Student(nnx.Rngs(0)), accumulating, accumulate=None)


def wrapped_after() -> Trainer:
    """The second way: the optimizer that the constructor made is replaced."""
    trainer = PerLossTrainer(Student(nnx.Rngs(0)), optax.sgd(0.0), accumulate=2)
    trainer.optimizer = nnx.Optimizer(trainer.model, accumulating, wrt=nnx.Param)
    return trainer


def wrapped_by_the_trainer() -> Trainer:
    """What does not work: the error names the container."""
    return PerLossTrainer(Student(nnx.Rngs(0)), dot, accumulate=2)


def arrays(model: Student) -> dict[str, np.ndarray]:
    """The parameters under the names of `numpy_reference`."""
    layers = {"1": model.body, "2": model.head}
    theta = {f"w{i}": layer.kernel[...] for i, layer in layers.items()}
    theta |= {f"b{i}": layer.bias[...] for i, layer in layers.items()}
    return theta | {"scale": model.norm.scale[...], "bias": model.norm.bias[...]}


def main() -> None:
    """Trains in both ways, and compares with NumPy; then fails in the way that Optax fails."""
    expected = numpy_reference.train(arrays(wrapped_before().model), batches(20), every=2)
    for way in (wrapped_before, wrapped_after):
        trainer = way()
        trainer.train(batches(20))
        off = numpy_reference.deviation(arrays(trainer.model), expected)
        print(f"{way.__name__}: largest deviation from NumPy {off:.1e}")
    try:
        wrapped_by_the_trainer().train(batches(20))
    except ValueError as error:
        print("wrapped_by_the_trainer:", str(error).splitlines()[0])


if __name__ == "__main__":
    main()
