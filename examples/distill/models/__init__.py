"""Models by name, and their use as pure functions of plain pytrees.

`build` makes a Flax NNX module and `split` takes it apart: a static `graphdef`, the `params` that the optimizer
trains, and `rest`, everything else the model carries along (BatchNorm statistics, random state). Both trees are nested
dicts of arrays, so checkpoints can be read without the model's code. `apply` runs them.
"""

from typing import Any

import jax
from flax import nnx

from examples.distill.errors import UserError
from examples.distill.models.mlp import MLP

_MODELS = {"mlp": MLP}


def build(name: str, num_classes: int, *, input_shape: tuple[int, ...], rngs: nnx.Rngs, **options: Any) -> nnx.Module:
    """Returns the model `name`; `options` are the further fields of its entry in the config."""
    if name not in _MODELS:
        raise UserError(f"unknown model {name!r}; known: {', '.join(sorted(_MODELS))}")
    return _MODELS[name](num_classes, input_shape=input_shape, rngs=rngs, **options)


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Any, Any]:
    """Returns (graphdef, params, rest)."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def apply(graphdef: nnx.GraphDef, params: Any, rest: Any, images: jax.Array, *, train: bool) -> tuple[jax.Array, Any]:
    """Returns the logits and the new `rest`; with `train=False` BatchNorm uses its running averages."""
    model = nnx.merge(graphdef, params, rest, copy=True)  # Without `copy`, BatchNorm cannot write while it is traced.
    model.train() if train else model.eval()
    logits = model(images)
    return logits, split(model)[2]
