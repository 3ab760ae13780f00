"""A dataset of made-up JPEG files, for benchmarks: in a module that worker processes can import."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

_SIZES = ((500, 375), (500, 375), (500, 375), (375, 500), (500, 333), (400, 400))  # width, height
_QUALITY = 93


class JpegImages(tfds.core.GeneratorBasedBuilder):
    """`count` JPEG files of the sizes of ImageNet's, stored as `imagenet2012` is."""

    VERSION = tfds.core.Version("1.0.0")
    count: int

    def _info(self):
        image = tfds.features.Image(encoding_format="jpeg")
        features = {"image": image, "label": tfds.features.ClassLabel(num_classes=1000)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index, encoded in enumerate(_jpeg_files(self.count)):
            yield index, {"image": io.BytesIO(encoded), "label": index % 1000}


def _jpeg_files(count):
    """Colours that vary on all scales, as in photographs, and the noise of a sensor."""
    rng = np.random.default_rng(0)
    canvas = np.full((1000, 1000, 3), 128.0)
    for scale in (2, 4, 8, 16, 32, 64, 128):
        coarse = Image.fromarray(rng.integers(256, size=(1000 // scale, 1000 // scale, 3), dtype=np.uint8))
        canvas += (np.asarray(coarse.resize((1000, 1000), Image.Resampling.BICUBIC)) - 128.0) * scale**0.4 / 5
    canvas = np.clip(canvas + rng.normal(scale=4, size=canvas.shape), 0, 255).astype(np.uint8)
    for index in range(count):
        width, height = _SIZES[index % len(_SIZES)]
        left, top = rng.integers(1000 - width), rng.integers(1000 - height)
        file = io.BytesIO()
        Image.fromarray(canvas[top : top + height, left : left + width]).save(file, format="jpeg", quality=_QUALITY)
        yield file.getvalue()
