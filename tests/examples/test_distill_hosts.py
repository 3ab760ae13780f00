"""Two hosts, as two processes with two devices each, through the real command: the same as one process with one device."""

import json
import os
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from examples.distill import checkpoint


def _free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def _run_on_two_hosts(workdir, data_dir, *flags, each=("", "")):
    """Returns (exit code, stdout, stderr) of both processes."""
    arguments = [
        f"--coordinator=localhost:{_free_port()}",
        "--num_processes=2",
        f"--workdir={workdir}",
        f"--config.dataset.data_dir={data_dir}",
        "--config.method=dot",
        "--config.epochs=6",
        "--config.checkpoint_every_steps=28",
        "--config.teacher.epochs=2",
        *flags,
    ]
    command = [sys.executable, "-m", "examples.distill", *arguments]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    processes = [subprocess.Popen([*command, f"--process_id={i}", *each[i].split()], **pipes) for i in range(2)]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def _assert_same_student(a, b, atol):
    student, expected = (checkpoint.load_variables(workdir / "dot") for workdir in (a, b))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), student, expected)


@pytest.mark.parametrize("form", ["jit", "pmap", "shard_map"])
def test_two_hosts_train_and_evaluate_like_one(form, finished, data_dir, tmp_path):
    first, second = _run_on_two_hosts(tmp_path / "run", data_dir, f"--config.parallel={form}")
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert "train task loss" in first[1] and "train task loss" not in second[1]
    # Rounding errors of 112 steps, the teacher's among them, as on four devices of one process.
    _assert_same_student(tmp_path / "run", finished, atol=1e-5)
    results = [json.loads((run / "dot" / "result.json").read_text()) for run in (tmp_path / "run", finished)]
    for split in ("train", "validation", "test"):
        assert results[0][split] == pytest.approx(results[1][split], rel=1e-4)
        assert results[0][split]["count"] == results[1][split]["count"]
    lines = (tmp_path / "run" / "dot" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [14, 28, 42, 56, 70, 84]

    if form == "jit":  # go on from the checkpoint of epoch 4, with the bits of the first run
        shutil.copytree(tmp_path / "run", tmp_path / "again")
        (tmp_path / "again" / "dot" / "result.json").unlink()
        shutil.rmtree(tmp_path / "again" / "dot" / "checkpoints" / "84")
        codes = [code for code, *_ in _run_on_two_hosts(tmp_path / "again", data_dir)]
        assert codes == [0, 0]
        _assert_same_student(tmp_path / "again", tmp_path / "run", atol=0)


def test_hosts_that_were_started_differently(data_dir, tmp_path):
    for code, _, errors in _run_on_two_hosts(tmp_path / "run", data_dir, each=("--config.seed=1", "--config.seed=2")):
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
        (["--distributed"], "where no cluster says who they are, give --coordinator, --num_processes and --process_id"),
    ],
)
def test_flags_of_hosts(flags, message):
    command = [sys.executable, "-m", "examples.distill", *flags]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    [line] = process.stderr.splitlines()
    assert line.startswith("error: ") and message in line
