"""Which config and which teacher a working directory belongs to.

Fields that do not change what a job computes may differ from run to run: which methods to train, what to log and to
save, on which devices, and how this machine comes by the images. So may fields that nothing depends on yet: a run that
failed before it saved anything does not hold the folder.
"""

from collections.abc import Sequence

from examples.distill import methods, objectives
from examples.distill.configs import default
from examples.distill.settings import Settings
from examples.trainer.identity import FREE_FIELDS, Identity
from examples.trainer.settings import fields

_FREE_FIELDS = (
    *FREE_FIELDS,
    "method",
    "shard_params",
    "report_note",
    "teacher.checkpoint",  # but its content does, see `check_teacher`
    "teacher.train",
    "dataset.data_dir",
    "dataset.prepare",
    "dataset.in_memory",
    "dataset.workers",
)
# The teacher does not depend on these.
_STUDENT_SECTIONS = (
    "epochs",
    "diagnostics",
    "student",
    "distillation",
    "dkd",
    "deepkd",
    "crd",
    "optimizer",
    "sampling",
)


def of(settings: Settings) -> Identity:
    """What a working directory of these settings belongs to."""
    config = settings.config

    def why_not_longer(saved: Sequence[str]) -> str | None:
        trained = sorted({_objective(job) for job in saved})
        reasons = (objectives.why_not_longer(objective, config) for objective in trained)
        return methods.why_not_longer(config.optimizer) or next(filter(None, reasons), None)

    return Identity(
        {field: value for field, value in settings.fields.items() if field not in _FREE_FIELDS},
        fields(default()),
        _depends,
        why_not_longer,
    )


def _depends(job: str, field: str, saved: Sequence[str]) -> bool:
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
