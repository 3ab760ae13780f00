"""What every recipe trains on: random points, whose labels and logits a linear teacher gives; and the two losses."""

import jax
import numpy as np
import optax

import dot_optax

LEARNING_RATE = 0.05
TASK_WEIGHT, KD_WEIGHT, TEMPERATURE = 0.1, 0.9, 4.0
FEATURES, HIDDEN, CLASSES, BATCH = 3, 4, 5, 8


TEACHER = 3.0 * np.random.default_rng(0).normal(size=(FEATURES, CLASSES)).astype(np.float32)


def batches(steps: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """As many batches of points, of shape [8, 3], their labels, [8], and the teacher's logits, [8, 5]."""
    points = np.random.default_rng(1).normal(size=(steps, BATCH, FEATURES)).astype(np.float32)
    return [(x, (x @ TEACHER).argmax(-1).astype(np.int32), x @ TEACHER) for x in points]


def losses(logits: jax.Array, labels: jax.Array, teacher_logits: jax.Array) -> dot_optax.PerLoss:
    """The two weighted losses of a batch, each a scalar."""
    ce = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    kd = dot_optax.losses.kd_loss(logits, teacher_logits, TEMPERATURE).mean()
    return dot_optax.PerLoss(task=TASK_WEIGHT * ce, kd=KD_WEIGHT * kd)
