"""The benchmarks run, and print what their docstrings show, on a small scale."""

import json

import jax
import numpy as np
import pytest

from benchmarks import digits_learning_rates, gradient_cost


def test_digits_learning_rates(tmp_path, capsys):
    path = tmp_path / "report.json"
    arguments = "--seeds 2 --shared_epochs 2 --tuned_epochs 1 --learning_rates 0.01 0.05 --json"
    with jax.numpy_rank_promotion("allow"):  # a layer adds its bias as people write it
        digits_learning_rates.main([*arguments.split(), str(path)])
    report = json.loads(path.read_text())
    assert set(report) == {"shared", "tuned"}
    for methods in report.values():
        assert list(methods) == list(digits_learning_rates.METHODS)
        for values in methods.values():
            assert np.isfinite(values["test loss"]).all() and len(values["test loss"]) == 2
    printed = capsys.readouterr().out
    assert all(f"| {method} |" in printed for method in digits_learning_rates.METHODS)


def test_gradient_cost(tmp_path):
    path = tmp_path / "flops.json"
    gradient_cost.main(["--json", str(path)])
    flops = json.loads(path.read_text())
    ours = flops["dot_optax.value_and_grads"]
    assert ours == pytest.approx(flops["two jax.grad in one jit"], rel=0.01)
    # One forward and two backward passes instead of one: at most 5/3, less what the first layer need not do.
    assert 1.6 < ours / flops["one gradient of the sum"] < 5 / 3
