"""Random images in the shapes of a dataset, made at once: what training costs when its input costs nothing."""

import math
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from examples.distill.sources import Size, Source
from examples.trainer.errors import UserError

_DIFFERENT_IMAGES = 16
_BYTES = 2**28  # at most, of the different images together
_MOST_IMAGES = 2**31 - 1


def source(sizes: ConfigDict, image_shape: tuple[int, int, int], num_classes: int) -> Source:
    """Makes splits of the given sizes, so that `train[:10%]` means what it means of the dataset itself."""
    if not sizes:
        raise UserError("synthetic data need --config.dataset.split_sizes, the number of images in each split")
    for name, size in sizes.items():
        if not isinstance(size, int) or not 1 <= size <= _MOST_IMAGES:
            raise UserError(
                f"bad --config.dataset.split_sizes.{name}={size!r}: give a whole number from 1 to {_MOST_IMAGES}"
            )
    rng = np.random.default_rng(0)
    different = min(_DIFFERENT_IMAGES, max(_BYTES // math.prod(image_shape), 1))
    pixels = rng.integers(256, size=(different, *image_shape), dtype=np.uint8)

    def example(index: int) -> dict[str, Any]:
        return {"image": pixels[index % different], "label": np.int32(index % num_classes)}

    def read(name: str) -> grain.MapDataset:
        """The examples of a split, with labels in turn; only the first 16 images differ from each other."""
        return grain.MapDataset.range(sizes[name]).map(example)

    return Source("the synthetic dataset", {name: Size(size) for name, size in sizes.items()}, read, in_memory=True)
