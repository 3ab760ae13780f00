"""Faults that a training run survives, each brought about for real: through the command, on small data.

    python -m tests.faults [PROGRAM]

prints what happened, in some minutes on two cores; PROGRAM is `examples.distill` unless given.
`tests/examples/test_trainer_faults.py` runs most of them as slow tests, with fewer kills.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import random
import re
import shutil
import signal
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import psutil
import tensorstore
from absl import logging

from examples.trainer import checkpoint
from tests.cache import share_compiled_programs
from tests.runs import DISTILL, HEARTBEAT, LANGUAGE_MODEL, ONLY_BEST, Workspace

ROOM = 7000  # bytes that a file may have where there is no room for checkpoints: each has larger ones

# A config that gives wrong labels, of which the loss is NaN, in the batches that the environment names.
_BAD_BATCHES = """
import itertools
import os

import numpy as np

from examples.trainer import parallel
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


def _bad_batches(workspace, which):
    """Returns the options of `start` that make `which` batches bad."""
    path = workspace.folder / "bad_batches.py"
    with workspace.one_at_a_time():
        if not path.exists():
            path.write_text(_BAD_BATCHES)
    return f"--config={path}", {"BAD_BATCHES": which}


def _checkpoint(job):
    return job / "checkpoints" / str(max(checkpoint.saved_steps(job)))


def _log(job):
    return [json.loads(line) | {"seconds": None} for line in (job / "metrics.jsonl").read_text().splitlines()]


def _optimizer(job):
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(_checkpoint(job) / "optimizer").item_metadata.tree
        like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), saved)
        return checkpointer.restore(_checkpoint(job) / "optimizer", like)


def _assert_same_bits(workdir, undisturbed):
    """Parameters, both momenta and the log are those of the undisturbed run."""
    a, b = (
        (checkpoint.load_variables(folder / "dot"), _optimizer(folder / "dot"), _log(folder / "dot"))
        for folder in (workdir, undisturbed)
    )
    jax.tree.map(np.testing.assert_array_equal, a[:2], b[:2])
    assert a[2] == b[2]


def _assert_close(workdir, undisturbed):
    """As close as four devices are to one: rounding errors of 900 steps."""
    a, b = (checkpoint.load_variables(folder / "dot") for folder in (workdir, undisturbed))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), a, b)


def _saved(workdir):
    """The steps that were saved, over both jobs."""
    return sum(max(checkpoint.saved_steps(workdir / job), default=0) for job in ("teacher", "dot"))


def killed_at_random_moments(workspace, kills=20):
    workdir, rng = workspace.folder / "killed", random.Random(0)
    seconds = json.loads((workspace.long / "dot" / "result.json").read_text())["seconds"]
    while_training, until_first_save = 0, math.inf
    for kill in range(kills):
        before = _saved(workdir)
        begun, run = time.perf_counter(), workspace.start(workdir, *workspace.program.long)
        if kill % 2 == 0:
            run.wait_for(lambda before=before: _saved(workdir) > before)
            until_first_save = min(until_first_save, time.perf_counter() - begun)
            time.sleep(rng.uniform(0, seconds / kills))
        else:  # while it imports, restores, compiles or takes the first steps
            end = begun + rng.uniform(0, until_first_save)
            while time.perf_counter() < end and _saved(workdir) == before:
                time.sleep(0.01)
        assert run.send(signal.SIGKILL), run.errors()
        code, _ = run.wait()
        assert code == -signal.SIGKILL
        while_training += _saved(workdir) > before
    assert while_training >= kills // 2
    workspace.finish(workdir, *workspace.program.long)
    _assert_same_bits(workdir, workspace.long)
    return (
        f"killed {kills} times, {while_training} of them after it had trained and saved; in the end parameters, momenta and"
        " log have the bits of the undisturbed run"
    )


def killed_with_workers(workspace):
    workdir = workspace.with_teacher("killed_workers", workspace.long)
    flags = (*workspace.program.long, "--config.dataset.in_memory=False", "--config.dataset.workers=2")
    run = workspace.start(workdir, *flags)
    run.wait_for(lambda: checkpoint.saved_steps(workdir / "dot"))
    workers = run.children()
    assert len(workers) > 1  # one of them removes the shared memory of the others
    begun = time.perf_counter()
    run.send(signal.SIGKILL)
    run.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    return f"all processes that it had started ended as well, after {time.perf_counter() - begun:.1f} s"


def _terminate(workdir, start, number=signal.SIGTERM):
    """Sends a signal to the last of the processes that `start()` starts. Returns how long it took them to end."""
    for _ in range(6):  # Now and then it comes after an epoch, where there is a checkpoint anyway, or after the last.
        shutil.rmtree(workdir / "dot", ignore_errors=True)
        runs = start()
        runs[0].wait_for(lambda: checkpoint.saved_steps(workdir / "dot"))
        time.sleep(0.1)
        runs[-1].send(number)
        (code, seconds), *others = [run.wait() for run in runs]
        if (workdir / "dot" / "result.json").exists():
            continue
        assert code == 0 and all(other == 0 for other, _ in others), [run.errors() for run in runs]
        step = max(checkpoint.saved_steps(workdir / "dot"))
        for run in runs:
            assert f"terminated; the same command goes on from step {step} of dot" in run.errors()
        record = json.loads((_checkpoint(workdir / "dot") / "progress" / "metadata").read_text())
        if record["log"]["epoch_steps"]:
            return seconds
    raise AssertionError("nothing was saved within an epoch")


def preempted(workspace, number):
    workdir = workspace.with_teacher(f"preempted_{number}", workspace.long)
    seconds = _terminate(workdir, lambda: [workspace.start(workdir, *workspace.program.long, ONLY_BEST)], number)
    workspace.finish(workdir, *workspace.program.long)
    _assert_same_bits(workdir, workspace.long)
    return f"saved and exited with 0 after {seconds:.1f} s; the next start ended with the bits of the undisturbed run"


def preempted_on_one_of_two_hosts(workspace):
    workdir = workspace.with_teacher("preempted_hosts", workspace.long)
    seconds = _terminate(workdir, lambda: workspace.start_two_hosts(workdir, *workspace.program.long, ONLY_BEST))
    workspace.finish(workdir, *workspace.program.long)
    _assert_close(workdir, workspace.long)
    return f"both saved the same step and exited with 0 after {seconds:.1f} s; one host alone went on to the same end"


def preempted_with_workers(workspace):
    workdir = workspace.with_teacher("preempted_workers", workspace.long)
    flags = (*workspace.program.long, "--config.dataset.in_memory=False", "--config.dataset.workers=1")
    run = workspace.start(workdir, *flags)
    run.wait_for(lambda: checkpoint.saved_steps(workdir / "dot"))
    for child in run.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            child.terminate()
    time.sleep(0.2)  # for those that would die of it
    assert run.send(signal.SIGTERM)
    code, _ = run.wait()
    assert code == 0, run.errors()
    assert "terminated; the same command goes on from step" in run.errors()
    return "the processes that read for it did not mind; the run saved and exited with 0"


def one_of_two_hosts_killed(workspace, victim):
    workdir = workspace.with_teacher(f"host_{victim}_killed", workspace.long)
    runs = workspace.start_two_hosts(workdir, *workspace.program.long)
    runs[0].wait_for(lambda: checkpoint.saved_steps(workdir / "dot"))
    runs[victim].send(signal.SIGKILL)
    code, seconds = runs[1 - victim].wait()
    assert code != 0 and seconds < 60  # JAX by itself waits for 100
    # The other notices it in a step, or in a save, which fails at once.
    assert re.search("another task died|see what the other hosts say", runs[1 - victim].errors())
    runs[victim].wait()
    return f"the other ended with an error after {seconds:.1f} s, with --heartbeat_timeout={HEARTBEAT}"


def _truncate(folder):
    largest = max((folder / "variables").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    os.truncate(largest, largest.stat().st_size // 2)


def _flip(folder):
    """Flips a bit that Orbax does not notice: of a number of the largest array.

    The array is written anew, since arrays are compressed: a bit flipped in the file may be one that zstd stumbles over.
    """
    store = {"driver": "ocdbt", "base": f"{(folder / 'optimizer').as_uri()}/"}
    values = tensorstore.KvStore.open(store).result()
    largest = max(values.list().result(), key=lambda key: len(values.read(key).result().value))
    kvstore = store | {"path": f"{largest.decode().rpartition('/')[0]}/"}
    array = tensorstore.open({"driver": "zarr", "kvstore": kvstore}).result()
    numbers = np.array(array.read().result())
    numbers.view(np.uint8).flat[0] ^= 1
    array.write(numbers).result()


def _remove(folder):
    shutil.rmtree(folder / "optimizer")


def _change_record(folder):
    record = folder / "progress" / "metadata"
    content = record.read_text()
    changed = content.replace('"epoch_steps": 0', '"epoch_steps": 1')
    assert changed != content
    record.write_text(changed)


def damaged(workspace):
    workdir = workspace.unfinished("damaged")
    folder, aside = (workdir / "dot" / name for name in ("checkpoints", "damaged_checkpoints"))
    _, intact, *damaged_steps = workspace.program.short_saves
    damages = dict(zip(reversed(damaged_steps), (_truncate, _flip, _remove, _change_record), strict=True))
    for step, damage in damages.items():
        damage(folder / str(step))
    errors = workspace.finish(workdir, *workspace.program.short)
    warnings = [line for line in errors.splitlines() if line.startswith("warning: ")]
    reasons = {
        _flip: "the checksum of its optimizer is wrong",
        _change_record: "the checksum of its progress is wrong",
    }
    for (step, damage), line in zip(damages.items(), warnings, strict=True):
        assert reasons.get(damage, "") in line
        assert line.startswith(f"warning: cannot read the checkpoint {folder / str(step)} (")
        assert line.endswith(f"); it is now in {aside}, and training goes on from step {intact}")
    assert {path.name for path in aside.iterdir()} == {str(step) for step in damages}
    _assert_same_bits(workdir, workspace.short)
    return (
        "said of each what is wrong, went on from the newest intact one, and ended with the bits of the undisturbed run"
    )


def disk_full_of_checkpoints(workspace):
    """No file may be as large as those of a checkpoint."""
    workdir, every = workspace.unfinished("full"), 4
    *intact, last = workspace.program.short_saves
    shutil.rmtree(workdir / "dot" / "checkpoints" / str(last))
    flags = (*workspace.program.short, f"--config.checkpoint_every_steps={every}")
    run = workspace.start(workdir, *flags)
    run.limit_files(ROOM)
    code, _ = run.wait()
    folder = workdir / "dot" / "checkpoints"
    lines = [line for line in run.errors().splitlines() if ": cannot save the checkpoint" in line]
    steps = [step for step in range(intact[-1] + 1, last + 1) if step % every == 0 or step == last]
    for line, step in zip(lines, steps, strict=True):
        kind = "error" if step == last else "warning"
        assert line.startswith(f"{kind}: cannot save the checkpoint {folder / str(step)} (")
        assert f"); the latest is that of step {intact[-1]}" in line
    # Now and then TensorStore first stumbles over what it could not write to the end.
    assert any("(File too large); " in line for line in lines), lines
    assert code == 1
    assert tuple(checkpoint.saved_steps(workdir / "dot")) == tuple(intact)
    workspace.finish(workdir, *workspace.program.short)
    _assert_same_bits(workdir, workspace.short)
    # Threads that still write while the rest of a failed save is removed may leave something; the next start removes it.
    left = {path.name for path in folder.iterdir()}
    assert left == {str(step) for step in workspace.program.short_saves}, left
    return (
        "each save that failed was reported and training went on; for want of the last one it ended with an error; the"
        " older checkpoints were intact, and with room again the run had the bits of the undisturbed one"
    )


def disk_full_for_a_while(workspace):
    """The same, until the first save has failed."""
    workdir = workspace.with_teacher("full_for_a_while", workspace.long)
    run = workspace.start(workdir, *workspace.program.long)
    run.limit_files(ROOM)
    warning = f"warning: cannot save the checkpoint {workdir / 'dot' / 'checkpoints'}/"
    run.wait_for(lambda: warning in run.errors())
    run.lift_limit()
    code, _ = run.wait()
    assert code == 0, run.errors()
    _assert_same_bits(workdir, workspace.long)
    return "said so and went on, and ended with the bits of the undisturbed run"


def disk_full_of_logs(workspace):
    """No file may grow at all."""
    workdir = workspace.with_teacher("full_log", workspace.long)
    run = workspace.start(workdir, *workspace.program.long)
    run.wait_for(lambda: checkpoint.saved_steps(workdir / "dot"))
    run.limit_files(1)
    code, _ = run.wait()
    assert code == 1
    last = run.errors().splitlines()[-1]
    assert last.startswith("error: cannot write ") and "(File too large); put this right" in last, last
    workspace.finish(workdir, *workspace.program.long)
    _assert_same_bits(workdir, workspace.long)
    return "ended with an error that names the file; with room again the run had the bits of the undisturbed one"


def unwritable_output(workspace, redirection):
    """While NaN batches make it warn."""
    workdir = workspace.with_teacher("output" + re.sub(r"\W+", "_", redirection), workspace.short)
    config, environment = _bad_batches(workspace, "{6}")
    run = workspace.start(workdir, config, *workspace.program.short, environment=environment, redirection=redirection)
    code, _ = run.wait()
    assert (code, run.output(), run.errors()) == (0, "", "")
    assert _log(workdir / "dot")[0]["skipped_steps"] == 1
    assert (workdir / "losses.png").stat().st_size > 10_000
    return "trained to the end and drew the picture; what could not be shown was dropped"


def ascii_terminal(workspace):
    workdir = workspace.with_teacher("ascii", workspace.short)
    run = workspace.start(workdir, *workspace.program.short, environment={"PYTHONIOENCODING": "ascii"})
    code, _ = run.wait()
    assert code == 0, run.errors()
    assert " +- 0.0" in run.output() and run.output().isascii()
    assert (workdir / "losses.png").stat().st_size > 10_000
    return "the table has +- for the sign that it cannot show"


def nan_batches(workspace):
    workdir = workspace.with_teacher("nan", workspace.short)
    config, environment = _bad_batches(workspace, "{6, 21, 22, 84}")
    errors = workspace.finish(workdir, config, *workspace.program.short, environment=environment)
    for step, epoch in ((6, 1), (21, 2), (22, 2), (84, 6)):
        assert f"warning: dot: step {step} (epoch {epoch}) is skipped: its loss or update is not finite" in errors
    log = _log(workdir / "dot")
    assert [line["skipped_steps"] for line in log] == [1, 2, 0, 0, 0, 1]
    assert all(np.isfinite(value) for line in log for value in line.values() if value is not None)
    state = (checkpoint.load_variables(workdir / "dot"), _optimizer(workdir / "dot"))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert log[-1]["validation_task_loss"] < log[0]["validation_task_loss"]
    return "4 steps were skipped, said so and counted in the log; parameters and both momenta stayed finite"


def only_nan_batches(workspace):
    workdir = workspace.with_teacher("only_nan", workspace.short)
    config, environment = _bad_batches(workspace, "range(30, 1000)")
    flags = (*workspace.program.short, "--config.max_consecutive_skips=5", "--config.checkpoint_every_steps=2")
    run = workspace.start(workdir, config, *flags, environment=environment)
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


def killed_while_caching(workspace):
    """While the teacher's predictions are written down, before the student begins."""
    flags = (*workspace.program.long, "--config.distillation.cache=True")
    undisturbed = workspace.folder / "cached"
    workspace.finish(undisturbed, *flags)
    workdir = workspace.with_teacher("killed_caching", undisturbed)
    cache, expected = (folder / "text" / "teacher_logits_train" for folder in (workdir, undisturbed))

    def read(folder):
        return {path.name: path.read_bytes() for path in folder.glob("*.*") if path.name != ".lock"}

    def begun():
        return (cache / "log_probs.bin").exists() and (cache / "log_probs.bin").stat().st_size > 0

    for _ in range(6):  # Now and then it comes when all is written.
        shutil.rmtree(workdir / "dot", ignore_errors=True)
        shutil.rmtree(cache)
        run = workspace.start(workdir, *flags)
        run.wait_for(begun)
        run.send(signal.SIGKILL)
        run.wait()
        if read(cache) != read(expected):
            break
    else:
        raise AssertionError("all was written already")
    workspace.finish(workdir, *flags)
    assert read(cache) == read(expected)
    _assert_same_bits(workdir, undisturbed)
    return "the next start computed what was missing: the cache has the same bytes, and the student the same bits"


# What `examples/trainer` has to survive whatever it trains; and what is tried on one program for all.
_ON_ANY_PROGRAM = {
    "`kill -9` at random moments": killed_at_random_moments,
    "SIGTERM": functools.partial(preempted, number=signal.SIGTERM),
    "damaged checkpoints: cut in half, a bit flipped, a part missing, a number changed": damaged,
    "no room for checkpoints": disk_full_of_checkpoints,
    "no room for anything": disk_full_of_logs,
}
_ON_DIGITS = {
    "no room for checkpoints, for a while": disk_full_for_a_while,
    "`kill -9` of a run with worker processes": killed_with_workers,
    "SIGTERM to its worker processes as well": preempted_with_workers,
    "SIGHUP, as when a terminal closes": functools.partial(preempted, number=signal.SIGHUP),
    "SIGUSR1": functools.partial(preempted, number=signal.SIGUSR1),
    "SIGTERM on one of two hosts": preempted_on_one_of_two_hosts,
    "`kill -9` of the second of two hosts": functools.partial(one_of_two_hosts_killed, victim=1),
    "`kill -9` of the first of two hosts": functools.partial(one_of_two_hosts_killed, victim=0),
    "stdout and stderr closed": functools.partial(unwritable_output, redirection=">&- 2>&-"),
    "stdout and stderr on a full disk": functools.partial(unwritable_output, redirection=">/dev/full 2>&1"),
    "stdout and stderr a pipe without a reader": functools.partial(unwritable_output, redirection="> >(true) 2>&1"),
    "a terminal that knows ASCII alone": ascii_terminal,
    "batches whose loss is NaN": nan_batches,
    "only such batches": only_nan_batches,
}
_ON_TEXT = {"`kill -9` while the teacher's logits are cached": killed_while_caching}
FAULTS = {DISTILL: _ON_ANY_PROGRAM | _ON_DIGITS, LANGUAGE_MODEL: _ON_ANY_PROGRAM | _ON_TEXT}


def main():
    programs = {program.module: program for program in FAULTS}
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("program", choices=programs, nargs="?", default=DISTILL.module)
    program = programs[parser.parse_args().program]
    share_compiled_programs()
    with contextlib.ExitStack() as stack:
        workspace = Workspace(stack.enter_context(tempfile.TemporaryDirectory()), program)
        logging.set_verbosity(logging.FATAL)
        print("| fault | what happened |\n| --- | --- |")
        for name, fault in FAULTS[program].items():
            print(f"| {name} | {fault(workspace)} |", flush=True)


if __name__ == "__main__":
    main()
