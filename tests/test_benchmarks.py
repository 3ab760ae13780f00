"""The benchmarks run, and print what their docstrings show, on a small scale."""

import ast
import itertools
import json
import os
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from scipy import stats

import dot_optax
from benchmarks import (
    _experiments,
    _measure,
    _students,
    _trade_off_report,
    aggregation,
    collectives,
    digits_learning_rates,
    end_to_end,
    gpu,
    gradient_cost,
    input_pipeline,
    language_model_pod,
    pod_cost,
    recipe_cost,
    sampled_gradients,
    sampling_noise,
    scaling,
    teacher_cache,
    trade_off,
    train_step,
    update_step,
    vocabulary,
)
from examples.distill import models
from examples.distill.command_line import parse
from examples.language_model.command_line import main as language_model
from tests.language_model import tiny_language_model, write_texts
from tests.networks import abstract

FOLDER = pathlib.Path(_measure.__file__).parent


def test_the_readme_has_a_section_for_every_benchmark():
    readme = (FOLDER / "README.md").read_text()
    benchmarks = [path for path in FOLDER.glob("*.py") if "\ndef main(" in path.read_text()]
    assert len(benchmarks) >= 7
    for path in benchmarks:
        question = ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]
        assert f"| [`{path.name}`](#{path.stem}py) | {question} |" in readme
        _, _, section = readme.partition(f"\n## {path.name}\n")
        assert f"python -m benchmarks.{path.stem}" in section.partition("\n## ")[0]


@pytest.mark.slow
def test_digits_learning_rates(tmp_path, capsys):
    path = tmp_path / "report.json"
    arguments = "--seeds 2 --shared_epochs 1 --tuned_epochs 1 --learning_rates 0.01 --json"
    with jax.numpy_rank_promotion("allow"):  # a layer adds its bias as people write it
        digits_learning_rates.main([*arguments.split(), str(path)])
    report = json.loads(path.read_text())
    assert set(report) == {"shared", "tuned"}
    assert report["shared"] == report["tuned"]  # as long, and with the only learning rate
    for methods in report.values():
        assert list(methods) == list(digits_learning_rates.METHODS)
        for values in methods.values():
            assert np.isfinite(values["test loss"]).all() and len(values["test loss"]) == 2
    printed = capsys.readouterr().out
    assert all(f"| {method} |" in printed for method in digits_learning_rates.METHODS)


@pytest.mark.slow
def test_aggregation(tmp_path, capsys, monkeypatch):
    """Without TorchJD, which no test needs, a line says how to get it."""
    monkeypatch.setattr(aggregation.importlib.util, "find_spec", lambda name: None)
    path = tmp_path / "report.json"
    aggregation.main(["--rounds", "1", "--width", "16", "--json", str(path)])
    steps = json.loads(path.read_text())["steps"]
    assert len(steps) == 3 + len(aggregation.PAIRS)
    assert all(step["bytes"] > 0 and len(step["seconds"]) == 1 for step in steps.values())
    printed = capsys.readouterr().out
    assert 'pip install "torchjd[full]"' in printed
    assert all(f"| {name} " in printed for name in aggregation.PAIRS)


@pytest.mark.slow
def test_vocabulary(tmp_path, tpu_compiler):
    path = tmp_path / "memory.json"
    vocabulary.main(["--tokens", "256", "--json", str(path)])
    memory = json.loads(path.read_text())["temporary"]
    assert all(len(found) == 4 for found in memory.values())
    for chip in ("CPU", "TPU v5e"):
        assert all(memory[f"chunked_kd_loss from {what}"][f"{chip}, float32"] < 1 for what in ("logits", "features"))


@pytest.mark.slow
def test_teacher_cache(tmp_path, capsys):
    write_texts(tmp_path / "texts")
    flags = [f"--workdir={tmp_path / 'run'}", "--config.devices=1", *tiny_language_model(tmp_path / "texts" / "*.py")]
    assert language_model([*flags, "--config.method=kd"]) == 0
    path = tmp_path / "cache.json"
    teacher_cache.main([*flags, "--rounds", "1", "--ks", "1", "16", "64", "--sequences", "4", "--json", str(path)])
    figures = json.loads(path.read_text())
    live, cached, alone = (form["flops"] for form in figures["steps"].values())
    assert alone < cached < live == pytest.approx(1, abs=1e-3)
    *some, whole = figures["ks"].values()
    # Log-probabilities of up to 8 are off by 2^-11 of their size in float16: those of the likely tokens by less than 2e-3.
    assert whole["loss"] == pytest.approx(whole["full_loss"], rel=1e-2)
    assert whole["deviation"] < 1e-2 and whole["cosine"] > 0.9999 and whole["outside"] == 0
    for fewer, more in itertools.pairwise([*some, whole]):
        assert fewer["loss"] < more["loss"] and fewer["outside"] > more["outside"]
        assert fewer["deviation"] > more["deviation"] and fewer["cosine"] < more["cosine"]
    for k, found in figures["ks"].items():
        assert found["bytes"] == 4 * int(k) + 4 / 32  # and a checksum of each sequence
    assert "the teacher's forward pass" in capsys.readouterr().out


@pytest.mark.slow
def test_gradient_cost(tmp_path):
    path = tmp_path / "flops.json"
    gradient_cost.main(["--json", str(path)])
    flops = json.loads(path.read_text())
    ours = flops["dot_optax.value_and_grads"]
    assert ours == pytest.approx(flops["two jax.grad in one jit"], rel=0.01)
    # One forward and two backward passes instead of one: at most 5/3, less what the first layer need not do.
    assert 1.6 < ours / flops["one gradient of the sum"] < 5 / 3


@pytest.mark.slow
def test_input_pipeline(tmp_path, capsys):
    path = tmp_path / "rates.json"
    input_pipeline.main(["--images", "200", "--rounds", "1", "--json", str(path)])
    figures = json.loads(path.read_text())
    assert 80 < figures["kilobytes"] < 130  # ImageNet's files have 110 kB on average
    assert min(*figures["milliseconds"].values(), *figures["images_per_second"].values()) > 0
    printed = capsys.readouterr().out
    assert all(stage in printed for stage in figures["milliseconds"])


@pytest.fixture
def tpu_compiler():
    """Requires the TPU compiler, and lets it spend the least time; what it compiles then takes more memory, not less."""
    pytest.importorskip("libtpu", reason="there is a TPU compiler for Linux on x86-64 only")
    # A second process of pytest is otherwise refused.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    efforts = ("jax_exec_time_optimization_effort", "jax_memory_fitting_effort")
    before = {name: getattr(jax.config, name) for name in efforts}
    for name in efforts:
        jax.config.update(name, -1.0)
    yield
    for name, effort in before.items():
        jax.config.update(name, effort)


def _vgg_gflop(convs):
    """Of each convolution of a VGG's forward pass, without products with the zeros of the padding."""
    width_in, flops = 3, []
    for size, width in zip((32, 16, 8, 4, 4), (64, 128, 256, 512, 512), strict=True):
        for _ in range(convs):
            flops.append(2e-9 * (3 * size - 2) ** 2 * width_in * width)
            width_in = width
    return flops


@pytest.mark.slow
def test_recipe_cost(tmp_path, tpu_compiler):
    path = tmp_path / "cost.json"
    recipe_cost.main(["--configs", "cifar100_vgg13_vgg8", "--json", str(path)])
    [cost] = json.loads(path.read_text()).values()
    student = _vgg_gflop(1)
    # A backward pass is two convolutions for one, but nobody needs the gradient of the images.
    expected = sum(_vgg_gflop(2)) + sum(student) + 2 * (2 * sum(student) - student[0])
    assert cost["gflop_per_image"] == pytest.approx(expected, rel=0.03)  # the rest: norms, losses, updates
    assert 0.05 < cost["gigabytes"] < 1
    assert cost["hours"] == pytest.approx(240 * 781 * 64 / cost["images_per_second"] / 3600)


@pytest.mark.slow
def test_pod_cost(tmp_path, tpu_compiler):
    path = tmp_path / "pod.json"
    small = ["--config", "cifar100_vgg13_vgg8", "--topology", "v5e:2x2"]
    pod_cost.main([*small, "--batch_sizes", "64", "--forms", "shard_map", "--json", str(path)])
    kd, dot = json.loads(path.read_text())
    assert (kd["method"], dot["method"]) == ("kd", "dot")
    assert dot["memory_gb"] < 16  # of a v5e
    assert set(dot["collective_mb"]) == {"all-reduce"}
    parameters = 4 * 3_965_028 / 1e6
    assert parameters < dot["collective_mb"]["all-reduce"] <= 1.01 * kd["collective_mb"]["all-reduce"]


_LOOP = """HloModule step

%part (p: f32[8]) -> f32[8] {
  ROOT %gather.1 = bf16[4,2]{1,0} all-gather(%p), channel_id=7
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %started = bf16[4,2]{1,0} fusion(%x), kind=kLoop, calls=%part
  %reduce.1 = f32[8]{0} all-reduce(%y), channel_id=3, to_apply=%part
  ROOT %next = (s32[], f32[8]) tuple(%i, %reduce.1)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %done = bf16[4,2]{1,0} fusion(%x), kind=kLoop, calls=%part
  %loop = (s32[], f32[8]{0}) while(%p), condition=%condition, body=%body
  ROOT %reduce.2 = f32[2]{0} all-reduce(%z), channel_id=4
}
"""


def test_collectives_count_as_often_as_their_loop_runs():
    # The gather is one that runs beside other work, in two parts.
    assert language_model_pod.collectives(_LOOP) == {"all-gather": 16, "all-reduce": 5 * 32 + 8}


@pytest.mark.slow
def test_language_model_pod(tpu_compiler):
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = jax.sharding.Mesh(np.array(devices).reshape(2, 2), ("data", "model"))
    student = language_model_pod.model.Architecture(256, 256, 2, 2, 2, 128, 256)
    moved, of_state = {}, {}
    for layers in (2, 4):
        compiled = language_model_pod.compile_step(
            "dot", mesh, batch_size=4, length=128, teacher=student._replace(layers=layers), student=student
        )
        moved[layers] = language_model_pod.collectives(compiled.as_text())
        of_state[layers] = language_model_pod.cost(compiled)["state_gb"]
    # Of each layer of the teacher: two sums over `model`, of its part of the activations in bfloat16.
    assert moved[4]["all-reduce"] - moved[2]["all-reduce"] == pytest.approx(2 * 2 * 2 * 2 * 128 * 256, rel=0.01)
    # Two layers of a quarter of seven matrices in bfloat16, and norms.
    assert 1e9 * (of_state[4] - of_state[2]) == pytest.approx(2 * 2 * (4 + 3) * 256 * 256 / 4, rel=0.02)


def test_ratios_are_taken_round_by_round():
    # The machine slows down: the ratio of the medians would be 4 / 2.
    assert _measure.ratio([3.0, 6.0, 12.0], [1.0, 2.0, 4.0]) == (3.0, 3.0, 3.0)
    assert _measure.ratio([1.0, 2.0, 3.0, 4.0, 9.0], [1.0] * 5) == (3.0, 2.0, 4.0)
    assert _measure.ratio([3.0], [2.0]) == (1.5, 1.5, 1.5)


def test_every_form_is_called_once_in_a_round():
    calls = []
    seconds = _measure.alternate({name: lambda n=name: calls.append(n) for name in "abc"}, 2, warmup=1)
    assert "".join(calls) == "abcbcacab"
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_tables():
    assert _measure.table(["form", "x"], [["one", 1.5], ["three", 12]]) == (
        "| form  |   x |\n| ----- | --: |\n| one   | 1.5 |\n| three |  12 |"
    )


# One kernel writes one array, as XLA compiles for CPUs. SGD: v reads g and v; theta reads theta and v. DOT: two such v, and
# theta reads theta and both. AdamW: m and nu read g and themselves; theta reads all three. DOT has two m; nu reads both g.
ONE_OUTPUT_PER_KERNEL = {
    "optax.sgd": 4 * (3 + 3),
    "dot_optax.dot": 4 * (2 * 3 + 4),
    "optax.adamw": 4 * (2 * 3 + 4),
    "dot_optax.dot_adamw": 4 * (2 * 3 + 4 + 5),
}


@pytest.mark.parametrize("name", update_step.UPDATES)
def test_traffic_of_an_update(name):
    update = update_step.UPDATES[name]
    cost = update_step.compiled_cost(update, update_step.leaves(3, size=10_000))
    # Reading or writing one array more would be 4 bytes; scalars are fewer than 0.1. A compiler may do better, to the limit.
    assert update.limit - 0.1 < cost["bytes_per_parameter"] < ONE_OUTPUT_PER_KERNEL[name] + 0.1


def test_limits_of_traffic():
    limits = {name: update.limit / 4 for name, update in update_step.UPDATES.items()}
    assert limits == {"optax.sgd": 5, "dot_optax.dot": 8, "optax.adamw": 7, "dot_optax.dot_adamw": 10}


def test_the_networks_whose_updates_are_timed():
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(shapes())) for name, shapes in update_step.NETWORKS.items()
    }
    assert sizes["ResNet50"] == 25_557_032  # torchvision's
    assert sizes["SmolLM2-135M"] == 134_515_008  # the model's card


@pytest.mark.slow
@pytest.mark.parametrize("family", update_step.FAMILIES)
def test_pytorch_takes_the_same_steps(family):
    params, grads = update_step.arrays(update_step.leaves(3))
    ends = {}
    one, dot = update_step.FAMILIES[family]
    forms = {name: update_step.jax_form(update_step.UPDATES[name], params, grads) for name in (one, dot)}
    for name, take in (forms | update_step.torch_forms(params, grads, family)).items():
        for _ in range(3):
            end = take()
        ends[name] = np.concatenate([np.asarray(leaf.detach()) for leaf in end] if "torch" in name else end[0])
    start = np.concatenate(params)
    for name, end in ends.items():
        # Parameters are below 5: rounding each of two subtractions in three steps makes 6 * 5 * 2^-24 = 1.8e-6 at most.
        # Of Adam's steps, 1 - 0.999^t in float32 is off by 2^-24 / 0.001 = 6e-5; PyTorch has it in float64. A wrong
        # momentum would move parameters by some 1e-4.
        expected = ends[dot if "DOT" in name or name == dot else one] - start
        np.testing.assert_allclose(end - start, expected, rtol=6e-5, atol=2e-6, err_msg=name)
    assert np.abs(ends[one] - ends[dot]).max() > 1e-4


@pytest.mark.slow
def test_update_step(tmp_path, capsys):
    path = tmp_path / "update.json"
    arguments = "--networks small --rounds 2 --compile_leaves 3 --compile_rounds 1 --json"
    update_step.main([*arguments.split(), str(path)])
    figures = json.loads(path.read_text())
    printed = capsys.readouterr().out
    for family, names in update_step.FAMILIES.items():
        ratios = figures["times"]["ratios"][family]["small"]
        assert all(name in ratios and name in printed for name in names)
        assert all(ratios[name][name] == [1, 1, 1] for name in names)
        assert min(ratio for form in ratios.values() for low in form.values() for ratio in low) > 0
    small = figures["costs"]["small"]
    assert small["dot_optax.dot"]["cpu"]["kernels"] == 12  # three arrays to write for each of four parameters
    assert figures["compile_times"]["optax.sgd"] == [1, 1, 1]


@pytest.mark.slow
def test_gpu_benchmark_on_a_cpu(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    with jax.numpy_rank_promotion("allow"):  # a layer adds its bias as people write it
        gpu.main(["--smoke_test", "--json", str(path)])
    figures = json.loads(path.read_text())
    assert "only ratios" in capsys.readouterr().out
    forms = figures["train_steps"]["forms"]
    assert set(gpu.FORMS) < set(forms)
    assert all(set(row) == {"ratio"} for row in forms.values())
    flops = figures["train_steps"]["flops"]
    # ResNet34 has 2.02 times the FLOPs of ResNet18: (2.02 + 5) / (2.02 + 3), and norms and losses of few images besides.
    assert flops["exact DOT"] / flops["KD"] == pytest.approx(1.40, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, stage_sizes, gflop", [("resnet18", (2, 2, 2, 2), 2 * 1.81), ("resnet34", (3, 4, 6, 3), 2 * 3.66)]
)
def test_the_networks_of_the_gpu_benchmark_in_pytorch(name, stage_sizes, gflop):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    theirs = gpu.torch_resnet(stage_sizes)
    ours = [leaf.size for leaf in jax.tree.leaves(models.split(abstract(name, 1000))[1])]
    assert sorted(leaf.numel() for leaf in theirs.parameters()) == sorted(ours)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        theirs.eval()(torch.zeros(1, 3, 224, 224))
    assert counter.get_total_flops() == pytest.approx(
        1e9 * gflop, rel=0.01
    )  # torchvision states GFLOPs with two decimals


def test_cards(monkeypatch, capsys):
    def found(platform, kind, **given):
        device = types.SimpleNamespace(platform=platform, device_kind=kind)
        monkeypatch.setattr(jax, "devices", lambda: [device])
        options = {"bandwidth": None, "flops": None, "dtype": "bfloat16"} | given
        return gpu.card(**options), capsys.readouterr().out

    assert found("gpu", "NVIDIA L4") == ((0.3e12, 121e12), "")
    assert found("gpu", "NVIDIA L4", dtype="float32", bandwidth=1.0) == ((1.0, 60e12), "")
    assert found("gpu", "another", bandwidth=1.0, flops=2.0) == ((1.0, 2.0), "")
    peak, printed = found("gpu", "another", bandwidth=1.0)
    assert peak is None and "'another'" in printed and "--flops" in printed
    peak, printed = found("cpu", "cpu")
    assert peak is None and "only ratios" in printed


@pytest.mark.slow
def test_end_to_end(tmp_path, capsys):
    path = tmp_path / "runs.json"
    cores = os.sched_getaffinity(0)
    try:
        end_to_end.main(["--runs", "digits", "--digits_epochs", "3", "--json", str(path)])
    finally:
        os.sched_setaffinity(0, cores)
    figures = json.loads(path.read_text())["digits"]
    assert list(figures["losses"]) == list(end_to_end.FORMS)
    assert all(len(seconds) == 3 for seconds in figures["seconds_of_epochs"].values())
    for name, losses in figures["losses"].items():
        # What float32 rounds in 42 steps makes 1e-7; other settings, in the test below, 8e-5 and more.
        np.testing.assert_allclose(losses, figures["losses_in_float64"][end_to_end.REFERENCE], rtol=5e-6, err_msg=name)
    printed = capsys.readouterr().out
    assert all(name in printed for name in end_to_end.FORMS)


@pytest.fixture(scope="module", params=["digits", "fashion_mnist"])
def run_in_pytorch_too(request):
    if request.param == "digits":
        config = end_to_end.digits_config(3)
    else:
        config = end_to_end.fashion_mnist_config(images=96, epochs=3, teacher_epochs=2)
        config.batch_size, config.dataset.synthetic = 32, True
        # `optax.linear_schedule` of an int32 is a float32, with x64 too; XLA may keep more, or not: 8e-10 in the losses.
        config.optimizer.warmup_epochs = 0
    config.teacher.epochs = 2
    return end_to_end.prepare(config)


@pytest.mark.slow
def test_end_to_end_in_float64(run_in_pytorch_too):
    # Rounding is next to nothing there, and so is the difference; on real images it was below 1e-14.
    losses = end_to_end.in_float64(run_in_pytorch_too)
    deviations = end_to_end.deviations(losses[end_to_end.STEP], losses[end_to_end.REFERENCE])
    assert max(deviations) < 1e-11


@pytest.mark.slow
@pytest.mark.parametrize("field, value", [("delta", 0.076), ("weight_decay", 6e-4), ("momentum", 0.901)])
def test_end_to_end_sees_other_settings(run_in_pytorch_too, field, value):
    other = run_in_pytorch_too._replace(config=run_in_pytorch_too.config.copy_and_resolve_references())
    other.config.optimizer[field] = value
    right, wrong = (end_to_end.in_float64(run)[end_to_end.REFERENCE] for run in (run_in_pytorch_too, other))
    assert max(end_to_end.deviations(wrong, right)) > 5e-6


def assert_only_prints(main, command, printed, monkeypatch, capsys):
    """A benchmark goes on where it was: at the end, there is nothing to run."""

    def fail(*args):
        raise AssertionError(f"{args[1:]} is there already")

    monkeypatch.setattr(_experiments.Cells, "_run", fail)
    with jax.numpy_rank_promotion("allow"):
        main(command)
    assert capsys.readouterr().out == printed


@pytest.mark.slow
def test_sampled_gradients(tmp_path, capsys, monkeypatch):
    command = ["--problems", "digits, MLP", "--forms", "exact", "examples, 1/2", "--seeds", "2", "--epochs", "1"]
    command += ["--directory", str(tmp_path), "--json", str(tmp_path / "report.json")]
    with jax.numpy_rank_promotion("allow"):  # a layer adds its bias as people write it
        sampled_gradients.main(command)
    report = json.loads((tmp_path / "report.json").read_text())["digits, MLP"]
    assert report["kd, exact"]["cost"] == 1 and report["ce, exact"]["cost"] == pytest.approx(3 / 10.2)
    assert report["dot, exact"]["cost"] == pytest.approx(1.196, abs=1e-3)  # ResNet50 -> MobileNetV1: DESIGN's 1.20
    assert report["dot, examples, 1/2"]["cost"] == pytest.approx((3 + 10.2 / 2) / 10.2)
    for name, arm in report.items():
        assert len(arm["equal steps"]["test loss"]) == 2 and np.isfinite(arm["equal steps"]["test loss"]).all(), name
    assert (tmp_path / "sampled_gradients.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| DOT | examples, 1/2 | 0.79 |" in printed
    assert_only_prints(sampled_gradients.main, command, printed, monkeypatch, capsys)


def test_differences_are_corrected_for_their_number():
    rng = np.random.default_rng(0)
    plain = rng.normal(size=8)
    arm = lambda shift: {"equal steps": {"test loss": plain + shift + 0.1 * rng.normal(size=8)}}  # noqa: E731
    shifts = {("kd", "exact"): 0.0, ("dot", "exact"): 1.0, **{("dot", f"losses, k={k}"): 0.0 for k in range(20)}}
    results = {name: arm(shift) for name, shift in shifts.items()}
    plain_loss = results["kd", "exact"]["equal steps"]["test loss"]
    found = sampled_gradients.differences(results, "equal steps", lambda arm: ("kd", "exact"))
    losses = {name: result["equal steps"]["test loss"] for name, result in results.items()}
    raw = {name: stats.ttest_rel(loss, plain_loss).pvalue for name, loss in losses.items() if name != ("kd", "exact")}
    by_size = sorted(raw, key=raw.get)
    p = [found[name][-1] for name in by_size]
    assert by_size[0] == ("dot", "exact") and p[0] == pytest.approx(21 * raw["dot", "exact"])
    assert p[1] == pytest.approx(min(1, 20 * raw[by_size[1]]))
    assert (
        min(raw[name] for name in by_size[1:]) < 0.05 < min(p[1:])
    )  # of 20 that do not differ, one looks as if it did
    own = sampled_gradients.differences(results, "equal steps", lambda arm: (arm[0], "exact"))
    assert list(found) == by_size and set(own) == set(by_size) - {("dot", "exact")}
    mean, error, _ = own["dot", "losses, k=3"]
    difference = losses["dot", "losses, k=3"] - losses["dot", "exact"]
    assert mean == pytest.approx(difference.mean()) and error == pytest.approx(difference.std(ddof=1) / 8**0.5)


@pytest.mark.slow
def test_trade_off(tmp_path, capsys, monkeypatch):
    arms = [
        "CE",
        "KD 0.9",
        "KD 0.984",
        "KD, gain-matched",
        "DOT 0.075",
        "DOT, normalised",
        "DeepKD",
        "DOT, alternating",
    ]
    command = ["--problems", "digits, CNN, 300", "--arms", *arms, "--seeds", "2", "--epochs", "1", "--breaking"]
    command += ["--directory", str(tmp_path), "--json", str(tmp_path / "report.json")]
    with jax.numpy_rank_promotion("allow"):  # a layer adds its bias as people write it
        trade_off.main(command)
    report = json.loads((tmp_path / "report.json").read_text())
    results = report["results"]["digits, CNN, 300"]
    assert list(results) == arms
    assert results["KD 0.9"]["steps"] == 4 and results["DOT, alternating"]["steps"] == 6  # 4 / 0.65
    for name, arm in (results | report["causes"]["digits, CNN, 300"]).items():
        assert len(arm["test loss"]) == 2 and np.isfinite(arm["test loss"]).all(), name
    assert (tmp_path / "trade_off.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| problem | DOT 0.075 less KD 0.9 | DOT, normalised less KD 0.9 |" in printed
    assert_only_prints(trade_off.main, command, printed, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_arms_of_the_trade_off_that_must_agree(optimizer):
    """With delta 0 all are one momentum on the weighted sum; and alike gains differ from DOT's own by a factor alone."""
    problem = trade_off.PROBLEMS["digits, MLP, 300"].problem._replace(optimizer=optimizer, weight_decay=0.0)
    rows = _experiments.batches(300, 8, seed=0)
    with jax.numpy_rank_promotion("allow"):
        data = problem.load()

    def trained(arm, rate=0.01):
        with jax.numpy_rank_promotion("allow"):
            (params, _), _ = _experiments.train(problem, "", arm, rate, jax.random.key(0), rows, data)
        return params

    plain = trained(trade_off.ARMS["KD 0.9"])
    for arm in (trade_off.of_method("dot", delta=0.0), trade_off.normalized_dot(0.0), trade_off.of_method("kd")):
        # The arithmetic is the same but for the order of float32 sums; Adam divides by roots that begin near 0.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), trained(arm), plain)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), trained(trade_off.ARMS["DOT 0.075"]), plain)
    assert max(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.slow
def test_what_is_watched_of_the_gradients():
    problem = trade_off.PROBLEMS["digits, MLP, 300"].problem
    rows = _experiments.batches(300, 8, seed=0)
    with jax.numpy_rank_promotion("allow"):
        data = problem.load()
        params, _ = problem.init(jax.random.key(0))
        x, y, teacher = (data[name][rows[0]] for name in ("train x", "train y", "teacher"))

        def losses(params):
            return jax.tree.map(jnp.mean, _experiments.losses_of(problem.apply(params, {}, x, True)[0], y, teacher))

        _, grads = dot_optax.value_and_grads(losses)(params)
        _, watched = _experiments.train(problem, "", trade_off.watched(), 0.01, jax.random.key(0), rows, data)
    expected = dot_optax.diagnostics.compare(grads).cosines[0, 0, 1]
    # The weights of the losses do not turn their gradients, but float32 rounds their products.
    np.testing.assert_allclose(watched["cosine"][0], expected, rtol=1e-5)
    assert watched["conflict"].shape == (8,) and watched["conflict"][0] == (expected < 0)
    assert np.isnan(watched["task SNR"][0]) and (watched["task SNR"][1:] >= 0).all()


def _arm(task, kd, validation=1.0, test=(1.0, 1.1)):
    measured = {"train task": [task], "train KD": [kd], "validation loss": [validation], "test loss": list(test)}
    return measured | {"test accuracy": [0.9 - loss / 10 for loss in test]}


def test_how_far_an_arm_is_beyond_the_front():
    front = [_arm(1.0, 4.0), _arm(2.0, 2.0)]
    assert _trade_off_report.beyond(_arm(2.0, 2.0), front) == 1
    assert _trade_off_report.beyond(_arm(3.0, 4.0), front) == pytest.approx(2 / 3)  # the second has both losses lower
    assert _trade_off_report.beyond(_arm(1.0, 2.0), front) == 2  # either has one loss twice as large


def test_the_best_arm_of_a_kind_is_chosen_by_its_validation_loss():
    results = {"KD 0.9": _arm(1, 1, 0.5), "KD 0.5": _arm(1, 1, 0.4, (9.0, 9.1)), "DOT 0.05": _arm(1, 1, 0.1)}
    assert _trade_off_report.best_of(results, trade_off.ONE) == "KD 0.5"
    assert _trade_off_report.best_of(results, trade_off.TWO) == "DOT 0.05"


def test_arms_that_keep_up_with_the_best():
    noise = np.random.default_rng(0).normal(size=(3, 8))
    one = {
        "KD 0.9": _arm(1, 1, 0.2, noise[0]),
        "DOT 0.05": _arm(1, 1, 0.3, noise[0] + 0.01 * noise[1]),  # as good, with noise
        "DOT 0.075": _arm(1, 1, 0.4, noise[0] + 1 + 0.01 * noise[2]),  # worse at each seed
        "CE": _arm(1, 1, 0.1, noise[0] - 5),
    }
    found = _trade_off_report.tied({"digits": one}, left_out=("CE",))
    assert {arm: len(kept_up) for arm, (_, kept_up) in found.items()} == {"KD 0.9": 1, "DOT 0.05": 1, "DOT 0.075": 0}


def test_how_far_arms_are_from_the_best(capsys):
    noise = 1e-4 * np.random.default_rng(0).normal(size=(4, 8))
    one = {"KD 0.9": _arm(1, 1, 0.2, 2.0 + noise[0]), "CE": _arm(1, 1, 0.1, 1.0 + noise[1])}
    other = {"KD 0.9": _arm(1, 1, 0.1, 1.0 + noise[0]), "CE": _arm(1, 1, 0.2, 4.0 + noise[2])}
    third = {"KD 0.9": _arm(1, 1, 0.1, 1.0 + noise[0]), "CE": _arm(1, 1, 0.2, 3.0 + noise[3])}
    _trade_off_report.tied_table({"one": one, "other": other, "third": third}, left_out=())
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[-2:]]
    # Of the geometric means of 1, 4 and 3, and of 2, 1 and 1; an accuracy falls by 10 points if the loss grows by 1.
    assert sorted(rows) == [
        ["CE", "3", "1", "1", "2", "1", "2", "+128.9%", "-13.33", "-20.00"],
        ["KD 0.9", "3", "2", "0", "0", "0", "0", "+26.0%", "+0.00", "+0.00"],
    ]


def test_the_tables_of_the_trade_off_are_those_of_its_figures(tmp_path, capsys):
    """What `trade_off.md` has is what the command prints beside it, and the picture can be drawn again."""
    folder = pathlib.Path(trade_off.__file__).parent
    trade_off.main(["--read", str(folder / "trade_off.json"), "--picture", str(tmp_path / "picture.png")])
    printed = capsys.readouterr().out
    page = (folder / "trade_off.md").read_text()
    assert page[page.index("\n## ") :] == printed
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    again = tmp_path / "again.json"
    trade_off.write(again, json.loads((folder / "trade_off.json").read_text()))
    assert again.read_text() == (folder / "trade_off.json").read_text()


def _rows(text, header):
    """The cells of a table of a page, by the first of each row."""
    lines = text[text.index(f"\n| {header}") + 1 :].partition("\n\n")[0].splitlines()
    rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    return {first: cells for first, *cells in rows}


def test_the_arms_on_other_pages_have_the_figures_of_the_trade_off():
    folder = pathlib.Path(trade_off.__file__).parent
    figures = _rows((folder / "trade_off.md").read_text(), "arm | problems |")
    shown = _rows((folder / "README.md").read_text(), "arm | problems |")
    assert len(shown) > 8 and all(figures[arm] == cells for arm, cells in shown.items())
    front = _rows((folder.parent / "README.md").read_text(), "method | problems |")
    assert len(front) > 6
    for arm, cells in front.items():
        problems, tied, better, worse, _, _, loss, _, median = figures[arm.partition(":")[0]]
        assert cells == [problems, tied, better, worse, loss, median]


def test_the_total_gains_of_the_trade_off():
    gain = _trade_off_report.total_gain
    assert gain("KD 0.9") == pytest.approx(1) and gain("KD 0.9, momentum 0.95") == pytest.approx(2)
    assert gain("DOT 0.075") == gain("KD, gain-matched") == pytest.approx((0.1 * 5.714286 + 0.9 * 40) / 10)
    assert gain("DOT -0.075") == gain("KD, gain-matched, -0.075") == pytest.approx((0.1 * 40 + 0.9 * 5.714286) / 10)
    assert gain("DOT -0.075, weight 0.5") == pytest.approx((40 + 5.714286) / 2 / 10)


def test_the_comparisons_that_were_fixed_beforehand(capsys):
    noise = np.random.default_rng(0).normal(size=(2, 8))
    found = {
        "KD 0.9": _arm(1, 1, 0.3, noise[0] + 1 + 0.01 * noise[1]),
        "KD, gain-matched, -0.075": _arm(1, 1, 0.2, noise[0] + noise[1] - noise[1].mean()),  # the mean is alike
        "KD 0.5": _arm(1, 1, 0.15, noise[0] - 1 + 0.01 * noise[1]),
        "DOT -0.075": _arm(1, 1, 0.1, noise[0]),
    }
    _trade_off_report.confirmation_table({"digits": found}, trade_off.ONE)
    cells = capsys.readouterr().out.splitlines()[-1].removeprefix("| ").removesuffix(" |").split(" | ")
    assert cells[0] == "digits" and cells[-1] == "KD 0.5"  # the lowest validation loss
    is_significant = [cell.endswith("*") for cell in cells[2:5]]
    assert is_significant == [True, False, True] and [cell[0] for cell in cells[2:5:2]] == ["-", "+"]


@pytest.mark.slow
def test_the_convolutions_of_the_sampled_benchmark():
    params, statistics = _students._init_cnn((4, 8), 14, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (3, 14, 14, 1))
    with jax.numpy_rank_promotion("allow"):
        _, new = _students._cnn(params, statistics, x, train=True)
    kernel = params["conv0"]["kernel"].reshape(3, 3, 1, 4)
    dimensions = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=dimensions)
    # The statistics of a first step are a tenth of the batch's and nine tenths of the initial ones.
    np.testing.assert_allclose(new["conv0"]["mean"], 0.1 * y.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(new["conv0"]["var"], 0.9 + 0.1 * y.var((0, 1, 2)), rtol=1e-5)


def test_the_arithmetic_of_sampling_noise():
    for beta in (0.9, 0.975):
        for k in (1, 2, 8):
            burst = sampling_noise.largest_rate("k times, at once", beta, k)
            assert burst == pytest.approx(sampling_noise.formula(beta, k), rel=1e-6)
            assert sampling_noise.largest_rate("at every step", beta, k) == pytest.approx(2 * (1 + beta), rel=1e-6)
            if k > 1:
                assert sampling_noise.largest_rate("held", beta, k) < burst


def test_where_training_breaks(monkeypatch, capsys, tmp_path):
    """Each form's figure is in its own column, whatever their order; what never fails has no figure."""
    limits = {"exact": 1.0, "losses, k=2": 0.25, "examples, 1/4": np.inf}

    def get(self, method, form, rate, steps):
        return {"train task": [np.nan if rate >= limits.get(form, 0.5) else 0.1]}

    monkeypatch.setattr(_experiments.Cells, "get", get)
    monkeypatch.setattr(_experiments.Cells, "steps", lambda self: 1)
    problem = _students.PROBLEMS["digits, MLP"]
    forms = ("exact", "difference, k=4", "losses, k=2", "examples, 1/4")
    found = sampling_noise.breaking_rates(problem, tmp_path, forms)
    assert found["dot"]["examples, 1/4"] is None and "difference, k=4" not in found["kd"]
    assert all(limits["exact"] <= of_method["exact"] < 2**0.5 * limits["exact"] for of_method in found.values())
    printed = capsys.readouterr().out
    assert "| KD | 1.28 (1 / 1) | - | 0.32 (1 / 4) | above 3.62 |" in printed
    assert "| DOT | 1.28 (1 / 1) | 0.64 (1 / 2) | 0.32 (1 / 4) | above 3.62 |" in printed


@pytest.mark.slow
def test_rows_by_importance_are_right_on_average():
    problem = _students.PROBLEMS["digits, MLP"]
    params, _ = problem.init(jax.random.key(0))
    x, y = jax.random.normal(jax.random.key(1), (64, 64)), jnp.arange(64) % 10
    teacher = jax.random.normal(jax.random.key(2), (64, 10))

    def loss_fn(params, statistics, x, y, teacher):
        return jax.tree.map(jnp.mean, _experiments.losses_of(problem.apply(params, {}, x, True)[0], y, teacher)), {}

    def norms(gradients):
        call = lambda step: gradients(step, params, {}, x, y, teacher)[1].kd  # noqa: E731
        grads = jax.jit(jax.vmap(call))(jnp.arange(4096))
        return jax.tree.map(lambda g: (g.mean(0), g.std(0) / 64), grads)

    with jax.numpy_rank_promotion("allow"):
        exact = dot_optax.value_and_grads(loss_fn, has_aux=True)(params, {}, x, y, teacher)[1].kd
        means = norms(sampling_noise._importance(loss_fn))
    for value, (mean, error) in zip(jax.tree.leaves(exact), _pairs(means), strict=True):
        deviations = np.abs(mean - value) / np.maximum(error, 1e-7)
        # Of some 2,000 numbers the largest lies 3.5 standard errors away; a weight that is left out moves them by dozens.
        assert deviations.max() < 5.5


def _pairs(tree):
    return jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, tuple))


@pytest.mark.slow
def test_sampling_noise(tmp_path, capsys):
    command = [
        "--forms",
        "..., the momentum held",
        "twice the rows, every 8th step",
        "..., by importance",
        "--breaking",
    ]
    command += ["--seeds", "2", "--epochs", "1", "--directory", str(tmp_path), "--json", str(tmp_path / "report.json")]
    with jax.numpy_rank_promotion("allow"):
        sampling_noise.main(command)
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["digits"]) == command[1:4] and len(report["limits"]) == 10
    assert report["digits"]["twice the rows, every 8th step"]["cost"] == pytest.approx((3 + 10.2 / 4) / 10.2)
    assert "| ..., by importance | 0.54 |" in capsys.readouterr().out


def _small_step(form, layout, devices):
    """A compiled step of a MLP, and how many parameters it has; those of the matrices weigh more than 8 rows of a batch."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), (collectives.AXIS,))
    shapes = collectives.Shapes(width=64, depth=1)
    way = train_step.forms(collectives.loss_fn(2), 4)[form]
    *_, (number, _) = way.kinds.values()
    optimizer = collectives.optimizers()[way.optimizer]
    compiled = collectives.compile_step(way, number, mesh, layout, shapes, optimizer)
    return compiled, sum(leaf.size for leaf in jax.tree.leaves(shapes.params()))


def test_what_a_second_gradient_adds_to_a_step():
    """The second backward pass and the second momentum, nothing else: counted by hand."""
    (kd, size), (dot, _) = (_small_step(form, "jit", 1) for form in ("KD", "DOT"))
    kd, dot = train_step.costs(kd), train_step.costs(dot)
    backward = 2 * (2 * 8 * size) - 2 * 8 * 64 * 256  # nobody needs the gradient of the first layer's input
    momentum = 3 * size  # times beta, plus the gradient, plus the other momentum
    # The loss: some 4 FLOPs for each of 8 x 100 logits.
    assert dot["flops"] - kd["flops"] == pytest.approx(backward + momentum, rel=0.01)
    # Reads the weights and writes a gradient; of the momentum, reads both, writes it, and reads it for the parameters.
    # The activations of 8 rows are 2% of that.
    assert dot["bytes"] - kd["bytes"] == pytest.approx(6 * 4 * size, rel=0.02)
    assert dot["memory"] - kd["memory"] == pytest.approx(4 * size, rel=0.02)  # a momentum; a gradient takes turns


@pytest.mark.parametrize(
    "form, layout, trees",
    [
        pytest.param("KD", "jit", 1, marks=pytest.mark.slow),
        ("DOT", "jit", 2),
        ("losses, 4", "jit", 1),  # at a step of the task alone
        ("DOT", "shard_map, average_over", 1),
    ],
)
def test_what_a_step_moves_between_devices(form, layout, trees):
    compiled, size = _small_step(form, layout, 4)
    [always] = collectives.collectives(compiled.as_text())
    assert set(always) == {"all-reduce"}
    assert 0 <= always["all-reduce"][1] - trees * 4 * size <= 8  # the two losses, as float32


def test_collectives_of_branches():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))

    def body(which, x):
        branches = [
            lambda x: jax.lax.psum(x, "data"),
            lambda x: jax.lax.psum(x[:3], "data").sum() + jax.lax.psum(x, "data"),
        ]
        total = jax.lax.psum(x.sum(), "data")
        return total + jax.lax.switch(which, branches, x)

    step = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(jax.P(), jax.P("data")), out_specs=jax.P()))
    text = step.lower(jnp.int32(0), jnp.ones(16)).compile().as_text()
    always, *branches = collectives.collectives(text)
    assert always == {"all-reduce": [1, 4]}
    assert [branch["all-reduce"][1] for branch in branches] == [4 * 8, 4 * (8 + 3)]


@pytest.mark.slow
def test_train_step(tmp_path, capsys, monkeypatch):
    # One block instead of four.
    monkeypatch.setattr(train_step, "parse", lambda argv: parse([*argv, "--config.student.model.depth=1"]))
    path = tmp_path / "train_step.json"
    with jax.numpy_rank_promotion("allow"):  # a layer adds its bias as people write it
        train_step.main(["--configs", "fashion_mnist_vit", "--rows", "8", "--rounds", "1", "--json", str(path)])
    rows = json.loads(path.read_text())
    plain, checkpointed = (
        {(row["form"], row["step"]): row for row in rows if row["checkpoint"] is remat} for remat in (False, True)
    )
    assert len(plain) == 15 and len(checkpointed) == 12
    assert all(min(row["seconds"]) > 0 and row["memory"] > 0 for row in rows)
    flops = {key: row["flops"] for key, row in plain.items() if "flops" in row}
    kd = flops["KD", "both"]
    assert flops["losses, 4", "on average"] == pytest.approx(
        (flops["losses, 4", "both"] + 3 * flops["losses, 4", "task"]) / 4
    )
    # What is computed is the same; the update and the scaling of a gradient cost up to some FLOPs for each parameter.
    assert flops["difference, 4", "sum"] == pytest.approx(kd, rel=0.02)
    assert flops["alternating", "KD"] == pytest.approx(kd, rel=0.02)
    assert flops["losses, 4", "both"] == pytest.approx(flops["DOT", "both"], rel=0.02)
    assert flops["alternating", "task"] < kd < flops["DOT", "both"]
    assert all(checkpointed[key]["flops"] > value for key, value in flops.items())
    assert "| losses, 4" in capsys.readouterr().out


@pytest.mark.slow
def test_collectives(tmp_path):
    path = tmp_path / "collectives.json"
    collectives.main(["--topologies", "cpu", "--layouts", "jit", "shard_map, average_over", "--json", str(path)])
    moved = {}
    for row in json.loads(path.read_text()):
        each = [collectives.moved(row, found) for found in (row["always"], *row["branches"])]
        moved[row["layout"], row["form"], row["step"]] = each[0], max(each[1:], default=0)
    averaged = [each for (layout, _, _), each in moved.items() if layout != "jit"]
    assert averaged == [(pytest.approx(1, abs=1e-3), 0)] * len(averaged)
    assert moved["jit", "DOT", "both"] == (pytest.approx(2, abs=1e-3), 0)
    assert moved["jit", "alternating", "KD"] == (pytest.approx(1, abs=1e-3), 0)
    assert moved["jit", "difference, 4", train_step.ONE] == (0, pytest.approx(2, abs=1e-3))


@pytest.mark.slow
def test_scaling(tmp_path):
    path = tmp_path / "scaling.json"
    scaling.main(["--chips", "1", "4", "--widths", "256", "--losses", "3", "--json", str(path)])
    rows = json.loads(path.read_text())
    assert len(rows) == 4 * 3
    assert {row["chips"] for row in rows} == {1, 4, 8}
    for kd, dot, sampled in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert (kd["form"], dot["form"], sampled["form"]) == ("KD", "DOT", "losses, 4")
        assert sampled["flops"] < kd["flops"] < dot["flops"]
        # One tree, whatever the number of losses; the losses themselves are a float32 each.
        for row in (kd, dot, sampled):
            assert 0 <= row["moved"] - 4 * row["parameters"] <= 4 * row["losses"]


@pytest.mark.parametrize(("start", "best"), [(0.04, 0.08), (0.64, 0.08), (0.08, 0.08), (0.01, 0.08), (2.56, 0.08)])
def test_the_search_of_a_learning_rate(start, best):
    tried = []

    class Cells:
        def steps(self):
            return 7

        def classes(self):
            return 100

        def get(self, method, form, rate, steps):
            assert (method, form, steps) == ("kd", "exact", 7)
            tried.append(rate)
            if rate > 1:  # all fail, and the one of 2.56 fails a little less
                return {"validation loss": [4.7 + abs(np.log2(rate / 2.56))]}
            return {"validation loss": [abs(np.log2(rate / best)) + 1, np.nan if rate > 0.2 else 1.0]}

    assert _experiments.search(Cells(), "kd", "exact", start) == best
    assert {best / 2, best, best * 2} <= set(tried) and len(tried) == len(set(tried))


def test_the_search_looks_beyond_the_first_minimum():
    losses = {0.04: 0.5, 0.08: 0.6, 0.16: 0.45, 0.32: 0.4, 0.64: 0.3}  # of validation; elsewhere 1

    class Cells:
        def steps(self):
            return 7

        def classes(self):
            return 10

        def get(self, method, form, rate, steps):
            return {"validation loss": [losses.get(round(rate, 4), 1.0)]}

    assert _experiments.search(Cells(), "ce", "exact", 0.04) == 0.04
    assert _experiments.search(Cells(), "ce", "exact", 0.04, further=(4,)) == pytest.approx(0.64)
