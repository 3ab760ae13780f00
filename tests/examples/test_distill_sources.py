"""Data of a user's own: registered functions and TFDS builders, right ones and wrong ones."""

import contextlib
import errno
import io
import json
import os
import runpy
import subprocess
import sys
import textwrap

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image

from examples.distill import data, images, sources
from examples.distill.configs.digits import get_config
from examples.trainer.errors import UserError

_PIXELS = np.random.default_rng(0).integers(256, size=(40, 8, 8, 1), dtype=np.uint8)
_LABELS = np.arange(40) % 3


class _Source:
    """A Grain source, some of whose examples are replaced."""

    def __init__(self, count=40, **replaced):
        self._count, self._replaced = count, replaced

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        return {"image": _PIXELS[index], "label": int(_LABELS[index])} | self._replaced


@pytest.fixture
def config():
    config = get_config().dataset
    config.update(name="mine", train="train[:20]", validation="train[20:30]", test="train[30:]")
    config.split_sizes = ConfigDict()
    return config


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    monkeypatch.setattr(sources, "_REGISTERED", dict(sources._REGISTERED))
    monkeypatch.setattr(images, "PREPROCESSING", dict(images.PREPROCESSING))


def _register(splits, num_classes=3):
    @data.register("mine", num_classes=num_classes)
    def mine(data_dir):
        return splits

    return mine


def _seen(dataset, examples):
    """The images and labels of a split, as evaluation sees them."""
    [batch] = data.eval_batches(dataset, examples, len(examples))
    return np.asarray(batch["image"]), np.asarray(batch["label"])


_KINDS = {
    "arrays": (_PIXELS, _LABELS),
    "arrays without channels": (_PIXELS[..., 0], _LABELS.astype(np.uint8)),
    "lists": ([np.array(image) for image in _PIXELS], _LABELS.tolist()),
    "source": _Source(),
    "list of examples": [_Source()[index] for index in range(40)],
    "grain": grain.MapDataset.source(_Source()),
}


@pytest.mark.parametrize("kind", _KINDS)
def test_every_kind_of_split(kind, config):
    _register({"train": _KINDS[kind]})
    for config.in_memory in (True, False):
        dataset = data.load(config)
        assert (dataset.num_classes, dataset.image_shape) == (3, (8, 8, 1))
        for examples, part in zip(dataset[:3], (slice(20), slice(20, 30), slice(30, 40)), strict=True):
            pixels, labels = _seen(dataset, examples)
            np.testing.assert_array_equal(pixels, _PIXELS[part])
            np.testing.assert_array_equal(labels, _LABELS[part])
            assert labels.dtype == np.int32
        assert dataset.threads == (0 if config.in_memory or isinstance(_KINDS[kind], tuple) else data._THREADS)


@pytest.mark.parametrize(
    ("split", "indices"),
    [
        ("train", [*range(40)]),
        ("train[10%:]", [*range(4, 40)]),
        ("train[-3:]", [37, 38, 39]),
        ("test[5:]+train[:2]", [5, 6, 0, 1]),
        ("train[5:3]+test[:1]", [0]),
        ("all", [*range(40), *range(7)]),
    ],
)
def test_parts_of_splits(split, indices, config):
    _register({"train": (_PIXELS, _LABELS), "test": _Source(7)})
    config.test = split
    dataset = data.load(config)
    np.testing.assert_array_equal(_seen(dataset, dataset.test)[0], _PIXELS[indices])


@pytest.mark.parametrize(
    "split", ["trein", "train[:41]", "train[5:3]", "train[", "", "train[0]", "all[:3]", "test", "train[200%:]"]
)
def test_parts_that_are_not_there(split, config):
    _register({"train": (_PIXELS, _LABELS), "test": _Source(0)})
    config.test = split
    with pytest.raises(UserError, match=r"bad --config\.dataset\.test='") as error:
        data.load(config)
    assert "\n" not in str(error.value)


def test_the_function_gets_the_folder(config, tmp_path, monkeypatch):
    folders = []
    data.register("mine", num_classes=3)(lambda folder: folders.append(folder) or {"train": (_PIXELS, _LABELS)})
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    for config.data_dir in ("", "~/here"):
        data.load(config)
    assert folders == [None, tmp_path / "here"]


_BAD_PIXELS = _PIXELS.astype(np.float32)
_BAD_PIXELS[3] = np.nan
_WRONG_SPLITS = {
    "images are float32 instead of uint8": (_BAD_PIXELS, _LABELS),
    "images are int64 instead of uint8": (_PIXELS.astype(int), _LABELS),
    "images are object instead of uint8": (np.array([None, 1]), [0, 1]),
    "images have the shape [8] instead of": (_PIXELS[..., 0, 0], _LABELS),
    "images have 4 channels, and --config.dataset.mean has 1": (_PIXELS.repeat(4, -1), _LABELS),
    "images have 7 x 8 pixels, and not --config.dataset.image_size=8": (_PIXELS[:, 1:], _LABELS),
    "labels are float64 instead of integers": (_PIXELS, _LABELS.astype(float)),
    "labels are bool instead of integers": (_PIXELS, _LABELS > 1),
    "labels are <U21 instead of integers": (_PIXELS, _LABELS.astype(str)),
    "label 3 is not one of 0 to 2": (_PIXELS, _LABELS + 1),
    "label -1 is not one of 0 to 2": (_PIXELS, _LABELS - 1),
    "labels have the shape [39], and there are 40 images": (_PIXELS, _LABELS[1:]),
    "labels have the shape [40, 3], and there are 40 images": (_PIXELS, np.eye(3, dtype=int)[_LABELS]),
    "it is a tuple of 1": (_PIXELS,),
    "it is NoneType, neither (images, labels) nor a Grain source": None,
    "it is generator, neither": (example for example in _Source()),
    "setting an array element with a sequence": (_PIXELS, [[1], [1, 2]]),
}


@pytest.mark.parametrize("reason", _WRONG_SPLITS)
def test_a_split_that_cannot_be_used(reason, config):
    _register({"train": _WRONG_SPLITS[reason]})
    with pytest.raises(UserError) as error:
        data.load(config)
    assert str(error.value).startswith(f"dataset 'mine', split 'train': {reason}")


@pytest.mark.parametrize(
    ("splits", "reason"),
    [
        (None, "its function must return a dict of splits, and returned NoneType"),
        ((_PIXELS, _LABELS), "its function must return a dict of splits, and returned tuple"),
        ({}, "its function must return a dict of splits, and returned dict"),
        ({"all": _Source()}, "bad name of a split, 'all'"),
        ({"train set": _Source()}, "bad name of a split, 'train set'"),
        ({0: _Source()}, "bad name of a split, 0"),
    ],
)
def test_a_function_that_returns_no_splits(splits, reason, config):
    _register(splits)
    with pytest.raises(UserError) as error:
        data.load(config)
    assert str(error.value).startswith(f"dataset 'mine': {reason}")


_WRONG_EXAMPLES = {
    "images are float64 instead of uint8": {"image": _PIXELS[0] / 255},
    "images are bytes instead of uint8": {"image": b"png"},
    "images are list instead of uint8": {"image": [[1]]},
    "images have the shape [8, 8] instead of": {"image": _PIXELS[0, ..., 0]},
    "images have 3 channels": {"image": _PIXELS[0].repeat(3, -1)},
    "images have 0 x 8 pixels": {"image": _PIXELS[0, :0]},
    "images have 8 x 4 pixels": {"image": _PIXELS[0, :, :4]},
    "its label has the shape [1]": {"label": [1]},
    "labels are float64": {"label": 1.0},
    "labels are bool": {"label": True},
    "labels are object": {"label": None},
    "labels are <U1": {"label": "1"},
    "label 3 is not one of 0 to 2": {"label": 3},
    "label -1 is not": {"label": np.int8(-1)},
}


@pytest.mark.parametrize("reason", _WRONG_EXAMPLES)
def test_an_example_that_cannot_be_used(reason, config):
    _register({"train": _Source(**_WRONG_EXAMPLES[reason])})
    with pytest.raises(UserError) as error:
        data.load(config)
    assert str(error.value).startswith(f"dataset 'mine': image 0 of 'train': {reason}")


def test_an_example_in_the_middle_that_cannot_be_used(config):
    config.in_memory = False
    examples = [_Source()[index] for index in range(40)]
    examples[35] = (_PIXELS[35], 0)
    _register({"train": examples})
    dataset = data.load(config)
    with pytest.raises(UserError, match="dataset 'mine': image 35 of 'train': it is tuple, not a dict with 'image'"):
        _seen(dataset, dataset.test)


_FILE = """
import numpy as np
from examples.distill import data, images


class Squares:
    def __len__(self):
        return 30

    def __getitem__(self, index):
        if index >= limit():
            raise KeyError("no such square")
        return {"image": np.full((8, 8, 1), index, np.uint8), "label": index % 3}


def limit():
    return LIMIT


def brighter(image, size, rng):
    return image + np.uint8(rng.integers(3))


LIMIT = 30
images.register("brighter", images.Preprocessing(augment=brighter, view=lambda image, size: image))


@data.register("mine", num_classes=3)
def squares(data_dir):
    return {"train": Squares()}
"""


def _run(tmp_path, text=_FILE):
    """Runs a user's file as the command line does: its functions cannot be imported."""
    path = tmp_path / "mine.py"
    path.write_text(text)
    return runpy.run_path(str(path))


def _trained(dataset):
    with data.train_batches(dataset, 10, 0, 2) as batches:
        return [np.asarray(batch["image"]) for batch in batches]


@pytest.mark.slow
def test_worker_processes_need_not_import_the_file_of_the_user(tmp_path, config):
    for _ in range(2):  # The same file may be run again.
        _run(tmp_path)
    config.update(in_memory=False, preprocessing="brighter", train="train", validation="train", test="train")
    here = _trained(data.load(config))
    config.workers = 1
    dataset = data.load(config)
    assert dataset.workers == 1
    np.testing.assert_array_equal(_trained(dataset), here)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_user_raises_is_one_line_that_says_where(workers, tmp_path, config):
    _run(tmp_path, _FILE.replace("LIMIT = 30", "LIMIT = 7"))
    config.update(in_memory=False, workers=workers, train="train", validation="train", test="train")
    with pytest.raises(UserError, match=r"image \d+ of 'train': KeyError: 'no such square' \((mine\.py, )?line 12\)"):
        _trained(data.load(config))


def test_a_function_that_raises(tmp_path, config):
    _run(tmp_path, _FILE.replace('return {"train": Squares()}', 'return np.load(data_dir / "x.npy")'))
    config.data_dir = str(tmp_path)
    with pytest.raises(UserError, match=r"dataset 'mine': \[Errno 2\] .*x\.npy' \(mine\.py, line 30\)"):
        data.load(config)


def test_a_source_that_cannot_be_copied(config):
    source = _Source()
    source.file = io.BufferedReader(io.FileIO(os.devnull))
    _register({"train": source})
    config.update(in_memory=False, workers=1)
    with (
        source.file,
        pytest.raises(UserError, match=r"dataset 'mine' cannot be copied to worker processes \(cannot pickle"),
    ):
        data.load(config)


@pytest.mark.parametrize("made", [_PIXELS[0] / 255, _PIXELS[0, 1:], None])
def test_a_preprocessing_that_makes_something_else(made, config):
    _register({"train": (_PIXELS, _LABELS)})
    images.register("mine", images.Preprocessing(augment=lambda *_: made, view=lambda *_: made))
    config.preprocessing = "mine"
    dataset = data.load(config)
    with pytest.raises(UserError, match=r"--config\.dataset\.preprocessing gave .* instead of uint8 \[8, 8, 1\]"):
        _trained(dataset)
    with pytest.raises(UserError, match="gave"):
        _seen(dataset, dataset.test)


@pytest.mark.parametrize("classes", [0, 1, -3, 2.0, None, "3"])
def test_a_number_of_classes_that_makes_no_sense(classes):
    with pytest.raises(UserError, match="bad num_classes="):
        data.register("mine", num_classes=classes)


def test_names_that_are_taken():
    with pytest.raises(UserError, match="there is a dataset 'fashion_mnist_idx' already; choose another name"):
        data.register("fashion_mnist_idx", num_classes=10)
    with pytest.raises(UserError, match="there is a preprocessing 'cifar' already; choose another name"):
        images.register("cifar", images.PREPROCESSING["none"])
    with pytest.raises(UserError, match=r"give an images\.Preprocessing of two functions"):
        images.register("mine", lambda image: image)


def test_synthetic_data_open_no_file_of_a_registered_dataset(config):
    data.register("mine", num_classes=5)(lambda data_dir: pytest.fail("it was opened"))
    config.update(synthetic=True, data_dir="/nowhere", train="train", validation="train", test="train", image_size=12)
    config.split_sizes = ConfigDict({"train": 9})
    dataset = data.load(config)
    assert (dataset.num_classes, dataset.image_shape, [len(split) for split in dataset[:3]]) == (
        5,
        (12, 12, 1),
        [9] * 3,
    )
    pixels, labels = _seen(dataset, dataset.test)
    assert pixels.shape == (9, 12, 12, 1)
    assert labels.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]


_LONG = "x" * 300


@pytest.mark.parametrize("name", ["mine", "sklearn_digits"])
@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        (_LONG, "File name too long"),
        (f"{_LONG}/data", "File name too long"),
        ("file", "it is not a folder"),
        ("file/data", "Not a directory"),
        ("loop/data", "Too many levels of symbolic links"),  # as a folder that may not be searched, but also for root
    ],
)
def test_a_data_dir_that_is_no_folder(folder, reason, name, tmp_path, config):
    _register({"train": (_PIXELS, _LABELS)})
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    config.update(name=name, data_dir=str(tmp_path / folder))
    with pytest.raises(UserError) as error:
        data.load(config)
    assert str(error.value).startswith(f"bad --config.dataset.data_dir={tmp_path / folder}: {reason}")


def test_a_builder_gets_the_home_folder(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    config.update(name="sklearn_digits", data_dir="~/data")
    data.load(config)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert (tmp_path / "home" / "data" / "sklearn_digits" / "1.0.0").is_dir()


@pytest.mark.parametrize(
    "folder", ["nul\0", "\udcff", "s3://bucket/data", "gs:/bucket/data", "~nobody-of-this-name/data"]
)
def test_a_data_dir_that_can_never_be(folder, config):
    config.update(name="sklearn_digits", data_dir=folder)
    with pytest.raises(UserError, match=r"^bad --config\.dataset\.data_dir="):
        data.load(config)


def _no_permission(*_):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@pytest.mark.parametrize(
    ("function", "answer", "reason"),
    [("access", lambda *_: False, "it may not be read"), ("stat", _no_permission, "Permission denied")],
)
def test_a_data_dir_that_may_not_be_searched(function, answer, reason, tmp_path, config, monkeypatch):
    """The answers of the system to others than root, which may search every folder."""
    config.update(name="sklearn_digits", data_dir=str(tmp_path))
    monkeypatch.setattr(os, function, answer)
    with pytest.raises(UserError, match=reason):
        data.load(config)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("image_size", 10**6, r"bad --config\.dataset\.image_size=1000000: 1000000 x 1000000 pixels are more than"),
        ("preprocessing", "nothing", r"unknown --config\.dataset\.preprocessing='nothing'; known: none, cifar"),
        ("mean", (), r"bad --config\.dataset\.mean=\(\): give one number for each channel"),
        ("mean", (0.0, 0.0), r"bad --config\.dataset\.mean"),
        ("std", (1.0, 1.0, 1.0), r"bad --config\.dataset\.std=\(1\.0, 1\.0, 1\.0\)"),
        ("name", _LONG, r"--config\.dataset\.name="),
        ("name", "no_such_dataset", "none was registered under that name"),
    ],
)
def test_fields_that_make_no_sense(field, value, reason, config):
    _register({"train": (_PIXELS, _LABELS)})
    config[field] = value
    with pytest.raises(UserError, match=reason):
        data.load(config)


def _png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png")
    file.seek(0)
    return file


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder, of which the tests below change a feature or the examples."""

    VERSION = tfds.core.Version("1.0.0")
    name = "sources_test"
    image = tfds.features.Image(shape=(8, 8, 1), encoding_format="png")
    label = tfds.features.ClassLabel(num_classes=3)

    def _info(self):
        features = {"image": self.image, "label": self.label}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self.examples()}

    def _generate_examples(self):
        raise NotImplementedError

    @staticmethod
    def examples():
        for index, (pixels, label) in enumerate(zip(_PIXELS, _LABELS, strict=True)):
            yield index, {"image": _png(pixels[..., 0]), "label": int(label)}


@pytest.fixture
def build(config, tmp_path, monkeypatch):
    """Loads the dataset of a builder that is changed as given."""

    def build(**changes):
        changed = {name: staticmethod(change) if name == "examples" else change for name, change in changes.items()}
        builder = type("Changed", (_Builder,), changed | {"name": "sources_test"}, skip_registration=True)
        monkeypatch.setattr(tfds, "builder", lambda name, **options: builder(**options))
        config.update(name="sources_test", data_dir=str(tmp_path), prepare=True)
        return data.load(config)

    return build


_WRONG_FEATURES = {
    "its images must have 1 or 3 channels, and have 4": {"image": tfds.features.Image(shape=(8, 8, 4))},
    "its feature 'image' must be an Image of uint8, and is Image(shape=(8, 8, 1), dtype=uint16": {
        "image": tfds.features.Image(shape=(8, 8, 1), dtype=np.uint16, encoding_format="png")
    },
    "its feature 'image' must be an Image of uint8, and is Image(shape=(8, 8, 1), dtype=float32": {
        "image": tfds.features.Image(shape=(8, 8, 1), dtype=np.float32)
    },
    "its feature 'image' must be an Image of uint8, and is Tensor": {
        "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8)
    },
    "its feature 'image' must be an Image of uint8, and is Sequence": {
        "image": tfds.features.Sequence(tfds.features.Image(shape=(8, 8, 1)))
    },
    "its feature 'image' must be an Image of uint8, and is Text": {"image": tfds.features.Text()},
    "its feature 'label' must be a ClassLabel of at least 2 classes, and is Scalar": {
        "label": tfds.features.Scalar(np.int64)
    },
    "its feature 'label' must be a ClassLabel of at least 2 classes, and is Sequence": {
        "label": tfds.features.Sequence(tfds.features.ClassLabel(num_classes=3))
    },
    "its feature 'label' must be a ClassLabel of at least 2 classes, and is ClassLabel(shape=(), dtype=int64, num_classes=None)": {
        "label": tfds.features.ClassLabel()
    },
    "its feature 'label' must be a ClassLabel of at least 2 classes, and is ClassLabel": {
        "label": tfds.features.ClassLabel(num_classes=1)
    },
}


@pytest.mark.parametrize("reason", _WRONG_FEATURES)
def test_features_that_cannot_be_used(reason, build, tmp_path):
    with pytest.raises(UserError) as error:
        build(**_WRONG_FEATURES[reason])
    assert str(error.value).startswith(f"bad --config.dataset.name='sources_test': {reason}")
    assert not list(tmp_path.iterdir())


def _examples(pixels=_PIXELS[0, ..., 0], label=0):
    return lambda: ((index, {"image": _png(pixels), "label": label}) for index in range(40))


@pytest.mark.parametrize(
    ("examples", "reason"),
    [
        (_examples(label=-1), "label -1 is not one of 0 to 2"),  # by which TFDS means that there is none
        (_examples(pixels=np.zeros((9, 8), np.uint8)), "images have 9 x 8 pixels"),
        (_examples(pixels=np.zeros((8, 8), np.uint16)), "it has more than 8 bits per channel (mode I;16 of Pillow)"),
        (lambda: ((i, {"image": io.BytesIO(b"GIF"), "label": 0}) for i in range(40)), "cannot identify image file"),
    ],
)
def test_stored_examples_that_cannot_be_used(examples, reason, build, tmp_path):
    with pytest.raises(UserError) as error:
        build(examples=examples)
    assert str(error.value).startswith(
        f"the dataset in {tmp_path}/sources_test/1.0.0 is damaged (image 0 of 'train': {reason}"
    )


def _raise():
    raise KeyError("nothing there")
    yield


@pytest.mark.parametrize(
    ("examples", "reason"),
    [
        (_examples(label=3), 'In <ClassLabel> with name "label": Class label 3 greater than configured num_classes 3'),
        (_raise, "KeyError: 'nothing there'"),
        (lambda: iter([(0, {"label": 1})]), "image"),
        (lambda: iter([(0, {"image": _PIXELS[0], "label": 1})]), "it needs TensorFlow, which encodes arrays"),
    ],
)
def test_a_builder_that_cannot_be_prepared(examples, reason, build, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # even where it is installed
    with pytest.raises(UserError) as error:
        build(examples=examples)
    assert str(error.value).startswith(f"cannot prepare dataset 'sources_test' in {tmp_path}/sources_test/1.0.0 (")
    assert reason in str(error.value) and len(str(error.value)) < 600
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


_BUILDER_FILE = """
import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from examples.distill.configs.digits import get_config as digits


class UserImages(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(8, 8, 1)), "label": tfds.features.ClassLabel(num_classes=3)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index in range(40):
            file = io.BytesIO()
            Image.fromarray(np.full((8, 8), index, np.uint8)).save(file, format="png")
            file.seek(0)
            yield index, {"image": file, "label": index % 3}


def get_config():
    config = digits()
    config.dataset.update(name="user_images", train="train[:20]", validation="train[20:30]", test="train[30:]")
    config.dataset.split_sizes = type(config.dataset)({"train": 40})
    return config
"""

_LOAD = """
import runpy
import sys

import numpy as np

from examples.distill import data

config = runpy.run_path(sys.argv[1])["get_config"]().dataset
config.update(data_dir=sys.argv[2], in_memory=False, workers=1)
print("begin", flush=True)
sys.stdin.readline()
dataset = data.load(config)
with data.train_batches(dataset, 20, 0, 1) as batches:
    print(sorted({int(image.max()) for batch in batches for image in np.asarray(batch["image"])}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_runs_prepare_the_dataset_of_a_users_builder_at_once(count, tmp_path):
    (tmp_path / "user.py").write_text(textwrap.dedent(_BUILDER_FILE))
    command = [sys.executable, "-c", _LOAD, str(tmp_path / "user.py"), str(tmp_path / "data")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(subprocess.Popen(command, **pipes)) for _ in range(count)]
        assert [run.stdout.readline() for run in runs] == ["begin\n"] * count
        for run in runs:
            run.stdin.write("\n")
            run.stdin.flush()
        outputs = [(*run.communicate(), run.returncode) for run in runs]
    for output, errors, code in outputs:
        assert code == 0, errors
        assert len(json.loads(output.splitlines()[-1])) == 20
    assert [path.name for path in (tmp_path / "data" / "user_images").iterdir()] == ["1.0.0"]


def test_another_run_was_first_to_prepare_it(build, config, monkeypatch):
    prepare = _Builder.download_and_prepare

    def prepare_after_another(self):
        prepare(type(self)(data_dir=config.data_dir, file_format="array_record"))
        (self.data_path / "x").touch()
        raise OSError(39, "Directory not empty")  # as the operating system says when the folder is renamed

    assert len(build(download_and_prepare=prepare_after_another).train) == 20


def test_a_folder_without_a_dataset(build, tmp_path):
    (tmp_path / "sources_test" / "1.0.0").mkdir(parents=True)
    with pytest.raises(UserError, match="is there, but has no dataset; delete it, and prepare it again"):
        build()
