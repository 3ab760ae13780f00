"""From text files to tokens in memory-mapped files, which are written once.

A document is a file. Line ends are made `\\n`, and white space at the ends of lines and of the file goes; files that are
equal then count once. The SHA-256 of what remains decides in which split a document is, and where in it: a file that is
added or renamed moves no other one. With `train_tokens` or `eval_tokens` a split is cut after so many tokens, within its
last document, of which the bytes that are left count.

The folder has

    train.bin  validation.bin  test.bin    the token ids, of 16 bits or of 32, each document followed by a separator
    corpus.json                            from which texts and tokenizer they come, sizes and hashes; written last
    .lock                                  held by the run that writes

At every start all texts are read and hashed, and so are the token files: sizes and times of files do not tell whether a
text has changed, and

    python -m timeit -s "import hashlib; x = bytes(10**8)" "hashlib.sha256(x)"

prints 107 msec for 100 MB on one core. What does not fit is written anew, but files that this program did not write are never
touched. The first host does all this; the others open its files.
"""

import bisect
import collections
import contextlib
import fnmatch
import functools
import glob
import hashlib
import json
import math
import os
import sysconfig
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from examples.trainer import hosts, lock, paths, records
from examples.trainer.batches import check_memory
from examples.trainer.errors import UserError, one_line
from examples.trainer.log import warn
from examples.trainer.preemption import Preempted

SPLITS = ("train", "validation", "test")

_FORMAT = 1  # of the files; another number makes others of them
_RECORD = "corpus.json"
_UNFINISHED = {"fingerprint": None, "splits": {}}  # a record until all is written
_FIELDS = ("validation_percent", "test_percent", "train_tokens", "eval_tokens")
_BATCH = 2**22  # bytes of text that are tokenized at once
# Memory for a byte of text while it is tokenized. `tokenizers` keeps for each token its text, its place and more, and for
# each byte where it came from: of 4 MB of Python's source the peak of resident memory (`ru_maxrss`) rose by 500 bytes for
# each token of SmolLM2, which are 130 for a byte. The tokenizer of bytes keeps the text, and three times its ids, of 16
# bits.
_BYTES_OF_A_PIECE, _BYTES_OF_A_BYTE = 130, 8
_TRIES = 16  # tokens: more than any letter has
_NOT_OF_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Split(NamedTuple):
    """A part of the text."""

    tokens: np.ndarray  # uint16 or uint32 [tokens], memory-mapped; every document is followed by a separator
    num_bytes: int  # of the text that these tokens stand for, without separators
    num_documents: int  # the last may be cut
    fingerprint: str = ""  # SHA-256, in hex, of the tokens and of what the tokenizer is known by


class Corpus(NamedTuple):
    """The text in three splits, none of which has a document of another one."""

    train: Split
    validation: Split
    test: Split
    fingerprint: str  # SHA-256, in hex, of all that decides which tokens these are
    identity: Mapping[str, str]  # short hashes of what the config's numbers do not tell, by the flag that decides it


class _Document(NamedTuple):
    digest: str  # SHA-256 of the text, in hex
    path: str
    size: int


def load(
    config: ConfigDict,
    folder: epath.PathLike,
    tokenizer: Any,
    accept: Callable[[Mapping[str, str]], object] = lambda identity: None,
    preempted: Callable[[], bool] = lambda: False,
) -> Corpus:
    """Opens the text that `config` (the `text` part of a config) describes, tokenizing it first if need be.

    Args:
        config: `files`, a glob in which `**` stands for any folders but hidden ones and links (links to files are files), or
            "" for the source of Python's standard library, without its tests; `validation_percent` and `test_percent` of
            the documents; `train_tokens` and `eval_tokens`, how many to take of a split at most, or 0 for all.
        folder: of this machine, for the token files. One run at a time may write; files that others still read are replaced,
            not written to.
        tokenizer: see `tokenizer.py`.
        accept: called with `Corpus.identity` before its tokens take the place of others; may raise.
        preempted: asked before each batch of text that is tokenized, on one host; see `preemption.py`.

    Raises:
        UserError: if there is no such text, too little of it, the folder cannot be written, has files that this program did
            not write, or another run writes there.
        Preempted: with nothing saved.
    """
    folder = paths.resolve(folder)
    if paths.in_bucket(folder):
        raise UserError(
            f"tokens cannot be in {folder}: their files are mapped into memory; give a folder of this machine with"
            " --config.text.folder"
        )
    # Several hosts must ask equally often, and one alone tokenizes.
    asked = preempted if jax.process_count() == 1 else lambda: False
    work = functools.partial(_prepare, config, folder, tokenizer, accept, asked)
    return _open(folder, hosts.by_first(work, "tokenize the text"))


def lock_out_others(folder: epath.Path, stack: contextlib.ExitStack, what: str) -> None:
    """Makes a folder, and keeps other writers out until the stack is closed; raises if one of them writes `what` there."""
    with records.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        stack.enter_context(lock.hold(folder / ".lock"))
    except lock.Held:
        raise UserError(f"another run writes {what} in {folder}; wait for it, or end it") from None
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error


def _prepare(
    config: ConfigDict,
    folder: epath.Path,
    tokenizer: Any,
    accept: Callable[[Mapping[str, str]], object],
    preempted: Callable[[], bool],
) -> records.Record:
    """Returns the record of the folder, writing its files unless they are there."""
    for field in ("train_tokens", "eval_tokens"):
        if config[field] == 1:
            raise UserError(
                f"bad --config.text.{field}=1: a split needs 2 tokens or more, since the first is not predicted"
            )
    _check_own(folder)
    documents, left_out = _documents(config.files)
    identity = {
        "format": _FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "texts": hashlib.sha256("".join(document.digest for document in documents).encode()).hexdigest(),
        **{field: config[field] for field in _FIELDS},
    }
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    record = _intact(folder, fingerprint)
    if record is not None:
        return record
    accept(_identity(identity))
    if left_out:
        warn(left_out)
    splits = _split(documents, config)
    largest = max(documents, key=lambda document: document.size)
    needed = _BYTES_OF_A_BYTE if tokenizer.vocabulary <= 2**8 else _BYTES_OF_A_PIECE
    check_memory(needed * largest.size, f"the tokens of {largest.path}, as they are made,", "it in several files")
    dtype = np.dtype(np.uint16 if tokenizer.vocabulary <= 2**16 else np.uint32)
    limits = {name: config.train_tokens if name == "train" else config.eval_tokens for name in SPLITS}
    total = None if any(limits.values()) else sum(document.size for document in documents)
    with contextlib.ExitStack() as stack:
        lock_out_others(folder, stack, "tokens")
        record = _intact(folder, fingerprint, again=True)
        if record is not None:
            return record
        # However this ends, the folder is known as one of this program's.
        records.write_json(folder / _RECORD, _UNFINISHED)
        record = {"fingerprint": fingerprint, **identity, "dtype": dtype.name, "splits": {}}
        bar = tqdm(desc="tokenizing", total=total, unit="B", unit_scale=True, delay=2, leave=False)
        stack.enter_context(bar)
        for name, part in splits.items():
            tokens = _tokenized(part, limits[name], tokenizer, bar, preempted)
            record["splits"][name] = _write(folder / f"{name}.bin", tokens, limits[name], tokenizer, dtype)
        records.write_json(folder / _RECORD, record)
    return record


def _identity(record: records.Record) -> dict[str, str]:
    return {"text.files": record["texts"][:12], "text.tokenizer": record["tokenizer"][:12]}


def _check_own(folder: epath.Path) -> None:
    """Raises if the folder has files of the names of ours that are not ours: others call theirs `train.bin`, too."""
    path = folder / _RECORD
    with records.reading(folder):
        own = path.exists() and b'"fingerprint"' in path.read_bytes()[:100]  # also if the rest is damaged
        names = [_RECORD, *(f"{name}.{suffix}" for name in SPLITS for suffix in ("bin", "tmp"))]
        foreign = [] if own else [name for name in names if os.path.lexists(folder / name)]
    if foreign:
        raise UserError(
            f"{folder} has files that this program did not write, or its {_RECORD} is gone: {', '.join(foreign)}; give"
            " another --config.text.folder, or delete them"
        )


def _intact(folder: epath.Path, fingerprint: str, again: bool = False) -> records.Record | None:
    """Returns the record of the folder if it is that of these texts and all files are as they were written.

    Asked `again`, with the lock held, it does not say once more that they are not.
    """
    with records.reading(folder):
        if not (folder / _RECORD).exists():
            return None
    try:
        record = records.read_json(folder / _RECORD)
        if record["fingerprint"] != fingerprint:
            return None
        for name in SPLITS:
            path = folder / f"{name}.bin"
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, functools.partial(hashlib.sha256, record["tokenizer"].encode()))
            if found.hexdigest() != record["splits"][name]["fingerprint"]:
                raise UserError(f"{path} is damaged")
    except (UserError, KeyError, TypeError, AttributeError, OSError) as error:
        if not again:
            # `records` says what to do with a file that cannot be made anew.
            warn(f"{one_line(error).partition(';')[0]}; the text is tokenized again")
        return None
    return record


def _open(folder: epath.Path, record: records.Record) -> Corpus:
    splits = {}
    for name, split in record["splits"].items():
        path = folder / f"{name}.bin"
        try:
            tokens = np.memmap(path, record["dtype"], "r")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path} ({one_line(error)}); all hosts must see this folder") from error
        if len(tokens) != split["tokens"]:
            raise UserError(
                f"{path} has {len(tokens)} tokens instead of {split['tokens']}: all hosts must see this folder, and no other"
                " run may write there; give one of its own with --config.text.folder"
            )
        splits[name] = Split(tokens, split["bytes"], split["documents"], split["fingerprint"])
    return Corpus(**splits, fingerprint=record["fingerprint"], identity=_identity(record))


def _documents(files: str) -> tuple[list[_Document], str]:
    """Returns the documents in the order of their digests, each once, and a warning of files that are none."""
    found = _find(files)
    kept: dict[str, _Document] = {}
    left_out = collections.defaultdict(list)
    for path in found:
        try:
            text = _read(path)
        except (OSError, ValueError) as error:
            left_out[getattr(error, "strerror", None) or str(error)].append(path)
        else:
            if text:
                digest = hashlib.sha256(text).hexdigest()
                kept.setdefault(digest, _Document(digest, path, len(text)))
    if not kept:
        raise UserError(f"no file of --config.text.files={files} has text in UTF-8; {len(found)} match")
    reasons = [f"{len(names)} ({reason}), such as {names[0]}" for reason, names in left_out.items()]
    warning = f"of {len(found)} text files some were left out: {'; '.join(reasons)}" if reasons else ""
    return [kept[digest] for digest in sorted(kept)], warning


def _find(files: str) -> list[str]:
    if not files:
        library = sysconfig.get_path("stdlib")
        found = list(_expand(library, ["**", "*.py"], _NOT_OF_THE_LIBRARY))
        missing = f"Python's standard library has no source in {library}; give --config.text.files"
    else:
        if paths.in_bucket(files):
            raise UserError(f"bad --config.text.files={files}: copy the texts to a folder of this machine")
        pattern = os.fspath(paths.resolve(files, "--config.text.files"))
        found = _expand(os.sep, pattern.strip(os.sep).split(os.sep))
        inside = f"; a folder's files are --config.text.files='{os.path.join(files, '**', '*')}'"
        missing = f"no file matches --config.text.files={files}{inside if os.path.isdir(pattern) else ''}"
    # Of equal files, the same one on every machine.
    found = sorted(set(found))
    if not found:
        raise UserError(missing)
    return found


def _expand(folder: str, pattern: Sequence[str], skipped: Collection[str] = ()) -> Iterator[str]:
    """The files that a pattern matches, which is given by its parts.

    As `glob`, but `**` does not follow links to folders, which could lead in circles, nor enter folders of the `skipped`
    names.
    """
    first, *rest = pattern
    path = os.path.join(folder, first)
    if not glob.has_magic(first):
        if rest:
            yield from _expand(path, rest, skipped)
        elif os.path.isfile(path):
            yield path
        return
    if first == "**":
        yield from _expand(folder, rest or ["*"], skipped)
    for entry in _entries(folder):
        if entry.name.startswith(".") and not first.startswith("."):
            continue
        if first == "**":
            if entry.name not in skipped and entry.is_dir(follow_symlinks=False):
                yield from _expand(entry.path, pattern, skipped)
        elif fnmatch.fnmatchcase(entry.name, first):
            if rest:
                yield from _expand(entry.path, rest, skipped)
            elif entry.is_file():
                yield entry.path


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        warn(f"text files in {folder} were left out: {error.strerror}")
        return []


def _read(path: str) -> bytes:
    """Returns the text of a file, which may be empty; raises a ValueError that says why it is none."""
    check_memory(4 * os.path.getsize(path), f"the text of {path}, and what is made of it,", "it in several files")
    with open(path, "rb") as file:
        content = file.read().removeprefix(b"\xef\xbb\xbf")
    try:
        content.decode()
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    if b"\0" in content:
        raise ValueError("with NUL bytes")
    lines = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    text = b"\n".join(line.rstrip() for line in lines).rstrip()
    return text and text + b"\n"


def _split(documents: Sequence[_Document], config: ConfigDict) -> dict[str, list[_Document]]:
    """Divides documents among the splits by the first 32 bits of their digests."""
    ends = np.cumsum([config.test_percent, config.validation_percent])
    if ends[1] >= 100:
        raise UserError(
            f"bad --config.text.validation_percent={config.validation_percent} and"
            f" --config.text.test_percent={config.test_percent}: nothing is left to train on"
        )
    splits: dict[str, list[_Document]] = {name: [] for name in SPLITS}
    names = ("test", "validation", "train")
    for document in documents:
        splits[names[bisect.bisect_right(ends, 100 * int(document.digest[:8], 16) / 2**32)]].append(document)
    for name, part in splits.items():
        if not part:
            flag = "validation_percent or a lower test_percent" if name == "train" else f"{name}_percent"
            change = "a lower" if name == "train" else "a higher"
            raise UserError(
                f"of {len(documents)} different texts none came into the {name} split; give {change}"
                f" --config.text.{flag}, or more files with --config.text.files"
            )
    return splits


def _write(
    path: epath.Path, tokens: Iterator[tuple[np.ndarray, int]], limit: int, tokenizer: Any, dtype: np.dtype
) -> records.Record:
    """Writes the tokens of a split, see `_tokenized`; returns what the record says of it."""
    written = collections.Counter()
    content = hashlib.sha256(tokenizer.fingerprint.encode())
    unfinished = path.with_suffix(".tmp")
    with records.writing(unfinished):
        unfinished.unlink(missing_ok=True)  # It may be a link.
        file = open(unfinished, "xb")
    try:
        for ids, size in tokens:
            chunk = np.asarray(ids, dtype).tobytes()
            content.update(chunk)
            written.update(tokens=len(ids), bytes=size, documents=1)
            with records.writing(unfinished):
                file.write(chunk)
        with records.writing(unfinished):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        with records.writing(path):
            os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):  # It tries once more to write what could not be written.
            file.close()
        unfinished.unlink(missing_ok=True)
        raise
    if written["tokens"] < 2:
        raise UserError(
            f"the first document of the {path.stem} split has more than {limit} tokens, and this tokenizer cannot cut it;"
            f" give a higher --config.text.{'train' if path.stem == 'train' else 'eval'}_tokens"
        )
    return dict(written) | {"fingerprint": content.hexdigest()}


def _tokenized(
    documents: Sequence[_Document], limit: int, tokenizer: Any, bar: tqdm, preempted: Callable[[], bool]
) -> Iterator[tuple[np.ndarray, int]]:
    """The tokens of each document and how many bytes of text they stand for, up to `limit` tokens in all."""
    left = limit or math.inf
    for batch in _texts(documents, min(_BATCH, 4 * left)):  # about so many bytes give the tokens that are wanted
        if preempted():
            raise Preempted("the same command tokenizes the text from its beginning")
        encoded = tokenizer.encode([text for _, text in batch])
        for (path, text), ids in zip(batch, encoded, strict=True):
            bar.update(len(text))
            if len(ids) == 0 or ids.max() >= tokenizer.vocabulary or (ids == tokenizer.separator).any():
                raise UserError(
                    f"the tokenizer makes of {path} no tokens, ones that are not of its vocabulary, or the separator of"
                    " documents; leave this file out of --config.text.files"
                )
            if len(ids) + 1 > left:
                yield from _cut(text, ids, int(left), tokenizer)
                return
            left -= len(ids) + 1
            yield np.append(ids, tokenizer.separator), len(text)


def _cut(text: bytes, ids: np.ndarray, count: int, tokenizer: Any) -> Iterator[tuple[np.ndarray, int]]:
    """The first `count` tokens of a text, or some fewer where these end within a letter, and their bytes.

    None where these cannot be told, since the tokenizer gives back other bytes than it got.
    """
    for end in range(count, max(count - _TRIES, 0), -1):
        if text.startswith(start := tokenizer.decode(ids[:end])):
            yield ids[:end], len(start)
            return


def _texts(documents: Sequence[_Document], size: float) -> Iterator[list[tuple[str, bytes]]]:
    """The paths and texts of the documents in batches of `size` bytes, of which the last document has the rest."""
    batch, held = [], 0
    for document in documents:
        try:
            text = _read(document.path)
        except (OSError, ValueError):
            text = b""
        if hashlib.sha256(text).hexdigest() != document.digest:
            raise UserError(f"{document.path} changed while it was read; the same command begins with it again")
        batch.append((document.path, text))
        held += len(text)
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
