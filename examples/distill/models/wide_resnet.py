"""Wide ResNet (Zagoruyko & Komodakis, BMVC 2016): `wrn_40_2` has 40 layers and is twice as wide as He et al.'s.

The depth counts layers: a stem, three stages of (depth - 4) / 6 blocks with two convolutions each, the 1x1 convolutions of
the three shortcuts, a classifier. BatchNorm and ReLU stand before each convolution.
"""

import functools

import jax
from flax import nnx
from jax.typing import DTypeLike

from examples.distill.models.layers import BatchNorm, ConvNet, ConvNorm, conv


class PreactivationBlock(nnx.Module):
    """Two 3x3 convolutions around which the input passes; if the width changes, by a 1x1 convolution, normalized first."""

    def __init__(
        self, in_features: int, features: int, strides: int, *, dtype: DTypeLike | None, rngs: nnx.Rngs
    ) -> None:
        self.norm = BatchNorm(in_features, rngs=rngs)
        self.conv1 = ConvNorm(in_features, features, 3, strides, dtype=dtype, rngs=rngs)
        self.conv2 = conv(features, features, 3, dtype=dtype, rngs=rngs)
        widens = in_features != features
        self.shortcut = conv(in_features, features, 1, strides, dtype=dtype, rngs=rngs) if widens else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.conv2(nnx.relu(self.conv1(y)))


class WideResNet(ConvNet):
    """Feature maps: the stem and one for each stage, all before BatchNorm and ReLU except the last."""

    def __init__(
        self,
        num_classes: int,
        *,
        input_shape: tuple[int, ...],
        depth: int,
        width: int,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        in_features = 16
        self.stem = conv(input_shape[-1], in_features, 3, dtype=dtype, rngs=rngs)
        self.stages = nnx.List()
        for stage, features in enumerate((16 * width, 32 * width, 64 * width)):
            blocks = nnx.List()
            for i in range((depth - 4) // 6):
                strides = 2 if i == 0 and stage > 0 else 1
                blocks.append(PreactivationBlock(in_features, features, strides, dtype=dtype, rngs=rngs))
                in_features = features
            self.stages.append(blocks)
        self.norm = BatchNorm(in_features, rngs=rngs)
        self.classifier = nnx.Linear(in_features, num_classes, rngs=rngs)

    def feature_maps(self, images: jax.Array) -> list[jax.Array]:
        x = self.stem(images)
        maps = [x]
        for blocks in self.stages:
            for block in blocks:
                x = block(x)
            maps.append(x)
        return [*maps[:-1], nnx.relu(self.norm(x))]


wrn_16_1 = functools.partial(WideResNet, depth=16, width=1)
wrn_16_2 = functools.partial(WideResNet, depth=16, width=2)
wrn_40_1 = functools.partial(WideResNet, depth=40, width=1)
wrn_40_2 = functools.partial(WideResNet, depth=40, width=2)
