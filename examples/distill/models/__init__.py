"""Models by name, and their use as pure functions of plain pytrees.

`build` makes a Flax NNX module and `split` takes it apart: a static `graphdef`, the `params` that the optimizer
trains, and `rest`, everything else the model carries along (BatchNorm statistics, random state). Both trees are nested
dicts of arrays, so checkpoints can be read without the model's code. `apply` runs them. `register` adds a model.
"""

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike

from examples.distill import registry
from examples.distill.models import (
    cifar_resnet,
    cnn,
    mlp,
    mobilenet,
    resnet,
    shufflenetv1,
    shufflenetv2,
    vgg,
    vit,
    wide_resnet,
)
from examples.trainer.errors import UserError, one_line

_MODELS: dict[str, Callable[..., nnx.Module]] = {
    "mlp": mlp.MLP,
    "fashion_cnn": cnn.CNN,
    "vit": vit.ViT,
    "resnet8": cifar_resnet.resnet8,
    "resnet14": cifar_resnet.resnet14,
    "resnet20": cifar_resnet.resnet20,
    "resnet32": cifar_resnet.resnet32,
    "resnet44": cifar_resnet.resnet44,
    "resnet56": cifar_resnet.resnet56,
    "resnet110": cifar_resnet.resnet110,
    "resnet8x4": cifar_resnet.resnet8x4,
    "resnet32x4": cifar_resnet.resnet32x4,
    "wrn_16_1": wide_resnet.wrn_16_1,
    "wrn_16_2": wide_resnet.wrn_16_2,
    "wrn_40_1": wide_resnet.wrn_40_1,
    "wrn_40_2": wide_resnet.wrn_40_2,
    "vgg8": vgg.vgg8,
    "vgg11": vgg.vgg11,
    "vgg13": vgg.vgg13,
    "vgg16": vgg.vgg16,
    "vgg19": vgg.vgg19,
    "mobilenetv2_half": mobilenet.mobilenetv2_half,
    "shufflenetv1": shufflenetv1.ShuffleNetV1,
    "shufflenetv2": shufflenetv2.ShuffleNetV2,
    "resnet50_small": resnet.resnet50_small,
    "resnet18_small": resnet.resnet18_small,
    "mobilenetv2": mobilenet.mobilenetv2,
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
    "mobilenetv1": mobilenet.MobileNetV1,
}
_OWN = frozenset(_MODELS)

_Network = TypeVar("_Network", bound=Callable[..., nnx.Module])


def register(name: str) -> Callable[[_Network], _Network]:
    """Adds a network under `name`, which configs then give as `model.name`. A decorator of a class or of a function:

        @models.register("my_cnn")
        class MyCNN(nnx.Module):
            def __init__(self, num_classes, *, width=32, rngs):
                self.conv = nnx.Conv(3, width, (3, 3), strides=2, rngs=rngs)
                self.norm = nnx.BatchNorm(width, rngs=rngs)
                self.classifier = nnx.Linear(width, num_classes, rngs=rngs)

            def __call__(self, images):
                return self.classifier(nnx.relu(self.norm(self.conv(images))).mean((1, 2)))

    What is registered returns an NNX module when called with

        num_classes     the number of logits
        rngs            `nnx.Rngs`, for the initial parameters
        **options       the other fields of `model` in the config, such as `width`

    and, if it has a parameter of that name, with

        input_shape     (height, width, channels) of an image
        dtype           what to compute in: `config.dtype` as a NumPy dtype. Without this parameter it is float32.

    The module is a function of images (batch, height, width, channels), normalized, in float32, and returns logits
    (batch, num_classes) in float32. For a method that asks for features, as CRD does, it is called `with_features=True`
    and returns (logits, list of features), the last of them what its head is given, (batch, width). What it trains are
    its `nnx.Param`, in float32; whatever other variables it has are kept from step to step. `nnx.BatchNorm` and
    `nnx.Dropout` are told when they train; for other layers, see
    `nnx.Module.train`.

    Raises:
        UserError: if there is a model of this name. The same lines may run again.
    """
    registry.claim("model", name, _MODELS)

    def add(network: _Network) -> _Network:
        _MODELS[name] = network
        return network

    return add


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

    Those of this package give (logits, list of intermediate features) with `with_features=True`.

    Args:
        name: one of those above, or of `register`.
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
    network = _MODELS[name]
    taken = _parameters(network)
    if "input_shape" in taken:
        options["input_shape"] = input_shape
    if "dtype" in taken:
        options["dtype"] = dtype
    elif dtype not in (None, jnp.float32):
        raise UserError(f"model {name!r} computes in float32 only: it has no parameter `dtype`")
    try:
        model = network(num_classes, rngs=rngs, **options)
    except Exception as error:  # whatever a network of the user's raises
        raise UserError(f"cannot build model {name!r}: {_describe(error)}") from error
    if not isinstance(model, nnx.Module) or not jax.tree.leaves(nnx.state(model, nnx.Param)):
        raise UserError(f"model {name!r} is no NNX module with parameters (`nnx.Param`), but a {type(model).__name__}")
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.axis_name = axis_name
    return model


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Any, Any]:
    """Returns (graphdef, params, rest)."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), jax.tree.map(_without_key_type, nnx.to_pure_dict(rest))


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


def apply_with_features(
    graphdef: nnx.GraphDef, params: Any, rest: Any, images: jax.Array, *, train: bool
) -> tuple[jax.Array, jax.Array, Any]:
    """Returns the logits, the last features, which the head is given, and the new `rest`."""
    (logits, features), rest = apply(graphdef, params, rest, images, train=train, with_features=True)
    return logits, features[-1], rest


def features_width(network: tuple[nnx.GraphDef, Any, Any], image_shape: tuple[int, ...], name: str) -> int:
    """How many features the head of a network is given for an image. Raises if the network does not say them."""
    batch, (graphdef, *variables) = 2, network
    images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
    try:
        features = jax.eval_shape(functools.partial(apply_with_features, graphdef, train=False), *variables, images)[1]
    except Exception as error:  # whatever a network of the user's raises
        raise UserError(
            f"model {name!r} gives no features: called with `with_features=True` it must return (logits, list of features);"
            f" {_describe(error)}"
        ) from error
    if len(features.shape) != 2 or features.shape[0] != batch or not jnp.issubdtype(features.dtype, jnp.floating):
        raise UserError(
            f"model {name!r} gives features {features.dtype} {list(features.shape)} for {batch} images, not floating-point"
            f" numbers [{batch}, width]"
        )
    return features.shape[1]


def scale_invariant(network: tuple[nnx.GraphDef, Any, Any], image_shape: tuple[int, ...]) -> list[bool]:
    """For each leaf of the params: whether it is a kernel whose length does not change the logits, as in front of BatchNorm.

    That is tried out, on random images and with an epsilon of nearly 0 in the normalizations; names and places of layers
    do not count.
    """
    graphdef, params, rest = network
    model = nnx.merge(graphdef, params, rest, copy=True)
    for _, module in nnx.iter_modules(model):
        if hasattr(module, "epsilon"):
            module.epsilon = 1e-12
    graphdef, _, rest = split(model)
    # A scale or a head that begins with 0 would hide all that is in front of it.
    noise = optax.tree.random_like(jax.random.key(1), params)
    params = jax.tree.map(lambda p, r: p + 0.5 if p.ndim < 2 else p + 0.01 * r, params, noise)
    images = jax.random.normal(jax.random.key(0), (4, *image_shape))
    kernels = [i for i, leaf in enumerate(jax.tree.leaves(params)) if leaf.ndim > 1]

    @jax.jit  # of arguments: what depends on constants, XLA would compute for a minute as it compiles
    def changes(params: Any, images: jax.Array) -> jax.Array:
        """How far the logits move, in terms of their length, if each of the kernels is doubled."""
        leaves, treedef = jax.tree.flatten(params)
        before, _ = apply(graphdef, params, rest, images, train=True)

        def change(index: jax.Array) -> jax.Array:
            doubled = treedef.unflatten([jnp.where(index == i, 2 * leaf, leaf) for i, leaf in enumerate(leaves)])
            after, _ = apply(graphdef, doubled, rest, images, train=True)
            return jnp.linalg.norm(after - before) / jnp.linalg.norm(before)

        return jax.lax.map(change, jnp.array(kernels))

    # Doubling is exact. Where biases lie in front of a normalization, rounding moves the logits by some 1e-7.
    ignored = {i for i, moved in zip(kernels, changes(params, images), strict=True) if moved < 1e-4}
    return [i in ignored for i in range(len(jax.tree.leaves(params)))]


def _without_key_type(leaf: Any) -> Any:
    """The numbers of a random key, such as Dropout's, with which it is a key as well; they can be saved."""
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    numbers = functools.partial(jax.eval_shape, jax.random.key_data)
    return numbers(leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else jax.random.key_data(leaf)


def check_name(name: str) -> None:
    """Raises if there is no model of this name."""
    if name not in _MODELS:
        raise UserError(f"unknown model {name!r}; known: {', '.join(_MODELS)}")


def check_input(
    network: tuple[nnx.GraphDef, Any, Any], image_shape: tuple[int, ...], name: str, num_classes: int
) -> None:
    """Raises if a network cannot take images of this shape, or does not give float32 logits of `num_classes` classes."""
    graphdef, params, rest = network
    batch = 2
    images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
    size = f"images of {' x '.join(map(str, image_shape[:2]))} pixels"
    trace = jax.make_jaxpr(functools.partial(apply, graphdef, train=True), return_shape=True)
    try:
        jaxpr, (logits, _) = trace(params, rest, images)
    except Exception as error:  # whatever a network of the user's raises
        raise UserError(f"model {name!r} cannot take {size}: {_describe(error)}") from error
    shapes = [output.aval.shape for equation in jaxpr.eqns for output in equation.outvars]
    if any(shape[:1] == (batch,) and 0 in shape for shape in shapes):
        raise UserError(f"{size} are too small for {name}")
    if logits != jax.ShapeDtypeStruct((batch, num_classes), jnp.float32):
        found = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, jax.ShapeDtypeStruct) else logits
        raise UserError(f"model {name!r} gives {found} for {batch} images, not float32 logits [{batch}, {num_classes}]")


def _parameters(network: Callable[..., nnx.Module]) -> Collection[str]:
    while isinstance(network, functools.partial):
        network = network.func
    # The metaclass of NNX hides the signature of a class.
    return inspect.signature(network.__init__ if isinstance(network, type) else network).parameters


def _float_dtype(dtype: DTypeLike | None) -> jnp.dtype | None:
    try:
        if dtype is None or jnp.issubdtype(dtype := jnp.dtype(dtype), jnp.floating):
            return dtype
    except TypeError:
        pass
    raise UserError(f"bad dtype {dtype!r} of a model: give a floating-point type, for example 'bfloat16'")


def _describe(error: Exception) -> str:
    kind = "" if isinstance(error, (TypeError, ValueError)) else f"{type(error).__name__}: "
    return kind + one_line(error, 200)
