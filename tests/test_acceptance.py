"""What every optimizer here must do; a new one joins by one line in `OPTIMIZERS`."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from absl.testing import parameterized

import dot_optax
from dot_optax import PerLoss, weightings
from tests.tiers import slow_but

SHAPES = {"w": (2, 3), "b": (3,), "scale": ()}
PARAMS = {k: 1.0 + jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape) / 7 for k, shape in SHAPES.items()}


# XLA may fuse a product into a sum, which saves one float32 rounding of numbers of order ten.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


class Entry(NamedTuple):
    make: Callable[..., optax.GradientTransformationExtraArgs]  # (learning_rate, **hyperparameters)
    losses: tuple[str, ...] = PerLoss._fields
    hyperparameters: tuple[str, ...] = ("beta_task", "beta_kd")  # those that may be scheduled
    accumulator_dtype: str = "accumulator_dtype"  # what the dtype of the momenta is called

    def grads(self, params, seed=0, dtype=None):
        keys = jax.random.split(jax.random.key(seed), len(self.losses))
        grads = (optax.tree.random_like(key, params, dtype=dtype) for key in keys)
        return self.container(*grads)

    def container(self, *trees):
        return PerLoss(*trees) if self.losses == PerLoss._fields else dict(zip(self.losses, trees, strict=True))


def buffers(state, kinds=("trace", "mu", "nu")):
    """The trees of buffers in a state."""
    found = [(kind, tree) for kind in kinds for _, tree in optax.tree.get_all_with_path(state, kind)]
    assert found
    of_losses = lambda container: container.values() if isinstance(container, dict) else container  # noqa: E731
    return [entry for kind, tree in found for entry in (of_losses(tree) if kind == "mu" else [tree])]


def every_other(tree):
    """A mask: True and False in turn."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([i % 2 == 0 for i in range(len(leaves))])


def three_losses(learning_rate, beta_task=0.8, beta_kd=0.95, accumulator_dtype=None):
    def trace(beta):
        return optax.trace(beta, accumulator_dtype=accumulator_dtype)

    return optax.chain(
        dot_optax.per_loss({"ce": trace(beta_task), "hint": trace(0.9), "kd": trace(beta_kd)}),
        dot_optax.sum_losses(),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_momenta(learning_rate, beta_task=0.8, beta_kd=0.95, accumulator_dtype=None):
    betas = {"ce": beta_task, "hint": 0.9, "kd": beta_kd}
    momenta = dot_optax.scale_by_momenta(betas, accumulator_dtype=accumulator_dtype)
    return optax.chain(momenta, optax.scale_by_learning_rate(learning_rate))


def three_losses_adam(learning_rate, beta_task=0.8, beta_kd=0.95, mu_dtype=None):
    betas = {"ce": beta_task, "hint": 0.9, "kd": beta_kd}
    adam = dot_optax.scale_by_adam_momenta(betas, mu_dtype=mu_dtype)
    return optax.chain(adam, optax.scale_by_learning_rate(learning_rate))


def scale_by_dot(learning_rate, beta_task=0.825, beta_kd=0.975, accumulator_dtype=None):
    momenta = dot_optax.scale_by_dot(beta_task, beta_kd, accumulator_dtype=accumulator_dtype)
    return optax.chain(momenta, optax.scale_by_learning_rate(learning_rate))


def aggregated(weighting, factor=1.0, **options):
    def make(learning_rate, accumulator_dtype=None):
        return optax.chain(
            dot_optax.aggregate(weighting, **options),
            optax.trace(0.9, accumulator_dtype=accumulator_dtype),
            optax.scale(factor),
            optax.scale_by_learning_rate(learning_rate),
        )

    return make


OPTIMIZERS = {
    "dot": Entry(dot_optax.dot),
    "dot, L2, Nesterov": Entry(functools.partial(dot_optax.dot, weight_decay=1e-4, nesterov=True)),
    "dot, reached": Entry(functools.partial(dot_optax.dot, reached=PerLoss(True, every_other))),
    "scale_by_dot": Entry(scale_by_dot),
    "gain_matched_sgd": Entry(dot_optax.gain_matched_sgd, hyperparameters=()),
    "three losses": Entry(three_losses, losses=("ce", "hint", "kd"), hyperparameters=()),
    "scale_by_momenta": Entry(scale_by_momenta, losses=("ce", "hint", "kd")),
    "deepkd": Entry(
        dot_optax.deepkd,
        losses=dot_optax.DeepKDLosses._fields,
        hyperparameters=("beta_task", "beta_target", "beta_non_target"),
    ),
    "dot_adamw": Entry(dot_optax.dot_adamw, accumulator_dtype="mu_dtype"),
    "dot_adamw, Nesterov, reached": Entry(
        functools.partial(
            dot_optax.dot_adamw, nesterov=True, normalize=True, weight_decay=0.0, reached=PerLoss(True, every_other)
        ),
        accumulator_dtype="mu_dtype",
    ),
    "projected": Entry(aggregated(weightings.projected()), hyperparameters=()),
    # Its weights sum to 1, not to 2, so that it takes steps half as long.
    "min_norm": Entry(aggregated(weightings.min_norm(), 2.0), hyperparameters=()),
    "three losses, projected by leaf": Entry(
        aggregated(weightings.projected(), losses=("ce", "hint", "kd"), groups="leaf"),
        losses=("ce", "hint", "kd"),
        hyperparameters=(),
    ),
    "three losses, Adam": Entry(three_losses_adam, losses=("ce", "hint", "kd"), accumulator_dtype="mu_dtype"),
}


def optimizers(quick):
    """All of them; those that are not among the `quick` are marked as slow."""
    marks = {name: () if name in quick else pytest.mark.slow for name in OPTIMIZERS}
    return [pytest.param(entry, id=name, marks=marks[name]) for name, entry in OPTIMIZERS.items()]


# One of each kind; the others take as long again.
QUICK = ("dot, L2, Nesterov", "scale_by_momenta", "dot_adamw", "projected")
for_every_optimizer = pytest.mark.parametrize("entry", optimizers(QUICK))
# For tests that compile for seconds.
for_every_optimizer_one_quick = pytest.mark.parametrize("entry", optimizers(QUICK[:1]))


def steps(tx, entry, params, count=3, update=None):
    """The updates and the state after `count` steps."""
    state, update = tx.init(params), update or tx.update
    for seed in range(count):
        updates, state = update(entry.grads(params, seed), state, params)
        params = optax.apply_updates(params, updates)
    return updates, state


class VariantTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True, with_pmap=True)
    @parameterized.named_parameters((name.replace(" ", "_").replace(",", ""), name) for name in QUICK)
    def test_compiled_or_not_it_is_the_same(self, name):
        entry = OPTIMIZERS[name]
        tx = entry.make(0.1)
        expected, expected_state = steps(tx, entry, PARAMS)
        state, params = tx.init(PARAMS), PARAMS
        update = self.variant(tx.update)
        for seed in range(3):
            updates, state = jax.block_until_ready(update(entry.grads(PARAMS, seed), state, params))
            params = optax.apply_updates(params, updates)
        chex.assert_trees_all_close((updates, state), (expected, expected_state), **ROUNDING)


@for_every_optimizer
def test_it_tolerates_an_unexpected_keyword(entry):
    tx = entry.make(0.1)
    expected, _ = tx.update(entry.grads(PARAMS), tx.init(PARAMS), PARAMS)
    updates, _ = jax.jit(tx.update)(entry.grads(PARAMS), tx.init(PARAMS), PARAMS, unexpected=jnp.ones(2))
    chex.assert_trees_all_close(updates, expected, **ROUNDING)


@for_every_optimizer
def test_it_compiles_once(entry):
    tx = entry.make(0.1)
    update = jax.jit(tx.update)
    steps(tx, entry, PARAMS, update=update)
    assert update._cache_size() == 1


@for_every_optimizer
def test_map_params_finds_the_buffers(entry):
    tx = entry.make(0.1)
    _, state = steps(tx, entry, PARAMS)
    unchanged = optax.tree.map_params(tx, lambda v: v, state)
    chex.assert_trees_all_equal(unchanged, state)
    marked = optax.tree.map_params(tx, lambda v: "buffer", state, transform_non_params=lambda v: "other")
    buffers = [leaf for leaf in jax.tree.leaves(marked) if leaf == "buffer"]
    assert len(buffers) == len(
        [x for x in jax.tree.leaves(state) if x.shape in SHAPES.values() and x.dtype == jnp.float32]
    )
    assert buffers


def parabola(params):
    return sum(jnp.sum(jnp.abs(p - target) ** 2) for p, target in zip(params, TARGET, strict=True))


def rosenbrock(params):
    x, y = params
    return (1.0 - x) ** 2 + 100.0 * (y - x**2) ** 2


TARGET = (jnp.float32(1.0), jnp.array([-2.0, 0.5]), jnp.array([[1.0, 2.0]]))
COMPLEX_TARGET = tuple(t * (1.0 + 2.0j) for t in TARGET)


@for_every_optimizer
@pytest.mark.parametrize(
    ("objective", "start", "end", "learning_rate"),
    [
        (parabola, tuple(map(jnp.zeros_like, TARGET)), TARGET, 0.002),
        (rosenbrock, (jnp.float32(0.0), jnp.float32(0.0)), (jnp.float32(1.0), jnp.float32(1.0)), 1e-4),
        (
            lambda params: sum(jnp.sum(jnp.abs(p - t) ** 2) for p, t in zip(params, COMPLEX_TARGET, strict=True)),
            tuple(map(jnp.zeros_like, COMPLEX_TARGET)),
            COMPLEX_TARGET,
            0.002,
        ),
    ],
    ids=["parabola", "rosenbrock", "complex parabola"],
)
def test_it_converges(entry, objective, start, end, learning_rate):
    tx = entry.make(learning_rate)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            n = len(entry.losses)
            _, grads = dot_optax.value_and_grads(lambda p: entry.container(*(objective(p) / n for _ in range(n))))(
                params
            )
            grads = jax.tree.map(jnp.conj, grads)  # the caller's part, as everywhere in JAX and Optax
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=20_000)[0][0]

    # An L2 penalty of 1e-4 moves the minimum of a parabola by 1e-4 / 2 of its size, and Rosenbrock's by less than 1%.
    chex.assert_trees_all_close(train(start), end, rtol=1e-2)


@for_every_optimizer
def test_inject_hyperparams_gives_the_same_numbers(entry):
    values = {"learning_rate": 0.1} | dict(zip(entry.hyperparameters, (0.8, 0.9, 0.7), strict=False))
    plain, _ = steps(entry.make(**values), entry, PARAMS)
    for wrap in (lambda value: value, optax.constant_schedule):
        tx = optax.inject_hyperparams(entry.make)(**{name: wrap(value) for name, value in values.items()})
        updates, state = steps(tx, entry, PARAMS, update=jax.jit(tx.update))
        chex.assert_trees_all_close(updates, plain, **ROUNDING)
        assert float(state.hyperparams["learning_rate"]) == np.float32(0.1)


@for_every_optimizer
@pytest.mark.parametrize("dtype", slow_but([jnp.bfloat16, jnp.float16, jnp.float32], jnp.bfloat16, jnp.float32))
@pytest.mark.parametrize("scheduled", [False, True])
def test_updates_have_the_dtype_of_the_parameters(entry, dtype, scheduled):
    params = optax.tree.cast(PARAMS, dtype)
    schedules = {name: optax.linear_schedule(0.8, 0.9, 3) for name in entry.hyperparameters} if scheduled else {}
    tx = entry.make(optax.linear_schedule(0.1, 0.0, 10) if scheduled else 0.1, **schedules)
    updates, state = steps(tx, entry, params, update=jax.jit(tx.update))
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(params), state)


@for_every_optimizer
def test_gradient_accumulation(entry):
    k, tx = 3, entry.make(0.1)
    accumulating = dot_optax.wrap(functools.partial(optax.MultiSteps, every_k_schedule=k), tx, losses=entry.losses)
    state, update = accumulating.init(PARAMS), jax.jit(accumulating.update)
    grads = [entry.grads(PARAMS, seed) for seed in range(k)]
    for i, g in enumerate(grads):
        updates, state = update(g, state, PARAMS)
        if i < k - 1:
            assert not any(u.any() for u in jax.tree.leaves(updates))
    full_batch = jax.tree.map(lambda *g: sum(g) / k, *grads)
    expected, _ = tx.update(full_batch, tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(updates, expected, **ROUNDING)


@for_every_optimizer_one_quick
def test_old_and_new_state_can_be_mixed(entry):
    tx = entry.make(optax.linear_schedule(0.1, 0.0, 10))

    @jax.jit
    def maybe(condition, state, grads):
        _, new_state = tx.update(grads, state, PARAMS)
        return jax.lax.cond(condition, lambda: state, lambda: new_state)

    state, grads = tx.init(PARAMS), entry.grads(PARAMS)
    chex.assert_trees_all_equal(maybe(True, state, grads), state)
    chex.assert_trees_all_close(maybe(False, state, grads), tx.update(grads, state, PARAMS)[1], **ROUNDING)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))


@for_every_optimizer
def test_a_constant_schedule_is_the_number(entry):
    betas = {name: 0.8 for name in entry.hyperparameters}
    schedules = {name: optax.constant_schedule(value) for name, value in betas.items()}
    updates, _ = steps(entry.make(optax.constant_schedule(0.1), **schedules), entry, PARAMS)
    expected, _ = steps(entry.make(0.1, **betas), entry, PARAMS)
    chex.assert_trees_all_close(updates, expected, **ROUNDING)


@for_every_optimizer
def test_accumulator_dtype(entry):
    params = optax.tree.cast(PARAMS, jnp.bfloat16)
    tx = entry.make(0.1, **{entry.accumulator_dtype: jnp.bfloat16})
    for state in (tx.init(params), steps(tx, entry, params)[1]):
        momenta = buffers(state, ("trace", "mu"))
        assert {leaf.dtype for leaf in jax.tree.leaves(momenta)} == {jnp.dtype(jnp.bfloat16)}


@for_every_optimizer
def test_init_takes_abstract_parameters(entry):
    tx = entry.make(0.1)
    abstract = tx.init(jax.eval_shape(lambda: PARAMS))
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, tx.init(PARAMS))


@for_every_optimizer
def test_the_state_is_sharded_like_the_parameters(entry):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    assert mesh.size == 8
    spec = jax.sharding.PartitionSpec
    shardings = {"w": spec(None, "data"), "b": spec("data"), "scale": spec()}
    shardings = {k: jax.sharding.NamedSharding(mesh, s) for k, s in shardings.items()}
    params = jax.device_put({"w": jnp.ones((3, 8)), "b": jnp.ones(16), "scale": jnp.ones(())}, shardings)
    tx = entry.make(0.1)
    grads = entry.container(*[params] * len(entry.losses))
    state = jax.jit(tx.init)(params)
    updates, state = jax.block_until_ready(jax.jit(tx.update)(grads, state, params))
    for tree in [updates, *buffers(state)]:
        for name, leaf in tree.items():
            if not isinstance(leaf, optax.MaskedNode):
                assert leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim), name
                assert leaf.dtype == params[name].dtype


@for_every_optimizer
def test_explicit_shardings_stay(entry):
    """On a mesh with explicit axes, JAX's default, types say where arrays are: in `init`, in `update`, after the step."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    spec = jax.sharding.PartitionSpec
    specs = {"w": spec("data", "model"), "b": spec("model"), "scale": spec()}
    with jax.set_mesh(mesh):
        shapes = {"w": (4, 8), "b": (16,), "scale": ()}
        params = {k: jnp.ones(shape, jnp.float32, out_sharding=specs[k]) for k, shape in shapes.items()}
        tx = entry.make(optax.linear_schedule(0.1, 0.0, 10))
        grads = entry.container(*[params] * len(entry.losses))
        state = jax.jit(tx.init)(params)

        @jax.jit
        def step(params, state):
            updates, state = tx.update(grads, state, params)
            for name, u in updates.items():
                assert jax.typeof(u) == jax.typeof(params[name])
            return optax.apply_updates(params, updates), state

        new_params, new_state = jax.block_until_ready(step(params, state))
    chex.assert_trees_all_equal_shapes_and_dtypes((new_params, new_state), (params, state))
    for tree in [new_params, *buffers(state), *buffers(new_state)]:
        for name, leaf in tree.items():
            if not isinstance(leaf, optax.MaskedNode):
                assert leaf.sharding.spec == params[name].sharding.spec, name


@for_every_optimizer
@pytest.mark.parametrize("scheduled", [False, True])
def test_mixed_precision_leaves_keep_their_dtypes(entry, scheduled):
    with jax.enable_x64(True):
        params = {"single": jnp.ones(2, jnp.float32), "double": jnp.ones(3, jnp.float64)}
        rate = optax.linear_schedule(0.1, 0.0, 10) if scheduled else 0.1
        tx = entry.make(
            rate, **({name: lambda count: jnp.float64(0.8) for name in entry.hyperparameters} if scheduled else {})
        )
        updates, state = steps(tx, entry, params, update=jax.jit(tx.update))
        for tree in [updates, *buffers(state)]:
            for name, leaf in tree.items():
                assert isinstance(leaf, optax.MaskedNode) or leaf.dtype == params[name].dtype


@for_every_optimizer
@pytest.mark.parametrize(
    "params",
    [
        {},
        (),
        {"w": None, "b": jnp.ones(2)},
        (jnp.ones(3), jnp.ones(3)),
        [jnp.ones(1)],
        jnp.ones(2),
        {"deep": {"er": jnp.ones(1)}},
    ],
    ids=["empty dict", "empty tuple", "None leaf", "2-tuple", "list", "array", "nested"],
)
def test_every_kind_of_tree(entry, params):
    updates, _ = steps(entry.make(0.1), entry, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert all(u.any() for u in jax.tree.leaves(updates))


@for_every_optimizer_one_quick
def test_vmap_over_seeds_and_over_learning_rates(entry):
    rates = jnp.array([0.1, 0.2])

    @jax.jit
    def run(seed, rate):
        params = jax.tree.map(lambda p: p * (1.0 + seed), PARAMS)
        return steps(entry.make(rate), entry, params)[0]

    batched = jax.vmap(lambda seed: jax.vmap(lambda rate: run(seed, rate))(rates))(jnp.arange(2.0))
    for i in range(2):
        for j in range(2):
            one = jax.tree.map(lambda x, i=i, j=j: x[i, j], batched)
            chex.assert_trees_all_close(one, run(float(i), rates[j]), **ROUNDING)


@for_every_optimizer_one_quick
def test_scan_over_steps_with_donated_state(entry):
    tx = entry.make(0.1)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train(params, state, all_grads):
        def step(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), updates

        (params, state), updates = jax.lax.scan(step, (params, state), all_grads)
        return params, state, jax.tree.map(lambda u: u[-1], updates)

    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    donated = jax.tree.leaves((params, state))
    all_grads = jax.tree.map(lambda *g: jnp.stack(g), *(entry.grads(PARAMS, seed) for seed in range(3)))
    _, new_state, updates = jax.block_until_ready(train(params, state, all_grads))
    assert all(x.is_deleted() for x in donated)
    expected, expected_state = steps(tx, entry, PARAMS)
    chex.assert_trees_all_close((updates, new_state), (expected, expected_state), **ROUNDING)


@for_every_optimizer_one_quick
def test_orbax_saves_and_restores_bit_for_bit(entry, tmp_path):
    tx = entry.make(optax.linear_schedule(0.1, 0.0, 10))
    update = jax.jit(tx.update)
    _, state = steps(tx, entry, PARAMS, update=update)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", tx.init(PARAMS))
    chex.assert_trees_all_equal(restored, state)
    grads = entry.grads(PARAMS, 9)
    chex.assert_trees_all_equal(update(grads, restored, PARAMS), update(grads, state, PARAMS))
