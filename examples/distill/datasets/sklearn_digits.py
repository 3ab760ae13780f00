"""The handwritten digits that ship inside scikit-learn, as a TensorFlow Datasets dataset."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class SklearnDigits(tfds.core.GeneratorBasedBuilder):
    """1,797 grayscale images of 8x8 pixels with values from 0 to 16, in ten classes; nothing to download."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The test part of the UCI optical recognition of handwritten digits data, from scikit-learn.",
            homepage="https://scikit-learn.org/stable/datasets/toy_dataset.html",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # The images are part of an installed package.
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        from sklearn.datasets import load_digits  # Slow to import, and only needed to prepare.

        digits = load_digits()
        for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            yield index, {"image": _png(image.astype(np.uint8)), "label": int(label)}


def _png(image: np.ndarray) -> io.BytesIO:
    # TFDS encodes arrays with TensorFlow, but takes encoded bytes as they are.
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="png")
    file.seek(0)
    return file
