"""DOT inside Flax: `nnx.Optimizer`, Linen's `TrainState`, `reached` on networks with a projector, micro-batches."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import dot_optax
from dot_optax import PerLoss
from tests.tiers import slow_but

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (8, 3))
Y = jnp.arange(8) % 2
HINT = jax.random.normal(jax.random.key(1), (8, 5))


class Student(nnx.Module):
    """A body with BatchNorm, a head for the task, a projector to the teacher's features."""

    def __init__(self, rngs):
        self.body = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)
        self.projector = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x):
        features = nnx.relu(self.norm(self.body(x)))
        return self.head(features), self.projector(features)


class LinenStudent(nn.Module):
    @nn.compact
    def __call__(self, x):
        features = nn.relu(nn.Dense(4, name="body")(x))
        return nn.Dense(2, name="head")(features), nn.Dense(5, name="projector")(features)


def losses(outputs, y, hint):
    logits, projected = outputs
    task = optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return PerLoss(task=task, kd=((projected - hint) ** 2).mean())


def functional():
    """The parameters of a `Student`, and its losses as a function of them, with the BatchNorm statistics as aux."""
    graphdef, params, stats = nnx.split(Student(nnx.Rngs(0)), nnx.Param, ...)

    def loss_fn(params, stats, x, y, hint):
        model = nnx.merge(graphdef, params, stats, copy=True)
        return losses(model(x), y, hint), nnx.state(model, nnx.BatchStat)

    return params, stats, loss_fn


OPTIMIZERS = {
    "dot": lambda: dot_optax.dot(0.1),
    "L2 with a mask": lambda: dot_optax.dot(
        0.1, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    ),
    "accumulated": lambda: dot_optax.wrap(functools.partial(optax.MultiSteps, every_k_schedule=2), dot_optax.dot(0.1)),
    "finite": lambda: dot_optax.wrap(lambda tx: optax.apply_if_finite(tx, 2), dot_optax.dot(0.1)),
    "clipped": lambda: optax.chain(dot_optax.joint(optax.clip_by_global_norm(1.0)), dot_optax.dot(0.1)),
}


CONTAINERS = {
    "PerLoss": PerLoss,
    "tuple": lambda task, kd: (task, kd),
    "dict": lambda task, kd: {"kd": kd, "task": task},
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", slow_but(OPTIMIZERS, "L2 with a mask"))
def test_nnx_optimizer(name, container):
    """It turns the container into an `nnx.State` with the keys task and kd, or 0 and 1."""
    model, make, container = Student(nnx.Rngs(0)), OPTIMIZERS[name], CONTAINERS[container]
    optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer):
        task, kd = (nnx.grad(lambda m, i=i: losses(m(X), Y, HINT)[i])(model) for i in range(2))
        optimizer.update(model, container(task, kd))

    params, stats, loss_fn = functional()
    params = nnx.to_pure_dict(params)
    gradient = jax.jit(dot_optax.value_and_grads(loss_fn, has_aux=True))
    tx = make()
    state = tx.init(params)
    for _ in range(4):
        train_step(model, optimizer)
        grads = gradient(params, stats, X, Y, HINT)[1]
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    # The gradients are computed differently; float32 rounding, amplified by the gain of 40 over four steps.
    chex.assert_trees_all_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), params, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", slow_but(OPTIMIZERS, "dot", "clipped"))
def test_linen_train_state(name):
    model, make = LinenStudent(), OPTIMIZERS[name]
    params = model.init(KEY, X)["params"]
    gradient = jax.jit(dot_optax.value_and_grads(lambda p: losses(model.apply({"params": p}, X), Y, HINT)))
    train_state = TrainState.create(apply_fn=model.apply, params=params, tx=make())
    tx = make()
    state = tx.init(params)
    for _ in range(3):
        _, grads = gradient(params)
        train_state = train_state.apply_gradients(grads=grads)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert train_state.step == 3
    chex.assert_trees_all_close(train_state.params, params, rtol=1e-6)


def reach_of(layer):
    return PerLoss(task=layer != "projector", kd=layer != "head")


def buffer_bytes(state):
    return sum(x.nbytes for x in jax.tree.leaves(state))


def test_reached_on_nnx_keeps_one_buffer_for_head_and_projector():
    params, stats, loss_fn = functional()
    reached = dot_optax.reached(loss_fn, params, stats, X, Y, HINT, has_aux=True)
    for loss, mask in reached._asdict().items():
        for path, value in jax.tree.leaves_with_path(nnx.to_pure_dict(mask)):
            assert value == getattr(reach_of(path[0].key), loss), (loss, path)
    size = {layer: buffer_bytes(tree) for layer, tree in nnx.to_pure_dict(params).items()}
    for tree in (params, nnx.to_pure_dict(params)):  # `reached` is one level deeper than the latter
        state = dot_optax.scale_by_dot(reached=reached).init(tree)
        assert buffer_bytes(state) == 2 * (size["body"] + size["norm"]) + size["head"] + size["projector"]
    model = Student(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, dot_optax.dot(0.1, reached=reached), wrt=nnx.Param)
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    _, grads = dot_optax.value_and_grads(loss_fn, has_aux=True)(params, stats, X, Y, HINT)
    optimizer.update(model, grads)
    assert not np.array_equal(before["projector"]["kernel"], model.projector.kernel[...])


def test_reached_on_linen_keeps_one_buffer_for_head_and_projector():
    model = LinenStudent()
    params = model.init(KEY, X)["params"]
    reached = dot_optax.reached(lambda p, x: losses(model.apply({"params": p}, x), Y, HINT), params, X)
    for loss, mask in reached._asdict().items():
        assert mask == {layer: {"kernel": r, "bias": r} for layer in params for r in [getattr(reach_of(layer), loss)]}
    size = {layer: buffer_bytes(tree) for layer, tree in params.items()}
    state = dot_optax.scale_by_dot(reached=reached).init(params)
    assert buffer_bytes(state) == 2 * size["body"] + size["head"] + size["projector"]


def test_micro_batches_equal_the_full_batch():
    """`optax.microbatching.microbatch` around `value_and_grads`; the losses are means, and so are their gradients."""
    model = LinenStudent()
    params = model.init(KEY, X)["params"]

    def loss_fn(params, x, y, hint):
        return losses(model.apply({"params": params}, x), y, hint)

    full = dot_optax.value_and_grads(loss_fn)
    micro = optax.microbatching.microbatch(
        full, argnums=(1, 2, 3), microbatch_size=2, accumulator=optax.microbatching.AccumulationType.MEAN
    )
    result, expected = (jax.jit(f)(params, X, Y, HINT) for f in (micro, full))
    chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-6)


def test_micro_batches_with_batch_norm():
    """The statistics in aux are averaged like the losses: the mean over the micro-batches of what each one makes."""
    params, stats, loss_fn = functional()
    gradient = jax.jit(dot_optax.value_and_grads(loss_fn, has_aux=True))
    micro = optax.microbatching.microbatch(
        gradient, argnums=(2, 3, 4), microbatch_size=4, accumulator=optax.microbatching.AccumulationType.MEAN
    )
    halves = [gradient(params, stats, X[i], Y[i], HINT[i]) for i in (slice(0, None, 2), slice(1, None, 2))]
    expected = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    result = jax.jit(micro)(params, stats, X, Y, HINT)
    chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-6)
    (_, new_stats), _ = result
    # The mean of the batch is the mean of the halves' means.
    (_, full_stats), _ = gradient(params, stats, X, Y, HINT)
    np.testing.assert_allclose(new_stats["norm"]["mean"][...], full_stats["norm"]["mean"][...], rtol=1e-5, atol=1e-6)
