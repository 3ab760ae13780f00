"""Models by name, and their use as pure functions of plain pytrees.

`build` makes a Flax NNX module and `split` takes it apart: a static `graphdef`, the `params` that the optimizer
trains, and `rest`, everything else the model carries along (BatchNorm statistics, random state). Both trees are nested
dicts of arrays, so checkpoints can be read without the model's code. `apply` runs them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from examples.distill.models import cifar_resnet, mlp, mobilenet, resnet, shufflenetv2, vgg
from examples.trainer.errors import UserError

_MODELS: dict[str, Callable[..., nnx.Module]] = {
    "mlp": mlp.MLP,
    "resnet8x4": cifar_resnet.resnet8x4,
    "resnet32x4": cifar_resnet.resnet32x4,
    "vgg8": vgg.vgg8,
    "vgg13": vgg.vgg13,
    "shufflenetv2": shufflenetv2.ShuffleNetV2,
    "resnet18_small": resnet.resnet18_small,
    "mobilenetv2": mobilenet.MobileNetV2,
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
    "mobilenetv1": mobilenet.MobileNetV1,
}


def build(
    name: str,
    num_classes: int,
    *,
    input_shape: tuple[int, ...] = (32, 32, 3),
    dtype: DTypeLike | None = None,
    axis_name: str | None = None,
    rngs: nnx.Rngs,
    **options: Any,
) -> nnx.Module:
    """Returns the model `name`, a function of images (batch, height, width, channels) that gives logits.

    With `with_features=True` it gives (logits, list of intermediate features).

    Args:
        name: one of those above.
        num_classes: number of logits.
        input_shape: (height, width, channels) of an image; of these, convolutional networks fix the channels only.
        dtype: what to compute in, such as "bfloat16"; default: that of images and parameters. Parameters, BatchNorm
            statistics and logits are float32 whatever it is.
        axis_name: over which BatchNorm averages its statistics, in training where each device sees a part of a batch.
        rngs: for the initial parameters.
        **options: further fields of the model's entry in the config.
    """
    check_name(name)
    dtype = _float_dtype(dtype)
    try:
        model = _MODELS[name](num_classes, input_shape=input_shape, dtype=dtype, rngs=rngs, **options)
    except TypeError as error:
        raise UserError(f"cannot build model {name!r}: {error}") from error
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.axis_name = axis_name
    return model


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Any, Any]:
    """Returns (graphdef, params, rest)."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def apply(
    graphdef: nnx.GraphDef, params: Any, rest: Any, images: jax.Array, *, train: bool, **options: Any
) -> tuple[Any, Any]:
    """Returns the logits and the new `rest`; with `train=False` BatchNorm uses its running averages.

    `options` go to the model: `with_features=True` gives (logits, features) in the place of the logits.
    """
    model = nnx.merge(graphdef, params, rest, copy=True)  # Without `copy`, BatchNorm cannot write while it is traced.
    model.train() if train else model.eval()
    outputs = model(images, **options)
    return outputs, split(model)[2]


def check_name(name: str) -> None:
    """Raises if there is no model of this name."""
    if name not in _MODELS:
        raise UserError(f"unknown model {name!r}; known: {', '.join(sorted(_MODELS))}")


def check_input(network: tuple[nnx.GraphDef, Any, Any], image_shape: tuple[int, ...], name: str) -> None:
    """Raises if images of this shape are too small for a network: if a feature map has no pixel left."""
    graphdef, params, rest = network
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    run = functools.partial(apply, graphdef, train=False, with_features=True)
    (_, features), _ = jax.eval_shape(run, params, rest, image)
    if any(0 in feature.shape for feature in features):
        raise UserError(f"images of {image_shape[0]} x {image_shape[1]} pixels are too small for {name}")


def _float_dtype(dtype: DTypeLike | None) -> jnp.dtype | None:
    try:
        if dtype is None or jnp.issubdtype(dtype := jnp.dtype(dtype), jnp.floating):
            return dtype
    except TypeError:
        pass
    raise UserError(f"bad dtype {dtype!r} of a model: give a floating-point type, for example 'bfloat16'")
