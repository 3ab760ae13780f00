"""Faults that a training run survives, each brought about for real: through the command, on digits.

    python -m tests.faults

prints what happened, in about five minutes on two cores; `tests/examples/test_distill_faults.py` runs the same.
"""

import contextlib
import functools
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorflow_datasets as tfds

import examples.distill.datasets  # noqa: F401  (registers the builders)
from examples.distill import checkpoint

KILLS = 20
SHORT = ("--config.epochs=6", "--config.teacher.epochs=2", "--config.checkpoint_every_steps=28")
LONG = ("--config.epochs=100", "--config.teacher.epochs=20", "--config.checkpoint_every_steps=20")
HEARTBEAT = 10  # seconds

# A config that gives wrong labels, of which the loss is NaN, in the batches that the environment names.
_BAD_BATCHES = """
import itertools
import os

import numpy as np

from examples.distill import parallel
from examples.distill.configs.digits import get_config

make_layout = parallel.make_layout
bad = eval(os.environ["BAD_BATCHES"])


def make_layout_with_bad_batches(config):
    layout, count = make_layout(config), itertools.count(1)

    def put_batch(batch):
        labels = np.full_like(batch["label"], 99) if next(count) in bad else batch["label"]
        return layout.put_batch(batch | {"label": labels})

    return layout._replace(put_batch=put_batch)


parallel.make_layout = make_layout_with_bad_batches
"""


class Run:
    """The command, running in a process of its own."""

    def __init__(self, arguments, environment):
        self._errors = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "examples.distill", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        with self._process.stderr as stream:
            while chunk := stream.read1():
                self._errors.append(chunk)

    def errors(self):
        return b"".join(self._errors).decode(errors="replace").replace("\r", "\n")

    def wait_for(self, holds):
        """Waits until `holds()`; the process must not end before."""
        while not holds():
            assert self._process.poll() is None, self.errors()
            time.sleep(0.01)

    def wait_for_training(self, arm=""):
        self.wait_for(lambda: any(arm in line and "images/s" in line for line in self.errors().splitlines()))

    def send(self, number):
        """Sends a signal; returns whether the process was alive."""
        if self._process.poll() is None:
            self._process.send_signal(number)
            return True
        return False

    def limit_files(self, size):
        _, hard = resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, (size, hard))

    def wait(self, timeout=240):
        """Returns (exit code, seconds until it came)."""
        begun = time.perf_counter()
        try:
            return self._process.wait(timeout), time.perf_counter() - begun
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join()


class Laboratory:
    """A folder for runs, with a prepared dataset; what is compiled is compiled once for all of them."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        tfds.disable_progress_bar()
        tfds.builder("sklearn_digits", data_dir=self.folder, file_format="array_record").download_and_prepare()
        (self.folder / "bad_batches.py").write_text(_BAD_BATCHES)

    def start(self, workdir, *flags, host=None, devices=1, environment=None):
        arguments = [
            f"--workdir={workdir}",
            f"--config.dataset.data_dir={self.folder}",
            "--config.method=dot",
            *flags,
        ]
        if host is not None:
            index, port = host
            arguments += [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={index}"]
            arguments += [f"--heartbeat_timeout={HEARTBEAT}"]
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        environment = cache | {"JAX_NUM_CPU_DEVICES": str(devices)} | (environment or {})
        return Run(arguments, environment)

    def start_two_hosts(self, workdir, *flags):
        with socket.socket() as listener:
            listener.bind(("localhost", 0))
            port = listener.getsockname()[1]
        return [self.start(workdir, *flags, host=(index, port), devices=2) for index in range(2)]

    def finish(self, workdir, *flags, **options):
        """Runs the command to its end; returns what it printed as errors and warnings."""
        run = self.start(workdir, *flags, **options)
        code, _ = run.wait()
        assert code == 0, run.errors()
        return run.errors()

    @functools.cached_property
    def short(self):
        """The folder of an undisturbed run."""
        self.finish(self.folder / "short", *SHORT)
        return self.folder / "short"

    @functools.cached_property
    def long(self):
        """The folder of an undisturbed run that takes some seconds."""
        self.finish(self.folder / "long", *LONG)
        return self.folder / "long"

    def with_teacher(self, name, undisturbed):
        """Returns a folder in which only the student is still to be trained."""
        shutil.copytree(undisturbed, self.folder / name, ignore=shutil.ignore_patterns("dot"))
        return self.folder / name

    def unfinished(self, name):
        """Returns a folder of the short run that lacks the result, and has the checkpoints of steps 70 and 84."""
        shutil.copytree(self.short, self.folder / name)
        (self.folder / name / "dot" / "result.json").unlink()
        return self.folder / name


def _checkpoint(arm):
    return arm / "checkpoints" / str(max(checkpoint.saved_steps(arm)))


def _log(arm):
    return [json.loads(line) | {"seconds": None} for line in (arm / "metrics.jsonl").read_text().splitlines()]


def _optimizer(arm):
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(_checkpoint(arm) / "optimizer").item_metadata.tree
        like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), saved)
        return checkpointer.restore(_checkpoint(arm) / "optimizer", like)


def _assert_same_bits(workdir, undisturbed):
    """Parameters, both momenta and the log are those of the undisturbed run."""
    a, b = (
        (checkpoint.load_variables(folder / "dot"), _optimizer(folder / "dot"), _log(folder / "dot"))
        for folder in (workdir, undisturbed)
    )
    jax.tree.map(np.testing.assert_array_equal, a[:2], b[:2])
    assert a[2] == b[2]


def _assert_close(workdir, undisturbed):
    """As close as four devices are to one: rounding errors of some hundred steps."""
    a, b = (checkpoint.load_variables(folder / "dot") for folder in (workdir, undisturbed))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), a, b)


def killed_at_random_moments(lab):
    workdir, rng, while_training = lab.folder / "killed", random.Random(0), 0
    seconds = json.loads((lab.long / "dot" / "result.json").read_text())["seconds"]
    startup = 4.0
    for kill in range(KILLS):
        run = lab.start(workdir, *LONG)
        if kill % 2:
            run.wait_for_training()
            time.sleep(rng.uniform(0, seconds / 12))
        else:
            time.sleep(rng.uniform(0, startup))
        while_training += "images/s" in run.errors()
        assert run.send(signal.SIGKILL), run.errors()
        code, _ = run.wait()
        assert code == -signal.SIGKILL
    lab.finish(workdir, *LONG)
    _assert_same_bits(workdir, lab.long)
    return (
        f"killed {KILLS} times, {while_training} of them while training; in the end parameters, momenta and log have the"
        " bits of the undisturbed run"
    )


def preempted(lab):
    workdir = lab.with_teacher("preempted", lab.long)
    run = lab.start(workdir, *LONG)
    run.wait_for_training("dot")
    time.sleep(0.7)
    run.send(signal.SIGTERM)
    code, seconds = run.wait()
    line = run.errors().splitlines()[-1]
    assert code == 0 and seconds < 20
    assert line == f"terminated; the same command goes on from step {_checkpoint(workdir / 'dot').name} of dot"
    lab.finish(workdir, *LONG)
    _assert_same_bits(workdir, lab.long)
    return f"saved and exited with 0 after {seconds:.1f} s; the next start ended with the bits of the undisturbed run"


def preempted_on_one_of_two_hosts(lab):
    workdir = lab.with_teacher("preempted_hosts", lab.long)
    first, second = lab.start_two_hosts(workdir, *LONG)
    first.wait_for_training("dot")
    time.sleep(1)
    second.send(signal.SIGTERM)
    (code, seconds), (second_code, _) = first.wait(), second.wait()
    step = _checkpoint(workdir / "dot").name
    assert (code, second_code) == (0, 0) and seconds < 20
    for run in (first, second):
        assert run.errors().splitlines()[-1] == f"terminated; the same command goes on from step {step} of dot"
    lab.finish(workdir, *LONG, devices=1)
    _assert_close(workdir, lab.long)
    return (
        f"both saved at the same step and exited with 0 after {seconds:.1f} s; one host alone went on to the same end"
    )


def one_of_two_hosts_killed(lab, victim):
    workdir = lab.with_teacher(f"host_{victim}_killed", lab.long)
    runs = lab.start_two_hosts(workdir, *LONG)
    runs[0].wait_for_training("dot")
    runs[0].wait_for(lambda: checkpoint.saved_steps(workdir / "dot"))
    runs[victim].send(signal.SIGKILL)
    code, seconds = runs[1 - victim].wait()
    assert code != 0 and seconds < 6 * HEARTBEAT
    assert "another task died" in runs[1 - victim].errors()
    runs[victim].wait()
    if victim == 1:
        lab.finish(workdir, *LONG, devices=4)
        _assert_close(workdir, lab.long)
    return f"the other ended with an error after {seconds:.1f} s, with --heartbeat_timeout={HEARTBEAT}"


def _truncate(folder):
    largest = max((folder / "variables").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    os.truncate(largest, largest.stat().st_size // 2)


def _flip(folder):
    """Flips a bit that Orbax does not notice: of a number in the largest file."""
    largest = max((folder / "optimizer").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def _remove(folder):
    shutil.rmtree(folder / "optimizer")


def _change_record(folder):
    record = folder / "progress" / "metadata"
    record.write_text(record.read_text().replace('"global_next_index": 5376', '"global_next_index": 5312'))


def damaged(lab, damage):
    workdir = lab.unfinished(f"damaged{damage.__name__}")
    damage(workdir / "dot" / "checkpoints" / "84")
    errors = lab.finish(workdir, *SHORT)
    warning = f"warning: cannot read the checkpoint {workdir / 'dot' / 'checkpoints' / '84'} ("
    [line] = [line for line in errors.splitlines() if line.startswith(warning)]
    assert line.endswith(f"; it is now in {workdir / 'dot' / 'damaged_checkpoints'}, and training goes on from step 70")
    _assert_same_bits(workdir, lab.short)
    return "said so, went on from the one before, and ended with the bits of the undisturbed run"


def disk_full_of_checkpoints(lab):
    """No file may be as large as those of a checkpoint."""
    workdir = lab.unfinished("full")
    shutil.rmtree(workdir / "dot" / "checkpoints" / "84")
    flags = (*SHORT, "--config.checkpoint_every_steps=4")
    run = lab.start(workdir, *flags)
    run.limit_files(7000)
    code, _ = run.wait()
    lines = run.errors().splitlines()
    folder = workdir / "dot" / "checkpoints"
    failed = "(File too large); the latest is that of step 70;"
    for step in (72, 76, 80):
        assert f"warning: cannot save the checkpoint {folder / str(step)} {failed} training goes on" in lines
    assert code == 1
    assert lines[-1].startswith(f"error: cannot save the checkpoint {folder / '84'} {failed}"), lines[-1]
    assert [path.name for path in folder.iterdir()] == ["70"]
    lab.finish(workdir, *SHORT)
    _assert_same_bits(workdir, lab.short)
    return (
        "each save that failed was reported and training went on; for want of the last one it ended with an error; the"
        " older checkpoint was intact, and with room again the run had the bits of the undisturbed one"
    )


def disk_full_of_logs(lab):
    """No file may grow at all."""
    workdir = lab.with_teacher("full_log", lab.long)
    run = lab.start(workdir, *LONG)
    run.wait_for(lambda: checkpoint.saved_steps(workdir / "dot"))
    run.limit_files(1)
    code, _ = run.wait()
    assert code == 1
    last = run.errors().splitlines()[-1]
    assert last.startswith("error: cannot write ") and "(File too large); put this right" in last, last
    lab.finish(workdir, *LONG)
    _assert_same_bits(workdir, lab.long)
    return "ended with an error that names the file; with room again the run had the bits of the undisturbed one"


def nan_batches(lab):
    workdir = lab.with_teacher("nan", lab.short)
    bad = {"BAD_BATCHES": "{6, 21, 22, 84}"}
    config = f"--config={lab.folder / 'bad_batches.py'}"
    errors = lab.finish(workdir, config, *SHORT, environment=bad)
    for step, epoch in ((6, 1), (21, 2), (22, 2), (84, 6)):
        assert f"warning: dot: step {step} (epoch {epoch}) is skipped: its loss or update is not finite" in errors
    log = _log(workdir / "dot")
    assert [line["skipped_steps"] for line in log] == [1, 2, 0, 0, 0, 1]
    assert all(np.isfinite(value) for line in log for value in line.values() if value is not None)
    state = (checkpoint.load_variables(workdir / "dot"), _optimizer(workdir / "dot"))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert log[-1]["validation_task_loss"] < log[0]["validation_task_loss"]
    return "4 steps were skipped, said so and counted in the log; parameters and both momenta stayed finite"


def only_nan_batches(lab):
    workdir = lab.with_teacher("only_nan", lab.short)
    config = f"--config={lab.folder / 'bad_batches.py'}"
    flags = (*SHORT, "--config.max_consecutive_skips=5", "--config.checkpoint_every_steps=2")
    run = lab.start(workdir, config, *flags, environment={"BAD_BATCHES": "range(30, 1000)"})
    code, _ = run.wait()
    latest = workdir / "dot" / "checkpoints" / "28"
    last = run.errors().splitlines()[-1]
    assert code == 1
    assert last.startswith(
        "error: dot: 5 steps in a row were skipped, the last of them step 34 (epoch 3); the latest checkpoint is"
        f" {latest}; "
    ), last
    assert _checkpoint(workdir / "dot") == latest
    return "stopped after the 5 steps of --config.max_consecutive_skips=5, and named the latest checkpoint"


FAULTS = {
    "`kill -9` at random moments": killed_at_random_moments,
    "SIGTERM": preempted,
    "SIGTERM on one of two hosts": preempted_on_one_of_two_hosts,
    "`kill -9` of the second of two hosts": functools.partial(one_of_two_hosts_killed, victim=1),
    "`kill -9` of the first of two hosts": functools.partial(one_of_two_hosts_killed, victim=0),
    "a file of the newest checkpoint is cut in half": functools.partial(damaged, damage=_truncate),
    "a bit of a momentum is flipped in it": functools.partial(damaged, damage=_flip),
    "a part of it is missing": functools.partial(damaged, damage=_remove),
    "a number in its record is changed": functools.partial(damaged, damage=_change_record),
    "a disk without room for checkpoints": disk_full_of_checkpoints,
    "a disk without room for anything": disk_full_of_logs,
    "batches whose loss is NaN": nan_batches,
    "only such batches": only_nan_batches,
}


def main():
    with contextlib.ExitStack() as stack:
        lab = Laboratory(stack.enter_context(tempfile.TemporaryDirectory()))
        print("| fault | what happened |\n| --- | --- |")
        for name, fault in FAULTS.items():
            print(f"| {name} | {fault(lab)} |", flush=True)


if __name__ == "__main__":
    main()
