"""The tables and the picture of `trade_off.py`, from what its cells measured."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import dot_optax
from benchmarks import _experiments as experiments
from examples.distill import pictures
from examples.distill import report as drawing

KD, DOT, MATCHED = "KD 0.9", "DOT 0.075", "KD, gain-matched"
EXCHANGED = ("DOT -0.075", "KD, gain-matched, -0.075")  # the momenta exchanged, and the control with its gains
SIGNIFICANT = 0.05


def title(text, corrected_over=None):
    """The heading of a table, and over which differences its p-values are corrected."""
    print(f"\n## {text}\n")
    if corrected_over:
        print(f"\\*: p < {SIGNIFICANT}, corrected for all differences {corrected_over}.\n")


def header(*cells):
    experiments.row(cells)
    experiments.row(["---"] * len(cells))


def mean(result, measure):
    return np.mean(result[measure])


def difference(ours, theirs, measure="test loss"):
    return experiments.paired(ours[measure], theirs[measure])


def differences_from_kd(results, measure="test loss"):
    """By how much the test loss of each arm is larger than that of KD, corrected for the number of arms."""
    return experiments.holm({arm: difference(of, results[KD], measure) for arm, of in results.items() if arm != KD})


def shown(found):
    if found is None:
        return ""
    value, error, p = found
    return f"{value:+.4f} ± {error:.4f}{' *' if p < SIGNIFICANT else ''}"


SUMMARY = ("CE", "KD 0.2", "KD 0.5", "KD 0.5, momentum 0.8", KD, MATCHED, "DOT 0.05", DOT, *EXCHANGED)
OF_A_PROBLEM = f"of a problem from {KD}"
OF_THE_TABLE = "of this table"


def summary_table(results):
    """The arms that matter most; marked where the difference from KD is significant, corrected within a problem."""
    title(f"Mean test losses; * where the difference from {KD} is significant", OF_A_PROBLEM)
    header("problem", *SUMMARY)
    for name, found in results.items():
        arms = {arm: found[arm] for arm in SUMMARY if arm in found}
        marked = {arm for arm, (_, _, p) in differences_from_kd(found).items() if p < SIGNIFICANT}
        losses = {arm: f"{mean(arms[arm], 'test loss'):.4f}{' *' if arm in marked else ''}" for arm in arms}
        experiments.row([name, *(losses.get(arm, "") for arm in SUMMARY)])


def problem_table(name, results):
    """Every arm at the learning rate that was chosen for it."""
    seeds, steps = len(results[KD]["test loss"]), results[KD]["steps"]
    title(f"{name} ({seeds} seeds, {steps:,} steps)", OF_A_PROBLEM)
    compared = differences_from_kd(results)
    header("arm", "learning rate", *experiments.SHOWN, f"test loss less that of {KD}")
    for arm, result in results.items():
        figures = [experiments.figure(result[measure]) for measure in experiments.SHOWN]
        experiments.row([arm, f"{result['learning rate']:g}", *figures, shown(compared.get(arm))])


def beyond(result, front):
    """The least factor by which both training losses of some arm of `front` are at most larger than those of `result`."""
    return min(
        max(mean(other, measure) / mean(result, measure) for measure in ("train task", "train KD")) for other in front
    )


def front_table(results, arms, one, left_out):
    """Against the front of KD's weights; the last arm also against every arm with one momentum, but those left out."""
    title("Beyond the front of KD's weights?")
    header("problem", *arms, f"{arms[-1]}, against every single momentum")
    for name, found in results.items():
        front = [result for arm, result in found.items() if arm.startswith("KD 0") and "," not in arm]
        factors = {arm: f"{beyond(found[arm], front):.3f}" for arm in arms if arm in found}
        singles = [result for arm, result in found.items() if arm.startswith(one) and arm not in left_out]
        last = f"{beyond(found[arms[-1]], singles):.3f}" if arms[-1] in found else ""
        experiments.row([name, *(factors.get(arm, "") for arm in arms), last])


def cause_table(causes):
    title("What explains DOT's gain at a small learning rate for all?")
    steps = list(next(iter(causes.values())))
    header("problem", *steps)
    for name, found in causes.items():
        experiments.row([name, *(experiments.figure(found[step]["test loss"]) for step in steps)])


def best_of(results, names):
    """The arm with the lowest validation loss of those whose names begin with one of `names`."""
    arms = [arm for arm in results if arm.startswith(names)]
    return min(arms, key=lambda arm: mean(results[arm], "validation loss"))


def winner_table(results, one, two, left_out):
    title("One momentum or two, the best of each kind with a teacher by its validation loss", "of a column")
    best, or_ce = {}, {}
    for name, found in results.items():
        candidates = {arm: result for arm, result in found.items() if arm not in left_out}
        best[name] = best_of(candidates, one), best_of(candidates, two)
        or_ce[name] = best_of(candidates, (*one, "CE"))
    columns = {
        "two less one": {name: (ours, theirs) for name, (theirs, ours) in best.items()},
        "two less CE": {name: (ours, "CE") for name, (_, ours) in best.items()},
        "two less the better of one and CE": {name: (ours, or_ce[name]) for name, (_, ours) in best.items()},
        f"{DOT} less gain-matched": {name: (DOT, MATCHED) for name in best},
    }
    compared = [
        experiments.holm(
            {
                name: difference(results[name][ours], results[name][theirs])
                for name, (ours, theirs) in pairs.items()
                if theirs in results[name]
            }
        )
        for pairs in columns.values()
    ]
    header("problem", "one momentum", "two momenta", *columns)
    for name, arms in best.items():
        figures = (f"{arm}: {mean(results[name][arm], 'test loss'):.4f}" for arm in arms)
        experiments.row([name, *figures, *(shown(found.get(name)) for found in compared)])


def confirmation_table(results, one):
    """The comparisons that were fixed before these problems were run, corrected for their number."""
    title("The momenta exchanged: the comparisons that were fixed beforehand", OF_THE_TABLE)
    exchanged, control = EXCHANGED
    best = {name: best_of(of, one) for name, of in results.items()}
    found = {
        (name, other): difference(of[exchanged], of[other])
        for name, of in results.items()
        for other in (KD, control, best[name])
    }
    corrected = experiments.holm(found)
    header("problem", exchanged, f"less {KD}", f"less {control}", "less the best of one momentum", "which is")
    for name, of in results.items():
        differences = (shown(corrected[name, other]) for other in (KD, control, best[name]))
        experiments.row([name, experiments.figure(of[exchanged]["test loss"]), *differences, best[name]])


def best_of_all(results, left_out):
    return best_of({arm: result for arm, result in results.items() if arm not in left_out}, ("",))


def tied(results, left_out):
    """For each arm the problems on which it was run, and those on which it is best or not significantly worse than the best.

    The best is the arm with the lowest validation loss.
    """
    found = {}
    for name, arms in results.items():
        best = best_of_all(arms, left_out)
        arms = {arm: result for arm, result in arms.items() if arm not in left_out}
        worse = experiments.holm({arm: difference(arms[arm], arms[best]) for arm in arms if arm != best})
        for arm in arms:
            ran, kept_up = found.setdefault(arm, ([], []))
            ran.append(name)
            if arm == best or worse[arm][0] <= 0 or worse[arm][2] >= SIGNIFICANT:
                kept_up.append(name)
    return found


def tied_table(results, left_out):
    """In how many problems each arm keeps up with the best, and is significantly better or worse than KD.

    Counts reward arms with much noise, so there is more: how much larger the test loss is than that of the best arm (a geometric
    mean), and by how many points the accuracy is above that of KD, as a mean and, since few problems can make that, a median.
    """
    title(f"Against the best arm of a problem, and against {KD}", f"{OF_A_PROBLEM}, and of a problem from its best arm")
    found, measures = tied(results, left_out), ("test loss", "test accuracy")
    versus = {measure: {name: differences_from_kd(of, measure) for name, of in results.items()} for measure in measures}
    best = {name: results[name][best_of_all(of, left_out)] for name, of in results.items()}
    header(
        *("arm", "problems", "best, or not significantly worse than the best"),
        *(f"{measure}: {sign} than {KD}" for measure in ("loss", "accuracy") for sign in ("better", "worse")),
        *("loss above that of the best arm", f"accuracy above that of {KD}, points: mean", "median"),
    )
    for arm, (ran, kept_up) in sorted(found.items(), key=lambda item: -len(item[1][1]) / len(item[1][0])):
        counts = [len(ran), len(kept_up)]
        for measure, good in zip(measures, (-1, 1), strict=True):
            values = [versus[measure][name][arm] for name in ran if arm in versus[measure][name]]
            signs = [np.sign(value) for value, _, p in values if p < SIGNIFICANT]
            counts += [signs.count(good), signs.count(-good)]
        excess = np.mean(
            [np.log(mean(results[name][arm], "test loss") / mean(best[name], "test loss")) for name in ran]
        )
        gained = [mean(results[name][arm], "test accuracy") - mean(results[name][KD], "test accuracy") for name in ran]
        points = (f"{100 * of(gained):+.2f}" for of in (np.mean, np.median))
        experiments.row([arm, *map(str, counts), f"{100 * np.expm1(excess):+.1f}%", *points])


def pair_table(heading, results, pairs):
    """Differences of the test loss of pairs of arms, on the problems that have both."""
    found = {
        (name, pair): difference(of[pair[0]], of[pair[1]])
        for name, of in results.items()
        for pair in pairs
        if pair[0] in of and pair[1] in of
    }
    if not found:
        return
    title(heading, OF_THE_TABLE)
    corrected = experiments.holm(found)
    header("problem", *(f"{ours} less {theirs}" for ours, theirs in pairs))
    for name in results:
        cells = [shown(corrected.get((name, pair))) for pair in pairs]
        if any(cells):
            experiments.row([name, *cells])


def noise_table(noises, results):
    title("The gradients that KD sees: medians over the steps")
    names = ("task SNR", "KD SNR", "cosine", "conflict")
    header("problem", *names)
    for name in results:
        experiments.row([name, *(experiments.figure(noises[name][what]) for what in names)])


def total_gain(arm):
    """How far an arm amplifies the gradient of its weighted losses if that is steady, in units of KD's."""
    momentum = 0.9  # of every arm that names no other
    arm = {MATCHED: DOT, f"{MATCHED}, -0.075": "DOT -0.075"}.get(arm, arm)
    arm, _, task_weight = arm.partition(", weight ")
    weights = (float(task_weight), 1 - float(task_weight)) if task_weight else experiments.WEIGHTS
    if arm.startswith("DOT "):
        gains = dot_optax.gains(*dot_optax.betas(momentum, float(arm.removeprefix("DOT "))))
    else:
        gains = dot_optax.gains(*[float(arm.partition(" momentum ")[2] or momentum)] * 2)
    return sum(weight * gain for weight, gain in zip(weights, gains, strict=True)) * (1 - momentum)


def rate_table(results, arms, optimizer, with_gains):
    title(f"Learning rates that were chosen with {optimizer}, in units of KD's")
    header("problem", KD, *arms)
    units = {name: found[KD]["learning rate"] for name, found in results.items()}
    for name, found in results.items():
        rates = (f"{found[arm]['learning rate'] / units[name]:g}" if arm in found else "" for arm in arms)
        experiments.row([name, f"{units[name]:g}", *rates])
    logs = [
        [np.log(found[arm]["learning rate"] / units[name]) for name, found in results.items() if arm in found]
        for arm in arms
    ]
    means = (f"{np.exp(np.mean(of)):.2f}" if len(of) == len(results) else "" for of in logs)
    experiments.row(["geometric mean", "1", *means])
    if with_gains:
        experiments.row(["1 / gain", "1", *(f"{1 / total_gain(arm):.2f}" for arm in arms)])


def breaking_table(breaking):
    title("The smallest learning rate at which students fail")
    arms = list(next(iter(breaking.values())))
    header("problem", *arms)
    for name, found in breaking.items():
        experiments.row([name, *(f"{found[arm]:.3g}" if found[arm] else "none" for arm in arms)])


KINDS = {  # of arms in the picture: which, and how their marks look
    "KD, over weights": (lambda arm: arm.startswith("KD 0") and "," not in arm, "-o", "#0072b2"),
    "KD 0.5, momentum 0.8": (lambda arm: arm == "KD 0.5, momentum 0.8", "v", "#56b4e9"),
    "KD, gain-matched": (lambda arm: arm == MATCHED, "P", "#009e73"),
    "DOT, over δ > 0": (lambda arm: arm.startswith("DOT 0") and "," not in arm, "--D", "#d55e00"),
    "DOT, warm-up of δ": (lambda arm: arm == "DOT, warm-up", "s", "#e69f00"),
    "DOT -0.075": (lambda arm: arm == "DOT -0.075", "^", "#000000"),
}
COLUMNS = 3


def picture(results, path):
    """Train task loss against train KD loss: a panel for each problem, a mark for each arm; both ends of a line have names."""
    rows = -(-len(results) // COLUMNS)
    with pictures.style():
        figure = Figure(figsize=(pictures.WIDTH, 0.9 * pictures.WIDTH / COLUMNS * rows + 0.6), layout="constrained")
        FigureCanvasAgg(figure)
        grid = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
        for axes, (name, found) in zip(grid, results.items(), strict=False):
            axes.set(xlabel="train task loss", ylabel="train KD loss", title=name, xscale="log", yscale="log")
            axes.grid(True, which="both", alpha=0.15)
            axes.spines[["top", "right"]].set_visible(False)
            axes.margins(0.15)
            for label, (belongs, style, color) in KINDS.items():
                arms = {arm: result for arm, result in found.items() if belongs(arm)}
                x, y = ([mean(result, measure) for result in arms.values()] for measure in ("train task", "train KD"))
                axes.plot(x, y, style, color=color, label=label, markersize=6, linewidth=1.2, fillstyle="none")
                if len(arms) > 1:
                    for end in (0, -1):
                        value = list(arms)[end].split()[-1]
                        axes.annotate(value, (x[end], y[end]), (4, 4), textcoords="offset points", color=color)
            for axis in (axes.xaxis, axes.yaxis):
                drawing.set_log_ticks(axis)
        for axes in grid[len(results) :]:
            axes.set_visible(False)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels) // 2, frameon=False)
        path.write_bytes(pictures.render(figure, "png"))
