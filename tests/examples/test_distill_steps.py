"""The train and evaluation steps, with a model that has BatchNorm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dot_optax
from examples.distill import methods, models, steps
from examples.distill.configs.digits import get_config


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


def _optimizer(method):
    return methods.build(method, get_config().optimizer, dot_optax.PerLoss(task=0.1, kd=0.9), steps_per_epoch=1)


def _batch(size, valid):
    rng = np.random.default_rng(0)
    return {
        "image": rng.normal(loc=3.0, size=(size, 4)).astype(np.float32),
        "label": rng.integers(3, size=size).astype(np.int32),
        "valid": np.arange(size) < valid,
    }


def test_training_updates_the_batch_statistics_and_leaves_the_teacher_alone(network, teacher):
    graphdef, params, rest = network
    before = jax.tree.map(np.array, (params, rest, teacher.variables))
    optimizer = _optimizer("dot")
    train_step = steps.make_train_step(graphdef, teacher.graphdef, optimizer, 4.0)
    state, losses = train_step(steps.init_state(params, rest, optimizer), teacher.variables, _batch(8, 8))
    assert int(state.step) == 1
    assert losses.task.shape == losses.kd.shape == ()
    assert np.abs(state.rest["norm"]["mean"] - before[1]["norm"]["mean"]).max() > 0.01
    assert np.abs(state.params["classifier"]["kernel"] - before[0]["classifier"]["kernel"]).max() > 0
    jax.tree.map(np.testing.assert_array_equal, teacher.variables, before[2])


def test_losses_are_the_unweighted_ones(network, teacher):
    graphdef, params, rest = network
    batch = _batch(8, 8)
    logits, _ = models.apply(graphdef, params, rest, batch["image"], train=True)
    teacher_logits, _ = models.apply(teacher.graphdef, *teacher.variables, batch["image"], train=False)
    task = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    kd = dot_optax.losses.kd_loss(logits, teacher_logits, 4.0).mean()
    optimizer = _optimizer("kd")
    train_step = steps.make_train_step(graphdef, teacher.graphdef, optimizer, 4.0)
    _, losses = train_step(steps.init_state(params, rest, optimizer), teacher.variables, batch)
    np.testing.assert_allclose(losses, (task, kd), rtol=1e-5)


def test_evaluation_ignores_padding_and_uses_running_statistics(network, teacher):
    graphdef, params, rest = network
    eval_step = steps.make_eval_step(graphdef, teacher.graphdef, 4.0)
    padded = _batch(8, valid=5)
    padded["image"][5:] = np.nan
    exact = {name: value[:5] for name, value in padded.items()}
    sums = eval_step((params, rest), teacher.variables, padded)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        sums,
        eval_step((params, rest), teacher.variables, exact),
    )
    logits = models.apply(graphdef, params, rest, jnp.asarray(exact["image"]), train=False)[0]
    assert sums["accuracy"] == np.sum(np.argmax(logits, axis=-1) == exact["label"])
