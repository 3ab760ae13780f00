"""The working directory of a run: `config.json` says which config it belongs to, `.lock` that a run is using it."""

import contextlib
import fcntl
import os
from collections.abc import Collection, Iterator
from typing import Any

import jax
from etils import epath

from examples.trainer import checkpoint, records
from examples.trainer.errors import UserError

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
    existing = next(path for path in (workdir, *workdir.parents) if os.path.exists(path))
    if not existing.is_dir() or not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        raise UserError(f"cannot write to --workdir={workdir}: {existing} is not a folder that may be written")
    made = [path for path in (workdir, *workdir.parents) if not os.path.exists(path)]
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((workdir / _LOCK).open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is using --workdir={workdir}") from None
        except OSError as error:
            raise UserError(f"cannot write to --workdir={workdir}: {error.strerror}") from error
        try:
            yield
        finally:
            if made and not (workdir / _CONFIG).exists():
                (workdir / _LOCK).unlink()
                for path in made:
                    with contextlib.suppress(OSError):  # It holds something by now.
                        path.rmdir()


def recorded(workdir: epath.Path, others: Collection[str] = ()) -> records.Record | None:
    """Returns what `record` wrote; None for a folder that holds nothing but the `others`, if any."""
    if (workdir / _CONFIG).exists():
        return records.read_json(workdir / _CONFIG)
    if workdir.exists() and any(path.name not in (_LOCK, *others) for path in workdir.iterdir()):
        raise UserError(f"--workdir={workdir} is not empty, but no run of this program; choose another folder")
    return None


def record(workdir: epath.Path, identity: dict[str, Any]) -> None:
    """Writes down which config the folder belongs to."""
    if jax.process_index() == 0:
        records.write_json(workdir / _CONFIG, identity)
