"""Fashion-MNIST from IDX files, small ones that the tests write."""

import gzip
import struct

import numpy as np
import pytest
from ml_collections import ConfigDict

from examples.distill import data
from examples.distill.configs.digits import get_config
from examples.trainer.errors import UserError

_COUNTS = {"train": 30, "t10k": 12}


def _idx(values, code=8):
    return bytes([0, 0, code, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def _images(count, side=28):
    return np.random.default_rng(count).integers(256, size=(count, side, side), dtype=np.uint8)


def _labels(count):
    return np.arange(count, dtype=np.uint8) % 10


@pytest.fixture(params=["gzipped", "plain"])
def folder(request, tmp_path):
    for prefix, count in _COUNTS.items():
        _write(tmp_path, f"{prefix}-images-idx3-ubyte", _idx(_images(count)), request.param)
        _write(tmp_path, f"{prefix}-labels-idx1-ubyte", _idx(_labels(count)), request.param)
    return tmp_path


def _write(folder, name, content, form):
    if form == "gzipped":
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    else:
        (folder / name).write_bytes(content)


def _config(folder):
    config = get_config().dataset
    config.update(name="fashion_mnist_idx", data_dir=str(folder), image_size=28, mean=(72.94,), std=(90.02,))
    config.update(preprocessing="fashion_mnist", train="train[:20]", validation="train[20:]", test="test")
    config.split_sizes = ConfigDict({"train": 30, "test": 12})
    return config


def test_images_and_labels_are_those_of_the_files(folder):
    dataset = data.load(_config(folder))
    assert (dataset.num_classes, dataset.image_shape, dataset.threads) == (10, (28, 28, 1), 0)
    for split, count, part in (("train", 30, slice(20)), ("validation", 30, slice(20, 30)), ("test", 12, slice(12))):
        [batch] = data.eval_batches(dataset, getattr(dataset, split), len(range(count)[part]))
        np.testing.assert_array_equal(batch["image"][..., 0], _images(count)[part])
        np.testing.assert_array_equal(batch["label"], _labels(count)[part])


def test_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(data.load(_config(f"~/{folder.name}")).test) == 12


def _rewrite(name, content, form="gzipped"):
    return lambda folder: _write(folder, name, content, form)


def _cut(folder):
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-2000])


def _flip(folder):
    path = folder / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # in the checksum
    path.write_bytes(content)


_DAMAGES = {
    "no train-labels-idx1-ubyte.gz, nor train-labels-idx1-ubyte": lambda folder: (
        folder / "train-labels-idx1-ubyte.gz"
    ).unlink(),
    "cannot read train-images-idx3-ubyte: Compressed file ended": _cut,
    "cannot read t10k-labels-idx1-ubyte: CRC check failed": _flip,
    "cannot read t10k-images-idx3-ubyte: Error -3": _rewrite(
        "t10k-images-idx3-ubyte.gz", b"\x1f\x8b\x08" + bytes(50), "as"
    ),
    "cannot read train-labels-idx1-ubyte: [Errno 21]": lambda folder: (
        (folder / "train-labels-idx1-ubyte.gz").unlink(),
        (folder / "train-labels-idx1-ubyte").mkdir(),
    ),
    "train-images-idx3-ubyte has 784 values instead of 30 x 28 x 28": _rewrite(
        "train-images-idx3-ubyte", _idx(_images(30))[: 16 + 784]
    ),
    "train-images-idx3-ubyte has 23521 values": _rewrite("train-images-idx3-ubyte", _idx(_images(30)) + b"x"),
    "train-images-idx3-ubyte is no IDX file of unsigned bytes in 3 dimensions": _rewrite(
        "train-images-idx3-ubyte", _idx(_labels(30))
    ),
    "t10k-images-idx3-ubyte is no IDX file": _rewrite(
        "t10k-images-idx3-ubyte", _idx(_images(12).astype(">f4"), code=13)
    ),
    "t10k-labels-idx1-ubyte is no IDX file": _rewrite("t10k-labels-idx1-ubyte", b"<html>not found</html>"),
    "train-labels-idx1-ubyte is no IDX file": _rewrite("train-labels-idx1-ubyte", b""),
    "t10k-labels-idx1-ubyte is no IDX file of": _rewrite("t10k-labels-idx1-ubyte", b"\0\0\x08\1\0\0\0"),
    "train-images has images of 32 x 32 pixels, not 28 x 28": _rewrite(
        "train-images-idx3-ubyte", _idx(_images(30, 32))
    ),
    "train-images has 30 images, and train-labels 29 labels": _rewrite("train-labels-idx1-ubyte", _idx(_labels(29))),
    "train-labels has the label 26, and there are 10 classes": _rewrite(
        "train-labels-idx1-ubyte", _idx(np.arange(30, dtype=np.uint8) % 27)
    ),
}


@pytest.mark.parametrize("folder", ["gzipped"], indirect=True)
@pytest.mark.parametrize("reason", _DAMAGES)
def test_files_that_are_not_fashion_mnist(folder, reason):
    _DAMAGES[reason](folder)
    with pytest.raises(UserError) as error:
        data.load(_config(folder))
    message = str(error.value)
    assert message.startswith(f"cannot read Fashion-MNIST in {folder}: {reason}")
    assert "apt-get install dataset-fashion-mnist" in message and "github.com/zalandoresearch/fashion-mnist" in message
    assert "\n" not in message and "--config.dataset.data_dir" in message


@pytest.mark.parametrize("folder", ["plain"], indirect=True)
def test_another_number_of_images(folder):
    config = _config(folder)
    config.split_sizes = ConfigDict({"train": 60_000, "test": 10_000})
    with pytest.raises(
        UserError, match="dataset 'fashion_mnist_idx' has 12 images in its split 'test' instead of 10000"
    ):
        data.load(config)
