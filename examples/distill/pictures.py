"""Pictures of several runs: what `python -m examples.distill.plot` draws. Each function returns a Matplotlib figure.

They are made to be read in a README, some 850 pixels wide, and without color: arms have different lines and markers, and
names beside them. No letter is smaller than 9 points there.
"""

import collections
import contextlib
import io
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.path import Path
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, MaxNLocator
from matplotlib.transforms import Affine2D, Bbox

from examples.distill import methods
from examples.distill.arms import Arm, front, logarithmic
from examples.distill.report import (
    hollow,
    line_and_mark,
    log_ticks,
    mark,
    marked_points,
    no_formula,
    open_panel,
    set_epoch_ticks,
    set_log_ticks,
)
from examples.trainer.errors import UserError

FORMATS = ("png", "svg")
WIDTH = 8.85  # inches: 850 pixels of a screen, of which 96 are an inch, so that a point of a font is a point there
_NARROW = 0.65 * WIDTH  # of a picture with one panel
_FONT, _SMALL = 10, 9  # points
_DPI = 192  # twice that of the screen
_MOST_MEANS = 40  # of noisy curves: these are drawn in the place of all epochs
_MOST_NAMED = 8  # arms that have names beside them; more have a legend alone
_MOST_NAMED_POINTS = 12
_BESIDE = 9  # points from a mark to a name without a line to it
_APART = 15  # points at least from such a name to any other mark
_CROWDED = 10  # points between marks that lie over one another
_LONGEST_NAMED = 28  # letters: there is no room for longer names beside the arms
_LINE_HEIGHT = 1.2  # of names one below the other, in heights of a letter
_DART = Path([(-1.0, -0.4), (1.0, 0.0), (-1.0, 0.4), (-0.6, 0.0), (-1.0, -0.4)])  # to the right
# The file is the same again: by default, an SVG has the time and random names.
_SETTINGS = {
    "font.size": _FONT,
    "axes.titlesize": _FONT,
    "axes.labelsize": _FONT,
    "xtick.labelsize": _SMALL,
    "ytick.labelsize": _SMALL,
    "legend.fontsize": _SMALL,
    "svg.hashsalt": "dot_optax",
    "path.simplify": False,
}
_METADATA = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}

# What the log may have of gradients and updates: names, or how names end that begin with that of a loss.
# There is one of the first for both losses together, or, of three losses or more, for each pair: `A_and_B_grad_cosine`.
CONFLICT = ("grad_cosine", "grad_conflict", "update_to_weight")
_OF_LOSSES = ("grad_norm", "share", "snr", "gain", "scale_invariant_rate", "rate", "weight")
# With a teacher and `--config.gradient_metrics`, every run logs the first; with `--config.diagnostics`, all of them.
LOGGED = ("task_grad_norm", "kd_grad_norm", "grad_cosine")
DIAGNOSTICS = (
    *("grad_conflict", "task_share", "kd_share", "task_snr", "kd_snr"),
    *("task_gain", "kd_gain", "task_rate", "kd_rate", "update_to_weight"),
)
_TITLES = {  # in the order of the panels
    "grad_norm": "Norm of gradient",
    "grad_cosine": "Cosine between gradients",
    "grad_conflict": "Steps whose gradients conflict",
    "share": "Share of the update",
    "snr": "Signal to noise",
    "update_to_weight": "Norm of update / of weights",
    "gain": "Gain of momentum",
    "rate": "Effective learning rate",
    "scale_invariant_rate": "Rate of scale-invariant weights",
    "weight": "Weight of the loss",
}
_LINEAR = ("grad_cosine", "grad_conflict", "share", "weight")
_FILLS = ("full", "none", "left", "top", "right", "bottom")  # of marks, by which losses differ in one panel
_LINEAR_BELOW = 1e-3  # of an axis that has a 0 and is logarithmic
_LOSSES = {"kd": "KD", "dkd": "DKD", "crd": "CRD"}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Fonts and all else that files depend on; pictures are drawn and rendered within it."""
    with matplotlib.rc_context(_SETTINGS):
        yield


def render(figure: Figure, form: str) -> bytes:
    """Returns the file of a picture: "png" or "svg". The same picture gives the same bytes."""
    file = io.BytesIO()
    figure.savefig(file, format=form, dpi=_DPI, metadata=_METADATA[form])
    return file.getvalue()


def losses(arms: Sequence[Arm]) -> Figure:
    """Both losses over the epochs: means over the batches of each, while the student trained."""
    panels = [
        ("task_loss", "Task loss while training", f"cross-entropy{', nats a token' * arms[0].is_of_text}"),
        ("kd_loss", "Distillation loss while training", _formula(arms)),
    ]
    panels = [panel for panel in panels if any(arm.has(panel[0]) for arm in arms)]
    figure, drawn = _figure(1, len(panels), 3.6)
    for axes, (name, title, y_label) in zip(drawn, panels, strict=True):
        open_panel(axes, title, "epoch", y_label, yscale="log")
        _curves(axes, arms, [name])
    _finish(figure, arms, named=True)
    return figure


def _formula(arms: Sequence[Arm]) -> str:
    """That of the distillation loss; of language models, its name."""
    if not arms[0].is_of_text:
        return "T² KL(teacher ‖ student)"
    return f"{' or '.join(sorted({arm.runs[0].config['distillation.loss'] for arm in arms}))}, nats a token"


def plane(arms: Sequence[Arm]) -> Figure | None:
    """Task loss against distillation loss: on the left a path for each arm, on the right the final students.

    The final students are evaluated on the whole training split, those of language models on the test split. Of arms
    that differ in the weights of their losses alone, those that no other one beats in both losses are joined. None if no
    arm has a distillation loss.
    """
    distilled = [arm for arm in arms if len(_both_losses(arm))]
    if not distilled:
        return None
    ends = {arm.label: _end(arm) for arm in distilled if np.isfinite(_end(arm)[0]).all()}
    joined = [family for family in fronts(distilled) if len(family) > 1]
    figure, drawn = _figure(1, 2 if ends else 1, 3.8)
    open_panel(drawn[0], "Paths while training, from ○ to the mark", "task loss", "distillation loss")
    for arm in distilled:
        _path(drawn[0], arm)
    for axes in drawn[1:]:
        where = "on the test split" if arms[0].is_of_text else "on all training images"
        open_panel(axes, f"Final students, {where}", "task loss", "distillation loss")
        for arm in distilled:
            if arm.label in ends:
                (x, y), (x_error, y_error) = ends[arm.label]
                _point(axes, arm, x, y, x_error, y_error)
        for family in joined:
            points = np.array([ends[arm.label][0] for arm in family])
            axes.plot(*points.T, color="0.35", linewidth=4, alpha=0.35, zorder=1, solid_capstyle="round")
    for axes in drawn:
        axes.set(xscale="log", yscale="log")
        axes.margins(0.08)
    for axes in drawn[1:]:
        axes.margins(0.14)
    for axis in (axis for axes in drawn for axis in (axes.xaxis, axes.yaxis)):
        set_log_ticks(axis)
    extra = [
        Line2D([], [], color="0.35", linewidth=4, alpha=0.35, label=f"front over the weights of {_name(method)}")
        for method in dict.fromkeys(family[0].method for family in joined)
    ]
    _finish(figure, distilled, extra=extra)
    for arm in distilled:
        _arrow(drawn[0], arm)
    for axes in drawn[1:]:
        _hollow_crowded(axes)
        _name_points(axes, [(arm.label, *ends[arm.label][0]) for arm in distilled if arm.label in ends])
    return figure


def fronts(arms: Sequence[Arm]) -> list[list[Arm]]:
    """Of arms that differ in the weights of their losses alone, those whose final students no other one beats in both."""
    families = collections.defaultdict(list)
    for arm in arms:
        if np.isfinite(_end(arm)[0]).all():
            families[arm.family].append(arm)
    varied = [family for family in families.values() if len({arm.weights for arm in family}) > 1]
    return [[family[i] for i in front([_end(arm)[0] for arm in family])] for family in varied]


def gradients(arms: Sequence[Arm]) -> Figure | None:
    """What the log has of gradients, a panel for each quantity with a line for each arm and loss; None if it has none.

    The marks on the lines are filled for the task, hollow for the distillation loss, and half filled for further ones.
    """
    panels = gradient_metrics(arms)
    if not panels:
        return None
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure, drawn = _figure(rows, columns, 2.2 * rows)
    window = _window(arms)
    fills = _fills(panels)
    for axes, (kind, names) in zip(drawn, panels.items(), strict=False):
        # A ratio of signal to noise may be 0.
        has_zero = kind == "snr" and any(_has_zero(arms, name) for name in names)
        scale = "linear" if kind in _LINEAR else "symlog" if has_zero else "log"
        x_label = "epoch" if window == 1 else f"epoch (means over {window})"
        open_panel(axes, _TITLES[kind], x_label, "", yscale=scale)
        axes.sharex(drawn[0])
        if kind == "grad_cosine":
            axes.axhline(0.0, color="0.5", linewidth=0.8, zorder=0)
        if kind == "grad_conflict":  # a rate
            axes.set_ylim(-0.02, 1.02)
        _curves(axes, arms, names, window=window, fills=[fills.get(_kind(name)[1], "full") for name in names])
    for axes in drawn[len(panels) :]:
        axes.remove()
    extra = [
        Line2D([], [], linestyle="", color="0.3", label=_loss_label(loss), **_mark("o", fill, "0.3"))
        for loss, fill in fills.items()
    ]
    having = [arm for arm in arms if any(arm.has(name) for names in panels.values() for name in names)]
    _finish(figure, having, extra=extra)
    return figure


def gradient_metrics(arms: Sequence[Arm]) -> dict[str, list[str]]:
    """The metrics of gradients that a log has, by quantity: those of the task first, then those of distillation."""
    names = {name for arm in arms for run in arm.runs for line in run.lines for name in line if _kind(name)[0]}
    found = [name for name in names if any(arm.has(name) for arm in arms)]
    order = list(dict.fromkeys(["", "task", "kd", *sorted(_kind(name)[1] for name in found)]))
    found.sort(key=lambda name: order.index(_kind(name)[1]))
    by_kind = {kind: [name for name in found if _kind(name)[0] == kind] for kind in _TITLES}
    return {kind: names for kind, names in by_kind.items() if names}


def _fills(panels: dict[str, list[str]]) -> dict[str, str]:
    """How the marks of each loss are filled, and those of each pair of losses."""
    losses = dict.fromkeys(_kind(name)[1] for names in panels.values() for name in names)
    losses.pop("", None)
    return dict(zip(sorted(losses, key=lambda loss: "_and_" in loss), itertools.cycle(_FILLS), strict=False))


def _loss_label(loss: str) -> str:
    names = [_LOSSES.get(name, name.replace("_", " ")) for name in loss.split("_and_")]
    return " and ".join(names) if len(names) > 1 else f"{names[0]} loss"


def layers(arms: Sequence[Arm]) -> Figure | None:
    """The cosine between the gradients of the losses, layer by layer over the epochs; None if no log has it.

    A panel for each arm, and for each pair of three losses or more. It can be read in gray: the higher the lighter, and
    what is below 0 has a dash.
    """
    found: dict[tuple[int, str], dict[str, np.ndarray]] = collections.defaultdict(dict)
    window = _window(arms)
    for i, arm in enumerate(arms):
        for name in dict.fromkeys(name for run in arm.runs for line in run.lines for name in line):
            what, _, layer = name.partition("/")
            kind, pair = _kind(what)
            if layer and kind == "grad_cosine" and arm.has(name):
                found[i, pair][layer] = _means(arm.curve(name), window)
    if not found:
        return None
    names = list(dict.fromkeys(layer for curves in found.values() for layer in curves))
    columns = min(len(found), 3)
    rows = math.ceil(len(found) / columns)
    height = 0.9 + min(0.19 * len(names), 5.5)
    figure, drawn = _figure(rows, columns, 0.8 + height * rows, sharex=True, sharey=True)
    for axes, ((i, pair), curves) in zip(drawn, found.items(), strict=False):
        missing = np.full_like(next(iter(curves.values())), np.nan)
        values = np.ma.masked_invalid([curves.get(layer, missing) for layer in names])
        edges = 0.5 + window * np.arange(values.shape[1] + 1), np.arange(len(names) + 1) - 0.5
        image = axes.pcolormesh(*edges, values, cmap="cividis", vmin=-1, vmax=1, rasterized=True)
        rows_below, columns_below = np.nonzero(values.filled(np.nan) < 0)
        axes.plot(0.5 + window * (columns_below + 0.5), rows_below, "_", color="white", markersize=4)
        title = f"{arms[i].label}\n{_loss_label(pair)}" if pair else arms[i].label
        axes.set(title=no_formula(title), xlabel="epoch")
        axes.tick_params(labelbottom=True)
        set_epoch_ticks(axes.xaxis)
        shown = range(0, len(names), math.ceil(len(names) / 40))
        axes.set_yticks(shown, [no_formula(names[k]) for k in shown])
    drawn[0].invert_yaxis()
    for axes in drawn[len(found) :]:
        axes.remove()
    label = "cosine between gradients; those with a dash are below 0"
    figure.colorbar(
        image,
        ax=drawn[: len(found)],
        label=label,
        ticks=[-1, -0.5, 0, 0.5, 1],
        location="bottom",
        shrink=0.5,
        aspect=40,
    )
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def cost(arms: Sequence[Arm]) -> Figure | None:
    """Test accuracy against what training cost; None if no arm is finished and knows its cost."""
    panels = [
        ("relative_flops", "Gradient FLOPs", "epochs of plain KD; equal ones are side by side"),
        ("teacher_forwards", "Forward passes of the teacher", "epochs; equal ones are side by side"),
    ]
    points = {name: [(arm, _cost(arm, name)) for arm in arms if math.isfinite(_cost(arm, name))] for name, *_ in panels}
    panels = [panel for panel in panels if points[panel[0]]]
    if not panels:
        return None
    # A panel in which all cost the same says nothing.
    panels = [panel for panel in panels if len({round(x, 6) for _, x in points[panel[0]]}) > 1] or panels[:1]
    figure, drawn = _figure(1, len(panels), 3.4, sharey=True)
    for axes, (name, title, x_label) in zip(drawn, panels, strict=True):
        y_label = "accuracy of the next token, test split" if arms[0].is_of_text else "test accuracy ± standard error"
        open_panel(axes, title, x_label, y_label if axes is drawn[0] else "")
        width = 1.25 * max(x for _, x in points[name]) or 1.0
        axes.set_xlim(-0.03 * width, width)
        axes.margins(y=0.12)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        beside = 0.032 * width  # that of a mark
        shifted = [
            x + beside * shift for (_, x), shift in zip(points[name], _shifts(points[name], beside), strict=True)
        ]
        points[name] = [(arm, x) for (arm, _), x in zip(points[name], shifted, strict=True)]
        for arm, x in points[name]:
            y, error = arm.final("test", "top1")
            _point(axes, arm, x, y, math.nan, error)
    _finish(figure, [arm for arm in arms if arm.is_finished])
    for axes, (name, *_) in zip(drawn, panels, strict=True):
        _hollow_crowded(axes)
        _name_points(axes, [(arm.label, x, arm.final("test", "top1")[0]) for arm, x in points[name]])
    return figure


def _shifts(points: Sequence[tuple[Arm, float]], beside: float) -> list[float]:
    """By how many places to move each point, so that those with nearly the same x are around it."""
    near = [[j for j, (_, other) in enumerate(points) if abs(other - x) < beside] for _, x in points]
    return [others.index(i) - (len(others) - 1) / 2 for i, others in enumerate(near)]


class Curvature(NamedTuple):
    """That of a loss at the final weights of a student; see `dot_optax.diagnostics`."""

    sharpness: float  # NaN where the search did not end
    trace: float
    trace_error: float  # its standard error


class Landscape(NamedTuple):
    """The loss of a student over a plane through its final weights."""

    arm: Arm
    distances: np.ndarray  # from the weights, along both directions: [points]
    losses: np.ndarray  # [points along the second direction, points along the first]
    images: int  # whose mean cross-entropy the loss is
    curvatures: Mapping[str, Curvature]  # of each loss, and of their sum


def landscapes(found: Sequence[Landscape]) -> Figure:
    """Contours of all landscapes side by side, at the same levels, and the curvatures below them."""
    columns = min(len(found), 4)
    rows = math.ceil(len(found) / columns)
    below = 0.17 * max(len(each.curvatures) for each in found)
    side = (WIDTH if columns > 1 else _NARROW) / columns
    figure, drawn = _figure(rows, columns, 0.8 + (side + 0.15 + below) * rows * 0.93, sharex=True, sharey=True)
    levels = _levels(np.concatenate([each.losses.ravel() for each in found]))
    labels: list[list[Any]] = []
    colors = matplotlib.colormaps["cividis"].resampled(len(levels) + 1)
    for axes, (arm, distances, values, _, curvatures) in zip(drawn, found, strict=False):
        grid = (distances, distances, np.where(np.isfinite(values), values, np.inf).clip(max=levels[-1] * 1e3))
        axes.contourf(*grid, levels=levels, colors=colors(np.arange(len(levels) + 1)), extend="both", alpha=0.55)
        lines = axes.contour(*grid, levels=levels, colors="black", linewidths=0.7)
        names = axes.clabel(lines, fmt=lambda level: f"{level:.3g}", fontsize=_SMALL, inline=False, colors="black")
        for name in names:
            name.set_path_effects([withStroke(linewidth=2, foreground="white")])
        labels.append(list(names))
        axes.plot(0, 0, marker="+", color="black", markersize=9, markeredgewidth=1.5)
        center = values[len(distances) // 2, len(distances) // 2]
        axes.set(title=no_formula(f"{arm.label}\nat +: {center:.3g}"), aspect="equal")
        texts = [f"{name}: λ {number(c.sharpness, 3)}, tr {number(c.trace, 3)}" for name, c in curvatures.items()]
        axes.set_xlabel("\n".join(texts), fontsize=_SMALL)
        axes.set(xticks=np.linspace(distances[0], distances[-1], 3), yticks=np.linspace(distances[0], distances[-1], 3))
    for axes in drawn[len(found) :]:
        axes.remove()
    images = " or ".join(map(str, sorted({each.images for each in found})))
    figure.suptitle(
        f"Cross-entropy of {images} training images around the final weights\n"
        "along two random directions, in norms of each filter",
        fontsize=_FONT,
    )
    figure.supxlabel("λ, tr: largest eigenvalue and trace of the Hessian at +", fontsize=_FONT)
    figure.draw_without_rendering()
    for names in labels:
        _drop_overlapping(names)
    return figure


def number(value: float, digits: int) -> str:
    """The value with so many significant digits, or a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.{digits}g}"


def _drop_overlapping(names: Sequence[Any]) -> None:
    """Removes names that lie over one before."""
    kept: list[Bbox] = []
    for name in names:
        box = name.get_window_extent()
        if any(box.overlaps(other) for other in kept):
            name.remove()
        else:
            kept.append(box)


def _levels(values: np.ndarray) -> np.ndarray:
    """At most ten levels of contours, in steps of 1, 2, 5 and 10, from the lowest loss to where nine tenths are below."""
    finite = values[np.isfinite(values) & (values > 0)]
    if not finite.size:
        raise UserError("the losses around all students are not finite: nothing can be drawn of --landscape")
    low, high = finite.min(), np.quantile(finite, 0.9)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    levels = [digit * 10.0**exponent for exponent in exponents for digit in (1, 2, 5)]
    levels = [level for level in levels if low < level < high]
    if len(levels) < 3:
        return np.geomspace(low, max(high, low * 1.01), 7)[1:]
    return np.array(levels[:: math.ceil(len(levels) / 10)])


def _figure(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH if columns > 1 else _NARROW, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def _curves(
    axes: Axes, arms: Sequence[Arm], names: Sequence[str], *, window: int = 1, fills: Iterable[str] = ("full",)
) -> None:
    """Metrics over the epochs, with a line for each arm that has it, and a mark now and then."""
    having = [(arm, name, fill) for name, fill in zip(names, fills, strict=True) for arm in arms if arm.has(name)]
    for i, (arm, name, fill) in enumerate(having):
        epochs, values = (_means(values, window) for values in (arm.epochs, arm.curve(name)))
        values = logarithmic(values) if axes.get_yscale() == "log" else values
        marks = marked_points(len(values), i, len(having))
        line = _line(arm) | _mark(arm.marker, fill, arm.color)
        axes.plot(epochs, values, label=no_formula(arm.label), markevery=marks, **line)
    set_epoch_ticks(axes.xaxis)
    if axes.get_yscale() == "log":
        set_log_ticks(axes.yaxis)
    elif axes.get_yscale() == "symlog":  # what may be 0: logarithmic above a thousandth
        axes.set_yscale("symlog", linthresh=_LINEAR_BELOW)
        high = axes.yaxis.get_view_interval()[1]
        axes.yaxis.set_major_locator(FixedLocator([0, *log_ticks(_LINEAR_BELOW, max(high, 10 * _LINEAR_BELOW))]))
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))


def _has_zero(arms: Sequence[Arm], name: str) -> bool:
    return any((arm.curve(name) <= 0).any() for arm in arms)


def _means(values: np.ndarray, window: int) -> np.ndarray:
    """The means of so many values in a row, of those that are finite; the last of fewer."""
    parts = [values[i : i + window] for i in range(0, len(values), window)]
    return np.array([np.mean(part[np.isfinite(part)]) if np.isfinite(part).any() else math.nan for part in parts])


def _window(arms: Sequence[Arm]) -> int:
    """Over how many epochs the means of noisy curves are."""
    return max(1, max(len(arm.epochs) for arm in arms) // _MOST_MEANS)


def _mark(marker: str, fill: str, color: str) -> dict[str, Any]:
    """A mark that is filled, hollow or half filled."""
    if fill == "full":
        return mark(marker)
    rest = {"markerfacecolor": "white"} if fill == "none" else {"fillstyle": fill, "markerfacecoloralt": "white"}
    return mark(marker) | {"markeredgecolor": color, "markeredgewidth": 1.0} | rest


def _line(arm: Arm) -> dict[str, Any]:
    return line_and_mark(arm.color, arm.line, arm.marker)


def _path(axes: Axes, arm: Arm) -> None:
    """The path of both losses: a ring where it begins, the mark of the arm where it ends."""
    points = _both_losses(arm)
    line = _line(arm) | mark(arm.marker, 7) | {"markevery": [len(points) - 1]}
    axes.plot(*points.T, label=no_formula(arm.label), **line)
    axes.plot(*points[0], marker="o", markersize=5, markerfacecolor="white", markeredgecolor=arm.color, zorder=3)


def _arrow(axes: Axes, arm: Arm) -> None:
    """An arrow on the path of both losses, three tenths of the way as the eye sees it: later, paths turn about."""
    points = _both_losses(arm)
    on_screen = axes.transData.transform(points)
    moved = on_screen - on_screen[:1]
    total = float(moved[-1] @ moved[-1])
    along = moved @ moved[-1] / total if total else np.zeros(len(points))
    # Its direction is that from the point before to one some way after, so that noise does not turn it.
    at, to = (int(np.argmax(along >= part)) for part in (0.3, 0.4))
    if at:
        angle = math.atan2(*(on_screen[to] - on_screen[at - 1])[::-1])
        marker = _DART.transformed(Affine2D().rotate(angle))
        # Between two points: if there are few epochs, the next point may be the last one, which has a mark.
        part = (0.3 - along[at - 1]) / (along[at] - along[at - 1])
        place = on_screen[at - 1] + part * (on_screen[at] - on_screen[at - 1])
        axes.plot(
            *axes.transData.inverted().transform(place),
            marker=marker,
            markersize=11,
            color=arm.color,
            markeredgewidth=0,
            zorder=4,
        )


def _both_losses(arm: Arm) -> np.ndarray:
    """Those of each epoch that has both: [epochs, 2]."""
    points = np.stack([logarithmic(arm.curve(name)) for name in ("task_loss", "kd_loss")], axis=1)
    return points[np.isfinite(points).all(axis=1)]


def _point(axes: Axes, arm: Arm, x: float, y: float, x_error: float, y_error: float) -> None:
    errors = {name: error for name, error in (("xerr", x_error), ("yerr", y_error)) if math.isfinite(error)}
    if errors:
        axes.errorbar(x, y, **errors, color=arm.color, linewidth=1, capsize=3, linestyle="none", zorder=2)
    axes.plot(x, y, color=arm.color, linestyle="", label=no_formula(arm.label), zorder=3, **mark(arm.marker, 8))


def _end(arm: Arm) -> tuple[tuple[float, float], tuple[float, float]]:
    """Both losses of the final student as in `plane`, and the standard errors of both; NaN if it is not finished."""
    found = [arm.final("test" if arm.is_of_text else "train", name) for name in ("task_loss", "kd_loss")]
    values = [value if value > 0 else math.nan for value, _ in found]
    return (values[0], values[1]), (found[0][1], found[1][1])


def _cost(arm: Arm, name: str) -> float:
    """What training cost in all: that of a step, in steps of an epoch, times the epochs. NaN if it is not finished."""
    value, _ = arm.final("cost", name)
    return value * len(arm.epochs)


def _kind(name: str) -> tuple[str, str]:
    """What a metric says of gradients, and of which loss or pair, if it names one; nothing if it is none of them."""
    if "/" in name:  # of a layer, whose own name may end like a metric
        return "", ""
    if name in CONFLICT:
        return name, ""
    for kind in (*CONFLICT, *_OF_LOSSES):
        if name.endswith(f"_{kind}"):
            return kind, name.removesuffix(f"_{kind}")
    return "", ""


def _name(method: str) -> str:
    return methods.STYLES[method].label if method in methods.STYLES else method


def _finish(figure: Figure, arms: Sequence[Arm], *, named: bool = False, extra: Sequence[Line2D] = ()) -> None:
    """Adds names at the ends of the lines or a legend below, and fixes the layout."""
    if named and len(arms) <= _MOST_NAMED and _are_short(arm.label for arm in arms):
        placing = [(axes, _name_ends(axes)) for axes in figure.axes]
        figure.draw_without_rendering()
        for axes, names in placing:
            _spread(axes, names)
    else:
        handles = [Line2D([], [], label=no_formula(arm.label), **_line(arm)) for arm in arms] + list(extra)
        longest = max(len(handle.get_label()) for handle in handles)
        fitting = max(1, int(figure.get_figwidth() * 72 / (_SMALL * (0.55 * longest + 5.5))))
        rows = math.ceil(len(handles) / fitting)
        columns = math.ceil(len(handles) / rows)
        figure.set_figheight(figure.get_figheight() + rows * 1.5 * _SMALL / 72)
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, handlelength=3.5)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def _are_short(labels: Iterable[str]) -> bool:
    return max(map(len, labels), default=0) <= _LONGEST_NAMED


def _name_ends(axes: Axes) -> list[Any]:
    """A name on the right of the panel for each line that has a label, with a thin line from its end."""
    names = []
    for line in axes.lines:
        points = np.column_stack(line.get_data())
        points = points[np.isfinite(points).all(axis=1)]
        if line.get_label().startswith("_") or not len(points):
            continue
        leader = {"arrowstyle": "-", "color": line.get_color(), "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3}
        leader["relpos"] = (0, 0.5)  # to the middle of the left edge
        names.append(
            axes.annotate(
                line.get_label(),
                points[-1],
                (1.03, 0.5),
                textcoords="axes fraction",
                va="center",
                fontsize=_SMALL,
                arrowprops=leader,
                annotation_clip=False,
            )
        )
    return names


def _spread(axes: Axes, names: Sequence[Any]) -> None:
    """Moves names up or down, each as near to the end of its line as the others let it."""
    gap = _LINE_HEIGHT * _SMALL / 72 * axes.figure.dpi / axes.get_window_extent().height
    wanted = [axes.transAxes.inverted().transform(axes.transData.transform(name.xy))[1] for name in names]
    order = sorted(range(len(names)), key=lambda i: wanted[i])
    heights = spread([wanted[i] for i in order], gap)
    for i, height in zip(order, heights, strict=True):
        names[i].set_position((1.03, height))


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Heights that are at least a gap apart, from 0 to 1 if there is room: those nearest, in squares, to rising ones.

    >>> spread([0.4, 0.5, 1.0], gap=0.2)
    [0.35, 0.55, 1.0]
    """
    # Each without the gaps below it is as free as the first: it only must not be lower. Of those that would be, the mean.
    groups: list[list[float]] = []
    for i, height in enumerate(wanted):
        groups.append([height - i * gap])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    means = itertools.chain.from_iterable([float(np.mean(group))] * len(group) for group in groups)
    highest = max(0.0, 1.0 - (len(wanted) - 1) * gap)
    return [round(min(max(mean, 0.0), highest) + i * gap, 9) for i, mean in enumerate(means)]


def _name_points(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Names points where there is room: beside, above or below them, or further off with a thin line."""
    if len(points) > _MOST_NAMED_POINTS or not _are_short(label for label, _, _ in points):
        return
    point = axes.figure.dpi / 72
    frame = axes.get_window_extent()
    centers = [axes.transData.transform((x, y)) for _, x, y in points]
    taken = [Bbox.from_bounds(x - 5 * point, y - 5 * point, 10 * point, 10 * point) for x, y in centers]
    for bars in axes.collections:
        segments = [axes.transData.transform(segment) for segment in bars.get_segments()]
        taken += [Bbox([segment.min(axis=0), segment.max(axis=0)]) for segment in segments]
    leader = {"arrowstyle": "-", "color": "0.4", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 1}
    options = {"textcoords": "offset points", "va": "center", "fontsize": _SMALL}
    # The outermost first: they have few places. Those in the middle of a crowd can go far off.
    middle = np.median(centers, axis=0)
    order = sorted(range(len(points)), key=lambda i: -float(np.hypot(*(centers[i] - middle))))
    for i in order:
        label, x, y = points[i]
        others = [center for j, center in enumerate(centers) if j != i]
        places = []
        for distance, angle in itertools.product((_BESIDE, 18, 30, 45, 60, 80, 100), range(0, 360, 15)):
            dx, dy = (distance * trig(math.radians(angle)) for trig in (math.cos, math.sin))
            align = "left" if dx > 2 else "right" if dx < -2 else "center"
            name = axes.annotate(no_formula(label), (x, y), (dx, dy), ha=align, **options)
            box = name.get_window_extent().padded(point)
            name.remove()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            # With the distance, so that of equally crowded places it is the nearest.
            crowded = sum(box.overlaps(other) for other in taken) + 3 * (not inside)
            # A name right beside its mark has no line, so it must not be beside another mark as well.
            if distance == _BESIDE and any(_distance(box, other) < _APART * point for other in others):
                continue
            places.append((crowded, distance, angle, (dx, dy), align, box))
            if not crowded:
                break
        _, distance, _, offset, align, box = min(places, key=lambda place: place[:3])
        edge = {"left": 0, "right": 1, "center": 0.5}[align]
        side = 0.5 if abs(offset[1]) < 0.5 * distance else 0 if offset[1] > 0 else 1
        arrow = {**leader, "relpos": (edge, side)} if distance > _BESIDE else None
        axes.annotate(no_formula(label), (x, y), offset, ha=align, arrowprops=arrow, **options)
        taken.append(box)


def _distance(box: Bbox, point: np.ndarray) -> float:
    """That of a point from a box; 0 within it."""
    return float(np.hypot(*(point - np.clip(point, box.min, box.max))))


def _hollow_crowded(axes: Axes) -> None:
    """Makes marks hollow that lie over one another."""
    marks = [line for line in axes.lines if not line.get_label().startswith("_")]
    centers = axes.transData.transform([line.get_xydata()[-1] for line in marks])
    for i, line in enumerate(marks):
        distances = np.hypot(*(np.delete(centers, i, axis=0) - centers[i]).T)
        if (distances < _CROWDED * axes.figure.dpi / 72).any():
            line.set(**hollow(line.get_color()))
