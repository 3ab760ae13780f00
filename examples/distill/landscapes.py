"""Loss landscapes: the training loss around the final weights of students, along two random directions."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from dot_optax import diagnostics
from examples.distill import data, models
from examples.distill.arms import Arm, Run
from examples.distill.configs import default
from examples.distill.pictures import Landscape
from examples.trainer import checkpoint
from examples.trainer.errors import UserError

_DISTANCE = 1.0  # the farthest along each direction, in norms of each filter
_POINTS = 31  # along each direction; odd, so that the weights themselves are one of them


def measure(arms: Sequence[Arm], images: int, data_dir: str = "", *, points: int = _POINTS) -> list[Landscape]:
    """The cross-entropy around the student of each arm; of one with several seeds, around that of the first.

    All have the same seed of both directions and the same distances. Each is over the first `images` of the training
    split, not augmented. BatchNorm is in training mode: at each point it has the statistics of these images, since the
    running ones belong to other weights.

    Args:
        arms: finished ones.
        images: how many; fewer if the split has fewer.
        data_dir: the folder of the data, as `--config.dataset.data_dir` was.
        points: along each direction.
    """
    return [_measure(arm, images, data_dir, points) for arm in arms]


def _measure(arm: Arm, images: int, data_dir: str, points: int) -> Landscape:
    run = arm.runs[0]
    config = _config(run, data_dir)
    dataset = data.load(config.dataset)
    images = min(images, len(dataset.train))
    params, loss = _loss(run, config, dataset, images)
    keys = jax.random.split(jax.random.key(0))
    directions = tuple(diagnostics.filter_normalized(key, params) for key in keys)
    distances = jnp.linspace(-_DISTANCE, _DISTANCE, points)
    losses = jax.jit(functools.partial(diagnostics.landscape, loss))(params, directions, distances)
    return Landscape(arm, np.asarray(distances), np.asarray(losses).T, images)


def _loss(run: Run, config: ConfigDict, dataset: data.Dataset, images: int) -> tuple[Any, Any]:
    """The weights of a student, and its cross-entropy as a function of these."""

    def network() -> tuple[nnx.GraphDef, Any, Any]:
        return models.split(
            models.build(
                **config.student.model,
                num_classes=dataset.num_classes,
                input_shape=dataset.image_shape,
                dtype=config.dtype,
                rngs=nnx.Rngs(config.seed),
            )
        )

    graphdef, *like = nnx.eval_shape(network)
    try:
        params, rest = jax.tree.map(jnp.asarray, checkpoint.load_fitting(run.folder, (like[0], like[1])))
    except ValueError as error:
        raise UserError(f"the student in {run.folder} is not that of its config.json: {error}") from error
    batch = next(data.eval_batches(dataset, dataset.train[:images], images))
    mean, std = (np.float32(values) for values in (config.dataset.mean, config.dataset.std))
    inputs = jnp.asarray((np.asarray(batch["image"], np.float32) - mean) / std)

    def loss(params: Any) -> jax.Array:
        logits, _ = models.apply(graphdef, params, rest, inputs, train=True)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    return params, loss


def _config(run: Run, data_dir: str) -> ConfigDict:
    """The config of a run, from the fields that its `config.json` has."""
    nested: dict[str, Any] = {"dataset": default().dataset.to_dict()}  # some fields are not recorded
    for name, value in run.config.items():
        *sections, last = name.split(".")
        section = functools.reduce(lambda found, key: found.setdefault(key, {}), sections, nested)
        section[last] = tuple(value) if isinstance(value, list) else value
    config = ConfigDict(nested)
    config.dataset.update(data_dir=data_dir, prepare=False)
    return config
