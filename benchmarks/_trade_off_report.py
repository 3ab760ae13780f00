"""The tables and the picture of `trade_off.py`, from what its cells measured."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import dot_optax
from benchmarks import sampled_gradients as sampled
from examples.distill import report as drawing

KD, DOT, MATCHED = "KD 0.9", "DOT 0.075", "KD, gain-matched"
SIGNIFICANT = 0.05


def title(text):
    print(f"\n## {text}\n")


def header(*cells):
    sampled.row(cells)
    sampled.row(["---"] * len(cells))


def mean(result, measure):
    return np.mean(result[measure])


def difference(ours, theirs):
    return sampled.paired(ours["test loss"], theirs["test loss"])


def shown(found):
    if found is None:
        return ""
    value, error, p = found
    return f"{value:+.4f} ± {error:.4f}{' *' if p < SIGNIFICANT else ''}"


def summary_table(results):
    """The arms that matter most; marked where the difference from KD is significant, corrected within a problem."""
    title(f"Mean test losses; * where the difference from {KD} is significant")
    arms = ("CE", "KD 0.5", KD, MATCHED, "DOT 0.05", DOT, "DOT -0.075")
    header("arm", *results)
    compared = {
        name: sampled.holm({arm: difference(of[arm], of[KD]) for arm in arms if arm in of and arm != KD})
        for name, of in results.items()
    }

    def cell(name, arm):
        if arm not in results[name]:
            return ""
        is_other = arm != KD and compared[name][arm][2] < SIGNIFICANT
        return f"{mean(results[name][arm], 'test loss'):.4f}{' *' if is_other else ''}"

    for arm in arms:
        sampled.row([arm, *(cell(name, arm) for name in results)])


def problem_table(name, results):
    """Every arm at the learning rate that was chosen for it."""
    seeds = len(results[KD]["test loss"])
    title(f"{name} ({seeds} seeds)")
    compared = sampled.holm({arm: difference(result, results[KD]) for arm, result in results.items() if arm != KD})
    header("arm", "learning rate", *sampled.SHOWN, f"test loss less that of {KD}")
    for arm, result in results.items():
        figures = [sampled.figure(result[measure]) for measure in sampled.SHOWN]
        sampled.row([arm, f"{result['learning rate']:g}", *figures, shown(compared.get(arm))])


def beyond(result, front):
    """The least factor by which both training losses of some arm of `front` are at most larger than those of `result`."""
    return min(
        max(mean(other, measure) / mean(result, measure) for measure in ("train task", "train KD")) for other in front
    )


def front_table(results, arms):
    title("Beyond the front of KD's weights?")
    header("problem", *arms)
    for name, found in results.items():
        front = [result for arm, result in found.items() if arm.startswith("KD 0") and "," not in arm]
        sampled.row([name, *(f"{beyond(found[arm], front):.2f}" if arm in found else "" for arm in arms)])


def cause_table(causes):
    title("What explains DOT's gain at a small learning rate for all?")
    steps = list(next(iter(causes.values())))
    header("problem", *steps)
    for name, found in causes.items():
        sampled.row([name, *(sampled.figure(found[step]["test loss"]) for step in steps)])


def best_of(results, names):
    """The arm with the lowest validation loss of those whose names begin with one of `names`."""
    arms = [arm for arm in results if arm.startswith(names)]
    return min(arms, key=lambda arm: mean(results[arm], "validation loss"))


def winner_table(results, one, two, left_out):
    title("One momentum or two, the best of each kind by its validation loss")
    best = {}
    for name, found in results.items():
        candidates = {arm: result for arm, result in found.items() if arm not in left_out}
        best[name] = best_of(candidates, one), best_of(candidates, two)
    versus_best = sampled.holm(
        {name: difference(results[name][two], results[name][one]) for name, (one, two) in best.items()}
    )
    versus_matched = sampled.holm({name: difference(found[DOT], found[MATCHED]) for name, found in results.items()})
    header("problem", "one momentum", "two momenta", "two less one", f"{DOT} less gain-matched")
    for name, (one, two) in best.items():
        figures = (f"{arm}: {mean(results[name][arm], 'test loss'):.4f}" for arm in (one, two))
        sampled.row([name, *figures, shown(versus_best[name]), shown(versus_matched[name])])
    return best


def tied(results, left_out):
    """For each arm the problems on which it was run, and those on which it is best or not significantly worse than the best.

    The best is the arm with the lowest validation loss.
    """
    found = {}
    for name, arms in results.items():
        arms = {arm: result for arm, result in arms.items() if arm not in left_out}
        best = best_of(arms, ("",))
        worse = sampled.holm({arm: difference(arms[arm], arms[best]) for arm in arms if arm != best})
        for arm in arms:
            ran, kept_up = found.setdefault(arm, ([], []))
            ran.append(name)
            if arm == best or worse[arm][0] <= 0 or worse[arm][2] >= SIGNIFICANT:
                kept_up.append(name)
    return found


def tied_table(results, left_out):
    title("Best, or not significantly worse than the best")
    found = tied(results, left_out)
    header("arm", "problems", "of")
    for arm, (ran, kept_up) in sorted(found.items(), key=lambda item: -len(item[1][1]) / len(item[1][0])):
        sampled.row([arm, str(len(kept_up)), str(len(ran))])


def pair_table(heading, results, pairs):
    """Differences of the test loss of pairs of arms, on the problems that have both."""
    title(heading)
    found = {
        (name, pair): difference(of[pair[0]], of[pair[1]])
        for name, of in results.items()
        for pair in pairs
        if pair[0] in of and pair[1] in of
    }
    corrected = sampled.holm(found)
    header("problem", *(f"{ours} less {theirs}" for ours, theirs in pairs))
    for name in results:
        cells = [shown(corrected.get((name, pair))) for pair in pairs]
        if any(cells):
            sampled.row([name, *cells])


def total_gain(arm, momentum=0.9):
    """How far an arm amplifies the gradient of its weighted losses if that is steady, in units of KD's."""
    if arm == MATCHED:
        arm = DOT
    if arm.startswith("DOT 0"):
        gains = dot_optax.gains(*dot_optax.betas(momentum, float(arm.removeprefix("DOT "))))
    else:
        gains = dot_optax.gains(*[float(arm.partition(" momentum ")[2] or momentum)] * 2)
    return sum(weight * gain for weight, gain in zip(sampled.WEIGHTS, gains, strict=True)) * (1 - momentum)


def rate_table(results, arms):
    title("Learning rates that were chosen, in units of KD's")
    header("problem", KD, *arms)
    for name, found in results.items():
        unit = found[KD]["learning rate"]
        rates = (f"{found[arm]['learning rate'] / unit:g}" if arm in found else "" for arm in arms)
        sampled.row([name, f"{unit:g}", *rates])
    sampled.row(["1 / gain", "1", *(f"{1 / total_gain(arm):.2f}" for arm in arms)])


def breaking_table(breaking):
    title("The smallest learning rate at which students fail")
    arms = list(next(iter(breaking.values())))
    header("problem", *arms)
    for name, found in breaking.items():
        sampled.row([name, *(f"{found[arm]:.3g}" if found[arm] else "none" for arm in arms)])


def picture(results, path):
    """The loss plane of every problem, and how the test losses of the arms differ from KD's."""
    columns = 4
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(4 * columns, 3.6 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    kinds = {
        "KD, over weights": (lambda arm: arm.startswith("KD 0") and "," not in arm, "-o", "#0072b2"),
        "KD, other momentum": (lambda arm: arm.startswith("KD 0") and "momentum" in arm, "v", "#56b4e9"),
        "KD, gain-matched": (lambda arm: arm == MATCHED, "P", "#009e73"),
        "DOT, over delta": (lambda arm: arm.startswith("DOT 0"), "--D", "#d55e00"),
        "DOT, normalised or warmed up": (lambda arm: arm in ("DOT, warm-up", "DOT, normalised"), "s", "#e69f00"),
        "momenta exchanged": (lambda arm: arm.endswith("reversed") or arm == "DOT -0.075", "^", "#000000"),
    }
    for axes, (name, found) in zip(grid, results.items(), strict=False):
        axes.set(xlabel="train task loss", ylabel="train KD loss", title=name, xscale="log", yscale="log")
        axes.grid(True, which="both", alpha=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        for label, (belongs, style, color) in kinds.items():
            arms = [result for arm, result in found.items() if belongs(arm)]
            x, y = ([mean(result, measure) for result in arms] for measure in ("train task", "train KD"))
            axes.plot(x, y, style, color=color, label=label, markersize=6, linewidth=1.2, fillstyle="none")
        for axis in (axes.xaxis, axes.yaxis):
            drawing.set_log_ticks(axis)
    for axes in grid[len(results) :]:
        axes.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=80)
