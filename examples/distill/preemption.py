"""SIGTERM: what a cluster sends some seconds before it takes a machine away."""

import itertools
import signal
import threading
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
    """The run ends early; what is not saved by then, the next one does again."""


def watch() -> Callable[[], bool]:
    """Returns `preempted()`, which says whether a SIGTERM has come.

    With several hosts it is True on all of them at the same call, whichever got the signal, so all must call it equally
    often; and once only. JAX, which listens for the signal there, arranges that.
    """
    if jax.distributed.is_initialized():
        calls = itertools.count(1)
        return lambda: multihost_utils.reached_preemption_sync_point(next(calls))
    noted = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: noted.set())
    return noted.is_set
