"""The working directory of a run: `config.json` says which config it belongs to, `.lock` that a run is using it."""

import contextlib
import os
from collections.abc import Collection, Iterator
from typing import Any

import jax
from etils import epath

from examples.trainer import checkpoint, lock, paths, records
from examples.trainer.errors import UserError, one_line

_CONFIG, _LOCK = "config.json", ".lock"


@contextlib.contextmanager
def claim(workdir: epath.Path) -> Iterator[None]:
    """Keeps other runs out of the folder for the `with` block, or until the process ends, however it ends.

    Makes the folder; without a `record`, what was made is removed in the end. The hosts of one run share the folder;
    the first of them holds the lock.
    """
    checkpoint.check_path(workdir)
    if jax.process_index() != 0:
        yield
        return
    made: list[epath.Path] = []
    with contextlib.ExitStack() as stack:
        try:
            if not paths.in_bucket(workdir):  # where folders are but parts of names
                made = _missing(workdir)
                workdir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock.hold(workdir / _LOCK))
        except lock.Held as holder:
            which = f" ({holder})" if str(holder) else ""
            raise UserError(f"another run is using --workdir={workdir}{which}") from None
        except UserError:
            raise
        except Exception as error:  # For buckets there are more kinds than OSErrors.
            _remove_empty(made)
            reason = getattr(error, "strerror", None) or one_line(error, 300)
            raise UserError(f"cannot write to --workdir={workdir}: {reason}") from error
        try:
            yield
        finally:  # While no other run can have the lock.
            if made and not (workdir / _CONFIG).exists():
                (workdir / _LOCK).unlink(missing_ok=True)
                _remove_empty(made)


def _missing(workdir: epath.Path) -> list[epath.Path]:
    """Returns the folders that are to be made, the innermost first; raises if they cannot be."""
    folders = (workdir, *workdir.parents)
    count = next(i for i, folder in enumerate(folders) if os.path.lexists(folder))
    existing = folders[count]
    if not existing.is_dir() or not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        raise UserError(f"cannot write to --workdir={workdir}: {existing} is not a folder that may be written")
    return list(folders[:count])


def _remove_empty(folders: list[epath.Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # It holds something, or was not made.
            os.rmdir(folder)


def recorded(workdir: epath.Path, others: Collection[str] = ()) -> records.Record | None:
    """Returns what `record` wrote; None for a folder that holds nothing but the `others`, if any."""
    with records.reading(workdir):
        is_recorded = (workdir / _CONFIG).exists()
        found = [path.name for path in workdir.iterdir()] if workdir.exists() else []
    if is_recorded:
        return records.read_json(workdir / _CONFIG)
    if any(name not in (_LOCK, *others) for name in found):
        raise UserError(f"--workdir={workdir} is not empty, but no run of this program; choose another folder")
    return None


def record(workdir: epath.Path, identity: dict[str, Any]) -> None:
    """Writes down which config the folder belongs to."""
    if jax.process_index() == 0:
        records.write_json(workdir / _CONFIG, identity)
