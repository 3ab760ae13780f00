"""What a finished experiment shows: a table, what it does and does not prove, and a picture of both losses."""

import math
from typing import Any

from etils import epath
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import dot_optax
from examples.distill import methods
from examples.distill.settings import Settings
from examples.trainer import loop, records

_LABELS = {"ce": "CE", "kd": "KD", "kd_gain_matched": "KD, gain-matched", "dot": "DOT"}
_COLORS = {
    "ce": "#7f7f7f",
    "kd": "#0072b2",
    "kd_gain_matched": "#009e73",
    "dot": "#d55e00",
}  # Safe for the color blind.

_TEST_FIGURES = ("test.top1", "test.top5", "test.count")

Results = dict[str, dict[str, Any]]


def write(settings: Settings, name: str, directory: epath.Path) -> None:
    """Prints the table of every finished method in `directory` and draws `losses.png` there."""
    config = settings.config
    finished = [method for method in methods.METHODS if loop.is_finished(directory / method)]
    results = {
        method: records.read_json(directory / method / "result.json", ("seconds", "train.task_loss", *_TEST_FIGURES))
        for method in finished
    }
    curves = {
        method: records.read_lines(directory / method / "metrics.jsonl", config.epochs, ("task_loss", "kd_loss"))
        for method in finished
    }
    print(f"\n{name}, seed {config.seed}, {config.epochs} epochs; {_teacher(directory / 'teacher')}\n")
    print(table(results))
    print("\n" + "\n".join(notes(settings, results)) + "\n")
    plot(curves, directory / "losses.png")
    print(f"Picture: {directory / 'losses.png'}")
    print(f"Metrics: {directory}/METHOD/metrics.jsonl; students: {directory}/METHOD/checkpoints")


def table(results: Results) -> str:
    """One column for each method. The losses are those of the final student over the whole training split."""
    rows = [
        ("", *(_LABELS[method] for method in results)),
        ("train task loss", *(_loss(r["train"], "task_loss") for r in results.values())),
        ("train KD loss", *(_loss(r["train"], "kd_loss") for r in results.values())),
        ("test top-1", *(_accuracy(r["test"], "top1") for r in results.values())),
        ("test top-5", *(_accuracy(r["test"], "top5") for r in results.values())),
        ("seconds", *(f"{r['seconds']:.1f}" for r in results.values())),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "   ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def notes(settings: Settings, results: Results) -> list[str]:
    """What a reader should know before believing the table."""
    one_seed = "One seed. The ± is the standard error that comes from the size of the test split; seeds differ as well."
    if set(results) == {"ce"}:
        return [one_seed]
    momentum = settings.config.optimizer.momentum
    dot = dot_optax.gains(*settings.betas)
    plain, _ = dot_optax.gains(momentum, momentum)
    return [
        one_seed,
        f"DOT's two momenta multiply a steady task gradient by {dot.task:.3g} and a KD gradient by {dot.kd:.3g}, where plain"
        f" momentum multiplies both by {plain:.3g}.",
        f"--config.method=kd_gain_matched gives plain KD the same gains (task weight and L2 x {dot.task / plain:.3g}, KD"
        f" weight x {dot.kd / plain:.3g}): only what DOT does better than that is due to its two momenta.",
        "Every method has the same learning rate here, as in the paper; with one tuned for each method the difference"
        " closes on digits: python -m benchmarks.digits_learning_rates",
    ]


def plot(curves: dict[str, list[dict[str, Any]]], path: epath.Path) -> None:
    """Draws both losses over the epochs, and the loss plane with a path for each method."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    over_epochs_task, over_epochs_kd, plane = figure.subplots(1, 3)
    for method, lines in curves.items():
        epochs = range(1, len(lines) + 1)
        task, kd = ([line[key] for line in lines] for key in ("task_loss", "kd_loss"))
        style = {"color": _COLORS[method], "label": _LABELS[method], "linewidth": 1.2}
        over_epochs_task.plot(epochs, task, **style)
        if None in kd:  # trained without a teacher
            continue
        over_epochs_kd.plot(epochs, kd, **style)
        plane.plot(task, kd, **style)
        plane.plot(task[-1], kd[-1], "o", color=_COLORS[method], markersize=8, markeredgecolor="white", zorder=3)
        first = {"xy": (task[0], kd[0]), "xytext": (-6, 0), "textcoords": "offset points"}
    for axes, title, x_label, y_label in (
        (over_epochs_task, "Task loss", "epoch", "cross-entropy"),
        (over_epochs_kd, "Distillation loss", "epoch", "T² KL(teacher ‖ student)"),
        (plane, "Loss plane", "task loss", "distillation loss"),
    ):
        _decorate(axes, title, x_label, y_label)
    plane.set_xscale("log")
    if plane.lines:
        plane.annotate("first epoch", **first, ha="right", fontsize="small")
    for axes in (over_epochs_task, over_epochs_kd):
        axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 3, 6, 10], integer=True))
    over_epochs_task.legend(frameon=False)
    with records.writing(path):
        figure.savefig(path, dpi=150)


def _decorate(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_yscale("log")
    axes.grid(True, which="both", alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def _teacher(job: epath.Path) -> str:
    if not loop.is_finished(job):
        return "no teacher"
    return f"teacher: test top-1 {_accuracy(records.read_json(job / 'result.json', _TEST_FIGURES)['test'], 'top1')}"


def _loss(means: dict[str, Any], name: str) -> str:
    return f"{means[name]:.4f}" if name in means else "-"


def _accuracy(means: dict[str, Any], name: str) -> str:
    """An accuracy with its binomial standard error."""
    accuracy, count = means[name], means["count"]
    return f"{accuracy:.4f} ± {math.sqrt(accuracy * (1 - accuracy) / count):.4f}"
