"""From text to token ids and back: bytes, a Hugging Face `tokenizer.json`, or the tokenizer inside a GGUF file.

A text is what lies between two separators. No id of a text is the separator, whatever the text says: where it spells out
a control token, such as `<|endoftext|>`, it is taken as the characters that it is. Nothing is added at a text's beginning
or end.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from examples.trainer.errors import UserError, one_line

# What ends a document in pretraining. Chat models name the end of a turn as their end of text, so these come first.
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")

# How the texts are cut into words before pairs are merged, by the name that GGUF has for it; from llama.cpp.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = {"smollm": (r"\p{N}", _GPT2), "gpt-2": (_GPT2,), "llama-bpe": (_LLAMA3,)}
_CONTROL, _USER_DEFINED = 3, 4  # types of tokens in GGUF

# A tokenizer that lowers case, drops spaces or has no bytes to fall back on does not give this back.
_PROBE = "def f(x):\n\treturn  {'É': \"œ€😀\"}  # 12345 \r\n<|x|>"


class Tokenizer(NamedTuple):
    """What makes ids of texts."""

    vocabulary: int  # number of ids
    separator: int  # the id that ends a document, and stands nowhere else
    fingerprint: str  # hex SHA-256 of all that decides which ids a text gets
    encode: Callable[[Sequence[bytes]], list[np.ndarray]]  # one array of uint16, or uint32, for each text
    decode: Callable[[Any], bytes]  # of a sequence of ids


def of_bytes() -> Tokenizer:
    """An id is a byte; the separator is the byte 0, which texts do not have.

    Example:
        >>> from examples.language_model import tokenizer
        >>> of_bytes = tokenizer.of_bytes()
        >>> of_bytes.encode([b"if x:"])
        [array([105, 102,  32, 120,  58], dtype=uint16)]
        >>> of_bytes.decode([105, 102])
        b'if'
    """
    return Tokenizer(256, 0, _fingerprint("bytes"), _encode_bytes, _decode_bytes)


def from_folder(folder: epath.Path) -> Tokenizer:
    """Returns the tokenizer of a Hugging Face folder, out of its `tokenizer.json`.

    The separator is `<|endoftext|>` or `<|end_of_text|>` if it has one of them, else what the folder's other files name as
    the end of a text (`eos_token`, `eos_token_id`).

    Args:
        folder: with `tokenizer.json`; others are read if they are there.

    Raises:
        UserError: if there is no such file, it is damaged, it has no separator, or it does not give back the texts that it
            encodes.
    """
    path = folder / "tokenizer.json"
    text = read_text(path)
    content = parse_json(path, text)
    added = content.get("added_tokens")
    if not _is_list(added, dict):
        raise UserError(f"cannot read {path}: `added_tokens` is no list of objects")
    separator = _separator(path, [entry.get("content") for entry in added], _end_of_text(folder, added))
    for entry in added:
        if entry.get("content") == separator:
            entry["special"] = True  # Only those that are can be told from text that spells them out.
    tokenizer = _hugging_face(path, json.dumps(content))
    return _checked(path, tokenizer, tokenizer.token_to_id(separator), _fingerprint(text, separator))


def _end_of_text(folder: epath.Path, added: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the tokens that the files of a Hugging Face folder name as their end of text."""
    named, ids = [], []
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"):
        if (folder / name).exists():
            content = parse_json(folder / name, read_text(folder / name))
            token, of_token = content.get("eos_token"), content.get("eos_token_id")
            named.append(
                token.get("content") if isinstance(token, dict) else token
            )  # which may say more than the token
            ids += of_token if isinstance(of_token, list) else [of_token]
    named += [entry.get("content") for i in ids for entry in added if entry.get("id") == i]
    return [token for token in dict.fromkeys(token for token in named if isinstance(token, str))]


def from_gguf(path: epath.Path, fields: Mapping[str, Any]) -> Tokenizer:
    """Returns the tokenizer inside a GGUF file: byte-level pair encoding (`tokenizer.ggml.model` is "gpt2").

    Args:
        path: of the file, for messages.
        fields: the metadata of the file, by name.

    Raises:
        UserError: if the tokenizer is of another kind, or as in `from_folder`.
    """
    kind, pre = (fields.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind != "gpt2" or pre not in _WORDS:
        raise UserError(
            f"{path} has a tokenizer {kind!r} with the pre-tokenizer {pre!r}; known: 'gpt2' with {', '.join(_WORDS)}; use the"
            " Hugging Face folder of this model, which has a tokenizer.json"
        )
    tokens, types, merges = (fields.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges"))
    if (
        not all(_is_list(part, str) for part in (tokens, merges))
        or not _is_list(types, int)
        or len(types) != len(tokens)
    ):
        raise UserError(f"{path} has no complete tokenizer: tokenizer.ggml.tokens, .token_type and .merges")
    added = [
        {"id": i, "content": token, "special": kind == _CONTROL}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    end = fields.get("tokenizer.ggml.eos_token_id")
    names = [tokens[end]] if isinstance(end, int) and 0 <= end < len(tokens) else []
    separator = _separator(path, [entry["content"] for entry in added if entry["special"]], names)
    splits = [
        {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False} for words in _WORDS[pre]
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
            "ignore_merges": pre == "llama-bpe",  # A word that is a token is one token, whatever the merges say.
        },
    }
    text = json.dumps(content)
    return _checked(path, _hugging_face(path, text), tokens.index(separator), _fingerprint(text, separator))


def read_text(path: epath.Path) -> str:
    """Returns what a file of a teacher holds. Raises a UserError if it is not there or is no text."""
    try:
        return path.read_text()
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {one_line(error, 200)}") from error


def parse_json(path: epath.Path, text: str) -> dict[str, Any]:
    """Returns the JSON object that a file holds. Raises a UserError if it holds something else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: it is not JSON: {one_line(error, 200)}") from error
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path}: it holds a {type(content).__name__}, not a JSON object")
    return content


def _separator(path: epath.Path, special: Sequence[Any], names: Sequence[str]) -> str:
    wanted = [*_DOCUMENT_ENDS, *names]
    for name in wanted:
        if name in special:
            return name
    raise UserError(f"{path} has no token that ends a text: none of {', '.join(wanted)} is among its special tokens")


def _hugging_face(path: epath.Path, text: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(f"reading {path} needs the package tokenizers: pip install tokenizers") from error
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # `tokenizers` raises plain exceptions.
        raise UserError(f"cannot read the tokenizer in {path}: {one_line(error, 200)}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _checked(path: epath.Path, tokenizer: Any, separator: int, fingerprint: str) -> Tokenizer:
    size = 1 + max(tokenizer.get_vocab().values())
    dtype = np.uint16 if size <= 2**16 else np.uint32
    encode = functools.partial(_encode, tokenizer, dtype)
    made = Tokenizer(size, separator, fingerprint, encode, functools.partial(_decode, tokenizer))
    probe = _PROBE + tokenizer.id_to_token(separator)
    (ids,) = encode([probe.encode()])
    if made.decode(ids) != probe.encode() or separator in ids:
        raise UserError(
            f"the tokenizer in {path} does not give back the text that it encodes: {probe!r} becomes {made.decode(ids)!r}"
        )
    return made


def _encode(tokenizer: Any, dtype: Any, texts: Sequence[bytes]) -> list[np.ndarray]:
    tokenizer.encode_special_tokens = True  # Text is never a control token. A copy in another process forgets this.
    decoded = [text.decode(errors="replace") for text in texts]
    return [np.array(found.ids, dtype) for found in tokenizer.encode_batch_fast(decoded, add_special_tokens=False)]


def _decode(tokenizer: Any, ids: Any) -> bytes:
    return tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False).encode()


def _encode_bytes(texts: Sequence[bytes]) -> list[np.ndarray]:
    return [np.frombuffer(text, np.uint8).astype(np.uint16) for text in texts]


def _decode_bytes(ids: Any) -> bytes:
    return np.asarray(ids, np.uint8).tobytes()


def _fingerprint(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)
