"""CRD, contrastive representation distillation, as an objective has it: projectors, a memory, negatives.

The student's features and the teacher's, those that their heads are given, go through a linear projector each, which the
student's job trains and which only this loss reaches. The memory of all images of the training split moves with every
step. Both belong to the training and not to the network: a trained student does not have them.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dot_optax import losses


def init(section: ConfigDict, seed: int, widths: tuple[int, int], num_images: int) -> tuple[Any, Any]:
    """The projectors and the memory before the first step, as (params, rest).

    Args:
        section: `config.crd`.
        seed: `config.seed`.
        widths: of the features of student and teacher.
        num_images: of the training split.
    """
    projectors_key, memory_key, _ = _keys(seed)
    kernel_init = jax.nn.initializers.lecun_normal()  # of a linear layer of Flax, with a bias of zeros
    params = {
        name: {"kernel": kernel_init(key, (width, section.dim)), "bias": jnp.zeros(section.dim)}
        for name, key, width in zip(("student", "teacher"), jax.random.split(projectors_key), widths, strict=True)
    }
    return params, losses.crd_init(memory_key, num_images, section.dim)._asdict()


def loss(section: ConfigDict, seed: int, seen: Any, params: Any, rest: Any) -> tuple[jax.Array, Any]:
    """The loss of each example, and the new `rest`.

    Args:
        section: `config.crd`.
        seed: `config.seed`.
        seen: an `objectives.Seen`, with the features.
        params: the projectors.
        rest: the memory.
    """
    drawn = negatives(seed, seen.step, seen.index, seen.labels, seen.all_labels, section.negatives)
    student, teacher = (
        features.astype(jnp.float32) @ params[name]["kernel"] + params[name]["bias"][None]
        for name, features in (("student", seen.features), ("teacher", seen.teacher_features))
    )
    per_example, state = losses.crd_loss(
        student,
        teacher,
        seen.index,
        drawn,
        losses.CRDState(**rest),
        temperature=section.temperature,
        momentum=section.momentum,
    )
    return per_example, state._asdict()


def negatives(seed: int, step: Any, index: jax.Array, labels: jax.Array, all_labels: Any, count: int) -> jax.Array:
    """Draws `losses.crd_negatives` for each image: the seed, the step and the image alone say which.

    The order of the images in a batch does not, in which the number of hosts shows.
    """
    key = jax.random.fold_in(_keys(seed)[2], step)

    def draw(index: jax.Array, label: jax.Array) -> jax.Array:
        return losses.crd_negatives(jax.random.fold_in(key, index), label[None], all_labels, count)[0]

    return jax.vmap(draw)(index, labels)


def _keys(seed: int) -> jax.Array:
    """Of projectors, memory and negatives: other random numbers than those of the network, which has the same seed."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"crd")), 3)
