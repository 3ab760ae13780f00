"""The process of a command, from its first signal to its exit code; the command itself is in `command_line.py`."""

import _thread
import contextlib
import gc
import importlib
import os
import signal
import sys
import threading
from typing import Any, TextIO


def run(module: str) -> None:
    """Imports a module and runs its `main(argv)`, as the program of this process."""
    _open_standard_streams()
    # An interrupt of an import can surface as an ImportError or not at all. `main` and what it calls take over later.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _end_imports)
    sys.unraisablehook = _unraisable
    code = importlib.import_module(module).main(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        stream.close_quietly()
    if code:
        _exit_at_once(code)


class _Output:
    """A standard stream that drops what it cannot write.

    A terminal that was closed, a full disk, a pipe without a reader or a letter that the terminal does not have must
    not end a run of hours.
    """

    def __init__(self, stream: TextIO) -> None:
        stream.reconfigure(errors="replace")
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def close_quietly(self) -> None:
        """Leaves nothing that the interpreter's shutdown would try to write once more."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _open_standard_streams() -> None:
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # It was closed: else the next file that is opened, such as a checkpoint, would get its number.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _Output(sys.stdout or open(1, "w", closefd=False))
    sys.stderr = _Output(sys.stderr or open(2, "w", closefd=False))


def _end_imports(number: int, _: object) -> None:
    interrupted = number == signal.SIGINT
    print("interrupted" if interrupted else "terminated", "before anything was begun", file=sys.stderr)
    _exit_at_once(130 if interrupted else 0)


def _unraisable(unraisable: Any) -> None:
    # Python drops an exception that is raised while the garbage collector runs, and JAX hooks into the collector.
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Timer(0.1, _thread.interrupt_main).start()
    # When Orbax gives up on a damaged checkpoint, what it was still reading can report to nothing.
    elif str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _exit_at_once(code: int) -> None:
    # The interpreter's shutdown can crash when XLA was interrupted while it compiled, and waits for other hosts.
    sys.unraisablehook = lambda _: None  # What Orbax gave up can report to nothing.
    gc.collect()  # Else Python complains about the semaphores of Grain's worker processes.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
