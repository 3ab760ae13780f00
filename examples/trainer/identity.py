"""Which config and which teacher a working directory belongs to, and so what may go on in it."""

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

from etils import epath

from examples.trainer import checkpoint, loop, records, workdir
from examples.trainer.errors import UserError

# Fields of training that do not change what a job computes: on which devices, what to log and to save.
FREE_FIELDS = (
    "parallel",
    "devices",
    "eval_batch_size",
    "gradient_metrics",
    "diagnostics_by",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "max_consecutive_skips",
)
_CHECKSUM = "teacher.checksum"  # in the record: of its variables, by which a teacher is known wherever it lies


class Identity(NamedTuple):
    """What the jobs of a run depend on.

    Fields that nothing depends on yet may still change: a run that failed before it saved anything holds no folder.
    """

    fields: records.Record  # of a config, without those that change nothing that a job computes
    defaults: records.Record  # the values that fields have had all along, before there were such fields
    depends: Callable[[str, str, Sequence[str]], bool]  # (job, field, all jobs saved): whether the job depends on it
    # (jobs saved) -> why these cannot be trained for more epochs; None if they can
    why_not_longer: Callable[[Sequence[str]], str | None]


def plain(values: records.Record) -> records.Record:
    """The values as a file has them: tuples become lists."""
    return json.loads(json.dumps(values))


def check(directory: epath.Path, identity: Identity, others: Sequence[str] = ()) -> records.Record:
    """Returns the record of the folder, empty if it has none; raises if what is saved there is not of this config.

    The `others` are names that a folder may hold without a record.
    """
    there = workdir.recorded(directory, others=["teacher", *others])  # An imported teacher may come first.
    if there is None:
        return {}
    here, saved = plain(identity.fields), saved_jobs(directory)
    recorded = plain(identity.defaults) | there
    changed = [
        field
        for field in here
        if recorded.get(field) != here[field] and any(identity.depends(job, field, saved) for job in saved)
    ]
    if changed == ["epochs"] and isinstance(recorded["epochs"], int):
        _check_can_go_on(directory, recorded["epochs"], identity, saved)
    elif changed:
        differences = [f"{field} is {recorded.get(field)!r} there and {here[field]!r} here" for field in changed]
        raise UserError(
            f"--workdir={directory} belongs to another config: {', '.join(differences)}; choose another --workdir, or"
            " delete that folder"
        )
    return there


def _check_can_go_on(directory: epath.Path, before: int, identity: Identity, saved: Sequence[str]) -> None:
    """Raises if what was to be trained for so many epochs cannot be trained for as many as the config says."""
    epochs = identity.fields["epochs"]
    reason = identity.why_not_longer(saved)
    if epochs < before and not all(
        0 < loop.finished_epochs(directory / job) <= epochs for job in saved if identity.depends(job, "epochs", saved)
    ):
        reason = "a longer run cannot be made a shorter one; choose another --workdir"
    if reason:
        raise UserError(f"--workdir={directory} is of a run of {before} epochs and cannot go on to {epochs}: {reason}")


def check_teacher(
    directory: epath.Path, identity: Identity, there: records.Record, path: epath.Path, checksum: int
) -> None:
    """Raises if what is saved in the folder depends on a teacher of another content.

    Where nothing does yet, what is known of the other teacher is removed.
    """
    if _CHECKSUM in there:
        changed = there[_CHECKSUM] != checksum
    else:  # Once, folders knew their teacher by its path.
        changed = there.get("teacher.checkpoint") not in (None, "", str(path))
    if not changed:
        return
    students = _students(directory, identity)
    if students:
        raise UserError(
            f"the teacher in {path} is not the one that {students} in --workdir={directory} had; restore that one, or choose"
            " another --workdir"
        )
    (directory / "teacher" / "result.json").unlink(missing_ok=True)


def check_new_teacher(directory: epath.Path, identity: Identity, there: records.Record, flag: str) -> None:
    """Raises if a teacher is to be trained, and what is saved in the folder depends on another: that of the `flag`."""
    students = _students(directory, identity)
    if _CHECKSUM in there and students:
        raise UserError(
            f"{students} in --workdir={directory} had a teacher that is not in {directory / 'teacher'}: give {flag} as"
            " before, or choose another --workdir"
        )


def _students(directory: epath.Path, identity: Identity) -> str:
    """What is saved in the folder and depends on a teacher, in words; nothing if that is nothing."""
    saved = saved_jobs(directory)
    return ", ".join(job for job in saved if job != "teacher" and identity.depends(job, _CHECKSUM, saved))


def recorded_teacher(there: records.Record) -> int | None:
    """The checksum of the teacher that the record of a folder has, if any."""
    return there.get(_CHECKSUM)


def record(directory: epath.Path, identity: Identity, checksum: int | None) -> None:
    """Writes down which config the folder belongs to, and which teacher if that is known."""
    known = {} if checksum is None else {_CHECKSUM: checksum}
    workdir.record(directory, plain(identity.fields) | known)


def saved_jobs(directory: epath.Path) -> list[str]:
    """The jobs of which something is saved."""
    return [job.name for job in directory.iterdir() if loop.is_finished(job) or checkpoint.saved_steps(job)]
