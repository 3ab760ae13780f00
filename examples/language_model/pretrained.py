"""Pretrained networks: a Hugging Face folder of the Llama type, or a GGUF file.

A folder has `config.json`, `tokenizer.json`, and `model.safetensors` or the shards that `model.safetensors.index.json`
lists. A GGUF file has all in one, and is dequantized by the package `gguf`. Both are mapped into memory and read in the
parts that the devices of this host hold. A file is data: none of it is run.

What is not exactly the network of `model`, such as biases, a sliding window, experts or another rotary scaling, is refused.
"""

import functools
import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.typing import DTypeLike

from examples.language_model import model, tokenizer
from examples.trainer import paths
from examples.trainer.errors import UserError, one_line

# The name of a parameter of `model` in a Hugging Face folder, and in a GGUF file; {} is the number of the layer.
_NAMES = {
    "embedding": ("model.embed_tokens.weight", "token_embd.weight"),
    "attention_norm": ("model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
    "q": ("model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight"),
    "k": ("model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight"),
    "v": ("model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight"),
    "o": ("model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight"),
    "feed_forward_norm": ("model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
    "gate": ("model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
    "up": ("model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
    "down": ("model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
    "norm": ("model.norm.weight", "output_norm.weight"),
    "head": ("lm_head.weight", "output.weight"),
}
_HUGGING_FACE, _GGUF = 0, 1  # columns of this table

_DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": jnp.dtype("bfloat16")}  # of safetensors
_LARGEST = 2**20  # of any length in an architecture: more is a damaged file


_Bounds = tuple[tuple[int, int], ...]  # where a part of an array begins and ends, along each axis


class Pretrained(NamedTuple):
    """A network in files."""

    architecture: model.Architecture
    tokenizer: tokenizer.Tokenizer
    # load(sharding=None, dtype=jnp.float32) -> params, as `model.split` has them. `sharding(path, leaf)` says where an array
    # goes, by its path and its shape.
    load: Callable[..., Any]


class _Tensor(NamedTuple):
    """A tensor in a file. Matrices are [outputs, inputs]."""

    file: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def open_pretrained(path: epath.Path) -> Pretrained:
    """Opens a Hugging Face folder or a GGUF file, without reading its weights yet.

    Args:
        path: of the folder or the file, on this machine.

    Raises:
        UserError: if it is not there, damaged, incomplete, or another network than `model` has. `load` raises one if a
            weight is not finite.
    """
    if paths.in_bucket(path):
        raise UserError(f"{path} is in a bucket; copy it to this machine first")
    if not path.exists():
        raise UserError(f"no such file or folder: {path}")
    if path.is_dir():
        architecture, made, tensors, column = *_open_folder(path), _HUGGING_FACE
    elif path.suffix == ".gguf":
        architecture, made, tensors, column = *_open_gguf(path), _GGUF
    else:
        raise UserError(f"cannot read {path}: give a Hugging Face folder or a file whose name ends in .gguf")
    if made.vocabulary > architecture.vocabulary:
        raise UserError(
            f"{path} does not fit together: {made.vocabulary} tokens, and logits of {architecture.vocabulary}"
        )
    abstract = nnx.eval_shape(lambda: model.build(architecture, rngs=nnx.Rngs(0)))
    params_like = model.split(abstract)[1]
    params_like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params_like)
    _check_tensors(path, params_like, tensors, column)
    return Pretrained(architecture, made, functools.partial(_load, params_like, tensors, column))


def _load(
    params_like: Any,
    tensors: Mapping[str, _Tensor],
    column: int,
    sharding: Callable[[jax.tree_util.KeyPath, Any], jax.sharding.Sharding] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Any:
    """Returns the parameters, on this host those parts of them that its devices hold."""

    def make(path: jax.tree_util.KeyPath, leaf: Any) -> jax.Array:
        def bounds(index: tuple[slice, ...]) -> _Bounds:
            return tuple(axis.indices(size)[:2] for axis, size in zip(index, leaf.shape, strict=True))

        place = sharding and sharding(path, leaf)
        whole = tuple(slice(None) for _ in leaf.shape)
        indices = place.addressable_devices_indices_map(leaf.shape).values() if place else [whole]
        # Several devices may hold the same part.
        parts = _read_parts(path[-1].key, leaf.shape, dtype, tensors, column, {bounds(index) for index in indices})
        if place is None:
            return jnp.asarray(parts[bounds(whole)])
        return jax.make_array_from_callback(leaf.shape, place, lambda index: parts[bounds(index)])

    return jax.tree.map_with_path(make, params_like)


def _read_parts(
    name: str,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    tensors: Mapping[str, _Tensor],
    column: int,
    bounds: Collection[_Bounds],
) -> dict[_Bounds, np.ndarray]:
    """Returns parts of a parameter, whose layers are stacked. Each tensor is read once: GGUF has to dequantize it."""
    title = _NAMES[name][column]
    stacked = "{}" in title
    parts = {part: np.empty([end - begin for begin, end in part], dtype) for part in bounds}
    for i in range(shape[0] if stacked else 1):
        takers = [part for part in bounds if not stacked or part[0][0] <= i < part[0][1]]
        if not takers:
            continue
        at = title.format(i)
        whole = tensors[at].read()
        # A view, so that only what the parts take is read from the disk. Embedding and head stay [vocabulary, width].
        whole = whole if name in ("embedding", "head") or whole.ndim == 1 else whole.T.reshape(shape[stacked:])
        for part in takers:
            taken = whole[tuple(slice(*axis) for axis in part[stacked:])]
            if not np.isfinite(taken).all():
                raise UserError(f"cannot use {tensors[at].file}: {at} has values that are not finite")
            parts[part][i - part[0][0] if stacked else ...] = taken
    return parts


def _check_tensors(path: epath.Path, params_like: Any, tensors: Mapping[str, _Tensor], column: int) -> None:
    """Raises if one is missing, has another shape, or is of a network that `model` is not."""
    known = set()
    for keys, leaf in jax.tree.leaves_with_path(params_like):
        name = keys[-1].key
        title = _NAMES[name][column]
        layers = leaf.shape[0] if "{}" in title else 1
        wanted = _shape_in_file(name, leaf.shape[1:] if "{}" in title else leaf.shape)
        for i in range(layers):
            known.add(at := title.format(i))
            if at not in tensors:
                raise UserError(f"{path} is incomplete: it has no tensor {at}")
            if tensors[at].shape != wanted:
                found = list(tensors[at].shape)
                raise UserError(f"cannot use {tensors[at].file}: {at} has the shape {found}, not {list(wanted)}")
    # A head that is the embedding may be stored again; frequencies follow from the architecture.
    ignored = {"lm_head.weight", "rope_freqs.weight"}
    others = sorted(at for at in tensors if at not in known | ignored and not at.endswith("rotary_emb.inv_freq"))
    if others:
        raise UserError(f"cannot use {path}: it is no plain Llama: it has {', '.join(others[:3])} as well")


def _shape_in_file(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if name in ("embedding", "head") or len(shape) == 1:
        return shape
    inputs = shape[:2] if name == "o" else shape[:1]
    return math.prod(shape[len(inputs) :]), math.prod(inputs)


def _open_folder(folder: epath.Path) -> tuple[model.Architecture, tokenizer.Tokenizer, dict[str, _Tensor]]:
    path = folder / "config.json"
    architecture = _architecture(path, tokenizer.parse_json(path, tokenizer.read_text(path)))
    return architecture, tokenizer.from_folder(folder), _open_safetensors(folder)


def _architecture(path: epath.Path, config: Mapping[str, Any]) -> model.Architecture:
    """Returns the architecture that a `config.json` describes; the defaults are those of `transformers.LlamaConfig`."""
    known = {
        "model_type": ("llama",),
        "hidden_act": (None, "silu"),
        "attention_bias": (None, False),
        "mlp_bias": (None, False),
        "sliding_window": (None,),
        "quantization_config": (None,),
    }
    for field, values in known.items():
        if not any(config.get(field) is value or config.get(field) == value for value in values):
            raise UserError(
                f"cannot use {path}: {field} is {config.get(field)!r}, and only {values[-1]!r} is known here"
            )
    number = functools.partial(_number, path, config)
    heads, width = number("num_attention_heads", int), number("hidden_size", int)
    # transformers 5 puts all that is rotary into one field.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"cannot use {path}: the rotary parameters are no object but {rope!r}")
    base = number("rope_theta", float, _number(path, rope, "rope_theta", float, 10_000.0))
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise UserError(f"cannot use {path}: tie_word_embeddings is {tied!r}, which is no boolean")
    return _checked(
        path,
        model.Architecture(
            vocabulary=number("vocab_size", int),
            width=width,
            layers=number("num_hidden_layers", int),
            heads=heads,
            kv_heads=number("num_key_value_heads", int, heads),
            head_dim=number("head_dim", int, width // heads),
            feed_forward=number("intermediate_size", int),
            tied_embeddings=tied,
            norm_eps=number("rms_norm_eps", float, 1e-6),
            rope_base=base,
            rope_scaling=_rope_scaling(path, rope),
        ),
    )


def _rope_scaling(path: epath.Path, rope: Mapping[str, Any]) -> model.Llama3Scaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    part = rope.get("partial_rotary_factor", 1)
    if part not in (None, 1):
        raise UserError(f"cannot use {path}: partial_rotary_factor is {part!r}, and only 1 is known here")
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"cannot use {path}: the rotary scaling {kind!r} is not known here, only 'llama3'")
    number = functools.partial(_number, path, rope)
    scaling = model.Llama3Scaling(
        number("factor", float),
        number("low_freq_factor", float),
        number("high_freq_factor", float),
        number("original_max_position_embeddings", int),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise UserError(f"cannot use {path}: low_freq_factor is not below high_freq_factor")
    return scaling


def _number(path: epath.Path, config: Mapping[str, Any], field: str, kind: type, default: Any = None) -> Any:
    """Returns a positive number of a config, of a type, not None unless it is missing and has no default."""
    value = config.get(field)
    value = default if value is None else value
    if value is None:
        raise UserError(f"cannot use {path}: it has no {field}")
    fits = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if not fits or not 0 < value < (math.inf if kind is float else _LARGEST):
        raise UserError(
            f"cannot use {path}: {field} is {value!r}, which is no {'positive' if fits else kind.__name__} number here"
        )
    return kind(value)


def _checked(path: epath.Path, architecture: model.Architecture) -> model.Architecture:
    if architecture.heads % architecture.kv_heads or architecture.head_dim % 2:
        shapes = f"{architecture.heads} heads of {architecture.head_dim}, {architecture.kv_heads} key-value heads"
        raise UserError(f"cannot use {path}: {shapes} do not fit together")
    return architecture


def _open_safetensors(folder: epath.Path) -> dict[str, _Tensor]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return _open_shard(folder / "model.safetensors")
    files = tokenizer.parse_json(index, tokenizer.read_text(index)).get("weight_map")
    if not isinstance(files, Mapping) or not files:
        raise UserError(f"cannot read {index}: it has no weight_map")
    for name in files.values():
        if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(".safetensors"):
            raise UserError(f"cannot use {index}: {name!r} is no safetensors file of this folder")
    shards = {name: _open_shard(folder / name) for name in sorted(set(files.values()))}
    for title, name in files.items():
        if title not in shards[name]:
            raise UserError(f"cannot use {folder / name}: it has no tensor {title}, which {index.name} says is there")
    return {title: shards[name][title] for title, name in files.items()}


def _open_shard(path: epath.Path) -> dict[str, _Tensor]:
    """Returns the tensors of a safetensors file: a JSON header, its length in eight bytes before it, and plain numbers."""
    data = _map(path)
    size = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or size > len(data) - 8:
        raise UserError(f"cannot read {path}: it is damaged or cut short: the header ends behind its end")
    try:
        header = json.loads(data[8 : 8 + size].tobytes())
        header.pop("__metadata__", None)
        return {title: _view(path, data[8 + size :], title, **entry) for title, entry in header.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:  # of JSON that says something else
        raise UserError(f"cannot read {path}: damaged, or no safetensors file: {one_line(error, 200)}") from error


def _view(path: epath.Path, data: np.ndarray, title: str, *, dtype: str, shape: Any, data_offsets: Any) -> _Tensor:
    if dtype not in _DTYPES:
        raise UserError(f"cannot use {path}: {title} is {dtype}; known are {', '.join(_DTYPES)}")
    begin, end = data_offsets
    if any(not isinstance(n, int) or n < 0 for n in (begin, end, *shape)):
        raise ValueError(f"{title} has a bad place")
    if end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError(f"{title} has another size than its shape says")
    if end > len(data):
        raise ValueError(f"the file is cut short: {title} ends behind its end")
    return _Tensor(str(path), tuple(shape), lambda: data[begin:end].view(_DTYPES[dtype]).reshape(shape))


def _map(path: epath.Path) -> np.ndarray:
    try:
        return np.memmap(os.fspath(path), np.uint8, "r")
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (OSError, ValueError) as error:  # An empty file cannot be mapped.
        raise UserError(f"cannot read {path}: {one_line(error, 200)}") from error


def _open_gguf(path: epath.Path) -> tuple[model.Architecture, tokenizer.Tokenizer, dict[str, _Tensor]]:
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"reading {path} needs the package gguf: pip install gguf") from error
    _map(path)

    class Reader(gguf.GGUFReader):
        """Refuses lengths that `gguf` believes: behind the end of the file it has empty values, as many as a length says."""

        def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **options: Any) -> np.ndarray:
            found = super()._get(offset, dtype, count, *args, **options)
            if len(found) < count:
                raise ValueError("a value ends behind the end of the file")
            return found

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            # The type of an array in four bytes, then its length; `gguf` makes an object of each value.
            if raw_type == gguf.GGUFValueType.ARRAY:
                length = self._get(orig_offs + 4, np.uint64)[0]
                if length > _LARGEST:
                    raise ValueError(f"an array has {length} values")
            return super()._get_field_parts(orig_offs, raw_type)

    try:
        reader = Reader(os.fspath(path))
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        shapes = {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in tensors.items()}
    except Exception as error:  # Damaged files raise whatever the reader stumbles over.
        raise UserError(f"cannot read {path}: damaged, cut short, or no GGUF file: {one_line(error, 200)}") from error

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shapes[name])
        except Exception as error:
            kind = getattr(tensor.tensor_type, "name", tensor.tensor_type)
            raise UserError(f"cannot read {name}, {kind}, in {path}: {one_line(error, 200)}") from error

    def read_rotary(name: str, heads: int) -> np.ndarray:
        # The rows of a head are stored in the order 0, d/2, 1, d/2 + 1, ...
        rows = read(name)
        return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)

    architecture = _gguf_architecture(path, fields, shapes, read)
    heads = {"attn_q": architecture.heads, "attn_k": architecture.kv_heads}
    opened = {}
    for name, shape in shapes.items():
        kind = name.split(".")[-2] if name.endswith(".weight") else ""
        how = functools.partial(read_rotary, heads=heads[kind]) if kind in heads else read
        opened[name] = _Tensor(str(path), shape, functools.partial(how, name))
    return architecture, tokenizer.from_gguf(path, fields), opened


def _gguf_architecture(
    path: epath.Path,
    fields: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
) -> model.Architecture:
    # Floats are stored in 32 bits: what was written as 1e-05 is 1e-05 again.
    fields = {name: float(str(np.float32(x))) if isinstance(x, float) else x for name, x in fields.items()}
    known = {
        "general.architecture": ("llama",),
        "llama.rope.scaling.type": (None, "none"),
        "llama.expert_count": (None, 0),
    }
    for field, values in known.items():
        if fields.get(field) not in values:
            raise UserError(
                f"cannot use {path}: {field} is {fields.get(field)!r}, and only {values[-1]!r} is known here"
            )
    number = functools.partial(_number, path, fields)
    heads, width = number("llama.attention.head_count", int), number("llama.embedding_length", int)
    head_dim = number("llama.attention.key_length", int, width // heads)
    for field in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if number(field, int, head_dim) != head_dim:
            raise UserError(f"cannot use {path}: {field} is {fields[field]}, and heads have {head_dim} dimensions")
    architecture = model.Architecture(
        vocabulary=shapes.get("token_embd.weight", (0,))[0],
        width=width,
        layers=number("llama.block_count", int),
        heads=heads,
        kv_heads=number("llama.attention.head_count_kv", int, heads),
        head_dim=head_dim,
        feed_forward=number("llama.feed_forward_length", int),
        tied_embeddings="output.weight" not in shapes,
        norm_eps=number("llama.attention.layer_norm_rms_epsilon", float),
        rope_base=number("llama.rope.freq_base", float, 10_000.0),
    )
    architecture = _checked(path, architecture)
    if "rope_freqs.weight" not in shapes:
        return architecture
    # GGUF keeps what the frequencies are divided by; all of Llama 3 have these constants, and their own factor.
    divisors = read("rope_freqs.weight")
    scaled = architecture._replace(rope_scaling=model.Llama3Scaling(float(divisors.max()), 1.0, 4.0, 8192))
    wanted = model.rotary_frequencies(architecture) / model.rotary_frequencies(scaled)
    if divisors.shape != wanted.shape or not np.allclose(divisors, wanted, rtol=1e-4):
        raise UserError(f"cannot use {path}: rope_freqs.weight is another rotary scaling than that of Llama 3")
    return scaled
