"""The real command, in processes of its own: as on one host or on two, with whatever signals and limits a test likes."""

import contextlib
import fcntl
import functools
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import psutil
import tensorflow_datasets as tfds

import examples.distill.datasets  # noqa: F401  (registers the builders)
from tests.language_model import tiny_language_model, write_texts

HEARTBEAT = 10  # seconds
# Without checkpoints but for the best, which are those of whole epochs that have been validated.
ONLY_BEST = "--config.checkpoint_every_steps=1000000"


class Program(NamedTuple):
    """A command that trains a teacher and the student `dot` on `examples/trainer`, and how to run it for seconds.

    module: what `python -m` runs.
    prepare: makes in a folder what the runs read, and returns the flags that name it.
    short: the flags of a run that saves after each of its six epochs and keeps all six checkpoints.
    short_saves: the steps of the student's checkpoints in that run.
    long: the flags of a run whose student trains for some seconds, and saves several times a second.
    """

    module: str
    prepare: Callable[[pathlib.Path], tuple[str, ...]]
    short: tuple[str, ...]
    short_saves: tuple[int, ...]
    long: tuple[str, ...]


def _prepare_digits(folder):
    tfds.disable_progress_bar()
    # Where another process has prepared it, nothing happens.
    tfds.builder("sklearn_digits", data_dir=folder, file_format="array_record").download_and_prepare()
    return (f"--config.dataset.data_dir={folder}",)


DISTILL = Program(
    module="examples.distill",
    prepare=_prepare_digits,
    short=(
        "--config.epochs=6",
        "--config.teacher.epochs=2",
        "--config.checkpoint_every_steps=14",
        "--config.keep_checkpoints=6",
    ),
    short_saves=(14, 28, 42, 56, 70, 84),
    long=(
        "--config.epochs=4",
        "--config.teacher.epochs=1",
        "--config.batch_size=4",  # 225 steps in an epoch
        "--config.checkpoint_every_steps=20",
    ),
)


def _prepare_texts(folder):
    if not (folder / "texts").exists():
        write_texts(folder / "texts")
    return (*tiny_language_model(folder / "texts" / "*.py"), "--config.prompts=()")


LANGUAGE_MODEL = Program(
    module="examples.language_model",
    prepare=_prepare_texts,
    short=(
        "--config.epochs=6",
        "--config.teacher.epochs=1",
        "--config.checkpoint_every_steps=12",
        "--config.keep_checkpoints=6",
    ),
    short_saves=(12, 24, 36, 48, 60, 72),
    long=(
        "--config.epochs=6",
        "--config.teacher.epochs=1",
        "--config.batch_size=1",
        "--config.checkpoint_every_steps=20",
    ),
)


class Run:
    """A command, running in a process of its own."""

    def __init__(self, module, arguments, environment, redirection=""):
        command = [sys.executable, "-m", module, *arguments]
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # Under nohup it is ignored, which programs inherit.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" {redirection}', "bash", *command] if redirection else command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        )
        signal.signal(signal.SIGHUP, before)
        self._written = {}
        self._readers = [
            threading.Thread(target=self._read, args=[stream], daemon=True)
            for stream in (self._process.stdout, self._process.stderr)
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream):
        chunks = self._written[stream] = []
        with stream:
            while chunk := stream.read1():
                chunks.append(chunk)

    def _text(self, stream):
        return b"".join(self._written.get(stream, [])).decode(errors="replace").replace("\r", "\n")

    def output(self):
        return self._text(self._process.stdout)

    def errors(self):
        return self._text(self._process.stderr)

    def wait_for(self, holds):
        """Waits until `holds()`; the process must not end before."""
        deadline = time.monotonic() + 120
        while not holds():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                raise AssertionError(f"waited in vain: {self.errors()}")
            time.sleep(0.01)

    def send(self, number):
        """Sends a signal; returns whether the process was alive."""
        if self._process.poll() is None:
            self._process.send_signal(number)
            return True
        return False

    def children(self):
        """Returns the processes that it has started."""
        return psutil.Process(self._process.pid).children()

    def limit_files(self, size):
        """Allows files no more bytes than that, as if the disk were full."""
        _, hard = resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, (size, hard))

    def lift_limit(self):
        self.limit_files(resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE)[1])

    def wait(self, timeout=240):
        """Returns (exit code, seconds until it came)."""
        begun = time.perf_counter()
        try:
            return self._process.wait(timeout), time.perf_counter() - begun
        finally:
            self._process.kill()
            self._process.wait()
            for reader in self._readers:  # until its worker processes, which have the same output, have ended too
                reader.join(60)


class Workspace:
    """A folder for runs of a program, with what they read; several processes may share it."""

    def __init__(self, folder, program=DISTILL):
        self.folder, self.program = pathlib.Path(folder), program
        self.folder.mkdir(exist_ok=True)
        without_torch = self.folder / "without_torch"
        with self.one_at_a_time():
            self._flags = program.prepare(self.folder)
            # PyTorch is not needed, but tensorboardX imports it if it is there, for a second or two.
            if not without_torch.exists():
                without_torch.mkdir()
                (without_torch / "torch.py").write_text("raise ImportError")
        self._environment = {"PYTHONPATH": str(without_torch)}

    @contextlib.contextmanager
    def one_at_a_time(self):
        """Lets the processes that share the folder in one after the other."""
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def start(self, workdir, *flags, devices=1, environment=None, redirection=""):
        arguments = [f"--workdir={workdir}", *self._flags, "--config.method=dot", *flags]
        environment = self._environment | {"JAX_NUM_CPU_DEVICES": str(devices)} | (environment or {})
        return Run(self.program.module, arguments, environment, redirection)

    def start_two_hosts(self, workdir, *flags, each=((), ())):
        """Starts two processes with two devices each."""
        with socket.socket() as listener:
            listener.bind(("localhost", 0))
            port = listener.getsockname()[1]
        flags = (*flags, f"--coordinator=localhost:{port}", "--num_processes=2", f"--heartbeat_timeout={HEARTBEAT}")
        # On CPUs a thread waits inside a collective. XLA has one for each core unless this says more: on two cores, two
        # programs that run at once on two devices can wait for each other forever.
        threads = {"NPROC": "16"}
        return [
            self.start(workdir, *flags, f"--process_id={i}", *each[i], devices=2, environment=threads) for i in range(2)
        ]

    def finish(self, workdir, *flags, **options):
        """Runs the command to its end; returns what it printed as errors and warnings."""
        run = self.start(workdir, *flags, **options)
        code, _ = run.wait()
        assert code == 0, run.errors()
        return run.errors()

    def _undisturbed(self, name, flags):
        with self.one_at_a_time():
            if not (self.folder / name / "dot" / "result.json").exists():
                self.finish(self.folder / name, *flags)
        return self.folder / name

    @functools.cached_property
    def short(self):
        """The folder of an undisturbed run."""
        return self._undisturbed("short", self.program.short)

    @functools.cached_property
    def long(self):
        """The folder of an undisturbed run that takes some seconds."""
        # Its bits do not depend on how often it saves.
        return self._undisturbed("long", (*self.program.long, ONLY_BEST))

    def with_teacher(self, name, undisturbed):
        """Returns a folder in which only the student is still to be trained."""
        shutil.copytree(undisturbed, self.folder / name, ignore=shutil.ignore_patterns("dot"))
        return self.folder / name

    def unfinished(self, name):
        """Returns a folder of the short run that lacks the result, and has a checkpoint of each of the six epochs."""
        shutil.copytree(self.short, self.folder / name)
        (self.folder / name / "dot" / "result.json").unlink()
        return self.folder / name
