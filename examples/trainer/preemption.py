"""The signals that end a run early, and save what it has: what clusters send before they take a machine away.

SIGTERM    most clusters, and `kill`
SIGUSR1    some clusters, if they are told to (SLURM's --signal)
SIGHUP     a terminal that closes; it stays ignored where it is ignored already, as under nohup
"""

import itertools
import os
import signal
import threading
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils

SIGNALS = tuple(signal.Signals[name] for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))


class Preempted(Exception):
    """The run ends early; what is not saved by then, the next one does again."""


def watch() -> Callable[[], bool]:
    """Returns `preempted()`, which says whether one of the signals has come.

    With several hosts it is True on all of them at the same call, whichever got the signal, so all must call it equally
    often; and once only. JAX arranges that. It listens for SIGTERM alone there, which the others are turned into.
    """
    if jax.distributed.is_initialized():
        _handle(SIGNALS[1:], lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        calls = itertools.count(1)
        return lambda: multihost_utils.reached_preemption_sync_point(next(calls))
    noted = threading.Event()
    _handle(SIGNALS, lambda *_: noted.set())
    return noted.is_set


def _handle(signals: tuple[signal.Signals, ...], handler: Callable[..., object]) -> None:
    for number in signals:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)
