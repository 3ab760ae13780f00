"""Which config and which teacher a working directory belongs to.

Fields that do not change what a job computes may differ from run to run: which methods to train, what to log and to
save, on which devices, and how this machine comes by the images. So may fields that nothing depends on yet: a run that
failed before it saved anything does not hold the folder.
"""

import json

from etils import epath

from examples.distill import methods, objectives
from examples.distill.configs import default
from examples.distill.settings import Settings
from examples.trainer import checkpoint, loop, records, workdir
from examples.trainer.errors import UserError
from examples.trainer.settings import fields

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
    "report_note",
    "teacher.checkpoint",  # but its content does, see `check_teacher`
    "teacher.train",
    "dataset.data_dir",
    "dataset.prepare",
    "dataset.in_memory",
    "dataset.workers",
)
# The teacher does not depend on these.
_STUDENT_SECTIONS = ("epochs", "student", "distillation", "dkd", "deepkd", "crd", "optimizer", "sampling")
_CHECKSUM = "teacher.checksum"  # in the record: of its variables, by which a teacher is known wherever it lies


def check(directory: epath.Path, settings: Settings) -> records.Record:
    """Returns the record of the folder, empty if it has none; raises if what is saved there is not of this config."""
    there = workdir.recorded(directory, others=["teacher"])  # An imported teacher may come first.
    if there is None:
        return {}
    here, saved = _identity(settings), saved_jobs(directory)
    recorded = _plain(fields(default())) | there  # A field that came later has had its default's effect all along.
    changed = [
        field
        for field in here
        if recorded.get(field) != here[field] and any(_depends(job, field, saved) for job in saved)
    ]
    if changed == ["epochs"] and isinstance(recorded["epochs"], int):
        _check_can_go_on(directory, recorded["epochs"], settings, saved)
    elif changed:
        differences = [f"{field} is {recorded.get(field)!r} there and {here[field]!r} here" for field in changed]
        raise UserError(
            f"--workdir={directory} belongs to another config: {', '.join(differences)}; choose another --workdir, or"
            " delete that folder"
        )
    return there


def _check_can_go_on(directory: epath.Path, before: int, settings: Settings, saved: list[str]) -> None:
    """Raises if what was to be trained for so many epochs cannot be trained for as many as the config says."""
    epochs = settings.config.epochs
    config, trained = settings.config, {_objective(job) for job in saved}
    reason = methods.why_not_longer(config.optimizer) or next(
        filter(None, (objectives.why_not_longer(objective, config) for objective in sorted(trained))), None
    )
    if epochs < before and not all(
        0 < loop.finished_epochs(directory / job) <= epochs for job in saved if _depends(job, "epochs", saved)
    ):
        reason = "a longer run cannot be made a shorter one; choose another --workdir"
    if reason:
        raise UserError(f"--workdir={directory} is of a run of {before} epochs and cannot go on to {epochs}: {reason}")


def check_teacher(directory: epath.Path, there: records.Record, path: epath.Path, checksum: int) -> None:
    """Raises if what is saved in the folder depends on a teacher of another content.

    Where nothing does yet, what is known of the other teacher is removed.
    """
    if _CHECKSUM in there:
        changed = there[_CHECKSUM] != checksum
    else:  # Once, folders knew their teacher by its path.
        changed = there.get("teacher.checkpoint") not in (None, "", str(path))
    if not changed:
        return
    saved = saved_jobs(directory)
    students = [job for job in saved if job != "teacher" and _depends(job, _CHECKSUM, saved)]
    if students:
        raise UserError(
            f"the teacher in {path} is not the one that {', '.join(students)} in --workdir={directory} had; restore that"
            " one, or choose another --workdir"
        )
    if path != directory / "teacher" or checkpoint.is_imported(path):
        (directory / "teacher" / "result.json").unlink(missing_ok=True)


def record(directory: epath.Path, settings: Settings, checksum: int | None) -> None:
    """Writes down which config the folder belongs to, and which teacher if that is known."""
    workdir.record(directory, _identity(settings) | ({} if checksum is None else {_CHECKSUM: checksum}))


def saved_jobs(directory: epath.Path) -> list[str]:
    """The jobs of which something is saved."""
    return [job.name for job in directory.iterdir() if loop.is_finished(job) or checkpoint.saved_steps(job)]


def _identity(settings: Settings) -> records.Record:
    return _plain({field: value for field, value in settings.fields.items() if field not in _FREE_FIELDS})


def _plain(values: records.Record) -> records.Record:
    return json.loads(json.dumps(values))  # Tuples become lists, as they do in the file.


def _depends(job: str, field: str, saved: list[str]) -> bool:
    """Whether what the job computes depends on the field."""
    section = field.partition(".")[0]
    if job == "teacher":
        return section not in _STUDENT_SECTIONS
    if section in objectives.OBJECTIVES:  # the weights and momenta of its losses
        return _objective(job) in (section, "")
    if job == "ce" and "teacher" not in saved:  # trained without one
        return section not in ("teacher", "distillation", "sampling")
    return True


def _objective(job: str) -> str:
    """What a student was trained on; nothing if its method is not known here."""
    return methods.TRAITS[job].objective if job in methods.TRAITS else ""
