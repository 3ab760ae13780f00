"""What `--config.diagnostics=True` logs: by hand, for methods with and without momenta of their own, and through a run."""

import functools
import itertools
import json
from typing import Any, NamedTuple

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
from examples.distill.models import cnn, mlp, wide_resnet
from examples.trainer import diagnostics as of_trainer
from examples.trainer import parallel, preemption
from examples.trainer.errors import UserError
from examples.trainer.step import init_state
from tests.tiers import slow_but

_ONE_DEVICE = parallel.jit_layout(jax.sharding.Mesh(jax.devices()[:1], (parallel.AXIS,)))
_WEIGHTS = dot_optax.PerLoss(task=0.1, kd=0.9)
_METHODS = ("ce", "kd", "kd_gain_matched", "dot", "kd_projected", "dot_min_norm", "dto_kd")
_RATES = {  # of a learning rate of 1: gains of SGD with momentum 0.9, and of DOT with delta 0.075
    "ce": (10.0, np.nan),  # whose weight of KD is 0
    "kd": (10.0, 10.0),
    "kd_projected": (10.0, 10.0),
    "dto_kd": (10.0, 10.0),
    "kd_gain_matched": (1 / 0.175, 40.0),
    "dot": (1 / 0.175, 40.0),
    "dot_min_norm": (1 / 0.175, 40.0),
}


def _flat(tree):
    return jax.flatten_util.ravel_pytree(tree)[0]


def _config(**optimizer):
    config = get_config()
    config.optimizer.update(optimizer)
    return config.optimizer


@functools.cache
def _networks():
    return [models.split(nnx.Linear(4, 3, rngs=nnx.Rngs(seed))) for seed in (0, 1)]


def _problem():
    (student, *_), (teacher, *_) = _networks()
    return steps.Problem(student, teacher, temperature=4.0, mean=(0.0,) * 4, std=(1.0,) * 4)


def _batch(seed):
    rng = np.random.default_rng(seed)
    return {"image": rng.normal(size=(8, 4)).astype(np.float32), "label": rng.integers(3, size=8).astype(np.int32)}


@functools.cache
def _trained(method, name="sgd", diagnosed=True, count=3):
    """The states before, between and after some steps, with the metrics of each."""
    config = _config(name=name)
    optimizer, diagnostics = methods.build(method, config, _WEIGHTS, steps_per_epoch=1, epochs=10), None
    if diagnosed:
        objective = objectives.PLAIN._replace(weights=_WEIGHTS)
        diagnostics = methods.diagnostics(method, config, objective, steps_per_epoch=1, epochs=10)
        optimizer = diagnostics.recording(optimizer)
    options = {"diagnostics": diagnostics, "state_metrics": functools.partial(methods.read_state, method)}
    train_step = steps.make_train_step(_problem(), optimizer, _ONE_DEVICE, **options)
    state = init_state(*jax.tree.map(jnp.copy, _networks()[0][1:]), optimizer)
    states, metrics = [jax.tree.map(np.array, state)], []
    for seed in range(count):
        state, found = train_step(state, _networks()[1][1:], _batch(seed))
        states.append(jax.tree.map(np.array, state))
        metrics.append(jax.tree.map(float, found))
    return states, metrics


def _gradients(params, seed):
    """Of the unweighted losses."""
    (student, _, rest), (teacher, *variables) = _networks()
    batch = _batch(seed)
    given, _ = models.apply(teacher, *variables, batch["image"], train=False)

    def losses(params):
        logits, _ = models.apply(student, params, rest, batch["image"], train=True)
        task = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return dot_optax.PerLoss(jnp.mean(task), jnp.mean(dot_optax.losses.kd_loss(logits, given, 4.0)))

    return [np.asarray(_flat(grad), np.float64) for grad in dot_optax.value_and_grads(losses)(params)[1]]


def _shares(vectors):
    total = sum(vectors)
    return [v @ total / (total @ total) for v in vectors]


def _of(metrics, what):
    return [metrics[f"{name}_{what}"] for name in ("task", "kd")]


@pytest.mark.parametrize("method", slow_but(list(_METHODS), "dot"))
def test_metrics_are_those_by_hand(method):
    states, metrics = _trained(method)
    decay, grads = _config().weight_decay, [_gradients(states[i].params, i) for i in range(3)]
    momenta = [np.zeros_like(g) for g in grads[0]]
    for i, (task, kd) in enumerate(grads):
        theta = np.asarray(_flat(states[i].params), np.float64)
        before = [0.1 * task + decay * theta, 0.9 * kd] if method == "dot" else [task + decay * theta, kd]
        betas = dot_optax.betas(0.9, 0.075)
        momenta = [g + beta * v for g, beta, v in zip(before, betas, momenta, strict=True)]
        if "dot" in method:
            vectors = momenta
        else:
            weights = {"ce": (1.0, 0.0), "dto_kd": (1.0, 1.0)}.get(method, _WEIGHTS)
            vectors = [weight * g for weight, g in zip(weights, (task, kd), strict=True)]
        if "task_weight" in metrics[i]:
            vectors = [weight * v for weight, v in zip(_of(metrics[i], "weight"), vectors, strict=True)]
        # Sums of 15 products in float32, over the square of a sum that may cancel.
        np.testing.assert_allclose(_of(metrics[i], "share"), _shares(vectors), rtol=1e-4, atol=1e-5)
        assert metrics[i]["grad_conflict"] == float(task @ kd < 0)
        step = np.asarray(_flat(states[i + 1].params), np.float64) - theta
        ratio = np.linalg.norm(step) / np.linalg.norm(theta)
        np.testing.assert_allclose(metrics[i]["update_to_weight"], ratio, rtol=1e-4)  # of a difference in float32
        np.testing.assert_allclose(_of(metrics[i], "gain"), _RATES[method], rtol=1e-5)
        np.testing.assert_allclose(
            _of(metrics[i], "rate"), _config().learning_rate * np.array(_RATES[method]), rtol=1e-5
        )
    assert np.isnan(_of(metrics[0], "snr")).all()  # one gradient has no variance
    recorded = states[-1].opt_state[0]
    np.testing.assert_array_equal(_of(metrics[-1], "snr"), recorded.signal_to_noise[0])
    weights = 0.99 ** np.arange(3)[::-1] / sum(0.99 ** np.arange(3))
    for loss, mean in enumerate(recorded.means):
        expected = sum(w * g[loss] for w, g in zip(weights, grads, strict=True))
        np.testing.assert_allclose(_flat(mean), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_adams_momenta_are_divided_as_in_the_update():
    states, metrics = _trained("dot", "adamw")
    kept = optax.tree.get(states[-1].opt_state[1], "ScaleByAdamMomentaState")
    vectors = [np.asarray(_flat(mu), np.float64) / np.sqrt(_flat(kept.nu)) for mu in kept.mu]
    np.testing.assert_allclose(_of(metrics[-1], "share"), _shares(vectors), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        _of(metrics[-1], "rate"), _config().learning_rate * np.array([0.1 / 0.175, 4.0]), rtol=1e-5
    )


@pytest.mark.parametrize("method", slow_but(list(_METHODS), "dot"))
def test_training_is_the_same_with_and_without(method):
    """Bit for bit; and without the flag there is nothing more in metrics and state."""
    (with_it, diagnosed), (without, plain) = _trained(method), _trained(method, diagnosed=False)
    same = np.testing.assert_array_equal
    if method == "dot_min_norm":  # XLA may add up the inner products that its weights come from in another order
        same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8)
    for a, b in zip(with_it, without, strict=True):
        jax.tree.map(same, (a.params, a.rest, a.opt_state[1]), (b.params, b.rest, b.opt_state))
    added = {name for name in diagnosed[0] if name not in plain[0]}
    diagnostics = methods.diagnostics(method, _config(), objectives.PLAIN, steps_per_epoch=1, epochs=10)
    assert added == set(diagnostics.metrics)


class _Three(NamedTuple):
    task: Any
    target: Any
    non_target: Any


def test_three_losses_by_pairs_and_layers():
    rng = np.random.default_rng(0)
    shapes = {"stem": {"bias": (3,), "kernel": (2, 3)}, "top": {"kernel": (3, 2)}}
    params, updates, *grads = [
        jax.tree.map(lambda s: jnp.float32(rng.normal(size=s)), shapes, is_leaf=lambda s: isinstance(s, tuple))
        for _ in range(5)
    ]
    found_layers = of_trainer.layers(params)
    assert found_layers == ("stem", "top") and of_trainer.layers({"bias": 1.0, "kernel": 1.0}) == (".",)
    diagnosed = of_trainer.Diagnostics(
        _Three._fields,
        _Three,
        _Three(1.0, 1.0, 1.0),
        learning_rate=lambda step: 0.1,
        gains=lambda step: _Three(2.0, 3.0, jnp.nan),
        scale_invariant=lambda params: [params["stem"]["kernel"], params["top"]["kernel"]],
        layers=found_layers,
    )
    optimizer = diagnosed.recording(optax.identity())
    _, opt_state = optimizer.update(_Three(*grads), optimizer.init(params), params)
    compared = dot_optax.diagnostics.compare(_Three(*grads))
    taken = of_trainer.Taken(0, grads, jnp.bool_(True), compared, updates, params, opt_state)
    metrics = jax.tree.map(float, diagnosed.of(taken))
    assert set(metrics) == set(diagnosed.metrics)
    for end, part in [
        ("", lambda tree: tree),
        *((f"/{layer}", lambda tree, at=layer: tree[at]) for layer in found_layers),
    ]:
        vectors = {name: np.asarray(_flat(part(g)), np.float64) for name, g in zip(_Three._fields, grads, strict=True)}
        ratio = np.linalg.norm(_flat(part(updates))) / np.linalg.norm(_flat(part(params)))
        np.testing.assert_allclose(metrics[f"update_to_weight{end}"], ratio, rtol=1e-5)
        for a, b in (("task", "target"), ("task", "non_target"), ("target", "non_target")):
            u, v = vectors[a], vectors[b]
            cosine = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
            np.testing.assert_allclose(metrics[f"{a}_and_{b}_grad_cosine{end}"], cosine, atol=1e-6)
            assert metrics[f"{a}_and_{b}_grad_conflict{end}"] == (cosine < 0)
        if end:
            for name, vector in vectors.items():
                np.testing.assert_allclose(metrics[f"{name}_grad_norm{end}"], np.linalg.norm(vector), rtol=1e-6)
    inverse = np.mean([1 / np.sum(np.square(params[layer]["kernel"])) for layer in found_layers])
    rates = [metrics[f"{name}_scale_invariant_rate"] for name in _Three._fields]
    np.testing.assert_allclose(rates, [0.2 * inverse, 0.3 * inverse, np.nan], rtol=1e-5)
    unknown = jax.tree.map(float, diagnosed.of(taken._replace(known=jnp.bool_(False))))
    for name, value in unknown.items():
        assert np.isnan(value) or "_grad_" not in name, name


def test_a_gradient_of_zero_has_no_direction():
    """As of a loss that does not reach a layer, or that has no teacher: no angle is made up for it."""
    params = {"body": {"kernel": jnp.ones(2)}, "head": {"kernel": jnp.ones(2)}}
    task, kd = params, {"body": {"kernel": jnp.array([-1.0, 0.0])}, "head": {"kernel": jnp.zeros(2)}}
    diagnosed = of_trainer.Diagnostics(
        ("task", "kd"), dot_optax.PerLoss, dot_optax.PerLoss(1.0, 1.0), layers=of_trainer.layers(params)
    )
    optimizer = diagnosed.recording(optax.identity())

    def metrics(kd):
        grads = dot_optax.PerLoss(task, kd)
        _, opt_state = optimizer.update(grads, optimizer.init(params), params)
        compared = dot_optax.diagnostics.compare(grads)
        taken = of_trainer.Taken(0, grads, jnp.bool_(True), compared, params, params, opt_state)
        return jax.tree.map(float, diagnosed.of(taken) | diagnosed._of_pairs(taken, compared, 0))

    found = metrics(kd)
    np.testing.assert_allclose([found["grad_cosine"], found["grad_cosine/body"]], [-0.5, -(0.5**0.5)], rtol=1e-6)
    assert found["grad_conflict"] == found["grad_conflict/body"] == 1
    assert np.isnan([found["grad_cosine/head"], found["grad_conflict/head"]]).all()
    assert found["kd_grad_norm/head"] == 0
    found = metrics(optax.tree.zeros_like(kd))
    assert np.isnan([value for name, value in found.items() if "cosine" in name or "conflict" in name]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "options", "expected"),
    [
        (cnn.CNN, {"widths": (2, 3)}, "conv"),
        (wide_resnet.WideResNet, {"depth": 10, "width": 1}, "conv1/conv"),
        (mlp.MLP, {"hidden": (4,)}, None),
    ],
    ids=["BatchNorm behind all", "BatchNorm behind the first of each block", "no BatchNorm"],
)
def test_kernels_whose_length_the_logits_ignore(network, options, expected):
    make = functools.partial(network, 10, input_shape=(8, 8, 1), rngs=nnx.Rngs(0), **options)
    found = models.split(make())
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(found[1])]
    ignored = set(itertools.compress(names, models.scale_invariant(found, (8, 8, 1))))
    assert ignored == {name for name in names if expected and name.endswith(f"{expected}/kernel")}
    assert bool(ignored) == bool(expected)


@jax.custom_vjp
def _relu(x):
    return jnp.maximum(x, 0)


_relu.defvjp(lambda x: (_relu(x), x), lambda x, cotangent: (cotangent * (x > 0),))


class _OfOnesOwn(nnx.Module):
    """Its head begins with 0, and its activation has no forward-mode derivative."""

    def __init__(self, rngs):
        self.ignored = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.counts = nnx.Linear(5, 6, rngs=rngs)
        self.head = nnx.Linear(6, 3, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, images):
        return self.head(_relu(self.counts(_relu(self.norm(self.ignored(images))))))


def test_kernels_whose_length_the_logits_ignore_behind_which_all_is_zero():
    found = models.split(_OfOnesOwn(nnx.Rngs(0)))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(found[1])]
    assert list(itertools.compress(names, models.scale_invariant(found, (4,)))) == ["ignored/kernel"]


def test_what_one_loss_alone_reaches_counts_for_that_loss():
    params = {"body": jnp.array([1.0]), "head": jnp.array([1.0])}
    reached = dot_optax.PerLoss(task=True, kd={"body": True, "head": False})
    optimizer = optax.chain(optax.identity(), dot_optax.dot(0.1, reached=reached))
    grads = dot_optax.PerLoss({"body": jnp.array([1.0]), "head": jnp.array([2.0])}, optax.tree.ones_like(params))
    _, opt_state = optimizer.update(grads, optimizer.init(params), params)
    task, kd = of_trainer.momenta(opt_state, dot_optax.PerLoss, params)
    assert (task["head"], kd["head"], kd["body"]) == (2.0, 0.0, 1.0)
    kept = dot_optax.PerLoss(*(optax.tree.get(opt_state, name).trace for name in ("task", "kd")))
    with pytest.raises(ValueError, match=r"grads.kd\['head'\]: expected .* array of shape \(1,\).*; got no leaf"):
        dot_optax.diagnostics.compare(kept)
    assert of_trainer.momenta(optax.adam(0.1).init(params), dot_optax.PerLoss, params) is None


def _lines(job):
    lines = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.slow
def test_a_run_goes_on_with_its_running_moments(distill, tmp_path, monkeypatch):
    """Stopped within an epoch, the log is as if it had not been; and the teacher's says nothing of all this."""
    flags = ("--config.method=kd,dot", "--config.diagnostics=True", "--config.epochs=2", "--config.teacher.epochs=1")
    flags += ("--config.diagnostics_by=layer",)
    assert distill(tmp_path / "whole", *flags) == 0
    preempted = iter([False] * 19 + [True])
    monkeypatch.setattr(preemption, "watch", lambda: lambda: next(preempted))
    assert distill(tmp_path / "parts", *flags) == 0
    monkeypatch.undo()
    assert not (tmp_path / "parts" / "dot" / "result.json").exists()
    assert distill(tmp_path / "parts", *flags) == 0
    for method in ("kd", "dot"):
        lines = _lines(tmp_path / "whole" / method)
        assert _lines(tmp_path / "parts" / method) == lines
        for line in lines:
            assert None not in line.values()
            assert line["task_share"] + line["kd_share"] == pytest.approx(1)
            assert {"grad_cosine/classifier", "kd_grad_norm/hidden/0"} < set(line)
            assert "task_scale_invariant_rate" not in line  # for want of BatchNorm
    assert "task_share" not in _lines(tmp_path / "whole" / "teacher")[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--config.method=ce,deepkd,crd_dot",),
        ("--config.method=dot", "--config.sampling.form=alternating"),
        ("--config.method=kd,dot", "--config.sampling.form=difference"),
        ("--config.method=kd,dot", "--config.devices=2", "--config.parallel=shard_map"),
        ("--config.method=dot,kd_gain_matched", "--config.optimizer.name=adamw"),
        ("--config.method=dot,kd", "--config.optimizer.name=muon"),
    ],
    ids=" ".join,
)
def test_with_other_flags(flags, distill, tmp_path):
    added = ("--config.epochs=1", "--config.teacher.epochs=1", "--config.dataset.in_memory=True")
    added += ("--config.diagnostics=True", "--config.diagnostics_by=layer")
    assert distill(tmp_path / "run", *flags, *added) == 0
    relative = (
        1.0 if "optimizer.name" not in " ".join(flags) else 0.1
    )  # Adam and Muon: gains are relative to that of 0.9
    for method in flags[0].partition("=")[2].split(","):
        [line] = _lines(tmp_path / "run" / method)
        names = [name.removesuffix("_share") for name in line if name.endswith("_share")]
        assert len(names) == (3 if method == "deepkd" else 2)
        assert sum(line[f"{name}_share"] for name in names) == pytest.approx(1, abs=1e-3)  # float32, where they cancel
        gains = [line[f"{name}_gain"] for name in names]
        # DOT's momenta, and what gives KD their gains; DeepKD's task and non-target loss have the higher momentum.
        expected = {"ce": [10, None], "kd": [10, 10], "deepkd": [40, 1 / 0.175, 40]}.get(method, [1 / 0.175, 40])
        for gain, wanted, name in zip(gains, expected, names, strict=True):
            assert gain == (wanted and pytest.approx(wanted * relative, rel=1e-5))
            assert line[f"{name}_rate"] == (gain and pytest.approx(0.01 * gain, rel=1e-5))
            assert 0 <= line[f"{name}_snr"] < np.inf
        assert 0 < line["update_to_weight"] < 1
        cosines = {name: value for name, value in line.items() if "grad_cosine" in name}
        assert len(cosines) == (
            9 if method == "deepkd" else 5 if method == "crd_dot" else 3
        )  # of all, and of each layer
        unknown = {name for name, cosine in cosines.items() if cosine is None}
        if "alternating" in flags[-1]:  # no step knows both gradients
            assert unknown == set(cosines)
        else:  # the task does not reach CRD's projectors, nor CRD the head
            assert len(unknown) == (3 if method == "crd_dot" else 0) and "grad_cosine" not in unknown
        for name, cosine in cosines.items():
            conflict = line[name.replace("cosine", "conflict")]
            if cosine is None:
                assert conflict is None
            else:
                assert -1 <= cosine <= 1 and 0 <= conflict <= 1
                assert cosine >= 0 or conflict > 0
        ratios = [line[name] for name in line if name.startswith("update_to_weight/")]
        assert min(ratios) * 0.9 <= line["update_to_weight"] <= max(ratios) * 1.1  # means of ratios


@pytest.mark.slow
def test_devices_that_average_gradients_log_what_one_does(distill, tmp_path):
    flags = ("--config.method=dot", "--config.diagnostics=True", "--config.epochs=1", "--config.teacher.epochs=1")
    assert distill(tmp_path / "one", *flags) == 0
    assert distill(tmp_path / "two", *flags, "--config.devices=2", "--config.parallel=pmap") == 0
    [one], [two] = (_lines(tmp_path / run / "dot") for run in ("one", "two"))
    for name in one:
        assert two[name] == pytest.approx(one[name], rel=1e-3), name  # sums in another order, over 14 steps


def test_it_needs_the_gradient_of_each_loss():
    config = get_config()
    config.update({"diagnostics": True, "gradient_metrics": False})
    with pytest.raises(UserError, match=r"--config.gradient_metrics=False spares them: leave one of the two out"):
        methods.check_optimizers(config, ["dot"], trains_teacher=True)


def test_layers_alone_are_not_logged():
    config = get_config()
    config.diagnostics_by = "layer"
    with pytest.raises(
        UserError, match=r"--config.diagnostics_by=layer says what --config.diagnostics=True logs: give both"
    ):
        methods.check_optimizers(config, ["dot"], trains_teacher=True)


@pytest.mark.slow
def test_a_folder_has_it_or_has_it_not(distill, tmp_path, capsys):
    """Checkpoints with running moments are of another form."""
    flags = ("--config.method=kd", "--config.epochs=1", "--config.teacher.epochs=1")
    assert distill(tmp_path / "run", *flags) == 0
    assert distill(tmp_path / "run", *flags, "--config.diagnostics=True") == 1
    assert "diagnostics is False there and True here" in capsys.readouterr().err
