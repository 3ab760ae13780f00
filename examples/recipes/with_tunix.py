"""Tunix's `DistillationTrainer` with DOT: gradient accumulation, checkpoints and resuming included.

Three things of it know only one loss. Its strategy returns a sum: ours returns the container. Its train step
differentiates the sum: ours differentiates each loss, in one forward pass. Its constructor sees to the accumulation if
`gradient_accumulation_steps` is set: ours wraps the optimizer with `dot_optax.wrap` and does not tell.

Tunix 0.1.7 accumulates by wrapping the optimizer in `optax.MultiSteps`. Its main branch (0.1.8) has an accumulator
instead, one tree like the parameters, which the train step gets; there the step has one more override.

    pip install google-tunix==0.1.7
    python -m examples.recipes.with_tunix

It checks itself against NumPy, and stops with an error if they differ. With both versions it printed:

    at once: 10 updates, largest deviation from NumPy 1.0e-07
    restored after 4 updates, 8 batches
    with a stop: 10 updates, largest deviation from NumPy 1.0e-07
"""

import dataclasses
import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.distillation.distillation_trainer import DistillationTrainer, TrainingConfig, TrainingInput
from tunix.distillation.strategies import LogitStrategy
from tunix.sft import peft_trainer

import dot_optax
from examples.recipes import numpy_reference
from examples.recipes.problem import CLASSES, FEATURES, HIDDEN, KD_WEIGHT, LEARNING_RATE, TEACHER, TEMPERATURE, batches


class PerLossStrategy(LogitStrategy):
    """Tunix's losses with Tunix's weights, not summed."""

    def compute_loss(self, student_output, teacher_output, labels):
        """The container of losses, and Tunix's metrics."""
        _, metrics = super().compute_loss(student_output, teacher_output, labels)
        task, kd = (1.0 - self.alpha) * metrics["distill/hard_loss"], self.alpha * metrics["distill/soft_loss"]
        return dot_optax.PerLoss(task=task, kd=kd), metrics


class PerLossTrainer(DistillationTrainer):
    """Tunix's trainer for an optimizer that takes a container of gradients."""

    def __init__(self, student_model, teacher_model, strategy, optimizer, training_config):
        every = training_config.get_with_default("gradient_accumulation_steps", 1)
        optimizer = dot_optax.wrap(functools.partial(optax.MultiSteps, every_k_schedule=every), optimizer)
        not_accumulating = dataclasses.replace(training_config, gradient_accumulation_steps=None)
        super().__init__(student_model, teacher_model, strategy, optimizer, not_accumulating)
        # The constructor has made the optimizer, and restored it; the loop may know how many batches make an update.
        self.config = training_config
        self._iter_steps = self._train_steps * every

    def _train_step(self, model, optimizer, inputs):
        inputs = self.gen_model_input_fn(inputs)
        graphdef, params, rest = nnx.split(model, optimizer.wrt, ...)

        def loss_fn(params):
            copy = nnx.merge(graphdef, params, rest, copy=True)
            losses, metrics = self.loss_fn(copy, **inputs)
            return losses, (metrics, nnx.state(copy, nnx.Not(optimizer.wrt)))

        (losses, (metrics, rest)), grads = dot_optax.value_and_grads(loss_fn, has_aux=True)(params)
        nnx.update(model, rest)
        optimizer.update(model, grads)
        return sum(losses), metrics, optax.global_norm(jax.tree.map(jnp.add, *grads))


class PerLossTrainerOfMain(PerLossTrainer):
    """The same for Tunix's main branch, whose accumulator stays empty: the optimizer accumulates, as with 0.1.7."""

    def _train_step(self, model, optimizer, grad_accumulator, inputs, is_update_step):
        return super()._train_step(model, optimizer, inputs)


class Student(nnx.Module):
    """Two layers with BatchNorm between them."""

    def __init__(self, rngs: nnx.Rngs):
        self.body = nnx.Linear(FEATURES, HIDDEN, rngs=rngs)
        self.norm = nnx.BatchNorm(HIDDEN, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.body(x))))


def make_trainer(folder: str | None, max_steps: int) -> PerLossTrainer:
    """A trainer that accumulates two batches. Our points stand for the tokens, and their labels for the mask."""
    teacher = nnx.Linear(FEATURES, CLASSES, use_bias=False, rngs=nnx.Rngs(0))
    teacher.kernel[...] = TEACHER
    strategy = PerLossStrategy(
        student_forward_fn=lambda model, input_tokens, input_mask: model(input_tokens),
        teacher_forward_fn=lambda model, input_tokens, input_mask: model(input_tokens),
        labels_fn=lambda input_tokens, input_mask: jax.nn.one_hot(input_mask, CLASSES),
        temperature=TEMPERATURE,
        alpha=KD_WEIGHT,
    )
    config = TrainingConfig(
        eval_every_n_steps=1000, max_steps=max_steps, gradient_accumulation_steps=2, checkpoint_root_directory=folder
    )
    optimizer = dot_optax.dot(LEARNING_RATE)
    of_main = hasattr(peft_trainer, "GradientAccumulator")
    trainer = PerLossTrainerOfMain if of_main else PerLossTrainer
    return trainer(Student(nnx.Rngs(0)), teacher, strategy, optimizer, config)


def arrays(model: Student) -> dict[str, np.ndarray]:
    """The parameters under the names of `numpy_reference`."""
    layers = {"1": model.body, "2": model.head}
    theta = {f"w{i}": layer.kernel[...] for i, layer in layers.items()}
    theta |= {f"b{i}": layer.bias[...] for i, layer in layers.items()}
    return theta | {"scale": model.norm.scale[...], "bias": model.norm.bias[...]}


def main() -> None:
    """Trains 10 updates of two batches, at once, and with a stop after 4; compares both with NumPy."""
    data = [TrainingInput(input_tokens=x, input_mask=labels) for x, labels, _ in batches(20)]
    expected = numpy_reference.train(arrays(Student(nnx.Rngs(0))), batches(20), every=2)
    trainer = make_trainer(None, max_steps=10)
    trainer.train(data)
    report("at once", trainer, expected)
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(folder, max_steps=4).train(data)
        trainer = make_trainer(folder, max_steps=10)
        print(f"restored after {trainer.train_steps} updates, {trainer.iter_steps} batches")
        trainer.train(data)
    report("with a stop", trainer, expected)


def report(name: str, trainer: PerLossTrainer, expected: dict[str, np.ndarray]) -> None:
    """Prints the deviation from NumPy, and stops if it is more than float32 rounding makes it."""
    off = numpy_reference.deviation(arrays(trainer.model), expected)
    print(f"{name}: {trainer.train_steps} updates, largest deviation from NumPy {off:.1e}")
    if off > 1e-5:
        raise SystemExit("Tunix and NumPy differ")


if __name__ == "__main__":
    main()
