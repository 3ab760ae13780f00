"""How devices share the work of a training step: three forms of data parallelism, all over an axis `data`.

    jit         the compiler divides a program that is written for the whole batch; parameters may be sharded, also by
                the rules of a network over a second axis, `model`, whose devices have the same part of the batch
    pmap        each device runs a program for its part of the batch, and the gradients of each loss are averaged
    shard_map   the same, but momenta stay on their devices and the update alone is averaged: one tree, not one per loss

In all of them BatchNorm's statistics are those of the whole batch, and a checkpoint holds one state, as one device would
have it: a run can go on in another form or on another number of devices.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

import dot_optax
from examples.trainer.errors import UserError
from examples.trainer.sampling import Gradients

AXIS = "data"
MODEL_AXIS = "model"

# Smaller arrays are replicated even where parameters are sharded: they would save little, and be gathered in every step.
_SMALLEST_SHARDED = 2**14


Spec = Callable[[jax.tree_util.KeyPath, Any], P]  # of an array of a state, by its place in there


class Layout(NamedTuple):
    """Where arrays live, how a step is compiled, and what is averaged in it. A state is a `step.TrainState`."""

    mesh: jax.sharding.Mesh
    shardings: Callable[[Any], Any]  # of a state, or of parts of it, as one device has it: where its arrays live
    place: Callable[[Any], Any]  # a state as one device has it, and as checkpoints hold it -> as a step takes it
    gather: Callable[[Any], Any]  # ... and back
    put_batch: Callable[[Any], Any]  # NumPy arrays, this host's part of a batch -> as a step takes them
    compile: Callable[[Callable[..., Any]], Callable[..., Any]]  # step(state, constants, batch) -> (state, metrics)
    # (losses and gradients of the device's part, whether each loss is due) -> those that the optimizer takes
    value_and_grads: Callable[[Gradients, dict[str, Any]], Gradients]
    average_updates: optax.GradientTransformation  # the last link of the optimizer's chain, without a state
    axis_name: str | None  # of the devices, in a step that sees its device's part of a batch only

    def average_metrics(self, metrics: Any) -> Any:
        """The means over all devices, inside a step."""
        return metrics if self.axis_name is None else jax.lax.pmean(metrics, self.axis_name)


def make_layout(config: ConfigDict, rules: Callable[[jax.sharding.Mesh], Spec] | None = None) -> Layout:
    """Returns the layout that a config asks for, on all devices of all hosts or on the first `config.devices`.

    With `rules` for its parameters a network may be divided among `config.model_devices`: these share a part of the batch.
    """
    devices = jax.devices()[: config.devices or None]
    if len(devices) < config.devices:
        raise UserError(f"bad --config.devices={config.devices}: there are {len(devices)}")
    if len(devices) < jax.device_count() and jax.process_count() > 1:
        raise UserError(f"bad --config.devices={config.devices}: several hosts use all of their devices")
    of_model = config.model_devices if rules else 1
    if len(devices) % of_model:
        raise UserError(
            f"bad --config.model_devices={of_model}: it must divide the {len(devices)} devices; or use fewer with"
            " --config.devices"
        )
    parts = len(devices) // of_model
    if config.batch_size % parts:
        each = "devices" if of_model == 1 else f"groups of {of_model} devices"
        raise UserError(
            f"bad --config.batch_size={config.batch_size}: it must be a multiple of the {parts} {each}; or use fewer with"
            " --config.devices"
        )
    if config.parallel == "jit":
        if rules is None:
            return jit_layout(jax.sharding.Mesh(np.array(devices), (AXIS,)), shard_params=config.shard_params)
        # An axis may take a part of one of the torus's, as 4 of the 16 of a pod.
        grid = mesh_utils.create_device_mesh((parts, of_model), devices, allow_split_physical_axes=True)
        mesh = jax.sharding.Mesh(grid, (AXIS, MODEL_AXIS))
        return jit_layout(mesh, spec=rules(mesh))
    if of_model > 1:
        raise UserError(f"--config.model_devices={of_model} needs --config.parallel=jit, not {config.parallel}")
    if rules is None and config.shard_params:
        raise UserError(f"--config.shard_params=True needs --config.parallel=jit, not {config.parallel}")
    mesh = jax.sharding.Mesh(np.array(devices), (AXIS,))
    return {"pmap": pmap_layout, "shard_map": shard_map_layout}[config.parallel](mesh)


def host_part(mesh: jax.sharding.Mesh) -> grain.sharding.ShardOptions:
    """Which part of a batch this host reads. Where an axis `model` spans hosts, several of them read the same."""
    rows = mesh.devices.reshape(mesh.shape[AXIS], -1)
    here = [i for i, row in enumerate(rows) if any(device.process_index == jax.process_index() for device in row)]
    index, behind = divmod(here[0], len(here))
    if behind or here != list(range(here[0], here[0] + len(here))) or len(rows) % len(here):
        raise UserError(
            f"the devices of this host have the parts {here} of a batch, which are no equal share of {len(rows)} parts: give"
            " another --config.model_devices"
        )
    return grain.sharding.ShardOptions(shard_index=index, shard_count=len(rows) // len(here))


def replicate(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Puts the same arrays on every device."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


def _replicated(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    return jax.tree.map(lambda _: NamedSharding(mesh, P()), tree)


def divide(mesh: jax.sharding.Mesh, batch: Any) -> Any:
    """Divides a batch, of which each host has its part, among the devices."""
    sharding = NamedSharding(mesh, P(AXIS))
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch)


def state_sharding(mesh: jax.sharding.Mesh, leaf: Any, *, divided: bool) -> NamedSharding:
    """Where an array of a state lives with `jit`: on every device, or in parts if it is large and to be `divided`."""
    spec = [None] * np.ndim(leaf)
    divisible = [axis for axis, length in enumerate(np.shape(leaf)) if length % mesh.size == 0]
    if divided and divisible and np.size(leaf) >= _SMALLEST_SHARDED:
        spec[max(divisible, key=lambda axis: np.shape(leaf)[axis])] = AXIS
    return NamedSharding(mesh, P(*spec))


def jit_layout(mesh: jax.sharding.Mesh, *, shard_params: bool = False, spec: Spec | None = None) -> Layout:
    """One program for the whole batch.

    With `shard_params`, large parameters and momenta are divided among the devices; with a `spec`, as it says of each.
    """

    def sharding(path: jax.tree_util.KeyPath, leaf: Any) -> NamedSharding:
        # What is not trained is small, or looked up at random, as the memory of CRD is.
        if path and getattr(path[0], "name", "") == "rest":
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, spec(path, leaf)) if spec else state_sharding(mesh, leaf, divided=shard_params)

    def shardings(tree: Any) -> Any:
        return jax.tree.map_with_path(sharding, tree)

    def place(state: Any) -> Any:
        return jax.device_put(state, shardings(state))

    def compile(step: Callable[..., Any]) -> Callable[..., Any]:
        def placed(*args: Any) -> Any:
            state, metrics = step(*args)
            return jax.lax.with_sharding_constraint(state, shardings(state)), metrics

        return jax.jit(placed, donate_argnums=0)

    return Layout(
        mesh,
        shardings,
        place=place,
        gather=lambda state: state,
        put_batch=functools.partial(divide, mesh),
        compile=compile,
        value_and_grads=lambda gradients, due: gradients,
        average_updates=optax.identity(),
        axis_name=None,
    )


def pmap_layout(mesh: jax.sharding.Mesh) -> Layout:
    """One program for each device and its part of the batch; the gradients are averaged, each loss's for itself.

    On several hosts pmap takes and returns arrays of this host alone.
    """
    several_hosts = jax.process_count() > 1

    def compile(step: Callable[..., Any]) -> Callable[..., Any]:
        in_axes, devices = (None, None, 0), None if several_hosts else list(mesh.devices.flat)
        return jax.pmap(step, AXIS, in_axes=in_axes, out_axes=None, devices=devices, donate_argnums=0)

    def put_batch(batch: Any) -> Any:
        batch = jax.tree.map(lambda leaf: leaf.reshape(len(mesh.local_devices), -1, *leaf.shape[1:]), batch)
        return batch if several_hosts else divide(mesh, batch)

    def gather(state: Any) -> Any:
        return multihost_utils.host_local_array_to_global_array(state, mesh, P()) if several_hosts else state

    def mean(grad: Any) -> Any:
        return jax.lax.pmean(grad, AXIS)

    def value_and_grads(gradients: Gradients, due: dict[str, Any]) -> Gradients:
        def averaged(params: Any, batch: Any) -> tuple[Any, Any]:
            values, grads = gradients(params, batch)
            # One that is not due is zeros everywhere, and stays where it is.
            return values, {
                name: jax.lax.cond(due[name], mean, lambda g: g, grad) if name in due else mean(grad)
                for name, grad in grads.items()
            }

        return averaged

    return Layout(
        mesh,
        functools.partial(_replicated, mesh),
        place=functools.partial(replicate, mesh),
        gather=gather,
        put_batch=put_batch,
        compile=compile,
        value_and_grads=value_and_grads,
        average_updates=optax.identity(),
        axis_name=AXIS,
    )


def shard_map_layout(mesh: jax.sharding.Mesh) -> Layout:
    """One program for each device and its part of the batch, with momenta of its own: `dot_optax.average_over`.

    The devices' optimizer states are stacked along a new first axis; their mean is the state that one device would have.
    """

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, P(AXIS)))
    def stack(opt_state: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (mesh.size, *leaf.shape)), opt_state)

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    def mean(opt_state: Any) -> Any:
        def one(leaf: jax.Array) -> jax.Array:  # Whole numbers count steps, and are the same everywhere.
            return leaf.mean(axis=0) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf[0]

        return jax.tree.map(one, opt_state)

    def compile(step: Callable[..., Any]) -> Callable[..., Any]:
        def local(state: Any, *args: Any) -> Any:
            opt_state = jax.tree.map(lambda leaf: leaf[0], state.opt_state)
            state, metrics = step(state._replace(opt_state=opt_state), *args)
            return state._replace(opt_state=jax.tree.map(lambda leaf: leaf[None], state.opt_state)), metrics

        def run(state: Any, *args: Any) -> Any:
            specs = jax.tree.map(lambda _: P(), state)
            specs = specs._replace(opt_state=jax.tree.map(lambda _: P(AXIS), state.opt_state))
            program = jax.shard_map(local, mesh=mesh, in_specs=(specs, P(), P(AXIS)), out_specs=(specs, P()))
            return program(state, *args)

        return jax.jit(run, donate_argnums=0)

    def place(state: Any) -> Any:
        state = replicate(mesh, state)
        return state._replace(opt_state=stack(state.opt_state))

    def value_and_grads(gradients: Gradients, due: dict[str, Any]) -> Gradients:
        # Of parameters that are the same on all devices JAX would add up the devices' gradients.
        return lambda params, batch: gradients(jax.lax.pcast(params, AXIS, to="varying"), batch)

    return Layout(
        mesh,
        functools.partial(_replicated, mesh),
        place=place,
        gather=lambda state: state._replace(opt_state=mean(state.opt_state)),
        put_batch=functools.partial(divide, mesh),
        compile=compile,
        value_and_grads=value_and_grads,
        average_updates=dot_optax.average_over(AXIS),
        axis_name=AXIS,
    )
