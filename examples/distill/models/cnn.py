"""A small convolutional network, for images such as Fashion-MNIST's."""

from collections.abc import Sequence

import jax
from flax import nnx
from jax.typing import DTypeLike

from examples.distill.models.layers import ConvNet, ConvNorm


class CNN(ConvNet):
    """Stages of two 3x3 convolutions, of which the first has stride 2, each with BatchNorm and ReLU.

    Feature maps: one for each stage.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        input_shape: tuple[int, ...],
        widths: Sequence[int] = (16, 32),  # of each stage
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        if min(widths, default=0) < 1:
            raise ValueError(f"{widths=} must have a number of at least 1 for each stage")
        self.stages = nnx.List()
        width = input_shape[-1]
        for features in widths:
            conv1 = ConvNorm(width, features, 3, 2, dtype=dtype, rngs=rngs)
            conv2 = ConvNorm(features, features, 3, dtype=dtype, rngs=rngs)
            self.stages.append(nnx.List([conv1, conv2]))
            width = features
        self.classifier = nnx.Linear(width, num_classes, rngs=rngs)

    def feature_maps(self, images: jax.Array) -> list[jax.Array]:
        x, maps = images, []
        for convs in self.stages:
            for conv in convs:
                x = nnx.relu(conv(x))
            maps.append(x)
        return maps
