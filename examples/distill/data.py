"""From a TFDS dataset to batches: prepare, read, normalize, shuffle, batch.

TFDS keeps the examples in ArrayRecord files, which can be read at random, and Grain does the rest; TensorFlow is not
needed. A batch is a dict of NumPy arrays: `image` float32 [batch, height, width, channels], `label` int32 [batch];
evaluation batches also have `valid` bool [batch], which is False where the last batch was padded.
"""

import contextlib
import io
import sys
from typing import Any, NamedTuple

import grain
import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

import examples.distill.datasets  # noqa: F401  (registers the builders)
from examples.distill.errors import UserError

Batch = dict[str, np.ndarray]


class Dataset(NamedTuple):
    """The three splits, read and normalized but neither shuffled nor batched, and what a model must know of them."""

    train: grain.MapDataset
    validation: grain.MapDataset
    test: grain.MapDataset
    num_classes: int
    image_shape: tuple[int, ...]


def load(config: ConfigDict) -> Dataset:
    """Opens the dataset that `config` (the `dataset` part of a config) describes, preparing it if need be."""
    builder = _builder(config)
    if not builder.is_prepared():
        _prepare(builder, config)
    splits = {name: _read(builder, config, name) for name in ("train", "validation", "test")}
    return Dataset(
        **splits,
        num_classes=builder.info.features["label"].num_classes,
        image_shape=splits["train"][0]["image"].shape,
    )


def steps_per_epoch(dataset: Dataset, batch_size: int) -> int:
    """Number of full training batches in an epoch."""
    steps = len(dataset.train) // batch_size
    if steps == 0:
        raise UserError(f"batch size {batch_size} is larger than the training split ({len(dataset.train)} images)")
    return steps


def train_batches(examples: grain.MapDataset, batch_size: int, seed: int, epochs: int) -> grain.DatasetIterator:
    """Iterates over `epochs` epochs, each in an order of its own; the ragged last batch of each epoch is dropped.

    The iterator's state is a small dict, which Orbax saves beside the model.
    """
    batches = examples.seed(seed).shuffle().batch(batch_size, drop_remainder=True)
    return iter(batches.repeat(epochs).to_iter_dataset())


def eval_batches(examples: grain.MapDataset, batch_size: int) -> grain.MapDataset:
    """Every example once, in order. The last batch is padded, so that all have one shape and compile once."""
    return examples.batch(batch_size, drop_remainder=False).map(lambda batch: _pad(batch, batch_size))


def _builder(config: ConfigDict) -> tfds.core.DatasetBuilder:
    try:
        builder = tfds.builder(config.name, data_dir=config.data_dir or None, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        raise UserError(
            f"unknown --config.dataset.name={config.name!r}: this example and TFDS have no such builder"
        ) from None
    channels = builder.info.features["image"].shape[-1]
    for field in ("mean", "std"):
        if len(config[field]) != channels:
            raise UserError(
                f"bad --config.dataset.{field}={config[field]!r}: give one number for each channel; the images of"
                f" {config.name!r} have {channels}"
            )
    return builder


def _prepare(builder: tfds.core.DatasetBuilder, config: ConfigDict) -> None:
    if not config.prepare:
        raise UserError(
            f"dataset {config.name!r} is not prepared in {builder.data_dir}; run with --config.dataset.prepare=True to"
            " prepare it, or point --config.dataset.data_dir to the folder that has it"
        )
    print(f"Preparing dataset {config.name!r} in {builder.data_dir}")
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()  # Its bars are redrawn a hundred times, which a log file cannot show.
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints sizes that it does not know.
            builder.download_and_prepare()
    except OSError as error:
        raise UserError(
            f"cannot prepare dataset {config.name!r} in {builder.data_dir} ({error.strerror or error});"
            " choose another folder with --config.dataset.data_dir"
        ) from error


def _read(builder: tfds.core.DatasetBuilder, config: ConfigDict, name: str) -> grain.MapDataset:
    mean, std = np.float32(config.mean), np.float32(config.std)

    def normalize(example: dict[str, Any]) -> Batch:
        return {"image": (example["image"] - mean) / std, "label": np.int32(example["label"])}

    try:
        if builder.info.splits[config[name]].num_examples == 0:
            raise ValueError("it has no images")
        source = builder.as_data_source(split=config[name])
    except ValueError as error:
        raise UserError(f"bad --config.dataset.{name}={config[name]!r}: {error}") from error
    examples = grain.MapDataset.source(source).map(normalize)
    # An epoch of digits takes 0.24 s to read when every image is decoded again, and 0.04 s from memory.
    return grain.MapDataset.source(list(examples)) if config.in_memory else examples


def _pad(batch: Batch, batch_size: int) -> Batch:
    count = len(batch["label"])
    padded = {k: np.pad(v, [(0, batch_size - count)] + [(0, 0)] * (v.ndim - 1)) for k, v in batch.items()}
    return padded | {"valid": np.arange(batch_size) < count}
