"""Tiny-ImageNet as a TensorFlow Datasets dataset, from the folder `tiny-imagenet-200` that its archive unpacks to."""

import tensorflow_datasets as tfds

_CLASSES = 200


class TinyImagenet(tfds.core.GeneratorBasedBuilder):
    """100,000 training and 10,000 validation images of 64x64 pixels in 200 classes; the test images have no labels."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put the folder tiny-imagenet-200, unpacked from tiny-imagenet-200.zip, there."

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="200 classes of ImageNet, scaled down (Stanford CS231n).",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(64, 64, 3), encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(num_classes=_CLASSES),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        folder = dl_manager.manual_dir / "tiny-imagenet-200"
        if not (folder / "wnids.txt").exists():
            raise FileNotFoundError(f"no tiny-imagenet-200/wnids.txt in {dl_manager.manual_dir}")
        # In alphabetical order, as PyTorch's folders of images number them; wnids.txt itself is in no order.
        labels = {wnid: label for label, wnid in enumerate(sorted((folder / "wnids.txt").read_text().split()))}
        if len(labels) != _CLASSES:
            raise ValueError(f"{folder / 'wnids.txt'} lists {len(labels)} classes instead of {_CLASSES}")
        return {
            "train": self._generate_examples(_train_images(folder, labels)),
            "validation": self._generate_examples(_validation_images(folder, labels)),
        }

    def _generate_examples(self, images):
        for path, label in images:
            yield path.name, {"image": path, "label": label}


def _train_images(folder, labels):
    for wnid, label in labels.items():
        paths = sorted((folder / "train" / wnid / "images").glob("*.JPEG"))
        if not paths:
            raise FileNotFoundError(f"no images in {folder / 'train' / wnid / 'images'}")
        for path in paths:
            yield path, label


def _validation_images(folder, labels):
    for line in (folder / "val" / "val_annotations.txt").read_text().splitlines():
        name, wnid, *_ = [*line.split("\t"), "", ""]
        if wnid not in labels:
            raise ValueError(f"{folder / 'val' / 'val_annotations.txt'} gives no known class in its line {line!r}")
        yield folder / "val" / "images" / name, labels[wnid]
