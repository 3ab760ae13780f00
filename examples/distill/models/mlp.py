"""Multilayer perceptron."""

import itertools
import math

import jax
from flax import nnx


class MLP(nnx.Module):
    """Hidden layers of the widths `hidden`, ReLU after each, then one linear layer to the classes."""

    def __init__(
        self, num_classes: int, *, input_shape: tuple[int, ...], hidden: tuple[int, ...], rngs: nnx.Rngs
    ) -> None:
        widths = (math.prod(input_shape), *hidden)
        self.hidden = nnx.List(nnx.Linear(n, m, rngs=rngs) for n, m in itertools.pairwise(widths))
        self.classifier = nnx.Linear(widths[-1], num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(images.shape[0], -1)
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        return self.classifier(x)
