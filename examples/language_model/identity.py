"""Which config, text and teacher a working directory belongs to."""

from collections.abc import Mapping, Sequence

from examples.distill import methods
from examples.language_model.configs import default
from examples.language_model.model import Architecture
from examples.language_model.settings import Settings
from examples.trainer.identity import FREE_FIELDS, Identity
from examples.trainer.settings import fields

# They do not change what a job computes.
_FREE_FIELDS = (
    *FREE_FIELDS,
    "method",
    "model_devices",
    "remat",
    "report_note",
    "prompts",
    "prompt_tokens",
    "teacher.path",  # but its content does, see `identity.check_teacher`
    "teacher.package",
    "text.files",  # but the tokens do
    "text.tokenizer",
    "text.folder",
)
# The teacher does not depend on these.
_STUDENT_SECTIONS = ("epochs", "diagnostics", "student", "distillation", "optimizer", "sampling")


def of(settings: Settings, text: Mapping[str, str], teacher: Architecture) -> Identity:
    """What a working directory of these settings belongs to, with a text of this identity and such a teacher."""
    optimizer = settings.config.optimizer
    kept = {field: value for field, value in settings.fields.items() if field not in _FREE_FIELDS}
    return Identity(
        kept | dict(text) | {"teacher.architecture": teacher},
        fields(default()),
        _depends,
        lambda saved: methods.why_not_longer(optimizer),
    )


def _depends(job: str, field: str, saved: Sequence[str]) -> bool:
    """Whether what the job computes depends on the field."""
    del saved
    section = field.partition(".")[0]
    return job != "teacher" or section not in _STUDENT_SECTIONS
