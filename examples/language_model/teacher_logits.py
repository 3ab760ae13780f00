r"""The teacher's k likeliest tokens at every position of a split of the text, computed once and kept on disk.

The folder has

    log_probs.bin    float16 [sequences, length, k]: log_softmax(teacher_logits / temperature), the likeliest first
    indices.bin      which tokens these are; of 16 bits, or of 32 for a vocabulary of more than 65,536
    checksums.bin    uint32 [sequences]: of what the two files above hold of a sequence
    teacher_logits.json   of which teacher, text, k, length and temperature; and how many sequences are finished
    .lock            held by the run that writes

A token takes 4 k bytes, or 6 k. Sequences are written in their order, and those that the record counts as finished were
on the disk before it said so: however a run ends, even by `kill -9` or with the power, the next one computes what is
missing. At every start all is read and the checksums, CRC-32, are compared; damaged sequences are computed anew.

    python -m timeit -s "import zlib; x = bytes(10**8)" "zlib.crc32(x)"

prints 39.5 msec for 100 MB on one core, where a disk may take longer. A cache of another teacher or text is never used,
and never removed by this program.

On several hosts all compute, each with its own part of a batch, and the first one alone writes: on a network's file
system, writers of one file can undo each other's pages. All of them read the files, and so must see the folder.

Float16 has 11 significant bits: a log-probability is off by at most half a spacing, 2^-11 of its magnitude (2^-25 where
it is below 2^-14), so that the probabilities q are off by a fraction of 2^-11 |log q|, and their sum by 2^-11 of the
entropy of the teacher, in nats. What the k probabilities leave of 1 is a class of its own for
`dot_optax.losses.top_k_kd_loss`. With k = vocabulary none is left: they are scaled to a sum of 1, and float16 is all
that tells this loss from that of the teacher's logits.
"""

import collections
import contextlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import grain
import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from examples.language_model.corpus import Split, lock_out_others
from examples.language_model.data import CachedTeacher, sequence
from examples.trainer import batches, hosts, paths, records
from examples.trainer.errors import UserError
from examples.trainer.log import warn
from examples.trainer.preemption import Preempted

Predict = Callable[[jax.Array], tuple[jax.Array, jax.Array]]  # tokens [batch, length] -> log-probabilities and indices

_FORMAT = 1  # of the files; another number makes others of them
_RECORD = "teacher_logits.json"
_BATCHES_AHEAD = 2  # that the devices have in hand while one is written
_SAVED_EVERY = 5.0  # seconds; less is lost when the process dies
_FLAG_OF_K = "--config.distillation.k"
# What a cache is of: in words, and the flag that says so.
_DECIDED_BY = {
    "teacher_weights": ("the checksum of the teacher's weights", "--config.teacher"),
    "teacher_architecture": ("the hash of the teacher's architecture", "--config.teacher"),
    "teacher_dtype": ("the teacher's dtype", "--config.dtype"),
    "text": ("the hash of the text", "--config.text"),
    "k": ("k", _FLAG_OF_K),
    "temperature": ("temperature", "--config.distillation.temperature"),
    "length": ("length", "--config.sequence_length"),
}


def open_cache(
    folder: epath.PathLike,
    *,
    split: Split,
    length: int,
    sequences: int,
    vocabulary: int,
    k: int,
    temperature: float,
    teacher: Mapping[str, Any],
    predict: Predict,
    batch_size: int,
    put: Callable[[Any], batches.Batch] = jax.device_put,
    host: grain.sharding.ShardOptions | None = None,
    preempted: Callable[[], bool] = lambda: False,
) -> CachedTeacher:
    """Opens a cache, after computing what is missing in it.

    Args:
        folder: of this machine, for the files of this cache alone.
        split: of the text.
        length: of a sequence.
        sequences: how many there are: of a training split `data.num_sequences`, at least one; else `data.num_predicted`.
        vocabulary: the number of tokens that the teacher knows.
        k: how many of them to keep.
        temperature: that `predict` divides the logits by.
        teacher: tells one teacher from another, in what JSON can hold: a checksum of its `weights`, a hash of its
            `architecture`, the `dtype` that it computes in.
        predict: `predict(tokens)` returns the log-probabilities [batch, length, k] of the teacher's likeliest tokens, and
            which these are; compiled. It is not called if nothing is missing.
        batch_size: of all hosts together.
        put: what brings this host's part of a batch, a dict of `tokens` and `index`, to the devices.
        host: which part of a batch this host has.
        preempted: asked before each batch; see `preemption.py`.

    Raises:
        UserError: if the folder holds a cache of something else, the disk is too small or full, it cannot be written, or
            the teacher's logits are not numbers.
        Preempted: with what is computed saved.
    """
    folder = paths.resolve(folder)
    if paths.in_bucket(folder):
        raise UserError(
            f"a teacher's logits cannot be in {folder}: their files are mapped into memory; give a folder of this machine"
            " with --config.text.folder"
        )
    dtype = np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)
    files = _Files(folder, (sequences, length, k), dtype)
    identity = {
        **{f"teacher_{name}": value for name, value in teacher.items()},
        "text": split.fingerprint,
        "k": k,
        "temperature": temperature,
        "length": length,
        # What follows from the others.
        "format": _FORMAT,
        "sequences": sequences,
        "dtype": dtype.name,
    }
    what = "use the cache of the teacher's logits"
    if hosts.by_first(lambda: bool(_state(files, identity).missing), what):
        host = host or batches.this_host()
        batches.check_batch(batch_size, host, 10 * length * k, "batch_size", f"sequences of {length} tokens")
        with contextlib.ExitStack() as stack:
            state = _State(*hosts.by_first(lambda: _begin(files, identity, stack), what))
            write = stack.enter_context(_writing(files, identity, state)) if jax.process_index() == 0 else None
            bar = tqdm(
                desc="the teacher's logits",
                total=sequences * length,
                initial=(sequences - len(state.missing)) * length,
                unit=" tokens",
                unit_scale=True,
                delay=2,
                leave=False,
                disable=jax.process_index() > 0,
            )
            stack.enter_context(bar)
            for found in _predictions(split, length, state.missing, predict, batch_size, put, host, preempted):
                if write:
                    write(found)
                bar.update(len(found.sequences) * length)
        hosts.by_first(lambda: None, what)  # The others wait until all is written.
    return files.open()


class _Files(NamedTuple):
    """Where the arrays are, and their shapes."""

    folder: epath.Path
    shape: tuple[int, int, int]
    dtype: np.dtype  # of the indices

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of a sequence in each file."""
        _, length, k = self.shape
        return {
            "log_probs.bin": 2 * length * k,
            "indices.bin": self.dtype.itemsize * length * k,
            "checksums.bin": 4,
        }

    def open(self) -> CachedTeacher:
        try:
            return CachedTeacher(
                np.memmap(self.folder / "log_probs.bin", np.float16, "r", shape=self.shape),
                np.memmap(self.folder / "indices.bin", self.dtype, "r", shape=self.shape),
            )
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.folder} ({error}); all hosts must see this folder") from error


class _State(NamedTuple):
    """What there is of a cache."""

    finished: int  # so many sequences were written
    missing: list[int]  # the sequences that were not, or are damaged


class _Found(NamedTuple):
    """What the teacher thinks of some sequences."""

    sequences: np.ndarray  # int32 [n], in the order in which they are missing
    log_probs: np.ndarray  # [n, length, k]
    indices: np.ndarray  # integers [n, length, k]


def _state(files: _Files, identity: records.Record) -> _State:
    """Returns what is there, after reading all of it; raises if it is another cache."""
    path = files.folder / _RECORD
    with records.reading(path):
        text = path.read_bytes() if path.exists() else b'{"finished": 0}'
    try:
        there = json.loads(text)
        finished = min(int(there["finished"]), files.shape[0])
    except (ValueError, TypeError, KeyError, OverflowError):
        raise UserError(f"{path} is damaged; restore it, or delete {files.folder} to compute all anew") from None
    different = [name for name in identity if there.get(name) != identity[name]]
    if finished and different:
        named = [name for name in different if name in _DECIDED_BY] or different
        decided = {name: _DECIDED_BY.get(name, (name, "")) for name in named}
        says = [
            f"{words} is {there.get(name)!s:.16} there and {identity[name]!s:.16} here"
            for name, (words, _) in decided.items()
        ]
        flags = ", ".join(dict.fromkeys(flag for _, flag in decided.values() if flag))
        remedy = f"put {flags} right, give another" if flags else "give another"
        raise UserError(
            f"the teacher's logits in {files.folder} are of something else: {'; '.join(says)}; {remedy}"
            " --config.text.folder, or delete that folder to compute them anew"
        )
    intact = set(_intact(files, finished))
    return _State(finished, [sequence for sequence in range(files.shape[0]) if sequence not in intact])


def _intact(files: _Files, finished: int) -> Iterator[int]:
    """The sequences among the first `finished` ones whose checksums are right."""
    with contextlib.ExitStack() as stack, records.reading(files.folder):
        try:
            log_probs, indices, checksums = (
                stack.enter_context(open(files.folder / name, "rb")) for name in files.sizes
            )
        except FileNotFoundError:
            return
        sizes = files.sizes.values()
        for sequence in tqdm(range(finished), desc="checksums", unit=" sequences", delay=2, leave=False):
            parts = [file.read(size) for file, size in zip((log_probs, indices, checksums), sizes, strict=True)]
            if _checksum(*parts[:2]) == parts[2]:
                yield sequence


def _checksum(*parts: bytes) -> bytes:
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return checksum.to_bytes(4, "little")


def _begin(files: _Files, identity: records.Record, stack: contextlib.ExitStack) -> _State:
    """Keeps other writers out, and returns what is there; raises if there is no room for it."""
    folder = files.folder
    lock_out_others(folder, stack, "the teacher's logits")
    state = _state(files, identity)  # Another run may have written since it was asked.
    damaged = sum(sequence < state.finished for sequence in state.missing)
    if damaged:
        warn(
            f"{damaged} of {state.finished} sequences of the teacher's logits in {folder} are damaged, and computed anew"
        )
    held = [os.path.getsize(folder / name) for name in files.sizes if (folder / name).exists()]
    wanted, free = files.shape[0] * sum(files.sizes.values()), shutil.disk_usage(folder).free
    if wanted - sum(held) > free:
        sequences, length, k = files.shape
        raise UserError(
            f"the teacher's logits take {wanted / 1e9:.3g} GB (k={k} for {sequences * length:,} tokens), and {folder} has"
            f" room for {(free + sum(held)) / 1e9:.3g} GB; give a smaller {_FLAG_OF_K}, fewer --config.text.train_tokens, or"
            " another --config.text.folder"
        )
    return state


def _predictions(
    split: Split,
    length: int,
    missing: list[int],
    predict: Predict,
    batch_size: int,
    put: Callable[[Any], batches.Batch],
    host: grain.sharding.ShardOptions,
    preempted: Callable[[], bool],
) -> Iterator[_Found]:
    """What `predict` says of the missing sequences, batch by batch."""
    several_hosts = jax.process_count() > 1
    local = batch_size // host.shard_count

    def compute(first: int) -> Any:
        batch = missing[first : first + batch_size]
        batch += batch[-1:] * (batch_size - len(batch))  # All batches have one shape.
        part = batch[host.shard_index * local : (host.shard_index + 1) * local]
        inputs = np.stack([sequence(split, length, index)[:-1] for index in part])
        on_device = put({"tokens": inputs, "index": np.array(part, np.int32)})
        results = on_device["index"], *predict(on_device["tokens"])
        return multihost_utils.process_allgather(results, tiled=True) if several_hosts else results

    def ordered(results: Any) -> _Found:
        # By what came back with them: which host has which part of a batch is for the mesh to say.
        found = _Found(*jax.device_get(results))
        _, first_of_each = np.unique(found.sequences, return_index=True)
        return _Found(*(array[first_of_each] for array in found))

    in_flight: collections.deque[Any] = collections.deque()
    ended = False
    for first in range(0, len(missing), batch_size):
        if ended := preempted():
            break
        in_flight.append(compute(first))
        if len(in_flight) > _BATCHES_AHEAD:
            yield ordered(in_flight.popleft())
    while in_flight:
        yield ordered(in_flight.popleft())
    if ended:
        raise Preempted("the same command goes on with the teacher's logits where they ended")


@contextlib.contextmanager
def _writing(files: _Files, identity: records.Record, state: _State) -> Iterator[Callable[[_Found], None]]:
    """Yields `write(found)`, which puts sequences into their places, to be called in the order in which they are missing.

    From time to time, and in the end, also if that is an error, it says in the record how many are finished.
    """
    folder, missing = files.folder, collections.deque(state.missing)
    with contextlib.ExitStack() as stack:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | (0 if state.finished else os.O_TRUNC)
        with records.writing(folder):
            opened = [open(os.open(folder / name, flags, 0o666), "r+b") for name in files.sizes]
        stack.callback(_close, opened)

        def save() -> float:
            with records.writing(folder):
                for file in opened:
                    file.flush()
                    os.fsync(file.fileno())
            # What is damaged before that is known by its checksums.
            finished = max(state.finished, missing[0] if missing else files.shape[0])
            records.write_json(folder / _RECORD, identity | {"finished": finished})
            return time.monotonic()

        saved = save()

        def write(found: _Found) -> None:
            nonlocal saved
            for sequence, *parts in zip(found.sequences.tolist(), *_encode(found, files.dtype), strict=True):
                parts.append(_checksum(*parts))
                with records.writing(folder):
                    for file, size, part in zip(opened, files.sizes.values(), parts, strict=True):
                        file.seek(sequence * size)
                        file.write(part)
                missing.popleft()
            if time.monotonic() - saved > _SAVED_EVERY:
                saved = save()

        try:
            yield write
        except UserError:  # It may be that nothing can be written.
            raise
        except BaseException:
            save()
            raise
        save()


def _encode(found: _Found, dtype: np.dtype) -> tuple[list[bytes], list[bytes]]:
    """Returns the bytes of each sequence in both files."""
    log_probs = np.asarray(found.log_probs, np.float32)
    if np.isnan(log_probs).any():
        raise UserError(
            f"the teacher's log-probabilities are not numbers in the batch of sequence {found.sequences[0]}; use"
            " another teacher, or --config.dtype=float32"
        )
    lowest = np.finfo(np.float16).min  # Below it all probabilities are 0.
    halves = np.where(log_probs < lowest, -np.inf, log_probs).astype(np.float16)
    return [each.tobytes() for each in halves], [each.tobytes() for each in found.indices.astype(dtype)]


def _close(opened: list[BinaryIO]) -> None:
    for file in opened:
        with contextlib.suppress(OSError):  # Closing tries once more to write what could not be written.
            file.close()
