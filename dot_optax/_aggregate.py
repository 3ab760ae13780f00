"""One update from the gradients of all losses, with weights that follow from the angles between them."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dot_optax._checks import _check_trainable, _describe
from dot_optax._containers import LossNames, PerLoss
from dot_optax._momenta import _in_the_dtypes_of_params, _widest
from dot_optax._reach import _names, _reads
from dot_optax.weightings import Weighting, _norms_and_cosines

# Which parameters share weights: a name below, or a function from a parameter's path to what names its group.
Groups = str | Callable[[tuple[Any, ...]], Hashable]
GROUPS: dict[Any, Any] = {
    "all": lambda path: (),
    # The last level of a Flax NNX state is the array in an `nnx.Param`.
    "layer": lambda path: path[:-2] if path[-1:] == ("value",) else path[:-1],
    "leaf": lambda path: path,
}


class AggregateState(NamedTuple):
    """The state of `aggregate`, for each of K groups of parameters, with N losses; all of the last update.

    Attributes:
        weights: `[K, N]`, the weight of each loss; ones before the first update.
        gram: `[K, N, N]`, the inner products of the gradients.
        cosines: `[K, N, N]`, the cosines of the angles between them.
        weighting: the state of the weighting, with a leading axis K.
    """

    weights: Any
    gram: Any
    cosines: Any
    weighting: Any


def aggregate(
    weighting: Weighting, *, losses: int | Sequence[str] = PerLoss._fields, groups: Groups = "all", reached: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""A weighted sum of the gradients, with weights that follow from their norms and the angles between them.

    .. math::
        d = \sum_i w_i g_i, \qquad w = \mathrm{weighting}(G), \qquad G_{ij} = \langle g_i, g_j \rangle

    What it replaces is `sum_losses`. Momenta go before it, one for each loss, or behind it, one for the update. The
    inner products are taken over the parameters that more than one loss reaches. A parameter that one loss alone
    reaches takes its gradient as it is, with the weight 1; one that no loss reaches has a zero update.

    Before you reach for it: Xin et al. and Kurin et al. found that such methods do not beat the sum of the losses with
    well-tuned fixed weights, which costs one backward pass less. Compare with that.

    It is not linear in the gradients, so on many devices it must see the averages of all N of them, not each device its
    own. In `jax.shard_map` and `jax.pmap` put `average_over` before it, as in `chain(per_loss(...),
    average_over('data'), aggregate(...))`: N trees are averaged. Behind `aggregate` it would be wrong, unlike behind
    `scale_by_dot`. Under `jax.jit` with sharded arrays nothing is to be done. `wrap` of `optax.MultiSteps` accumulates
    the gradient of each loss, and is exact; of the `losses` that `min_norm(log=True)` reads it passes on those of the
    last micro-batch alone: give it their means over all.

    Args:
        weighting: one of `dot_optax.weightings`, such as `projected()`, or your own.
        losses: the names of the losses in order, or their number for an unnamed tuple of losses.
        groups: which parameters share weights: "all"; "layer", those with the same parent in the tree, such as a kernel
            and its bias; "leaf", each parameter for itself; or a function from the path of a parameter, a tuple of keys
            such as `('body', 0, 'kernel')`, to what names its group.
        reached: which loss reaches which parameter, as for `dot`: a container with one mask per loss, which the
            function `reached` computes. By default every loss reaches every parameter. A gradient where its loss is
            said not to reach is not read.

    Returns:
        A transformation from a container with one gradient tree per loss to one update tree with the dtypes of
        `params`. Its state is an `AggregateState`: `optax.tree.get(state, 'weights')` and `optax.tree.get(state,
        'cosines')` have one row for each group, in the order in which their first shared parameters come. The inner
        products, the weights and the update are computed in float32, or in float64 where a parameter is; no matrix
        product of gradients is taken, so they are exact on TPUs, too, and each parameter may be sharded in its own way.
        Where a square overflows, as of norms above 1e19 in float32, or a gradient is not finite, weights and update are
        NaN, for `optax.apply_if_finite` in `wrap`. For complex gradients the real part of the inner product counts.
        `update` takes the values of the losses by the keyword `losses`, in a container like that of the gradients, for
        weightings that need them.

    Raises:
        TypeError: if `weighting` is not a `Weighting`; from `init` if a leaf of the parameters cannot be trained; from
            `update` if the updates are not a container.
        ValueError: if `losses` or `groups` is none of these, or `reached` does not fit the parameters; from `update` as
            `per_loss`, and if the weighting needs the values of the losses and they are missing.

    Example:
        DOT's momenta, then PCGrad: what one momentum has against the other is taken from it.

        >>> import jax.numpy as jnp, optax, dot_optax
        >>> tx = optax.chain(
        ...     dot_optax.per_loss(optax.trace(0.825), optax.trace(0.975)),
        ...     dot_optax.aggregate(dot_optax.weightings.projected()),
        ...     optax.scale_by_learning_rate(0.1),
        ... )
        >>> params = {'w': jnp.zeros(2)}
        >>> grads = dot_optax.PerLoss(task={'w': jnp.array([1.0, 0.0])}, kd={'w': jnp.array([-1.0, 1.0])})
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> print(updates['w'], optax.tree.get(state, 'weights'))
        [-0.05 -0.15] [[2.  1.5]]

    References:
        Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization <https://arxiv.org/abs/2406.16232>`_, 2024,
        for aggregation by inner products. Xin et al., `Do Current Multi-Task Optimization Methods in Deep Learning Even
        Help? <https://arxiv.org/abs/2209.11379>`_, 2022. Kurin et al., `In Defense of the Unitary Scalarization for
        Deep Multi-Task Learning <https://arxiv.org/abs/2201.04122>`_, 2022.
    """
    names = LossNames.named(losses, "aggregate")
    n = len(names.names)
    if not isinstance(weighting, Weighting):
        raise TypeError(f"aggregate: expected a Weighting, such as weightings.projected(), got {_describe(weighting)}")
    group_of = _group_function(groups, "aggregate")

    def plan(params: Any, like: Any = None) -> tuple[list[tuple[bool, ...]], list[int | None], int]:
        """For each parameter the losses that reach it and its group, None if it has no weights; the number of groups."""
        reads = _reads(names, reached, params, like)
        return reads, *_grouped(group_of, like if params is None else params, [sum(read) > 1 for read in reads])

    def init(params: optax.Params) -> AggregateState:
        _check_trainable(params, "params")
        k, dtype = plan(params)[2], jnp.finfo(_widest(*jax.tree.leaves(params))).dtype
        own = jax.tree.map(lambda x: jnp.broadcast_to(x, (k, *x.shape)), weighting.init(n))
        return AggregateState(jnp.ones([k, n], dtype), jnp.zeros([k, n, n], dtype), jnp.zeros([k, n, n], dtype), own)

    def update(updates: Any, state: Any, params: Any = None, *, losses: Any = None, **extra_args: Any) -> Any:
        trees, _ = names.gradients(updates, params)
        reads, group, k = plan(params, trees[0])
        dtype, columns = state.gram.dtype, map(jax.tree.leaves, trees)
        rows = [_wide(row, read) for row, read in zip(zip(*columns, strict=True), reads, strict=True)]
        gram = _grams(rows, group, state.gram)
        if losses is not None:
            losses = jnp.stack([jnp.asarray(x, dtype) for x in names.entries(losses, "losses").values()])
        with jax.default_matmul_precision("highest"):
            w, own = jax.vmap(weighting.weights, in_axes=(0, None, 0))(gram, losses, state.weighting)
        if w.shape != (k, n):
            raise ValueError(f"aggregate: the weighting must return {n} weights, one for each loss; got {w.shape[1:]}")
        w = jnp.where(jnp.isfinite(gram).all((1, 2))[:, None], w.astype(dtype), jnp.nan)

        def total(row: list[Any], i: int | None) -> Any:
            weights = jnp.ones(n) if i is None else w[i]
            return sum(x * weights[j].astype(jnp.finfo(x.dtype).dtype) for j, x in enumerate(row))

        update = jax.tree.structure(trees[0]).unflatten(map(total, rows, group))
        return update, AggregateState(w, gram, jax.vmap(_norms_and_cosines)(gram)[2], own)

    return _in_the_dtypes_of_params(optax.GradientTransformationExtraArgs(init, update))


def _group_function(groups: Any, where: str) -> Callable[[Any], Hashable]:
    found = groups if callable(groups) else GROUPS.get(str(groups))
    if found is None:
        raise ValueError(f"{where}: groups must be 'all', 'layer', 'leaf' or a function, got {_describe(groups)}")
    return found


def _grouped(group_of: Callable[[Any], Hashable], tree: Any, kept: Sequence[bool]) -> tuple[list[int | None], int]:
    """The group of each parameter, in the order in which groups come, None if it is not kept; the number of groups."""
    found, keys = dict[Any, int](), [group_of(_names(path)) for path, _ in jax.tree.leaves_with_path(tree)]
    return [found.setdefault(k, len(found)) if keep else None for k, keep in zip(keys, kept, strict=True)], len(found)


def _grams(rows: Sequence[list[Any]], group: Sequence[int | None], like: Any) -> Any:
    """The inner products `[K, N, N]` of the parameters of each group, with the dtype of an array `like` them."""
    grams = [jnp.zeros(like.shape[1:], like.dtype)] * len(like)
    for row, i in zip(rows, group, strict=True):
        if i is not None:
            grams[i] += _gram(row).astype(like.dtype)
    return jnp.stack(grams) if grams else like


def _wide(row: Sequence[Any], read: Sequence[bool]) -> list[Any]:
    """A parameter's gradients in 32 bits or more; zeros where the loss does not reach it."""
    return [jnp.asarray(g if r else jnp.zeros_like(g), _widest(*row)) for g, r in zip(row, read, strict=True)]


def _gram(row: list[Any]) -> Any:
    """The inner products of arrays of any sharding: no reshape, and no matrix product, which a TPU rounds to bfloat16."""
    n = range(len(row))
    products = [jnp.sum(jnp.real(jnp.conj(row[min(i, j)]) * row[max(i, j)])) for i in n for j in n]
    return jnp.stack(products).reshape(len(n), len(n))
