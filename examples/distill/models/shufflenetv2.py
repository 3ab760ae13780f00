"""ShuffleNetV2 1x (Ma et al., ECCV 2018) for small images: a 1x1 stem and no max pooling."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from examples.distill.models.layers import ConvNet, ConvNorm, shuffle

_STEM_FEATURES = 24
_STAGES = ((116, 4), (232, 8), (464, 4))  # features, units
_HEAD_FEATURES = 1024


class Unit(nnx.Module):
    """Half of the input's channels pass by a bottleneck with a depthwise convolution; then all are shuffled."""

    def __init__(self, features: int, *, dtype: DTypeLike | None, rngs: nnx.Rngs) -> None:
        self.branch = _Branch(features // 2, features // 2, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        kept, changed = jnp.split(x, 2, axis=-1)
        return shuffle(jnp.concatenate([kept, self.branch(changed)], axis=-1), groups=2)


class DownUnit(nnx.Module):
    """Two branches, both of stride 2 and both fed with the whole input; then their channels are shuffled."""

    def __init__(self, in_features: int, out_features: int, *, dtype: DTypeLike | None, rngs: nnx.Rngs) -> None:
        conv_norm = functools.partial(ConvNorm, dtype=dtype, rngs=rngs)
        self.depthwise = conv_norm(in_features, in_features, 3, 2, groups=in_features)
        self.pointwise = conv_norm(in_features, out_features // 2, 1)
        self.branch = _Branch(in_features, out_features // 2, 2, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.pointwise(self.depthwise(x)))
        return shuffle(jnp.concatenate([y, self.branch(x)], axis=-1), groups=2)


class ShuffleNetV2(ConvNet):
    """Feature maps: the stem, one for each stage, the last 1x1 convolution."""

    def __init__(
        self, num_classes: int, *, input_shape: tuple[int, ...], dtype: DTypeLike | None = None, rngs: nnx.Rngs
    ) -> None:
        self.stem = ConvNorm(input_shape[-1], _STEM_FEATURES, 1, dtype=dtype, rngs=rngs)
        self.stages = nnx.List()
        width = _STEM_FEATURES
        for features, size in _STAGES:
            units = [Unit(features, dtype=dtype, rngs=rngs) for _ in range(size - 1)]
            self.stages.append(nnx.List([DownUnit(width, features, dtype=dtype, rngs=rngs), *units]))
            width = features
        self.head = ConvNorm(width, _HEAD_FEATURES, 1, dtype=dtype, rngs=rngs)
        self.classifier = nnx.Linear(_HEAD_FEATURES, num_classes, rngs=rngs)

    def feature_maps(self, images: jax.Array) -> list[jax.Array]:
        x = nnx.relu(self.stem(images))
        maps = [x]
        for units in self.stages:
            for unit in units:
                x = unit(x)
            maps.append(x)
        return [*maps, nnx.relu(self.head(x))]


class _Branch(nnx.Module):
    """1x1, depthwise 3x3, 1x1; no activation after the depthwise convolution."""

    def __init__(
        self, in_features: int, out_features: int, strides: int, *, dtype: DTypeLike | None, rngs: nnx.Rngs
    ) -> None:
        conv_norm = functools.partial(ConvNorm, dtype=dtype, rngs=rngs)
        self.conv1 = conv_norm(in_features, out_features, 1)
        self.depthwise = conv_norm(out_features, out_features, 3, strides, groups=out_features)
        self.conv2 = conv_norm(out_features, out_features, 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv1(x))
        return nnx.relu(self.conv2(self.depthwise(x)))
