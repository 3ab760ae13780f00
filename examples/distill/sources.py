"""From the name of a dataset to its stored images: the builders of TFDS, and what a user registers.

TFDS keeps the examples in ArrayRecord files, which can be read at random; TensorFlow is not needed to read them.
"""

import contextlib
import importlib.util
import io
import os
import re
import stat
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import examples.distill.datasets  # noqa: F401  (registers the builders)
from examples.distill import images, registry
from examples.distill.datasets.fashion_mnist_idx import fashion_mnist_idx
from examples.trainer import paths
from examples.trainer.errors import UserError, one_line

Function = Callable[[epath.Path | None], Mapping[str, Any]]

_HERE = os.path.dirname(__file__)
_LIBRARIES = tuple(sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib"))


class Size(NamedTuple):
    """How many images a split has, in the attributes that TFDS needs to slice it."""

    num_examples: int

    @property
    def shard_lengths(self) -> list[int]:
        return [self.num_examples]


class Source(NamedTuple):
    """An open dataset. An example is a dict of `image` uint8 [height, width, channels] and `label` int32."""

    title: str  # what messages call it
    sizes: Mapping[str, Any]  # by the names of the splits, each with `num_examples` and `shard_lengths`
    read: Callable[[str], grain.MapDataset]  # the examples of a split
    in_memory: bool  # whether all splits are arrays


class _Registered(NamedTuple):
    function: Function
    num_classes: int


_REGISTERED = {"fashion_mnist_idx": _Registered(fashion_mnist_idx, num_classes=10)}


def register(name: str, *, num_classes: int) -> Callable[[Function], Function]:
    """Makes `--config.dataset.name=NAME` stand for the data that a function returns.

        @data.register("stripes", num_classes=2)
        def stripes(data_dir):
            images, labels = np.load(data_dir / "images.npy"), np.load(data_dir / "labels.npy")
            return {"train": (images[:900], labels[:900]), "test": (images[900:], labels[900:])}

    The function is called with the folder of `--config.dataset.data_dir`, an `epath.Path` in which `~` is expanded, or
    None where the flag is empty. It returns a dict from the names of the splits to their examples, each of them

    - a tuple of two arrays: images, uint8 [n, height, width, channels] or [n, height, width], and labels, integers [n];
      these stay in memory; or
    - a Grain source: an object with `__len__`, and with `__getitem__(index)`, which returns a dict of `image`,
      uint8 [height, width, channels], and `label`, an integer. It is read by several threads at once, or copied to
      `--config.dataset.workers` processes; its class need not be importable there.

    Images have one or three channels, as many as `--config.dataset.mean` has numbers. They are square, of
    `--config.dataset.image_size` pixels, unless the preprocessing resizes them. Labels run from 0 to `num_classes` - 1.

    A TFDS builder needs no registration: to define its class is enough. It need not import TensorFlow if it yields
    encoded images, as `datasets/sklearn_digits.py` does. Of two datasets of one name, the registered one is taken.

    Raises:
      UserError: if `num_classes` is not an integer of at least 2, or there is a registered dataset of this name. The
        same lines may run again.
    """
    registry.claim("dataset", name, _REGISTERED)
    if not isinstance(num_classes, (int, np.integer)) or num_classes < 2:
        raise UserError(f"data.register({name!r}): bad num_classes={num_classes!r}: give an integer of at least 2")

    def add(function: Function) -> Function:
        _REGISTERED[name] = _Registered(function, int(num_classes))
        return function

    return add


def num_classes(config: ConfigDict) -> int:
    """The number of classes of the dataset that `config` names; opens no file of a registered one."""
    if config.name in _REGISTERED:
        return _REGISTERED[config.name].num_classes
    return _builder(config).info.features["label"].num_classes


def open_dataset(config: ConfigDict) -> Source:
    """Opens the dataset that `config` names. One of TFDS is prepared first, if need be."""
    return _open_registered(config) if config.name in _REGISTERED else _open_tfds(config)


def check_data_dir(data_dir: str) -> None:
    """Raises if it is no folder that may be read; one that does not exist yet may still be made."""
    if not data_dir:
        return
    folder, reason = paths.resolve(data_dir, "--config.dataset.data_dir"), None
    if paths.in_bucket(folder):
        return
    try:
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            reason = "it is not a folder"
        elif not os.access(folder, os.R_OK | os.X_OK):
            reason = "it may not be read"
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # a name that is too long, or a folder above it that may not be searched
        reason = getattr(error, "strerror", None) or str(error)
    if reason:
        raise UserError(f"bad --config.dataset.data_dir={data_dir}: {reason}")


class _Expected(NamedTuple):
    """What the examples of a dataset must be."""

    channels: int
    size: int | None  # pixels on a side; None: of any size
    num_classes: int

    @classmethod
    def by(cls, config: ConfigDict, num_classes: int) -> "_Expected":
        resizes = images.PREPROCESSING[config.preprocessing].resizes
        return cls(len(config.mean), None if resizes else config.image_size, num_classes)

    def check_image(self, image: Any, shape: Sequence[int]) -> None:
        """Raises a ValueError if an image, or an array of images, has another dtype or shape [height, width, channels]."""
        if getattr(image, "dtype", None) != np.uint8:
            raise ValueError(f"images are {_kind(image)} instead of uint8")
        if len(shape) != 3:
            raise ValueError(f"images have the shape {list(shape)} instead of [height, width, channels]")
        if shape[2] != self.channels:
            raise ValueError(
                f"images have {shape[2]} channels, and --config.dataset.mean has {self.channels}; one number for each"
                " channel is needed, and 1 or 3 of them"
            )
        if 0 in shape or (self.size and tuple(shape[:2]) != (self.size, self.size)):
            raise ValueError(
                f"images have {shape[0]} x {shape[1]} pixels, and not --config.dataset.image_size={self.size} on each"
                " side; --config.dataset.preprocessing does not resize them"
            )

    def check_labels(self, labels: np.ndarray) -> None:
        if not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"labels are {labels.dtype} instead of integers")
        if labels.size and (labels.min() < 0 or labels.max() >= self.num_classes):
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise ValueError(f"label {wrong} is not one of 0 to {self.num_classes - 1}")

    def checked(self, example: Any) -> dict[str, Any]:
        """Returns the image and the label of an example; raises a ValueError if they are not as they must be."""
        if not isinstance(example, Mapping) or not {"image", "label"} <= example.keys():
            raise ValueError(f"it is {_kind(example)}, not a dict with 'image' and 'label'")
        image, label = example["image"], np.asarray(example["label"])
        self.check_image(image, np.shape(image))
        if label.ndim:
            raise ValueError(f"its label has the shape {list(label.shape)}, and must be one integer")
        self.check_labels(label)
        return {"image": image, "label": label.astype(np.int32)[()]}


def _kind(value: Any) -> str:
    return str(getattr(value, "dtype", type(value).__name__))


class _Arrays:
    """A Grain source of images and labels in memory."""

    def __init__(self, images_: np.ndarray, labels: np.ndarray) -> None:
        self._images, self._labels = images_, labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._images[index], "label": self._labels[index]}


def _open_registered(config: ConfigDict) -> Source:
    function, classes = _REGISTERED[config.name]
    expected, title = _Expected.by(config, classes), f"dataset {config.name!r}"
    data_dir = paths.resolve(config.data_dir) if config.data_dir else None
    with _explained(title if data_dir else f"{title}, without a --config.dataset.data_dir"):
        splits = function(data_dir)
    if not isinstance(splits, Mapping) or not splits:
        raise UserError(f"{title}: its function must return a dict of splits, and returned {_kind(splits)}")
    sources = {}
    for name, split in splits.items():
        if not isinstance(name, str) or not name.isidentifier() or name == "all":
            raise UserError(f"{title}: bad name of a split, {name!r}; give a word, and not 'all'")
        with _explained(f"{title}, split {name!r}"):
            sources[name] = _source(split, expected)

    def read(name: str) -> grain.MapDataset:
        if isinstance(sources[name], _Arrays):
            return grain.MapDataset.source(sources[name])
        examples = _Examples(sources[name], name, f"{title}: {{}}", expected)
        _ = examples(0)  # What is wrong with all of them is said before anything is trained.
        return grain.MapDataset.range(sizes[name].num_examples).map(examples)

    with _explained(title):
        sizes = {name: Size(len(source)) for name, source in sources.items()}
    return Source(title, sizes, read, all(isinstance(source, _Arrays) for source in sources.values()))


def _source(split: Any, expected: _Expected) -> Any:
    if not isinstance(split, tuple):
        if not all(hasattr(split, method) for method in ("__len__", "__getitem__")):
            raise ValueError(f"it is {_kind(split)}, neither (images, labels) nor a Grain source")
        return split
    if len(split) != 2:
        raise ValueError(f"it is a tuple of {len(split)}, not of (images, labels)")
    pixels, labels = map(np.asarray, split)
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    expected.check_image(pixels, pixels.shape[1:])
    if labels.shape != pixels.shape[:1]:
        raise ValueError(f"labels have the shape {list(labels.shape)}, and there are {len(pixels)} images")
    expected.check_labels(labels)
    return _Arrays(pixels, labels.astype(np.int32))


class _Examples:
    """The examples of a split, each decoded and checked.

    A class, since a closure reaches a worker process without its file, and `_reason` would take it for the user's.
    """

    def __init__(self, source: Any, split: str, complaint: str, expected: _Expected, channels: int = 0) -> None:
        self._source, self._split, self._complaint, self._expected = source, split, complaint, expected
        self._channels = channels  # of encoded images; 0 where they are arrays

    def __call__(self, index: int) -> dict[str, Any]:
        try:
            example = self._source[index]
            if self._channels:
                example = {"image": images.decode(example["image"], self._channels), "label": example["label"]}
            return self._expected.checked(example)
        except UserError:
            raise
        except Exception as error:  # ArrayRecord, Pillow and users raise what they like.
            reason = f"image {index} of {self._split!r}: {_reason(error)}"
            raise UserError(self._complaint.format(reason)) from error


def _open_tfds(config: ConfigDict) -> Source:
    builder = _builder(config)
    _check_image_size(builder, config)
    try:
        is_prepared = builder.is_prepared()
    except Exception as error:  # For buckets there are more kinds than OSErrors.
        raise _cannot_open(config, one_line(error)) from error
    if not is_prepared and jax.process_index() == 0:
        _prepare(builder, config)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the dataset is prepared")
    builder = builder if is_prepared else _builder(config)
    if not builder.info.splits:
        raise UserError(f"the folder {builder.data_dir} is there, but has no dataset; delete it, and prepare it again")
    expected = _Expected.by(config, builder.info.features["label"].num_classes)
    sizes, folder = builder.info.splits, str(builder.data_dir)
    complaint = f"the dataset in {folder} is damaged ({{}}); delete that folder and prepare the dataset again"

    def read(name: str) -> grain.MapDataset:
        try:
            source = builder.as_data_source(split=name, decoders={"image": tfds.decode.SkipDecoding()})
        except Exception as error:  # TFDS raises whatever it stumbles over in what lies on disk.
            raise UserError(complaint.format(one_line(error))) from error
        examples = _Examples(source, name, complaint, expected, channels=expected.channels)
        return grain.MapDataset.range(sizes[name].num_examples).map(examples)

    return Source(f"the dataset in {folder}", sizes, read, in_memory=False)


def _builder(config: ConfigDict) -> tfds.core.DatasetBuilder:
    folder = (
        paths.resolve(config.data_dir, "--config.dataset.data_dir") if config.data_dir else None
    )  # TFDS makes one of the name ~, too.
    try:
        builder = tfds.builder(config.name, data_dir=folder, file_format="array_record")
        features = builder.info.features
    except tfds.core.DatasetNotFoundError:
        raise UserError(
            f"unknown --config.dataset.name={config.name!r}: this example and TFDS have no such dataset, and none was"
            " registered under that name"
        ) from None
    except Exception as error:  # TFDS raises whatever it stumbles over in what lies on disk.
        reason = one_line(error)
        if "File format is already set" in reason:
            reason = "it was prepared in another file format; prepare it again, with --file_format=array_record"
        raise _cannot_open(config, reason) from error
    _check_features(features, config)
    return builder


def _cannot_open(config: ConfigDict, reason: str) -> UserError:
    return UserError(
        f"cannot open dataset {config.name!r} ({reason}); see examples/distill/README.md, or choose another folder with"
        " --config.dataset.data_dir"
    )


def _check_features(features: Any, config: ConfigDict) -> None:
    bad = f"bad --config.dataset.name={config.name!r}"
    if not isinstance(features, tfds.features.FeaturesDict) or not {"image", "label"} <= set(features):
        raise UserError(f"{bad}: it is not a dataset of images with labels")
    image, label = features["image"], features["label"]
    if not isinstance(image, tfds.features.Image) or image.np_dtype != np.uint8 or len(image.shape) != 3:
        raise UserError(f"{bad}: its feature 'image' must be an Image of uint8, and is {one_line(image)}")
    if image.shape[2] not in (1, 3):
        raise UserError(f"{bad}: its images must have 1 or 3 channels, and have {image.shape[2]}")
    if not isinstance(label, tfds.features.ClassLabel) or (label.num_classes or 0) < 2:
        raise UserError(
            f"{bad}: its feature 'label' must be a ClassLabel of at least 2 classes, and is {one_line(label)}"
        )
    if len(config.mean) != image.shape[2]:
        raise UserError(
            f"bad --config.dataset.mean={config.mean!r}: give one number for each channel; the images of {config.name!r}"
            f" have {image.shape[2]}"
        )


def _check_image_size(builder: tfds.core.DatasetBuilder, config: ConfigDict) -> None:
    stored = builder.info.features["image"].shape[:2]
    if stored == (config.image_size, config.image_size) or images.PREPROCESSING[config.preprocessing].resizes:
        return
    pixels = "sizes of their own" if None in stored else f"{stored[0]} x {stored[1]} pixels"
    raise UserError(
        f"bad --config.dataset.image_size={config.image_size}: the images of {config.name!r} are stored with {pixels},"
        f" and --config.dataset.preprocessing={config.preprocessing} keeps that"
    )


def _prepare(builder: tfds.core.DatasetBuilder, config: ConfigDict) -> None:
    # The builders that TFDS ships download archives, which it unpacks with TensorFlow.
    needs_tensorflow = type(builder).__module__.startswith("tensorflow_datasets.")
    if not config.prepare:
        how = "tfds build" if needs_tensorflow else "--config.dataset.prepare=True or with tfds build"
        raise UserError(
            f"dataset {config.name!r} is not prepared in {builder.data_dir}; prepare it with {how}, see"
            " examples/distill/README.md, or point --config.dataset.data_dir to the folder that has it"
        )
    if needs_tensorflow and importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"cannot prepare dataset {config.name!r} here: its builder in TFDS needs TensorFlow; prepare it with tfds"
            " build in an environment that has it, see examples/distill/README.md"
        )
    if paths.in_bucket(builder.data_dir):  # ArrayRecord reads from buckets, but does not write there.
        raise UserError(
            f"cannot prepare dataset {config.name!r} in {builder.data_dir}; prepare it in a folder of a machine, and copy"
            " that to the bucket"
        )
    print(f"Preparing dataset {config.name!r} in {builder.data_dir}")
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()  # Its bars are redrawn a hundred times, which a log file cannot show.
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints sizes that it does not know.
            builder.download_and_prepare()
    except Exception as error:  # from TFDS, or from a user's builder
        with contextlib.suppress(OSError):
            if builder.is_prepared():  # by another run; TFDS renames the folder when all is there
                return
        raise UserError(
            f"cannot prepare dataset {config.name!r} in {builder.data_dir} ({_reason_of_builder(error)}); choose another"
            " folder with --config.dataset.data_dir, or see examples/distill/README.md"
        ) from error


def _reason_of_builder(error: Exception) -> str:
    if isinstance(error, ImportError) and re.search(r"named 'tensorflow'|import of tensorflow ", str(error)):
        return (
            "it needs TensorFlow, which encodes arrays and unpacks archives in TFDS; without it a builder must yield"
            " encoded images, as io.BytesIO of a PNG or JPEG file, and unpack files itself"
        )
    _, failed, rest = str(error).partition("Failed to encode example:")
    if failed and "\nIn <" in rest:  # The example itself may be thousands of numbers.
        return one_line(rest[rest.rindex("\nIn <") :])
    return _reason(error)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns whatever a user's code raises into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What was raised, and in which line of the user's file."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((*_LIBRARIES, _HERE, "<frozen"))]
    kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
    if not own:
        return f"{kind}{one_line(error)}"
    name = os.path.basename(own[-1].filename)
    file = "" if name.startswith("<") else f"{name}, "  # A function that was copied to a worker process has lost it.
    return f"{kind}{one_line(error)} ({file}line {own[-1].lineno})"
