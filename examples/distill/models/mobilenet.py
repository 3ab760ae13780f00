"""MobileNetV1 (Howard et al., 2017) for ImageNet and MobileNetV2 (Sandler et al., CVPR 2018) for small images.

`mobilenetv2` is the one that the distillation literature trains on Tiny-ImageNet, `mobilenetv2_half` the one of CIFAR-100:
half as wide, of other strides, with ReLU in the place of ReLU6 and without biases.
"""

import functools
from collections.abc import Callable

import jax
from flax import nnx
from jax.typing import DTypeLike

from examples.distill.models.layers import ConvNet, ConvNorm

_V1_STAGES = ((64, 1), (128, 2), (256, 2), (512, 6), (1024, 2))  # features, blocks
_V2_STAGES = ((16, 1), (24, 2), (32, 3), (64, 4), (96, 3), (160, 3), (320, 1))  # features, blocks
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
    """1x1 to `expansion` times the width, depthwise 3x3, 1x1 back without activation."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        strides: int,
        *,
        expansion: int,
        activation: Callable[[jax.Array], jax.Array],
        use_bias: bool,
        dtype: DTypeLike | None,
        rngs: nnx.Rngs,
    ) -> None:
        conv_norm = functools.partial(ConvNorm, use_bias=use_bias, dtype=dtype, rngs=rngs)
        features = in_features * expansion
        self.expand = conv_norm(in_features, features, 1)
        self.depthwise = conv_norm(features, features, 3, strides, groups=features)
        self.project = conv_norm(features, out_features, 1)
        self.activation = activation
        self.is_residual = strides == 1 and in_features == out_features

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.activation(self.expand(x))
        y = self.project(self.activation(self.depthwise(y)))
        return x + y if self.is_residual else y


class MobileNetV2(ConvNet):
    """Feature maps: the stem, one for each stage (linear, as its blocks end), the last 1x1 convolution.

    The classifier of the published `mobilenetv2`, a 1x1 convolution on the pooled features, is written as the linear
    layer that it is.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        input_shape: tuple[int, ...],
        width: float,  # times those of the paper
        strides: tuple[int, ...],  # of the first block of each stage
        stem_kernel_size: int,
        stem_strides: int,
        activation: Callable[[jax.Array], jax.Array],
        use_bias: bool,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        options = {"use_bias": use_bias, "dtype": dtype, "rngs": rngs}
        features = int(_STEM_FEATURES * width)
        # As published, padded even where it is 1x1: the image then grows by a border of one pixel.
        self.stem = ConvNorm(input_shape[-1], features, stem_kernel_size, stem_strides, padding=1, **options)
        self.stages = nnx.List()
        for stage, (out_features, size) in enumerate(_V2_STAGES):
            out_features = int(out_features * width)
            blocks = nnx.List()
            for i in range(size):
                block = functools.partial(InvertedResidual, expansion=6 if stage > 0 else 1, activation=activation)
                blocks.append(block(features, out_features, strides[stage] if i == 0 else 1, **options))
                features = out_features
            self.stages.append(blocks)
        self.head = ConvNorm(features, _V2_HEAD_FEATURES, 1, **options)
        self.activation = activation
        self.classifier = nnx.Linear(_V2_HEAD_FEATURES, num_classes, rngs=rngs)

    def feature_maps(self, images: jax.Array) -> list[jax.Array]:
        x = self.activation(self.stem(images))
        maps = [x]
        for blocks in self.stages:
            for block in blocks:
                x = block(x)
            maps.append(x)
        return [*maps, self.activation(self.head(x))]


mobilenetv2 = functools.partial(
    MobileNetV2,
    width=1.0,
    strides=(1, 2, 2, 2, 1, 1, 1),
    stem_kernel_size=1,
    stem_strides=1,
    activation=nnx.relu6,
    use_bias=True,
)
mobilenetv2_half = functools.partial(
    MobileNetV2,
    width=0.5,
    strides=(1, 1, 2, 2, 1, 2, 1),
    stem_kernel_size=3,
    stem_strides=2,
    activation=nnx.relu,
    use_bias=False,
)
