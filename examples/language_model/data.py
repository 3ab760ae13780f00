"""From memory-mapped tokens to batches on the devices: packed sequences, shuffled, and batched by Grain.

Sequence i of a split is `tokens[i * length : i * length + length + 1]`: documents stand one behind the other, without
padding, and a sequence begins and ends wherever that may be within one. The first `length` tokens of it are inputs, the
last `length` are what is predicted; so two neighbours share a token, which is predicted once and given once. A batch is a
dict of arrays: `tokens` int32 [batch, length + 1]; with a teacher's cache also `teacher_log_probs` float16
[batch, length, k] and `teacher_indices` int32 [batch, length, k]; and in evaluation `valid` bool [batch, length], which
predictions count: each token of the split but its first is predicted exactly once.

Each host reads its own part of every batch, and of the files no more than that. Which sequences make up a batch depends
on the seed and on nothing else.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from grain.experimental import ElasticIterator

from examples.language_model.corpus import Corpus, Split
from examples.trainer import batches
from examples.trainer.errors import UserError


class CachedTeacher(NamedTuple):
    """What a teacher thinks of each sequence of a split, see `teacher_logits.py`; both arrays are memory-mapped."""

    log_probs: np.ndarray  # float16 [sequences, length, k]
    indices: np.ndarray  # uint16 or uint32 [sequences, length, k]


def num_sequences(split: Split, length: int) -> int:
    """Number of whole sequences in a split; the tokens that are left over are not trained on."""
    return max(len(split.tokens) - 1, 0) // length


def steps_per_epoch(split: Split, length: int, batch_size: int) -> int:
    """Number of full training batches in an epoch."""
    count = num_sequences(split, length)
    if count < batch_size:
        raise UserError(
            f"batch size {batch_size} is larger than the training split ({count} sequences of {length} tokens, of"
            f" {len(split.tokens)} tokens in all); give a smaller --config.batch_size, or more text with"
            " --config.text.files or --config.text.train_tokens"
        )
    return count // batch_size


def eval_batch_size(corpus: Corpus, length: int, batch_size: int, devices: int) -> int:
    """The batch size for evaluation that `devices` devices can share: rounded up, what is too much is padding.

    It is never larger than the largest of validation and test split needs, so that both are evaluated in batches of one
    shape.
    """
    needed = max(num_predicted(split, length) for split in (corpus.validation, corpus.test))
    return batches.shared_batch_size(batch_size, needed, devices)


@contextlib.contextmanager
def train_batches(
    split: Split,
    length: int,
    batch_size: int,
    seed: int,
    epochs: int,
    put: Callable[[Any], batches.Batch] = jax.device_put,
    host: grain.sharding.ShardOptions | None = None,
    cache: CachedTeacher | None = None,
) -> Iterator[grain.DatasetIterator]:
    """Iterates over this host's part of `epochs` epochs, each in an order of its own.

    The ragged last batch of each epoch is dropped; `put` brings a batch to the devices. The iterator's state is a small
    dict, which Orbax saves beside the model: how many sequences were consumed, over all hosts. Its thread ends with the
    `with` block.
    """
    host = host or batches.this_host()
    whole_batches = steps_per_epoch(split, length, batch_size) * batch_size
    batches.check_batch(
        batch_size, host, length * (4 + _bytes_cached(cache)), "batch_size", f"sequences of {length} tokens"
    )
    sequences = grain.MapDataset.source(_Sequences(split, length, cache))
    shuffled = ElasticIterator(sequences.seed(seed).shuffle()[:whole_batches].repeat(epochs), batch_size, host)
    with contextlib.closing(batches.to_device(shuffled, put)) as iterator:
        yield iterator


def eval_batches(
    split: Split,
    length: int,
    batch_size: int,
    put: Callable[[Any], batches.Batch] = jax.device_put,
    host: grain.sharding.ShardOptions | None = None,
    cache: CachedTeacher | None = None,
) -> Iterator[batches.Batch]:
    """Every prediction of a split once, over all hosts. Every host has the same number of batches, all of one shape."""
    host = host or batches.this_host()
    batches.check_batch(
        batch_size, host, length * (5 + _bytes_cached(cache)), "eval_batch_size", f"sequences of {length} tokens"
    )

    def example(index: int, counts: bool) -> dict[str, np.ndarray]:
        valid = np.arange(1, length + 1) + index * length < (len(split.tokens) if counts else 0)
        return {"tokens": sequence(split, length, index), "valid": valid} | _cached(cache, index)

    yield from batches.evaluation(example, num_predicted(split, length), batch_size, put, host)


def batch_shapes(length: int, batch_size: int, k: int = 0) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch to train on, with a cache of the teacher's `k` likeliest tokens if there is one."""
    shapes = {"tokens": jax.ShapeDtypeStruct((batch_size, length + 1), np.int32)}
    if k:
        shapes["teacher_log_probs"] = jax.ShapeDtypeStruct((batch_size, length, k), np.float16)
        shapes["teacher_indices"] = jax.ShapeDtypeStruct((batch_size, length, k), np.int32)
    return shapes


def sequence(split: Split, length: int, index: int) -> np.ndarray:
    """The tokens of a sequence, int32 [length + 1]; the last one of a split is filled up with zeros."""
    tokens = np.asarray(split.tokens[index * length : index * length + length + 1], np.int32)
    return np.pad(tokens, (0, length + 1 - len(tokens)))


def _bytes_cached(cache: CachedTeacher | None) -> int:
    return 6 * cache.log_probs.shape[-1] if cache else 0  # for each token, in memory


def _cached(cache: CachedTeacher | None, index: int) -> dict[str, np.ndarray]:
    """What a teacher thinks of a sequence."""
    if cache is None:
        return {}
    return {
        "teacher_log_probs": np.array(cache.log_probs[index]),
        "teacher_indices": np.asarray(cache.indices[index], np.int32),
    }


def num_predicted(split: Split, length: int) -> int:
    """Number of sequences in evaluation, of which the last may be shorter."""
    return -(-(len(split.tokens) - 1) // length)


class _Sequences:
    """The whole sequences of a split, as Grain reads them."""

    def __init__(self, split: Split, length: int, cache: CachedTeacher | None) -> None:
        self._split, self._length, self._cache = split, length, cache

    def __len__(self) -> int:
        return num_sequences(self._split, self._length)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"tokens": sequence(self._split, self._length, index)} | _cached(self._cache, index)
