"""Runs that keep their files in a bucket of Google Cloud Storage: an emulator, see `tests/bucket.py`."""

import json
import os
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from flax import nnx

from examples.distill import data, import_teacher, models
from examples.distill.configs.digits import get_config
from examples.trainer import checkpoint, lock, paths, records
from examples.trainer.log import _begin_events as begin_events
from examples.trainer.step import TrainState
from tests.bucket import emulator


@pytest.fixture(scope="module")
def service():
    with emulator() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def bucket(service, tmp_path):
    """A folder in a bucket for each test."""
    return epath.Path("gs://bucket") / tmp_path.name


def copy(source, target):
    for file in source.rglob("*"):
        if file.is_file():
            (target / file.relative_to(source).as_posix()).write_bytes(file.read_bytes())


def log(job):
    return [json.loads(line) | {"seconds": None} for line in (job / "metrics.jsonl").read_text().splitlines()]


def state(step):
    return TrainState(jnp.int32(step), {"w": jnp.ones(3)}, {}, ())


def save(checkpoints, step, wait=True):
    checkpoints.save(state(step), _Batches(), checkpoint.Progress(seed=0), wait=wait)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_as_if_it_was_not(bucket, finished, distill, capsys, monkeypatch):
    append_line = records.append_line

    def interrupt(path, record):
        append_line(path, record)
        if record["epoch"] == 3:
            raise KeyboardInterrupt

    copy(finished / "teacher", bucket / "teacher")
    flags = (f"--config.teacher.checkpoint={bucket}/teacher", "--config.method=dot")
    monkeypatch.setattr(records, "append_line", interrupt)
    assert distill(bucket / "run", *flags) == 130
    assert "the same command goes on from step 28 of dot" in capsys.readouterr().err
    monkeypatch.undo()
    assert distill(bucket / "run", *flags) == 0
    dot = bucket / "run" / "dot"
    jax.tree.map(
        np.testing.assert_array_equal, checkpoint.load_variables(dot), checkpoint.load_variables(finished / "dot")
    )
    assert log(dot) == log(finished / "dot")
    assert (bucket / "run" / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert not (bucket / "run" / ".lock").exists()
    assert len(list(dot.glob("events.out.tfevents.*"))) == 1


def test_event_files(bucket, tmp_path):
    """TensorBoard reads from the bucket what the log wrote there."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    events = begin_events(bucket, [{"step": 3, "task_loss": 0.5}])
    [file] = bucket.glob("events.out.tfevents.*")
    events.close()
    (tmp_path / "events").write_bytes(file.read_bytes())
    values = [value for event in EventFileLoader(str(tmp_path / "events")).Load() for value in event.summary.value]
    assert [(value.tag, *value.tensor.float_val) for value in values] == [("task_loss", 0.5)]


def test_a_checkpoint_that_was_not_written_to_the_end(bucket):
    folder = bucket / "dot" / "checkpoints"
    checkpoint.save_variables(bucket / "dot", {"w": np.ones(3)}, {})
    for file in ("_CHECKPOINT_METADATA", "variables/_METADATA"):
        for name in ("7", "notes"):
            (folder / name / file).write_bytes((folder / "0" / file).read_bytes())
    assert checkpoint.saved_steps(bucket / "dot") == [0]
    (bucket / "kd" / "checkpoints" / "0" / "variables" / "_METADATA").write_text("{}")
    assert not checkpoint.is_imported(bucket / "kd")
    with checkpoint.Checkpoints(bucket / "dot", keep=2) as checkpoints:
        assert checkpoints.latest() == folder / "0"
    assert not (folder / "7").exists()
    assert (folder / "notes").exists()


def test_a_save_that_fails(bucket, capsys):
    folder = bucket / "dot" / "checkpoints"
    with checkpoint.Checkpoints(bucket / "dot", keep=2) as checkpoints:
        save(checkpoints, 12)
        save(checkpoints, 13, wait=False)  # forbidden
        assert not checkpoints.has(13)
        line = capsys.readouterr().err
        assert line.startswith(f"warning: cannot save the checkpoint {folder}/13 (PERMISSION_DENIED: ")
        assert line.endswith("; the latest is that of step 12\n")
        save(checkpoints, 14)
        assert checkpoints.latest() == folder / "14"
    assert checkpoint.saved_steps(bucket / "dot") == [12, 14]
    with checkpoint.Checkpoints(bucket / "dot", keep=2):
        assert sorted(path.name for path in folder.iterdir()) == ["12", "14"]


def test_a_damaged_checkpoint_is_set_aside(bucket, capsys):
    with checkpoint.Checkpoints(bucket / "dot", keep=2) as checkpoints:
        for step in (5, 6):
            save(checkpoints, step)
    folder = bucket / "dot" / "checkpoints"
    (folder / "6" / "progress" / "metadata").write_text("{}")
    with checkpoint.Checkpoints(bucket / "dot", keep=2) as checkpoints:
        restored, _ = checkpoints.restore_latest(state(0), _Batches(), seed=0)
        assert restored.step == 5
        assert capsys.readouterr().err.endswith("/damaged_checkpoints, and training goes on from step 5\n")
        assert checkpoints.latest() == folder / "5"
    assert (folder.with_name("damaged_checkpoints") / "6" / "variables" / "_METADATA").exists()


def test_images_in_a_bucket(bucket, data_dir):
    copy(data_dir / "sklearn_digits", bucket / "sklearn_digits")
    config = get_config().dataset
    local, remote = (data.load(config) for config.data_dir in (str(data_dir), str(bucket)))
    for split in ("train", "test"):
        a, b = getattr(local, split), getattr(remote, split)
        assert len(a) == len(b)
        np.testing.assert_array_equal(a[7]["image"], b[7]["image"])


class TestLease:
    """The lock of a bucket."""

    def test_a_second_run_is_refused(self, bucket, monkeypatch):
        monkeypatch.setattr(lock, "_RENEWED_EVERY", 0.01)
        monkeypatch.setattr(lock, "_POLLED_EVERY", 0.01)
        with lock.hold(bucket / ".lock"):
            with pytest.raises(lock.Held, match=f"process {os.getpid()} on "), lock.hold(bucket / ".lock"):
                pass
            assert (bucket / ".lock").exists()
        assert not (bucket / ".lock").exists()
        with lock.hold(bucket / ".lock"):
            pass

    def test_one_of_many_at_once(self, bucket, monkeypatch):
        monkeypatch.setattr(lock, "_RENEWED_EVERY", 0.01)
        monkeypatch.setattr(lock, "_POLLED_EVERY", 0.01)
        begin, end, holders, refused = threading.Barrier(6), threading.Barrier(6), [], []

        def run():
            begin.wait()
            try:
                with lock.hold(bucket / ".lock"):
                    holders.append(threading.get_ident())
                    end.wait()
            except lock.Held:
                refused.append(threading.get_ident())
                end.wait()

        threads = [threading.Thread(target=run) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(holders), len(refused)) == (1, 5)

    def test_that_of_a_dead_run_expires(self, bucket, monkeypatch, capsys):
        monkeypatch.setattr(lock, "_EXPIRES_AFTER", 0.1)
        monkeypatch.setattr(lock, "_POLLED_EVERY", 0.01)
        (bucket / ".lock").write_text('{"host": "tpu-3", "process": 17}')
        with lock.hold(bucket / ".lock"):
            pass
        assert capsys.readouterr().err.startswith(f"warning: process 17 on tpu-3 has locked {bucket}; if it does not")

    def test_a_run_that_was_silent_too_long_ends(self, bucket):
        program = """if True:
            import sys, time
            from etils import epath
            from examples.trainer import lock
            lock._RENEWED_EVERY = 0.05
            with lock.hold(epath.Path(sys.argv[1])):
                print("held", flush=True)
                time.sleep(60)
        """
        command = [sys.executable, "-c", program, str(bucket / ".lock")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "held\n"
            process.send_signal(signal.SIGSTOP)
            try:
                (bucket / ".lock").write_text("{}")  # as one that takes over does
            finally:
                process.send_signal(signal.SIGCONT)
            _, errors = process.communicate()
        assert process.returncode == 1
        assert errors.splitlines()[-1] == f"error: this run was silent, and another one has taken over {bucket}"
        assert (bucket / ".lock").read_text() == "{}"

    def test_an_answer_that_was_lost(self, bucket, monkeypatch):
        """TensorStore then writes once more, and finds an object that is not the one before."""
        lease = lock._Lease(bucket / ".lock")
        write = lease._write

        def write_twice(value):
            generation = lease._generation
            assert write(value)
            lease._generation = generation
            return write(value)

        monkeypatch.setattr(lease, "_write", write_twice)
        lease.acquire()
        assert lease.renew()
        monkeypatch.setattr(lease, "_write", write)
        assert lease.renew()
        (bucket / ".lock").write_bytes(b"{}")
        assert not lease.renew()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "s3://bucket/run",
            "give a folder of this machine, or of a bucket of Google Cloud Storage; Orbax writes to no",
        ),
        ("gs:/bucket/run", "give a folder of this machine, or of a bucket of Google Cloud Storage; gs://BUCKET/FOLDER"),
        ("gs://", "give gs://BUCKET/FOLDER"),
        ("gs://bucket/a#1", "in a bucket, names cannot have"),
        ("gs://bucket/a?", "in a bucket, names cannot have"),
        ("gs://bucket/*/run", "in a bucket, names cannot have"),
        ("gs://bucket/[a]", "in a bucket, names cannot have"),
        ("gs://bucket/../run", "in a bucket, names cannot have"),
        (f"gs://bucket/{'long/' * 200}", "this is longer than 800 bytes"),
    ],
)
@pytest.mark.parametrize("flag", ["--workdir", "--config.teacher.checkpoint"])
def test_what_cannot_be_in_a_bucket(path, message, flag, distill, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert distill(tmp_path / "run", f"{flag}={path}") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: bad {flag}={path}: {message}")
    assert not list(tmp_path.iterdir())


def test_a_bucket_that_does_not_exist(service, distill, capsys):
    assert distill("gs://no-such-bucket/run") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: cannot write to --workdir=gs://no-such-bucket/run: NOT_FOUND")


def test_a_bucket_that_may_not_be_written(bucket, distill, capsys):
    assert distill(bucket / "forbidden") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot write to --workdir={bucket}/forbidden: PERMISSION_DENIED")


def test_without_gcsfs(distill, monkeypatch, capsys):
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    assert distill("gs://bucket/run") == 1
    message = "error: bad --workdir=gs://bucket/run: files in buckets need the package gcsfs: pip install gcsfs\n"
    assert capsys.readouterr().err == message


class _Batches:
    """Where an iterator over data is."""

    def get_state(self):
        return {}

    def set_state(self, state):
        pass


def test_a_dataset_is_not_prepared_in_a_bucket(bucket, distill, tmp_path, capsys):
    assert distill(tmp_path / "run", f"--config.dataset.data_dir={bucket}") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"error: cannot prepare dataset 'sklearn_digits' in {bucket}/sklearn_digits/1.0.0; prepare it in"
    )
    assert not (tmp_path / "run").exists()
    assert not bucket.exists()


def test_a_teacher_is_imported_into_a_bucket(bucket, tmp_path, capsys):
    network = models.split(nnx.eval_shape(lambda: models.build("resnet8", 3, rngs=nnx.Rngs(0))))[1:]
    [rules] = import_teacher._NAMINGS["resnet8"]
    tensors = {
        import_teacher._torch_name(path, rules): np.ones(
            [leaf.shape[axis] for axis in import_teacher._TO_TORCH[leaf.ndim]]
        )
        for path, leaf in jax.tree.leaves_with_path(tuple(network))
    }
    safetensors.numpy.save_file(tensors, tmp_path / "resnet8")
    flags = ["--model=resnet8", "--num_classes=3", f"--from={tmp_path}/resnet8", f"--to={bucket}/teacher"]
    assert import_teacher.main(flags) == 0
    assert capsys.readouterr().out.startswith(f"{bucket}/teacher: resnet8 with 3 classes, ")
    assert checkpoint.has_network(bucket / "teacher")
    assert import_teacher.main(flags) == 1
    assert capsys.readouterr().err == f"error: --to={bucket}/teacher exists already; choose another folder\n"
    assert import_teacher.main([*flags[:2], f"--from={bucket}/file", f"--to={bucket}/another"]) == 1
    assert capsys.readouterr().err == f"error: --from={bucket}/file is in a bucket; copy it to this machine first\n"
