"""Decoding, augmentation and the view for evaluation, against Pillow and against arithmetic by hand."""

import io
import itertools
import math
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from examples.distill import images


def _pixels(height, width, seed=0):
    """Smooth colours and some noise, which JPEG files can hold."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 17), np.cos(y / 23), np.sin((x + y) / 31)], axis=-1)
    noise = np.random.default_rng(seed).normal(scale=8, size=(height, width, 3))
    return np.clip(128 + 90 * waves + noise, 0, 255).astype(np.uint8)


def _encode(pixels, mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, **options)
    return file.getvalue()


def _by_pillow(encoded, mode="RGB"):
    return np.asarray(Image.open(io.BytesIO(encoded)).convert(mode))


@pytest.mark.parametrize(
    "options",
    [
        {"format": "jpeg", "quality": 95},
        {"format": "jpeg", "quality": 75, "subsampling": "4:4:4"},
        {"format": "jpeg", "progressive": True},
        {"format": "jpeg", "mode": "L"},
        {"format": "png"},
        {"format": "png", "mode": "RGBA"},
        {"format": "png", "mode": "L"},
    ],
)
def test_pixels_are_those_of_pillow(options):
    encoded = _encode(_pixels(75, 100), **options)
    np.testing.assert_array_equal(images.decode(encoded, 3), _by_pillow(encoded))


def test_one_channel():
    encoded = _encode(_pixels(8, 8), "L", format="png")
    np.testing.assert_array_equal(images.decode(encoded, 1), _by_pillow(encoded, "L")[..., None])


def test_cmyk_is_rgb_to_the_last_bit():
    encoded = _encode(_pixels(75, 100), "CMYK", format="jpeg")
    difference = images.decode(encoded, 3).astype(int) - _by_pillow(encoded)
    assert np.abs(difference).max() <= 1  # the two libraries round the product of two bytes differently


def test_harmless_damage_is_left_to_pillow():
    encoded = bytearray(_encode(_pixels(75, 100), format="jpeg"))
    encoded[len(encoded) // 2 : len(encoded) // 2 + 20] = bytes(20)
    np.testing.assert_array_equal(images.decode(bytes(encoded), 3), _by_pillow(encoded))


@pytest.mark.parametrize("encoded", [_encode(_pixels(75, 100), format="jpeg")[:1000], b"\xff\xd8", b"text", b""])
def test_what_is_no_image_is_an_os_error(encoded):
    with pytest.raises(OSError):
        images.decode(encoded, 3)


def _empty_png(width, height):
    """A PNG file without pixels; Pillow finds out its size, and asks no more."""

    def chunk(content):
        return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR" + header) + chunk(b"IDAT")


def _as_large_as(encoded, width, height):
    """Writes another size into the header of a JPEG file."""
    start = encoded.index(b"\xff\xc0") + 5
    return encoded[:start] + struct.pack(">HH", height, width) + encoded[start + 4 :]


@pytest.mark.parametrize(
    "encoded",
    [
        _empty_png(14_000, 14_000),  # Pillow's DecompressionBombError
        _empty_png(10_000, 10_000),  # its DecompressionBombWarning
        _as_large_as(_encode(_pixels(75, 100), format="jpeg"), 10_000, 10_000),
    ],
)
def test_images_that_are_too_large_are_an_os_error(encoded):
    with pytest.raises(OSError, match=r"limit of \d+ pixels"):
        images.decode(encoded, 3)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits_are_an_os_error(dtype):
    file = io.BytesIO()
    Image.fromarray(np.ones((8, 8), dtype)).save(file, format="tiff")
    with pytest.raises(OSError, match="more than 8 bits per channel"):
        images.decode(file.getvalue(), 1)


@pytest.mark.parametrize("format", ["ppm", "ico"])
def test_whatever_pillow_raises_is_an_os_error(format):
    rng = np.random.default_rng(0)
    intact = _encode(_pixels(32, 32), format=format)
    causes = set()
    for _ in range(100):
        damaged = bytearray(intact)
        for position in rng.integers(min(len(damaged), 100), size=3):
            damaged[position] = rng.integers(256)
        try:
            images.decode(bytes(damaged[: rng.integers(len(damaged) // 2, len(damaged))]), 3)
        except OSError as error:
            causes.add(type(error.__cause__))
    assert causes - {type(None)}  # Some of what was raised is no OSError of Pillow's.


@pytest.mark.parametrize(("augment", "pad"), [("cifar", 4), ("fashion_mnist", 2)])
def test_pad_crop_flip_takes_every_window_and_its_mirror_image(augment, pad):
    image = np.arange(1, 8 * 8 * 3 + 1, dtype=np.uint8).reshape(8, 8, 3)
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    windows = {}
    count = (2 * pad + 1) ** 2
    for top, left in itertools.product(range(2 * pad + 1), repeat=2):
        window = padded[top : top + 8, left : left + 8]
        windows |= {window.tobytes(): (top, left, False), window[:, ::-1].tobytes(): (top, left, True)}
    assert len(windows) == 2 * count
    rng = np.random.default_rng(0)
    seen = [windows[images.PREPROCESSING[augment].augment(image, 8, rng).tobytes()] for _ in range(3000)]
    assert len(set(seen)) == 2 * count  # one of 162 is missed with a probability of 162 exp(-3000 / 162) = 1e-6
    assert abs(sum(flipped for _, _, flipped in seen) / 3000 - 0.5) < 4 * math.sqrt(0.25 / 3000)


class _Chosen:
    """A random generator that gives what it is told to."""

    def __init__(self, uniform=(), random=0.9, integers=0):
        self._uniform, self._random, self._integers = iter(uniform), random, integers

    def uniform(self, low, high):
        value = next(self._uniform)
        assert low <= value <= high
        return value

    def random(self):
        return self._random

    def integers(self, high):
        return min(self._integers, high - 1)


@pytest.mark.parametrize("degrees", [-20.0, -7.0, 0.0, 11.0, 20.0])
def test_rotation_is_that_by_hand(degrees):
    image = _pixels(64, 64)
    y, x = np.mgrid[:64, :64] - 31.5
    angle = math.radians(degrees)  # counterclockwise, while y points down
    source_x, source_y = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
    column, row = np.floor(source_x + 32).astype(int), np.floor(source_y + 32).astype(int)
    # Pillow counts in units of 2**-16 pixels: over 64 pixels its errors add up to as many units, and a tie can go over.
    between = (np.abs([source_x - source_x.round(), source_y - source_y.round()]) < 64 * 2**-16).any(axis=0)
    assert between.mean() < 0.01 or degrees == 0
    inside = (column >= 0) & (column < 64) & (row >= 0) & (row < 64)
    expected = np.where(inside[..., None], image[row.clip(0, 63), column.clip(0, 63)], 0)
    rotated = images.rotate_flip(image, 64, _Chosen([degrees]))
    np.testing.assert_array_equal(rotated[~between], expected[~between])
    np.testing.assert_array_equal(images.rotate_flip(image, 64, _Chosen([degrees], random=0.1)), rotated[:, ::-1])


def test_rotations_reach_20_degrees_in_both_directions():
    class Spy:
        def uniform(self, low, high):
            assert (low, high) == (-20, 20)
            return 0.0

        def random(self):
            return 0.9

    images.rotate_flip(_pixels(64, 64), 64, Spy())


@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (300, 300), (100, 640)])
def test_random_boxes_have_the_area_and_the_ratio_of_the_paper(shape):
    height, width = shape
    rng = np.random.default_rng(0)
    boxes = np.array([images._random_box(width, height, rng) for _ in range(2000)])
    left, top, w, h = boxes.T
    assert (boxes >= 0).all() and (left + w <= width).all() and (top + h <= height).all()
    # A side is rounded to a pixel, so that areas and ratios are off by a pixel in the shorter side.
    slack = 1 + 1 / np.minimum(w, h)
    assert (w / h <= 4 / 3 * slack).all() and (w / h >= 3 / 4 / slack).all()
    assert (w * h >= 0.08 * width * height / slack**2).all()
    if shape == (300, 300):
        area = w * h / (300 * 300)
        assert area.min() < 0.09 and area.max() > 0.9
        assert (np.abs(np.log(w / h)) > 0.25).any()
        assert len(set(left)) > 100 and len(set(top)) > 100


@pytest.mark.parametrize(
    ("width", "height", "box"), [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10)), (1, 1, (0, 0, 1, 1))]
)
def test_the_box_of_an_image_that_is_too_narrow_lies_in_the_middle(width, height, box):
    assert images._random_box(width, height, np.random.default_rng(0)) == box


@pytest.mark.parametrize("flipped", [False, True])
def test_resized_crop_is_cropped_first_and_then_resized(flipped):
    image = _pixels(375, 500)
    # Half of the area, as wide as high: 306 x 306 pixels; the corner is the last one possible.
    chosen = _Chosen(uniform=[0.5, 0.0], random=0.1 if flipped else 0.9, integers=10_000)
    result = images.resized_crop_flip(image, 224, chosen)
    crop = Image.fromarray(image).crop((500 - 306, 375 - 306, 500, 375))
    expected = np.asarray(crop.resize((224, 224), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(result, expected[:, ::-1] if flipped else expected)


@pytest.mark.parametrize(
    ("height", "width", "resized", "corner"),
    [
        (375, 500, (341, 256), (58, 16)),
        (500, 375, (256, 341), (16, 58)),
        (256, 256, (256, 256), (16, 16)),
        (64, 97, (388, 256), (82, 16)),
    ],
)
def test_evaluation_takes_the_centre_of_a_resized_image(height, width, resized, corner):
    image = _pixels(height, width)
    left, top = corner
    whole = Image.fromarray(image).resize(resized, Image.Resampling.BILINEAR)
    expected = np.asarray(whole.crop((left, top, left + 224, top + 224)))
    np.testing.assert_array_equal(images.resize_center_crop(image, 224), expected)


def test_the_paper_views_small_images_as_they_are():
    image = _pixels(64, 64)
    for name in ("none", "cifar", "fashion_mnist", "tiny_imagenet"):
        assert images.PREPROCESSING[name].view(image, 64) is image
