"""Data parallelism with momenta that stay on their devices: one all-reduce for all losses together."""

from collections.abc import Hashable
from typing import Any

import jax
import optax


def average_over(axis_name: Hashable | tuple[Hashable, ...]) -> optax.GradientTransformationExtraArgs:
    r"""Averages the updates over the devices of an axis, in the place of averaging every loss's gradient.

    .. math::
        v_i^{(d)} \leftarrow g_i^{(d)} + \beta_i v_i^{(d)}, \qquad
        \theta \leftarrow \theta - \eta \, \frac{1}{D} \sum_{d=1}^{D} \sum_i v_i^{(d)}

    Momenta are linear in the gradients, so it makes no difference whether the gradients are averaged over the
    :math:`D` devices on their way in or the sum of the momenta on its way out. The first moves one tree for each loss,
    the second one tree: as much as plain distillation. Each device then has momenta :math:`v_i^{(d)}` of its own, whose
    mean is the momentum that a single device would have: that is what to save, and to give to every device when it is
    restored, to however many.

    Use it inside `jax.shard_map` or `jax.pmap`, in a chain after `dot`, `scale_by_dot` or `deepkd`, on gradients of the
    device's own loss. It does not serve what is not linear and comes before it: Adam, clipping, skipping steps.

    - In `shard_map` such gradients come from parameters that were made to vary with
      `jax.lax.pcast(params, axis_name, to='varying')`. Otherwise JAX adds up the gradients of all devices by itself, and
      the average of equal sums is :math:`D` times too large: that is refused. With `check_vma=False` JAX adds up nothing,
      and cannot tell.
    - The momenta differ between devices, so the state must be stacked along a mapped axis: in `pmap`
      `in_axes=(None, 0, ...)` and `out_axes=(None, 0)` for parameters and state. With `out_axes=None` for the state it
      looks replicated, but each device keeps its own: a trip through the host then keeps those of the first device and
      gives them to all.

    Args:
        axis_name: the name of the axis, or a tuple of names, as for `jax.lax.pmean`.

    Returns:
        A transformation from a tree of updates to a tree of updates, without state.

    Raises:
        NameError: by `update`, where there is no axis of this name.
        ValueError: by `update`, where an update does not vary over the axis.

    Example:
        >>> import functools, jax, jax.numpy as jnp, numpy as np, dot_optax, optax
        >>> from jax.sharding import PartitionSpec as P
        >>> mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), 'data')
        >>> optimizer = optax.chain(dot_optax.dot(0.1), dot_optax.average_over('data'))
        >>> def loss_fn(w, x):
        ...     return dot_optax.PerLoss(task=jnp.mean(w * x), kd=jnp.mean(w * x))
        >>> @jax.jit
        ... @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P('data'), P('data')), out_specs=(P(), P('data')))
        ... def step(w, state, x):
        ...     state = jax.tree.map(lambda leaf: leaf[0], state)  # this device's
        ...     mine = jax.lax.pcast(w, 'data', to='varying')
        ...     _, grads = dot_optax.value_and_grads(loss_fn)(mine, x)
        ...     updates, state = optimizer.update(grads, state, mine)
        ...     return optax.apply_updates(w, updates), jax.tree.map(lambda leaf: leaf[None], state)
        >>> w = jnp.zeros(())
        >>> state = jax.tree.map(lambda leaf: jnp.stack([leaf] * mesh.size), optimizer.init(w))
        >>> w, state = step(w, state, jnp.ones(4))
        >>> print(w)
        -0.2

    References:
        Ours; `tests/test_parallel.py` compares it with averaged gradients, and the bytes that each moves.
    """

    def average(updates: Any, params: Any) -> Any:
        varies = _varying_axes(jax.lax.axis_index(axis_name))
        for path, leaf in jax.tree.leaves_with_path(updates):
            if not varies <= _varying_axes(leaf):
                found = f"the update{jax.tree_util.keystr(path)} is the same on all devices"
                hint = (
                    f"take the gradients at jax.lax.pcast(params, {axis_name!r}, to='varying'), else JAX adds them up"
                )
                raise ValueError(f"average_over({axis_name!r}): {found}: {hint}")
        return jax.lax.pmean(updates, axis_name)

    return optax.with_extra_args_support(optax.stateless(average))


def _varying_axes(x: Any) -> frozenset[Any]:
    """The mapped axes over which an array varies, as `shard_map` knows it; none in `pmap` and with `check_vma=False`."""
    return jax.typeof(x).manual_axis_type.varying
