"""CIFAR-100: ResNet32x4 teaches ShuffleNetV2.

    python -m examples.distill --config=cifar100_r32x4_shufflev2 --config.teacher.checkpoint=FOLDER

FOLDER is a teacher that was imported or trained: see examples/distill/README.md. Top-1 in the paper: KD 74.45, KD with DOT 75.55.
"""

from ml_collections import ConfigDict

from examples.distill.configs._cifar100 import cifar100


def get_config() -> ConfigDict:
    config = cifar100(teacher="resnet32x4", student="shufflenetv2")
    config.optimizer.learning_rate = 0.01
    return config
