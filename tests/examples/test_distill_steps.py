"""The train and evaluation steps, with a model that has BatchNorm."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dot_optax
from examples.distill import methods, models, objectives, steps
from examples.distill.configs.digits import get_config
from examples.trainer import parallel
from examples.trainer.step import init_state
from tests.tiers import slow_but

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


class _Small(nnx.Module):
    """Six classes, so that DeepKD can leave some out."""

    def __init__(self, *, rngs):
        self.classifier = nnx.Linear(4, 6, rngs=rngs)

    def __call__(self, images):
        return self.classifier(images)


def _numbers(params):
    return np.concatenate([np.ravel(np.asarray(params["classifier"][p], np.float64)) for p in ("kernel", "bias")])


def _logits(theta, images):
    return np.asarray(images, np.float64) @ theta[:-6].reshape(4, 6) + theta[-6:]


def _soft(logits):
    """The probabilities at a temperature of 4."""
    p = np.exp(logits / 4.0)
    return p / p.sum(axis=-1, keepdims=True)


def _parts_by_hand(logits, teacher_logits, labels, k):
    """TCKD, NCKD and (1 - q) NCKD of k classes, as means over the batch in float64, as they are defined."""
    parts = []
    for p, q, y in zip(_soft(logits), _soft(teacher_logits), labels, strict=True):
        tckd = q[y] * np.log(q[y] / p[y]) + (1 - q[y]) * np.log((1 - q[y]) / (1 - p[y]))

        def nckd(classes, p=p, q=q):
            p, q = p[classes] / p[classes].sum(), q[classes] / q[classes].sum()
            return np.sum(q * np.log(q / p))

        others = [c for c in np.argsort(-q) if c != y]
        parts.append([16 * tckd, 16 * nckd(others), 16 * (1 - q[y]) * nckd(others[:k])])
    return np.mean(parts, axis=0)


def _losses_by_hand(method, theta, teacher, batch, k):
    """The losses of a method, and the plain distillation loss, of a linear student with the parameters `theta`."""
    logits, labels = _logits(theta, batch["image"]), batch["label"]
    tckd, nckd, of_k = _parts_by_hand(logits, teacher, labels, k)
    q, p = _soft(teacher), _soft(logits)
    plain = 16 * np.mean(np.sum(q * np.log(q / p), axis=-1))
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    task = -np.mean(log_p[np.arange(len(labels)), labels])
    return (task, tckd, of_k) if method == "deepkd" else (task, tckd + 8 * nckd), plain


def _gradients_by_hand(losses, theta):
    """By central differences, whose error is some 1e-10 here."""
    steps = np.eye(len(theta)) * 1e-5
    return np.transpose([np.subtract(losses(theta + step), losses(theta - step)) / 2e-5 for step in steps])


_MOMENTA = {"dkd": (0.9, 0.9), "dkd_dot": (0.825, 0.975), "deepkd": (0.975, 0.825, 0.975)}


@pytest.mark.parametrize("method", slow_but(_MOMENTA, "dkd_dot"))
def test_three_steps_on_other_losses_are_what_they_are_by_hand(method):
    """In NumPy, float64, from the definitions: DKD's weight rises over four steps, DeepKD goes from 2 classes to all 5."""
    config = get_config()
    config.dkd.warmup_epochs, config.deepkd.top_k_phases = 4, (0.25, 0.75)
    config.optimizer.learning_rate, config.optimizer.weight_decay = 0.1, 0.01
    length = objectives.Length(epochs=4, steps_per_epoch=1)
    objective = methods.objective_of(method, config, length)
    graphdef, params, rest = models.split(_Small(rngs=nnx.Rngs(0)))
    teacher, *teacher_variables = models.split(_Small(rngs=nnx.Rngs(1)))
    teacher_variables = jax.tree.map(lambda leaf: 3 * leaf, teacher_variables)  # so that it is surer
    optimizer = methods.build(method, config.optimizer, objective.weights, 1, 4, objective.deltas)
    problem = steps.Problem(graphdef, teacher, 4.0, (0.0,) * 4, (1.0,) * 4, objective=objective)
    train_step = steps.make_train_step(problem, optimizer, _ONE_DEVICE)
    state = init_state(*jax.tree.map(jnp.copy, (params, rest)), optimizer)
    batch = _batch(8, 8) | {"label": np.array([0, 1, 2, 3, 4, 5, 0, 1], np.int32)}

    theta, wanted = _numbers(params), _logits(_numbers(teacher_variables[0]), batch["image"])
    buffers = [0.0] * len(_MOMENTA[method])
    for step, (rising, k) in enumerate([(0.25, 2), (0.5, 2), (0.75, 3)]):
        state, metrics = train_step(state, tuple(teacher_variables), batch)
        values, plain = _losses_by_hand(method, theta, wanted, batch, k)
        grads = _gradients_by_hand(lambda t, k=k: _losses_by_hand(method, t, wanted, batch, k)[0], theta)
        names = ("task", "target", "non_target") if method == "deepkd" else ("task", "dkd")
        expected = dict(zip([f"{name}_loss" for name in names], values, strict=True)) | {"kd_loss": plain}
        expected |= dict(zip([f"{name}_grad_norm" for name in names], map(np.linalg.norm, grads), strict=True))
        if len(grads) == 2:
            expected["grad_cosine"] = grads[0] @ grads[1] / np.linalg.norm(grads[0]) / np.linalg.norm(grads[1])
        assert set(metrics) == {*expected, "skipped"}
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=f"{name}, step {step}")
        weights = (0.1, 1, 1) if method == "deepkd" else (1, rising)
        grads = [weight * grad for weight, grad in zip(weights, grads, strict=True)]
        grads[0] = grads[0] + 0.01 * theta
        buffers = [grad + beta * v for grad, beta, v in zip(grads, _MOMENTA[method], buffers, strict=True)]
        theta = theta - 0.1 * sum(buffers)
        np.testing.assert_allclose(_numbers(state.params), theta, rtol=1e-4, atol=1e-5)  # float32, through exponentials


def test_an_optimizer_gets_the_losses_and_the_log_its_weights(problem, network, teacher):
    """DTO-KD by hand: the shortest combination of g / L of both losses, then SGD on it with an L2 penalty."""
    batch, config = _batch(8, 8), get_config().optimizer
    (task, task_grad), (kd, kd_grad) = _unweighted_losses(problem, network, teacher, batch)
    a, b = (jax.flatten_util.ravel_pytree(grad)[0] / loss for loss, grad in ((task, task_grad), (kd, kd_grad)))
    first = np.clip((b @ b - a @ b) / (a @ a + b @ b - 2 * a @ b), 0, 1)
    read = functools.partial(methods.read_state, "dto_kd")
    state, metrics = _step(problem, network, teacher, _optimizer("dto_kd"), batch, state_metrics=read)
    np.testing.assert_allclose(metrics["task_weight"], first / task, rtol=1e-4)  # sums of some ten float32 numbers
    np.testing.assert_allclose(metrics["kd_weight"], (1 - first) / kd, rtol=1e-4)
    theta = jax.flatten_util.ravel_pytree(network[1])[0]
    expected = theta - config.learning_rate * (first * a + (1 - first) * b + config.weight_decay * theta)
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(state.params)[0], expected, rtol=1e-4, atol=1e-6)


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
