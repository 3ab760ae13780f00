"""Networks of the example for tests that need no trained ones, made without compiling anything."""

import functools
import math

import jax
import numpy as np
from flax import nnx

from examples.distill import models


@functools.cache
def abstract(name, num_classes=10, **options):
    """The model with shapes in the place of arrays, which costs nothing; do not change it."""
    return nnx.eval_shape(lambda: models.build(name, num_classes, rngs=nnx.Rngs(0), **options))


def random(name, **options):
    """The model taken apart, initialized by NumPy: JAX would compile an initializer for every shape."""
    graphdef, params, rest = models.split(abstract(name, **options))
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        if path[-1].key == "kernel":
            std = math.sqrt(2 / (math.prod(leaf.shape[:-2]) * leaf.shape[-1]))
            return rng.normal(scale=std, size=leaf.shape).astype(leaf.dtype)
        if path[-1].key == "position":
            return rng.normal(scale=0.02, size=leaf.shape).astype(leaf.dtype)
        return np.full(leaf.shape, path[-1].key in ("scale", "var"), leaf.dtype)

    return graphdef, *jax.tree.map_with_path(fill, (params, rest))
