"""Fashion-MNIST from the four files that its authors publish, in the IDX format of MNIST.

Xiao, Rasul, Vollgraf, 2017, arXiv 1708.07747: 60,000 training and 10,000 test images of 28x28 pixels, in ten classes.
"""

import gzip
import math
import zlib

import numpy as np
from etils import epath

from examples.trainer.errors import UserError

_DEBIAN = "/usr/share/datasets/fashion-mnist"
_SPLITS = {"train": "train", "test": "t10k"}  # and how the names of their files begin
_SIDE = 28
_CLASSES = 10

_GZIP = b"\x1f\x8b"  # how such a file begins
_UINT8 = 8  # the code of this type in IDX


def fashion_mnist_idx(data_dir: epath.Path | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads both splits from a folder; without one, from that of Debian's package `dataset-fashion-mnist`.

    The files are those of https://github.com/zalandoresearch/fashion-mnist, gzipped or not.
    """
    folder = epath.Path(_DEBIAN) if data_dir is None else data_dir
    return {split: _read_split(folder, prefix) for split, prefix in _SPLITS.items()}


def _read_split(folder: epath.Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    pixels = _read(folder / f"{prefix}-images-idx3-ubyte", dimensions=3)
    labels = _read(folder / f"{prefix}-labels-idx1-ubyte", dimensions=1)
    if pixels.shape[1:] != (_SIDE, _SIDE):
        raise _bad(folder, f"{prefix}-images has images of {pixels.shape[1]} x {pixels.shape[2]} pixels, not 28 x 28")
    if len(pixels) != len(labels):
        raise _bad(folder, f"{prefix}-images has {len(pixels)} images, and {prefix}-labels {len(labels)} labels")
    if labels.max(initial=0) >= _CLASSES:
        raise _bad(folder, f"{prefix}-labels has the label {labels.max()}, and there are {_CLASSES} classes")
    return pixels, labels


def _read(path: epath.Path, dimensions: int) -> np.ndarray:
    """Reads an IDX file: two zero bytes, the type, the number of dimensions, their sizes (big-endian), the values."""
    name = path.name
    try:
        zipped = path.parent / f"{name}.gz"
        content = (zipped if zipped.exists() else path).read_bytes()
        content = gzip.decompress(content) if content.startswith(_GZIP) else content
    except FileNotFoundError:
        raise _bad(path.parent, f"no {name}.gz, nor {name}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise _bad(path.parent, f"cannot read {name}: {error}") from error
    header = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, _UINT8, dimensions]) or len(content) < header:
        raise _bad(path.parent, f"{name} is no IDX file of unsigned bytes in {dimensions} dimensions")
    shape = np.frombuffer(content[4:header], ">u4").tolist()
    values = np.frombuffer(content[header:], np.uint8)
    if values.size != math.prod(shape):
        raise _bad(path.parent, f"{name} has {values.size} values instead of {' x '.join(map(str, shape))}")
    return values.reshape(shape)


def _bad(folder: epath.Path, reason: str) -> UserError:
    return UserError(
        f"cannot read Fashion-MNIST in {folder}: {reason}; get its four files with apt-get install dataset-fashion-mnist,"
        f" which puts them into {_DEBIAN}, or from https://github.com/zalandoresearch/fashion-mnist, and give their folder"
        " with --config.dataset.data_dir"
    )
