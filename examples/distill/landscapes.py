"""Loss landscapes: the training loss around the final weights of students, along two random directions; and its curvature."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

import dot_optax
from dot_optax import diagnostics
from examples.distill import data, models
from examples.distill.arms import Arm, Run
from examples.distill.configs import default
from examples.distill.pictures import Curvature, Landscape
from examples.trainer import checkpoint, paths
from examples.trainer.errors import UserError

Network = tuple[nnx.GraphDef, Any, Any]  # (graphdef, params, rest)

_DISTANCE = 1.0  # the farthest along each direction, in norms of each filter
_POINTS = 31  # along each direction; odd, so that the weights themselves are one of them


def measure(
    arms: Sequence[Arm], images: int, data_dir: str = "", *, teacher: str = "", points: int = _POINTS
) -> list[Landscape]:
    """The cross-entropy around the student of each arm; of one with several seeds, around that of the first.

    All have the same seed of both directions and the same distances. Each is over the first `images` of the training
    split, not augmented. BatchNorm is in training mode: at each point it has the statistics of these images, since the
    running ones belong to other weights.

    The curvature is that of both losses on the same images at the final weights, and of their sum, weighted as in plain
    distillation. There, BatchNorm has its running statistics. Without a teacher it is that of the cross-entropy alone.

    Args:
        arms: finished ones.
        images: how many; fewer if the split has fewer.
        data_dir: the folder of the data, as `--config.dataset.data_dir` was.
        teacher: the folder of the teacher, as `--config.teacher.checkpoint` was, where it is not `teacher` beside a student.
        points: along each direction.
    """
    return [_measure(arm, images, data_dir, teacher, points) for arm in arms]


def _measure(arm: Arm, images: int, data_dir: str, teacher: str, points: int) -> Landscape:
    run = arm.runs[0]
    config = _config(run, data_dir)
    dataset = data.load(config.dataset)
    images = min(images, len(dataset.train))
    batch = next(data.eval_batches(dataset, dataset.train[:images], images))
    mean, std = (np.float32(values) for values in (config.dataset.mean, config.dataset.std))
    inputs, labels = jnp.asarray((np.asarray(batch["image"], np.float32) - mean) / std), jnp.asarray(batch["label"])
    try:
        network = _network(run.folder, config.student.model, config, dataset)
    except ValueError as error:
        raise UserError(f"the student in {run.folder} is not that of its config.json: {error}") from error
    graphdef, params, rest = network

    def loss(params: Any) -> jax.Array:
        logits, _ = models.apply(graphdef, params, rest, inputs, train=True)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    keys = jax.random.split(jax.random.key(0))
    directions = tuple(diagnostics.filter_normalized(key, params) for key in keys)
    distances = jnp.linspace(-_DISTANCE, _DISTANCE, points)
    losses = jax.jit(functools.partial(diagnostics.landscape, loss))(params, directions, distances)
    found = _curvatures(network, _teacher(run, teacher, config, dataset), inputs, labels, config)
    return Landscape(arm, np.asarray(distances), np.asarray(losses).T, images, found)


def _network(folder: epath.Path, model: ConfigDict, config: ConfigDict, dataset: data.Dataset) -> Network:
    """A network with the variables that are saved in a folder; a ValueError if they are of another one."""

    def network() -> Network:
        return models.split(
            models.build(
                **model,
                num_classes=dataset.num_classes,
                input_shape=dataset.image_shape,
                dtype=config.dtype,
                rngs=nnx.Rngs(config.seed),
            )
        )

    graphdef, *like = nnx.eval_shape(network)
    params, rest = jax.tree.map(jnp.asarray, checkpoint.load_fitting(folder, (like[0], like[1])))
    return graphdef, params, rest


def _teacher(run: Run, folder: str, config: ConfigDict, dataset: data.Dataset) -> Network | None:
    """The teacher of a run, known by its checksum: beside the student, or in the folder; None if it is in neither."""
    places = [paths.resolve(folder, "--config.teacher.checkpoint")] if folder else []
    for place in (run.folder.parent / "teacher", *places):
        if checkpoint.has_network(place):
            try:
                found = _network(place, config.teacher.model, config, dataset)
            except ValueError:
                continue
            if checkpoint.checksum(found[1:]) == run.config.get("teacher.checksum"):
                return found
    return None


def _curvatures(
    student: Network, teacher: Network | None, inputs: jax.Array, labels: jax.Array, config: ConfigDict
) -> dict[str, Curvature]:
    """The curvature of each loss at the weights of a student, and of their weighted sum."""
    weights = {"task": (1.0, 0.0)}
    given = jnp.zeros([len(labels), 1])
    if teacher:
        of_losses = config.distillation
        weights |= {"KD": (0.0, 1.0), "sum": (of_losses.task_weight, of_losses.kd_weight)}
        given, _ = models.apply(*teacher, inputs, train=False)
    temperature = config.distillation.temperature
    found = _curvature(student[0], student[1:], inputs, labels, given, temperature, jnp.array(list(weights.values())))
    return {name: Curvature(*map(float, row)) for name, row in zip(weights, np.stack(found, 1), strict=True)}


@functools.partial(jax.jit, static_argnames="graphdef")
def _curvature(
    graphdef: nnx.GraphDef, variables: Any, inputs: Any, labels: Any, given: Any, temperature: Any, weights: Any
) -> Any:
    """Sharpness, trace and its standard error of each weighted sum of both losses, each an array [sums]."""
    params, rest = variables

    def of_sum(weights: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            logits, _ = models.apply(graphdef, params, rest, inputs, train=False)
            task = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
            kd = dot_optax.losses.kd_loss(logits, jnp.broadcast_to(given, logits.shape), temperature)
            return weights @ jnp.stack([task.mean(), kd.mean()])

        keys = jax.random.split(jax.random.key(0))
        return diagnostics.sharpness(loss, params, keys[0]), *diagnostics.hessian_trace(loss, params, keys[1])

    return jax.lax.map(of_sum, weights)


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
