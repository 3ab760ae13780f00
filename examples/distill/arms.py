"""Runs as they lie in their folders, and arms: runs that differ in nothing but the seed. Pictures are of these.

A run that trains its own teacher trains another one for each seed. If runs had other teachers for another reason, they
are different arms.
"""

import collections
import itertools
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from examples.distill import methods
from examples.distill.report import look, positive
from examples.trainer import loop, paths, records
from examples.trainer.errors import UserError
from examples.trainer.identity import FREE_FIELDS

_OTHER_COLOR = "#7f7f7f"  # of a method that is not registered here

_WEIGHTS = frozenset(
    f"{section}.{name}"
    for section, names in {
        "distillation": ("task_weight", "kd_weight"),
        "dkd": ("task_weight", "alpha", "beta"),
        "deepkd": ("task_weight", "target_weight", "non_target_weight"),
        "crd": ("task_weight", "crd_weight"),
    }.items()
    for name in names
)
_PLAIN_WEIGHTS = ("distillation.task_weight", "distillation.kd_weight")
_TEACHER = "teacher.checksum"
_TEXT = "text.files"  # in the config of a language model
_NOT_OF_AN_ARM = ("seed", _TEACHER, *FREE_FIELDS)  # the last are written in the configs of older runs alone
_MOST_DIFFERENCES = 3  # that a label names


class Run(NamedTuple):
    """The student of a method, as a run of `python -m examples.distill` has left it, or of `examples.language_model`."""

    folder: epath.Path
    method: str
    config: records.Record  # the fields of its config, by their names on the command line
    lines: list[records.Record]  # of `metrics.jsonl`, one for each epoch
    result: records.Record  # of `result.json`; empty if the run is not finished
    trained_teacher: bool  # whether the run has trained its teacher itself

    @property
    def is_of_text(self) -> bool:
        """Whether it is one of `python -m examples.language_model`."""
        return _TEXT in self.config


class Arm(NamedTuple):
    """Runs that differ in nothing but the seed, and how they are drawn."""

    label: str
    color: str
    line: Any  # a style of lines of Matplotlib's
    marker: str
    runs: list[Run]

    @property
    def method(self) -> str:
        return self.runs[0].method

    @property
    def epochs(self) -> np.ndarray:
        """Those that all its runs have: [epochs]."""
        return np.arange(1, 1 + min(len(run.lines) for run in self.runs))

    @property
    def is_of_text(self) -> bool:
        return self.runs[0].is_of_text

    @property
    def is_finished(self) -> bool:
        return all(run.result for run in self.runs)

    def curve(self, name: str) -> np.ndarray:
        """A metric over the epochs, [epochs]: the mean over its runs, NaN where one of them has none."""
        values = [[_number(line.get(name)) for line in run.lines[: len(self.epochs)]] for run in self.runs]
        return np.mean(np.array(values, np.float64), axis=0)

    def has(self, name: str) -> bool:
        """Whether there is a metric of this name at any epoch."""
        return bool(np.isfinite(self.curve(name)).any())

    def final(self, section: str, name: str) -> tuple[float, float]:
        """The mean over its runs of a figure of `result.json`, and its standard error; NaN where there is none.

        An accuracy of a single run has the standard error that comes from the size of the split. That of a language model
        has none, since tokens that follow one another are not independent.
        """
        means = [run.result.get(section, {}) for run in self.runs]
        values = np.array([_number(of_run.get(name)) for of_run in means])
        if len(values) > 1:
            return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))
        value, count = float(values[0]), means[0].get("count")
        if not name.startswith("top") or not count or self.is_of_text:
            return value, math.nan
        return value, math.sqrt(value * (1 - value) / count)

    @property
    def family(self) -> tuple[Any, ...]:
        """What arms have in common that differ in the weights of their losses alone."""
        config = self.runs[0].config
        return (self.method, _teachers(self.runs), *_frozen({name: config[name] for name in config.keys() - _WEIGHTS}))

    @property
    def weights(self) -> tuple[Any, ...]:
        """Those of its losses."""
        return tuple(self.runs[0].config.get(name) for name in sorted(_WEIGHTS))


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of the points below and left of which there is none, from left to right: those not dominated.

    >>> front([(3, 1), (1, 3), (2, 2), (3, 3)])
    [1, 2, 0]
    """
    order = sorted(range(len(points)), key=lambda i: points[i])
    lowest = itertools.accumulate((points[i][1] for i in order), min, initial=math.inf)
    return [i for i, before in zip(order, lowest, strict=False) if points[i][1] < before]


def find(folders: Sequence[epath.PathLike]) -> tuple[list[Arm], list[str]]:
    """Returns the arms in the folders, and in words what of them is missing.

    Args:
        folders: working directories of `python -m examples.distill` or of `python -m examples.language_model`, or folders
            of single methods within them.

    Raises:
        UserError: if a folder is not there or no such folder, if nothing is logged in it, or if the runs have not all the
            same dataset and splits, or the same text.
    """
    found = [run for folder in folders for run in _runs(paths.resolve(folder, "RUNS"))]
    runs = sorted({str(run.folder): run for run in found}.values(), key=_place)  # each once
    _check_dataset(runs)
    arms = _arms(runs)
    notes = [_unfinished(run) for run in runs if not run.result]
    for arm in arms:
        lengths = sorted({len(run.lines) for run in arm.runs})
        if len(lengths) > 1:
            notes.append(
                f"{arm.label}: its runs have {lengths[0]} to {lengths[-1]} epochs; the first {lengths[0]} are drawn."
            )
    return arms, notes


def _place(run: Run) -> tuple[int, float]:
    """By which runs are in order: by method, and by the weight of the distillation loss."""
    order = list(methods.METHODS)
    place = order.index(run.method) if run.method in order else len(order)
    return place, run.config.get("distillation.kd_weight", 0.0)


def _unfinished(run: Run) -> str:
    return (
        f"{run.folder} is not finished: the {len(run.lines)} of {run.config['epochs']} epochs that it has are drawn, and no"
        " final student."
    )


def _runs(folder: epath.Path) -> list[Run]:
    """Those in a working directory, or the one in the folder of a method."""
    with records.reading(folder):
        is_there, is_workdir = folder.is_dir(), (folder / "config.json").exists()
        workdir = folder if is_workdir else folder.parent
        candidates = sorted(folder.iterdir()) if is_workdir else [folder]
        jobs = [job for job in candidates if job.name != "teacher" and (job / "metrics.jsonl").exists()]
        has_config = (workdir / "config.json").exists()
    if not is_there:
        raise UserError(f"there is no folder RUNS={folder}; give a --workdir of python -m examples.distill")
    if not jobs or not has_config:
        raise UserError(
            f"no student is logged in RUNS={folder}: give a --workdir of python -m examples.distill in which one has begun,"
            " or the folder of a method in one"
        )
    config = records.read_json(workdir / "config.json")
    if not {"dataset.name", _TEXT} & config.keys() or "epochs" not in config:
        raise UserError(
            f"RUNS={folder} is no run of python -m examples.distill or examples.language_model: its config.json names no"
            " dataset and no text"
        )
    runs = [_read(job, config) for job in jobs]
    logged = [run for run in runs if run.lines]
    if not logged:
        raise UserError(f"no epoch is finished yet in RUNS={folder}: {jobs[0] / 'metrics.jsonl'} is empty")
    return logged


def _read(folder: epath.Path, config: records.Record) -> Run:
    log = folder / "metrics.jsonl"
    lines = records.read_lines(log, records.count_lines(log), ("task_loss", "kd_loss"))
    result = records.read_json(folder / "result.json", ("test.top1",)) if loop.is_finished(folder) else {}
    trained_teacher = (folder.parent / "teacher" / "metrics.jsonl").exists()
    return Run(folder, folder.name, config, lines, result, trained_teacher)


def _check_dataset(runs: Sequence[Run]) -> None:
    kinds = {run.is_of_text: run.folder for run in runs}
    if len(kinds) > 1:
        raise UserError(f"RUNS are of text in {kinds[True]} and of images in {kinds[False]}; draw them one by one")
    for field in ("dataset.name", "dataset.train", "dataset.test", _TEXT, "text.tokenizer", "text.test_percent"):
        values = {run.config.get(field): run.folder for run in runs}
        if len(values) > 1:
            listed = ", ".join(f"{value} in {folder}" for value, folder in values.items())
            raise UserError(f"RUNS differ in --config.{field}: {listed}; draw those of one dataset at a time")


def _arms(runs: Sequence[Run]) -> list[Arm]:
    similar: dict[Any, list[Run]] = collections.defaultdict(list)
    for run in runs:
        similar[_but_for_teacher(run)].append(run)
    groups: dict[Any, list[Run]] = collections.defaultdict(list)
    for run in runs:
        # All have one teacher, or each one that its seed has made; else those with the same teacher belong together.
        others = similar[_but_for_teacher(run)]
        is_of_seed = all(other.trained_teacher for other in others)
        same = groups[_but_for_teacher(run), None if is_of_seed else run.config.get(_TEACHER)]
        # The same seed again is another run for a reason that its config does not say.
        is_again = run.config.get("seed") in {other.config.get("seed") for other in same}
        (groups[run.folder, None] if is_again else same).append(run)
    labels = _labels([group[0] for group in groups.values()])
    return [
        Arm(
            f"{label} ({len(group)} seeds)" if len(group) > 1 else label,
            methods.STYLES[group[0].method].color if group[0].method in methods.STYLES else _OTHER_COLOR,
            *look(i),
            group,
        )
        for i, (label, group) in enumerate(zip(labels, groups.values(), strict=True))
    ]


def _labels(runs: Sequence[Run]) -> list[str]:
    """A label for each run, all different: that of the method, and what of the config tells it from others of that method."""
    labels = [_label(run, [other.config for other in runs if other.method == run.method]) for run in runs]
    teachers: dict[str, list[Any]] = collections.defaultdict(list)
    for label, run in zip(labels, runs, strict=True):
        teachers[label].append(run.config.get(_TEACHER))
    labels = [
        f"{label}, teacher {run.config.get(_TEACHER)}" if len(set(teachers[label])) > 1 else label
        for label, run in zip(labels, runs, strict=True)
    ]
    for name in (lambda run: run.folder.parent.name, lambda run: str(run.folder)):
        counts = collections.Counter(labels)
        labels = [
            f"{label} ({name(run)})" if counts[label] > 1 else label for label, run in zip(labels, runs, strict=True)
        ]
    return labels


def _label(run: Run, configs: Collection[records.Record]) -> str:
    label = methods.STYLES[run.method].label if run.method in methods.STYLES else run.method
    differing = [name for name in run.config if name not in _NOT_OF_AN_ARM and len(set(_values(configs, name))) > 1]
    others = [name for name in differing if name not in _PLAIN_WEIGHTS]
    if others != differing:
        label = f"{label} {' : '.join(f'{run.config[name]:g}' for name in _PLAIN_WEIGHTS)}"
    shown = [_difference(name, run.config[name], others) for name in others if not _is_usual(run, name, configs)]
    return ", ".join([label, *shown[:_MOST_DIFFERENCES]])


def _is_usual(run: Run, name: str, configs: Collection[records.Record]) -> bool:
    """Whether a value is no number, and most of the others have it: then only those with another one say so."""
    value = run.config[name]
    (most, _), *_ = collections.Counter(_values(configs, name)).most_common(1)
    return isinstance(value, (str, bool)) and repr(value) == most


def _difference(name: str, value: Any, differing: Collection[str]) -> str:
    if isinstance(value, str) and value:
        return value
    short = name.rpartition(".")[2]
    is_unique = [other.rpartition(".")[2] for other in differing].count(short) == 1
    return f"{short if is_unique else name} {value}"


def _but_for_teacher(run: Run) -> tuple[Any, ...]:
    """What runs have in common that differ in the seed alone, or in the teacher."""
    return (run.method, *_frozen(run.config))


def _teachers(runs: Sequence[Run]) -> frozenset[Any]:
    return frozenset(run.config.get(_TEACHER) for run in runs)


def _values(configs: Collection[records.Record], name: str) -> list[str]:
    return [repr(config.get(name)) for config in configs]


def _frozen(config: records.Record) -> tuple[tuple[str, str], ...]:
    """A config as something that a dict can have as a key."""
    return tuple(sorted((name, repr(value)) for name, value in config.items() if name not in _NOT_OF_AN_ARM))


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def logarithmic(values: np.ndarray) -> np.ndarray:
    """The values, NaN where a logarithmic axis cannot show them."""
    return np.array([positive(value) for value in values])
