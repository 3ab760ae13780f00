"""Random images in the shapes of a dataset, made at once: what training costs when its input costs nothing."""

from pathlib import Path

import grain
import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from tensorflow_datasets.core import naming

_DIFFERENT_IMAGES = 16


def split_sizes(config: ConfigDict) -> tfds.core.SplitDict:
    """Makes splits of the sizes in `config`, so that `train[:10%]` means what it means of the dataset itself."""
    return tfds.core.SplitDict([_split(name, size) for name, size in config.items()])


def examples(count: int, image_shape: tuple[int, int, int], num_classes: int) -> grain.MapDataset:
    """Returns `count` examples with labels in turn; only the first 16 images differ from each other."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(_DIFFERENT_IMAGES, *image_shape), dtype=np.uint8)

    def example(index: int) -> dict[str, np.ndarray]:
        return {"image": pixels[index % _DIFFERENT_IMAGES], "label": np.int32(index % num_classes)}

    return grain.MapDataset.range(count).map(example)


def _split(name: str, size: int) -> tfds.core.SplitInfo:
    # TFDS slices a split only if it knows what its files are called.
    template = naming.ShardedFileTemplate(
        data_dir=Path("synthetic"), dataset_name="synthetic", split=name, filetype_suffix="array_record"
    )
    return tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0, filename_template=template)
