"""Networks and tokenizers out of Hugging Face folders and GGUF files: what `transformers` makes of them, and a line for
whatever is wrong with them."""

import functools
import json
import os
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding

from examples.language_model import model, tokenizer
from examples.language_model.pretrained import open_pretrained
from examples.trainer.errors import UserError
from tests import llama_files
from tests.llama_files import ARCHITECTURE, ARCHITECTURES

TEXTS = ["int main() {\n\treturn 12345;\r\n}", "", " “naïve” 日本 🙂 \0", "a<|endoftext|>b <|im_end|>"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Returns the path of a network of ARCHITECTURES, "folder" or "gguf", made once."""
    root = tmp_path_factory.mktemp("pretrained")

    @functools.cache
    def path(form, name="grouped"):
        architecture = ARCHITECTURES[name]
        weights = llama_files.tensors(architecture)
        if form == "folder":
            return llama_files.write_folder(root / name, architecture, weights)
        return llama_files.write_gguf(root / f"{name}.gguf", architecture, weights)

    return path


@pytest.fixture
def folder(files, tmp_path):
    """A folder to do damage in."""
    return shutil.copytree(files("folder"), tmp_path / "network")


def opened(path):
    return open_pretrained(epath.Path(path))


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_both_formats_hold_the_same(files, name):
    a, b = opened(files("folder", name)), opened(files("gguf", name))
    assert a.architecture == b.architecture == ARCHITECTURES[name]
    params = a.load()
    equal(params, b.load())
    built = model.split(model.build(a.architecture, rngs=nnx.Rngs(0)))[1]
    like = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (params, built)]
    assert like[0] == like[1]
    weights = llama_files.tensors(ARCHITECTURES[name])
    equal(params["layers"]["gate"][1], weights["model.layers.1.mlp.gate_proj.weight"].T)
    equal(params["embedding"], weights["model.embed_tokens.weight"])


@pytest.mark.slow  # imports PyTorch
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_of_transformers(files, name, tmp_path):
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from tests.reference import transformers_llama

    architecture = ARCHITECTURES[name]
    theirs = transformers_llama.load(files("folder", name))
    tokens = transformers_llama.random_tokens(architecture.vocabulary)
    wanted = transformers_llama.logits(theirs, tokens)
    theirs.save_pretrained(tmp_path)  # as transformers 5 writes it, with `rope_parameters`
    shutil.copy(files("folder", name) / "tokenizer.json", tmp_path)
    for path in (files("folder", name), files("gguf", name), tmp_path):
        # Both compute in float32, with sums in another order; logits are about 1.
        np.testing.assert_allclose(transformers_llama.ours(path, tokens), wanted, atol=1e-4)
    if architecture.rope_scaling:  # It makes a difference that the tolerance does not hide.
        plain = model.Decoder(architecture._replace(rope_scaling=None), dtype=jnp.float32, rngs=nnx.Rngs(0))
        unscaled = model.apply(model.split(plain)[0], opened(path).load(), tokens, separator=0)
        assert np.abs(unscaled - wanted).max() > 1e-3
    # What transformers itself makes of the GGUF file: the order of rows in q and k was undone independently.
    found = load_gguf_checkpoint(str(files("gguf", name)), return_tensors=True, model_to_load=theirs)["tensors"]
    theirs.load_state_dict(found, strict=False)
    np.testing.assert_allclose(transformers_llama.logits(theirs, tokens), wanted, atol=1e-6)


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_each_device_reads_its_part(files, form):
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    network = opened(files(form))
    params = network.load(lambda path, leaf: NamedSharding(mesh, model.sharding_spec(path, leaf, mesh)))
    assert params["layers"]["q"].addressable_shards[0].data.shape == (3, 4, 2, 4)
    equal(params, network.load())
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(network.load(dtype=jnp.bfloat16)))


def test_a_tensor_is_dequantized_once_for_all_devices(files, monkeypatch):
    import gguf

    network, read, original = opened(files("gguf")), [], gguf.dequantize
    monkeypatch.setattr(gguf, "dequantize", lambda data, kind: read.append(data.ctypes.data) or original(data, kind))
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    network.load(lambda path, leaf: NamedSharding(mesh, model.sharding_spec(path, leaf, mesh)))
    assert len(read) == len(set(read)) == len(llama_files.tensors(ARCHITECTURE))
    read.clear()
    by_layer = jax.sharding.Mesh(np.array(jax.devices()[:3]), ("layer",))
    place = NamedSharding(by_layer, jax.sharding.PartitionSpec("layer"))
    whole = NamedSharding(by_layer, jax.sharding.PartitionSpec())
    params = network.load(lambda path, leaf: place if path[0].key == "layers" else whole)
    assert len(read) == len(set(read)) == len(llama_files.tensors(ARCHITECTURE))
    equal(params, network.load())


def test_shards_and_types(folder):
    weights = llama_files.tensors(ARCHITECTURE)
    halves = {"a.safetensors": jnp.bfloat16, "b.safetensors": np.float16}
    names = {title: list(halves)[i % 2] for i, title in enumerate(weights)}
    for file, dtype in halves.items():
        part = {title: value.astype(dtype) for title, value in weights.items() if names[title] == file}
        safetensors.numpy.save_file(part, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    params = opened(folder).load()
    wanted = {title: value.astype(halves[names[title]]).astype(np.float32) for title, value in weights.items()}
    equal(params["head"], wanted["lm_head.weight"])
    equal(params["layers"]["down"][2], wanted["model.layers.2.mlp.down_proj.weight"].T)


def test_quantized(tmp_path):
    import gguf

    architecture = ARCHITECTURE._replace(width=32, head_dim=8, feed_forward=32)
    weights, quantized = llama_files.tensors(architecture), {}
    original, kind = gguf.GGUFWriter.add_tensor, gguf.GGMLQuantizationType.Q8_0

    class Writer(gguf.GGUFWriter):
        def add_tensor(self, name, value):
            if value.ndim == 1:
                return original(self, name, value)
            packed = gguf.quantize(value, kind)
            quantized[name] = gguf.dequantize(packed, kind)
            original(self, name, packed, raw_dtype=kind)

    path = llama_files.write_gguf(tmp_path / "q.gguf", architecture, weights, writer=Writer)
    params = opened(path).load()
    equal(params["layers"]["up"][1], quantized["blk.1.ffn_up.weight"].T)
    # 8 bits: half a step is 1/254 of the largest of 32 weights, which is below 4 standard deviations of 0.3.
    assert np.abs(params["layers"]["up"][1] - weights["model.layers.1.mlp.up_proj.weight"].T).max() < 1.2 / 254


def test_tokenizer_of_bytes():
    made = tokenizer.of_bytes()
    texts = [b"", b"if x:\n", bytes(range(1, 256))]
    for text, ids in zip(texts, made.encode(texts), strict=True):
        assert ids.dtype == np.uint16 and made.decode(ids) == text and made.separator not in ids
    assert made[:2] == (256, 0)


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_tokenizer(files, form):
    made = opened(files(form)).tokenizer
    assert made.separator == 0 and made.vocabulary == (ARCHITECTURE.vocabulary if form == "gguf" else 261)
    copy = pickle.loads(pickle.dumps(made))
    assert copy[:3] == made[:3]
    for text, ids in zip(TEXTS, copy.encode([text.encode() for text in TEXTS]), strict=True):
        assert ids.dtype == np.uint16 and made.decode(ids) == text.encode()
        assert not {0, 1} & set(ids.tolist())  # What spells out a control token is text.
    assert [len(ids) for ids in made.encode([b"int", b"int int"])] == [1, 3]
    assert made.decode(made.encode([b"a\xff"])[0]) == "a\ufffd".encode()  # no text, but no reason to stop
    assert made.decode([0]) == llama_files.END.encode()


def test_both_formats_have_the_same_tokens(files):
    a, b = opened(files("folder")).tokenizer, opened(files("gguf")).tokenizer
    for x, y in zip(*(made.encode([text.encode() for text in TEXTS]) for made in (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "gpt-2"])
def test_words(tmp_path, pre):
    merges = [*llama_files.MERGES, "1 2", "3 4", "12 34"]
    path = llama_files.write_gguf(
        tmp_path / "m.gguf", ARCHITECTURE, llama_files.tensors(ARCHITECTURE), pre=pre, merges=merges
    )
    made = opened(path).tokenizer
    (digits,) = made.encode([b"12345"])
    assert [made.decode([i]) for i in digits] == {
        "smollm": [b"1", b"2", b"3", b"4", b"5"],
        "llama-bpe": [b"12", b"3", b"4", b"5"],  # in threes, from the left
        "gpt-2": [b"1234", b"5"],
    }[pre]


@pytest.mark.slow  # imports PyTorch
def test_tokens_of_transformers(files):
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(files("gguf").parent, gguf_file=files("gguf").name)
    made = opened(files("gguf")).tokenizer
    for text in TEXTS[:3]:  # transformers takes control tokens out of the text
        assert made.encode([text.encode()])[0].tolist() == theirs(text, add_special_tokens=False)["input_ids"]


def test_fingerprint_of_a_tokenizer(files, folder):
    made = opened(files("folder")).tokenizer.fingerprint
    assert made == opened(folder).tokenizer.fingerprint != tokenizer.of_bytes().fingerprint
    edit(folder / "tokenizer.json", lambda content: content["model"]["merges"].pop())
    assert made != opened(folder).tokenizer.fingerprint


@pytest.mark.parametrize(
    "file, content",
    [
        ("tokenizer_config.json", {"eos_token": "<|im_end|>"}),
        ("special_tokens_map.json", {"eos_token": {"content": "<|im_end|>"}}),
        ("generation_config.json", {"eos_token_id": [7, 1]}),
    ],
)
def test_separator_that_the_folder_names(folder, file, content):
    edit(folder / "tokenizer.json", lambda content: rename(content, llama_files.END, "<start>"))
    with pytest.raises(UserError, match=r"tokenizer.json has no token that ends a text: none of <\|endoftext\|>, "):
        opened(folder)
    (folder / file).write_text(json.dumps(content))
    assert opened(folder).tokenizer.separator == 1


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rename(content, old, new):
    content["model"]["vocab"][new] = content["model"]["vocab"].pop(old)
    content["added_tokens"][0]["content"] = new


def set_config(**fields):
    return lambda folder: edit(folder / "config.json", lambda content: content.update(fields))


def set_weights(change):
    def damage(folder):
        weights = llama_files.tensors(ARCHITECTURE)
        change(weights)
        safetensors.numpy.save_file(weights, folder / "model.safetensors")

    return damage


def set_index(**files):
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def set_header(change):
    def damage(folder):
        path = folder / "model.safetensors"
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        header = json.dumps(change(header) or header).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])

    return damage


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def with_nan(weights):
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] = np.nan


Q, WEIGHTS = "model.layers.0.self_attn.q_proj.weight", "model.safetensors"
LINES = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no such file: .*config.json"),
    "config is a list": (write("config.json", b"[]"), "config.json: it holds a list, not a JSON object"),
    "config is cut": (write("config.json", b'{"a":'), "cannot read .*config.json: it is not JSON"),
    "config is binary": (write("config.json", b"\xff\xfe"), "cannot read .*config.json"),
    "foreign": (set_config(model_type="qwen2"), "config.json: model_type is 'qwen2', and only 'llama' is known"),
    "biases": (set_config(attention_bias=True), "attention_bias is True, and only False"),
    "activation": (set_config(hidden_act="gelu"), "hidden_act is 'gelu', and only 'silu'"),
    "window": (set_config(sliding_window=4096), "sliding_window is 4096, and only None"),
    "quantized": (set_config(quantization_config={}), "quantization_config is {}, and only None"),
    "no width": (set_config(hidden_size=None), "config.json: it has no hidden_size"),
    "text for a number": (set_config(hidden_size="16"), "hidden_size is '16', which is no int number here"),
    "boolean for a number": (set_config(num_hidden_layers=True), "num_hidden_layers is True, which is no int"),
    "negative": (set_config(num_hidden_layers=-1), "num_hidden_layers is -1, which is no positive number"),
    "not finite": (set_config(rms_norm_eps=float("nan")), "rms_norm_eps is nan, which is no positive number"),
    "huge": (set_config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, which is no positive number here"),
    "more layers": (set_config(num_hidden_layers=4), "is incomplete: it has no tensor model.layers.3"),
    "heads": (set_config(num_key_value_heads=3), "4 heads of 4, 3 key-value heads do not fit together"),
    "tied?": (set_config(tie_word_embeddings=1), "tie_word_embeddings is 1, which is no boolean"),
    "yarn": (set_config(rope_scaling={"type": "yarn", "factor": 2.0}), "the rotary scaling 'yarn' is not known here"),
    "new yarn": (set_config(rope_parameters={"rope_type": "yarn"}), "the rotary scaling 'yarn' is not known here"),
    "part of a head": (set_config(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5"),
    "rotary text": (set_config(rope_scaling="llama3"), "the rotary parameters are no object but 'llama3'"),
    "llama3 without": (set_config(rope_scaling={"rope_type": "llama3", "factor": 8}), "it has no low_freq_factor"),
    "another vocabulary": (set_config(vocab_size=300), r"embed_tokens.weight has the shape \[264, 16\], not \[300, 16\]"),
    "small vocabulary": (set_config(vocab_size=260), "does not fit together: 261 tokens, and logits of 260"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no such file: .*tokenizer.json"),
    "no tokens": (write("tokenizer.json", b"{}"), "tokenizer.json: `added_tokens` is no list of objects"),
    "bad tokenizer": (
        lambda folder: edit(folder / "tokenizer.json", lambda content: content.update(model={"type": "?"})),
        "cannot read the tokenizer in .*tokenizer.json",
    ),
    "lossy tokenizer": (
        lambda folder: edit(folder / "tokenizer.json", lambda content: content.update(normalizer={"type": "Lowercase"})),
        "tokenizer.json does not give back the text that it encodes",
    ),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no such file: .*model.safetensors"),
    "empty": (write(WEIGHTS, b""), "cannot read .*model.safetensors"),
    "a pickle": (write(WEIGHTS, pickle.dumps([1] * 99)), "it is damaged or cut short"),
    "no header": (write(WEIGHTS, bytes([4, 0, 0, 0, 0, 0, 0, 0]) + b"nope"), "damaged, or no safetensors file"),
    "cut": (lambda folder: os.truncate(folder / WEIGHTS, 9000), "the file is cut short: .* ends behind its end"),
    "bad shape": (set_header(lambda header: header[Q].update(shape=[16, 15])), f"{Q} has another size than"),
    "bad place": (set_header(lambda header: header[Q].update(data_offsets=[-4, 1020])), f"{Q} has a bad place"),
    "no place": (set_header(lambda header: header[Q].pop("data_offsets") and None), "damaged, or no safetensors file"),
    "integers": (set_header(lambda header: header[Q].update(dtype="I32")), f"{Q} is I32; known are F32, F16, BF16"),
    "header is a list": (set_header(lambda header: [1]), "damaged, or no safetensors file"),
    "missing": (set_weights(lambda weights: weights.pop(Q)), f"is incomplete: it has no tensor {Q}"),
    "bias": (
        set_weights(lambda weights: weights.update({"model.layers.0.mlp.up_proj.bias": np.zeros(24, np.float32)})),
        "it is no plain Llama: it has model.layers.0.mlp.up_proj.bias as well",
    ),
    "NaN": (set_weights(with_nan), "layers.2.mlp.up_proj.weight has values that are not finite"),
    "index outside": (set_index(**{Q: "../model.safetensors"}), "'../model.safetensors' is no safetensors file of this"),
    "index to code": (set_index(**{Q: "pytorch_model.bin"}), "'pytorch_model.bin' is no safetensors file of this folder"),
    "index to nothing": (set_index(**{Q: "b.safetensors"}), "no such file: .*b.safetensors"),
    "index is wrong": (set_index(x=WEIGHTS), "it has no tensor x, which model.safetensors.index.json says is there"),
    "index is empty": (set_index(), "model.safetensors.index.json: it has no weight_map"),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
def test_one_line_for_a_bad_folder(folder, case):
    damage, message = LINES[case]
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        opened(folder).load()
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


GGUF_LINES = {
    "foreign": ({"kind": "qwen2"}, "general.architecture is 'qwen2', and only 'llama' is known"),
    "another tokenizer": ({"pre": "default"}, "a tokenizer 'gpt2' with the pre-tokenizer 'default'; known: .*smollm"),
    "experts": ({"more": lambda writer: writer.add_expert_count(8)}, "llama.expert_count is 8, and only 0 is known"),
    "scaling": (
        {"more": lambda writer: writer.add_string("llama.rope.scaling.type", "linear")},
        "llama.rope.scaling.type is 'linear', and only 'none' is known",
    ),
    "other frequencies": (
        {"more": lambda writer: writer.add_tensor("rope_freqs.weight", np.array([1, 3], np.float32))},
        "rope_freqs.weight is another rotary scaling than that of Llama 3",
    ),
    "bias": (
        {"more": lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.zeros(16, np.float32))},
        "it is no plain Llama: it has blk.0.attn_q.bias as well",
    ),
}


@pytest.mark.parametrize("case", GGUF_LINES)
def test_one_line_for_a_bad_gguf(tmp_path, case):
    options, message = GGUF_LINES[case]
    path = llama_files.write_gguf(tmp_path / "m.gguf", ARCHITECTURE, llama_files.tensors(ARCHITECTURE), **options)
    with pytest.raises(UserError, match=message) as error:
        opened(path).load()
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("size", [0, 3, 40, 5_000, -200])
def test_one_line_for_a_gguf_that_is_cut(files, tmp_path, size):
    data = files("gguf").read_bytes()
    path = tmp_path / "m.gguf"
    path.write_bytes(data[:size])
    with pytest.raises(UserError, match=r"cannot read .*m\.gguf") as error:
        opened(path).load()
    assert "\n" not in str(error.value)


# What a damaged length says, by where it is behind a piece of the file: (bytes before it, how many follow, its size).
GGUF_LENGTHS = {
    "array of strings": (b"tokenizer.ggml.merges" + bytes([9, 0, 0, 0]), 4, 8),
    "array of numbers": (b"tokenizer.ggml.token_type" + bytes([9, 0, 0, 0]), 4, 8),
    "string": (b"tokenizer.ggml.model" + bytes([8, 0, 0, 0]), 0, 8),
    "string in an array": (b"tokenizer.ggml.merges" + bytes([9, 0, 0, 0]), 12, 8),
    "tensors": (b"GGUF", 4, 8),
    "keys": (b"GGUF", 12, 8),
    "axes": (b"token_embd.weight", 0, 4),
    "axis": (b"token_embd.weight", 4, 8),
    "place of a tensor": (b"token_embd.weight", 24, 8),
}


@pytest.mark.parametrize("length", [2**40, 2**63])
@pytest.mark.parametrize("case", GGUF_LENGTHS)
def test_one_line_for_a_gguf_with_a_wrong_length(files, tmp_path, case, length):
    before, skipped, size = GGUF_LENGTHS[case]
    data = bytearray(files("gguf").read_bytes())
    at = data.index(before) + len(before) + skipped
    data[at : at + size] = min(length, 2 ** (8 * size) - 1).to_bytes(size, "little")
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(UserError, match=r"m\.gguf") as error:
        opened(tmp_path / "m.gguf").load()
    assert "\n" not in str(error.value)


def test_a_gguf_has_no_array_of_millions(files, tmp_path):
    """Of a whole network they could lie within the file, and each value would be an object."""
    data = files("gguf").read_bytes()
    at = data.index(before := b"tokenizer.ggml.token_type" + bytes([9, 0, 0, 0])) + len(before) + 4
    data = data[:at] + (2**20 + 1).to_bytes(8, "little") + data[at + 8 :] + bytes(4 * 2**20)
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(UserError, match="an array has 1048577 values"):
        opened(tmp_path / "m.gguf")


def test_one_line_for_a_path_that_is_neither(tmp_path):
    (tmp_path / "model.bin").touch()
    for name, message in {
        "gs://bucket/llama": "is in a bucket; copy it to this machine first",
        str(tmp_path / "nothing"): "no such file or folder: ",
        str(tmp_path / "model.bin"): "give a Hugging Face folder or a file whose name ends in .gguf",
    }.items():
        with pytest.raises(UserError, match=message):
            opened(name)
