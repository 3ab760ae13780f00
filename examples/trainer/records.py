"""Small JSON files: whole ones, replaced at one stroke, and logs with one record per line."""

import contextlib
import json
import os
from collections.abc import Collection, Iterator
from typing import Any

from etils import epath

from examples.trainer import paths
from examples.trainer.errors import UserError, one_line

Record = dict[str, Any]


@contextlib.contextmanager
def writing(path: epath.Path) -> Iterator[None]:
    """Explains why a file cannot be written, as on a full disk."""
    try:
        yield
    except Exception as error:  # For buckets there are more kinds than OSErrors.
        raise UserError(
            f"cannot write {path} ({_reason(error)}); put this right, and the same command goes on from what is saved"
        ) from error


@contextlib.contextmanager
def reading(path: epath.Path) -> Iterator[None]:
    """Explains why it cannot be known what is in a folder, as when it may not be searched."""
    try:
        yield
    except Exception as error:
        raise UserError(f"cannot read {path} ({_reason(error)})") from error


def write_bytes(path: epath.Path, content: bytes) -> None:
    """Writes a file. An interruption leaves the old one or the new one, never half of one."""
    with writing(path):
        if paths.in_bucket(path):
            path.write_bytes(content)
            return
        unfinished = path.with_suffix(".tmp")
        unfinished.unlink(missing_ok=True)  # It may be a link, which "x" does not follow.
        try:
            with open(unfinished, "xb") as file:
                file.write(content)
            os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise


def write_json(path: epath.Path, record: Record) -> None:
    _write(path, json.dumps(record, indent=2) + "\n")


def read_json(path: epath.Path, keys: Collection[str] = ()) -> Record:
    """Reads a record, which must have numbers (or null) under the `keys`; `a.b` stands for a key within a key."""
    return _decode(_read(path), keys, path)


def append_line(path: epath.Path, record: Record) -> None:
    lines = _read(path) if path.exists() else ""
    _write(path, lines + _line(record))  # as a whole: in a bucket nothing can be appended


def read_lines(path: epath.Path, count: int, keys: Collection[str] = ()) -> list[Record]:
    """Reads the first `count` records of a log, which must be there and have numbers (or null) under the `keys`."""
    lines = _read(path).splitlines()
    if len(lines) < count:
        raise _damaged(path, f"it has {len(lines)} lines instead of {count}")
    return [_decode(line, keys, path) for line in lines[:count]]


def count_lines(path: epath.Path) -> int:
    """How many records a log has."""
    return len(_read(path).splitlines())


def keep_lines(path: epath.Path, count: int, keys: Collection[str] = ()) -> list[Record]:
    """Keeps the first `count` records of a log, and returns them; with `count=0` it begins a new one."""
    kept = read_lines(path, count, keys) if count else []
    _write(path, "".join(map(_line, kept)))
    return kept


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


def _write(path: epath.Path, text: str) -> None:
    write_bytes(path, text.encode())


def _read(path: epath.Path) -> str:
    try:
        return path.read_bytes().decode()
    except Exception as error:
        raise _damaged(path, _reason(error)) from error


def _decode(text: str, keys: Collection[str], path: epath.Path) -> Record:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(record, dict):
        raise _damaged(path, f"a JSON object was expected, not {text.strip():.40}")
    missing = [key for key in keys if not _has_number(record, key)]
    if missing:
        raise _damaged(path, f"it lacks {', '.join(missing)}")
    return record


def _has_number(record: Any, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(record, dict) or name not in record:
            return False
        record = record[name]
    return record is None or isinstance(record, (int, float))


def _damaged(path: epath.Path, what: str) -> UserError:
    return UserError(f"{path} is damaged ({what}); restore it, or choose another --workdir")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or one_line(error, 200)
