"""From examples on this host to batches on the devices, by Grain, whatever an example is.

Each host reads its own part of every batch. Where a part belongs says a `grain.sharding.ShardOptions`: by default each
host has one of its own; hosts whose devices hold the same rows of a batch, as with a mesh whose model axis spans hosts,
are given the same one.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np

from examples.trainer.errors import UserError

Batch = dict[str, jax.Array]

AHEAD = 2  # batches that wait on the device, and at each worker process


def this_host() -> grain.sharding.ShardOptions:
    """A part for each host."""
    return grain.sharding.ShardOptions(shard_index=jax.process_index(), shard_count=jax.process_count())


def to_device(batches: grain.IterDataset, put: Callable[[Any], Batch], *, copy: bool = False) -> grain.DatasetIterator:
    """Brings batches to the devices, some ahead of their use.

    Args:
        batches: of NumPy arrays.
        put: what brings one of them to the devices.
        copy: whether to copy each first, as those that worker processes hand over: these lie in shared memory, which JAX
            would hold beyond the end of the program.
    """

    def copy_and_put(batch: dict[str, np.ndarray]) -> Batch:
        return put({name: np.array(value) for name, value in batch.items()})

    on_device = batches.map(copy_and_put if copy else put)
    return iter(grain.experimental.ThreadPrefetchIterDataset(on_device, prefetch_buffer_size=AHEAD))


def evaluation(
    example: Callable[[int, bool], dict[str, Any]],
    count: int,
    batch_size: int,
    put: Callable[[Any], Batch],
    host: grain.sharding.ShardOptions,
    *,
    threads: int = 0,
) -> Iterator[Batch]:
    """Each of `count` examples once, over all parts. All parts have the same number of batches, all of one shape.

    Args:
        example: `example(index, counts)`; it does not count if it only fills up a batch, and must say so in what it returns.
        count: how many there are.
        batch_size: of all parts together.
        put: what brings a batch to the devices.
        host: which part this is.
        threads: that read.
    """
    local_batch = batch_size // host.shard_count

    def of_slot(slot: int) -> dict[str, Any]:
        index = host.shard_index + slot * host.shard_count
        return example(index, True) if index < count else example(0, False)

    slots = grain.MapDataset.range(math.ceil(count / batch_size) * local_batch)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=AHEAD * local_batch)
    with contextlib.closing(to_device(slots.map(of_slot).to_iter_dataset(options).batch(local_batch), put)) as iterator:
        yield from iterator


def shared_batch_size(batch_size: int, needed: int, devices: int) -> int:
    """The batch size for evaluation that `devices` devices can share: rounded up, what is too much is padding.

    It is never larger than the `needed` one.
    """
    return -(-min(batch_size, needed) // devices) * devices


def check_batch(
    batch_size: int, host: grain.sharding.ShardOptions, size: int, field: str, unit: str = "images"
) -> None:
    """Raises if the hosts cannot share a batch, or have no memory for examples of `size` bytes each."""
    if batch_size % host.shard_count:
        raise UserError(f"bad --config.{field}={batch_size}: it must be a multiple of the {host.shard_count} hosts")
    # The batch itself and those ahead of it.
    count = batch_size // host.shard_count * (1 + AHEAD)
    check_memory(count * size, f"batches of {batch_size} {unit}", f"a smaller --config.{field}")


def check_memory(size: int, what: str, remedy: str) -> None:
    """Raises if this machine has not so many bytes of memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise UserError(
            f"{what} take {size / 1e9:.1f} GB, and this machine has {memory / 1e9:.1f} GB of memory; give {remedy}"
        )
