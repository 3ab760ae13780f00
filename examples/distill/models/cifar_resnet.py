"""The three-stage ResNets of the distillation literature on CIFAR; "x4" means four times as wide as He et al.'s.

The depth counts layers: a stem, three stages of (depth - 2) / 6 basic blocks with two convolutions each, a classifier.
"""

import functools

from examples.distill.models.resnet import BasicBlock, ResNet

_resnet_x4 = functools.partial(
    ResNet, block=BasicBlock, stage_features=(64, 128, 256), stem_features=32, small_images=True
)

resnet8x4 = functools.partial(_resnet_x4, stage_sizes=(1, 1, 1))
resnet32x4 = functools.partial(_resnet_x4, stage_sizes=(5, 5, 5))
