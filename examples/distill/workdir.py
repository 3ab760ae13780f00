"""The working directory of an experiment: one config, one teacher, one folder per finished or unfinished arm.

`config.json` says which config the folder belongs to, `.lock` that a run is using it. Fields that do not change what
an arm computes may differ from run to run: which arms to train, what to log and to save, on which devices, and how
this machine comes by the images. So may fields that nothing depends on yet: a run that failed before it saved anything
does not hold the folder.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from examples.distill import checkpoint, records, settings, train
from examples.distill.errors import UserError

_FREE_FIELDS = (
    "method",
    "parallel",
    "devices",
    "shard_params",
    "eval_batch_size",
    "gradient_metrics",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "max_consecutive_skips",
    "dataset.data_dir",
    "dataset.prepare",
    "dataset.in_memory",
    "dataset.workers",
    "teacher.train",
)
_STUDENT_SECTIONS = ("epochs", "student", "distillation", "optimizer")  # The teacher does not depend on these.
_LOCK = ".lock"


def check(workdir: Path, config: ConfigDict) -> None:
    """Raises if the folder cannot be written, or holds what is not of this config; changes nothing."""
    checkpoint.check_path(workdir)
    existing = next(path for path in (workdir, *workdir.parents) if os.path.exists(path))
    if not existing.is_dir() or not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        raise UserError(f"cannot write to --workdir={workdir}: {existing} is not a folder that may be written")
    if existing != workdir:
        return
    if (workdir / "config.json").exists():
        _check_config(workdir, config)
    elif any(path.name not in (_LOCK, "teacher") for path in workdir.iterdir()):  # an imported teacher may come first
        raise UserError(f"--workdir={workdir} is not empty, but no run of this program; choose another folder")


@contextlib.contextmanager
def claim(workdir: Path, config: ConfigDict) -> Iterator[None]:
    """Makes the folder and keeps other runs out of it for the `with` block, or until the process ends, however it ends.

    The hosts of one run share the folder; the first of them holds the lock.
    """
    if jax.process_index() != 0:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((workdir / _LOCK).open("w"))  # Stays: who deletes a lock lets two others in.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is using --workdir={workdir}") from None
        except OSError as error:
            raise UserError(f"cannot write to --workdir={workdir}: {error.strerror}") from error
        check(workdir, config)  # Another run may have come first.
        records.write_json(workdir / "config.json", _identity(config))
        yield


def _check_config(workdir: Path, config: ConfigDict) -> None:
    there, here = records.read_json(workdir / "config.json"), _identity(config)
    saved = [arm.name for arm in workdir.iterdir() if train.is_finished(arm) or checkpoint.saved_steps(arm)]
    differences = [
        f"{field} is {there.get(field)!r} there and {here.get(field)!r} here"
        for field in there | here
        if there.get(field) != here.get(field) and any(_depends(arm, field, saved) for arm in saved)
    ]
    if differences:
        raise UserError(
            f"--workdir={workdir} belongs to another config: {', '.join(differences)}; choose another --workdir, or"
            " delete that folder"
        )


def _depends(arm: str, field: str, saved: list[str]) -> bool:
    """Whether what the arm computes depends on the field."""
    section = field.partition(".")[0]
    if arm == "teacher":
        return section not in _STUDENT_SECTIONS
    if arm == "ce" and "teacher" not in saved:  # trained without one
        return section not in ("teacher", "distillation")
    return True


def _identity(config: ConfigDict) -> dict[str, Any]:
    identity = {field: value for field, value in settings.fields(config).items() if field not in _FREE_FIELDS}
    if config.teacher.checkpoint:
        identity["teacher.checkpoint"] = str(Path(config.teacher.checkpoint).absolute())
    return json.loads(json.dumps(identity))  # Tuples become lists, as they do in the file.
