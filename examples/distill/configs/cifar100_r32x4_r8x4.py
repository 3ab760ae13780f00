"""CIFAR-100: ResNet32x4 teaches ResNet8x4.

    python -m examples.distill --config=cifar100_r32x4_r8x4 --config.teacher.checkpoint=FOLDER

FOLDER is a teacher that was imported or trained: see examples/distill/README.md. Top-1 in the paper: KD 73.33, KD with DOT 75.12.
"""

from ml_collections import ConfigDict

from examples.distill.configs._cifar100 import cifar100


def get_config() -> ConfigDict:
    config = cifar100(teacher="resnet32x4", student="resnet8x4")
    config.deepkd.task_weight = 0.5
    return config
