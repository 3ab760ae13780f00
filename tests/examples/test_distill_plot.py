"""The pictures of finished runs: what is read, what is drawn of it, and how a run that cannot be drawn is refused."""

import functools
import itertools
import json
import math

import jax
import jax.flatten_util
import matplotlib
import numpy as np
import optax
import pytest
from etils import epath
from flax import nnx
from matplotlib.text import Text

import dot_optax
from examples.distill import arms as reading
from examples.distill import methods, pictures, plot
from examples.distill.configs.digits import get_config
from examples.trainer import settings
from examples.trainer.errors import UserError

METHODS = ("ce", "kd", "kd_gain_matched", "dot")
CONFIG = {
    "dataset.name": "sklearn_digits",
    "dataset.test": "train[1350:]",
    "dataset.train": "train[:900]",
    "distillation.kd_weight": 0.9,
    "distillation.task_weight": 0.1,
    "epochs": 12,
    "optimizer.learning_rate": 0.01,
    "optimizer.name": "sgd",
    "sampling.form": "none",
    "seed": 0,
}


def _write(workdir, names=METHODS, *, scale=1.0, epochs=12, finished=True, diagnostics=False, cost=1.0, **fields):
    """A working directory of made-up runs; the losses are `scale` / epoch, and so on."""
    workdir.mkdir(parents=True, exist_ok=True)
    config = CONFIG | {name.replace("__", "."): value for name, value in fields.items()}
    (workdir / "config.json").write_text(json.dumps(config))
    for number, method in enumerate(names, start=1):
        has_kd = method != "ce"
        lines = []
        for epoch in range(1, epochs + 1):
            line = {"task_loss": scale * number / epoch, "kd_loss": 5 * scale * number / epoch**2 if has_kd else None}
            line |= {"task_grad_norm": 1 / epoch, "kd_grad_norm": 2 / epoch if has_kd else None}
            line |= {"grad_cosine": math.cos(epoch) if has_kd else None, "seconds": 1.0 * epoch}
            if diagnostics and has_kd:
                line |= dict.fromkeys(("grad_conflict", "task_share", "kd_share"), 0.5)
                line |= dict.fromkeys(("task_snr", "kd_snr", "update_to_weight", "task_rate", "kd_rate"), 0.1 * number)
                line |= {"task_gain": 10.0, "kd_gain": 20.0, "grad_cosine/a/conv": 0.5, "grad_cosine/b": -1 / epoch}
            lines.append(json.dumps(line) + "\n")
        (workdir / method).mkdir(exist_ok=True)
        (workdir / method / "metrics.jsonl").write_text("".join(lines))
        if finished:
            train = {"task_loss": 0.01 * scale * number} | ({"kd_loss": 0.05 * scale / number} if has_kd else {})
            result = {
                "epochs": epochs,
                "cost": {"teacher_forwards": 1.0 if has_kd else 0.0, "relative_flops": cost},
                "train": train,
                "test": {"top1": 0.9 + 0.01 * number * scale, "count": 450},
            }
            (workdir / method / "result.json").write_text(json.dumps(result))
    return workdir


def _weights(folder):
    """KD with four weights: the third of these is beaten by the second in both losses."""
    for weight, (task, kd) in {0.5: (0.01, 0.09), 0.7: (0.02, 0.05), 0.8: (0.03, 0.06), 0.9: (0.04, 0.01)}.items():
        weights = {"distillation__kd_weight": weight, "distillation__task_weight": round(1 - weight, 2)}
        result = _write(folder / f"kd_{weight}", ["kd"], **weights) / "kd" / "result.json"
        result.write_text(json.dumps(json.loads(result.read_text()) | {"train": {"task_loss": task, "kd_loss": kd}}))
    return sorted(folder.glob("kd_*"))


@pytest.fixture
def drawn():
    """Draws within the settings that files have."""
    with pictures.style():
        yield


def _labels(*folders):
    return [arm.label for arm in reading.find(folders)[0]]


def test_a_working_directory_or_the_folder_of_a_method(tmp_path):
    workdir = _write(tmp_path / "run", ["dot", "ce", "kd"])
    (workdir / "teacher").mkdir()
    (workdir / "teacher" / "metrics.jsonl").write_text('{"task_loss": 1.0}\n')
    assert _labels(workdir) == _labels(workdir, workdir / "dot") == ["CE", "KD", "DOT"]
    assert _labels(workdir / "dot", workdir / "ce") == ["CE", "DOT"]


def test_what_tells_arms_of_a_method_apart_stands_in_their_labels(tmp_path):
    assert _labels(*_weights(tmp_path)) == ["KD 0.5 : 0.5", "KD 0.3 : 0.7", "KD 0.2 : 0.8", "KD 0.1 : 0.9"]
    one, other = _write(tmp_path / "a", ["kd", "dot"]), _write(tmp_path / "b", ["dot"], optimizer__learning_rate=0.05)
    assert _labels(one, other) == ["KD", "DOT, learning_rate 0.01", "DOT, learning_rate 0.05"]
    sampled = _write(tmp_path / "c", ["dot"], optimizer__learning_rate=0.05, sampling__form="alternating")
    assert _labels(one, other, sampled)[1:] == [
        "DOT, learning_rate 0.01",
        "DOT, learning_rate 0.05",
        "DOT, learning_rate 0.05, alternating",
    ]


def test_the_same_run_in_two_folders_is_told_apart_by_these(tmp_path):
    assert _labels(_write(tmp_path / "a", ["dot"]), _write(tmp_path / "b", ["dot"])) == ["DOT (a)", "DOT (b)"]
    twice = [_write(tmp_path / place / "run", ["dot"]) for place in ("x", "y")]
    assert _labels(*twice) == [f"DOT (run) ({folder / 'dot'})" for folder in twice]


def test_seeds_are_one_arm(tmp_path):
    folders = [_write(tmp_path / str(seed), ["kd"], scale=1.0 + seed, seed=seed) for seed in range(3)]
    [arm], _ = reading.find(folders)
    assert arm.label == "KD (3 seeds)"
    np.testing.assert_allclose(arm.curve("task_loss"), 2.0 / arm.epochs)
    # Of 0.91, 0.92, 0.93 the standard deviation is 0.01.
    np.testing.assert_allclose(arm.final("test", "top1"), (0.92, 0.01 / math.sqrt(3)))


def test_what_is_logged_does_not_tell_arms_apart(tmp_path):
    """Layers are drawn over the epochs at which all seeds have them; older runs wrote down the flag."""
    one, other = _write(tmp_path / "0", ["kd"], diagnostics=True), _write(tmp_path / "1", ["kd"], seed=1)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"diagnostics_by": "all"}))
    lines = [json.loads(line) for line in (one / "kd" / "metrics.jsonl").read_text().splitlines()]
    without = [{name: value for name, value in line.items() if "/" not in name} for line in lines[:4]]
    for run in (one, other):
        log = run / "kd" / "metrics.jsonl"
        log.write_text("".join(json.dumps(line) + "\n" for line in without + lines[4:]))
    [arm], _ = reading.find([one, other])
    assert arm.label == "KD (2 seeds)"
    np.testing.assert_array_equal(np.isfinite(arm.curve("grad_cosine/b")), np.arange(12) >= 4)
    [drawn, _] = pictures.layers([arm]).axes
    np.testing.assert_array_equal(drawn.collections[0].get_array().mask, np.tile(np.arange(12) < 4, (2, 1)))


def _with_teachers(folder, checksums, trained):
    """A run of KD for each teacher; those that are in `trained` trained it."""
    for seed, checksum in enumerate(checksums):
        run = _write(folder / str(seed), ["kd"], seed=seed, teacher__checksum=checksum)
        (run / "teacher").mkdir()
        if seed in trained:
            (run / "teacher" / "metrics.jsonl").write_text('{"task_loss": 1.0}\n')
    return sorted(folder.iterdir())


def test_teachers_that_differ(tmp_path):
    assert _labels(*_with_teachers(tmp_path / "each", [7, 8, 9], {0, 1, 2})) == ["KD (3 seeds)"]
    assert _labels(*_with_teachers(tmp_path / "one", [7, 7, 7], {0})) == ["KD (3 seeds)"]
    # Seed 1 got the teacher from elsewhere, so it is not known what else made that teacher another one.
    apart = _labels(*_with_teachers(tmp_path / "given", [7, 8, 7], {0}))
    assert apart == ["KD, teacher 7 (2 seeds)", "KD, teacher 8"]


def test_a_single_seed_has_the_standard_error_of_the_split(tmp_path):
    [arm], _ = reading.find([_write(tmp_path / "run", ["kd"])])
    np.testing.assert_allclose(arm.final("test", "top1"), (0.91, math.sqrt(0.91 * 0.09 / 450)))
    assert math.isnan(arm.final("train", "kd_loss")[1])


def test_a_method_that_is_not_registered(tmp_path):
    assert "mine" not in methods.METHODS
    assert _labels(_write(tmp_path / "run", ["mine", "kd"])) == ["KD", "mine"]


def test_runs_that_cannot_be_drawn(tmp_path):
    def refused(*folders):
        with pytest.raises(UserError) as error:
            reading.find(folders)
        return str(error.value)

    run = _write(tmp_path / "run")
    assert refused(tmp_path / "none") == (
        f"there is no folder RUNS={tmp_path / 'none'}; give a --workdir of python -m examples.distill"
    )
    assert f"no student is logged in RUNS={tmp_path}:" in refused(tmp_path)
    (run / "empty").mkdir()
    assert f"no student is logged in RUNS={run / 'empty'}:" in refused(run, run / "empty")
    (tmp_path / "lost" / "dot").mkdir(parents=True)
    (tmp_path / "lost" / "dot" / "metrics.jsonl").write_text('{"task_loss": 1.0, "kd_loss": 1.0}\n')
    assert "no student is logged" in refused(tmp_path / "lost" / "dot")  # Whose run it is, nobody knows.
    assert "no epoch is finished yet" in refused(_write(tmp_path / "begun", ["dot"], epochs=0, finished=False))
    other = _write(tmp_path / "other", dataset__name="fashion_mnist_idx")
    assert refused(run, other) == (
        f"RUNS differ in --config.dataset.name: sklearn_digits in {run / 'dot'}, fashion_mnist_idx in {other / 'dot'};"
        " draw those of one dataset at a time"
    )
    fewer = _write(tmp_path / "fewer", ["dot"], dataset__train="train[:100]")
    assert refused(run / "dot", fewer) == (
        f"RUNS differ in --config.dataset.train: train[:900] in {run / 'dot'}, train[:100] in {fewer / 'dot'};"
        " draw those of one dataset at a time"
    )
    text = tmp_path / "text"
    _write(text)
    (text / "config.json").write_text('{"epochs": 12}')
    assert "is no run of python -m examples.distill or examples.language_model: its config.json" in refused(text)
    (text / "config.json").write_text('{"epochs": 12, "text.files": "*.py"}')
    assert refused(run / "kd", text / "dot") == (
        f"RUNS are of text in {text / 'dot'} and of images in {run / 'kd'}; draw them one by one"
    )
    (run / "dot" / "metrics.jsonl").write_text("{")
    assert "is damaged" in refused(run)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: RUNS"),
        (["run", "--images=0"], "bad --images=0: give a whole number of at least 1"),
        (["run", "--landscapes"], "unrecognized arguments: --landscapes"),
        (["none"], "there is no folder RUNS="),
        (["none", "--config=none"], "there is no --config=none"),
    ],
)
def test_errors_are_one_line(argv, message, capsys):
    assert plot.main(argv) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"error: {message}") and printed.err.count("\n") == 1


def test_temperatures_that_differ(tmp_path):
    folders = [_write(tmp_path / str(t), ["kd"], distillation__temperature=t) for t in (2.0, 4.0)]
    [note] = [line for line in plot.notes(reading.find(folders)[0]) if "temperature" in line]
    assert note.startswith("Do not compare the distillation losses") and "2, 4" in note
    assert not [line for line in plot.notes(reading.find(folders[:1])[0]) if "temperature" in line]


def _lines(axes):
    return [line for line in axes.lines if not line.get_label().startswith("_")]


def _texts(figure):
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


def _names(axes):
    """Where the names in a panel lie, without the lines that lead to them."""
    return {text.get_text(): Text.get_window_extent(text) for text in axes.texts if text.get_text()}


def _assert_readable(figure):
    """No name over another one or outside, no legend over a panel, no letter below nine points at the width of a README."""
    figure.draw_without_rendering()
    size = figure.bbox
    for axes in figure.axes:
        boxes = list(_names(axes).values())
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
        for box in boxes:
            assert size.x0 <= box.x0 and box.x1 <= size.x1 and size.y0 <= box.y0 and box.y1 <= size.y1
        for legend in figure.legends:
            assert not legend.get_window_extent().overlaps(axes.get_tightbbox())
    assert figure.get_figwidth() * 96 <= 850
    assert min(text.get_fontsize() for text in _texts(figure)) >= 9


def _assert_told_apart(lines):
    """By line and mark alone, which remain in gray."""
    assert len({(str(line._unscaled_dash_pattern), line.get_marker()) for line in lines}) == len(lines)


def test_the_losses(tmp_path, drawn):
    arms, _ = reading.find([_write(tmp_path / "run")])
    figure = pictures.losses(arms)
    assert [axes.get_title() for axes in figure.axes] == [
        "Task loss while training",
        "Distillation loss while training",
    ]
    task, kd = map(_lines, figure.axes)
    assert [line.get_label() for line in task] == ["CE", "KD", "KD, gain-matched", "DOT"]
    assert [line.get_label() for line in kd] == ["KD", "KD, gain-matched", "DOT"]
    np.testing.assert_allclose(task[1].get_xydata(), [(epoch, 2 / epoch) for epoch in range(1, 13)])
    np.testing.assert_allclose(kd[0].get_ydata(), [10 / epoch**2 for epoch in range(1, 13)])
    _assert_told_apart(task)
    assert set(_names(figure.axes[1])) == {"KD", "KD, gain-matched", "DOT"} and not figure.legends
    _assert_readable(figure)


def test_names_stand_where_their_lines_end(tmp_path, drawn):
    arms, _ = reading.find([_write(tmp_path / "run")])
    axes = pictures.losses(arms).axes[0]
    by_name = sorted(_names(axes), key=lambda name: _names(axes)[name].y0)
    by_end = sorted(_lines(axes), key=lambda line: line.get_ydata()[-1])
    assert by_name == [line.get_label() for line in by_end]


def test_names_are_apart_and_near_their_lines():
    assert pictures.spread([0.4, 0.5, 1.0], gap=0.2) == [0.35, 0.55, 1.0]
    assert pictures.spread([0.0, 0.0, 0.9], gap=0.2) == [0.0, 0.2, 0.9]  # none below the panel
    assert pictures.spread([1.0, 1.0], gap=0.2) == [0.8, 1.0]
    assert pictures.spread([], gap=0.2) == []


def test_many_arms_have_a_legend(tmp_path, drawn):
    folders = [_write(tmp_path / str(i), ["kd", "dot"], optimizer__learning_rate=0.01 * i) for i in range(1, 7)]
    arms, _ = reading.find(folders)
    assert len(arms) == 12
    figure = pictures.losses(arms)
    _assert_told_apart(_lines(figure.axes[0]))
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [arm.label for arm in arms]
    _assert_readable(figure)


def test_the_plane(tmp_path, drawn):
    arms, _ = reading.find([_write(tmp_path / "run")])
    figure = pictures.plane(arms)
    paths, ends = figure.axes
    [kd, _, dot] = _lines(paths)  # Without a distillation loss, CE is at no place.
    assert kd.get_label() == "KD" and dot.get_label() == "DOT"
    np.testing.assert_allclose(kd.get_xydata(), [(2 / epoch, 10 / epoch**2) for epoch in range(1, 13)])
    starts = [line.get_xydata()[0].tolist() for line in paths.lines if line.get_markerfacecolor() == "white"]
    assert starts == [[2.0, 10.0], [3.0, 15.0], [4.0, 20.0]]
    assert [line.get_xydata()[0].tolist() for line in _lines(ends)] == [[0.02, 0.025], [0.03, 0.05 / 3], [0.04, 0.0125]]
    assert set(_names(ends)) == {"KD", "KD, gain-matched", "DOT"}
    _assert_readable(figure)


def test_arrows_point_along_the_paths(tmp_path, drawn):
    arms, _ = reading.find([_write(tmp_path / "run", ["kd"])])
    axes = pictures.plane(arms).axes[0]
    [arrow] = [line for line in axes.lines if not isinstance(line.get_marker(), str)]
    (x, y), path = arrow.get_xydata()[0], _lines(axes)[0].get_xydata().tolist()
    assert path[0] != [x, y] != path[-1]
    tail, tip, *_ = arrow.get_marker().vertices
    assert tip[0] < tail[0] and tip[1] < tail[1]  # to lower losses


def test_an_arrow_is_not_at_the_end_of_a_short_path(tmp_path, drawn):
    arms, _ = reading.find([_write(tmp_path / "run", ["kd"], epochs=2)])
    axes = pictures.plane(arms).axes[0]
    [arrow] = [line for line in axes.lines if not isinstance(line.get_marker(), str)]
    start, end = _lines(axes)[0].get_xydata()
    [place] = arrow.get_xydata()
    # The axes are logarithmic.
    np.testing.assert_allclose(np.log(place / start) / np.log(end / start), 0.3, rtol=1e-6)  # pixels are floats


def test_a_name_without_a_line_is_nearest_to_its_own_mark(tmp_path, drawn):
    near = {1.0: (0.010, 0.010), 2.0: (0.0102, 0.0101), 3.0: (0.011, 0.0095), 4.0: (0.03, 0.03), 5.0: (0.012, 0.012)}
    folders = []
    for weight, (task, kd) in near.items():
        folders.append(_write(tmp_path / str(weight), ["kd"], distillation__kd_weight=weight))
        result = folders[-1] / "kd" / "result.json"
        result.write_text(json.dumps(json.loads(result.read_text()) | {"train": {"task_loss": task, "kd_loss": kd}}))
    figure = pictures.plane(reading.find(folders)[0])
    figure.draw_without_rendering()  # which places the names
    axes = figure.axes[1]
    marks = {line.get_label(): axes.transData.transform(line.get_xydata()[0]) for line in _lines(axes)}
    bare = [text for text in axes.texts if text.arrow_patch is None]
    assert "KD 0.1 : 4" in [text.get_text() for text in bare] and len(bare) < len(axes.texts) == len(near)
    for text in bare:
        box = Text.get_window_extent(text)
        gaps = {name: np.hypot(*(mark - np.clip(mark, box.min, box.max))) for name, mark in marks.items()}
        assert min(gaps, key=gaps.get) == text.get_text()
    hollow = [line.get_label() for line in _lines(axes) if line.get_markerfacecolor() == "none"]
    assert {"KD 0.1 : 1", "KD 0.1 : 2"} <= set(hollow) and "KD 0.1 : 4" not in hollow


def test_the_front_over_weights(tmp_path, drawn):
    arms, _ = reading.find([*_weights(tmp_path), _write(tmp_path / "dot", ["dot"])])
    figure = pictures.plane(arms)
    [front] = [line for line in figure.axes[1].lines if line.get_linewidth() == 4]
    np.testing.assert_allclose(front.get_xydata(), [(0.01, 0.09), (0.02, 0.05), (0.04, 0.01)])
    assert "front over the weights of KD" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert not [line for line in figure.axes[0].lines if line.get_linewidth() == 4]
    _assert_readable(figure)


def test_no_front_where_one_student_beats_all(tmp_path, drawn):
    folders = [
        _write(tmp_path / str(weight), ["kd"], scale=weight, distillation__kd_weight=weight) for weight in (0.5, 0.9)
    ]
    arms, _ = reading.find(folders)
    figure = pictures.plane(arms)
    assert not [line for line in figure.axes[1].lines if line.get_linewidth() == 4]
    assert "No front over weights: KD 0.1 : 0.5 beats the other weights in both losses." in plot.notes(arms)


def test_one_weight_has_no_front(tmp_path):
    arms, _ = reading.find([_write(tmp_path / name, ["kd"]) for name in "ab"])
    assert len(arms) == 2 and pictures.fronts(arms) == []


def test_points_on_no_front():
    assert reading.front([(1.0, 1.0), (2.0, 2.0)]) == [0]
    assert reading.front([(2.0, 1.0), (1.0, 2.0), (2.0, 3.0)]) == [1, 0]
    assert reading.front([(1.0, 1.0), (1.0, 1.0)]) == [0]


def test_gradients(tmp_path, drawn):
    arms, _ = reading.find([_write(tmp_path / "run")])
    figure = pictures.gradients(arms)
    assert [axes.get_title() for axes in figure.axes] == ["Norm of gradient", "Cosine between gradients"]
    task, kd = (_lines(figure.axes[0])[part] for part in (slice(0, 4), slice(4, 7)))
    assert [line.get_label() for line in task] == ["CE", *(line.get_label() for line in kd)]
    assert [line.get_label() for line in kd] == ["KD", "KD, gain-matched", "DOT"]
    np.testing.assert_allclose(kd[0].get_ydata(), 2 / np.arange(1, 13))
    np.testing.assert_allclose(_lines(figure.axes[1])[0].get_ydata(), np.cos(np.arange(1, 13)))
    # Both losses of an arm have its line and mark; that of distillation is hollow.
    assert {line.get_markerfacecolor() for line in kd} == {"white"}
    assert all(line.get_markerfacecolor() == line.get_color() for line in task)
    assert [(line.get_marker(), line.get_color()) for line in kd] == [
        (line.get_marker(), line.get_color()) for line in task[1:]
    ]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["CE", "KD", "KD, gain-matched", "DOT", "task loss", "KD loss"]
    _assert_readable(figure)


def test_three_losses_share_the_panels(tmp_path, drawn):
    run = _write(tmp_path / "run", ["deepkd"])
    losses = ("task", "target", "non_target")
    pairs = ("task_and_target", "task_and_non_target", "target_and_non_target")
    names = [f"{loss}_{what}" for loss in losses for what in ("grad_norm", "share", "rate", "scale_invariant_rate")]
    line = dict.fromkeys(names, 0.5) | {f"{pair}_grad_cosine": 0.1 for pair in pairs}
    line |= {f"{pair}_grad_cosine/conv": 0.1 for pair in pairs} | {"task_loss": 1.0, "kd_loss": 1.0}
    line |= {"update_to_weight/old_weight": 0.1, "task_grad_norm/a_gain": 0.1}  # layers whose names end like metrics
    (run / "deepkd" / "metrics.jsonl").write_text(12 * (json.dumps(line) + "\n"))
    arms, _ = reading.find([run])
    figure = pictures.gradients(arms)
    counts = {axes.get_title(): len(_lines(axes)) for axes in figure.axes}
    titles = ("Norm of gradient", "Cosine between gradients", "Share of the update", "Effective learning rate")
    assert counts == dict.fromkeys((*titles, "Rate of scale-invariant weights"), 3)
    marks = {(line.get_fillstyle(), line.get_markerfacecolor()) for axes in figure.axes[:2] for line in _lines(axes)}
    assert len(marks) == 6
    _assert_readable(figure)
    titles = [axes.get_title() for axes in pictures.layers(arms).axes[:3]]
    assert titles == ["DeepKD\ntask and target", "DeepKD\ntask and non target", "DeepKD\ntarget and non target"]


def test_layers(tmp_path, drawn):
    assert pictures.layers(reading.find([_write(tmp_path / "without")])[0]) is None
    arms, _ = reading.find([_write(tmp_path / "run", ["ce", "kd", "dot"], epochs=120, diagnostics=True)])
    figure = pictures.layers(arms)
    kd, dot, bar = figure.axes
    assert [kd.get_title(), dot.get_title()] == ["KD", "DOT"] and "a dash are below 0" in bar.get_xlabel()
    assert [label.get_text() for label in kd.get_yticklabels()] == ["a/conv", "b"] and kd.yaxis_inverted()
    values = kd.collections[0].get_array()
    assert values.shape == (2, 40) and (values[0] == 0.5).all()  # means over 3 epochs
    np.testing.assert_allclose(values[1, 0], -(1 + 1 / 2 + 1 / 3) / 3)
    [dashes] = kd.lines
    np.testing.assert_allclose(dashes.get_xydata(), [(2.0 + 3 * i, 1) for i in range(40)])  # in the middle of the means
    _assert_readable(figure)


@pytest.mark.slow
def test_gradients_with_diagnostics(tmp_path, drawn):
    arms, _ = reading.find([_write(tmp_path / "run", diagnostics=True)])
    figure = pictures.gradients(arms)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        "Norm of gradient",
        "Cosine between gradients",
        "Steps whose gradients conflict",
        "Share of the update",
        "Signal to noise",
        "Norm of update / of weights",
        "Gain of momentum",
        "Effective learning rate",
    ]
    _assert_readable(figure)
    assert plot.notes(arms) == []


def test_a_ratio_of_signal_to_noise_may_be_zero(tmp_path, drawn):
    run = _write(tmp_path / "run", ["kd"])
    log = run / "kd" / "metrics.jsonl"
    lines = [json.loads(line) | {"kd_snr": 0.0} for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    axes = pictures.gradients(reading.find([run])[0]).axes[-1]
    assert axes.get_title() == "Signal to noise"
    np.testing.assert_array_equal(_lines(axes)[0].get_ydata(), np.zeros(12))
    assert len(_ticks(axes.yaxis)) >= 3


def _ticks(axis):
    low, high = axis.get_view_interval()
    return [tick for tick in axis.get_majorticklocs() if low <= tick <= high]


def test_axes_of_ratios_and_rates(tmp_path, drawn):
    figure = pictures.gradients(reading.find([_write(tmp_path / "run", ["kd", "dot"], diagnostics=True)])[0])
    axes = {axes.get_title(): axes for axes in figure.axes}
    ratio = axes["Signal to noise"]
    assert ratio.get_yscale() == "log" and len(_ticks(ratio.yaxis)) >= 3
    assert axes["Steps whose gradients conflict"].get_ylim() == (-0.02, 1.02)


def test_noisy_curves_are_means_over_some_epochs(tmp_path, drawn):
    arms, _ = reading.find([_write(tmp_path / "run", ["kd"], epochs=120)])
    axes = pictures.gradients(arms).axes[0]
    assert axes.get_xlabel() == "epoch (means over 3)"
    line, _ = _lines(axes)
    assert line.get_xydata()[0].tolist() == [2.0, pytest.approx((1 + 1 / 2 + 1 / 3) / 3)]
    assert len(line.get_xdata()) == 40


def test_cost(tmp_path, drawn):
    folders = [_write(tmp_path / "a", ["ce", "kd"]), _write(tmp_path / "b", ["dot"], cost=0.5)]
    arms, _ = reading.find(folders)
    figure = pictures.cost(arms)
    assert [axes.get_title() for axes in figure.axes] == ["Gradient FLOPs", "Forward passes of the teacher"]
    flops = {line.get_label(): line.get_xydata()[0] for line in _lines(figure.axes[0])}
    np.testing.assert_allclose(flops["DOT"], (0.5 * 12, 0.91))
    # CE and KD cost 12 epochs each, and are beside one another.
    assert flops["CE"][0] < 12 < flops["KD"][0] < 12.5
    error = math.sqrt(0.91 * 0.09 / 450)
    bar = figure.axes[0].collections[-1].get_segments()[0]
    np.testing.assert_allclose(bar[:, 1], (0.91 - error, 0.91 + error))
    _assert_readable(figure)


def test_a_cost_that_is_the_same_for_all_is_not_drawn(tmp_path, drawn):
    arms, _ = reading.find([_write(tmp_path / "a", ["kd"]), _write(tmp_path / "b", ["dot"], cost=0.5)])
    assert [axes.get_title() for axes in pictures.cost(arms).axes] == ["Gradient FLOPs"]


@pytest.mark.slow
def test_many_names_find_room(tmp_path, drawn):
    """Also where all points lie close to one another."""
    folders = [
        _write(tmp_path / str(i), ["kd"], scale=1 + 0.001 * i, distillation__kd_weight=0.9 + 0.01 * i) for i in range(8)
    ]
    arms, _ = reading.find(folders)
    for figure in (pictures.plane(arms), pictures.cost(arms)):
        assert len(_names(figure.axes[-1])) == 8
        _assert_readable(figure)


def test_an_unfinished_run_is_drawn_as_far_as_it_is(tmp_path, drawn):
    run = _write(tmp_path / "run", ["dot"], epochs=5, finished=False)
    arms, notes = reading.find([run])
    assert notes == [f"{run / 'dot'} is not finished: the 5 of 12 epochs that it has are drawn, and no final student."]
    assert len(_lines(pictures.losses(arms).axes[0])[0].get_xdata()) == 5
    assert len(pictures.plane(arms).axes) == 1
    assert pictures.cost(arms) is None
    assert "Not drawn: accuracy against cost, since no run is finished." in plot.notes(arms)
    with pytest.raises(
        UserError, match="--landscape needs the final weights of a student, and none of RUNS is finished"
    ):
        plot.plot([run], landscape=True)


def test_without_a_teacher(tmp_path, drawn):
    run = _write(tmp_path / "run", ["ce"])
    arms, _ = reading.find([run])
    assert len(pictures.losses(arms).axes) == 1 and pictures.plane(arms) is None
    lines = plot.notes(arms)
    assert "Not drawn: the distillation loss and the loss plane, since no run had a teacher." in lines
    assert "Not drawn, since no log has them: kd_grad_norm, grad_cosine; see --config.gradient_metrics." in lines


def test_landscapes(tmp_path, drawn):
    distances = np.linspace(-1, 1, 21)
    around = np.add.outer(distances**2, distances**2)
    arms, _ = reading.find([_write(tmp_path / "run", ["ce", "kd", "dot"])])
    losses = (0.01 + around, 0.02 + 4 * around, np.where(around < 1, 0.01 + around, np.nan))
    curvatures = {"task": pictures.Curvature(4.0, 12.5, 0.5), "sum": pictures.Curvature(math.nan, 25.0, 1.0)}
    found = [
        pictures.Landscape(arm, distances, values, 512, of_arm)
        for arm, values, of_arm in zip(arms, losses, (curvatures, curvatures, {}), strict=True)
    ]
    figure = pictures.landscapes(found)
    assert [axes.get_title() for axes in figure.axes] == ["CE\nat +: 0.01", "KD\nat +: 0.02", "DOT\nat +: 0.01"]
    assert figure.get_suptitle().startswith("Cross-entropy of 512 training images around the final weights\n")
    assert [axes.get_xlabel() for axes in figure.axes] == [*["task: λ 4, tr 12.5\nsum: λ -, tr 25"] * 2, ""]
    table = plot.curvatures(found)
    assert "sum: largest eigenvalue" in (text := "\n".join(table)) and "12.5 ± 0.5" in text and "nan" not in text
    # CE never had a teacher here, so nobody has to say where it is.
    assert table[-1].startswith("Not measured: the curvature of the distillation loss of KD, DOT. The teacher")
    levels = [contours.levels.tolist() for axes in figure.axes for contours in axes.collections]
    assert len(levels) == 6 and all(level == levels[0] for level in levels)
    assert all(0.01 < level < 8 for level in levels[0])
    _assert_readable(figure)


@pytest.mark.slow
def test_files(tmp_path, capsys):
    run = _write(tmp_path / "runs" / "digits")
    names = [f"{name}.{form}" for name in ("losses", "plane", "gradients", "cost") for form in ("png", "svg")]
    before = dict(matplotlib.rcParams)
    assert plot.main([str(run)]) == 0
    assert dict(matplotlib.rcParams) == before
    folder = tmp_path / "runs" / "plots"
    printed = capsys.readouterr().out
    assert "--config.diagnostics=True logs them" in printed and str(folder / "gradients") in printed
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert plot.main([str(run), f"--output={tmp_path / 'again'}"]) == 0
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "plots").write_text("mine")
    assert plot.main([str(_write(tmp_path / "run", ["ce"], epochs=1))]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_the_same_picture_is_the_same_file(tmp_path, drawn):
    arms, _ = reading.find([_write(tmp_path / "run", ["ce"], epochs=2)])
    for form in pictures.FORMATS:
        one, other = (pictures.render(pictures.losses(arms), form) for _ in range(2))
        assert one == other and one.startswith({"png": b"\x89PNG", "svg": b"<?xml"}[form])
        assert b"<dc:date>" not in one


def test_the_width_is_that_of_a_readme(tmp_path, drawn):
    arms, _ = reading.find([_write(tmp_path / "run", ["kd"], epochs=1)])
    assert round(pictures.plane(arms).get_figwidth() * 96) == 850


@pytest.mark.slow
def test_a_real_run(finished, data_dir, tmp_path, capsys):
    flags = ["--landscape", "--images=900", f"--config.dataset.data_dir={data_dir}", f"--output={tmp_path}"]
    assert plot.main([str(finished), *flags]) == 0
    printed = capsys.readouterr().out
    assert "landscape" in printed and "sum: trace" in printed and "Not measured" not in printed
    assert len(list(tmp_path.iterdir())) == 10
    from examples.distill import landscapes

    arms, _ = reading.find([finished])
    for found in landscapes.measure(arms, 10_000, str(data_dir), points=3):
        # The network has no BatchNorm, so the loss of its own weights is that of the evaluation, but for rounding.
        np.testing.assert_allclose(found.losses[1, 1], found.arm.final("train", "task_loss")[0], rtol=1e-5)
        assert (np.delete(found.losses, 4) > found.losses[1, 1]).all()
        task, kd, both = (found.curvatures[name] for name in ("task", "KD", "sum"))
        assert both.trace == pytest.approx(0.1 * task.trace + 0.9 * kd.trace, rel=1e-4)  # of the same random vectors
        assert both.sharpness <= (0.1 * task.sharpness + 0.9 * kd.sharpness) * 1.001


@pytest.mark.slow
def test_curvatures_are_those_of_the_hessian():
    from examples.distill import landscapes, models

    (student, *variables), (teacher, *of_teacher) = (models.split(nnx.Linear(2, 3, rngs=nnx.Rngs(i))) for i in (0, 1))
    inputs, labels = jax.random.normal(jax.random.key(0), (16, 2)), jax.numpy.arange(16) % 3
    config = get_config()
    network, given = (student, *variables), models.apply(teacher, *of_teacher, inputs, train=False)[0]
    found = landscapes._curvatures(network, (teacher, *of_teacher), inputs, labels, config)
    flat, unravel = jax.flatten_util.ravel_pytree(variables[0])

    def losses(flat):
        logits, _ = models.apply(student, unravel(flat), variables[1], inputs, train=False)
        task = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return jax.numpy.stack([task, dot_optax.losses.kd_loss(logits, given, config.distillation.temperature).mean()])

    task, kd = jax.hessian(losses)(flat)
    assert list(found) == ["task", "KD", "sum"]
    for curvature, hessian in zip(found.values(), (task, kd, 0.1 * task + 0.9 * kd), strict=True):
        # The residual of `sharpness` may be a hundredth; 64 samples have an error that is said beside the trace.
        assert curvature.sharpness == pytest.approx(np.linalg.eigvalsh(hessian).max(), rel=1e-2)
        assert abs(curvature.trace - np.trace(hessian)) < 5 * curvature.trace_error
    assert list(landscapes._curvatures(network, None, inputs, labels, config)) == ["task"]


def _language_model(workdir, **fields):
    """A working directory of made-up runs of `examples.language_model`."""
    _write(workdir, ["kd", "dot"], **fields)
    config = {name: value for name, value in json.loads((workdir / "config.json").read_text()).items()}
    kept = {name: value for name, value in config.items() if not name.startswith("dataset.")}
    (workdir / "config.json").write_text(json.dumps(kept | {"text.files": "0a", "distillation.loss": "skew"}))
    for method in ("kd", "dot"):
        result = json.loads((workdir / method / "result.json").read_text())
        result["test"] |= result.pop("train")
        (workdir / method / "result.json").write_text(json.dumps(result))
    return workdir


def test_language_models(tmp_path, drawn):
    arms, notes = reading.find([_language_model(tmp_path / "run")])
    assert notes == [] and [arm.label for arm in arms] == ["KD", "DOT"]
    losses = pictures.losses(arms)
    assert losses.axes[1].get_ylabel() == "skew, nats a token"
    end = pictures.plane(arms).axes[1]
    assert end.get_title() == "Final students, on the test split"
    assert _lines(end)[0].get_xydata()[0].tolist() == [0.01, 0.05]
    cost = pictures.cost(arms)
    assert cost.axes[0].get_ylabel() == "accuracy of the next token, test split"
    assert not cost.axes[0].collections  # tokens are not independent: no standard error


@pytest.mark.slow
def test_a_real_language_model(finished_language_model, tmp_path, capsys):
    assert plot.main([str(finished_language_model), "--landscape", f"--output={tmp_path}"]) == 0
    assert "Not drawn: landscapes, which need images, and these are runs of language models." in capsys.readouterr().out
    names = {"losses", "plane", "gradients", "cost"}
    assert {path.stem for path in tmp_path.iterdir()} == names


@pytest.mark.slow
def test_batch_norm_has_the_statistics_of_the_images(data_dir, tmp_path):
    """Those that a student has kept, which belong to its own weights, make no difference."""
    from examples.distill import landscapes, models
    from examples.trainer import checkpoint

    network = {"name": "fashion_cnn", "widths": (2, 3)}
    model = models.build(**network, num_classes=10, input_shape=(8, 8, 1), rngs=nnx.Rngs(0))
    _, params, rest = models.split(model)
    fields = {f"student.model.{name}": value for name, value in network.items()}
    fields |= {f"dataset.{name}": value for name, value in settings.fields(get_config().dataset).items()}
    found = []
    for shift in (0.0, 1.0):
        run = _write(
            tmp_path / str(shift),
            ["kd"],
            dtype="float32",
            distillation__temperature=4.0,
            **{n.replace(".", "__"): v for n, v in fields.items()},
        )
        checkpoint.save_variables(
            epath.Path(run / "kd"), params, jax.tree.map(functools.partial(np.add, np.float32(shift)), rest)
        )
        found += landscapes.measure(reading.find([run])[0], 50, str(data_dir), points=3)
    one, other = found
    np.testing.assert_array_equal(one.losses, other.losses)
    assert len(np.unique(one.losses)) == 9
    traces = [each.curvatures["task"].trace for each in found]  # where the running ones make a difference
    assert np.isfinite(traces).all() and traces[0] != traces[1]


def test_a_config_file_says_where_data_and_teacher_are(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(plot, "plot", lambda runs, output, **options: given.append(options) or [])
    file = tmp_path / "mine.py"
    file.write_text(
        "from examples.distill.configs import digits\n"
        "def get_config():\n"
        "    config = digits.get_config()\n"
        "    config.dataset.data_dir, config.teacher.checkpoint = 'data', 'teacher'\n"
        "    return config\n"
    )
    assert plot.main(["run", f"--config={file}"]) == 0
    assert plot.main(["run", f"--config={file}", "--config.teacher.checkpoint=other"]) == 0
    assert [(options["data_dir"], options["teacher"]) for options in given] == [("data", "teacher"), ("data", "other")]


@pytest.mark.slow
def test_methods_of_a_file_of_ones_own(tmp_path, monkeypatch):
    for name in ("METHODS", "STYLES", "TRAITS"):
        monkeypatch.setattr(methods, name, getattr(methods, name).copy())
    file = tmp_path / "mine.py"
    file.write_text(
        "from examples.distill import methods\n"
        "from examples.distill.configs.digits import get_config\n"
        "methods.register('mine_too', label='My method')(lambda recipe: None)\n"
    )
    run = _write(tmp_path / "run", ["mine_too"], epochs=1)
    assert plot.main([str(run), f"--config={file}"]) == 0
    assert _labels(run) == ["My method"]
