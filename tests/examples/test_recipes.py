"""Each recipe against DOT in NumPy, `examples/recipes/numpy_reference.py`; and the page against the files.

Tolerances: parameters and gradients are of order one and float32 rounds at 6e-8, which the momenta's gains (6 and 40)
and a few steps amplify; what one wrong mask, statistic or momentum changes is above 1e-3.
"""

import pathlib
import re

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.training.dynamic_scale import DynamicScale

import dot_optax
from examples.recipes import (
    numpy_reference,
    one_forward_pass,
    with_accumulating_trainer,
    with_equinox,
    with_flax,
    with_float16,
    with_keras,
    with_nnx,
)
from examples.recipes.problem import BATCH, batches, losses

RECIPES = pathlib.Path(with_equinox.__file__).parent
FLOAT32 = 1e-5
STEPS = 6


# The reference


def network(theta, x):
    """The student of `numpy_reference` in JAX, to differentiate."""
    h = x @ theta["w1"] + theta["b1"][None]
    if "scale" in theta:
        h = (h - h.mean(0, keepdims=True)) / jnp.sqrt(h.var(0, keepdims=True) + 1e-5)
        h = theta["scale"][None] * h + theta["bias"][None]
    return jax.nn.relu(h) @ theta["w2"] + theta["b2"][None]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_gradients_of_the_reference(batch_norm):
    theta = with_float16.init()
    theta["b1"] = jnp.linspace(-1.0, 1.0, 4)
    if batch_norm:
        theta |= {"scale": jnp.linspace(0.5, 1.5, 4), "bias": jnp.linspace(-0.5, 0.5, 4)}
    x, labels, teacher_logits = batches(1)[0]
    expected = numpy_reference.gradients(
        {k: np.asarray(p, np.float64) for k, p in theta.items()}, x, labels, teacher_logits
    )
    for i, grads in enumerate(expected):
        of_jax = jax.jit(jax.grad(lambda t, i=i: losses(network(t, x), labels, teacher_logits)[i]))(theta)
        assert numpy_reference.deviation(of_jax, grads) < FLOAT32


def test_the_reference_depends_on_both_momenta(monkeypatch):
    """Else the recipes would be compared with something that another optimizer satisfies too."""
    theta = with_float16.init()
    expected = numpy_reference.train(theta, batches(STEPS))
    monkeypatch.setattr(numpy_reference, "BETA_KD", numpy_reference.BETA_TASK)
    assert numpy_reference.deviation(numpy_reference.train(theta, batches(STEPS)), expected) > 1e-2


# A plain Flax loop


def test_flax():
    start = with_flax.init()
    expected = numpy_reference.train(with_flax.arrays(start.params), batches(STEPS))
    trained = with_flax.train(STEPS)
    assert numpy_reference.deviation(with_flax.arrays(trained.params), expected) < FLOAT32


@pytest.mark.slow
def test_flax_moves_the_statistics_once_a_step():
    x, body = batches(1)[0][0], with_flax.init().params["body"]
    mean = (x @ np.asarray(body["kernel"]) + np.asarray(body["bias"])).mean(0)
    # Flax's default momentum is 0.99, from a mean of 0; float32 rounds the mean, of order one, at 6e-8.
    moved = with_flax.train(1).batch_stats["norm"]["mean"]
    np.testing.assert_allclose(moved, 0.01 * mean, rtol=0, atol=1e-7)


# Flax NNX


def test_nnx():
    start, before = with_nnx.Student(nnx.Rngs(0)), nnx.to_pure_dict(nnx.state(with_nnx.make_teacher()))
    expected = numpy_reference.train(with_nnx.arrays(start), batches(STEPS), kept=with_nnx.masks(STEPS))
    model, metrics, rngs, teacher = with_nnx.train(STEPS)
    assert numpy_reference.deviation(with_nnx.arrays(model), expected) < FLOAT32
    assert rngs.dropout.count[...] == STEPS
    assert metrics.accuracy.count[...] == STEPS * BATCH
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(teacher)), before)


@pytest.mark.slow
def test_the_masks_of_nnx_matter():
    start = with_nnx.arrays(with_nnx.Student(nnx.Rngs(0)))
    expected = numpy_reference.train(start, batches(STEPS), kept=with_nnx.masks(STEPS))
    assert numpy_reference.deviation(numpy_reference.train(start, batches(STEPS)), expected) > 1e-2


def test_the_teacher_of_nnx_gives_the_problem_s_logits_only_in_evaluation():
    (x, _, teacher_logits), teacher = batches(1)[0], with_nnx.make_teacher()
    # A matrix product of NumPy's and one of JAX's, of numbers up to about 10.
    np.testing.assert_allclose(teacher(x), teacher_logits, rtol=0, atol=FLOAT32)
    teacher.train()
    assert np.abs(teacher(x) - teacher_logits).max() > 1.0


# Equinox


@pytest.mark.parametrize(("frozen", "devices"), [(True, 1), (False, 4)])
def test_equinox(frozen, devices):
    start, _ = with_equinox.make()
    expected = numpy_reference.train(with_equinox.arrays(start), batches(STEPS), frozen=("w1", "b1") if frozen else ())
    model, _, values = with_equinox.train(STEPS, frozen, devices)
    assert numpy_reference.deviation(with_equinox.arrays(model), expected) < FLOAT32
    assert len(values.kd.sharding.device_set) == devices
    if frozen:
        chex.assert_trees_all_equal(eqx.filter(model.body, eqx.is_array), eqx.filter(start.body, eqx.is_array))


@pytest.mark.slow
def test_equinox_moves_the_statistics_once_a_step():
    start, _ = with_equinox.make()
    model, state, _ = with_equinox.train(2, frozen=True)
    means = [(x @ np.asarray(start.body.weight).T + np.asarray(start.body.bias)).mean(0) for x, _, _ in batches(2)]
    assert state.get(model.norm.batch_counter) == 2
    # Equinox's default momentum is 0.99, from a mean of 0.
    expected = 0.99 * 0.01 * means[0] + 0.01 * means[1]
    np.testing.assert_allclose(state.get(model.norm.batch_state_index)[0], expected, rtol=0, atol=1e-7)


# Float16


def test_float16_with_loss_scaling_equals_float32():
    """To the rounding of float16, 5e-4, amplified as above; the gradients are not scaled in the reference."""
    params, scaling, skipped = with_float16.train(STEPS, initial_scale=2.0**10)
    assert numpy_reference.deviation(params, numpy_reference.train(with_float16.init(), batches(STEPS))) < 5e-3
    assert (scaling.scale, scaling.finite_steps, skipped) == (2.0**10, STEPS, 0)


def test_an_overflow_halves_the_scale_and_changes_nothing_else():
    params, optimizer, batch = with_float16.init(), with_float16.optimizer, batches(1)[0]
    opt_state = optimizer.init(params)
    # A finite step first, so that the momenta are not zero.
    params, opt_state, _, _ = with_float16.train_step(params, opt_state, with_float16.loss_scale(), *batch)
    too_large = with_float16.loss_scale(2.0**40)
    new_params, new_opt_state, scaling, values = with_float16.train_step(params, opt_state, too_large, *batch)
    chex.assert_trees_all_equal((new_params, new_opt_state), (params, opt_state))
    assert (scaling.scale, scaling.finite_steps) == (2.0**39, 0)
    chex.assert_trees_all_close(values, with_float16.loss_fn(params, *batch), rtol=1e-6)


@pytest.mark.slow
def test_one_loss_that_overflows_skips_the_step_for_both():
    params, batch = with_float16.init(), batches(1)[0]
    opt_state = with_float16.optimizer.init(params)
    x, labels, teacher_logits = batch
    infinite = jnp.full_like(teacher_logits, jnp.nan)  # only the distillation loss sees it
    new_params, new_opt_state, scaling, _ = with_float16.train_step(
        params, opt_state, with_float16.loss_scale(), x, labels, infinite
    )
    chex.assert_trees_all_equal((new_params, new_opt_state), (params, opt_state))
    assert scaling.scale == 2.0**14


@pytest.mark.slow
def test_the_scale_doubles_after_an_interval_of_finite_steps():
    scaling, history = with_float16.loss_scale(4.0), []
    for finite in (True, True, True, False, True, True, True):
        scaling = scaling.adjusted(jnp.asarray(finite), interval=3)
        history.append(float(scaling.scale))
    assert history == [4.0, 4.0, 8.0, 4.0, 4.0, 4.0, 8.0]
    assert with_float16.loss_scale(1.0).adjusted(jnp.asarray(False)).scale == 1.0


def test_scaling_keeps_small_gradients():
    assert with_float16.zeros(1e-6, scale=1.0) > 10
    assert with_float16.zeros(1e-6, scale=2.0**15) == 0


@pytest.mark.parametrize("container", [dot_optax.PerLoss, lambda task, kd: {"task": task, "kd": kd}])
def test_flax_dynamic_scale_does_not_take_a_container(container):
    """If it ever does, the recipe is to be simplified."""
    with pytest.raises(TypeError):
        DynamicScale().value_and_grad(lambda w: container(w, 2.0 * w))(jnp.ones(()))


# Keras


@pytest.fixture
def rank_promotion():
    """Keras's own layers rely on it."""
    with jax.numpy_rank_promotion("allow"):
        yield


def test_keras(rank_promotion):
    model = with_keras.make()
    expected = numpy_reference.train(with_keras.arrays(model), batches(STEPS), kept=with_keras.masks(STEPS))
    history = with_keras.fit(model, STEPS)
    assert numpy_reference.deviation(with_keras.arrays(model), expected) < FLOAT32
    assert set(history) == {"task", "kd"}
    assert int(model.optimizer.iterations) == STEPS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's, as it writes the file
def test_keras_keeps_the_momenta_between_epochs_and_files(rank_promotion, tmp_path):
    model, other = with_keras.make(0.0), with_keras.make(0.0)
    expected = numpy_reference.train(with_keras.arrays(model), batches(STEPS) * 2)
    with_keras.fit(model, STEPS)
    model.save_weights(tmp_path / "model.weights.h5")
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "model.weights.h5")
    for trained in (model, other):
        with_keras.fit(trained, STEPS)
        assert numpy_reference.deviation(with_keras.arrays(trained), expected) < FLOAT32


# Trainers with MultiSteps


@pytest.mark.parametrize("way", [with_accumulating_trainer.wrapped_before, with_accumulating_trainer.wrapped_after])
def test_a_trainer_that_accumulates(way):
    trainer = way()
    expected = numpy_reference.train(with_accumulating_trainer.arrays(trainer.model), batches(STEPS), every=2)
    trainer.train(batches(STEPS))
    assert numpy_reference.deviation(with_accumulating_trainer.arrays(trainer.model), expected) < FLOAT32


def test_a_trainer_that_wraps_dot_itself():
    with pytest.raises(ValueError, match="pytree structure error"):
        with_accumulating_trainer.wrapped_by_the_trainer().train(batches(2))


# One forward pass


def test_a_gradient_for_each_loss_moves_batch_norm_twice_and_draws_two_masks():
    """The moves are a quotient of logarithms of numbers near one, which float32 gives to about 1e-5."""
    moves, different = one_forward_pass.measure(one_forward_pass.one_grad_for_each_loss)
    assert moves == pytest.approx(2.0, abs=1e-3)
    assert different > 0


def test_value_and_grads_moves_batch_norm_once_and_draws_one_mask():
    moves, different = one_forward_pass.measure(one_forward_pass.value_and_grads)
    assert moves == pytest.approx(1.0, abs=1e-3)
    assert different == 0


# The page


PAGE = (RECIPES / "README.md").read_text()
SECTIONS = dict(re.findall(r"^## .*?`(\w+)\.py`\)?\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))


NAMES = {path.stem for path in RECIPES.glob("*.py")} - {"__init__", "problem", "numpy_reference"}


def test_the_page_has_a_section_for_each_recipe():
    assert SECTIONS.keys() == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_code_on_the_page_is_in_the_file(name):
    source = [line.strip() for line in (RECIPES / f"{name}.py").read_text().splitlines()]
    blocks = re.findall(r"```(?:python|diff)\n(.*?)```", SECTIONS[name], flags=re.DOTALL)
    lines = [line.lstrip("+ ") for block in blocks for line in block.splitlines() if line.strip() and line[0] != "-"]
    assert lines
    assert [line for line in lines if line not in source] == []


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_recipe_says_how_to_run_it(name):
    for text in (RECIPES / f"{name}.py").read_text(), SECTIONS[name]:
        assert re.search(rf"^ *python -m examples.recipes.{name}$", text, flags=re.MULTILINE)
