"""What a finished experiment shows: a table, the texts that each model writes, and a picture of both losses."""

import sys
from typing import Any

from etils import epath

from examples.distill import methods
from examples.distill import report as drawing
from examples.language_model.settings import Settings
from examples.trainer import loop, records

_FIGURES = ("test.task_loss", "test.bits_per_byte", "test.bits_per_byte_error", "test.top1", "test.count")
_PANELS = (
    ("Task loss", "epoch", "cross-entropy, nats a token"),
    ("Distillation loss", "epoch", "{loss}, nats a token"),
    ("Loss plane", "task loss", "distillation loss"),
)
_SHOWN = 56  # characters of a text on a line


def write(settings: Settings, name: str, directory: epath.Path) -> None:
    """Draws `losses.png` in `directory`, and prints the table of the teacher and of every method that is finished."""
    config = settings.config
    trained = {method: loop.finished_epochs(directory / method) for method in methods.METHODS}
    finished = [method for method, epochs in trained.items() if epochs == config.epochs]
    results = {
        method: records.read_json(directory / method / "result.json", ("seconds", *_FIGURES)) for method in finished
    }
    curves = {
        method: records.read_lines(directory / method / "metrics.jsonl", config.epochs, ("task_loss", "kd_loss"))
        for method in finished
    }
    teacher = {}
    if loop.is_finished(directory / "teacher"):
        teacher = {"teacher": records.read_json(directory / "teacher" / "result.json", _FIGURES)}
    panels = [tuple(part.format(loss=config.distillation.loss) for part in panel) for panel in _PANELS]
    png = drawing.picture(
        curves, results, panels=panels, split="test", note="final student, on the test split: the table"
    )
    records.write_bytes(directory / "losses.png", png)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    plus_minus = drawing.encodable("±", encoding).replace("?", "+-")
    tokens = config.epochs * _tokens_per_epoch(config, curves)
    lines = [
        f"\n{name}, seed {config.seed}, {config.epochs} epochs\n",
        table(teacher, results, curves, tokens, plus_minus),
        "",
        *notes(settings, results, plus_minus),
        *texts(config.prompts, teacher | results),
        f"\nPicture: {directory / 'losses.png'}",
        f"Metrics: {directory}/METHOD/metrics.jsonl; students: {directory}/METHOD/checkpoints",
    ]
    print(drawing.encodable("\n".join(lines), encoding))


def _tokens_per_epoch(config: Any, curves: drawing.Curves) -> float:
    """How many tokens a student was trained on in an epoch."""
    steps = [lines[-1]["step"] / config.epochs for lines in curves.values()]
    return max(steps, default=0) * config.batch_size * config.sequence_length


def table(
    teacher: drawing.Results, results: drawing.Results, curves: drawing.Curves, tokens: float, plus_minus: str = "±"
) -> str:
    """One column for the teacher and for each method."""

    def last(method: str, key: str) -> dict[str, Any]:
        return {key: curves[method][-1][key]} if method in curves else {}

    def bits(test: dict[str, Any]) -> str:
        return f"{test['bits_per_byte']:.4f} {plus_minus} {test['bits_per_byte_error']:.4f}"

    def speed(method: str, result: dict[str, Any]) -> dict[str, Any]:
        return {"": tokens / result["seconds"]} if method in curves and result["seconds"] else {}

    number, columns = drawing.number, teacher | results
    rows = [
        ("", *(methods.STYLES[name].label if name in methods.STYLES else name for name in columns)),
        ("test bits per byte", *(bits(r["test"]) for r in columns.values())),
        ("test task loss", *(number(r["test"], "task_loss", ".4f") for r in columns.values())),
        ("test KD loss", *(number(r["test"], "kd_loss", ".4f") for r in columns.values())),
        ("test top-1", *(number(r["test"], "top1", ".4f") for r in columns.values())),
        ("train task loss", *(number(last(name, "task_loss"), "task_loss", ".4f") for name in columns)),
        ("train KD loss", *(number(last(name, "kd_loss"), "kd_loss", ".4f") for name in columns)),
        ("teacher forwards", *(number(r.get("cost", {}), "teacher_forwards", ".2f") for r in columns.values())),
        ("gradient FLOPs / KD", *(number(r.get("cost", {}), "relative_flops", ".2f") for r in columns.values())),
        ("tokens a second", *(number(speed(name, r), "", ".0f") for name, r in columns.items())),
        ("seconds", *(number(r, "seconds", ".0f") for r in columns.values())),
    ]
    return drawing.aligned(rows)


def notes(settings: Settings, results: drawing.Results, plus_minus: str = "±") -> list[str]:
    """What a reader should know before believing the table."""
    config = settings.config
    lines = [
        f"One seed. The {plus_minus} is the standard error over the sequences of the test split, which all models share:"
        " differences between them are surer than that.",
        "The losses are nats a token; those of training are means over the last epoch. FLOPs and teacher forwards are those of a"
        " step, on average; 1 FLOP is what plain KD takes that runs its teacher.",
    ]
    k = config.distillation.k
    if config.distillation.cache:
        lines.append(
            f"The teacher's predictions of {f'its {k} likeliest' if k else 'all'} tokens at each position came from disk; the"
            " seconds that it took to compute them are not in the table."
        )
    if "dot" in results:
        lines += drawing.what_dot_changes(settings)
    return lines + drawing.general_notes(settings, results)


def texts(prompts: tuple[str, ...], results: drawing.Results) -> list[str]:
    """What each model writes behind each prompt, on one line."""
    lines = []
    for prompt in prompts:
        lines.append(f"\n{prompt!r} is continued by")
        for name, result in results.items():
            label = methods.STYLES[name].label if name in methods.STYLES else name
            written = result.get("continuations", {}).get(prompt)
            lines.append(f"  {label:<18} {'-' if written is None else repr(written[:_SHOWN])}")
    return lines
