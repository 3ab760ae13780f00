"""Two hosts, as two processes with two devices each, through the real command: the same as one process with one device."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from examples.trainer import checkpoint, hosts


def _run_on_two_hosts(workspace, workdir, *flags, **options):
    """Returns (exit code, stdout, stderr) of both processes."""
    runs = workspace.start_two_hosts(workdir, *workspace.program.short, *flags, **options)
    codes = [run.wait()[0] for run in runs]
    return [(code, run.output(), run.errors()) for code, run in zip(codes, runs, strict=True)]


def _assert_same_student(a, b, atol):
    student, expected = (checkpoint.load_variables(workdir / "dot") for workdir in (a, b))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), student, expected)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jit", "jit --config.shard_params=True", "pmap", "shard_map"])
def test_two_hosts_train_and_evaluate_like_one(form, workspace):
    flags = f"--config.parallel={form}".split()
    alone, run = workspace.short, workspace.folder / f"hosts {form}"
    if form != "shard_map":  # there, the teacher is trained on two hosts as well
        workspace.with_teacher(run.name, alone)
    first, second = _run_on_two_hosts(workspace, run, *flags)
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert "train task loss" in first[1] and "train task loss" not in second[1]
    # Rounding errors of 84 steps, or of 112 with the teacher's, as on four devices of one process.
    _assert_same_student(run, alone, atol=1e-5)
    results = [json.loads((folder / "dot" / "result.json").read_text()) for folder in (run, alone)]
    for split in ("train", "validation", "test"):
        assert results[0][split] == pytest.approx(results[1][split], rel=1e-4)
        assert results[0][split]["count"] == results[1][split]["count"]
    lines = (run / "dot" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [14, 28, 42, 56, 70, 84]


@pytest.mark.slow  # one host goes on in the first tier
def test_two_hosts_go_on_from_an_earlier_checkpoint_with_the_same_bits(workspace):
    run = workspace.with_teacher("hosts", workspace.short)
    assert [code for code, *_ in _run_on_two_hosts(workspace, run)] == [0, 0]
    again = run.with_name("hosts_again")
    shutil.copytree(run, again)
    (again / "dot" / "result.json").unlink()
    shutil.rmtree(again / "dot" / "checkpoints" / "84")
    assert [code for code, *_ in _run_on_two_hosts(workspace, again)] == [0, 0]
    _assert_same_student(again, run, atol=0)


@pytest.mark.slow
def test_hosts_that_were_started_differently(workspace, tmp_path):
    for code, _, errors in _run_on_two_hosts(
        workspace, tmp_path / "run", each=(["--config.seed=1"], ["--config.seed=2"])
    ):
        assert code == 1
        assert "error: the hosts do not agree: start the same command on each" in errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--coordinator=localhost:1", "--process_id=0"],
            "give all of --coordinator, --num_processes and --process_id, or",
        ),
        (["--coordinator=x:1", "--process_id=2", "--num_processes=2"], "bad --process_id=2: it must be below"),
        (
            ["--distributed"],
            "where no cluster says which they are, give --coordinator, --num_processes and --process_id",
        ),
    ],
)
def test_flags_of_hosts(flags, message):
    command = [sys.executable, "-m", "examples.distill", *flags]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    [line] = process.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_hosts_are_connected_before_the_first_one_works(monkeypatch):
    """On CPUs they wait 30 seconds for it; what the first one does may take hours."""
    done = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "sync_global_devices", lambda name: done.append("connect"))
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda value: done.append("tell") or value)
    assert hosts.by_first(lambda: done.append("work") or [7], "work") == [7]
    assert done == ["connect", "work", "tell", "tell"]
