"""The table, the notes below it and the picture, of results that no run has had."""

import io
import itertools
import math
import sys

import numpy as np
import optax
import pytest
from etils import epath
from matplotlib.image import imread

from examples.distill import methods, report
from examples.distill.configs.digits import get_config
from examples.distill.settings import validated
from examples.trainer import records
from examples.trainer.errors import UserError
from tests.tiers import slow_but

BUILT_IN = ["ce", "kd", "kd_gain_matched", "dot"]


def _results(names=BUILT_IN, scale=1.0):
    def result(name, number):
        train = {"task_loss": 0.01 * scale * number} | ({} if name == "ce" else {"kd_loss": 0.05 * scale * number})
        cost = {} if name == "ce" else {"cost": {"teacher_forwards": 0.25, "relative_flops": 0.5288}}
        return {"seconds": 12.34, "train": train, "test": {"top1": 0.9, "top5": 1.0, "count": 450}} | cost

    return {name: result(name, number) for number, name in enumerate(names, start=1)}


def _curves(names=BUILT_IN, epochs=3, scale=1.0):
    def line(name, epoch):
        return {"task_loss": scale / epoch, "kd_loss": None if name == "ce" else 5 * scale / epoch}

    return {name: [line(name, epoch) for epoch in range(1, epochs + 1)] for name in names}


def _settings(**optimizer):
    config = get_config()
    config.optimizer.update(optimizer)
    return validated(config)


@pytest.fixture
def directory(tmp_path):
    for name, result in (_results() | {"teacher": _results(["ce"])["ce"]}).items():
        (tmp_path / name).mkdir()
        records.write_json(epath.Path(tmp_path / name / "result.json"), result)
    for name, lines in _curves(epochs=240).items():
        for line in lines:
            records.append_line(epath.Path(tmp_path / name / "metrics.jsonl"), line)
    return epath.Path(tmp_path)


def test_the_table():
    assert report.table(_results(["ce", "dot"])).splitlines() == [
        "                                   CE               DOT",
        "train task loss                0.0100            0.0200",
        "train KD loss                       -            0.1000",
        "test top-1            0.9000 ± 0.0141   0.9000 ± 0.0141",
        "test top-5            1.0000 ± 0.0000   1.0000 ± 0.0000",
        "teacher forwards                    -              0.25",
        "gradient FLOPs / KD                 -              0.53",
        "seconds                          12.3              12.3",
    ]


def test_a_table_of_many_methods_goes_on_below():
    names = list(methods.METHODS)[:18]  # other tests may have registered more
    first, *others = report.table(_results(names)).split("\n\n")
    assert first == report.table(_results(names[:5]))
    assert len(others) == 3
    for part in (first, *others):
        lines = part.splitlines()
        assert len(lines) == 8 and len({len(line) for line in lines}) == 1 and len(lines[0]) <= 140


def test_what_is_said_of_methods_with_other_losses():
    assert "the plain one" not in " ".join(report.notes(_settings(), _results(["kd", "dot_projected"])))
    notes = " ".join(report.notes(_settings(), _results(["kd", "dkd_dot", "deepkd"])))
    assert "The KD loss is the plain one in every column; DKD + DOT, DeepKD minimized another" in notes
    assert "DOT's two momenta multiply" in notes


def test_a_table_of_a_method_of_ones_own(monkeypatch):
    monkeypatch.setattr(methods, "STYLES", methods.STYLES | {"mine": methods.Style("My method", "#cc79a7")})
    assert report.table(_results(["mine"])).splitlines()[0].split("  ")[-1].strip() == "My method"


def test_what_is_said_of_the_gains():
    sgd, adamw = (" ".join(report.notes(_settings(name=name), _results())) for name in ("sgd", "adamw"))
    assert "a steady task gradient by 5.71 and a KD gradient by 40, where plain momentum multiplies both by 10" in sgd
    assert "task weight and L2 x 0.571, KD weight x 4" in sgd
    assert "a steady task gradient by 0.571 and a KD gradient by 4, where AdamW multiplies both by 1" in adamw
    assert "L2" not in adamw
    muon = " ".join(report.notes(_settings(name="muon"), _results()))
    assert "a steady KD gradient by 7 times as much as a task gradient" in muon
    assert "momenta" not in " ".join(report.notes(_settings(), _results(["ce", "kd"])))


def test_what_is_said_of_sampling():
    settings = _settings()
    assert "sampled" not in " ".join(report.notes(settings, _results()))
    settings.config.sampling.update({"form": "losses", "period": 4})
    assert "--config.sampling.form=losses with a period of 4" in " ".join(report.notes(settings, _results()))


def test_a_loss_that_not_every_epoch_has(figures):
    curves = _curves(["dot"])
    curves["dot"][-1]["kd_loss"] = None  # no step of the last epoch computed it
    report.picture(curves, _results(["dot"]))
    assert len(figures[0].axes) == 3


def test_what_is_said_of_digits_is_their_configs():
    settings = _settings()
    assert report.notes(settings, _results())[-1] == settings.config.report_note
    with settings.config.unlocked():
        settings.config.report_note = ""
    notes = " ".join(report.notes(settings, _results()))
    assert "digits" not in notes and "the learning rate that is best for it" in notes
    assert len(report.notes(settings, _results(["ce"]))) == 1


@pytest.mark.parametrize("encoding", slow_but(["utf-8", "ascii", "latin-1"], "ascii"))
def test_a_terminal_that_cannot_show_everything(encoding, directory, monkeypatch):
    monkeypatch.setattr(methods, "STYLES", methods.STYLES | {"dot": methods.Style("DOT δ", "#d55e00")})
    terminal = io.TextIOWrapper(io.BytesIO(), encoding)  # which raises on what it cannot encode
    monkeypatch.setattr(sys, "stdout", terminal)
    report.write(_settings(), "digits", directory)
    terminal.flush()
    printed = terminal.buffer.getvalue().decode(encoding)
    sign = "+-" if encoding == "ascii" else "±"
    assert f"teacher: test top-1 0.9000 {sign} 0.0141\n" in printed
    assert f"   0.9000 {sign} 0.0141   0.9000 {sign} 0.0141" in printed
    assert f"One seed. The {sign} is the standard error" in printed
    assert ("DOT δ" if encoding == "utf-8" else "DOT ?") in printed
    header, *rows = printed.split("\n\n")[1].splitlines()
    assert {len(row) for row in rows} == {len(header)}


def test_the_picture_is_there_before_anything_is_printed(directory, monkeypatch):
    def broken(*values):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", broken)
    with pytest.raises(BrokenPipeError):
        report.write(_settings(), "digits", directory)
    height, width, _ = imread(directory / "losses.png").shape
    assert width > height > 100


def test_a_link_in_the_place_of_the_picture_is_not_followed(directory, tmp_path):
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / "losses.png").symlink_to(target)
    report.write(_settings(), "digits", directory)
    assert target.read_text() == "mine"
    assert not (tmp_path / "losses.png").is_symlink()
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written_leaves_nothing(directory, tmp_path):
    (tmp_path / "losses.png").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"cannot write .*losses\.png"):
        report.write(_settings(), "digits", directory)
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn."""
    drawn = []

    class Figure(report.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            drawn.append(self)

    monkeypatch.setattr(report, "Figure", Figure)
    return drawn


def test_the_values_of_the_table_are_drawn_and_named(figures):
    report.picture(_curves(["kd", "dot"]), _results(["kd", "dot"]))
    hollow = [[mark.get_xydata()[0].tolist() for mark in _ends(axes)] for axes in figures[0].axes]
    assert hollow == [[[3, 0.01], [3, 0.02]], [[3, 0.05], [3, 0.1]], [[0.01, 0.05], [0.02, 0.1]]]
    [legend] = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "KD",
        "DOT",
        "hollow: final student, evaluated: the table",
    ]


def _ends(axes):
    """The marks of the final students."""
    return [line for line in axes.lines if line.get_linestyle() == "None"]


def test_methods_can_be_told_apart_without_color(figures):
    names = list(methods.METHODS)
    assert len(names) > 2 * 8
    report.picture(_curves(names), _results(names))
    for axes in figures[0].axes:
        lines = [line for line in axes.lines if line not in _ends(axes)]
        assert len({(str(line._unscaled_dash_pattern), line.get_marker()) for line in lines}) == len(lines)
        assert [line.get_marker() for line in lines] == [mark.get_marker() for mark in _ends(axes)]
    assert list(_overlaps(figures[0])) == []


def test_lines_and_marks_come_again_late():
    assert len({report.look(i) for i in range(96)}) == 96
    assert report.look(0) == ("-", "o") and report.look(1) == ("--", "s")


def test_without_a_teacher_there_is_one_panel(figures):
    report.picture(_curves(["ce"]), _results(["ce"]))
    report.picture(_curves(["ce", "kd"]), _results(["ce", "kd"]))
    assert [len(figure.axes) for figure in figures] == [1, 3]


def _overlaps(figure):
    """Pairs of neighbouring tick labels that lie one over the other."""
    renderer = figure.canvas.get_renderer()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        shown = [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        boxes = [label.get_window_extent(renderer) for label in shown]
        assert axis.get_minor_ticks() == [] or axis.get_minorticklabels() == []
        yield from (pair for pair in itertools.pairwise(boxes) if pair[0].overlaps(pair[1]))


@pytest.mark.parametrize("epochs", [1, 2, 240])
@pytest.mark.parametrize("scale", slow_but([1e-7, 1.0, 3e4], 1.0))
def test_tick_labels_do_not_overlap(epochs, scale, figures):
    report.picture(_curves(epochs=epochs, scale=scale), _results(scale=scale))
    assert list(_overlaps(figures[0])) == []


def test_losses_that_a_logarithm_cannot_take(figures):
    curves, results = _curves(["kd", "dot"]), _results(["kd", "dot"])
    curves["kd"][1]["task_loss"], curves["dot"][1]["kd_loss"] = 0.0, -1e-9
    for result in results.values():
        result["train"] = {"task_loss": 0.0, "kd_loss": 0.0}
    report.picture(curves, results)
    for line in itertools.chain(*curves.values()):
        line["task_loss"] = 0.0
    report.picture(curves, results)
    assert all(list(_overlaps(figure)) == [] for figure in figures)


def test_a_label_is_no_formula(monkeypatch, figures):
    monkeypatch.setitem(methods.STYLES, "mine", methods.Style(r"costs $5 or $\foo", "#cc79a7"))
    report.picture(_curves(["mine"]), _results(["mine"]))


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.004, 300.0, [0.01, 0.1, 1.0, 10.0, 100.0]),
        (0.02, 3.5, [0.03, 0.1, 0.3, 1.0, 3.0]),
        (0.04, 0.6, [0.05, 0.1, 0.2, 0.5]),
        (0.015, 0.25, [0.02, 0.05, 0.1, 0.2]),
        (0.009, 0.035, [0.01, 0.015, 0.02, 0.03]),
        (0.0421, 0.0478, [0.0435, 0.045, 0.0465]),
    ],
)
def test_ticks_of_a_logarithmic_axis(low, high, ticks):
    np.testing.assert_allclose(report.log_ticks(low, high), ticks, rtol=1e-9)


@pytest.mark.parametrize("decades", range(1, 40))
def test_never_more_than_six_ticks(decades):
    low = 10.0 ** -math.floor(decades / 2)
    assert 1 <= len(report.log_ticks(low * 0.9, low * 1.1 * 10.0**decades)) <= 6


def test_a_method_of_ones_own_is_reported(directory, tmp_path, capsys, monkeypatch):
    for name in ("METHODS", "STYLES", "TRAITS"):
        monkeypatch.setattr(methods, name, getattr(methods, name).copy())
    methods.register("mine", label="My method")(lambda recipe: optax.identity())
    (tmp_path / "dot").rename(tmp_path / "mine")
    report.write(_settings(), "digits", directory)
    header = capsys.readouterr().out.split("\n\n")[1].splitlines()[0]
    assert header.split() == ["CE", "KD", "KD,", "gain-matched", "My", "method"]
