"""Draws what finished runs have in common, and where they differ:

    python -m examples.distill.plot RUNS... --output=FOLDER

RUNS are working directories of `python -m examples.distill`, or folders of single methods within them, all of one dataset;
or those of `python -m examples.language_model`, all of one text, which have all pictures but the last.
Runs that differ in nothing but the seed are one arm: their means are drawn. FOLDER defaults to `plots`, next to the first
of RUNS. Each picture is there as PNG and as SVG:

    losses      both losses over the epochs, while the students trained
    plane       task loss against distillation loss: the path of each arm, and the final students. Of arms that differ in
                the weights of their losses alone, those are joined that no other one beats in both losses
    gradients   norms of the gradients and their conflict over the epochs; of runs with --config.diagnostics=True, the
                shares of the update, the ratio of signal to noise, gains and effective learning rates as well
    layers      of runs with --config.diagnostics_by=layer: the cosine between the gradients, layer by layer
    cost        test accuracy against what training cost
    landscape   with --landscape: cross-entropy around the final weights of each student; below it, and in a table that is
                printed, the sharpness and the trace of the Hessian of both losses and of their sum
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from absl import logging
from etils import epath
from matplotlib.figure import Figure

from examples.distill import arms as reading
from examples.distill import command_line, pictures, report
from examples.distill.arms import Arm
from examples.distill.pictures import number
from examples.trainer import paths, records
from examples.trainer.errors import UserError

_IMAGES = 512


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv` (without the program's name) and returns the exit code."""
    logging.set_verbosity(logging.FATAL)  # Orbax logs what it reads.
    try:
        options = _parse(argv)
        data_dir, teacher = options.data_dir, options.teacher
        if options.config:
            config = command_line.parse([f"--config={options.config}"]).config  # registers what is in it
            data_dir, teacher = data_dir or config.dataset.data_dir, teacher or config.teacher.checkpoint
        lines = plot(
            options.runs,
            options.output,
            landscape=options.landscape,
            images=options.images,
            data_dir=data_dir,
            teacher=teacher,
        )
    except UserError as error:
        print("error:", " ".join(str(error).split("\n")), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command draws all again", file=sys.stderr)
        return 130
    print(report.encodable("\n".join(lines), getattr(sys.stdout, "encoding", None) or "utf-8"))
    return 0


def plot(
    runs: Sequence[epath.PathLike],
    output: epath.PathLike = "",
    *,
    landscape: bool = False,
    images: int = _IMAGES,
    data_dir: str = "",
    teacher: str = "",
) -> list[str]:
    """Writes the pictures, and returns in words which, and what could not be drawn.

    Args:
        runs: the folders of the runs.
        output: the folder of the pictures; default: `plots`, next to the first of the runs.
        landscape: whether to draw landscapes too, which need the students and the data.
        images: on how many training images.
        data_dir: the folder of the data, as `--config.dataset.data_dir` was.
        teacher: the folder of the teacher, as `--config.teacher.checkpoint` was, for the curvature of the distillation
            loss, where it is not in WORKDIR/teacher.

    Raises:
        UserError: see `arms.find`; if the pictures cannot be written; or if a landscape cannot be drawn.
    """
    folder = paths.resolve(output, "--output") if output else paths.resolve(runs[0], "RUNS").parent / "plots"
    arms, missing = reading.find(runs)
    finished = [arm for arm in arms if arm.is_finished]
    if landscape and not finished:
        raise UserError("--landscape needs the final weights of a student, and none of RUNS is finished")
    draw: dict[str, Callable[[], Figure | None]] = {
        "losses": lambda: pictures.losses(arms),
        "plane": lambda: pictures.plane(arms),
        "gradients": lambda: pictures.gradients(arms),
        "layers": lambda: pictures.layers(arms),
        "cost": lambda: pictures.cost(arms),
    }
    found: list[pictures.Landscape] = []
    if landscape and not finished[0].is_of_text:
        draw["landscape"] = lambda: _landscapes(found, finished, images, data_dir, teacher)
    written = []
    with pictures.style():
        for name, figure in ((name, function()) for name, function in draw.items()):
            if figure:
                _write(folder, name, figure)
                written.append(str(folder / name))
    if landscape and not found:
        missing.append("Not drawn: landscapes, which need images, and these are runs of language models.")
    return [*missing, *notes(arms), *curvatures(found), f"Pictures, as .png and .svg: {', '.join(written)}"]


def _write(folder: epath.Path, name: str, figure: Figure) -> None:
    with records.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for form in pictures.FORMATS:
        records.write_bytes(folder / f"{name}.{form}", pictures.render(figure, form))


def notes(arms: Sequence[Arm]) -> list[str]:
    """What a reader of the pictures should know: what is not drawn since no log has it, and what names mean."""
    lines = []
    if not any(arm.has("kd_loss") for arm in arms):
        lines.append("Not drawn: the distillation loss and the loss plane, since no run had a teacher.")
    missing = [name for name in pictures.LOGGED if not any(arm.has(name) for arm in arms)]
    if missing:
        lines.append(f"Not drawn, since no log has them: {', '.join(missing)}; see --config.gradient_metrics.")
    missing = [name for name in pictures.DIAGNOSTICS if not any(arm.has(name) for arm in arms)]
    if missing:
        lines.append(f"Not drawn, since no log has them: {', '.join(missing)}; --config.diagnostics=True logs them.")
    temperatures = sorted(
        {arm.runs[0].config.get("distillation.temperature", 1.0) for arm in arms if arm.has("kd_loss")}
    )
    if len(temperatures) > 1:
        lines.append(
            "Do not compare the distillation losses of runs with different --config.distillation.temperature:"
            f" {', '.join(f'{temperature:g}' for temperature in temperatures)}. Each run has that of its own temperature."
        )
    lines += [
        f"No front over weights: {best.label} beats the other weights in both losses."
        for best, *others in pictures.fronts(arms)
        if not others
    ]
    if not any(arm.is_finished for arm in arms):
        lines.append("Not drawn: accuracy against cost, since no run is finished.")
    if any(" : " in arm.label for arm in arms):
        lines.append("A : B in a name are the weights of the task loss and of the distillation loss.")
    return lines


def curvatures(found: Sequence[pictures.Landscape]) -> list[str]:
    """A table of the curvature at the final weights of each student, and what is missing there."""
    if not found:
        return []
    rows = [["", *(each.arm.label for each in found)]]
    for name in dict.fromkeys(name for each in found for name in each.curvatures):
        values = [each.curvatures.get(name) for each in found]
        sharpnesses = ["-" if v is None else number(v.sharpness, 4) for v in values]
        traces = ["-" if v is None else f"{number(v.trace, 4)} ± {number(v.trace_error, 2)}" for v in values]
        rows += [[f"{name}: largest eigenvalue", *sharpnesses], [f"{name}: trace", *traces]]
    lines = ["", "The Hessians of the losses at the final weights, BatchNorm with its running statistics:", ""]
    lines += [report.aligned(rows), ""]
    if any("sum" in each.curvatures for each in found):
        lines.append("sum: weighted by --config.distillation.task_weight and kd_weight. ±: standard error.")
    without = [each.arm.label for each in found if each.arm.has("kd_loss") and "KD" not in each.curvatures]
    if without:
        lines.append(
            f"Not measured: the curvature of the distillation loss of {', '.join(without)}. The teacher, known by its checksum,"
            " is neither in WORKDIR/teacher nor in --config.teacher.checkpoint=FOLDER."
        )
    return lines


def _landscapes(
    found: list[pictures.Landscape], arms: Sequence[Arm], images: int, data_dir: str, teacher: str
) -> Figure:
    from examples.distill import landscapes  # Few need Flax, Grain and TFDS, which take long to import.

    found += landscapes.measure(arms, images, data_dir, teacher=teacher)
    return pictures.landscapes(found)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser("python -m examples.distill.plot", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", metavar="RUNS")
    parser.add_argument("--output", default="", metavar="FOLDER", help="of the pictures")
    parser.add_argument("--landscape", action="store_true", help="draw landscapes too; takes up to minutes")
    parser.add_argument(
        "--images", type=int, default=_IMAGES, help=f"training images of a landscape (default: {_IMAGES})"
    )
    parser.add_argument("--config", default="", metavar="FILE", help="with a dataset, methods or models of your own")
    parser.add_argument("--config.dataset.data_dir", default="", dest="data_dir", metavar="FOLDER", help="of the data")
    parser.add_argument(
        "--config.teacher.checkpoint",
        default="",
        dest="teacher",
        metavar="FOLDER",
        help="of the teacher, for --landscape",
    )
    options = parser.parse_args(argv)
    if options.images < 1:
        raise UserError(f"bad --images={options.images}: give a whole number of at least 1")
    return options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(message)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
