"""A config whose values were judged: whatever can be, without texts and teacher and before anything is read or written."""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

import dot_optax
from examples.distill import methods
from examples.distill.settings import DISTILLATION
from examples.language_model import losses
from examples.language_model.configs import default
from examples.trainer import settings
from examples.trainer.errors import UserError
from examples.trainer.sampling import Sampling
from examples.trainer.settings import COUNT, POSITIVE, TEXT, WHOLE, YES_OR_NO, Rule, each, number, one_of


class Settings(NamedTuple):
    """A config that makes sense."""

    config: ConfigDict
    fields: dict[str, Any]  # the same by their names on the command line, such as `optimizer.delta`
    methods: list[str]  # to be trained
    betas: dot_optax.PerLoss  # DOT's momenta


def known_methods() -> list[str]:
    """The methods that need no more than the gradients of the task's loss and of one of distillation."""
    return [name for name, traits in methods.TRAITS.items() if traits.objective == "kd"]


def validated(config: ConfigDict) -> Settings:
    """Returns the settings of a config; raises if a value makes no sense, with the flag that sets it."""
    fields = settings.fields(config)
    settings.check_names(fields, settings.fields(default()), free=_MODELS)
    distillation, student, teacher = config.distillation, config.student, config.teacher
    unused = ["teacher.epochs", "teacher.optimizer"] if teacher.path or teacher.model is None else []
    unused += [f"{section}.model" for section in ("teacher", "student") if config[section].model is None]
    settings.check({name: value for name, value in fields.items() if not name.startswith(tuple(unused))}, _RULES)
    if not distillation.task_weight and not distillation.kd_weight:
        raise UserError(
            "bad --config.distillation.task_weight and --config.distillation.kd_weight: both are 0, so that there is no"
            " loss; give at least one of them above 0"
        )
    for section, needed, instead in (
        ("teacher", not teacher.path, "--config.teacher.path, that of a Hugging Face folder or of a GGUF file,"),
        ("student", not student.every_nth_layer, "--config.student.every_nth_layer"),
    ):
        model = config[section].model
        if needed and model is None:
            raise UserError(f"the config has no {section}: give {instead} or set `{section}.model` in its file")
        if model is not None:
            _check_model(section, model)
    wanted = methods.parse(config.method, known_methods())
    methods.check_optimizers(config, wanted, trains_teacher=not teacher.path)
    # Of fields that have the same effect one form, since they tell what a working directory belongs to.
    fields |= {f"sampling.{field}": value for field, value in Sampling.from_config(config.sampling)._asdict().items()}
    return Settings(config, fields, wanted, methods.betas(config.optimizer))


def _check_model(section: str, model: ConfigDict) -> None:
    lacking = sorted({*_MODEL_RULES} - {*model})
    if lacking:
        raise UserError(f"the config lacks the field '{section}.model.{lacking[0]}'; begin with configs.model()")
    for field in model:
        if field not in _MODEL_RULES:
            raise UserError(f"the config has no field '{section}.model.{field}'; known: {', '.join(_MODEL_RULES)}")
    if model.heads % model.kv_heads:
        raise UserError(
            f"bad --config.{section}.model.kv_heads={model.kv_heads}: it must divide the {model.heads} heads"
        )


_MODELS = ("teacher.model", "student.model")
_MODEL_RULES = {
    "width": COUNT,
    "layers": COUNT,
    "heads": COUNT,
    "kv_heads": COUNT,
    "head_dim": Rule(lambda value: COUNT.holds(value) and value % 2 == 0, "an even number of at least 2"),
    "feed_forward": COUNT,
    "tied_embeddings": YES_OR_NO,
    "norm_eps": POSITIVE,
    "rope_base": POSITIVE,
}


def _is_prompt(value: Any) -> bool:
    try:
        return bool(value) and TEXT.holds(value) and bool(value.encode())
    except UnicodeEncodeError:  # bytes of a command line that are no UTF-8
        return False


_PERCENT = Rule(number(lambda value: 0 < value < 100), "a number above 0 and below 100")
_PART = Rule(number(lambda value: 0 < value < 1), "a number above 0 and below 1")
_RULES = (
    settings.TRAINING
    | DISTILLATION
    | _MODEL_RULES
    | {
        "sequence_length": COUNT,
        "remat": YES_OR_NO,
        "model_devices": COUNT,
        "text.files": TEXT,
        "text.tokenizer": TEXT,
        "text.folder": TEXT,
        "validation_percent": _PERCENT,
        "test_percent": _PERCENT,
        "train_tokens": WHOLE,
        "eval_tokens": WHOLE,
        "teacher.path": TEXT,
        "teacher.package": TEXT,
        "every_nth_layer": WHOLE,
        "distillation.loss": one_of(*losses.NAMES),
        "distillation.beta": _PART,
        "distillation.alpha": _PART,
        "distillation.k": WHOLE,
        "distillation.cache": YES_OR_NO,
        "prompts": Rule(each(_is_prompt), "texts in UTF-8, separated by commas"),
        "prompt_tokens": COUNT,
    }
)
