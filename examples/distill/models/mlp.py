"""Multilayer perceptron."""

import itertools
import math

import jax
from flax import nnx
from jax.typing import DTypeLike


class MLP(nnx.Module):
    """Hidden layers of the widths `hidden`, ReLU after each, then one linear layer to the classes."""

    def __init__(
        self,
        num_classes: int,
        *,
        input_shape: tuple[int, ...],
        hidden: tuple[int, ...],
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        widths = (math.prod(input_shape), *hidden)
        self.hidden = nnx.List(nnx.Linear(n, m, dtype=dtype, rngs=rngs) for n, m in itertools.pairwise(widths))
        self.classifier = nnx.Linear(widths[-1], num_classes, rngs=rngs)

    def __call__(
        self, images: jax.Array, *, with_features: bool = False
    ) -> jax.Array | tuple[jax.Array, list[jax.Array]]:
        """Returns the logits; `with_features`, also the hidden activations."""
        x, features = images.reshape(images.shape[0], -1), []
        for layer in self.hidden:
            x = nnx.relu(layer(x))
            features.append(x)
        logits = self.classifier(x)
        return (logits, features) if with_features else logits
