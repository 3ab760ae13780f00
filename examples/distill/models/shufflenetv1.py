"""ShuffleNetV1 1x with three groups (Zhang et al., CVPR 2018) for small images: a 1x1 stem and no max pooling.

Unlike in the paper, and as in the distillation literature, ReLU also follows the depthwise convolution.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from examples.distill.models.layers import ConvNet, ConvNorm, shuffle

_STEM_FEATURES = 24
_STAGES = ((240, 4), (480, 8), (960, 4))  # features, units
_GROUPS = 3


class Unit(nnx.Module):
    """A bottleneck of grouped 1x1 convolutions, added to the input; with stride 2, beside its average pooling."""

    def __init__(
        self, in_features: int, out_features: int, strides: int, *, groups: int, dtype: DTypeLike | None, rngs: nnx.Rngs
    ) -> None:
        conv_norm = functools.partial(ConvNorm, dtype=dtype, rngs=rngs)
        features = out_features - in_features if strides == 2 else out_features
        self.groups = groups  # of the first convolution
        self.strides = strides
        self.conv1 = conv_norm(in_features, features // 4, 1, groups=groups)
        self.depthwise = conv_norm(features // 4, features // 4, 3, strides, groups=features // 4)
        self.conv2 = conv_norm(features // 4, features, 1, groups=_GROUPS)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = shuffle(nnx.relu(self.conv1(x)), self.groups)
        y = self.conv2(nnx.relu(self.depthwise(y)))
        if self.strides == 1:
            return nnx.relu(x + y)
        pooled = nnx.avg_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        return nnx.relu(jnp.concatenate([y, pooled], axis=-1))


class ShuffleNetV1(ConvNet):
    """Feature maps: the stem, one for each stage."""

    def __init__(
        self, num_classes: int, *, input_shape: tuple[int, ...], dtype: DTypeLike | None = None, rngs: nnx.Rngs
    ) -> None:
        self.stem = ConvNorm(input_shape[-1], _STEM_FEATURES, 1, dtype=dtype, rngs=rngs)
        self.stages = nnx.List()
        width = _STEM_FEATURES
        for stage, (features, size) in enumerate(_STAGES):
            units = nnx.List()
            for i in range(size):
                strides, groups = 2 if i == 0 else 1, 1 if stage == i == 0 else _GROUPS
                units.append(Unit(width, features, strides, groups=groups, dtype=dtype, rngs=rngs))
                width = features
            self.stages.append(units)
        self.classifier = nnx.Linear(width, num_classes, rngs=rngs)

    def feature_maps(self, images: jax.Array) -> list[jax.Array]:
        x = nnx.relu(self.stem(images))
        maps = [x]
        for units in self.stages:
            for unit in units:
                x = unit(x)
            maps.append(x)
        return maps
