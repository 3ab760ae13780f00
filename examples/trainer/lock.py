"""What keeps a second run out of a working directory, and lets the next one in however this one ends.

On the file systems of a machine that is `flock`, which the kernel frees with the process. A bucket has no such thing.
There the lock is a lease: an object that its holder writes anew every few seconds. Each write is on the condition that
the object is still the one that the writer saw last, so that of several runs exactly one gets it. A run that finds an
object which does not change for long enough takes it over; no two clocks are compared.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

import tensorstore as ts
from etils import epath

from examples.trainer import paths
from examples.trainer.errors import UserError
from examples.trainer.log import warn

_RENEWED_EVERY = 15.0  # seconds
_EXPIRES_AFTER = 60.0
_POLLED_EVERY = 1.0


class Held(Exception):
    """Another run has the lock; the message says which, where that is known."""


def hold(path: epath.Path) -> contextlib.AbstractContextManager[None]:
    """Holds the lock, a file that it makes, for a `with` block; raises `Held` if another run has it."""
    return _lease(path) if paths.in_bucket(path) else _flock(path)


@contextlib.contextmanager
def _flock(path: epath.Path) -> Iterator[None]:
    while True:
        if os.path.islink(path):
            raise UserError(f"{path} is a symbolic link, which this program did not make; remove it")
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Held from None
            # The last holder may have removed it after it was opened here.
            if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                yield
                return


@contextlib.contextmanager
def _lease(path: epath.Path) -> Iterator[None]:
    lease = _Lease(path)
    lease.acquire()
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(_RENEWED_EVERY):
            if not lease.renew():
                print(f"error: this run was silent, and another one has taken over {path.parent}", file=sys.stderr)
                sys.stderr.flush()
                os._exit(1)  # Whatever this process still wrote would be among the files of the other one.

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        lease.release()


class _Lease:
    def __init__(self, path: epath.Path) -> None:
        self._folder = path.parent
        self._name = path.name
        self._store = ts.KvStore.open(f"{self._folder}/").result()
        holder = {"host": socket.gethostname(), "process": os.getpid(), "time": time.time()}
        self._holder = json.dumps(holder).encode()
        self._generation = b""  # of the object that this process saw or wrote last; each write gives another one

    def acquire(self) -> None:
        value = first = self._read()
        generation, end = self._generation, time.monotonic() + _EXPIRES_AFTER
        if first is not None:
            warn(
                f"{_describe(first)} has locked {self._folder}; if it does not live any more, this run begins in"
                f" {_EXPIRES_AFTER:.0f} seconds"
            )
        while value is not None and self._generation == generation and time.monotonic() < end:
            time.sleep(_POLLED_EVERY)
            value = self._read()
        if value is not None and self._generation != generation:
            raise Held(_describe(value))
        if not self._take():
            raise Held(_describe(self._read()))

    def renew(self) -> bool:
        """Returns whether this process has the lease still."""
        try:
            return self._take()
        except Exception:  # Whatever a network can do: the next time it may be there again.
            return True

    def release(self) -> None:
        with contextlib.suppress(Exception):  # Then it expires.
            self._write(None)

    def _take(self) -> bool:
        """Returns whether this process has the lease now."""
        # Where the answer to a write is lost, TensorStore writes once more, and finds an object that is not the last.
        return self._write(self._holder) or self._read() == self._holder

    def _read(self) -> bytes | None:
        found = self._store.read(self._name).result()
        self._generation = found.stamp.generation
        return found.value if found.state == "value" else None

    def _write(self, value: bytes | None) -> bool:
        """Replaces the object, or removes it with None, if it is still the one that was seen last."""
        generation = self._store.write(self._name, value, if_equal=self._generation).result().generation
        if generation:
            self._generation = generation
        return bool(generation)


def _describe(holder: bytes | None) -> str:
    """Names the run that an object was written by."""
    try:
        record = json.loads(holder or b"")
        return f"process {record['process']} on {record['host']}"
    except (ValueError, TypeError, KeyError):
        return "another run"
