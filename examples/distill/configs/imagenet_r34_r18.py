"""ImageNet: ResNet34 teaches ResNet18.

    python -m examples.distill --config=imagenet_r34_r18 --config.teacher.checkpoint=FOLDER

FOLDER is a teacher that was imported or trained: see examples/distill/README.md. Top-1 in the paper: KD 71.03, KD with DOT 71.72.
"""

from ml_collections import ConfigDict

from examples.distill.configs._imagenet import imagenet


def get_config() -> ConfigDict:
    return imagenet(teacher="resnet34", student="resnet18")
