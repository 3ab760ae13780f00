"""What steps of the language model compute: losses by name, from logits and from a cache; on one device and on several."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict

import dot_optax
from examples.distill import methods
from examples.language_model import configs, jobs, losses, model, steps
from examples.language_model.configs import bytes as of_bytes
from examples.trainer import parallel
from examples.trainer.errors import UserError
from examples.trainer.sampling import EXACT
from examples.trainer.step import init_state
from tests.tiers import slow_but

_LENGTH, _BATCH, _VOCABULARY = 6, 4, 11
_ARCHITECTURE = model.Architecture(_VOCABULARY, width=8, layers=2, heads=2, kv_heads=2, head_dim=4, feed_forward=16)
_TOKENS = np.random.default_rng(0).integers(0, _VOCABULARY, (_BATCH, _LENGTH + 1)).astype(np.int32)


def _config(**overrides):
    config = configs.default().distillation
    config.update(overrides)
    return config


def _network(seed):
    return model.split(model.build(_ARCHITECTURE, rngs=nnx.Rngs(seed)))


def _logits(seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, 3, _VOCABULARY)), jnp.float32)


_EXPECTED = {
    "forward": dot_optax.losses.kd_loss,
    "reverse": dot_optax.losses.reverse_kl_loss,
    "jsd": lambda *args: dot_optax.losses.jsd_loss(*args, beta=0.5),
    "skew": lambda *args: dot_optax.losses.skew_kl_loss(*args, alpha=0.1),
    "top_k": dot_optax.losses.kd_loss,  # with k of all
}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", losses.NAMES)
def test_losses_by_name_of_logits_and_of_all_likeliest(name, temperature):
    student, teacher = _logits(0), _logits(1)
    loss = losses.build(_config(loss=name, temperature=temperature), _VOCABULARY)
    expected = _EXPECTED[name](student, teacher, temperature)
    np.testing.assert_allclose(loss.of_logits(student, teacher, temperature), expected, rtol=1e-5)
    kept = losses.likeliest(teacher, temperature, _VOCABULARY)
    # Logarithms and exponentials in another order, in float32.
    np.testing.assert_allclose(loss.of_likeliest(student, kept), expected, rtol=1e-4)
    halves = kept._replace(log_probs=kept.log_probs.astype(jnp.float16))
    # Float16 changes log-probabilities by up to 2.4e-4 of their size, which is below 10 here.
    np.testing.assert_allclose(loss.of_likeliest(student, halves), expected, atol=temperature**2 * 1e-2)


def test_top_k_compares_the_likeliest_tokens_and_the_others_as_one():
    student, teacher = _logits(0), _logits(1)
    loss = losses.build(_config(loss="top_k", k=3), _VOCABULARY)
    found = loss.of_logits(student, teacher, 1.0)
    np.testing.assert_array_equal(found, loss.of_likeliest(student, losses.likeliest(teacher, 1.0, 3)))
    assert (found < dot_optax.losses.kd_loss(student, teacher, 1.0)).all()


def test_a_cache_of_few_tokens_is_for_top_k_alone():
    with pytest.raises(UserError, match="loss=jsd compares all 11 tokens, and the cache holds 3: give"):
        losses.build(_config(loss="jsd", k=3, cache=True), _VOCABULARY)
    losses.build(_config(loss="jsd", k=11, cache=True), _VOCABULARY)
    with pytest.raises(UserError, match="k=12: the vocabulary has 11 tokens"):
        losses.build(_config(k=12), _VOCABULARY)


def _problem(**changes):
    loss = losses.build(_config(), _VOCABULARY)
    problem = steps.Problem(_network(0)[0], _network(1)[0], loss, separator=0)
    return problem._replace(**changes)


def _optimizer(method="dot", name="sgd"):
    config = of_bytes.get_config().optimizer
    config.update({"name": name, "learning_rate": 0.1, "schedule": "steps", "warmup_epochs": 0})
    return methods.build(method, config, dot_optax.PerLoss(0.5, 0.5), steps_per_epoch=10, matrices=model.matrices)


def _layout(devices, of_model=1):
    grid = np.array(jax.devices()[:devices]).reshape(-1, of_model)
    mesh = jax.sharding.Mesh(grid, (parallel.AXIS, parallel.MODEL_AXIS))
    return parallel.jit_layout(mesh, spec=lambda path, leaf: model.sharding_spec(path, leaf, mesh))


def _train(problem, layout, optimizer, count=3, **options):
    step = steps.make_train_step(problem, optimizer, layout, **options)
    teacher = jax.device_put(_network(1)[1], layout.shardings(_network(1)[1]))
    state = layout.place(init_state(_network(0)[1], {}, optimizer))
    found = []
    for _ in range(count):
        state, metrics = jax.block_until_ready(step(state, teacher, layout.put_batch({"tokens": _TOKENS})))
        found.append(jax.device_get(metrics))
    return jax.device_get(state.params), found, state


@pytest.mark.slow
def test_a_step_is_dot_on_both_losses():
    (graphdef, params), (teacher_graphdef, teacher) = _network(0), _network(1)

    def loss_fn(params):
        logits, teacher_logits = (
            model.apply(g, p, jnp.asarray(_TOKENS[:, :-1]), separator=0)
            for g, p in ((graphdef, params), (teacher_graphdef, teacher))
        )
        task = optax.losses.softmax_cross_entropy_with_integer_labels(logits, _TOKENS[:, 1:])
        return dot_optax.PerLoss(0.5 * task.mean(), 0.5 * dot_optax.losses.kd_loss(logits, teacher_logits, 1.0).mean())

    optimizer = dot_optax.dot(0.1, *dot_optax.betas(0.9, 0.075), weight_decay=0.1)
    opt_state = optimizer.init(params)
    expected = []
    for _ in range(3):
        values, grads = jax.jit(dot_optax.value_and_grads(loss_fn))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        expected.append(values)
    found, metrics, _ = _train(_problem(), _layout(1), _optimizer())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, params)
    for values, step in zip(expected, metrics, strict=True):
        np.testing.assert_allclose([step["task_loss"], step["kd_loss"]], [2 * values.task, 2 * values.kd], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("devices_of_model", slow_but([(2, 1), (4, 2), (4, 4)], (4, 2)))
def test_devices_give_the_student_of_one(devices_of_model):
    devices, of_model = devices_of_model
    one, _, _ = _train(_problem(), _layout(1), _optimizer())
    layout = _layout(devices, of_model)
    found, _, state = _train(_problem(mesh=layout.mesh), layout, _optimizer())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, one)
    q = state.params["layers"]["q"]
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == q.shape]
    assert len(arrays) == 9  # q, k and v, and both momenta of each
    heads = 1 if of_model == 2 else 2  # Four devices cannot divide two heads.
    for leaf in arrays:
        assert leaf.sharding.shard_shape(q.shape) == (2, 8 * of_model // devices, heads, 4)


@pytest.mark.slow
def test_an_evaluation_counts_what_is_valid():
    valid = np.arange(_LENGTH)[None] < np.array([6, 6, 2, 0])[:, None]
    params, teacher = _network(0)[1], _network(1)[1]
    sums = steps.make_eval_step(_problem())(params, teacher, {"tokens": _TOKENS, "valid": valid})
    logits = model.apply(_network(0)[0], params, jnp.asarray(_TOKENS[:, :-1]), separator=0)
    task = optax.losses.softmax_cross_entropy_with_integer_labels(logits, _TOKENS[:, 1:])
    assert (sums["count"], sums["sequences"]) == (14, 3)
    np.testing.assert_allclose(sums["task_loss"], task[valid].sum(), rtol=1e-5)
    np.testing.assert_allclose(
        sums["squares"], sum(float(row[v].sum()) ** 2 for row, v in zip(task, valid, strict=True)), rtol=1e-5
    )
    of_sequences, lengths = np.array([row[v].sum() for row, v in zip(task, valid, strict=True)]), valid.sum(1)
    np.testing.assert_allclose(sums["products"], (of_sequences * lengths).sum(), rtol=1e-5)
    assert sums["lengths"] == 36 + 36 + 4
    assert sums["top1"] == (logits.argmax(-1) == _TOKENS[:, 1:])[valid].sum()


def test_what_a_teacher_predicts_for_a_cache_gives_its_loss():
    params, teacher = _network(0)[1], _network(1)[1]
    kept = steps.make_predict(_problem(), _VOCABULARY)(teacher, jnp.asarray(_TOKENS[:, :-1]))
    batch = {"tokens": _TOKENS, "valid": np.ones((_BATCH, _LENGTH), bool)}
    cached = batch | {"teacher_log_probs": kept.log_probs.astype(jnp.float16), "teacher_indices": kept.indices}
    live = steps.make_eval_step(_problem())(params, teacher, batch)["kd_loss"]
    from_cache = steps.make_eval_step(_problem(teacher=None))(params, None, cached)["kd_loss"]
    # 24 predictions, each with log-probabilities near -2.4 that float16 changes by 1e-3 at most.
    np.testing.assert_allclose(from_cache, live, atol=24 * 1e-3)


def test_the_spread_of_sequences_of_which_one_is_short():
    """The standard error of a sum of independent sequences, from their sums alone."""
    rng = np.random.default_rng(0)
    lengths = np.array([6, 6, 6, 2])
    losses_of = rng.normal(3.0, 0.5, 4) * lengths
    sums = {
        "task_loss": losses_of.sum(),
        "squares": (losses_of**2).sum(),
        "products": (losses_of * lengths).sum(),
        "lengths": (lengths**2).sum(),
        "sequences": 4,
        "count": lengths.sum(),
        "top1": 0,
    }
    found = jobs.means(dict(sums), num_bytes=10)
    mean = losses_of.sum() / lengths.sum()
    spread = np.sqrt(4 / 3 * ((losses_of - mean * lengths) ** 2).sum())
    assert found["task_loss"] == pytest.approx(mean)
    assert found["bits_per_byte"] == pytest.approx(losses_of.sum() / np.log(2) / 10)
    assert found["bits_per_byte_error"] == pytest.approx(spread / np.log(2) / 10)
    assert found["count"] == 20


def test_bits_per_byte():
    assert steps.bits_per_byte(np.log(2) * 24, 8) == pytest.approx(3.0)


@pytest.mark.parametrize("name", slow_but(["adamw", "muon"], "adamw"))
@pytest.mark.parametrize("mask", ["kernels", "all"])
def test_matrices_decay_and_the_others_do_not(name, mask):
    _, params = _network(0)
    matrices = {"q", "k", "v", "o", "gate", "up", "down"}
    config = ConfigDict(of_bytes.get_config().optimizer)
    config.update({"name": name, "learning_rate": 1.0, "schedule": "steps", "warmup_epochs": 0})
    config.update({"weight_decay": 0.5, "decay_mask": mask})
    zeros = optax.tree.zeros_like(params)
    wanted = jax.tree.map_with_path(
        lambda path, leaf: -0.5 * leaf if mask == "all" or path[-1].key in matrices else 0 * leaf, params
    )
    for method in ("kd", "dot", "kd_gain_matched"):
        tx = methods.build(method, config, dot_optax.PerLoss(0.5, 0.5), 10, matrices=model.matrices)
        updates, _ = tx.update(dot_optax.PerLoss(zeros, zeros), tx.init(params), params)
        jax.tree.map(np.testing.assert_array_equal, updates, wanted)  # halves are exact


def test_muon_orthogonalizes_each_layer_for_itself():
    _, params = _network(0)
    tx = _optimizer("kd", "muon")
    grads = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    updates, _ = tx.update(dot_optax.PerLoss(grads, grads), tx.init(params), optax.tree.zeros_like(params))
    for name, shape in (("gate", (8, 16)), ("o", (8, 8)), ("q", (8, 8))):
        for layer in updates["layers"][name]:
            values = np.linalg.svd(np.asarray(layer).reshape(shape), compute_uv=False)
            # Five steps of Newton and Schulz leave singular values within 0.68 and 1.13 of one another.
            assert values.max() / values.min() < 2


def test_the_operations_of_all_layers_are_counted():
    """XLA counts those of a loop over layers as if there were one."""
    graphdef, params = _network(0)
    batch = {"tokens": jax.ShapeDtypeStruct(_TOKENS.shape, _TOKENS.dtype)}
    alone = steps.Problem(graphdef, None, None, separator=0)

    def of_distillation(layers):
        """In units of the step without a teacher."""
        teacher, shapes = nnx.eval_shape(
            lambda: model.split(model.build(_ARCHITECTURE._replace(layers=layers), rngs=nnx.Rngs(0)))
        )
        args = (params, {}, shapes, batch, batch)
        return 1 / steps.relative_flops(alone, _problem(teacher=teacher), EXACT, None, *args)

    one, two, four = (of_distillation(layers) for layers in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=1e-3) and two - one > 0.1
