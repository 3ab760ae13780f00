"""What do sampled gradients save, and what do they cost?  Results at equal steps, and at an equal number of FLOPs.

    apt-get install dataset-fashion-mnist
    pip install -e ".[examples]" && python -m benchmarks.sampled_gradients --directory=runs/sampled_gradients

Three problems: scikit-learn's digits with an MLP (SGD, 20 seeds), and Fashion-MNIST with a CNN that has BatchNorm (SGD) and
with a vision transformer (AdamW), 5 seeds each.  Arms: CE; plain KD, gain-matched KD and DOT, each with exact gradients and
with every form of `dot_optax.sampled_...`.  Ways to lessen the noise are in `sampling_noise.py`.

The protocol is that of `_experiments.py`.  The search for a learning rate begins at the best rate of the same method with a similar
form, or with exact gradients, and follows the lower loss.  The table and the picture show the test split at that rate alone.
"Equal cost" trains for as many steps as plain KD's FLOPs pay for, at the same learning rate.  All arms have the same batches
and initial weights, seed by seed.

A student's forward pass costs F and its backward pass 2F; the teacher's forward pass T = 7.2 F, as for ResNet50 ->
MobileNetV1 (`--teacher` for another ratio).  The teacher's logits are computed once here, since no image is augmented: costs are
counted as if it had run where it is due.  Arms with one momentum need one backward pass for both losses, and are counted so.

Every cell (an arm, a learning rate, a number of steps) is one JSON file of the directory: the command goes on where it was
stopped, and with all cells there it only prints. A cell of other settings is run anew; one of other code is not.
"""

import argparse
import functools
import json
import pathlib

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import dot_optax
from benchmarks import _experiments as experiments
from benchmarks._experiments import EXACT, SHOWN, Cells, Form, figure, row, search
from benchmarks._students import PROBLEMS
from examples.distill import methods


def _every(k):
    return Form(lambda f: dot_optax.sampled_losses(f, {"kd": k}, has_aux=True), lambda t, n: 3 + (t + 2 * (n - 1)) / k)


def _difference(k):
    return Form(lambda f: dot_optax.sampled_difference(f, k, has_aux=True), lambda t, n: t + 3 + 2 * (n - 1) / k)


def _rows(k):
    make = functools.partial(dot_optax.sampled_examples, periods={"kd": k}, batch_argnums=(2, 3, 4), has_aux=True)
    return Form(make, lambda t, n: 3 + (t + 3) / k)


FORMS = {
    "exact": EXACT,
    **{f"difference, k={k}": _difference(k) for k in (2, 4, 8, 16)},
    **{f"losses, k={k}": _every(k) for k in (2, 4, 8)},
    "alternating": Form(
        lambda f: dot_optax.sampled_losses(f, {"task": 2, "kd": 2}, has_aux=True), lambda t, n: 3 + t / 2
    ),
    **{f"examples, 1/{k}": _rows(k) for k in (2, 4, 8)},
}
METHODS = {"kd": "KD", "kd_gain_matched": "KD, gain-matched", "dot": "DOT"}


def arms(forms):
    """(method, form) of the arms; the sampled difference leaves plain KD as it is."""
    yield "ce", "exact"
    for method in METHODS:
        for form in forms:
            if method != "kd" or not form.startswith("difference"):
                yield method, form


def cost(problem, method, form, teacher):
    """Of a step, in units of plain KD; `form` is a `Form`."""
    if method == "ce":
        return 3 / (teacher + 3)
    # With one momentum the weighted losses have one gradient; gain-matched Adam has two sums of them.
    passes = 1 if method == "kd" or (method == "kd_gain_matched" and problem.optimizer == "sgd") else 2
    return form.cost(teacher, passes) / (teacher + 3)


def run(name, problem, directory, teacher, forms):
    """All cells of a problem: for each arm its cost, its learning rate, and the figures at equal steps and equal cost."""
    cells, results = Cells(name, problem, directory, FORMS), {}
    for method, form in arms(forms):
        start = results.get((method, "exact"), {"learning rate": problem.learning_rate})["learning rate"]
        family = form.partition(",")[0]
        before = [r["learning rate"] for (m, f), r in results.items() if m == method and f.startswith(family)]
        rate = search(cells, method, form, (before or [start])[-1])
        price = cost(problem, method, FORMS[form], teacher)
        results[method, form] = {
            "cost": price,
            "learning rate": rate,
            "equal steps": cells.get(method, form, rate, cells.steps()),
            "equal cost": cells.get(method, form, rate, cells.steps(price)),
        }
        print(f"{name}: {method}, {form}: learning rate {rate:g}, cost {price:.2f}", flush=True)
    return results


def differences(results, when, base):
    """How much larger an arm's test loss is than that of the arm `base(arm)`, for the arms that have one."""
    pairs = {arm: base(arm) for arm in results if base(arm) in results and base(arm) != arm}
    loss = {arm: result[when]["test loss"] for arm, result in results.items()}
    return experiments.holm({arm: experiments.paired(loss[arm], loss[other]) for arm, other in pairs.items()})


def table(name, results, when):
    """One row for each arm, with how its test loss differs from plain KD's, and from its own with exact gradients."""
    seeds = len(results["kd", "exact"][when]["test loss"])
    print(f"\n{name}, {when}, {seeds} seeds, mean ± standard error; *: a paired difference with p < 0.05, corrected\n")
    compared = {
        "less that of KD": differences(results, when, lambda arm: ("kd", "exact")),
        "less that of exact gradients": differences(results, when, lambda arm: (arm[0], "exact")),
    }
    row(["method", "gradients", "cost", "learning rate", *SHOWN, *compared])
    row(["---"] * (len(SHOWN) + len(compared) + 4))
    for (method, form), result in results.items():
        figures = [figure(result[when][measure]) for measure in SHOWN]
        for found in compared.values():
            mean, error, p = found.get((method, form), (0, 0, 1))
            figures.append(f"{mean:+.4f} ± {error:.4f}{' *' if p < 0.05 else ''}" if error else "")
        label = methods.STYLES[method].label
        row([label, form, f"{result['cost']:.2f}", f"{result['learning rate']:g}", *figures])


MARKERS = {"exact": "*", "difference": "D", "losses": "o", "alternating": "X", "examples": "s"}
PANELS = (
    ("train task", "equal steps", "train task loss"),
    ("train KD", "equal steps", "train KD loss"),
    ("test accuracy", "equal steps", "test accuracy"),
    ("test accuracy", "equal cost", "test accuracy at equal cost"),
)


def picture(results, path):
    """Losses and accuracies against the cost of a step: one row of panels for each problem."""
    figure_ = Figure(figsize=(15, 3.6 * len(results) + 0.9), layout="constrained")
    FigureCanvasAgg(figure_)
    grid = figure_.subplots(len(results), len(PANELS), squeeze=False)
    for axes_of_row, (name, arms_) in zip(grid, results.items(), strict=True):
        for axes, (measure, when, label) in zip(axes_of_row, PANELS, strict=True):
            axes.set(xlabel="cost of a step (plain KD: 1)", ylabel=label, title=name)
            axes.grid(True, alpha=0.2)
            axes.spines[["top", "right"]].set_visible(False)
            for method, line in zip(METHODS, ("-", "--", ":"), strict=True):
                for family, marker in MARKERS.items():
                    points = [
                        (arm["cost"], np.mean(arm[when][measure]), np.std(arm[when][measure], ddof=1))
                        for (m, form), arm in arms_.items()
                        if m == method and form.startswith(family)
                    ]
                    if points:
                        x, y, deviation = zip(*points, strict=True)
                        error = np.array(deviation) / len(arms_["kd", "exact"][when][measure]) ** 0.5
                        color = methods.STYLES[method].color
                        axes.errorbar(
                            x, y, error, color=color, marker=marker, linestyle=line, linewidth=1, markersize=6
                        )
            ce = arms_["ce", "exact"]
            if measure != "train KD":  # far above all that have a teacher
                axes.plot(ce["cost"], np.mean(ce[when][measure]), color="black", marker="P", markersize=7)
            exact = [np.mean(arm[when][measure]) for (m, form), arm in arms_.items() if form == "exact" and m != "ce"]
            shown = [np.mean(arm[when][measure]) for (m, _), arm in arms_.items() if m != "ce" or measure != "train KD"]
            if measure == "test accuracy":  # forms that fail would leave nothing to see of the others
                axes.set_ylim(max(min(shown), min(exact) - 0.06) - 0.005, max(shown) + 0.005)
            else:
                axes.set_ylim(0.9 * min(shown), min(1.1 * max(shown), 3 * max(exact)))
    handles = [
        Line2D([], [], color=methods.STYLES[m].color, linestyle=line, label=methods.STYLES[m].label)
        for m, line in zip(METHODS, ("-", "--", ":"), strict=True)
    ]
    handles += [Line2D([], [], color="gray", marker=mark, linestyle="", label=name) for name, mark in MARKERS.items()]
    handles.append(Line2D([], [], color="black", marker="P", linestyle="", label="CE, no teacher"))
    figure_.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure_.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=pathlib.Path, default=pathlib.Path("runs/sampled_gradients"))
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--teacher", type=float, default=7.2, help="T / F, the teacher's forward pass in the student's")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="'exact' is to compare with")
    parser.add_argument("--seeds", type=int, help="of every problem; at least 2: the standard error needs them")
    parser.add_argument("--epochs", type=int, help="of every problem")
    parser.add_argument("--json", type=pathlib.Path, help="also write every seed's figures to this file")
    parser.add_argument("--picture", type=pathlib.Path, help="where to draw the picture; default: in the directory")
    args = parser.parse_args(argv)

    results = {}
    for name in args.problems:
        problem = PROBLEMS[name]
        problem = problem._replace(seeds=args.seeds or problem.seeds, epochs=args.epochs or problem.epochs)
        results[name] = run(name, problem, args.directory, args.teacher, args.forms)
    for name, arms_ in results.items():
        for when in ("equal steps", "equal cost"):
            table(name, arms_, when)
    args.directory.mkdir(parents=True, exist_ok=True)
    picture(results, args.picture or args.directory / "sampled_gradients.png")
    if args.json:
        report = {name: {f"{m}, {form}": arm for (m, form), arm in found.items()} for name, found in results.items()}
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
