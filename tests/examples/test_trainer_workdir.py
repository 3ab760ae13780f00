"""Working directories and teachers at odd places: links, names that are too long, folders that cannot be searched."""

import os
import shutil
import threading

import pytest
from etils import epath

from examples.trainer import checkpoint, lock, paths, records, workdir
from examples.trainer.errors import UserError

LONG = "x" * 300


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A folder with a file, a loop of links and a link to nowhere, as the working and the home folder."""
    folder = tmp_path / "places"
    folder.mkdir()
    (folder / "file").write_text("kept")
    (folder / "loop").symlink_to("loop")
    (folder / "nowhere").symlink_to("missing/folder")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    return folder


NOT_A_FOLDER = {
    LONG: "",
    f"new/{LONG}/run": "",
    f"{LONG[:200]}/" * 30: "",
    "file": "",
    "file/run": "",
    "loop": "",
    "loop/run": "",
    "nowhere": "",
    "~/file/run": "",
    "~nobody-of-this-name/run": "there is no such user; a folder of that name is ./~nobody-of-this-name/run",
    "\udcff": "this cannot be the name of a folder",
    "a\0b": "this cannot be the name of a folder",
}


@pytest.mark.parametrize("path", NOT_A_FOLDER)
def test_a_workdir_that_cannot_be(path, places, distill, capsys):
    assert distill(path) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "--workdir=" in line
    assert NOT_A_FOLDER[path] in line
    there = {file.name for file in places.iterdir()} - {".cache", ".config"}  # of libraries
    assert there == {"file", "loop", "nowhere"}
    assert (places / "file").read_text() == "kept"


@pytest.mark.parametrize("path", NOT_A_FOLDER)
def test_a_teacher_that_cannot_be(path, places, distill, tmp_path, capsys):
    assert distill(tmp_path / "run", f"--config.teacher.checkpoint={path}") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "--config.teacher.checkpoint=" in line or "cannot read" in line
    assert NOT_A_FOLDER[path] in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("refused", ["iterdir", "exists"])
def test_a_folder_that_may_not_be_searched(refused, tmp_path, monkeypatch):
    """Root may search every folder, so that a refusal is played here."""

    def refuse(path, *args):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "teacher" / "checkpoints" / "0").mkdir(parents=True)
    monkeypatch.setattr(epath.gpath.PosixGPath, refused, refuse)
    for question in (checkpoint.saved_steps, checkpoint.has_network, checkpoint.load_variables, workdir.recorded):
        with pytest.raises(UserError, match=rf"^cannot read {tmp_path}/teacher.* \(Permission denied\)$"):
            question(epath.Path(tmp_path / "teacher"))


def test_the_home_folder(places):
    assert paths.resolve("~/a") == places / "a"
    assert paths.resolve("a") == paths.resolve("./b/../a") == places / "a"
    assert paths.resolve("a~") == places / "a~"


@pytest.mark.parametrize("name", ["config.json", "config.tmp", "losses.png", "losses.tmp", "dot/metrics.jsonl"])
def test_what_a_link_points_to_is_left_alone(name, finished, distill, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    target, link = tmp_path / "target", run / name
    target.write_bytes(link.read_bytes() if link.exists() else b"of another program")
    content = target.read_bytes()
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    (run / "dot" / "result.json").unlink()  # so that the log is written once more
    assert distill(run) == 0
    assert target.read_bytes() == content


def test_a_lock_that_is_a_link(places, distill, capsys):
    (places / "run").mkdir()
    (places / "run" / ".lock").symlink_to(places / "file")
    assert distill(places / "run") == 1
    message = f"error: {places}/run/.lock is a symbolic link, which this program did not make; remove it\n"
    assert capsys.readouterr().err == message
    assert (places / "file").read_text() == "kept"


def test_a_lock_that_is_no_file(tmp_path):
    (tmp_path / ".lock").mkdir()
    with (
        pytest.raises(UserError, match=f"cannot write to --workdir={tmp_path}: Is a directory"),
        workdir.claim(epath.Path(tmp_path)),
    ):
        pass


def test_a_lock_that_was_removed_while_it_was_opened(tmp_path, monkeypatch):
    """The last holder removes the folder that it made; then what was opened before is no lock any more."""
    path, flock = tmp_path / ".lock", lock.fcntl.flock

    def remove_then_lock(file, operation):
        monkeypatch.undo()
        path.unlink()
        flock(file, operation)

    monkeypatch.setattr(lock.fcntl, "flock", remove_then_lock)
    with lock.hold(path):
        assert path.exists()
        with pytest.raises(lock.Held), lock.hold(path):
            pass


def test_one_of_many_at_once(tmp_path):
    """Threads open the lock each for itself, as processes do."""
    begin, end, holders = threading.Barrier(8), threading.Barrier(8), []

    def run():
        begin.wait()
        try:
            with workdir.claim(epath.Path(tmp_path / "run")):
                holders.append(threading.get_ident())
                end.wait()
        except UserError:
            end.wait()

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(holders) == 1


def test_a_claim_leaves_nothing_without_a_record(tmp_path):
    with workdir.claim(epath.Path(tmp_path / "a" / "b")):
        assert os.listdir(tmp_path / "a" / "b") == [".lock"]
    assert not list(tmp_path.iterdir())
    with workdir.claim(epath.Path(tmp_path / "a" / "b")):
        workdir.record(epath.Path(tmp_path / "a" / "b"), {})
    assert sorted(os.listdir(tmp_path / "a" / "b")) == [".lock", "config.json"]


def test_a_folder_that_is_removed_while_it_is_claimed(tmp_path):
    path = epath.Path(tmp_path / "run")
    with workdir.claim(path):
        path.rmtree()


def test_a_run_that_is_refused_removes_nothing(tmp_path, monkeypatch):
    """It may have asked what is there before the other run made its folder."""
    path = epath.Path(tmp_path / "run")
    with workdir.claim(path):
        monkeypatch.setattr(workdir, "_missing", lambda workdir: [workdir])
        with pytest.raises(UserError, match="another run is using"), workdir.claim(path):
            pass
        assert (path / ".lock").exists()


def test_a_log_is_written_as_a_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for epoch in (1, 2):
        records.append_line(path, {"epoch": epoch})
    assert records.read_lines(path, 2) == [{"epoch": 1}, {"epoch": 2}]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
