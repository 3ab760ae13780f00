"""The train and evaluation steps, with a model that has BatchNorm."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dot_optax
from examples.distill import methods, models, steps
from examples.distill.configs.digits import get_config
from examples.trainer import parallel
from examples.trainer.step import init_state

_ONE_DEVICE = parallel.jit_layout(jax.sharding.Mesh(jax.devices()[:1], (parallel.AXIS,)))


class _Normalized(nnx.Module):
    def __init__(self, num_classes, *, rngs):
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.classifier = nnx.Linear(4, num_classes, rngs=rngs)

    def __call__(self, images):
        return self.classifier(self.norm(images))


@pytest.fixture
def network():
    return models.split(_Normalized(3, rngs=nnx.Rngs(0)))


@pytest.fixture
def teacher():
    graphdef, params, rest = models.split(_Normalized(3, rngs=nnx.Rngs(1)))
    return steps.Teacher(graphdef, (params, rest))


@pytest.fixture
def problem(network, teacher):
    return steps.Problem(network[0], teacher.graphdef, temperature=4.0, mean=(0.0,) * 4, std=(1.0,) * 4)


def _optimizer(method):
    return methods.build(method, get_config().optimizer, dot_optax.PerLoss(task=0.1, kd=0.9), steps_per_epoch=1)


def _batch(size, valid):
    rng = np.random.default_rng(0)
    return {
        "image": rng.normal(loc=3.0, size=(size, 4)).astype(np.float32),
        "label": rng.integers(3, size=size).astype(np.int32),
        "valid": np.arange(size) < valid,
    }


def _step(problem, network, teacher, optimizer, batch, **options):
    params, rest = jax.tree.map(jnp.copy, network[1:])  # the step overwrites them
    train_step = steps.make_train_step(problem, optimizer, _ONE_DEVICE, **options)
    return train_step(init_state(params, rest, optimizer), teacher.variables, batch)


def test_training_updates_the_batch_statistics_and_leaves_the_teacher_alone(problem, network, teacher):
    _, params, rest = network
    before = jax.tree.map(np.array, (params, rest, teacher.variables))
    state, metrics = _step(problem, network, teacher, _optimizer("dot"), _batch(8, 8))
    assert int(state.step) == 1
    assert all(value.shape == () for value in metrics.values())
    assert np.abs(state.rest["norm"]["mean"] - before[1]["norm"]["mean"]).max() > 0.01
    assert np.abs(state.params["classifier"]["kernel"] - before[0]["classifier"]["kernel"]).max() > 0
    jax.tree.map(np.testing.assert_array_equal, teacher.variables, before[2])


def test_a_step_that_is_not_finite_changes_nothing(problem, network, teacher):
    """Neither parameters nor momenta nor the statistics of BatchNorm; the step after it is as if it had not been."""
    optimizer = _optimizer("dot")
    train_step = steps.make_train_step(problem, optimizer, _ONE_DEVICE)
    good, bad = _batch(8, 8), _batch(8, 8)
    bad["image"][3, 2] = np.nan
    wrong = good | {"label": np.full_like(good["label"], 99)}  # JAX makes NaN of what it does not find

    def run(batches):
        state = init_state(*jax.tree.map(jnp.copy, network[1:]), optimizer)
        skipped = []
        for batch in batches:
            state, metrics = train_step(state, teacher.variables, batch)
            skipped.append(float(metrics["skipped"]))
        return jax.device_get(state), skipped

    state, skipped = run([good, bad, wrong, good])
    expected, _ = run([good, good])
    assert skipped == [0, 1, 1, 0]
    assert (state.step, expected.step) == (4, 2)
    jax.tree.map(np.testing.assert_array_equal, state[1:], expected[1:])


def _unweighted_losses(problem, network, teacher, batch):
    _, params, rest = network
    teacher_logits, _ = models.apply(teacher.graphdef, *teacher.variables, batch["image"], train=False)

    def task(params):
        logits, _ = models.apply(problem.student, params, rest, batch["image"], train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    def kd(params):
        logits, _ = models.apply(problem.student, params, rest, batch["image"], train=True)
        return dot_optax.losses.kd_loss(logits, teacher_logits, 4.0).mean()

    return jax.jit(lambda params: (jax.value_and_grad(task)(params), jax.value_and_grad(kd)(params)))(params)


def test_metrics_are_those_of_the_unweighted_losses(problem, network, teacher):
    batch = _batch(8, 8)
    (task, task_grad), (kd, kd_grad) = _unweighted_losses(problem, network, teacher, batch)
    a, b = (jax.flatten_util.ravel_pytree(grad)[0] for grad in (task_grad, kd_grad))
    expected = {
        "task_loss": task,
        "kd_loss": kd,
        "task_grad_norm": np.linalg.norm(a),
        "kd_grad_norm": np.linalg.norm(b),
        "grad_cosine": a @ b / np.linalg.norm(a) / np.linalg.norm(b),
        "skipped": 0.0,
    }
    _, metrics = _step(problem, network, teacher, _optimizer("kd"), batch)
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)  # sums of some ten float32 numbers


def test_a_gradient_that_vanishes_has_no_conflict(network, teacher):
    problem = steps.Problem(network[0], network[0], 4.0, (0.0,) * 4, (1.0,) * 4)
    batch = _batch(8, 8) | {"image": np.zeros((8, 4), np.float32)}  # the student agrees with itself
    _, metrics = _step(problem, network, steps.Teacher(network[0], network[1:]), _optimizer("kd"), batch)
    assert metrics["kd_grad_norm"] == metrics["grad_cosine"] == 0


def test_without_a_teacher_nothing_is_said_of_distillation(problem, network, teacher):
    alone, batch = problem._replace(teacher=None), _batch(8, 8)
    _, metrics = _step(alone, network, teacher, _optimizer("ce"), batch)
    assert set(metrics) == {"task_loss", "task_grad_norm", "skipped"}
    sums = steps.make_eval_step(alone)(network[1:], None, batch)
    assert set(sums) == {"task_loss", "top1", "top5"}


def test_without_gradient_metrics_ce_has_no_second_backward_pass(problem, network, teacher):
    def flops(**options):
        train_step = steps.make_train_step(problem, optimizer, _ONE_DEVICE, **options)
        state = init_state(*network[1:], optimizer)
        return train_step.lower(state, teacher.variables, _batch(256, 256)).compile().cost_analysis()["flops"]

    optimizer = _optimizer("ce")
    with_metrics, without = flops(gradient_metrics=True), flops(gradient_metrics=False)
    assert without < 0.9 * with_metrics
    train_step = steps.make_train_step(problem, optimizer, _ONE_DEVICE, gradient_metrics=False)
    state = init_state(*network[1:], optimizer)
    _, metrics = jax.eval_shape(train_step, state, teacher.variables, _batch(8, 8))
    assert set(metrics) == {"task_loss", "kd_loss", "skipped"}


def test_images_are_normalized_on_the_device(problem, network, teacher):
    stored = _batch(8, 8)
    stored["image"] = np.arange(32, dtype=np.uint8).reshape(8, 4) * 8
    mean, std = (10.0, 20.0, 30.0, 40.0), (1.0, 2.0, 4.0, 8.0)
    normalized = stored | {"image": (stored["image"].astype(np.float32) - np.float32(mean)) / np.float32(std)}
    sums = steps.make_eval_step(problem._replace(mean=mean, std=std))(network[1:], teacher.variables, stored)
    expected = steps.make_eval_step(problem)(network[1:], teacher.variables, normalized)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), sums, expected)


def test_evaluation_ignores_padding_and_uses_running_statistics(problem, network, teacher):
    graphdef, *variables = network
    eval_step = steps.make_eval_step(problem)
    padded = _batch(8, valid=5)
    padded["image"][5:] = np.nan
    exact = {name: value[:5] for name, value in padded.items()}
    sums = eval_step(variables, teacher.variables, padded)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), sums, eval_step(variables, teacher.variables, exact)
    )
    logits = models.apply(graphdef, *variables, jnp.asarray(exact["image"]), train=False)[0]
    assert sums["top1"] == np.sum(np.argmax(logits, axis=-1) == exact["label"])
    assert sums["top5"] == 5  # of three classes


class _Constant(nnx.Module):
    """The likelier a class, the smaller its number."""

    def __init__(self, rngs):
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, images):
        return -self.scale * jnp.broadcast_to(jnp.arange(10.0)[None], (len(images), 10))


def test_top1_and_top5():
    graphdef, *variables = models.split(_Constant(nnx.Rngs(0)))
    batch = {"image": np.zeros((10, 4), np.float32), "label": np.arange(10, dtype=np.int32), "valid": np.ones(10, bool)}
    sums = steps.make_eval_step(steps.Problem(graphdef, None, 4.0, (0.0,), (1.0,)))(variables, None, batch)
    assert (sums["top1"], sums["top5"]) == (1, 5)
