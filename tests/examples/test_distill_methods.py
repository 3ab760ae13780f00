"""The optimizers of the four methods, and their learning rate."""

import jax
import numpy as np
import optax
import pytest

import dot_optax
from examples.distill import methods
from examples.distill.configs.digits import get_config
from examples.trainer.errors import UserError

PARAMS = {"w": np.array([0.5, -1.0], np.float32)}


def _optimizer(method, **overrides):
    config = get_config()
    config.optimizer.update(overrides)
    return methods.build(method, config.optimizer, dot_optax.PerLoss(task=0.1, kd=0.9), steps_per_epoch=14)


def _grads(step):
    rng = np.random.default_rng(step)
    return dot_optax.PerLoss(*({"w": rng.normal(size=2).astype(np.float32)} for _ in range(2)))


def _train(optimizer, steps, grads=_grads):
    params, state = PARAMS, optimizer.init(PARAMS)
    update = jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(grads(step), state, params)
        params = optax.apply_updates(params, updates)
    return params, updates


def test_a_drop_at_150_takes_effect_in_epoch_151():
    config = get_config().optimizer
    config.drop_epochs, config.drop_factor = (150, 180), 0.1
    schedule = methods.learning_rate_schedule(config, steps_per_epoch=14)
    last_step_of_epoch_150, first_step_of_epoch_151 = 150 * 14 - 1, 150 * 14
    np.testing.assert_allclose(schedule(last_step_of_epoch_150), 0.01, rtol=1e-6)
    np.testing.assert_allclose(schedule(first_step_of_epoch_151), 0.001, rtol=1e-6)
    np.testing.assert_allclose(schedule(180 * 14), 0.0001, rtol=1e-6)


def test_dot_without_delta_is_kd():
    kd, _ = _train(_optimizer("kd"), steps=30)
    dot, _ = _train(_optimizer("dot", delta=0.0), steps=30)
    np.testing.assert_allclose(dot["w"], kd["w"], rtol=1e-5)


def test_dot_with_delta_is_not_kd():
    kd, _ = _train(_optimizer("kd"), steps=30)
    dot, _ = _train(_optimizer("dot"), steps=30)
    assert np.abs(dot["w"] - kd["w"]).max() > 1e-2


def test_gain_matched_kd_has_the_gains_of_dot():
    def steady(step):
        return _grads(0)

    _, dot = _train(_optimizer("dot", weight_decay=0.0), steps=600, grads=steady)
    _, matched = _train(_optimizer("kd_gain_matched", weight_decay=0.0), steps=600, grads=steady)
    np.testing.assert_allclose(matched["w"], dot["w"], rtol=1e-4)


def test_ce_never_touches_the_distillation_gradient():
    def poisoned(step):
        return _grads(step)._replace(kd={"w": np.full(2, np.nan, np.float32)})

    params, _ = _train(_optimizer("ce"), steps=3, grads=poisoned)
    assert np.isfinite(params["w"]).all()


def test_methods_are_parsed_once_each_in_order():
    assert methods.parse(" dot, kd,dot") == ["dot", "kd"]


@pytest.mark.parametrize("method", ["", ",", "sgd", "kd,dto"])
def test_bad_methods_are_refused(method):
    with pytest.raises(UserError, match="ce, kd, kd_gain_matched, dot"):
        methods.parse(method)
