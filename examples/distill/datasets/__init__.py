"""The datasets of this example that TFDS does not have. Importing the package registers its builders with TFDS."""

from examples.distill.datasets.sklearn_digits import SklearnDigits
from examples.distill.datasets.tiny_imagenet import TinyImagenet

__all__ = ["SklearnDigits", "TinyImagenet"]
