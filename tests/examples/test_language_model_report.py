"""What the report of language models says."""

import pytest

from examples.language_model import report, settings
from examples.language_model.configs import bytes as of_bytes
from examples.trainer.errors import UserError


def _result(bits, **further):
    test = {
        "task_loss": 1.5,
        "kd_loss": 0.25,
        "bits_per_byte": bits,
        "bits_per_byte_error": 0.0123,
        "top1": 0.5,
        "count": 99,
    }
    return {"test": test, "seconds": 50.0} | further


def _teacher():
    result = _result(2.0, seconds=None, continuations={"def ": "f(x):\n"})
    del result["test"]["kd_loss"]
    return {"teacher": result}


def _students():
    costs = {"kd": 1.0, "dot": 1.5}
    return {
        name: _result(2.5, cost={"teacher_forwards": 0.0, "relative_flops": cost}, continuations={"def ": "x" * 100})
        for name, cost in costs.items()
    }


_CURVES = {
    name: [{"task_loss": 3.0, "kd_loss": 2.0, "step": 10}, {"task_loss": 1.0, "kd_loss": None, "step": 20}]
    for name in ("kd", "dot")
}


def test_the_table_has_the_teacher_and_each_method():
    table = report.table(_teacher(), _students(), _CURVES, tokens=1000, plus_minus="+-")
    rows = {line[:20].strip(): line[20:].split() for line in table.splitlines()}
    assert rows[""] == ["teacher", "KD", "DOT"]
    assert rows["test bits per byte"] == ["2.0000", "+-", "0.0123", "2.5000", "+-", "0.0123", "2.5000", "+-", "0.0123"]
    assert rows["test KD loss"] == ["-", "0.2500", "0.2500"]
    assert rows["train task loss"] == ["-", "1.0000", "1.0000"]
    assert rows["train KD loss"] == ["-", "-", "-"]
    assert rows["gradient FLOPs / KD"] == ["-", "1.00", "1.50"]
    assert rows["tokens a second"] == ["-", "20", "20"]
    assert rows["seconds"] == ["-", "50", "50"]


def test_texts_are_on_one_line_and_not_too_long():
    lines = report.texts(("def ", "class "), _teacher() | _students())
    assert lines[:3] == [
        "\n'def ' is continued by",
        r"  teacher            'f(x):\n'",
        f"  KD                 '{'x' * 56}'",
    ]
    assert lines[-3:] == ["  teacher            -", "  KD                 -", "  DOT                -"]


def test_notes_say_what_the_cache_leaves_out():
    config = of_bytes.get_config()
    notes = " ".join(report.notes(settings.validated(config), _students()))
    assert "The teacher's predictions of its 32 likeliest tokens at each position came from disk" in notes
    assert "a KD gradient by 4, where AdamW multiplies both by 1" in notes
    config.distillation.k = 0
    assert "predictions of all tokens" in " ".join(report.notes(settings.validated(config), {}))
    config.distillation.cache = False
    assert "disk" not in " ".join(report.notes(settings.validated(config), {}))


def test_a_prompt_is_text_that_can_be_encoded():
    config = of_bytes.get_config()
    config.prompts = ("caf\udce9",)
    with pytest.raises(
        UserError, match=r"^bad --config\.prompts=\('caf.udce9',\): give texts in UTF-8, separated by commas$"
    ):
        settings.validated(config)
