"""ResNet (He et al., CVPR 2016), as torchvision defines it: the 3x3 convolution of a bottleneck carries the stride.

`resnet18_small` and `resnet50_small` are those for images of 32 or 64 pixels: a 3x3 stem of stride 1 and no max pooling.
"""

import functools

import jax
from flax import nnx
from jax.typing import DTypeLike

from examples.distill.models.layers import ConvNet, ConvNorm, max_pool


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions around which the input passes."""

    expansion = 1

    def __init__(
        self, in_features: int, features: int, strides: int, *, dtype: DTypeLike | None, rngs: nnx.Rngs
    ) -> None:
        conv_norm = functools.partial(ConvNorm, dtype=dtype, rngs=rngs)
        self.conv1 = conv_norm(in_features, features, 3, strides)
        self.conv2 = conv_norm(features, features, 3)
        self.downsample = _downsample(in_features, features, strides, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.conv1(x))
        return nnx.relu(self.conv2(y) + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nnx.Module):
    """A 3x3 convolution between two 1x1 convolutions, the last of them four times as wide."""

    expansion = 4

    def __init__(
        self, in_features: int, features: int, strides: int, *, dtype: DTypeLike | None, rngs: nnx.Rngs
    ) -> None:
        conv_norm = functools.partial(ConvNorm, dtype=dtype, rngs=rngs)
        out_features = features * self.expansion
        self.conv1 = conv_norm(in_features, features, 1)
        self.conv2 = conv_norm(features, features, 3, strides)
        self.conv3 = conv_norm(features, out_features, 1)
        self.downsample = _downsample(in_features, out_features, strides, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.conv1(x))
        y = nnx.relu(self.conv2(y))
        return nnx.relu(self.conv3(y) + (x if self.downsample is None else self.downsample(x)))


class ResNet(ConvNet):
    """A stem, then stages of blocks; the first block of every stage but the first halves the resolution.

    Feature maps: the stem before max pooling, then one for each stage.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        input_shape: tuple[int, ...],
        block: type[BasicBlock] | type[Bottleneck],
        stage_sizes: tuple[int, ...],
        stage_features: tuple[int, ...] = (64, 128, 256, 512),
        stem_features: int = 64,
        small_images: bool = False,  # a 3x3 stem of stride 1; otherwise 7x7 of stride 2, and max pooling
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.small_images = small_images
        kernel_size, strides = (3, 1) if small_images else (7, 2)
        self.stem = ConvNorm(input_shape[-1], stem_features, kernel_size, strides, dtype=dtype, rngs=rngs)
        self.stages = nnx.List()
        width = stem_features
        for stage, (size, features) in enumerate(zip(stage_sizes, stage_features, strict=True)):
            blocks = nnx.List()
            for i in range(size):
                strides = 2 if i == 0 and stage > 0 else 1
                blocks.append(block(width, features, strides, dtype=dtype, rngs=rngs))
                width = features * block.expansion
            self.stages.append(blocks)
        self.classifier = nnx.Linear(width, num_classes, rngs=rngs)

    def feature_maps(self, images: jax.Array) -> list[jax.Array]:
        x = nnx.relu(self.stem(images))
        maps = [x]
        if not self.small_images:
            x = max_pool(x, 3, padding=1)
        for blocks in self.stages:
            for block in blocks:
                x = block(x)
            maps.append(x)
        return maps


def _downsample(
    in_features: int, out_features: int, strides: int, *, dtype: DTypeLike | None, rngs: nnx.Rngs
) -> ConvNorm | None:
    """The 1x1 convolution of a shortcut whose two ends differ in shape."""
    if strides == 1 and in_features == out_features:
        return None
    return ConvNorm(in_features, out_features, 1, strides, dtype=dtype, rngs=rngs)


resnet18 = functools.partial(ResNet, block=BasicBlock, stage_sizes=(2, 2, 2, 2))
resnet34 = functools.partial(ResNet, block=BasicBlock, stage_sizes=(3, 4, 6, 3))
resnet50 = functools.partial(ResNet, block=Bottleneck, stage_sizes=(3, 4, 6, 3))
resnet18_small = functools.partial(resnet18, small_images=True)
resnet50_small = functools.partial(resnet50, small_images=True)
