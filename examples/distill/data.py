"""From a TFDS dataset to batches on the device: prepare, read, decode, augment, shuffle, batch, transfer.

TFDS keeps the examples in ArrayRecord files, which can be read at random, and Grain does the rest; TensorFlow is not
needed. A batch is a dict of arrays: `image` uint8 [batch, height, width, channels], as the network sees it but not yet
normalized, and `label` int32 [batch]; evaluation batches also have `valid` bool [batch], which is False for the images
that only fill up the batches.

On several hosts each reads and decodes its own part of every batch, no image twice; only images that are kept in memory
are decoded once by every host, since each epoch is shuffled over all of them. Which images make up a batch, and how they
are augmented, depends on the seed and on nothing else: not on the number of hosts or worker processes.
"""

import contextlib
import functools
import gc
import importlib.util
import io
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from grain.experimental import ElasticIterator
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import examples.distill.datasets  # noqa: F401  (registers the builders)
from examples.distill import images, synthetic
from examples.trainer.errors import UserError, one_line

Batch = dict[str, jax.Array]

_BATCHES_AHEAD = 2  # that wait on the device, and at each worker process
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


def load(config: ConfigDict) -> Dataset:
    """Opens the dataset that `config` (the `dataset` part of a config) describes, preparing it if need be."""
    builder = _builder(config)
    image_shape = (config.image_size, config.image_size, builder.info.features["image"].shape[-1])
    num_classes = builder.info.features["label"].num_classes
    if config.synthetic:
        sizes = synthetic.split_sizes(config.split_sizes)
        preprocessing = images.PREPROCESSING["none"]
    else:
        _check_image_size(builder, config)
        if not builder.is_prepared() and jax.process_index() == 0:
            _prepare(builder, config)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("the dataset is prepared")
            builder = _builder(config)
        sizes = builder.info.splits
        _check_complete(sizes, config, builder)
        preprocessing = images.PREPROCESSING[config.preprocessing]

    @functools.cache  # A split that is named twice is read once.
    def examples(split: str) -> grain.MapDataset:
        if config.synthetic:
            return synthetic.examples(sizes[split].num_examples, image_shape, num_classes)
        return _read(builder, split, config.in_memory)

    names = ("train", "validation", "test")
    for name in names:
        _check_split(sizes, config, name)
    at_hand = config.synthetic or config.in_memory
    return Dataset(
        **{name: examples(config[name]) for name in names},
        num_classes=num_classes,
        image_shape=image_shape,
        preprocessing=preprocessing,
        threads=0 if at_hand else _THREADS,
        workers=0 if at_hand else min(config.workers, _CORES),
    )


def steps_per_epoch(dataset: Dataset, batch_size: int) -> int:
    """Number of full training batches in an epoch."""
    steps = len(dataset.train) // batch_size
    if steps == 0:
        raise UserError(f"batch size {batch_size} is larger than the training split ({len(dataset.train)} images)")
    return steps


@contextlib.contextmanager
def train_batches(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    epochs: int,
    put: Callable[[Any], Batch] = jax.device_put,
    host: grain.sharding.ShardOptions | None = None,
) -> Iterator[grain.DatasetIterator]:
    """Iterates over this host's part of `epochs` epochs, each in an order and with augmentations of its own.

    The ragged last batch of each epoch is dropped; `put` brings a batch to the devices. The iterator's state is a small
    dict, which Orbax saves beside the model: how many images were consumed, over all hosts. Its threads and processes
    end with the `with` block.
    """
    augmented = _Augmented(dataset.preprocessing.augment, dataset.image_shape[0])
    host = host or _this_host()
    _check_divides(batch_size, host, "batch_size")
    whole_batches = steps_per_epoch(dataset, batch_size) * batch_size
    examples = dataset.train.seed(seed).shuffle()[:whole_batches].random_map(augmented).repeat(epochs)
    threads = 1 if dataset.workers else dataset.threads
    batches = ElasticIterator(
        examples,
        batch_size,
        host,
        read_options=grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads),
        multiprocessing_options=_worker_options(dataset.workers),
    )
    with contextlib.closing(_to_device(batches, put, dataset.workers)) as iterator, _explained_worker_death():
        yield iterator
    if dataset.workers:
        gc.collect()  # Reference cycles of Grain hold shared memory, too.


def eval_batches(
    dataset: Dataset,
    examples: grain.MapDataset,
    batch_size: int,
    put: Callable[[Any], Batch] = jax.device_put,
    host: grain.sharding.ShardOptions | None = None,
) -> Iterator[Batch]:
    """Every example of a split once, over all hosts. Every host has the same number of batches, all of one shape."""
    view, size = dataset.preprocessing.view, dataset.image_shape[0]
    host = host or _this_host()
    _check_divides(batch_size, host, "eval_batch_size")
    local_batch = batch_size // host.shard_count
    first, step, count = host.shard_index, host.shard_count, len(examples)

    def example(slot: int) -> dict[str, Any]:
        index = first + slot * step
        found = examples[index if index < count else 0]
        return {"image": view(found["image"], size), "label": found["label"], "valid": np.bool_(index < count)}

    slots = grain.MapDataset.range(math.ceil(count / batch_size) * local_batch)
    # By threads, also where training has worker processes, which would take longer to start than most splits to read.
    options = grain.ReadOptions(num_threads=dataset.threads, prefetch_buffer_size=_BATCHES_AHEAD * local_batch)
    with contextlib.closing(
        _to_device(slots.map(example).to_iter_dataset(options).batch(local_batch), put)
    ) as iterator:
        yield from iterator


def _to_device(batches: grain.IterDataset, put: Callable[[Any], Batch], workers: int = 0) -> grain.DatasetIterator:
    def copy_and_put(batch: dict[str, np.ndarray]) -> Batch:
        # What worker processes hand over lies in shared memory, which JAX would hold beyond the end of the program.
        return put({name: np.array(value) for name, value in batch.items()})

    on_device = batches.map(copy_and_put if workers else put)
    return iter(grain.experimental.ThreadPrefetchIterDataset(on_device, prefetch_buffer_size=_BATCHES_AHEAD))


def _worker_options(workers: int) -> grain.MultiprocessingOptions | None:
    if not workers:
        return None
    flags.FLAGS.mark_as_parsed()  # Grain asks for flags of its own, which this program does not have.
    return grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_BATCHES_AHEAD)


class _Augmented:
    """Augments the image of an example. It is pickled only to worker processes, where it begins their work."""

    def __init__(self, augment: Callable[..., np.ndarray], size: int) -> None:
        self._augment, self._size = augment, size

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return example | {"image": self._augment(example["image"], self._size, rng)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        parent = multiprocessing.parent_process()
        if parent:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Clusters send it to all processes, but the parent decides.
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


def _this_host() -> grain.sharding.ShardOptions:
    return grain.sharding.ShardOptions(shard_index=jax.process_index(), shard_count=jax.process_count())


def _check_divides(batch_size: int, host: grain.sharding.ShardOptions, field: str) -> None:
    if batch_size % host.shard_count:
        raise UserError(f"bad --config.{field}={batch_size}: it must be a multiple of the {host.shard_count} hosts")


def _builder(config: ConfigDict) -> tfds.core.DatasetBuilder:
    try:
        builder = tfds.builder(config.name, data_dir=config.data_dir or None, file_format="array_record")
        features = builder.info.features
    except tfds.core.DatasetNotFoundError:
        raise UserError(
            f"unknown --config.dataset.name={config.name!r}: this example and TFDS have no such builder"
        ) from None
    except Exception as error:  # TFDS raises whatever it stumbles over in what lies on disk.
        reason = one_line(error)
        if "File format is already set" in reason:
            reason = "it was prepared in another file format; prepare it again, with --file_format=array_record"
        raise UserError(
            f"cannot open dataset {config.name!r} ({reason}); see examples/distill/README.md, or choose another folder"
            " with --config.dataset.data_dir"
        ) from error
    if not {"image", "label"} <= set(features):
        raise UserError(f"bad --config.dataset.name={config.name!r}: it is not a dataset of images with labels")
    channels = features["image"].shape[-1]
    for field in ("mean", "std"):
        if len(config[field]) != channels:
            raise UserError(
                f"bad --config.dataset.{field}={config[field]!r}: give one number for each channel; the images of"
                f" {config.name!r} have {channels}"
            )
    return builder


def _prepare(builder: tfds.core.DatasetBuilder, config: ConfigDict) -> None:
    is_ours = type(builder).__module__.startswith("examples.")  # and so needs no TensorFlow
    if not config.prepare:
        how = "--config.dataset.prepare=True or with tfds build" if is_ours else "tfds build"
        raise UserError(
            f"dataset {config.name!r} is not prepared in {builder.data_dir}; prepare it with {how}, see"
            " examples/distill/README.md, or point --config.dataset.data_dir to the folder that has it"
        )
    if not is_ours and importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"cannot prepare dataset {config.name!r} here: its builder in TFDS needs TensorFlow; prepare it with tfds"
            " build in an environment that has it, see examples/distill/README.md"
        )
    print(f"Preparing dataset {config.name!r} in {builder.data_dir}")
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()  # Its bars are redrawn a hundred times, which a log file cannot show.
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints sizes that it does not know.
            builder.download_and_prepare()
    except (AssertionError, OSError, ValueError) as error:
        # An AssertionError: TFDS asserts that files are there which it cannot download.
        raise UserError(
            f"cannot prepare dataset {config.name!r} in {builder.data_dir} ({one_line(error)}); choose another folder"
            " with --config.dataset.data_dir, or see examples/distill/README.md"
        ) from error


def _check_image_size(builder: tfds.core.DatasetBuilder, config: ConfigDict) -> None:
    stored = builder.info.features["image"].shape[:2]
    if stored == (config.image_size, config.image_size) or images.PREPROCESSING[config.preprocessing].resizes:
        return
    pixels = "sizes of their own" if None in stored else f"{stored[0]} x {stored[1]} pixels"
    raise UserError(
        f"bad --config.dataset.image_size={config.image_size}: the images of {config.name!r} are stored with {pixels},"
        f" and --config.dataset.preprocessing={config.preprocessing} keeps that"
    )


def _check_complete(splits: tfds.core.SplitDict, config: ConfigDict, builder: tfds.core.DatasetBuilder) -> None:
    for name, expected in config.split_sizes.items():
        found = splits[name].num_examples if name in splits else 0
        if found != expected:
            raise UserError(
                f"the dataset in {builder.data_dir} has {found} images in its split {name!r} instead of {expected};"
                f" prepare it again from complete files, or say --config.dataset.split_sizes.{name}={found} if it is meant"
                " to be another one"
            )


def _check_split(splits: tfds.core.SplitDict, config: ConfigDict, name: str) -> None:
    try:
        if splits[config[name]].num_examples <= 0:
            raise ValueError("it has no images")
    except ValueError as error:
        raise UserError(f"bad --config.dataset.{name}={config[name]!r}: {error}") from error


def _read(builder: tfds.core.DatasetBuilder, split: str, in_memory: bool) -> grain.MapDataset:
    channels, data_dir = builder.info.features["image"].shape[-1], str(builder.data_dir)
    source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})

    def read(index: int) -> dict[str, Any]:
        try:
            stored = source[index]
            image = images.decode(stored["image"], channels)
        except (OSError, RuntimeError) as error:  # RuntimeErrors come from ArrayRecord.
            raise UserError(
                f"the dataset in {data_dir} is damaged (image {index} of {split!r}: {one_line(error)}); delete that"
                " folder and prepare the dataset again"
            ) from error
        return {"image": image, "label": np.int32(stored["label"])}

    examples = grain.MapDataset.range(len(source)).map(read)
    # An epoch of digits takes 0.24 s to read when every image is decoded again, and 0.04 s from memory. To read them
    # takes 0.15 s one by one, and 0.41 s by `list(examples)`, which uses threads.
    return grain.MapDataset.source([examples[i] for i in range(len(examples))]) if in_memory else examples
