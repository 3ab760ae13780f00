"""TensorFlow Datasets builders of this example. Importing the package registers them with TFDS."""

from examples.distill.datasets.sklearn_digits import SklearnDigits
from examples.distill.datasets.tiny_imagenet import TinyImagenet

__all__ = ["SklearnDigits", "TinyImagenet"]
