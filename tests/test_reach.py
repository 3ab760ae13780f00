"""Which loss reaches which parameter: `reached` against known networks, and the masks that optimizers take."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dot_optax
from dot_optax import PerLoss

X = jax.random.normal(jax.random.key(1), (16, 4))


def projector_losses(params, x):
    features = jnp.tanh(x @ params["body"]["w"])
    frozen = jax.lax.stop_gradient(params["frozen"])
    hint = ((features @ params["projector"]) * frozen - 1.0) ** 2
    return PerLoss(task=(features @ params["head"]).mean(), kd=hint.mean())


PROJECTOR_PARAMS = {
    "body": {"w": jnp.ones((4, 8))},
    "head": jnp.ones((8, 3)),
    "projector": jnp.ones((8, 2)),
    "frozen": jnp.ones(()),
    "unused": jnp.ones(5),
}
PROJECTOR_REACH = PerLoss(
    task={"body": {"w": True}, "head": True, "projector": False, "frozen": False, "unused": False},
    kd={"body": {"w": True}, "head": False, "projector": True, "frozen": False, "unused": False},
)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.checkpoint, jax.remat])
def test_reached_through_transformations(transform):
    assert dot_optax.reached(transform(projector_losses), PROJECTOR_PARAMS, X) == PROJECTOR_REACH


def test_reached_agrees_with_the_gradients_and_serves_dot():
    params = optax.tree.random_like(jax.random.key(3), PROJECTOR_PARAMS)
    _, grads = dot_optax.value_and_grads(projector_losses)(params, X)
    nonzero = jax.tree.map(lambda g: bool(g.any()), grads)
    reached = dot_optax.reached(projector_losses, params, X)
    assert nonzero == reached
    dot_optax.dot(0.1, reached=reached).init(params)


def test_reached_computes_nothing():
    """The loss fails if it runs, and its intermediate values would need 80 TB."""

    def fail(x):
        raise AssertionError("the loss ran")

    def fn(params, x):
        huge = jnp.ones((10**6, 10**7)) * params["w"]
        ran = jax.pure_callback(fail, jax.ShapeDtypeStruct((), jnp.float32), jax.lax.stop_gradient(params["w"]))
        return PerLoss(task=huge.sum() * ran * x.mean(), kd=params["b"] ** 2)

    params = {"w": jnp.float32(1.0), "b": jnp.float32(1.0)}
    expected = PerLoss(task={"w": True, "b": False}, kd={"w": False, "b": True})
    assert dot_optax.reached(fn, params, X) == expected
    with pytest.raises(Exception, match="the loss ran"):
        jax.block_until_ready(jax.pure_callback(fail, jax.ShapeDtypeStruct((), jnp.float32), jnp.float32(0.0)))


def test_reached_takes_abstract_arrays_static_arguments_and_aux():
    abstract = jax.eval_shape(lambda: (PROJECTOR_PARAMS, X))

    def fn(params, x, name, layers, *, scale):
        assert name == "static" and range(layers)
        return jax.tree.map(lambda loss: scale * loss, projector_losses(params, x)), x

    assert dot_optax.reached(fn, *abstract, "static", np.int32(3), has_aux=True, scale=2.0) == PROJECTOR_REACH


def test_reached_is_cautious_about_loops():
    """A parameter that a scan carries counts as reached by whatever depends on the scan."""

    def fn(params):
        carried, _ = jax.lax.scan(lambda c, _: (jax.tree.map(lambda x: 2.0 * x, c), None), params, length=2)
        return carried["a"], carried["b"]

    reached = dot_optax.reached(fn, {"a": 1.0, "b": 1.0})
    assert reached[0]["a"] and reached[1]["b"]


def test_a_zero_cotangent_within_a_custom_gradient_is_no_reach():
    """A custom gradient that gives None, JAX's symbolic zero, is known to be zero; one that computes a zero is not."""

    def rule(gradient):
        @jax.custom_vjp
        def identity(x):
            return x

        identity.defvjp(lambda x: (x, None), lambda _, g: (gradient(g),))
        return identity

    def fn(params):
        return PerLoss(rule(lambda g: None)(params["none"]) + params["w"], rule(lambda g: 0.0 * g)(params["zero"]))

    reached = dot_optax.reached(fn, {"none": 1.0, "w": 1.0, "zero": 1.0})
    assert reached.task == {"none": False, "w": True, "zero": False}
    assert reached.kd == {"none": False, "w": False, "zero": True}


class EquinoxModule(eqx.Module):
    """Like every module of Equinox that is used, it can be called."""

    body: jax.Array
    head: jax.Array

    def __call__(self, x):
        return self.head * (self.body * x)


class NnxModule(nnx.Module):
    def __init__(self):
        self.body, self.head = nnx.Param(jnp.ones(2)), nnx.Param(jnp.ones(2))

    def __call__(self, x):
        return self.head * (self.body * x)


def module_losses(model, x):
    return PerLoss(task=jnp.sum(model(x)), kd=jnp.sum(model.body * x))


OPTIMIZERS_WITH_MASKS = {
    "dot, reached": lambda mask, reached: dot_optax.dot(0.1, 0.5, 0.7, reached=reached),
    "dot, mask": lambda mask, reached: dot_optax.dot(0.1, 0.5, 0.7, weight_decay=0.1, mask=mask),
    "gain-matched, mask": lambda mask, reached: dot_optax.gain_matched_sgd(0.1, 0.5, 0.7, weight_decay=0.1, mask=mask),
    "dot_adamw": lambda mask, reached: dot_optax.dot_adamw(0.1, 0.5, 0.7, mask=mask, reached=reached),
    "scale_by_momenta": lambda mask, reached: dot_optax.scale_by_momenta(
        PerLoss(0.5, 0.7), weight_decay=0.1, mask=mask, reached=reached
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS_WITH_MASKS)
@pytest.mark.parametrize("module", [lambda: EquinoxModule(jnp.ones(2), jnp.ones(2)), NnxModule], ids=["eqx", "nnx"])
def test_masks_that_are_modules_are_trees_and_not_functions(module, name):
    """A module of bools can be called, and would be taken for a function of the parameters."""
    model, x = module(), jnp.arange(1.0, 3.0)
    reached = dot_optax.reached(module_losses, model, x)
    leaves = jax.tree.leaves(model)
    assert [jax.tree.leaves(mask) for mask in reached] == [[True, True], [True, False]]
    mask = jax.tree.unflatten(jax.tree.structure(model), [True, False])
    as_dicts = [dict(zip(("body", "head"), jax.tree.leaves(m), strict=True)) for m in (mask, *reached)]
    plain = dict(zip(("body", "head"), leaves, strict=True))
    results = []
    for params, masks in ((model, (mask, reached)), (plain, (as_dicts[0], PerLoss(*as_dicts[1:])))):
        tx = OPTIMIZERS_WITH_MASKS[name](*masks)
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(PerLoss(params, params), state, params)
        results.append(jax.tree.leaves(updates))
    np.testing.assert_array_equal(results[0], results[1])


@pytest.mark.parametrize("name", OPTIMIZERS_WITH_MASKS)
def test_functions_of_the_parameters_see_the_parameters(name):
    """Also in `update`, where the gradients have another dtype than the parameters."""
    seen = []

    def in_bfloat16(params):
        seen.append({k: p.dtype for k, p in params.items()})
        return {k: p.dtype == jnp.bfloat16 for k, p in params.items()}

    params = {"w": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.float32)}
    grads = jax.tree.map(lambda p: jnp.ones(2, jnp.float32), params)
    results = []
    for mask in (in_bfloat16, {"w": True, "b": False}):
        tx = OPTIMIZERS_WITH_MASKS[name](mask, PerLoss(True, mask))
        updates, _ = tx.update(PerLoss(grads, grads), tx.init(params), params)
        results.append(updates)
    np.testing.assert_array_equal(results[0]["w"], results[1]["w"])
    np.testing.assert_array_equal(results[0]["b"], results[1]["b"])
    assert len(seen) >= 2
    assert all(dtypes == {"w": jnp.bfloat16, "b": jnp.float32} for dtypes in seen)


def test_a_partial_is_a_function():
    """It is a tree without leaves too."""
    params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    by_name = jax.tree_util.Partial(lambda name, tree: {k: k == name for k in tree}, "w")
    tx = dot_optax.dot(0.1, weight_decay=0.1, mask=by_name)
    updates, _ = tx.update(PerLoss(params, params), tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.21, rtol=1e-6)
    np.testing.assert_allclose(updates["b"], -0.2, rtol=1e-6)


@pytest.mark.parametrize(
    "mask",
    [
        {"layer": {"w": True, "b": False}},
        {"layer": {"w": {"value": True}, "b": {"value": False}}},
        lambda params: {"layer": {"w": np.bool_(True), "b": False}},
    ],
    ids=["equal", "one level deeper", "function"],
)
def test_masks_by_name(mask):
    params = {"layer": {"w": jnp.ones(2), "b": jnp.ones(2)}}
    tx = dot_optax.dot(0.1, weight_decay=0.1, mask=mask)
    updates, _ = tx.update(PerLoss(params, params), tx.init(params), params)
    np.testing.assert_allclose(updates["layer"]["w"], -0.21, rtol=1e-6)
    np.testing.assert_allclose(updates["layer"]["b"], -0.2, rtol=1e-6)


def test_deeper_entries_that_disagree_are_no_answer():
    params = {"w": jnp.ones(2)}
    tx = dot_optax.dot(0.1, weight_decay=0.1, mask={"w": {"a": True, "b": False}})
    with pytest.raises(ValueError, match="mask: no entry for the parameter w"):
        tx.init(params)
