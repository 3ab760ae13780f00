"""From the bytes of an image to the pixels that a network sees: decoding, augmentation, and the view for evaluation.

Everything here works on one image, uint8 [height, width, channels], in NumPy, Pillow and simplejpeg, and is what
torchvision's transforms of the same names do to it: the published figures were made with those. Normalization is not
here: batches go to the device as they are, a quarter of the bytes, and `steps.py` normalizes them there.
"""

import contextlib
import functools
import io
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from examples.distill import registry
from examples.trainer.errors import UserError

_PAD = 4  # pixels on each side of a CIFAR image before it is cropped
_FASHION_PAD = 2  # and of an image of Fashion-MNIST, which fills its 28 pixels
_ROTATION = 20.0  # degrees, at most, in either direction
_CROP_AREA = (0.08, 1.0)  # of the image
_CROP_RATIO = (3 / 4, 4 / 3)  # width / height
_CROP_TRIES = 10
_RESIZE = 256 / 224  # the short side of an image before its centre is cropped, in units of the crop

_JPEG = b"\xff\xd8"  # how such a file begins
_DEEP_MODES = ("I", "F")  # of Pillow, and those that begin so: more than 8 bits

# What Pillow finds too large would be a warning that does not say which image it was. The filter is set once, since
# `warnings.catch_warnings` is not safe in threads.
warnings.simplefilter("error", Image.DecompressionBombWarning)

Augment = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]
View = Callable[[np.ndarray, int], np.ndarray]


class Preprocessing(NamedTuple):
    """What happens to an image on its way to a network whose input has `size` x `size` pixels."""

    augment: Augment  # (image, size, rng) -> image, in training
    view: View  # (image, size) -> image, in evaluation
    resizes: bool = False  # images of any size, to new pixels; else they must be stored in the size of the input


def decode(encoded: bytes, channels: int) -> np.ndarray:
    """Decodes an image file to uint8 [height, width, channels], with 1 or 3 channels.

    Raises:
      OSError: if it is none, or damaged, or has more than 8 bits per channel, or more pixels than `check_pixels` allows.
    """
    if channels == 3 and encoded.startswith(_JPEG):
        # A ValueError: what Pillow can read and simplejpeg cannot, such as a JPEG file with harmless damage.
        with contextlib.suppress(ValueError):
            height, width, *_ = simplejpeg.decode_jpeg_header(encoded)
            check_pixels(height, width)
            return simplejpeg.decode_jpeg(encoded, "RGB")
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if image.mode.startswith(_DEEP_MODES):
                raise OSError(f"it has more than 8 bits per channel (mode {image.mode} of Pillow)")
            return _from_pillow(image.convert("RGB" if channels == 3 else "L"))
    except OSError:
        raise
    except Exception as error:  # Pillow raises whatever it stumbles over in a damaged file.
        raise OSError(str(error) or type(error).__name__) from error


def check_pixels(height: int, width: int) -> None:
    """Raises an OSError if an image has more pixels than Pillow's own limit, 89 million."""
    if Image.MAX_IMAGE_PIXELS and height * width > Image.MAX_IMAGE_PIXELS:
        raise OSError(f"{width} x {height} pixels are more than the limit of {Image.MAX_IMAGE_PIXELS} pixels")


def pad_crop_flip(image: np.ndarray, size: int, rng: np.random.Generator, *, pad: int = _PAD) -> np.ndarray:
    """Pads by `pad` black pixels, crops at random, and flips every second image: the augmentation of CIFAR."""
    height, width, channels = image.shape
    padded = np.zeros((height + 2 * pad, width + 2 * pad, channels), np.uint8)  # np.pad takes 20 times as long
    padded[pad : pad + height, pad : pad + width] = image
    top, left = rng.integers(padded.shape[0] - size + 1), rng.integers(padded.shape[1] - size + 1)
    return _flip(padded[top : top + size, left : left + size], rng)


def rotate_flip(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Rotates by up to 20 degrees (nearest pixel, black corners) and flips: the augmentation of Tiny-ImageNet."""
    del size  # Images are stored in the size of the network's input.
    rotated = _to_pillow(image).rotate(rng.uniform(-_ROTATION, _ROTATION), Image.Resampling.NEAREST)
    return _flip(_from_pillow(rotated), rng)


def resized_crop_flip(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Crops a random part of 8% to 100% of the area, resizes it and flips: the augmentation of ImageNet."""
    left, top, width, height = _random_box(image.shape[1], image.shape[0], rng)
    return _flip(_resize(image[top : top + height, left : left + width], size, size), rng)


def resize_center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes the short side to 8/7 of `size` (256 for 224) and crops the centre: ImageNet's view for evaluation."""
    height, width, _ = image.shape
    short = round(size * _RESIZE)
    # As in torchvision the long side is rounded down, and the corner of the crop to the nearest pixel.
    resized = _resize(image, *(short * side // min(height, width) for side in (width, height)))
    top, left = (round((side - size) / 2) for side in resized.shape[:2])
    return resized[top : top + size, left : left + size]


PREPROCESSING = {
    "none": Preprocessing(augment=lambda image, size, rng: image, view=lambda image, size: image),
    "cifar": Preprocessing(augment=pad_crop_flip, view=lambda image, size: image),
    # The random crops and flips of the networks that the authors of Fashion-MNIST list as its benchmark.
    "fashion_mnist": Preprocessing(
        augment=functools.partial(pad_crop_flip, pad=_FASHION_PAD), view=lambda image, size: image
    ),
    "tiny_imagenet": Preprocessing(augment=rotate_flip, view=lambda image, size: image),
    "imagenet": Preprocessing(augment=resized_crop_flip, view=resize_center_crop, resizes=True),
}


def register(name: str, preprocessing: Preprocessing) -> None:
    """Makes `--config.dataset.preprocessing=NAME` stand for a preprocessing of the user's.

    Its functions return uint8 [size, size, channels]. They run in several threads at once, or in
    `--config.dataset.workers` processes, where they need not be importable.

    Raises:
      UserError: if there is a preprocessing of this name, or `preprocessing` is none. The same lines may run again.
    """
    registry.claim("preprocessing", name, PREPROCESSING)
    if not isinstance(preprocessing, Preprocessing) or not all(map(callable, preprocessing[:2])):
        raise UserError(f"images.register({name!r}): give an images.Preprocessing of two functions")
    PREPROCESSING[name] = preprocessing


def _random_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Returns (left, top, width, height) of a part with a random area and a random ratio of its sides."""
    for _ in range(_CROP_TRIES):
        area = rng.uniform(*_CROP_AREA) * width * height
        ratio = math.exp(rng.uniform(math.log(_CROP_RATIO[0]), math.log(_CROP_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    # An image that is too narrow or too wide: the largest part in the middle whose ratio is allowed.
    w, h = min(width, round(height * _CROP_RATIO[1])), min(height, round(width / _CROP_RATIO[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def _resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    return _from_pillow(_to_pillow(image).resize((width, height), Image.Resampling.BILINEAR))


def _to_pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _from_pillow(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return image[:, ::-1] if rng.random() < 0.5 else image
