"""The benchmarks run, and print what their docstrings show, on a small scale."""

import json

import jax
import numpy as np
import pytest

from benchmarks import digits_learning_rates, gradient_cost, input_pipeline, pod_cost, recipe_cost


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
    pod_cost.main(["--batch_sizes", "4096", "--forms", "shard_map", "--json", str(path)])
    kd, dot = json.loads(path.read_text())
    assert (kd["method"], dot["method"]) == ("kd", "dot")
    assert dot["memory_gb"] < 16  # of a v5e
    assert set(dot["collective_mb"]) == {"all-reduce"}
    parameters = 4 * 4_231_976 / 1e6
    assert parameters < dot["collective_mb"]["all-reduce"] <= 1.01 * kd["collective_mb"]["all-reduce"]
