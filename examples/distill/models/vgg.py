"""VGG (Simonyan & Zisserman, ICLR 2015) with BatchNorm, as the distillation literature uses it on small images."""

import functools

import jax
from flax import nnx
from jax.typing import DTypeLike

from examples.distill.models.layers import ConvNet, ConvNorm, max_pool

_FEATURES = (64, 128, 256, 512, 512)


class VGG(ConvNet):
    """Five stages of 3x3 convolutions, with biases, and max pooling between them.

    Feature maps: one for each stage, before max pooling.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        input_shape: tuple[int, ...],
        convs: tuple[int, ...],  # of each stage
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.stages = nnx.List()
        width = input_shape[-1]
        for features, size in zip(_FEATURES, convs, strict=True):
            stage = nnx.List()
            for _ in range(size):
                stage.append(ConvNorm(width, features, use_bias=True, dtype=dtype, rngs=rngs))
                width = features
            self.stages.append(stage)
        self.classifier = nnx.Linear(width, num_classes, rngs=rngs)

    def feature_maps(self, images: jax.Array) -> list[jax.Array]:
        # Between the last two stages the published networks pool images of 64 pixels only, not those of 32.
        pooled_stages = 4 if images.shape[1] == 64 else 3
        x, maps = images, []
        for stage, convs in enumerate(self.stages):
            for conv in convs:
                x = nnx.relu(conv(x))
            maps.append(x)
            if stage < pooled_stages:
                x = max_pool(x, 2)
        return maps


vgg8 = functools.partial(VGG, convs=(1, 1, 1, 1, 1))
vgg11 = functools.partial(VGG, convs=(1, 1, 2, 2, 2))
vgg13 = functools.partial(VGG, convs=(2, 2, 2, 2, 2))
vgg16 = functools.partial(VGG, convs=(2, 2, 3, 3, 3))
vgg19 = functools.partial(VGG, convs=(2, 2, 4, 4, 4))
