"""What a finished experiment shows: a picture of both losses, a table, and what they do and do not prove."""

import io
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

import dot_optax
from examples.distill import methods
from examples.distill.settings import Settings
from examples.trainer import loop, records
from examples.trainer.sampling import EXACT, Sampling

_TEST_FIGURES = ("test.top1", "test.top5", "test.count")
_PANELS = (
    ("Task loss", "epoch", "cross-entropy"),
    ("Distillation loss", "epoch", "T² KL(teacher ‖ student)"),
    ("Loss plane", "task loss", "distillation loss"),
)  # title, and what the axes show
_MOST_TICKS = 6
_MOST_COLUMNS = 5  # of the table: then a line has some 120 characters
# Lines and marks tell apart without color what a picture shows; the colors are those of the methods.
_LINES = ("-", "--", "-.", ":", (0, (7, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (9, 2, 2, 2)))
_MARKERS = "os^DvPX*<>ph"
_SIZES = {"*": 1.6, "P": 1.2, "X": 1.2, "p": 1.2, "h": 1.2}  # of marks that look smaller than they are

Results = dict[str, dict[str, Any]]
Curves = dict[str, list[dict[str, Any]]]


def write(settings: Settings, name: str, directory: epath.Path) -> None:
    """Draws `losses.png` in `directory`, and prints the table of every method that is finished there."""
    config = settings.config
    trained = {method: loop.finished_epochs(directory / method) for method in methods.METHODS}
    finished = [method for method, epochs in trained.items() if epochs == config.epochs]
    results = {
        method: records.read_json(directory / method / "result.json", ("seconds", "train.task_loss", *_TEST_FIGURES))
        for method in finished
    }
    curves = {
        method: records.read_lines(directory / method / "metrics.jsonl", config.epochs, ("task_loss", "kd_loss"))
        for method in finished
    }
    records.write_bytes(directory / "losses.png", picture(curves, results))
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    plus_minus = encodable("±", encoding).replace("?", "+-")
    lines = [
        f"\n{name}, seed {config.seed}, {config.epochs} epochs; {_teacher(directory / 'teacher', plus_minus)}\n",
        table(results, plus_minus),
        "",
        *notes(settings, results, plus_minus),
        *(
            f"{methods.STYLES[method].label} was trained for {epochs} epochs: --config.method={method} goes on with it."
            for method, epochs in trained.items()
            if epochs not in (0, config.epochs)
        ),
        f"\nPicture: {directory / 'losses.png'}",
        f"Metrics: {directory}/METHOD/metrics.jsonl; students: {directory}/METHOD/checkpoints",
    ]
    print(encodable("\n".join(lines), encoding))


def encodable(text: str, encoding: str) -> str:
    """The text with a question mark for each character that a terminal of this encoding cannot show."""
    return text.encode(encoding, "replace").decode(encoding)


def table(results: Results, plus_minus: str = "±") -> str:
    """One column for each method. The losses are those of the final student over the whole training split.

    More methods than fit on a line are continued below.
    """
    names = list(results)
    parts = [names[i : i + _MOST_COLUMNS] for i in range(0, len(names), _MOST_COLUMNS)]
    return "\n\n".join(_part({name: results[name] for name in part}, plus_minus) for part in parts)


def _part(results: Results, plus_minus: str) -> str:
    rows = [
        ("", *(methods.STYLES[method].label for method in results)),
        ("train task loss", *(number(r["train"], "task_loss", ".4f") for r in results.values())),
        ("train KD loss", *(number(r["train"], "kd_loss", ".4f") for r in results.values())),
        ("test top-1", *(_accuracy(r["test"], "top1", plus_minus) for r in results.values())),
        ("test top-5", *(_accuracy(r["test"], "top5", plus_minus) for r in results.values())),
        ("teacher forwards", *(number(r.get("cost", {}), "teacher_forwards", ".2f") for r in results.values())),
        ("gradient FLOPs / KD", *(number(r.get("cost", {}), "relative_flops", ".2f") for r in results.values())),
        ("seconds", *(number(r, "seconds", ".1f") for r in results.values())),
    ]
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is aligned to the left, and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "   ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def notes(settings: Settings, results: Results, plus_minus: str = "±") -> list[str]:
    """What a reader should know before believing the table."""
    lines = [
        f"One seed. The {plus_minus} is the standard error that comes from the size of the test split; seeds differ as"
        " well."
    ]
    if {"dot", "dkd_dot", "crd_dot"} & set(results):
        gains, baseline = what_dot_changes(settings)
        lines += [gains, baseline] if "dot" in results else [gains]  # of other losses than KD's it is no baseline
    others = [method for method in results if method in methods.TRAITS and methods.TRAITS[method].objective != "kd"]
    if others:
        lines.append(
            f"The KD loss is the plain one in every column; {', '.join(methods.STYLES[m].label for m in others)} minimized"
            " another (objectives.py), which metrics.jsonl has as well."
        )
    return lines + general_notes(settings, results)


def general_notes(settings: Any, results: Results) -> list[str]:
    """What holds of any comparison of methods with one learning rate."""
    lines = []
    if len(results) > 1:
        lines.append(
            "Every method has the same learning rate here, as in the paper; before you believe a difference, compare"
            " each method at the learning rate that is best for it."
        )
    sampling = Sampling.from_config(settings.config.sampling)
    if sampling != EXACT:
        lines.append(
            f"Gradients were sampled, --config.sampling.form={sampling.form} with a period of {sampling.period}: try"
            " half the learning rate, and compare with exact ones, each at its best, before you believe that it costs nothing."
        )
    note = settings.config.report_note
    return [*lines, note] if note else lines


def what_dot_changes(settings: Any) -> list[str]:
    """What of DOT's effect plain KD has as well, and how to tell."""
    optimizer = settings.config.optimizer
    dot = dot_optax.gains(*settings.betas)
    plain, _ = dot_optax.gains(optimizer.momentum, optimizer.momentum)
    task, kd = dot.task / plain, dot.kd / plain
    if optimizer.name == "muon":
        return [
            f"DOT's two momenta multiply a steady KD gradient by {kd / task:.3g} times as much as a task gradient; Muon sees"
            " directions alone, so that plain KD with such weights has the same steady updates.",
            "--config.method=kd_gain_matched is that: only what DOT does better is due to its two momenta.",
        ]
    if optimizer.name == "adamw":
        return [
            f"DOT's two momenta multiply a steady task gradient by {task:.3g} and a KD gradient by {kd:.3g}, where"
            " AdamW multiplies both by 1.",
            "--config.method=kd_gain_matched gives plain KD the same gains: only what DOT does better than that is due to"
            " its two momenta.",
        ]
    return [
        f"DOT's two momenta multiply a steady task gradient by {dot.task:.3g} and a KD gradient by {dot.kd:.3g}, where plain"
        f" momentum multiplies both by {plain:.3g}.",
        f"--config.method=kd_gain_matched gives plain KD the same gains (task weight and L2 x {task:.3g}, KD weight x"
        f" {kd:.3g}): only what DOT does better than that is due to its two momenta.",
    ]


def picture(
    curves: Curves,
    results: Results,
    *,
    panels: Sequence[Sequence[str]] = _PANELS,
    split: str = "train",
    note: str = "final student, evaluated: the table",
) -> bytes:
    """Draws both losses over the epochs, and the loss plane with a path for each method; returns a PNG.

    The lines and the filled marks on them are what a student had while it trained: means over the batches of an epoch,
    normalized, where there is BatchNorm, by the statistics of each batch. The hollow marks are the losses of the table:
    the final student, evaluated on a whole split, with running statistics. The two can rank methods differently.

    Args:
        curves: of each method, a record for each epoch.
        results: of each method, the means over the splits.
        panels: title and labels of both axes of each panel.
        split: of the final student's losses.
        note: what the legend says of these.
    """
    # Those that had a teacher; of a sampled loss, not every epoch need have a value.
    distilled = [method for method, lines in curves.items() if any(line["kd_loss"] is not None for line in lines)]
    columns = 5 if distilled else 1
    rows = math.ceil((len(curves) + 1) / columns)  # of the legend
    height = 4.3 + (0.2 * max(rows - 2, 0) if distilled else 0)
    figure = Figure(figsize=(12 if distilled else 5, height), layout="constrained")
    FigureCanvasAgg(figure)
    drawn = figure.subplots(1, 3 if distilled else 1, squeeze=False)[0]
    for axes, panel in zip(drawn, panels, strict=False):
        open_panel(axes, *panel, yscale="log")
    for i, (method, lines) in enumerate(curves.items()):
        label, color = methods.STYLES[method]
        dashes, marker = look(i)
        epochs = range(1, len(lines) + 1)
        task, kd = ([positive(line[key]) for line in lines] for key in ("task_loss", "kd_loss"))
        final_task, final_kd = (positive(results[method][split].get(key)) for key in ("task_loss", "kd_loss"))
        paths = [(epochs, task, epochs[-1], final_task)]
        if method in distilled:
            paths += [(epochs, kd, epochs[-1], final_kd), (task, kd, final_task, final_kd)]
        for panel, (axes, (x, y, final_x, final_y)) in enumerate(zip(drawn, paths, strict=False)):
            marked = marked_points(len(lines), i, len(curves)) if panel < 2 else [len(lines) - 1]
            axes.plot(x, y, label=no_formula(label), markevery=marked, **line_and_mark(color, dashes, marker))
            axes.plot(final_x, final_y, color=color, linestyle="", zorder=4, **mark(marker, 9) | hollow(color))
    for axes in drawn[:2]:
        set_epoch_ticks(axes.xaxis)
    for axes in drawn[2:]:
        axes.set_xscale("log")
        set_log_ticks(axes.xaxis)
    for axes in drawn:
        set_log_ticks(axes.yaxis)
    handles = [
        *drawn[0].get_legend_handles_labels()[0],
        Line2D([], [], linestyle="", label=f"hollow: {note}", **mark("o", 9) | hollow("gray")),
    ]
    ncols = min(len(handles), columns)
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False, handlelength=3.5)
    png = io.BytesIO()
    figure.savefig(png, dpi=150)
    return png.getvalue()


def look(i: int) -> tuple[Any, str]:
    """The line style and the mark of the i-th line of a picture. No two of the first 96 have both in common."""
    shift = i // math.lcm(len(_LINES), len(_MARKERS))  # All pairs of this round are used up, so the marks move on.
    return _LINES[i % len(_LINES)], _MARKERS[(i + shift) % len(_MARKERS)]


def line_and_mark(color: str, line: Any, marker: str) -> dict[str, Any]:
    """How Matplotlib draws a curve and the marks on it."""
    return {"color": color, "linestyle": line, "linewidth": 1.3} | mark(marker)


def mark(marker: str, size: float = 5.5) -> dict[str, Any]:
    """How Matplotlib draws a mark, so that all look equally large."""
    size *= _SIZES.get(marker, 1)
    return {"marker": marker, "markersize": size, "markeredgecolor": "white", "markeredgewidth": 0.5}


def hollow(color: str) -> dict[str, Any]:
    """What makes a mark hollow, so that others below it are seen."""
    return {"markerfacecolor": "none", "markeredgecolor": color, "markeredgewidth": 1.3}


def marked_points(length: int, i: int, lines: int) -> list[int]:
    """Which points of the i-th of so many lines have marks: some six of them, and the last.

    Marks of different lines are at different points. Else they would hide one another.
    """
    last, every = length - 1, max(1, length // 6)
    return [*range(every * i // lines, last - every // 2, every), last]


def open_panel(axes: Axes, title: str, x_label: str, y_label: str, **scales: str) -> None:
    """Gives a panel its title and labels, a faint grid, and no frame above and on the right."""
    axes.set(title=title, xlabel=x_label, ylabel=y_label, **scales)
    axes.grid(True, alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def no_formula(label: str) -> str:
    """A label in which Matplotlib finds no formula."""
    return label.replace("$", r"\$")


def set_epoch_ticks(axis: Axis) -> None:
    """Gives an axis of epochs a few whole numbers."""
    axis.set_major_locator(MaxNLocator(steps=[1, 2, 3, 6, 10], integer=True, min_n_ticks=1))


def set_log_ticks(axis: Axis) -> None:
    """Gives a logarithmic axis a few ticks with plain numbers, however small or large its range is."""
    ticks = log_ticks(*axis.get_view_interval())
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_ticklabels(_labels(ticks))


def log_ticks(low: float, high: float) -> list[float]:
    """At most six ticks: powers of ten; else multiples of these; else, within a small range, evenly spaced ones."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [digit * 10.0**exponent for exponent in exponents for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / _MOST_TICKS)]
    return [tick for tick in MaxNLocator(4).tick_values(low, high).tolist() if low <= tick <= high]


def _labels(ticks: list[float]) -> list[str]:
    """The ticks with as few digits as tell them apart."""
    spacing = min(np.diff(ticks), default=math.inf)
    for digits in range(1, 17):
        labels = [_plain(tick, digits) for tick in ticks]
        if all(abs(float(label) - tick) < spacing / 100 for label, tick in zip(labels, ticks, strict=True)):
            break
    return labels


def _plain(number: float, digits: int) -> str:
    if 1e-4 <= number < 1e5:
        return np.format_float_positional(number, digits, fractional=False, trim="-")
    return f"{number:.{digits}g}"


def _teacher(job: epath.Path, plus_minus: str) -> str:
    if not loop.is_finished(job):
        return "no teacher"
    result = records.read_json(job / "result.json", _TEST_FIGURES)
    return f"teacher: test top-1 {_accuracy(result['test'], 'top1', plus_minus)}"


def positive(value: float | None) -> float:
    """The value, or NaN for what a logarithmic axis cannot show."""
    return value if value is not None and value > 0 else math.nan


def number(means: dict[str, Any], name: str, form: str) -> str:
    """One of the means, or a dash if there is none."""
    value = means.get(name)
    return "-" if value is None else format(value, form)


def _accuracy(means: dict[str, Any], name: str, plus_minus: str) -> str:
    """An accuracy with its binomial standard error."""
    accuracy, count = means[name], means["count"]
    return f"{accuracy:.4f} {plus_minus} {math.sqrt(accuracy * (1 - accuracy) / count):.4f}"
