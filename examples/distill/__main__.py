"""`python -m examples.distill`: the process and its interruption; the command line itself is in `command_line.py`."""

import _thread
import gc
import os
import signal
import sys
import threading
from typing import Any


def _end_imports(number: int, _: object) -> None:
    interrupted = number == signal.SIGINT
    print("interrupted" if interrupted else "terminated", "before anything was begun", file=sys.stderr)
    _exit_at_once(130 if interrupted else 0)


def _unraisable(unraisable: Any) -> None:
    # Python drops an exception that is raised while the garbage collector runs, and JAX hooks into the collector.
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Timer(0.1, _thread.interrupt_main).start()
    # When Orbax gives up on a damaged checkpoint, what it was still reading has nobody to report to.
    elif str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _exit_at_once(code: int) -> None:
    # The interpreter's shutdown can crash when XLA was interrupted while it compiled, and waits for other hosts.
    sys.unraisablehook = lambda _: None  # What Orbax gave up has nobody to report to.
    gc.collect()  # Else Python complains about the semaphores of Grain's worker processes.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    # An interrupt of an import can surface as an ImportError or not at all. `main` and what it calls take over later.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end_imports)
    sys.unraisablehook = _unraisable
    from examples.distill.command_line import main

    code = main(sys.argv[1:])
    if code:
        _exit_at_once(code)
