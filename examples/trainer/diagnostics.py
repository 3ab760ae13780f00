"""What `--config.diagnostics=True` adds to the log: whether a method's losses are in conflict, and what each of them does.

    grad_conflict      1 where the gradients of two losses have an angle of more than 90 degrees, else 0. Of three losses
                       or more, each pair has this and its cosine: `A_and_B_grad_conflict`, `A_and_B_grad_cosine`
    NAME_share         what each loss contributes to the update: see `shares`; they add up to 1
    NAME_snr           the signal-to-noise ratio of each gradient, from running moments: see `dot_optax.diagnostics.record`
    update_to_weight   the length of the update over that of the parameters
    NAME_gain          the gain of each loss's momentum, as it is at this step; null if the weight of the loss is 0
    NAME_rate          the effective learning rate of each loss: learning rate x gain. Schedules are read as if no step
                       had been skipped, here and in NAME_gain
    NAME_scale_invariant_rate   NAME_rate / |w|^2, which weights in front of a normalization see: see
                       `dot_optax.diagnostics.scale_invariant_rate`; the mean over the kernels whose length does not change
                       the outputs, with SGD; not there if there are none

With `--config.diagnostics_by=layer`, a layer being all parameters with the same parent in the tree, also

    grad_cosine/LAYER, grad_conflict/LAYER, NAME_grad_norm/LAYER, update_to_weight/LAYER

Of three losses or more, the first two are `A_and_B_grad_cosine/LAYER` and `A_and_B_grad_conflict/LAYER`.

All are means over the steps of an epoch that know them. The running moments are in the state of the optimizer, in front of
its own, and so in checkpoints: they take the memory of one more tree of parameters for each loss.

With `--config.parallel=shard_map` the gradients and momenta of each device are looked at, and the metrics averaged. With
`--config.sampling`, `NAME_snr` is that of the gradients which the optimizer is given, with the noise of the sampling.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dot_optax import diagnostics

Metrics = dict[str, jax.Array]


class Taken(NamedTuple):
    """What a step has done, for diagnostics to look at."""

    step: Any  # the number of those before it
    grads: Sequence[Any]  # of the unweighted losses, in their order
    known: Any  # whether this step knows all of them
    compared: diagnostics.Comparison  # of all parameters together
    updates: Any
    params: Any  # before it
    opt_state: Any  # after it


class Diagnostics(NamedTuple):
    """What is to be known of a job."""

    names: Sequence[str]  # of its losses, in their order
    container: Any  # a NamedTuple, which holds something for each of them
    weights: Any = None  # with which the optimizer begins: numbers or schedules, in the container
    learning_rate: Callable[[Any], Any] = lambda step: jnp.nan  # at a step
    # (step) -> the gain of the momentum of each loss, in the container; None where nobody knows
    gains: Callable[[Any], Any] | None = None
    # (opt_state) -> further weights that the optimizer found; None: there are none
    scales: Callable[[Any], Any] = lambda opt_state: None
    # (params) -> those whose length does not change the outputs of the network; None: they are not looked for
    scale_invariant: Callable[[Any], Sequence[Any]] | None = None
    layers: Sequence[str] = ()  # by which it is logged as well: `layers(params)`

    @property
    def pairs(self) -> dict[str, tuple[int, int]]:
        """Each pair of losses, by how the names of its metrics begin: of two losses with nothing."""
        found = itertools.combinations(range(len(self.names)), 2)
        named = {f"{self.names[i]}_and_{self.names[j]}_": (i, j) for i, j in found}
        return {"": (0, 1)} if len(named) == 1 else named

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that are added, by name."""
        rates = ("gain", "rate", *(["scale_invariant_rate"] if self.scale_invariant else []))
        conflicts = [f"{pair}grad_conflict" for pair in self.pairs]
        cosines = [f"{pair}grad_cosine" for pair in self.pairs]
        norms = [f"{name}_grad_norm" for name in self.names]
        return (
            *(cosines if len(self.names) > 2 else []),  # that of two is there without this
            *conflicts,
            *(f"{name}_{what}" for what in ("share", "snr") for name in self.names),
            "update_to_weight",
            *(f"{name}_{what}" for what in rates for name in self.names),
            *(
                f"{what}/{layer}"
                for what in (*cosines, *conflicts, *norms, "update_to_weight")
                for layer in self.layers
            ),
        )

    def recording(self, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        """The optimizer, whose state holds running moments of the gradients as well."""
        return optax.chain(diagnostics.record(losses=self.container._fields), optimizer)

    def of(self, taken: Taken) -> Metrics:
        """The metrics of a step of an optimizer that is `recording`."""
        recorded, opt_state = taken.opt_state
        found = {"update_to_weight": diagnostics.update_to_weight(taken.updates, taken.params)[0]}
        found |= self._of_pairs(taken, taken.compared, 0)
        values = {"snr": recorded.signal_to_noise[0], "share": self.shares(taken._replace(opt_state=opt_state))}
        if self.gains:
            values["gain"] = jnp.stack(list(self.gains(taken.step)))
            values["rate"] = self.learning_rate(taken.step) * values["gain"]
            if self.scale_invariant:
                inverse_squares = diagnostics.scale_invariant_rate(1.0, self.scale_invariant(taken.params))
                values["scale_invariant_rate"] = values["rate"] * jnp.mean(inverse_squares)
        for what, of_losses in values.items():
            found |= {f"{name}_{what}": value for name, value in zip(self.names, of_losses, strict=True)}
        found |= self._by_layer(taken) if self.layers else {}
        return {name: jnp.asarray(value, jnp.float32) for name, value in found.items()}

    def _of_pairs(self, taken: Taken, compared: diagnostics.Comparison, group: int) -> Metrics:
        """Cosine and conflict of each pair of losses in one group of parameters."""
        found, norms = {}, compared.norms[group]
        for pair, (i, j) in self.pairs.items():
            cosine = compared.cosines[group, i, j]
            # A gradient of 0, as of a loss that does not reach the group, has no direction; its cosine is 0 by definition.
            there = taken.known & (norms[i] > 0) & (norms[j] > 0) & ~jnp.isnan(cosine)
            for name, value in (("grad_cosine", cosine), ("grad_conflict", jnp.float32(cosine < 0))):
                found[pair + name] = jnp.where(there, value, jnp.nan)
        return found

    def _by_layer(self, taken: Taken) -> Metrics:
        compared = diagnostics.compare(self.container(*taken.grads), groups="layer")
        ratios, found = diagnostics.update_to_weight(taken.updates, taken.params, groups="layer"), {}
        ratios = jnp.where(jnp.isfinite(ratios), ratios, jnp.nan)  # A layer may begin with zeros.
        for group, layer in enumerate(self.layers):
            values = self._of_pairs(taken, compared, group) | {"update_to_weight": ratios[group]}
            for name, norm in zip(self.names, compared.norms[group], strict=True):
                values[f"{name}_grad_norm"] = jnp.where(taken.known, norm, jnp.nan)
            found |= {f"{name}/{layer}": value for name, value in values.items()}
        return found

    def shares(self, taken: Taken) -> jax.Array:
        """What each loss contributes to the update, before the learning rate.

        Where each loss has a momentum, these are looked at: as Adam divides them by the root of the second moment, and
        with a coupled L2 penalty in that of the task. Else the weighted gradients of this step are; what one momentum for
        all remembers of each loss is not known.
        """
        trees, known = momenta(taken.opt_state, self.container, taken.params), True
        if trees is None:
            weights = [weight(taken.step) if callable(weight) else weight for weight in self.weights]
            trees = [jax.tree.map(lambda g, w=w: w * g, grad) for w, grad in zip(weights, taken.grads, strict=True)]
            known = taken.known
        scales = self.scales(taken.opt_state)
        if scales is not None:
            trees = [jax.tree.map(lambda v, s=s: s * v, tree) for s, tree in zip(scales, trees, strict=True)]
        return jnp.where(known, diagnostics.compare(self.container(*trees)).shares[0], jnp.nan)


def layers(params: Any) -> tuple[str, ...]:
    """The names of the layers, in the order of `dot_optax.diagnostics`: what comes before the last `/` in those of parameters."""
    paths = [
        jax.tree_util.keystr(path[:-1], simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(params)
    ]
    return tuple(dict.fromkeys(path or "." for path in paths))


def momenta(opt_state: Any, container: Any, params: Any) -> list[Any] | None:
    """The momentum of each loss, like `params`, in the state of an optimizer; None where losses have no momenta.

    Those of Adam are divided by the root of their second moment.
    """

    def of_losses(state: Any) -> list[Any] | None:
        found = [_buffer(entry, params) for entry in state] if isinstance(state, container) else [None]
        return None if any(buffer is None for buffer in found) else found

    def is_kept(state: Any) -> bool:
        return of_losses(getattr(state, "mu", state)) is not None

    for state in jax.tree.leaves(opt_state, is_leaf=is_kept):
        buffers = of_losses(getattr(state, "mu", state))
        if buffers is not None:
            break
    else:
        return None
    # Without its bias correction and epsilon, which are nearly the same for all losses.
    tiny = jnp.finfo(jnp.float32).tiny
    scale = jax.tree.map(lambda nu: jax.lax.rsqrt(nu + tiny), state.nu) if hasattr(state, "mu") else None

    def like_params(buffer: Any) -> Any:
        whole = jax.tree.map(lambda v, p: jnp.zeros_like(p) if _is_masked(v) else v, buffer, params, is_leaf=_is_masked)
        return whole if scale is None else jax.tree.map(jnp.multiply, whole, scale)

    return [like_params(buffer) for buffer in buffers]


def _buffer(state: Any, params: Any) -> Any:
    """The momentum in the state of one loss; None if there is none."""
    traces = [leaf for leaf in jax.tree.leaves(state, is_leaf=_is_trace) if _is_trace(leaf)]
    found = traces[0].trace if len(traces) == 1 else state
    return found if jax.tree.structure(found, is_leaf=_is_masked) == jax.tree.structure(params) else None


def _is_trace(state: Any) -> bool:
    return isinstance(state, optax.TraceState)


def _is_masked(state: Any) -> bool:
    return isinstance(state, optax.MaskedNode)
