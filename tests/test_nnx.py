"""`dot_optax.nnx`: one forward pass over Flax NNX modules, whatever they keep in themselves, and a gradient per loss.

Tolerances: losses and gradients are of order one, and float32 rounds at 6e-8; the programs that are compared sum in
other orders. A mask or a statistic that is drawn or moved once too often changes them by more than 1e-3.
"""

import functools

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import dot_optax
import dot_optax.nnx
from dot_optax import PerLoss
from tests.tiers import slow_but

X = jax.random.normal(jax.random.key(0), (8, 3))
Y = jnp.arange(8) % 2
TEACHER_LOGITS = 3.0 * jax.random.normal(jax.random.key(1), (8, 2))

close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)


class Student(nnx.Module):
    def __init__(self, rngs, rate=0.5, axis_name=None):
        self.body = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, axis_name=axis_name, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)
        self.calls = 0

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.body(x)))))


def losses(logits, y, teacher_logits):
    task = optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return PerLoss(task=task, kd=((logits - teacher_logits) ** 2).mean())


def loss_fn(model, x, y, teacher_logits):
    return losses(model(x), y, teacher_logits)


def arrays(model, *filters):
    """Copies of the arrays of a model; keys of random numbers as numbers."""
    state = nnx.to_pure_dict(nnx.state(model, *filters))
    return jax.tree.map(
        lambda x: np.array(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x), state
    )


def pure(grads):
    """An `nnx.State` or a container of them with dicts in their place."""
    return jax.tree.map(
        lambda x: nnx.to_pure_dict(x) if isinstance(x, nnx.State) else x,
        grads,
        is_leaf=lambda x: isinstance(x, nnx.State),
    )


def plain(params, x, key):
    """A `Student` without Flax: its logits, and the mean that BatchNorm takes."""
    h = x @ params["body"]["kernel"] + params["body"]["bias"][None]
    h_mean = h.mean(0)
    h = (h - h_mean[None]) / jnp.sqrt(h.var(0) + 1e-5)[None]
    h = jax.nn.relu(params["norm"]["scale"][None] * h + params["norm"]["bias"][None])
    h = jnp.where(jax.random.bernoulli(key, 0.5, h.shape), h / 0.5, 0.0)
    return h @ params["head"]["kernel"] + params["head"]["bias"][None], h_mean


@pytest.mark.parametrize(
    "transform", [pytest.param(lambda f: f, id="eager", marks=pytest.mark.slow), pytest.param(nnx.jit, id="jit")]
)
def test_two_calls_against_gradients_by_hand(transform):
    """BatchNorm's statistics move once a call, and one mask of Dropout serves both losses."""
    model = Student(nnx.Rngs(0))
    params, key = nnx.to_pure_dict(nnx.state(model, nnx.Param)), model.dropout.rngs.key[...]
    moved = np.zeros(4)
    gradient = transform(lambda model, *batch: dot_optax.nnx.value_and_grads(loss_fn)(model, *batch))
    references = {
        name: jax.jit(
            jax.value_and_grad(lambda p, key, name=name: getattr(losses(plain(p, X, key)[0], Y, TEACHER_LOGITS), name))
        )
        for name in PerLoss._fields
    }
    for call in range(2):
        values, grads = gradient(model, X, Y, TEACHER_LOGITS)
        mask_key = jax.random.fold_in(key, call)
        for name in PerLoss._fields:
            value, expected = references[name](params, mask_key)
            close(getattr(values, name), value)
            close(pure(getattr(grads, name)), pure(expected))
        moved = 0.99 * moved + 0.01 * np.asarray(plain(params, X, mask_key)[1])
        close(np.asarray(model.norm.mean[...]), moved)
        assert model.dropout.rngs.count[...] == call + 1
    close(arrays(model, nnx.Param), pure(params))


def sows(model):
    model.sow(nnx.Intermediate, "features", model.head.kernel[...])


def pops(model):
    nnx.pop(model, nnx.BatchStat)


def changes_a_parameter(model):
    model.head.kernel[...] = model.head.kernel[...] / 2.0


def counts(model):
    model.calls += 1


def adds_a_layer(model):
    model.extra = nnx.Linear(2, 2, rngs=nnx.Rngs(3))


def switches_to_evaluation(model):
    model.eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*sow:DeprecationWarning")  # Flax would rather have it in nnx.capture
@pytest.mark.parametrize(
    "deed", [lambda _: None, sows, pops, changes_a_parameter, counts, adds_a_layer, switches_to_evaluation]
)
def test_what_a_loss_does_to_its_model_is_kept_as_in_flax(deed):
    """Twice, since what the first call sows is there at the second."""

    def loss_fn(model):
        logits = model(X)
        deed(model)
        return losses(logits, Y, TEACHER_LOGITS)

    ours, flax_s = Student(nnx.Rngs(0)), Student(nnx.Rngs(0))
    for _ in range(1 if deed is pops else 2):
        values, grads = dot_optax.nnx.value_and_grads(loss_fn)(ours)
        value, grad = nnx.value_and_grad(lambda model: sum(loss_fn(model)))(flax_s)
        close(values.task + values.kd, value)
        close(pure(jax.tree.map(jnp.add, *grads)), pure(grad))
        assert nnx.graphdef(ours) == nnx.graphdef(flax_s)
        close(arrays(ours), arrays(flax_s))


def test_a_deed_shows_in_what_is_compared():
    untouched = Student(nnx.Rngs(0))
    for deed in (pops, counts, adds_a_layer, switches_to_evaluation):
        deed(model := Student(nnx.Rngs(0)))
        assert nnx.graphdef(model) != nnx.graphdef(untouched), deed


def test_the_forward_pass_is_traced_once():
    traced = []

    def loss_fn(model):
        traced.append(model)
        return losses(model(X), Y, TEACHER_LOGITS)

    dot_optax.nnx.value_and_grads(loss_fn)(Student(nnx.Rngs(0)))
    assert len(traced) == 1


# Other arguments


class Tied(nnx.Module):
    """One matrix that encodes and decodes, under two names."""

    def __init__(self):
        self.encoder = nnx.Param(jnp.linspace(-1.0, 1.0, 6).reshape(3, 2))
        self.decoder = self.encoder


def test_a_tied_weight_has_one_gradient_of_both_its_uses():
    model = Tied()
    optimizer = nnx.Optimizer(model, dot_optax.dot(0.1), wrt=nnx.Param)

    def loss_fn(model):
        y = X @ model.encoder[...] @ model.decoder[...].T
        return PerLoss(task=(y**2).sum(), kd=y.sum())

    w, x = np.asarray(model.encoder[...], np.float64), np.asarray(X, np.float64)
    _, grads = dot_optax.nnx.value_and_grads(loss_fn)(model)
    y = x @ w @ w.T
    for i, of_y in enumerate((2 * y, np.ones_like(y))):
        (grad,) = jax.tree.leaves(grads[i])
        np.testing.assert_allclose(grad, x.T @ of_y @ w + of_y.T @ x @ w, rtol=1e-5, atol=1e-5)
    optimizer.update(model, grads)
    assert model.encoder is model.decoder
    expected = w - 0.1 * sum(np.asarray(jax.tree.leaves(grad)[0]) for grad in grads)
    np.testing.assert_allclose(model.decoder[...], expected, rtol=1e-5, atol=1e-5)


def test_rngs_as_an_argument_draw_once_for_both_losses():
    model, rngs = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Rngs(noise=7)

    def loss_fn(model, *, rngs):
        noisy = model(X + rngs.noise.normal(X.shape))
        return PerLoss(task=noisy.sum(), kd=4.0 * noisy.sum())

    noise = jax.random.normal(jax.random.fold_in(rngs.noise.key[...], 0), X.shape)
    _, grads = dot_optax.nnx.value_and_grads(loss_fn)(model, rngs=rngs)
    assert rngs.noise.count[...] == 1
    expected = np.repeat(np.asarray((X + noise).sum(0))[:, None], 2, axis=1)
    close(pure(grads.task)["kernel"], expected)
    close(pure(grads.kd)["kernel"], 4.0 * expected)


def test_a_teacher_is_neither_differentiated_nor_changed():
    student, teacher = Student(nnx.Rngs(0)), Student(nnx.Rngs(1))
    teacher.norm.mean[...] = jnp.arange(4.0)  # so that evaluation differs from training
    teacher.eval()
    before, graphdef = arrays(teacher), nnx.graphdef(teacher)
    teacher_logits = teacher(X)

    @nnx.jit
    def gradient(student, teacher):
        return dot_optax.nnx.value_and_grads(lambda s, t: losses(s(X), Y, t(X)))(student, teacher)

    values, grads = gradient(student, teacher)
    same = Student(nnx.Rngs(0))
    expected_values, expected = dot_optax.nnx.value_and_grads(loss_fn)(same, X, Y, teacher_logits)
    close((values, pure(grads)), (expected_values, pure(expected)))
    chex.assert_trees_all_equal(arrays(teacher), before)
    assert nnx.graphdef(teacher) == graphdef


@pytest.mark.slow
def test_a_module_given_twice_is_differentiated_in_both_places():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    _, grads = dot_optax.nnx.value_and_grads(lambda a, b: PerLoss(task=a(X).sum(), kd=(a(X) - b(X)).sum()))(
        model, model
    )
    close(pure(grads.task)["bias"], np.full(2, 8.0, np.float32))
    close(pure(grads.kd)["bias"], np.zeros(2, np.float32))


def test_a_captured_teacher_that_would_change_is_refused():
    teacher = Student(nnx.Rngs(1))
    gradient = dot_optax.nnx.value_and_grads(lambda student: losses(student(X), Y, teacher(X)))
    with pytest.raises(flax.errors.TraceContextError):
        gradient(Student(nnx.Rngs(0)))
    teacher.eval()
    values, _ = nnx.jit(gradient)(Student(nnx.Rngs(0)))
    assert np.isfinite(values.kd)


def test_an_argument_from_outside_of_jit_is_refused():
    teacher = Student(nnx.Rngs(1))
    gradient = dot_optax.nnx.value_and_grads(lambda student, teacher: losses(student(X), Y, teacher(X)))
    with pytest.raises(flax.errors.TraceContextError):
        nnx.jit(lambda student: gradient(student, teacher))(Student(nnx.Rngs(0)))


def test_metrics_and_aux():
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))

    def loss_fn(model, batch, metrics):
        logits = model(batch["x"])
        output = losses(logits, batch["y"], TEACHER_LOGITS)
        metrics.update(logits=logits, labels=batch["y"], loss=output.task)
        return output, {"logits": logits, "of": "batch", "model": model}

    model = Student(nnx.Rngs(0))
    gradient = dot_optax.nnx.value_and_grads(loss_fn, has_aux=True)
    (values, aux), _ = gradient(model, {"x": X, "y": Y}, metrics)
    assert metrics.accuracy.count[...] == 8  # examples
    assert metrics.loss.count[...] == 1
    close(metrics.loss.total[...], values.task)
    close(losses(aux["logits"], Y, TEACHER_LOGITS), values)
    assert aux["of"] == "batch"
    assert aux["model"] is model


def test_static_and_keyword_arguments():
    def loss_fn(student, x, double, *, model, mode, scale=None):
        assert (double, mode, scale) == (True, "mean", None)  # no tracers
        y = student(x) * model
        return {"ce": y.mean(), "hint": (y**2).mean(), "kd": abs(y).mean()}

    student = Student(nnx.Rngs(0), rate=0.0)
    values, grads = dot_optax.nnx.value_and_grads(loss_fn)(student, X, True, model=2.0, mode="mean")
    assert values.keys() == grads.keys() == {"ce", "hint", "kd"}
    close(pure(grads["ce"])["head"]["bias"], np.ones(2, np.float32))  # 2 of the factor, halved by the mean
    assert loss_fn.__name__ == dot_optax.nnx.value_and_grads(loss_fn).__name__


def adapted():
    """A student with an adapter in its head."""
    model = Student(nnx.Rngs(0))
    model.head = nnx.LoRA(4, 2, 2, base_module=model.head, rngs=nnx.Rngs(2))
    model.head.lora_b[...] = jnp.ones((2, 2))  # at zero the adapter's other factor has no gradient
    return model


FILTERS = {
    "parameters": (nnx.Param, 8),  # nnx.LoRAParam is one of them
    "the adapter": (nnx.LoRAParam, 2),
    "a path": (nnx.PathContains("body"), 2),
    "all of these": (nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam), nnx.PathContains("kernel")), 2),
}


@pytest.mark.parametrize(("wrt", "count"), FILTERS.values(), ids=FILTERS)
def test_wrt_selects_what_is_differentiated_and_trained(wrt, count):
    model = adapted()
    optimizer = nnx.Optimizer(model, dot_optax.dot(0.1), wrt=wrt)
    before, frozen = arrays(model, wrt), arrays(model, nnx.All(nnx.Param, nnx.Not(wrt)))
    _, grads = dot_optax.nnx.value_and_grads(loss_fn, wrt=wrt)(model, X, Y, TEACHER_LOGITS)
    flax_s = nnx.grad(lambda model: sum(loss_fn(model, X, Y, TEACHER_LOGITS)), argnums=nnx.DiffState(0, wrt))(adapted())
    assert len(jax.tree.leaves(grads.task)) == count
    close(pure(jax.tree.map(jnp.add, *grads)), pure(flax_s))
    optimizer.update(model, grads)
    chex.assert_trees_all_equal(arrays(model, nnx.All(nnx.Param, nnx.Not(wrt))), frozen)
    # The first step of DOT: both momenta are the gradients.
    close(arrays(model, wrt), jax.tree.map(lambda p, g: p - np.float32(0.1) * g, before, pure(flax_s)))


def test_wrt_that_selects_nothing():
    def loss_fn(model, teacher):
        return losses(model(X), Y, teacher(X))

    models = Student(nnx.Rngs(0)), adapted()  # the teacher's adapter does not count
    with pytest.raises(ValueError, match=r"wrt=.*LoRAParam.* selects nothing in the model"):
        dot_optax.nnx.value_and_grads(loss_fn, wrt=nnx.LoRAParam)(*models)
    with pytest.raises(ValueError, match=r"wrt=.*LoRAParam.* selects nothing in the model"):
        dot_optax.nnx.reached(loss_fn, *models, wrt=nnx.LoRAParam)


def test_what_has_no_gradient_is_refused():
    with pytest.raises(TypeError, match=r"count.* must be floating point or complex"):
        dot_optax.nnx.value_and_grads(loss_fn, wrt=nnx.RngCount)(Student(nnx.Rngs(0)), X, Y, TEACHER_LOGITS)


def test_value_and_grads_for_trees_names_the_one_for_modules():
    with pytest.raises(TypeError, match=r"argument 0.*dot_optax\.nnx\.value_and_grads"):
        dot_optax.value_and_grads(loss_fn)(Student(nnx.Rngs(0)), X, Y, TEACHER_LOGITS)


# Training

STEPS = 4
BATCHES = tuple(
    jnp.stack([a[jax.random.permutation(jax.random.key(i), 8)] for i in range(STEPS)]) for a in (X, Y, TEACHER_LOGITS)
)
OPTIMIZERS = {
    "dot": lambda: dot_optax.dot(0.05, weight_decay=0.1),
    # The bias before BatchNorm has a gradient of 0, but for rounding: `eps` keeps Adam from making whole steps of that.
    "dot_adamw": lambda: dot_optax.dot_adamw(0.01, eps=1e-3, weight_decay=0.1),
}


def train_step(model, optimizer, x, y, teacher_logits):
    values, grads = dot_optax.nnx.value_and_grads(loss_fn)(model, x, y, teacher_logits)
    optimizer.update(model, grads)
    return values


def make(optimizer, **kwargs):
    model = Student(nnx.Rngs(0), **kwargs)
    return model, nnx.Optimizer(model, optimizer, wrt=nnx.Param)


@functools.cache
def trained_by_functions(name, **kwargs):
    """The arrays and the losses after training without `dot_optax.nnx` and `nnx.Optimizer`."""
    graphdef, params, rest = nnx.split(Student(nnx.Rngs(0), **kwargs), nnx.Param, ...)
    tx = OPTIMIZERS[name]()
    history = []

    def pure_loss_fn(params, rest, *batch):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return loss_fn(model, *batch), nnx.state(model, nnx.Not(nnx.Param))

    @jax.jit
    def step(params, rest, state, *batch):
        (values, rest), grads = dot_optax.value_and_grads(pure_loss_fn, has_aux=True)(params, rest, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), rest, state, values

    state = tx.init(params)
    for batch in zip(*BATCHES, strict=True):
        params, rest, state, values = step(params, rest, state, *batch)
        history.append(values)
    return arrays(nnx.merge(graphdef, params, rest)), jax.tree.map(lambda *v: np.stack(v), *history)


def assert_trained(model, history, name, **kwargs):
    """With 1e-4: a step of Adam divides rounding by small gradients, and the gain of DOT is 40."""
    expected, expected_history = trained_by_functions(name, **kwargs)
    chex.assert_trees_all_close(arrays(model), expected, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(history, expected_history, rtol=1e-4, atol=1e-4)
    moved = np.abs(expected["head"]["kernel"] - arrays(Student(nnx.Rngs(0)))["head"]["kernel"]).max()
    assert moved > 1e-2  # else there would be nothing to compare


@pytest.mark.parametrize("name", slow_but(OPTIMIZERS, "dot"))
def test_nnx_jit_and_nnx_optimizer(name):
    model, optimizer = make(OPTIMIZERS[name]())
    step = nnx.jit(train_step)
    history = [step(model, optimizer, *batch) for batch in zip(*BATCHES, strict=True)]
    assert_trained(model, jax.tree.map(lambda *v: np.stack(v), *history), name)
    assert optimizer.step[...] == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nnx_scan_over_steps(name):
    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def train(carry, batch):
        return carry, train_step(*carry, *batch)

    (model, optimizer), history = train(make(OPTIMIZERS[name]()), BATCHES)
    assert_trained(model, history, name)
    assert optimizer.step[...] == STEPS


@pytest.mark.parametrize("devices", slow_but([2, 4], 4))
def test_shard_map(devices):
    """The batch is divided among the devices; BatchNorm averages over them, and so do the losses.

    Without Dropout, whose mask would be the same for each device's part of the batch.
    """
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))
    graphdef, state = nnx.split(make(OPTIMIZERS["dot"](), rate=0.0, axis_name="data"))

    def averaged_loss_fn(model, *batch):
        return jax.lax.pmean(loss_fn(model, *batch), "data")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), *3 * [P("data")]), out_specs=P())
    def step(state, *batch):
        model, optimizer = nnx.merge(graphdef, state, copy=True)
        values, grads = dot_optax.nnx.value_and_grads(averaged_loss_fn)(model, *batch)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), values

    history = []
    for batch in zip(*BATCHES, strict=True):
        state, values = jax.block_until_ready(step(state, *batch))
        history.append(values)
    model, _ = nnx.merge(graphdef, state)
    assert_trained(model, jax.tree.map(lambda *v: np.stack(v), *history), "dot", rate=0.0)


# Which loss reaches which parameter


class WithProjector(nnx.Module):
    def __init__(self, rngs):
        self.student = Student(rngs)
        self.projector = nnx.Linear(4, 5, rngs=rngs)


def hint_loss_fn(model, x, y, hint, *, of="features"):
    assert of == "features"
    student = model.student
    features = student.dropout(nnx.relu(student.norm(student.body(x))))
    task = optax.losses.softmax_cross_entropy_with_integer_labels(student.head(features), y).mean()
    return PerLoss(task=task, kd=((model.projector(features) - hint) ** 2).mean()), features


HINT = jax.random.normal(jax.random.key(2), (8, 5))


@pytest.mark.parametrize("make", [WithProjector, lambda rngs: nnx.eval_shape(lambda: WithProjector(nnx.Rngs(0)))])
def test_reached_agrees_with_the_gradients(make):
    model = make(nnx.Rngs(0))
    reached = dot_optax.nnx.reached(hint_loss_fn, model, X, Y, HINT, has_aux=True, of="features")
    _, grads = dot_optax.nnx.value_and_grads(hint_loss_fn, has_aux=True)(WithProjector(nnx.Rngs(0)), X, Y, HINT)
    for name in PerLoss._fields:
        # BatchNorm takes the mean off again, so that the bias before it has a gradient of rounding errors.
        nonzero = jax.tree.map(lambda g: bool(np.any(g)), pure(getattr(grads, name)))
        nonzero["student"]["body"]["bias"] = True
        assert nnx.to_pure_dict(getattr(reached, name)) == nonzero
    assert not nnx.to_pure_dict(reached.task)["projector"]["kernel"]
    assert not nnx.to_pure_dict(reached.kd)["student"]["head"]["kernel"]


def test_reached_changes_nothing():
    model = WithProjector(nnx.Rngs(0))
    before, graphdef = arrays(model), nnx.graphdef(model)
    dot_optax.nnx.reached(hint_loss_fn, model, X, Y, HINT, has_aux=True)
    chex.assert_trees_all_equal(arrays(model), before)
    assert nnx.graphdef(model) == graphdef


def test_reached_saves_buffers_in_nnx_optimizer():
    """A head and a projector keep one momentum each, the mean of both, as the published optimizer has it."""
    model = WithProjector(nnx.Rngs(0))
    reached = dot_optax.nnx.reached(hint_loss_fn, model, X, Y, HINT, has_aux=True)
    optimizer = nnx.Optimizer(model, dot_optax.dot(0.1, reached=reached), wrt=nnx.Param)
    size = {"/".join(k): v.size for k, v in flax.traverse_util.flatten_dict(arrays(model, nnx.Param)).items()}
    one = sum(n for k, n in size.items() if k.startswith(("student/head", "projector")))
    buffers = sum(x.size for x in jax.tree.leaves(nnx.state(optimizer, nnx.OptState)) if x.size > 1)
    assert buffers == 2 * (sum(size.values()) - one) + one

    momentum = {"head": np.zeros((4, 2)), "projector": np.zeros((4, 5))}
    expected = {"head": np.array(model.student.head.kernel[...]), "projector": np.array(model.projector.kernel[...])}
    for _ in range(3):
        _, grads = dot_optax.nnx.value_and_grads(hint_loss_fn, has_aux=True)(model, X, Y, HINT)
        optimizer.update(model, grads)
        of = {"head": grads.task["student"]["head"]["kernel"], "projector": grads.kd["projector"]["kernel"]}
        for key in momentum:
            momentum[key] = 0.9 * momentum[key] + np.asarray(of[key][...])
            expected[key] = expected[key] - 0.1 * momentum[key]
    close(np.asarray(model.student.head.kernel[...]), expected["head"])
    close(np.asarray(model.projector.kernel[...]), expected["projector"])
