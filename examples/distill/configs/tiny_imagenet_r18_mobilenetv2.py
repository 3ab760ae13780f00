"""Tiny-ImageNet: ResNet18 teaches MobileNetV2.

    python -m examples.distill --config=tiny_imagenet_r18_mobilenetv2 --config.teacher.checkpoint=FOLDER

FOLDER is a teacher that was imported or trained: see examples/distill/README.md. Top-1 in the paper: KD 58.35, KD with DOT 64.01.
"""

from ml_collections import ConfigDict

from examples.distill.configs._tiny_imagenet import tiny_imagenet


def get_config() -> ConfigDict:
    return tiny_imagenet(student="mobilenetv2")
