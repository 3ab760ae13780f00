"""The three-stage ResNets of the distillation literature on CIFAR (He et al., CVPR 2016); "x4" means four times as wide.

The depth counts layers: a stem, three stages of (depth - 2) / 6 basic blocks with two convolutions each, a classifier.
"""

import functools

from examples.distill.models.resnet import BasicBlock, ResNet


def _resnet(depth: int, stem_features: int = 16, stage_features: tuple[int, ...] = (16, 32, 64)) -> functools.partial:
    return functools.partial(
        ResNet,
        block=BasicBlock,
        stage_sizes=3 * ((depth - 2) // 6,),
        stage_features=stage_features,
        stem_features=stem_features,
        small_images=True,
    )


resnet8 = _resnet(8)
resnet14 = _resnet(14)
resnet20 = _resnet(20)
resnet32 = _resnet(32)
resnet44 = _resnet(44)
resnet56 = _resnet(56)
resnet110 = _resnet(110)
resnet8x4 = _resnet(8, 32, (64, 128, 256))
resnet32x4 = _resnet(32, 32, (64, 128, 256))
