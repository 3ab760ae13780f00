"""The optimizers of the methods, their learning rate, and methods of one's own."""

import collections
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dot_optax
from examples.distill import methods, objectives, settings
from examples.distill.configs.digits import get_config
from examples.trainer.errors import UserError
from tests.tiers import slow_but

PARAMS = {
    "dense": {"kernel": np.array([[0.5, -1.0]], np.float32), "bias": np.array([2.0, 3.0], np.float32)},
    "embedding": np.array([[1.5]], np.float32),
}
WEIGHTS = dot_optax.PerLoss(task=0.1, kd=0.9)
STEPS_PER_EPOCH = 14


def _config(**overrides):
    config = get_config().optimizer
    config.update(overrides)
    return config


def _objective(method):
    length = objectives.Length(epochs=100, steps_per_epoch=STEPS_PER_EPOCH)
    return methods.objective_of(method, get_config(), length)


def _optimizer(method, **overrides):
    weights, deltas = WEIGHTS, None
    if method in methods.TRAITS and methods.TRAITS[method].objective != "kd":
        objective = _objective(method)
        weights, deltas = objective.weights, objective.deltas
    return methods.build(method, _config(**overrides), weights, STEPS_PER_EPOCH, epochs=100, deltas=deltas)


def _grads(step, container=dot_optax.PerLoss):
    rng = np.random.default_rng(step)

    def draw(leaf):
        return rng.normal(size=leaf.shape).astype(np.float32)

    return container(*(jax.tree.map(draw, PARAMS) for _ in container._fields))


def _steady(step):
    return _grads(0)


def _train(optimizer, steps, grads=_grads):
    params, state = PARAMS, optimizer.init(PARAMS)
    update = jax.jit(optax.with_extra_args_support(optimizer).update)
    for step in range(steps):
        given = grads(step)
        losses = type(given)(*(jnp.float32(1 + i) for i in range(len(given))))
        updates, state = update(given, state, params, losses=losses)
        params = optax.apply_updates(params, updates)
    return params, updates


def _assert_close(a, b, rtol, atol=0.0):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, atol), a, b)


def _distance(a, b):
    return max(np.abs(x - y).max() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_drop_at_150_takes_effect_in_epoch_151():
    schedule = methods.learning_rate_schedule(_config(drop_epochs=(150, 180), drop_factor=0.1), STEPS_PER_EPOCH)
    last_step_of_epoch_150, first_step_of_epoch_151 = 150 * 14 - 1, 150 * 14
    np.testing.assert_allclose(schedule(last_step_of_epoch_150), 0.01, rtol=1e-6)
    np.testing.assert_allclose(schedule(first_step_of_epoch_151), 0.001, rtol=1e-6)
    np.testing.assert_allclose(schedule(180 * 14), 0.0001, rtol=1e-6)


def test_a_warm_up_rises_in_a_line_and_moves_no_drop():
    schedule = methods.learning_rate_schedule(_config(warmup_epochs=2, drop_epochs=(5,)), STEPS_PER_EPOCH)
    rates = [float(schedule(step)) for step in (0, 7, 14, 28, 5 * 14 - 1, 5 * 14)]
    np.testing.assert_allclose(rates, [0.0, 0.0025, 0.005, 0.01, 0.01, 0.001], rtol=1e-6)


def test_a_drop_that_no_counter_reaches_is_left_out():
    schedule = methods.learning_rate_schedule(_config(drop_epochs=(1, 1_000_000)), steps_per_epoch=20_000)
    np.testing.assert_allclose(schedule(2**31 - 1), 0.001, rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 20])
def test_a_cosine_ends_with_the_last_epoch(warmup):
    config = _config(schedule="cosine", warmup_epochs=warmup, drop_epochs=(50,))
    schedule = methods.learning_rate_schedule(config, STEPS_PER_EPOCH, epochs=100)
    peak, end = warmup * STEPS_PER_EPOCH, 100 * STEPS_PER_EPOCH
    rates = [float(schedule(step)) for step in (peak, (peak + end) // 2, end)]
    np.testing.assert_allclose(rates, [0.01, 0.005, 0.0], rtol=1e-6, atol=1e-9)  # cos(pi / 2) in float32 is not 0
    if warmup:
        assert float(schedule(0)) == 0.0
        np.testing.assert_allclose(schedule(peak // 2), 0.005, rtol=1e-6)


def test_a_run_goes_on_to_more_epochs_where_its_learning_rates_stay():
    def rates(epochs, **overrides):
        schedule = methods.learning_rate_schedule(_config(**overrides), STEPS_PER_EPOCH, epochs)
        return np.array([schedule(step) for step in range(3 * STEPS_PER_EPOCH)])

    steps, cosine = {"drop_epochs": (2, 5), "warmup_epochs": 1}, {"schedule": "cosine", "warmup_epochs": 1}
    np.testing.assert_array_equal(rates(3, **steps), rates(6, **steps))
    assert methods.why_not_longer(_config(**steps)) is None
    assert np.abs(rates(3, **cosine) - rates(6, **cosine)).max() > 1e-3
    assert "another learning rate" in methods.why_not_longer(_config(**cosine))


def test_more_steps_than_are_counted_are_refused():
    with pytest.raises(UserError, match="1000000 epochs of 20000 steps are more than 2147483647 steps"):
        methods.build("kd", _config(), WEIGHTS, 20_000, epochs=1_000_000)


# The optimizers as they were before any of them could be chosen, with their states in the checkpoints of such runs.
_CHAINS_OF_BEFORE = {
    "ce": lambda rate: optax.chain(
        dot_optax.per_loss(optax.identity(), optax.set_to_zero()),
        dot_optax.sum_losses(),
        optax.add_decayed_weights(5e-4),
        optax.sgd(rate, momentum=0.9),
    ),
    "kd": lambda rate: optax.chain(
        dot_optax.per_loss(optax.scale(0.1), optax.scale(0.9)),
        dot_optax.sum_losses(),
        optax.add_decayed_weights(5e-4),
        optax.sgd(rate, momentum=0.9),
    ),
    "kd_gain_matched": lambda rate: optax.chain(
        dot_optax.per_loss(optax.scale(0.1), optax.scale(0.9)),
        dot_optax.gain_matched_sgd(rate, *dot_optax.betas(0.9, 0.075), weight_decay=5e-4),
    ),
    "dot": lambda rate: optax.chain(
        dot_optax.per_loss(optax.scale(0.1), optax.scale(0.9)),
        dot_optax.dot(rate, *dot_optax.betas(0.9, 0.075), weight_decay=5e-4),
    ),
}


@pytest.mark.parametrize("method", _CHAINS_OF_BEFORE)
def test_checkpoints_of_before_are_still_of_the_same_optimizer(method):
    before = _CHAINS_OF_BEFORE[method](optax.piecewise_constant_schedule(0.01, {}))
    now = _optimizer(method)
    assert jax.tree.structure(now.init(PARAMS)) == jax.tree.structure(before.init(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, _train(now, steps=5), _train(before, steps=5))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("method", ["dot", "kd_gain_matched"])
def test_without_delta_all_methods_are_kd(method, name):
    kd, _ = _train(_optimizer("kd", name=name), steps=30)
    other, _ = _train(_optimizer(method, name=name, delta=0.0), steps=30)
    _assert_close(other, kd, rtol=2e-5)  # 30 steps, each rounded to float32 in another order


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_with_delta_dot_is_neither_kd_nor_gain_matched(name):
    dot, _ = _train(_optimizer("dot", name=name), steps=30)
    for method in ("kd", "kd_gain_matched"):
        other, _ = _train(_optimizer(method, name=name), steps=30)
        assert _distance(dot, other) > 1e-2


@pytest.mark.parametrize(
    "overrides",
    slow_but([{}, {"delta_warmup_epochs": 2}, {"name": "adamw"}, {"name": "muon"}], {}, {"name": "adamw"}),
)
def test_gain_matched_kd_has_the_gains_of_dot(overrides):
    _, dot = _train(_optimizer("dot", weight_decay=0.0, **overrides), steps=400, grads=_steady)
    _, matched = _train(_optimizer("kd_gain_matched", weight_decay=0.0, **overrides), steps=400, grads=_steady)
    _, plain = _train(_optimizer("kd", weight_decay=0.0, **overrides), steps=400, grads=_steady)
    if overrides == {"name": "muon"}:  # The rest has Adam, which remembers 400 steps and more of how momenta begin.
        matched, dot, plain = ({"kernel": tree["dense"]["kernel"]} for tree in (matched, dot, plain))
    _assert_close(matched, dot, rtol=1e-4)
    assert _distance(matched, plain) > (1e-5 if overrides == {"name": "muon"} else 1e-3)  # which has smaller steps


def test_adamw_is_that_of_optax_on_the_weighted_sum():
    config = _config(name="adamw", b2=0.99, eps=1e-3, weight_decay=0.1, decay_mask="all")
    expected = optax.chain(
        dot_optax.per_loss(optax.scale(0.1), optax.scale(0.9)),
        dot_optax.sum_losses(),
        optax.adamw(0.01, b1=0.9, b2=0.99, eps=1e-3, weight_decay=0.1),
    )
    kd = methods.build("kd", config, WEIGHTS, STEPS_PER_EPOCH)
    _assert_close(_train(kd, steps=10), _train(expected, steps=10), rtol=1e-6)


def test_muon_is_that_of_optax_on_the_weighted_sum():
    config = _config(name="muon", b2=0.99, eps=1e-3, weight_decay=0.1)
    expected = optax.chain(
        dot_optax.per_loss(optax.scale(0.1), optax.scale(0.9)),
        dot_optax.sum_losses(),
        optax.contrib.muon(
            0.01,
            beta=0.9,
            eps=1e-3,
            weight_decay=0.1,
            weight_decay_mask=jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", PARAMS),
            nesterov=False,
            adam_b1=0.9,
            adam_b2=0.99,
            consistent_rms=0.2,
        ),
    )
    kd = methods.build("kd", config, WEIGHTS, STEPS_PER_EPOCH)
    _assert_close(_train(kd, steps=10), _train(expected, steps=10), rtol=1e-6)


@pytest.mark.parametrize("method", slow_but(["kd", "dot", "kd_gain_matched"], "kd"))
@pytest.mark.parametrize("mask, decayed", [("kernels", {"kernel"}), ("all", {"kernel", "bias", "embedding"})])
def test_muon_decays_kernels_of_all_shapes(method, mask, decayed):
    params = PARAMS | {"conv": {"kernel": np.linspace(1, 2, 36, dtype=np.float32).reshape(3, 3, 2, 2)}}
    zeros = jax.tree.map(np.zeros_like, params)
    tx = _optimizer(method, name="muon", learning_rate=1.0, weight_decay=0.5, decay_mask=mask)
    updates, _ = tx.update(dot_optax.PerLoss(zeros, zeros), tx.init(params), params)
    wanted = jax.tree.map_with_path(lambda path, x: -0.5 * x if path[-1].key in decayed else 0 * x, params)
    _assert_close(updates, wanted, rtol=1e-7)  # halves are exact


def test_muon_orthogonalizes_the_momenta_of_dot():
    """Without delta they are in sum a multiple of KD's momentum, and so have its direction."""
    kd, _ = _train(_optimizer("kd", name="muon"), steps=30)
    dot, _ = _train(_optimizer("dot", name="muon", delta=0.0), steps=30)
    # 30 steps of 5 iterations, whose rounding the polynomial amplifies up to threefold in each.
    np.testing.assert_allclose(dot["dense"]["kernel"], kd["dense"]["kernel"], rtol=1e-3, atol=1e-4)
    for method in ("kd", "kd_gain_matched"):
        other, _ = _train(_optimizer(method, name="muon"), steps=30)
        assert _distance(_train(_optimizer("dot", name="muon"), steps=30)[0], other) > 1e-2


def test_deepkd_has_no_muon():
    with pytest.raises(UserError, match=r"^method 'deepkd' has no Muon: give --config\.optimizer\.name=sgd or adamw$"):
        _optimizer("deepkd", name="muon")


def test_gain_matched_adam_by_hand():
    """Two steps in float64; b1 0.9 and delta 0.075, so that the gains are 0.1 / 0.175 and 0.1 / 0.025."""
    config = _config(name="adamw", weight_decay=0.1, learning_rate=0.5)
    params, state = PARAMS, None
    optimizer = methods.build("kd_gain_matched", config, WEIGHTS, STEPS_PER_EPOCH)
    state = optimizer.init(params)
    theta, m, v = PARAMS["dense"]["kernel"].astype(float), 0.0, 0.0
    for step in (1, 2):
        grads = _grads(step)
        task, kd = (weight * g["dense"]["kernel"].astype(float) for weight, g in zip(WEIGHTS, grads, strict=True))
        m = 0.9 * m + 0.1 * (task * 0.1 / 0.175 + kd * 0.1 / 0.025)
        v = 0.999 * v + 0.001 * (task + kd) ** 2
        adam = m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        theta = theta - 0.5 * (adam + 0.1 * theta)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    # 1 - 0.999 in float32 has an error of 3e-5, half of which is left in the root.
    np.testing.assert_allclose(params["dense"]["kernel"], theta, rtol=1e-4)


_AGGREGATED_MOMENTA = [f"dot_{name}" for name in methods._AGGREGATIONS]
_WITH_ADAMW = [method for method in methods.METHODS if method not in _AGGREGATED_MOMENTA]


@pytest.mark.parametrize("method", _WITH_ADAMW)  # the others weight the penalty with the task: see below
@pytest.mark.parametrize(
    ("name", "decay_mask", "only_kernels"),
    [("sgd", "", False), ("sgd", "kernels", True), ("adamw", "", True), ("adamw", "all", False)],
)
def test_which_parameters_decay(method, name, decay_mask, only_kernels):
    def zero(step):
        return jax.tree.map(jnp.zeros_like, _grads(step, _objective(method).container))

    optimizer = _optimizer(method, name=name, decay_mask=decay_mask, weight_decay=0.1)
    _, updates = _train(optimizer, steps=1, grads=zero)
    assert (updates["dense"]["kernel"] != 0).all()
    others = (updates["dense"]["bias"], updates["embedding"])
    assert all((update == 0 if only_kernels else update != 0).all() for update in others)


@pytest.mark.parametrize(
    ("method", "overrides"),
    [(method, overrides) for method in methods.METHODS for overrides in ({}, {"delta_warmup_epochs": 2})]
    + [(method, {"name": "adamw"}) for method in _WITH_ADAMW],
)
def test_no_two_parts_of_a_state_share_memory(method, overrides):
    """The train step donates all of it, and XLA takes no buffer twice."""
    leaves = jax.tree.leaves(_optimizer(method, **overrides).init(jax.tree.map(jnp.asarray, PARAMS)))
    assert len({id(leaf) for leaf in leaves}) == len(leaves)


def test_a_warm_up_of_delta_begins_as_kd():
    overrides = {"delta_warmup_epochs": 10_000}
    kd, _ = _train(_optimizer("kd"), steps=30)
    for method in ("dot", "kd_gain_matched"):
        warming, _ = _train(_optimizer(method, **overrides), steps=30)
        _assert_close(warming, kd, rtol=1e-4, atol=1e-4)  # delta has risen by 30 / 140,000
        full, _ = _train(_optimizer(method), steps=30)
        assert _distance(full, kd) > 1e-2


def test_gains_follow_a_warm_up_of_delta():
    """After the first of two steps, half of delta: momenta of 0.8625 and 0.9375, so gains of 0.1 / 0.1375 and 0.1 / 0.0625."""
    config = _config(delta_warmup_epochs=2, weight_decay=0.5)
    optimizer = methods.build("kd_gain_matched", config, dot_optax.PerLoss(1.0, 1.0), steps_per_epoch=1)
    params, state = PARAMS, optimizer.init(PARAMS)
    theta, v = PARAMS["embedding"].astype(float), 0.0
    for step, gains in enumerate([(1.0, 1.0), (0.1 / 0.1375, 0.1 / 0.0625)]):
        grads = _grads(step)
        v = 0.9 * v + gains[0] * (grads.task["embedding"] + 0.5 * theta) + gains[1] * grads.kd["embedding"]
        theta = theta - 0.01 * v
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["embedding"], theta, rtol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_ce_never_touches_the_distillation_gradient(name):
    def poisoned(step):
        return _grads(step)._replace(kd=jax.tree.map(lambda g: np.full_like(g, np.nan), PARAMS))

    params, _ = _train(_optimizer("ce", name=name), steps=3, grads=poisoned)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_methods_are_parsed_once_each_in_order():
    assert methods.parse(" dot, kd,dot") == ["dot", "kd"]


@pytest.mark.parametrize("method", ["", ",", "sgd", "kd,dto"])
def test_bad_methods_are_refused(method):
    with pytest.raises(UserError, match="ce, kd, kd_gain_matched, dot"):
        methods.parse(method)


def test_what_is_checked_before_anything_is_built():
    def refused(*changes):
        config = get_config()
        config.update_from_flattened_dict(dict(changes))
        with pytest.raises(UserError) as error:
            settings.validated(config)
        return str(error.value)

    settings.validated(get_config())
    assert refused(("method", "dto")).startswith("bad --config.method='dto'")
    assert "0.9 + 0.1" in refused(("optimizer.delta", 0.1))
    assert "1 in float32" in refused(("optimizer.delta", 0.1 - 1e-9))
    assert refused(("optimizer.name", "adam")) == "bad --config.optimizer.name='adam': give one of sgd, adamw, muon"
    assert "--config.teacher.optimizer.name='SGD'" in refused(("teacher.optimizer.name", "SGD"))
    cosine = (("optimizer.schedule", "cosine"), ("optimizer.warmup_epochs", 240))
    assert "--config.optimizer.warmup_epochs=240" in refused(*cosine) and "give 239 or fewer" in refused(*cosine)
    shard_map = ("parallel", "shard_map")
    assert "--config.optimizer.name=sgd" in refused(shard_map, ("optimizer.name", "adamw"))
    assert "--config.teacher.optimizer.name=sgd" in refused(shard_map, ("teacher.optimizer.name", "adamw"))


def test_shard_map_asks_nothing_of_a_teacher_that_is_there():
    config = get_config()
    config.parallel, config.teacher.optimizer.name, config.teacher.checkpoint = "shard_map", "adamw", "folder"
    settings.validated(config)


_BAD_NUMBERS = [
    ("seed", 2**32),
    ("epochs", 1_000_001),
    ("teacher.epochs", 0),
    ("optimizer.learning_rate", 1e-39),
    ("optimizer.learning_rate", 1e39),
    ("optimizer.weight_decay", -1.0),
    ("optimizer.weight_decay", 1e-40),
    ("optimizer.momentum", 1 - 1e-9),
    ("optimizer.b2", 1.0),
    ("optimizer.eps", 0.0),
    ("optimizer.schedule", "linear"),
    ("optimizer.decay_mask", "kernel"),
    ("optimizer.warmup_epochs", -1),
    ("optimizer.delta_warmup_epochs", 1_000_001),
    ("optimizer.delta", float("nan")),
    ("optimizer.drop_epochs", (1_000_001,)),
    ("optimizer.drop_epochs", (2, 1)),
    ("distillation.temperature", 1e-30),
    ("distillation.temperature", 1e30),
    ("distillation.task_weight", 1e40),
    ("dkd.task_weight", -1.0),
    ("dkd.alpha", -0.1),
    ("dkd.beta", float("inf")),
    ("dkd.warmup_epochs", -1),
    ("deepkd.target_weight", -1.0),
    ("deepkd.delta_task", float("nan")),
    ("deepkd.top_k_fraction", 1.1),
    ("deepkd.top_k_phases", (0.5, 0.2)),
    ("deepkd.top_k_phases", (0.5,)),
]


@pytest.mark.parametrize(("field", "value"), _BAD_NUMBERS)
def test_numbers_that_no_training_can_use(field, value):
    config = get_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=f"^bad --config.{field}="):
        settings.validated(config)


@pytest.mark.parametrize(
    ("method", "name"),
    [(method, "sgd") for method in methods.METHODS] + [(method, "adamw") for method in _WITH_ADAMW],
)
def test_every_method_makes_one_tree_of_updates(method, name):
    methods.check_updates(method, _optimizer(method, name=name), PARAMS, _objective(method).container)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            optax.identity(),
            "of the gradients PerLoss(task, kd) it does not make one tree of updates like the parameters",
        ),
        (optax.sgd(0.1, momentum=0.9), "ValueError: "),
        (
            optax.chain(dot_optax.sum_losses(), optax.flatten(optax.ema(0.9)), optax.stateless(lambda u, p: 0.0)),
            "of the",
        ),
    ],
)
def test_a_method_that_does_not_make_one_tree_of_updates(optimizer, message):
    with pytest.raises(UserError) as error:
        methods.check_updates("mine", optimizer, PARAMS)
    assert str(error.value).startswith(f"cannot use method 'mine': {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("method", "classes"), [("dkd", 2), ("dkd_dot", 2), ("deepkd", 2)])
def test_too_few_classes_for_the_losses_of_a_method(method, classes):
    with pytest.raises(UserError, match=f"^cannot use method '{method}' with {classes} classes: .*classes") as error:
        objectives.check(method, _objective(method), classes)
    assert "\n" not in str(error.value)
    objectives.check(method, _objective(method), 3)


def test_all_classes_from_the_first_step_on():
    config = get_config()
    config.deepkd.top_k_fraction = 1.0
    logits = np.random.default_rng(0).normal(size=(2, 4, 10)).astype(np.float32)
    seen = objectives.Seen(*logits, np.arange(4), 4.0, step=0)
    objective = methods.objective_of("deepkd", config, objectives.Length(10, 10))
    np.testing.assert_allclose(sum(objective.distill(seen)), objectives.kd_loss(seen), rtol=1e-5)
    assert objectives.why_not_longer("deepkd", config) is None


@pytest.mark.parametrize("warmup", [0, 1])
def test_deepkd_with_adamw_by_hand(warmup):
    """Two steps in float64. The factor of all momenta is 1 less their mean, as in `dot_optax.scale_by_adam_momenta`."""
    weights, deltas = dot_optax.DeepKDLosses(0.5, 1.0, 2.0), dot_optax.DeepKDLosses(0.075, -0.075, 0.05)
    config = _config(name="adamw", weight_decay=0.1, learning_rate=0.5, delta_warmup_epochs=warmup)
    optimizer = methods.build("deepkd", config, weights, steps_per_epoch=2, deltas=deltas)
    params, state = PARAMS, optimizer.init(PARAMS)
    theta, m, v = PARAMS["dense"]["kernel"].astype(float), np.zeros((3, 1, 2)), 0.0
    for step in (1, 2):
        grads = _grads(step, dot_optax.DeepKDLosses)
        g = np.array([w * np.float64(g["dense"]["kernel"]) for w, g in zip(weights, grads, strict=True)])
        beta = 0.9 + np.array(deltas)[:, None, None] * ((step - 1) / 2 if warmup else 1)  # of two steps in an epoch
        m = beta * m + (1 - beta.mean()) * g
        v = 0.999 * v + 0.001 * g.sum(0) ** 2
        adam = (m / (1 - beta**step)).sum(0) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        theta = theta - 0.5 * (adam + 0.1 * theta)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["dense"]["kernel"], theta, rtol=1e-4)  # as for gain-matched Adam


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize(("method", "like"), [("dkd", "kd"), ("dkd_dot", "dot")])
def test_dkd_is_trained_as_distillation_is(method, like, name):
    """Only its losses and weights are others; the weight of the first epoch is 1/20."""
    given = methods.build(like, _config(name=name), dot_optax.PerLoss(1.0, 0.05), STEPS_PER_EPOCH)
    _assert_close(_train(_optimizer(method, name=name), steps=10), _train(given, steps=10), rtol=1e-6)


def _weights_by_hand(name, task, kd, losses):
    """Of two gradients as vectors, in NumPy; those that have no short formula from `dot_optax.weightings`."""
    gram = np.array([[task @ task, task @ kd], [task @ kd, kd @ kd]])
    if name == "projected":
        return 1 + np.maximum(0, -gram[0, 1]) / np.diag(gram)
    if name in ("min_norm", "dto_kd"):
        scale = np.array(losses) if name == "dto_kd" else np.ones(2)
        gram = gram / np.outer(scale, scale)
        first = np.clip((gram[1, 1] - gram[0, 1]) / (gram[0, 0] + gram[1, 1] - 2 * gram[0, 1]), 0, 1)
        return np.array([first, 1 - first]) / scale
    weighting = getattr(dot_optax.weightings, name)()
    return np.asarray(weighting.weights(jnp.asarray(gram, jnp.float32), None, weighting.init(2))[0], np.float64)


def _vector(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


_AGGREGATED = [*(f"kd_{name}" for name in methods._AGGREGATIONS), *_AGGREGATED_MOMENTA, "dto_kd"]
_UNWEIGHTED = ("min_norm", "aligned", "priority", "dto_kd")


_IN_THE_FIRST_TIER = (
    "kd_projected",
    "kd_min_norm",
    "dot_projected",
    "dot_priority",
    "dto_kd",
    "dot_projected, warming",
)


@pytest.mark.parametrize("case", slow_but([*_AGGREGATED, "dot_projected, warming"], *_IN_THE_FIRST_TIER))
def test_aggregation_by_hand(case):
    """Three steps in float64, the second with gradients in conflict; `priority` forgets nothing here."""
    method, *warming = case.split(", ")
    warmup, name = len(warming), method.removeprefix("kd_").removeprefix("dot_")
    before = method.startswith("dot_")
    optimizer = _optimizer(method, learning_rate=0.5, weight_decay=0.1, delta_warmup_epochs=warmup)
    params, state = PARAMS, optimizer.init(PARAMS)
    theta, v, (v_task, v_kd) = _vector(params), 0.0, np.zeros((2, 5))
    for step in range(1 if name == "priority" else 3):
        grads = _grads(step)
        if step == 1:
            grads = grads._replace(kd=jax.tree.map(lambda task, kd: kd - 2 * task, *grads))
        losses = dot_optax.PerLoss(task=0.5, kd=3.0 + step)
        updates, state = optimizer.update(grads, state, params, losses=losses)
        params = optax.apply_updates(params, updates)

        weights = (1.0, 1.0) if name in _UNWEIGHTED else WEIGHTS
        task, kd = (weight * _vector(grad) for weight, grad in zip(weights, grads, strict=True))
        if before:
            delta = 0.075 * (step / STEPS_PER_EPOCH if warmup else 1)
            v_task, v_kd = task + 0.1 * theta + (0.9 - delta) * v_task, kd + (0.9 + delta) * v_kd
            w = _weights_by_hand(name, v_task, v_kd, losses)
            v = w[0] * v_task + w[1] * v_kd
        else:
            w = _weights_by_hand(name, task, kd, losses)
            v = w[0] * task + w[1] * kd + 0.1 * theta + 0.9 * v
        theta = theta - 0.5 * v
        np.testing.assert_allclose(_vector(params), theta, rtol=1e-4, atol=1e-5)  # float32, roots and quotients
        logged = methods.read_state(method, state)
        assert set(logged) == {"task_weight", "kd_weight"}
        np.testing.assert_allclose([logged["task_weight"], logged["kd_weight"]], w, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", _AGGREGATED_MOMENTA)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_aggregated_momenta_are_those_of_sgd(method, name):
    with pytest.raises(UserError, match=f"^method '{method}' has no {name}, .*--config.method=kd_"):
        _optimizer(method, name=name)


def test_without_a_conflict_projection_changes_nothing():
    def agreeing(step):
        grads = _grads(step)
        return grads._replace(kd=jax.tree.map(lambda task, kd: kd + 3 * task, *grads))

    _assert_close(_train(_optimizer("kd_projected"), 1, agreeing), _train(_optimizer("kd"), 1, agreeing), rtol=1e-6)
    _assert_close(_train(_optimizer("dot_projected"), 1, agreeing), _train(_optimizer("dot"), 1, agreeing), rtol=1e-6)


def test_what_methods_that_compare_gradients_need():
    config = get_config()
    config.method, config.sampling.form = "kd,kd_min_norm", "losses"
    with pytest.raises(UserError, match="'kd_min_norm' compares them with one another: give --config"):
        settings.validated(config)
    config.sampling.form = "examples"
    settings.validated(config)
    config.sampling.form, config.parallel = "none", "shard_map"
    with pytest.raises(UserError, match="'kd_min_norm' was not registered as one"):
        settings.validated(config)


def test_the_log_reads_no_other_weights():
    """A user's method may compare gradients in its own way, and a parameter may be called so."""
    assert methods.read_state("dot", {"weights": jnp.zeros(2)}) == {}
    assert methods.read_state("kd_min_norm", {"weights": jnp.zeros(2)}) == {}
    state = _optimizer("kd_min_norm").init({"weights": jnp.zeros(3)})
    np.testing.assert_array_equal(list(methods.read_state("kd_min_norm", state).values()), [1.0, 1.0])


@pytest.fixture
def registry(monkeypatch):
    for name in ("METHODS", "STYLES", "TRAITS"):
        monkeypatch.setattr(methods, name, getattr(methods, name).copy())


def _clipped(recipe):
    """DOT with a clipped distillation gradient.

    It is a test.
    """
    clip = dot_optax.per_loss(optax.identity(), optax.clip(0.1))
    optimizer = dot_optax.dot(recipe.learning_rate, *methods.betas(recipe.config))
    return optax.chain(methods.weight_losses(recipe.weights), clip, optimizer)


def test_a_method_of_ones_own(registry):
    assert methods.register("clipped")(_clipped) is _clipped
    assert methods.parse("clipped,kd") == ["clipped", "kd"]
    assert methods.summary("clipped") == "DOT with a clipped distillation gradient."
    assert methods.STYLES["clipped"].label == "clipped"
    params, _ = _train(_optimizer("clipped"), steps=3)
    assert _distance(params, _train(_optimizer("dot", weight_decay=0.0), steps=3)[0]) > 1e-3
    config = get_config()
    config.method, config.parallel = "kd,clipped", "shard_map"
    with pytest.raises(UserError, match="'clipped' was not registered as one"):
        settings.validated(config)
    methods.register("linear", linear=True)(_clipped)
    config.method = "kd,linear"
    settings.validated(config)


def test_colors_are_given_out_evenly(registry):
    first = list(methods.STYLES.values())[:7]  # those without aggregation come first
    assert len({style.color for style in first}) == 7
    for name in "abcdefgh" * 2:  # the second time, the same lines run again
        methods.register(name)(lambda recipe: optax.identity())
    counts = collections.Counter(style.color for style in methods.STYLES.values())
    assert len(counts) == 8 and max(counts.values()) - min(counts.values()) <= 1


def test_a_file_that_is_run_twice_registers_its_method_twice(registry, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from examples.distill import methods\n@methods.register('mine')\ndef mine(recipe): pass\n"
    )
    for _ in range(2):
        runpy.run_path(str(tmp_path / "mine.py"))
    assert methods.summary("mine") == ""
    with pytest.raises(UserError, match=r"there is a method 'mine' already in .*mine\.py, line 2; "):
        methods.register("mine")(_clipped)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("teacher", {}, "bad name 'teacher'"),
        ("a,b", {}, "bad name 'a,b'"),
        ("../a", {}, "bad name '../a'"),
        ("a" * 65, {}, "bad name"),
        ("a", {"label": "two\nlines"}, "bad label"),
        ("a", {"label": " "}, "bad label"),
        ("a", {"color": "no color"}, "bad color 'no color' of method 'a'"),
        ("dot", {}, "there is a method 'dot' already"),
        ("a", {"objective": "dto"}, "bad objective 'dto' of method 'a': give one of kd, dkd, deepkd, crd"),
    ],
)
def test_what_cannot_be_registered(registry, name, options, message):
    with pytest.raises(UserError, match=message):
        methods.register(name, **options)(_clipped)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda recipe: None, "its function returned a NoneType, not an Optax transformation"),
        (lambda: None, "TypeError: .* takes 0 positional arguments but 1 was given"),
        (lambda recipe: recipe.config.missing, "AttributeError: .*missing"),
    ],
)
def test_a_method_that_cannot_be_built(registry, make, message):
    methods.register("broken")(make)
    with pytest.raises(UserError, match=f"^cannot build method 'broken': {message}") as error:
        _optimizer("broken")
    assert "\n" not in str(error.value)
