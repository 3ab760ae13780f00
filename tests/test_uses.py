"""Every row of the README's table of uses, run against the same thing written by hand."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dot_optax import PerLoss
from tests import by_hand, uses

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
PARAMS = {"w": np.array([[0.5, -1.0, 2.0], [0.1, 0.3, -0.7]]), "b": np.array([1.0, -0.2, 0.4])}
STEPS = 8


def stream(params, nan=None):
    """The (task, kd) gradients of every step in float64; with `nan`, that loss's third has one."""
    rng = np.random.default_rng(0)
    sample = lambda x: rng.standard_normal(x.shape) + (1j * rng.standard_normal(x.shape) if x.dtype == complex else 0)  # noqa: E731
    grads = [[{k: sample(x) for k, x in params.items()} for _ in range(2)] for _ in range(STEPS)]
    if nan is not None:
        grads[2][nan]["b"][1] = np.nan
    return grads


def container(use, task, kd):
    if "hint" in use.line:
        return {"ce": task, "hint": task, "kd": kd}
    if "deepkd" in use.line:
        return (task, task, kd)
    return PerLoss(task, kd)


def run(use, line, grads):
    """The parameters after every step, in float64."""
    tx = eval(line, uses.NAMESPACE)
    params = use.init(jax.tree.map(jnp.asarray, use.params or PARAMS))
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step, pair in enumerate(grads):
        extra = use.extra[step] if use.extra else {}
        packed = pair[0] if len(pair) == 1 else container(use, *pair)
        updates, state = update(packed, state, params, **extra)
        params = optax.apply_updates(params, updates)
        yield use.view(params)


CASES = [(use, nan) for use in uses.USES for nan in ((0, 1) if use.nan else (None,))]


@pytest.mark.parametrize(
    ("use", "nan"), CASES, ids=[f"{use.what}{'' if n is None else f', NaN {n}'}" for use, n in CASES]
)
def test_it_does_what_the_hand_written_loop_does(use, nan):
    with jax.enable_x64(True):
        theta = use.params or PARAMS
        grads, step_by_hand = stream(theta, nan), use.by_hand()
        for step, params in enumerate(run(use, use.line, grads)):
            update = step_by_hand(theta, *grads[step], **(use.extra[step] if use.extra else {}))
            theta = by_hand.each(np.add, theta, update)
            for k in theta:
                np.testing.assert_allclose(params[k], theta[k], rtol=0, atol=use.tolerance, err_msg=f"step {step}, {k}")


REFUSED = [use for use in uses.USES if use.instead_of]


@pytest.mark.parametrize("pack", [PerLoss, lambda task, kd: (task, kd), lambda task, kd: {"task": task, "kd": kd}])
@pytest.mark.parametrize("use", REFUSED, ids=[use.what for use in REFUSED])
def test_what_one_might_write_first_raises(use, pack):
    grads = [(pack(*pair),) for pair in stream(PARAMS)]
    with pytest.raises((ValueError, TypeError)) as error:
        list(run(use, use.instead_of, grads))
    if pack is PerLoss:
        assert "PerLoss" in str(error.value) or "static_args" in str(error.value)


def test_the_error_that_the_readme_shows():
    dot, params = uses.NAMESPACE["dot"], {"w": jnp.ones(2)}
    tx = optax.MultiSteps(dot(0.1), every_k_schedule=2)
    with pytest.raises(ValueError) as error:
        tx.update(PerLoss(params, params), tx.init(params), params)
    shown = re.search(r"```text\nValueError: (.*?)```", README, flags=re.DOTALL).group(1)
    raised = " ".join(str(error.value).split())
    for line in shown.splitlines():
        assert line in raised


@pytest.mark.parametrize("use", uses.ELSEWHERE, ids=[use.what for use in uses.ELSEWHERE])
def test_the_other_rows_name_tests_that_exist(use):
    module, name = use.test.rsplit(".", 1)
    path = pathlib.Path(__file__).parent / f"{module.replace('.', '/')}.py"
    assert f"def {name}(" in path.read_text()


def test_tree_get_and_set():
    dot = uses.NAMESPACE["dot"]
    params = {"w": jnp.ones(2)}
    tx = dot(0.1)
    _, state = tx.update((params, params), tx.init(params), params)
    np.testing.assert_array_equal(optax.tree.get(state, "kd").trace["w"], 1.0)
    tx = optax.inject_hyperparams(dot)(0.1)
    state = optax.tree.set(tx.init(params), learning_rate=0.01, beta_kd=0.5)
    updates, state = tx.update((params, params), state, params)
    np.testing.assert_allclose(updates["w"], -0.02, rtol=1e-6)
    assert optax.tree.get(state, "beta_kd") == 0.5


def test_the_readme_has_the_table():
    assert uses.table() in README, "python -m tests.uses prints the table for the README"
