"""A small random Llama, written as a Hugging Face folder and as a GGUF file, and the smallest tokenizer for both."""

import json

import gguf
import numpy as np
import safetensors.numpy

from examples.language_model import model

ARCHITECTURE = model.Architecture(
    vocabulary=264, width=16, layers=3, heads=4, kv_heads=2, head_dim=4, feed_forward=24, tied_embeddings=False
)
LLAMA3 = model.Llama3Scaling(8.0, 1.0, 4.0, 8192)
ARCHITECTURES = {
    "grouped": ARCHITECTURE,
    "multi-head": ARCHITECTURE._replace(kv_heads=4),
    "multi-query": ARCHITECTURE._replace(kv_heads=1, head_dim=6),
    "tied": ARCHITECTURE._replace(tied_embeddings=True),
    # Rotary frequencies of which some are kept, some slowed down and one is in between, as in Llama 3.
    "llama3": ARCHITECTURE._replace(head_dim=8, rope_base=500_000.0, rope_scaling=LLAMA3),
}
END = "<|endoftext|>"
MERGES = ["i n", "Ġ t", "in t"]


def tokens(merges=MERGES):
    """Returns the vocabulary: control tokens, the bytes in the characters that GPT-2 writes them with, and merged pairs."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [END, "<|im_end|>", *letters.values(), *(merge.replace(" ", "") for merge in merges)]


def tensors(architecture, seed=0):
    """Returns random weights by their names in a Hugging Face folder."""
    a, rng = architecture, np.random.default_rng(seed)
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim

    def weight(*shape):
        return rng.normal(0, 0.3, shape).astype(np.float32)

    named = {"model.embed_tokens.weight": weight(a.vocabulary, a.width), "model.norm.weight": weight(a.width)}
    for i in range(a.layers):
        layer = {
            "input_layernorm": weight(a.width),
            "self_attn.q_proj": weight(q, a.width),
            "self_attn.k_proj": weight(kv, a.width),
            "self_attn.v_proj": weight(kv, a.width),
            "self_attn.o_proj": weight(a.width, q),
            "post_attention_layernorm": weight(a.width),
            "mlp.gate_proj": weight(a.feed_forward, a.width),
            "mlp.up_proj": weight(a.feed_forward, a.width),
            "mlp.down_proj": weight(a.width, a.feed_forward),
        }
        named |= {f"model.layers.{i}.{name}.weight": value for name, value in layer.items()}
    return named if a.tied_embeddings else named | {"lm_head.weight": weight(a.vocabulary, a.width)}


def config(architecture, **fields):
    """Returns what `config.json` says of an architecture, as transformers 4 writes it."""
    a, scaling = architecture, architecture.rope_scaling
    rope = scaling and {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_length,
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": a.vocabulary,
        "hidden_size": a.width,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "intermediate_size": a.feed_forward,
        "tie_word_embeddings": a.tied_embeddings,
        "rms_norm_eps": a.norm_eps,
        "rope_theta": a.rope_base,
        "rope_scaling": rope,
        "max_position_embeddings": 16_384,
    } | fields


def tokenizer_json():
    added = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": token} | added for i, token in enumerate(tokens()[:2])],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens())}, "merges": MERGES},
    }


def write_folder(folder, architecture, weights, **fields):
    """Writes a Hugging Face folder. `fields` change `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(architecture, **fields)))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    return folder


def write_gguf(
    path,
    architecture,
    weights,
    *,
    pre="gpt-2",
    kind="llama",
    merges=MERGES,
    writer=gguf.GGUFWriter,
    more=lambda writer: None,
):
    """Writes a GGUF file as llama.cpp's converter does, with q and k in its order of rows."""
    a, vocabulary = architecture, tokens(merges)
    writer = writer(path, kind)
    writer.add_block_count(a.layers)
    writer.add_embedding_length(a.width)
    writer.add_feed_forward_length(a.feed_forward)
    writer.add_head_count(a.heads)
    writer.add_head_count_kv(a.kv_heads)
    writer.add_key_length(a.head_dim)
    writer.add_value_length(a.head_dim)
    writer.add_rope_dimension_count(a.head_dim)
    writer.add_rope_freq_base(a.rope_base)
    writer.add_layer_norm_rms_eps(a.norm_eps)
    writer.add_context_length(64)
    writer.add_vocab_size(a.vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    padding = [f"[PAD{i}]" for i in range(len(vocabulary), a.vocabulary)]
    writer.add_token_list(vocabulary + padding)
    writer.add_token_types([3, 3] + [1] * (len(vocabulary) - 2) + [5] * len(padding))
    writer.add_token_merges(merges)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, a.layers)
    for name, value in weights.items():
        heads = a.heads if "q_proj" in name else a.kv_heads if "k_proj" in name else 0
        if heads:
            value = value.reshape(heads, 2, -1, a.width).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(value))
    if a.rope_scaling:
        factors = model.rotary_frequencies(a._replace(rope_scaling=None)) / model.rotary_frequencies(a)
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
