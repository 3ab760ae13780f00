"""CIFAR-100: VGG13 teaches VGG8.

    python -m examples.distill --config=cifar100_vgg13_vgg8 --config.teacher.checkpoint=FOLDER

FOLDER is a teacher that was imported or trained: see examples/distill/README.md. Top-1 in the paper: KD 72.98, KD with DOT 73.77.
"""

from ml_collections import ConfigDict

from examples.distill.configs._cifar100 import cifar100


def get_config() -> ConfigDict:
    config = cifar100(teacher="vgg13", student="vgg8")
    config.dkd.beta = 6.0
    config.deepkd.delta_non_target = 0.05
    return config
