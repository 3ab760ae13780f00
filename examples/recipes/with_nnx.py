"""Flax NNX: what changes in the train step of Flax's MNIST tutorial, to train with a teacher and one gradient per loss.

As there, the network has BatchNorm and Dropout, whose `nnx.Rngs` is an argument, and metrics are updated in place.
`dot_optax.nnx.value_and_grads` stands for `nnx.value_and_grad`, and the teacher is one more argument: a module that is
captured would be a constant of the compiled program. `loss_fn`, and with it the evaluation, stays as it is.

    python -m examples.recipes.with_nnx
"""

import jax
import numpy as np
import optax
from flax import nnx

import dot_optax.nnx
from examples.recipes import numpy_reference
from examples.recipes.problem import (
    BATCH,
    CLASSES,
    FEATURES,
    HIDDEN,
    KD_WEIGHT,
    LEARNING_RATE,
    TASK_WEIGHT,
    TEACHER,
    TEMPERATURE,
    batches,
)


class Student(nnx.Module):
    """Two layers with BatchNorm and Dropout between them."""

    def __init__(self, rngs: nnx.Rngs):
        self.body = nnx.Linear(FEATURES, HIDDEN, rngs=rngs)
        self.norm = nnx.BatchNorm(HIDDEN, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)
        self.head = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        return self.head(self.dropout(nnx.relu(self.norm(self.body(x))), rngs=rngs))


def make_teacher() -> nnx.Module:
    """The teacher of `problem`, but with BatchNorm and Dropout, which do nothing in evaluation mode."""
    rngs = nnx.Rngs(0)
    linear = nnx.Linear(FEATURES, CLASSES, use_bias=False, rngs=rngs)
    linear.kernel[...] = TEACHER
    teacher = nnx.Sequential(linear, nnx.BatchNorm(CLASSES, epsilon=0.0, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
    teacher.eval()
    return teacher


def loss_fn(model, rngs, batch):
    """The task's loss, and the logits; the evaluation needs no more."""
    logits = model(batch["image"], rngs)
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    return loss, logits


def losses_fn(model, rngs, batch, teacher):
    """Both losses for the optimizer, and what the metrics record."""
    ce, logits = loss_fn(model, rngs, batch)
    kd = dot_optax.losses.kd_loss(logits, teacher(batch["image"]), TEMPERATURE).mean()
    return dot_optax.PerLoss(task=TASK_WEIGHT * ce, kd=KD_WEIGHT * kd), (ce, logits)


@nnx.jit
def train_step(model, optimizer, metrics, rngs, batch, teacher):
    """One step, in place."""
    grad_fn = dot_optax.nnx.value_and_grads(losses_fn, has_aux=True)
    (_, (loss, logits)), grads = grad_fn(model, rngs, batch, teacher)
    metrics.update(loss=loss, logits=logits, labels=batch["label"])
    optimizer.update(model, grads)


def train(steps: int) -> tuple[Student, nnx.MultiMetric, nnx.Rngs, nnx.Module]:
    """A trained student, the metrics over all steps, and what else took part."""
    model, rngs, teacher = Student(nnx.Rngs(0)), nnx.Rngs(dropout=1), make_teacher()
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))
    optimizer = nnx.Optimizer(model, dot_optax.dot(LEARNING_RATE), wrt=nnx.Param)
    for x, labels, _ in batches(steps):
        batch = {"image": x, "label": labels}
        train_step(model, optimizer, metrics, rngs, batch, teacher)
    return model, metrics, rngs, teacher


def masks(steps: int) -> list[np.ndarray]:
    """What Dropout multiplies the hidden units by in each step: one mask a step, for both losses."""
    stream = nnx.Rngs(dropout=1).dropout
    return [2.0 * np.asarray(jax.random.bernoulli(stream(), 0.5, (BATCH, HIDDEN))) for _ in range(steps)]


def arrays(model: Student) -> dict[str, np.ndarray]:
    """The parameters under the names of `numpy_reference`."""
    layers = {"1": model.body, "2": model.head}
    theta = {f"w{i}": layer.kernel[...] for i, layer in layers.items()}
    theta |= {f"b{i}": layer.bias[...] for i, layer in layers.items()}
    return theta | {"scale": model.norm.scale[...], "bias": model.norm.bias[...]}


def main() -> None:
    """Trains, and compares with NumPy under the same masks."""
    expected = numpy_reference.train(arrays(Student(nnx.Rngs(0))), batches(20), kept=masks(20))
    model, metrics, rngs, _ = train(20)
    print(f"20 steps, largest deviation from NumPy {numpy_reference.deviation(arrays(model), expected):.1e}")
    print(f"masks drawn: {rngs.dropout.count[...]}, examples in the metrics: {metrics.accuracy.count[...]}")


if __name__ == "__main__":
    main()
