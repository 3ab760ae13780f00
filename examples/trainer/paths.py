"""Paths that a user gives: folders of this machine, or of a bucket of Google Cloud Storage (gs://BUCKET/FOLDER)."""

import importlib.util
import os
import re

from etils import epath

from examples.trainer.errors import UserError

_BUCKET = "gs://"
_LONGEST_IN_A_BUCKET = 800  # bytes, of 1,024 that Cloud Storage takes; a file of a checkpoint has up to 200 of its own


def resolve(path: epath.PathLike, flag: str = "") -> epath.Path:
    """Returns a path as an absolute one, with the home folder in the place of `~`.

    Raises a `UserError`, which names the `flag` if there is one, where no file could ever be.
    """
    text = os.fspath(path)
    name = f"{flag}={text}" if flag else text
    try:
        if not text or "\0" in text:
            raise ValueError
        size = len(text.encode())
    except ValueError:  # A UnicodeEncodeError is one, too.
        raise UserError(f"bad {flag or 'path'}={text!r}: this cannot be the name of a folder") from None
    if text.startswith(_BUCKET):
        _check_bucket(text, size, name)
        return epath.Path(text)
    if re.match(r"[A-Za-z][\w+.-]*:/", text):
        hint = "gs://BUCKET/FOLDER is one" if text.startswith("gs:") else "Orbax writes to no other stores of objects"
        raise UserError(f"bad {name}: give a folder of this machine, or of a bucket of Google Cloud Storage; {hint}")
    local = os.path.expanduser(text)
    if local.startswith("~"):
        raise UserError(f"bad {name}: there is no such user; a folder of that name is ./{text}")
    return epath.Path(os.path.abspath(local))


def in_bucket(path: epath.PathLike) -> bool:
    return os.fspath(path).startswith(_BUCKET)


def move(source: epath.Path, target: epath.Path) -> None:
    """Moves a folder to where there is nothing."""
    if in_bucket(source):  # where folders are but parts of names
        _copy(source, target)
        source.rmtree()
    else:
        source.rename(target)


def _copy(source: epath.Path, target: epath.Path) -> None:
    for path in source.iterdir():
        if path.is_dir():
            _copy(path, target / path.name)
        else:
            path.copy(target / path.name)


def _check_bucket(text: str, size: int, name: str) -> None:
    bucket, *folders = text.removeprefix(_BUCKET).split("/")
    if not bucket:
        raise UserError(f"bad {name}: give gs://BUCKET/FOLDER")
    # One of epath and Orbax takes these for a pattern, a fragment, a query or another folder, where the other does not.
    if re.search(r"[\[\]*?#]", text) or ".." in folders:
        raise UserError(f"bad {name}: in a bucket, names cannot have [ ] * ? # or .. here; use other ones")
    if size > _LONGEST_IN_A_BUCKET:
        raise UserError(f"bad {name}: this is longer than {_LONGEST_IN_A_BUCKET} bytes; use shorter names")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"bad {name}: files in buckets need the package gcsfs: pip install gcsfs")
