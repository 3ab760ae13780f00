"""MobileNetV1 (Howard et al., 2017) for ImageNet and MobileNetV2 (Sandler et al., CVPR 2018) for Tiny-ImageNet."""

import functools

import jax
from flax import nnx
from jax.typing import DTypeLike

from examples.distill.models.layers import ConvNet, ConvNorm

_V1_STAGES = ((64, 1), (128, 2), (256, 2), (512, 6), (1024, 2))  # features, blocks
_V2_STAGES = (  # features, blocks, stride of the first block
    (16, 1, 1),
    (24, 2, 2),
    (32, 3, 2),
    (64, 4, 2),
    (96, 3, 1),
    (160, 3, 1),
    (320, 1, 1),
)
_STEM_FEATURES = 32
_V2_HEAD_FEATURES = 1280


class SeparableBlock(nnx.Module):
    """A depthwise 3x3 convolution and a 1x1 convolution, each with its activation."""

    def __init__(
        self, in_features: int, out_features: int, strides: int, *, dtype: DTypeLike | None, rngs: nnx.Rngs
    ) -> None:
        conv_norm = functools.partial(ConvNorm, dtype=dtype, rngs=rngs)
        self.depthwise = conv_norm(in_features, in_features, 3, strides, groups=in_features)
        self.pointwise = conv_norm(in_features, out_features, 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.pointwise(nnx.relu(self.depthwise(x))))


class MobileNetV1(ConvNet):
    """Feature maps: one for each resolution. The stem shares its resolution with the first stage."""

    def __init__(
        self, num_classes: int, *, input_shape: tuple[int, ...], dtype: DTypeLike | None = None, rngs: nnx.Rngs
    ) -> None:
        self.stem = ConvNorm(input_shape[-1], _STEM_FEATURES, 3, 2, dtype=dtype, rngs=rngs)
        self.stages = nnx.List()
        width = _STEM_FEATURES
        for stage, (features, size) in enumerate(_V1_STAGES):
            blocks = nnx.List()
            for i in range(size):
                strides = 2 if i == 0 and stage > 0 else 1
                blocks.append(SeparableBlock(width, features, strides, dtype=dtype, rngs=rngs))
                width = features
            self.stages.append(blocks)
        self.classifier = nnx.Linear(width, num_classes, rngs=rngs)

    def feature_maps(self, images: jax.Array) -> list[jax.Array]:
        x, maps = nnx.relu(self.stem(images)), []
        for blocks in self.stages:
            for block in blocks:
                x = block(x)
            maps.append(x)
        return maps


class InvertedResidual(nnx.Module):
    """1x1 to `expansion` times the width, depthwise 3x3, 1x1 back without activation; all with biases."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        strides: int,
        *,
        expansion: int,
        dtype: DTypeLike | None,
        rngs: nnx.Rngs,
    ) -> None:
        conv_norm = functools.partial(ConvNorm, use_bias=True, dtype=dtype, rngs=rngs)
        features = in_features * expansion
        self.expand = conv_norm(in_features, features, 1)
        self.depthwise = conv_norm(features, features, 3, strides, groups=features)
        self.project = conv_norm(features, out_features, 1)
        self.is_residual = strides == 1 and in_features == out_features

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu6(self.expand(x))
        y = self.project(nnx.relu6(self.depthwise(y)))
        return x + y if self.is_residual else y


class MobileNetV2(ConvNet):
    """Feature maps: the stem, one for each stage (linear, as its blocks end), the last 1x1 convolution.

    The classifier is the published 1x1 convolution on the pooled features, written as the linear layer that it is.
    """

    def __init__(
        self, num_classes: int, *, input_shape: tuple[int, ...], dtype: DTypeLike | None = None, rngs: nnx.Rngs
    ) -> None:
        conv_norm = functools.partial(ConvNorm, use_bias=True, dtype=dtype, rngs=rngs)
        # As published, 1x1 and yet padded: the image grows by a border of one pixel.
        self.stem = conv_norm(input_shape[-1], _STEM_FEATURES, 1, padding=1)
        self.stages = nnx.List()
        width = _STEM_FEATURES
        for stage, (features, size, first_strides) in enumerate(_V2_STAGES):
            blocks = nnx.List()
            for i in range(size):
                strides, expansion = first_strides if i == 0 else 1, 6 if stage > 0 else 1
                blocks.append(InvertedResidual(width, features, strides, expansion=expansion, dtype=dtype, rngs=rngs))
                width = features
            self.stages.append(blocks)
        self.head = conv_norm(width, _V2_HEAD_FEATURES, 1)
        self.classifier = nnx.Linear(_V2_HEAD_FEATURES, num_classes, rngs=rngs)

    def feature_maps(self, images: jax.Array) -> list[jax.Array]:
        x = nnx.relu6(self.stem(images))
        maps = [x]
        for blocks in self.stages:
            for block in blocks:
                x = block(x)
            maps.append(x)
        return [*maps, nnx.relu6(self.head(x))]
