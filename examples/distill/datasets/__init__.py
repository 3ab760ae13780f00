"""TensorFlow Datasets builders of this example. Importing the package registers them with TFDS."""

from examples.distill.datasets.sklearn_digits import SklearnDigits

__all__ = ["SklearnDigits"]
