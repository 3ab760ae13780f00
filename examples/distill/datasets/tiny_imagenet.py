"""Tiny-ImageNet as a TensorFlow Datasets dataset, from the folder `tiny-imagenet-200` that its archive unpacks to."""

import tensorflow_datasets as tfds


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
                    "label": tfds.features.ClassLabel(num_classes=200),
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
        return {
            "train": self._generate_examples(_train_images(folder, labels)),
            "validation": self._generate_examples(_validation_images(folder, labels)),
        }

    def _generate_examples(self, images):
        for path, label in images:
            yield path.name, {"image": path, "label": label}


def _train_images(folder, labels):
    for wnid, label in labels.items():
        for path in sorted((folder / "train" / wnid / "images").iterdir()):
            yield path, label


def _validation_images(folder, labels):
    for line in (folder / "val" / "val_annotations.txt").read_text().splitlines():
        name, wnid = line.split("\t")[:2]
        yield folder / "val" / "images" / name, labels[wnid]
