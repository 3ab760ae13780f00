"""`value_and_grads` against `jax.grad` of each loss, inside every transformation."""

import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dot_optax
from dot_optax import PerLoss
from tests.tiers import slow_but


def network(key):
    keys = jax.random.split(key, 3)
    return {"w": jax.random.normal(keys[0], (4, 8)), "v": jax.random.normal(keys[1], (8, 3))}


def loss_fn(params, x, y):
    logits = jnp.tanh(x @ params["w"]) @ params["v"]
    teacher = jnp.cos(x @ jnp.ones((4, 3)))
    task = optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return PerLoss(task=0.1 * task, kd=0.9 * dot_optax.losses.kd_loss(logits, teacher, 4.0).mean())


X = jax.random.normal(jax.random.key(1), (16, 4))
Y = jnp.arange(16) % 3
PARAMS = network(jax.random.key(0))


def two_grads(loss_fn, params, *args):
    return PerLoss(*(jax.grad(lambda p, i=i: loss_fn(p, *args)[i])(params) for i in range(2)))


def scanned_loss_fn(params, x, y):
    def body(total, example):
        return jax.tree.map(jnp.add, total, loss_fn(params, example[0][None], example[1][None])), None

    return jax.lax.scan(body, PerLoss(jnp.zeros(()), jnp.zeros(())), (x, y))[0]


@jax.custom_vjp
def scaled_tanh(x):
    return jnp.tanh(x)


scaled_tanh.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (3.0 * g,))


def custom_vjp_loss_fn(params, x, y):
    return loss_fn(jax.tree.map(scaled_tanh, params), x, y)


KINDS = {
    "plain": loss_fn,
    "remat": jax.checkpoint(loss_fn),
    "scan": scanned_loss_fn,
    "custom_vjp": custom_vjp_loss_fn,
}


def check_against_one_grad_per_loss(fn, gradient):
    values, grads = gradient(PARAMS, X, Y)
    expected_values, expected = jax.jit(lambda *args: (fn(*args), two_grads(fn, *args)))(PARAMS, X, Y)
    assert isinstance(values, PerLoss) and isinstance(grads, PerLoss)
    # The same operations on numbers of order one in float32, perhaps fused differently.
    chex.assert_trees_all_close(values, expected_values, rtol=1e-5)
    chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", slow_but(KINDS, "plain", "scan"))
def test_equals_one_jax_grad_per_loss(kind):
    check_against_one_grad_per_loss(KINDS[kind], jax.jit(dot_optax.value_and_grads(KINDS[kind])))


@pytest.mark.parametrize("kind", slow_but(KINDS, "plain"))
def test_equals_one_jax_grad_per_loss_without_jit(kind):
    check_against_one_grad_per_loss(KINDS[kind], dot_optax.value_and_grads(KINDS[kind]))


def test_two_jax_grads_in_one_jit_cost_the_same():
    """XLA shares the forward pass of two `jax.grad` calls in one `jit`; `value_and_grads` shares it by itself."""

    def flops(function):
        return jax.jit(function).lower(PARAMS, X, Y).compile().cost_analysis()["flops"]

    def both_values_and_grads(*args):
        return loss_fn(*args), two_grads(loss_fn, *args)

    ours, theirs = flops(dot_optax.value_and_grads(loss_fn)), flops(both_values_and_grads)
    assert ours == pytest.approx(theirs, rel=0.01)
    summed = flops(jax.value_and_grad(lambda *args: sum(loss_fn(*args))))
    assert summed < ours < 2 * summed


def test_the_forward_pass_is_traced_once():
    calls = []

    def counted(params, x, y):
        calls.append(None)
        return loss_fn(params, x, y)

    jax.jit(dot_optax.value_and_grads(counted)).lower(PARAMS, X, Y)
    assert len(calls) == 1


def test_a_loss_that_overflows_leaves_the_other_gradient_alone():
    def fn(x):
        return PerLoss(task=x**2, kd=jnp.sqrt(x * 0.0))

    _, grads = dot_optax.value_and_grads(fn)(jnp.float32(3.0))
    assert grads.task == 6.0
    assert jnp.isnan(grads.kd)


@pytest.mark.parametrize("varying", [False, True])
def test_in_shard_map(varying):
    """Gradients of a mean over the devices, in both ways that `shard_map` differentiates."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    spec = jax.sharding.PartitionSpec

    def step(params, x, y):
        if varying:
            params = jax.lax.pcast(params, "data", to="varying")
            return jax.lax.pmean(dot_optax.value_and_grads(loss_fn)(params, x, y), "data")

        def mean_losses(*args):
            return jax.lax.pmean(loss_fn(*args), "data")

        return dot_optax.value_and_grads(mean_losses)(params, x, y)

    sharded = jax.shard_map(step, mesh=mesh, in_specs=(spec(), spec("data"), spec("data")), out_specs=spec())
    result = jax.block_until_ready(jax.jit(sharded)(PARAMS, X, Y))
    chex.assert_trees_all_close(result, dot_optax.value_and_grads(loss_fn)(PARAMS, X, Y), rtol=1e-5, atol=1e-6)


def test_in_pmap():
    step = jax.pmap(
        lambda params, x, y: jax.lax.pmean(dot_optax.value_and_grads(loss_fn)(params, x, y), "data"),
        axis_name="data",
        in_axes=(None, 0, 0),
        out_axes=None,
        devices=jax.devices()[:2],
    )
    result = jax.block_until_ready(step(PARAMS, X.reshape(2, 8, 4), Y.reshape(2, 8)))
    chex.assert_trees_all_close(result, dot_optax.value_and_grads(loss_fn)(PARAMS, X, Y), rtol=1e-5, atol=1e-6)


def test_argnums_aux_and_keywords():
    def fn(a, b, *, scale):
        return {"kd": scale * a * b, "task": a**2}, {"sum": a + b}

    a, b = jnp.float32(3.0), jnp.float32(5.0)
    (values, aux), grads = dot_optax.value_and_grads(fn, has_aux=True)(a, b, scale=2.0)
    assert values == {"kd": 30.0, "task": 9.0} and aux == {"sum": 8.0} and grads == {"kd": 10.0, "task": 6.0}
    (_, _), grads = dot_optax.value_and_grads(fn, argnums=(0, 1), has_aux=True)(a, b, scale=2.0)
    assert grads == {"kd": (10.0, 6.0), "task": (6.0, 0.0)}
    (_, _), grads = dot_optax.value_and_grads(fn, argnums=-1, has_aux=True)(a, b, scale=2.0)
    assert grads == {"kd": 6.0, "task": 0.0}


def test_it_can_be_transformed_itself():
    """`vmap` over examples, a derivative of a gradient, and a training loop in `scan`."""

    def fn(w, x):
        return PerLoss(task=jnp.sum((w * x) ** 3), kd=jnp.sum(jnp.sin(w * x)))

    gradient = dot_optax.value_and_grads(fn)
    w, xs = jnp.arange(3.0), jnp.linspace(0.5, 1.5, 4)
    batched = jax.vmap(gradient, in_axes=(None, 0))(w, xs)
    chex.assert_trees_all_close(jax.tree.map(lambda v: v[2], batched), gradient(w, xs[2]), rtol=1e-6)

    second = jax.grad(lambda w: sum(g.sum() for g in gradient(w, 2.0)[1]))(w)
    # (2w)^3 and sin(2w) twice differentiated: 48 w - 4 sin(2w)
    np.testing.assert_allclose(second, 48 * w - 4 * jnp.sin(2 * w), rtol=1e-5)
    _, tangent = jax.jvp(lambda w: gradient(w, 2.0)[1].kd, (w,), (jnp.ones(3),))
    np.testing.assert_allclose(tangent, -4 * jnp.sin(2 * w), rtol=1e-5)

    def step(w, x):
        losses, grads = gradient(w, x)
        return w - 0.01 * (grads.task + grads.kd), losses

    scanned, _ = jax.lax.scan(step, w, xs)
    looped = w
    for x in xs:
        looped, _ = step(looped, x)
    np.testing.assert_allclose(scanned, looped, rtol=1e-6)


def test_complex_parameters_follow_jax_grad():
    def fn(z):
        return PerLoss(task=jnp.abs(z - 1j) ** 2, kd=(z**2).real)

    z = jnp.complex64(2.0 + 3.0j)
    _, grads = dot_optax.value_and_grads(fn)(z)
    for grad, expected in zip(grads, two_grads(fn, z), strict=True):
        np.testing.assert_allclose(grad, expected, rtol=1e-6)


def test_it_keeps_the_name_and_the_text_of_the_loss_function():
    def fn(w):
        """Two losses."""
        return PerLoss(w, w)

    gradient = dot_optax.value_and_grads(fn)
    assert (gradient.__name__, gradient.__doc__) == ("fn", "Two losses.")


def test_the_library_needs_no_flax():
    """Nor does it import it."""
    code = (
        "import sys, dot_optax\n"
        "assert 'flax' not in sys.modules\n"
        "values, grads = dot_optax.value_and_grads(lambda w: (w**2, 3 * w))(2.0)\n"
        "assert (float(grads[0]), float(grads[1])) == (4.0, 3.0)\n"
        "assert 'flax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
