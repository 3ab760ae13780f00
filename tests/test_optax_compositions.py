"""Every optimizer in the first table of `examples/optax/README.md`, run against the same thing in NumPy."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dot_optax import PerLoss
from tests import optax_compositions
from tests.reference import numpy_optimizers

PAGE = (pathlib.Path(__file__).parent.parent / "examples" / "optax" / "README.md").read_text()
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


def container(row, task, kd):
    if "hint" in row.line:
        return {"ce": task, "hint": task, "kd": kd}
    if "deepkd" in row.line:
        return (task, task, kd)
    return PerLoss(task, kd)


def run(row, line, grads):
    """The parameters after every step, in float64."""
    tx = eval(line, optax_compositions.NAMESPACE)
    params = row.init(jax.tree.map(jnp.asarray, row.params or PARAMS))
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step, pair in enumerate(grads):
        extra = row.extra[step] if row.extra else {}
        packed = pair[0] if len(pair) == 1 else container(row, *pair)
        updates, state = update(packed, state, params, **extra)
        params = optax.apply_updates(params, updates)
        yield row.view(params)


# A row that varies the one above ("... of some parameters"), and a NaN in the second loss, are slow.
CASES = [
    pytest.param(
        row,
        nan,
        id=f"{row.what}{'' if nan is None else f', NaN {nan}'}",
        marks=pytest.mark.slow if row.what.startswith("...") or nan == 1 else (),
    )
    for row in optax_compositions.COMPOSITIONS
    for nan in ((0, 1) if row.nan else (None,))
]


@pytest.mark.parametrize(("row", "nan"), CASES)
def test_it_does_what_numpy_does(row, nan):
    with jax.enable_x64(True):
        theta = row.params or PARAMS
        grads, reference = stream(theta, nan), row.reference()
        for step, params in enumerate(run(row, row.line, grads)):
            update = reference(theta, *grads[step], **(row.extra[step] if row.extra else {}))
            theta = numpy_optimizers.each(np.add, theta, update)
            for k in theta:
                np.testing.assert_allclose(params[k], theta[k], rtol=0, atol=row.tolerance, err_msg=f"step {step}, {k}")


REFUSED = [row for row in optax_compositions.COMPOSITIONS if row.instead_of]


@pytest.mark.parametrize("pack", [PerLoss, lambda task, kd: (task, kd), lambda task, kd: {"task": task, "kd": kd}])
@pytest.mark.parametrize("row", REFUSED, ids=[row.what for row in REFUSED])
def test_what_one_might_write_first_raises(row, pack):
    grads = [(pack(*pair),) for pair in stream(PARAMS)]
    with pytest.raises((ValueError, TypeError)) as error:
        list(run(row, row.instead_of, grads))
    if pack is PerLoss:
        assert "PerLoss" in str(error.value) or "static_args" in str(error.value)


def test_the_error_that_the_page_shows():
    dot, params = optax_compositions.NAMESPACE["dot"], {"w": jnp.ones(2)}
    tx = optax.MultiSteps(dot(0.1), every_k_schedule=2)
    with pytest.raises(ValueError) as error:
        tx.update(PerLoss(params, params), tx.init(params), params)
    shown = re.search(r"```text\nValueError: (.*?)```", PAGE, flags=re.DOTALL).group(1)
    raised = " ".join(str(error.value).split())
    for line in shown.splitlines():
        assert line in raised


@pytest.mark.parametrize("row", optax_compositions.SNIPPETS, ids=[row.what for row in optax_compositions.SNIPPETS])
def test_the_other_rows_name_tests_that_exist(row):
    module, name = row.test.rsplit(".", 1)
    path = pathlib.Path(__file__).parent / f"{module.replace('.', '/')}.py"
    assert f"def {name}(" in path.read_text()


def test_tree_get_and_set():
    dot = optax_compositions.NAMESPACE["dot"]
    params = {"w": jnp.ones(2)}
    tx = dot(0.1)
    _, state = tx.update((params, params), tx.init(params), params)
    np.testing.assert_array_equal(optax.tree.get(state, "kd").trace["w"], 1.0)
    tx = optax.inject_hyperparams(dot)(0.1)
    state = optax.tree.set(tx.init(params), learning_rate=0.01, beta_kd=0.5)
    updates, state = tx.update((params, params), state, params)
    np.testing.assert_allclose(updates["w"], -0.02, rtol=1e-6)
    assert optax.tree.get(state, "beta_kd") == 0.5


def test_the_page_has_the_tables():
    for table in optax_compositions.tables():
        assert table in PAGE, "python -m tests.optax_compositions prints the tables for the page"
