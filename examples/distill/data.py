"""From stored images to batches on the device: augment, shuffle, batch, transfer, all of it by Grain.

Where the images come from, and how to bring one's own (`register`), stands in `sources.py`. A batch is a dict of arrays:
`image` uint8 [batch, height, width, channels], as the network sees it but not yet normalized, and `label` int32 [batch].
Training batches also have `index` int32 [batch]: which images of the split these are. Evaluation batches also have `valid`
bool [batch], which is False for the images that only fill up the batches.

On several hosts each reads and decodes its own part of every batch, no image twice; only images that are kept in memory
are decoded once by every host, since each epoch is shuffled over all of them. Which images make up a batch, and how they
are augmented, depends on the seed and on nothing else: not on the number of hosts or worker processes.
"""

import contextlib
import functools
import gc
import math
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import cloudpickle
import grain
import jax
import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from grain.experimental import ElasticIterator
from ml_collections import ConfigDict

from examples.distill import images, sources, synthetic
from examples.distill.sources import register as register
from examples.trainer import batches, preemption
from examples.trainer.errors import UserError, one_line

_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_THREADS = min(_CORES, 8)  # decoding and resizing let others in, the rest of Python does not


class Dataset(NamedTuple):
    """The three splits, as stored images and labels, and what becomes of them."""

    train: grain.MapDataset
    validation: grain.MapDataset
    test: grain.MapDataset
    num_classes: int
    image_shape: tuple[int, int, int]  # as the network sees it
    preprocessing: images.Preprocessing
    threads: int = 0  # that read and decode; none for images in memory
    workers: int = 0  # processes that do it in training, in the place of threads
    labels: Callable[[], np.ndarray] | None = None  # of the whole training split, if it is in memory: int32 [images]


def load(config: ConfigDict) -> Dataset:
    """Opens the dataset that `config` (the `dataset` part of a config) describes, preparing it if need be."""
    _check(config)
    if not config.synthetic:
        sources.check_data_dir(config.data_dir)
    num_classes = sources.num_classes(config)
    image_shape = (config.image_size, config.image_size, len(config.mean))
    if config.synthetic:
        source = synthetic.source(config.split_sizes, image_shape, num_classes)
    else:
        source = sources.open_dataset(config)
        _check_complete(source, config)
    parts = {name: _parts(source.sizes, name, config[name]) for name in ("train", "validation", "test")}
    at_hand = config.in_memory or source.in_memory
    read = functools.cache(source.read)

    @functools.cache  # A split that is named twice is read once.
    def examples(split: tuple[tuple[str, range], ...]) -> grain.MapDataset:
        found = [read(name)[range_.start : range_.stop] for name, range_ in split]
        joined = found[0] if len(found) == 1 else grain.MapDataset.concatenate(found)
        if source.in_memory or not config.in_memory:
            return joined
        batches.check_memory(
            len(joined) * math.prod(image_shape), f"{len(joined)} images", "--config.dataset.in_memory=False"
        )
        # An epoch of digits takes 0.24 s to read when every image is decoded again, and 0.04 s from memory. To read
        # them takes 0.15 s one by one, and 0.41 s by `list(joined)`, which uses threads.
        return grain.MapDataset.source([joined[i] for i in range(len(joined))])

    dataset = Dataset(
        **{name: examples(split) for name, split in parts.items()},
        num_classes=num_classes,
        image_shape=image_shape,
        preprocessing=images.PREPROCESSING["none" if config.synthetic else config.preprocessing],
        threads=0 if at_hand else _THREADS,
        workers=0 if at_hand else min(config.workers, _CORES),
    )
    if config.in_memory or (source.in_memory and not config.synthetic):  # Synthetic data stand for those of the config.
        dataset = dataset._replace(labels=functools.cache(functools.partial(_labels, dataset.train)))
    if dataset.workers:
        _check_workers(dataset, source.title)
    return dataset


def steps_per_epoch(dataset: Dataset, batch_size: int) -> int:
    """Number of full training batches in an epoch."""
    steps = len(dataset.train) // batch_size
    if steps == 0:
        raise UserError(f"batch size {batch_size} is larger than the training split ({len(dataset.train)} images)")
    return steps


def eval_batch_size(dataset: Dataset, batch_size: int, devices: int) -> int:
    """The batch size for evaluation that `devices` devices can share: rounded up, what is too much is padding.

    It is never larger than the largest split needs, so that all splits are evaluated in batches of one shape.
    """
    needed = max(len(split) for split in (dataset.train, dataset.validation, dataset.test))
    return batches.shared_batch_size(batch_size, needed, devices)


@contextlib.contextmanager
def train_batches(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    epochs: int,
    put: Callable[[Any], batches.Batch] = jax.device_put,
    host: grain.sharding.ShardOptions | None = None,
) -> Iterator[grain.DatasetIterator]:
    """Iterates over this host's part of `epochs` epochs, each in an order and with augmentations of its own.

    The ragged last batch of each epoch is dropped; `put` brings a batch to the devices. The iterator's state is a small
    dict, which Orbax saves beside the model: how many images were consumed, over all hosts. Its threads and processes
    end with the `with` block.
    """
    augmented = _Augmented(dataset.preprocessing.augment, dataset.image_shape)
    host = host or batches.this_host()
    batches.check_batch(batch_size, host, math.prod(dataset.image_shape), "batch_size")
    whole_batches = steps_per_epoch(dataset, batch_size) * batch_size
    indexed = dataset.train.map_with_index(functools.partial(_indexed, len(dataset.train)))
    examples = indexed.seed(seed).shuffle()[:whole_batches].random_map(augmented).repeat(epochs)
    threads = 1 if dataset.workers else dataset.threads
    shuffled = ElasticIterator(
        examples,
        batch_size,
        host,
        read_options=grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads),
        multiprocessing_options=_worker_options(dataset.workers),
    )
    with (
        contextlib.closing(batches.to_device(shuffled, put, copy=dataset.workers > 0)) as iterator,
        _explained_worker_death(),
    ):
        yield iterator
    if dataset.workers:
        gc.collect()  # Reference cycles of Grain hold shared memory, too.


def eval_batches(
    dataset: Dataset,
    examples: grain.MapDataset,
    batch_size: int,
    put: Callable[[Any], batches.Batch] = jax.device_put,
    host: grain.sharding.ShardOptions | None = None,
) -> Iterator[batches.Batch]:
    """Every example of a split once, over all hosts. Every host has the same number of batches, all of one shape."""
    view, shape = dataset.preprocessing.view, dataset.image_shape
    host = host or batches.this_host()
    batches.check_batch(batch_size, host, math.prod(shape), "eval_batch_size")

    def example(index: int, valid: bool) -> dict[str, Any]:
        found = examples[index]
        image = _checked(view(found["image"], shape[0]), shape)
        return {"image": image, "label": found["label"], "valid": np.bool_(valid)}

    # By threads, also where training has worker processes, which would take longer to start than most splits to read.
    yield from batches.evaluation(example, len(examples), batch_size, put, host, threads=dataset.threads)


def batch_shapes(dataset: Dataset, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch to train on."""
    return {
        "image": jax.ShapeDtypeStruct((batch_size, *dataset.image_shape), np.uint8),
        "label": jax.ShapeDtypeStruct((batch_size,), np.int32),
        "index": jax.ShapeDtypeStruct((batch_size,), np.int32),
    }


def _labels(examples: grain.MapDataset) -> np.ndarray:
    return np.array([examples[i]["label"] for i in range(len(examples))], np.int32)


def _indexed(count: int, index: int, example: dict[str, Any]) -> dict[str, Any]:
    return example | {"index": np.int32(index % count)}  # Grain counts on from epoch to epoch.


def _worker_options(workers: int) -> grain.MultiprocessingOptions | None:
    if not workers:
        return None
    flags.FLAGS.mark_as_parsed()  # Grain asks for flags of its own, which this program does not have.
    return grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=batches.AHEAD)


class _Augmented:
    """Augments the image of an example. It is pickled only to worker processes, where it begins their work."""

    def __init__(self, augment: images.Augment, shape: tuple[int, int, int]) -> None:
        self._augment, self._shape = augment, shape

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return example | {"image": _checked(self._augment(example["image"], self._shape[0], rng), self._shape)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        parent = multiprocessing.parent_process()
        if parent:
            for number in preemption.SIGNALS:  # Clusters send them to all processes, but the parent decides.
                signal.signal(number, signal.SIG_IGN)
            threading.Thread(target=_end_after, args=[parent], daemon=True).start()


def _end_after(parent: Any) -> None:
    """Ends this process with its parent: after a `kill -9` it would wait for it forever, and hold memory."""
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _explained_worker_death() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        found = re.match(r"Worker process was terminated unexpectedly with exit code (\S+)\.", str(error))
        if not found:
            raise
        raise UserError(
            f"a process that reads images died (exit code {found[1]}), as happens when memory or the shared memory in"
            " /dev/shm runs out; lower --config.dataset.workers, and the same command goes on"
        ) from error


def _check(config: ConfigDict) -> None:
    if config.preprocessing not in images.PREPROCESSING:
        raise UserError(
            f"unknown --config.dataset.preprocessing={config.preprocessing!r}; known: {', '.join(images.PREPROCESSING)}"
        )
    try:
        images.check_pixels(config.image_size, config.image_size)
    except OSError as error:
        raise UserError(f"bad --config.dataset.image_size={config.image_size}: {error}") from error
    for field in ("mean", "std"):
        if len(config[field]) not in (1, 3) or len(config[field]) != len(config.mean):
            raise UserError(
                f"bad --config.dataset.{field}={config[field]!r}: give one number for each channel, of which there are"
                " one or three"
            )


def _check_complete(source: sources.Source, config: ConfigDict) -> None:
    for name, expected in config.split_sizes.items():
        found = source.sizes[name].num_examples if name in source.sizes else 0
        if found != expected:
            raise UserError(
                f"{source.title} has {found} images in its split {name!r} instead of {expected}; prepare it again from"
                f" complete files, or say --config.dataset.split_sizes.{name}={found} if it is meant to be another one"
            )


def _parts(sizes: Mapping[str, Any], field: str, split: str) -> tuple[tuple[str, range], ...]:
    """What a split such as `train[:90%]+test` consists of: names of stored splits and indices in them."""
    try:
        instructions = tfds.core.ReadInstruction.from_spec(split).to_absolute(sizes)
        slices = [(each.splitname, slice(each.from_, each.to)) for each in instructions]
        parts = [(name, range(sizes[name].num_examples)[slice_]) for name, slice_ in slices]
        if not sum(len(indices) for _, indices in parts):
            raise ValueError("it has no images")
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"bad --config.dataset.{field}={split!r}: {one_line(error)}") from error
    return tuple((name, indices) for name, indices in parts if indices)


def _check_workers(dataset: Dataset, title: str) -> None:
    try:
        cloudpickle.dumps((dataset.train, dataset.preprocessing.augment))
    except Exception as error:  # whatever objects of a user's raise
        raise UserError(
            f"{title} cannot be copied to worker processes ({one_line(error)}); make it an object that pickle can copy, or"
            " say --config.dataset.workers=0"
        ) from error


def _checked(image: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """Raises if what a preprocessing made of an image is not what the network takes."""
    if getattr(image, "dtype", None) != np.uint8 or image.shape != shape:
        found = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise UserError(
            f"the preprocessing of --config.dataset.preprocessing gave {found} instead of uint8 {list(shape)}"
        )
    return image
