"""A decoder of the Llama type, and its use as pure functions of plain pytrees.

`build` makes a Flax NNX module and `split` takes it apart: a static `graphdef` and `params`, a nested dict of arrays that
checkpoints and optimizers can take. `apply` runs them. The layers' parameters are stacked along a first axis, and a loop
runs over them, so that thirty layers compile as fast as one:

    embedding                       [vocabulary, width]
    layers: attention_norm          [layers, width]
            q                       [layers, width, heads, head_dim]
            k, v                    [layers, width, kv_heads, head_dim]
            o                       [layers, heads, head_dim, width]
            feed_forward_norm       [layers, width]
            gate, up                [layers, width, feed_forward]
            down                    [layers, feed_forward, width]
    norm                            [width]
    head                            [vocabulary, width], if it is not the embedding

`sharding_spec` says how these lie on a mesh of devices with the axes `data` and `model`. References: Touvron et al., LLaMA
(arXiv 2302.13971); Ainslie et al., GQA (arXiv 2305.13245); Su et al., RoFormer (arXiv 2104.09864).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

_INIT_STD = 0.02

# Which axis of the mesh divides which axis of an array: `model` the heads, the feed-forward layer and the vocabulary.
_SPECS = {
    "embedding": ("model", "data"),
    "head": ("model", "data"),
    "q": (None, "data", "model", None),
    "k": (None, "data", "model", None),
    "v": (None, "data", "model", None),
    "o": (None, "model", None, "data"),
    "gate": (None, "data", "model"),
    "up": (None, "data", "model"),
    "down": (None, "model", "data"),
}


class Llama3Scaling(NamedTuple):
    """How Llama 3.1 and later stretch the slow rotary frequencies to longer texts than they were trained on."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


class Architecture(NamedTuple):
    """The shapes and constants of a decoder."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int  # key-value heads: `heads / kv_heads` query heads share one
    head_dim: int
    feed_forward: int
    tied_embeddings: bool = True
    norm_eps: float = 1e-5
    rope_base: float = 10_000.0
    rope_scaling: Llama3Scaling | None = None


class Cache(NamedTuple):
    """Keys and values of the positions so far, [layers, batch, length, kv_heads, head_dim]; see `apply_cached`."""

    keys: jax.Array
    values: jax.Array


class Layer(nnx.Module):
    """Grouped-query attention, then a gated feed-forward layer; each added to its input, which is normalized first."""

    def __init__(self, a: Architecture, *, rngs: nnx.Rngs) -> None:
        def weight(*shape: int, std: float = _INIT_STD) -> nnx.Param:
            return nnx.Param(nnx.initializers.normal(std)(rngs.params(), shape, jnp.float32))

        self.norm_eps = a.norm_eps
        # So that the sum over the residual branches starts with the same variance at any depth (GPT-2).
        out_std = _INIT_STD / np.sqrt(2 * a.layers)
        self.attention_norm = nnx.Param(jnp.ones(a.width))
        self.q = weight(a.width, a.heads, a.head_dim)
        self.k = weight(a.width, a.kv_heads, a.head_dim)
        self.v = weight(a.width, a.kv_heads, a.head_dim)
        self.o = weight(a.heads, a.head_dim, a.width, std=out_std)
        self.feed_forward_norm = nnx.Param(jnp.ones(a.width))
        self.gate = weight(a.width, a.feed_forward)
        self.up = weight(a.width, a.feed_forward)
        self.down = weight(a.feed_forward, a.width, std=out_std)

    def __call__(
        self,
        x: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        attend: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]],
        mesh: jax.sharding.Mesh | None,
    ) -> tuple[jax.Array, Any]:
        """Returns the new x [batch, length, width], and what `attend` gives beside its result."""
        y = _rms_norm(x, self.attention_norm, self.norm_eps)
        q, k, v = (jnp.einsum("bld,dhk->blhk", y, kernel.astype(y.dtype)) for kernel in (self.q, self.k, self.v))
        q = _constrain(q, mesh, "data", None, "model", None)
        y, kept = attend(_rotate(q, *rotary), _rotate(k, *rotary), v)
        y = _constrain(y, mesh, "data", None, "model", None)
        x = _constrain(x + jnp.einsum("blhk,hkd->bld", y, self.o.astype(y.dtype)), mesh, "data", None, None)
        y = _rms_norm(x, self.feed_forward_norm, self.norm_eps)
        y = jax.nn.silu(y @ self.gate.astype(y.dtype)) * (y @ self.up.astype(y.dtype))
        y = _constrain(y, mesh, "data", None, "model")
        return _constrain(x + y @ self.down.astype(y.dtype), mesh, "data", None, None), kept


class Decoder(nnx.Module):
    """Embedding, layers, a norm and the logits."""

    def __init__(self, architecture: Architecture, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        a = self.architecture = architecture
        self.dtype = jnp.dtype(dtype)
        table = nnx.initializers.normal(_INIT_STD)
        self.embedding = nnx.Param(table(rngs.params(), (a.vocabulary, a.width), jnp.float32))
        self.layers = nnx.vmap(lambda rngs: Layer(a, rngs=rngs))(rngs.split(a.layers))
        self.norm = nnx.Param(jnp.ones(a.width))
        if not a.tied_embeddings:
            self.head = nnx.Param(table(rngs.params(), (a.vocabulary, a.width), jnp.float32))

    def __call__(
        self,
        tokens: jax.Array,
        *,
        separator: int,
        remat: bool = False,
        mesh: jax.sharding.Mesh | None = None,
        unroll: bool = False,
    ) -> jax.Array:
        """Returns the logits, float32 [batch, length, vocabulary], of what follows each of the tokens."""
        ends = tokens == separator
        document = jnp.cumsum(ends, axis=1) - ends  # A separator belongs to the document that it ends.

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            if mesh is not None and k.shape[2] % mesh.shape["model"]:
                # Too few of these heads for the axis: each device computes all of them, and keeps those that it needs.
                k, v = (jnp.repeat(y, q.shape[2] // k.shape[2], axis=2) for y in (k, v))
            k, v = (_constrain(y, mesh, "data", None, "model", None) for y in (k, v))
            mask = document[:, None, :, None] == document[:, None, None, :]
            return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True), None

        positions = jnp.arange(tokens.shape[1])
        return self._run(tokens, positions, lambda _: attend, remat=remat, mesh=mesh, unroll=unroll)[0]

    def cached(self, tokens: jax.Array, position: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """As `apply_cached`, with tokens [batch]."""
        visible = jnp.arange(cache.keys.shape[2]) <= position

        def attend_with(before: Cache) -> Callable[..., tuple[jax.Array, Cache]]:
            def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Cache]:
                at = (0, position, 0, 0)
                new = Cache(*(jax.lax.dynamic_update_slice(old, y, at) for old, y in zip(before, (k, v), strict=True)))
                return jax.nn.dot_product_attention(q, *new, mask=visible[None, None, None, :]), new

            return attend

        logits, cache = self._run(tokens[:, None], position[None], attend_with, cache)
        return logits[:, 0], cache

    def _run(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attend_with: Callable[[Any], Callable[..., tuple[jax.Array, Any]]],
        cache: Any = None,
        *,
        remat: bool = False,
        mesh: jax.sharding.Mesh | None = None,
        unroll: bool = False,
    ) -> tuple[jax.Array, Any]:
        rotary = _rotary(positions, self.architecture)
        graphdef, layers = nnx.split(self.layers)

        def layer(x: jax.Array, params_and_cache: tuple[Any, Any]) -> tuple[jax.Array, Any]:
            params, before = params_and_cache
            return nnx.merge(graphdef, params)(x, rotary, attend_with(before), mesh)

        if remat:  # The loop itself keeps the compiler from undoing it.
            layer = jax.checkpoint(layer, prevent_cse=False)
        x = _constrain(self.embedding[tokens].astype(self.dtype), mesh, "data", None, None)
        x, cache = jax.lax.scan(layer, x, (layers, cache), unroll=unroll)
        x = _rms_norm(x, self.norm, self.architecture.norm_eps)
        head = (self.embedding if self.architecture.tied_embeddings else self.head).astype(self.dtype)
        logits = jnp.einsum("bld,vd->blv", x, head, preferred_element_type=jnp.float32)
        return _constrain(logits, mesh, "data", None, "model"), cache


def build(architecture: Architecture, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> Decoder:
    """Returns a decoder with new parameters, in float32.

    Matrices are normal with standard deviation 0.02, those that add to the residual stream with 0.02 / sqrt(2 layers).

    Args:
        architecture: its shapes.
        dtype: what it computes in. Norms, rotary positions and logits are float32 whatever it is.
        rngs: for the initial parameters.

    Raises:
        ValueError: if the heads are no multiple of the key-value heads, or the dimension of a head is odd.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from examples.language_model import model
        >>> a = model.Architecture(256, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, feed_forward=32)
        >>> graphdef, params = model.split(model.build(a, rngs=nnx.Rngs(0)))
        >>> params["layers"]["k"].shape
        (2, 16, 2, 4)
        >>> model.apply(graphdef, params, jnp.array([[72, 105, 0, 72]]), separator=0).shape
        (1, 4, 256)
    """
    if architecture.heads % architecture.kv_heads or architecture.head_dim % 2:
        raise ValueError(f"heads must be a multiple of kv_heads, and head_dim even: {architecture}")
    return Decoder(architecture, dtype=dtype, rngs=rngs)


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Any]:
    """Returns (graphdef, params)."""
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


def apply(
    graphdef: nnx.GraphDef,
    params: Any,
    tokens: jax.Array,
    *,
    separator: int,
    remat: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    unroll: bool = False,
) -> jax.Array:
    """Returns the logits of what follows each token: int [batch, length] -> float32 [batch, length, vocabulary].

    A token sees itself and those before it in its document; a document ends with its separator.

    Args:
        graphdef, params: of `split`.
        tokens: ids of the vocabulary.
        separator: the id that ends a document.
        remat: whether the backward pass computes each layer anew in the place of keeping its activations.
        mesh: with the axes `data` and `model`; divides the activations over it: the batch over `data`; heads, feed-forward
            layer and vocabulary over `model`. An axis of the mesh that does not divide these leaves them whole.
        unroll: whether the program has each layer by itself, and not a loop over them: XLA counts the operations of a loop
            as if it were run through once.
    """
    return nnx.merge(graphdef, params)(tokens, separator=separator, remat=remat, mesh=mesh, unroll=unroll)


def apply_cached(
    graphdef: nnx.GraphDef, params: Any, tokens: jax.Array, position: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """One token of each text: int [batch] at `position` -> logits [batch, vocabulary], and the cache with this position.

    To be called for the positions 0, 1, 2, ... in turn, beginning with `empty_cache`. The texts hold no separators.
    """
    return nnx.merge(graphdef, params).cached(tokens, position, cache)


def empty_cache(graphdef: nnx.GraphDef, params: Any, batch: int, length: int) -> Cache:
    """Returns the cache before the first position, with room for `length`."""
    layers, _, kv_heads, head_dim = params["layers"]["k"].shape
    zeros = jnp.zeros((layers, batch, length, kv_heads, head_dim), nnx.merge(graphdef, params).dtype)
    return Cache(zeros, zeros)


def every_nth_layer(params: Any, architecture: Architecture, n: int) -> tuple[Any, Architecture]:
    """Returns a student of the teacher's layers 0, n, 2n, ...; embeddings and last norm are kept.

    So DistilBERT (Sanh et al., arXiv 1910.01108) begins, with n = 2.
    """
    layers = jax.tree.map(lambda leaf: leaf[::n], params["layers"])
    return params | {"layers": layers}, architecture._replace(layers=-(-architecture.layers // n))


def rotary_frequencies(architecture: Architecture) -> np.ndarray:
    """Returns the frequencies of the rotary positions, in radians a position, [head_dim / 2]."""
    scaling, dim = architecture.rope_scaling, architecture.head_dim
    frequencies = architecture.rope_base ** (-np.arange(0, dim, 2) / dim)
    if scaling is None:
        return frequencies
    # Those that turn often over the original length are kept, those that turn seldom slowed down; between them, a blend.
    turns = scaling.original_length * frequencies / (2 * np.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def sharding_spec(path: jax.tree_util.KeyPath, leaf: Any, mesh: jax.sharding.Mesh) -> P:
    """Returns how an array lies on a mesh with the axes `data` and `model`.

    Heads, feed-forward layer and vocabulary are divided over `model` (tensor parallelism), the width of the same matrices
    over `data` (fully sharded data parallelism), and norms are on every device. So is an axis of an array that the axis of
    the mesh does not divide, such as few key-value heads.

    Args:
        path: of a parameter; or of an array of an optimizer's state, which ends as that of its parameter.
        leaf: the array, or its shape and type. One with other axes than the parameter is on every device whole.
        mesh: of the devices.
    """
    names = [getattr(key, "key", getattr(key, "name", None)) for key in path]
    axes = _SPECS.get(names[-1] if names else None, ())
    if len(axes) != np.ndim(leaf):
        return P()
    return _divisible(np.shape(leaf), axes, mesh)


def matrices(params: Any) -> Any:
    """Returns which parameters layers multiply with, as Muon's dimension numbers: all but embedding, head and norms."""
    axes = {"o": ((1, 2), 3), "q": (1, (2, 3)), "k": (1, (2, 3)), "v": (1, (2, 3))}
    axes |= dict.fromkeys(("gate", "up", "down"), (1, 2))

    def dimensions(path: jax.tree_util.KeyPath, _: Any) -> optax.contrib.MuonDimensionNumbers | None:
        return optax.contrib.MuonDimensionNumbers(*axes[path[-1].key]) if path[-1].key in axes else None

    return jax.tree.map_with_path(dimensions, params)


def _divisible(shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: jax.sharding.Mesh) -> P:
    return P(*(axis if axis and size % mesh.shape[axis] == 0 else None for size, axis in zip(shape, axes, strict=True)))


def _constrain(x: jax.Array, mesh: jax.sharding.Mesh | None, *axes: str | None) -> jax.Array:
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _divisible(x.shape, axes, mesh)))


def _rms_norm(x: jax.Array, scale: nnx.Param, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32; the result has the dtype of x."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * jnp.broadcast_to(scale[...], y.shape)).astype(x.dtype)


def _rotary(positions: jax.Array, architecture: Architecture) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines, float32 [1, length, 1, head_dim / 2], of the angles at the positions."""
    frequencies = jnp.asarray(rotary_frequencies(architecture), jnp.float32)
    angles = positions[None, :, None, None] * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates [batch, length, heads, head_dim] in the planes of the dimensions i and head_dim / 2 + i, in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
