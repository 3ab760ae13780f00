"""A train step with one gradient for each loss: a pure function, compiled once."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dot_optax.diagnostics import Comparison, compare
from examples.trainer.diagnostics import Diagnostics, Taken
from examples.trainer.parallel import Layout
from examples.trainer.sampling import EXACT, Losses, Sampling

Metrics = dict[str, jax.Array]

OWN = "of-the-losses"  # an entry of `params` and of `rest`: what the losses have of their own, such as a projector


class TrainState(NamedTuple):
    """Everything that changes during training."""

    step: jax.Array
    params: Any
    rest: Any  # of the network: what the optimizer does not train, such as the statistics of BatchNorm
    opt_state: optax.OptState


def network(tree: Any) -> Any:
    """The network's part of `params`, or of `rest`: all but what the losses have of their own."""
    return {name: value for name, value in tree.items() if name != OWN} if has_own(tree) else tree


def has_own(tree: Any) -> bool:
    """Whether the losses have something of their own in `params`, or in `rest`."""
    return isinstance(tree, Mapping) and OWN in tree


def init_state(params: Any, rest: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, rest, optimizer.init(params))


def make_train_step(
    loss_fn: Callable[[Any, Any, Any, Any, Any], tuple[dict[str, Any], Any]],
    optimizer: optax.GradientTransformation,
    layout: Layout,
    *,
    losses: Losses,
    container: Callable[..., Any],
    reported: Sequence[str],
    gradient_metrics: bool = True,
    state_metrics: Callable[[Any], Metrics] = lambda opt_state: {},
    sampling: Sampling = EXACT,
    summed: Collection[float] | None = None,
    diagnostics: Diagnostics | None = None,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]:
    """Returns `train_step(state, constants, batch) -> (state, metrics)`; the old state's memory is reused.

    A step of which a loss, the update or a part of `rest` is not finite, on any device, is skipped: only `step`
    changes, and no schedule of the optimizer moves on. The metric `skipped` says so: it is above 0 then. A metric that
    this step does not know, such as a loss that it did not compute, is NaN.

    Args:
        loss_fn: `loss_fn(params, rest, constants, batch, step) -> (losses, rest)`, with the losses as means over the
            batch, by name; the step is the number of those before it.
        optimizer: from the gradients of the trained losses to one update. It gets the values of these losses as well,
            by the keyword `losses`.
        layout: how devices share the work.
        losses: the names of the losses: those that are trained, and those that are there for the log.
        container: what holds the gradients of the trained losses for the optimizer, such as `dot_optax.PerLoss`.
        reported: the losses whose metrics are returned: `NAME_loss`, and ...
        gradient_metrics: ... `NAME_grad_norm` of those that are trained; of two, also `grad_cosine`, the cosine between
            their gradients.
        state_metrics: further metrics, out of the optimizer's new state.
        sampling: which gradients are taken at which step. Metrics are of the losses' own gradients, without factors k.
        summed: weights of the losses, for an optimizer that adds up what it is given: it gets the gradient of the
            weighted sum, from one backward pass, and zeros. Only without `gradient_metrics`, and where the sum is exact.
        diagnostics: what else is to be known, of an `optimizer` that is `diagnostics.recording`; with `gradient_metrics`.
    """
    assert diagnostics is None or gradient_metrics
    assert summed is None or (sampling.sum_is_exact and not gradient_metrics)
    # The average has no state: a checkpoint holds that of the optimizer.
    optimizer = optax.chain(optimizer, layout.average_updates)

    def train_step(state: TrainState, constants: Any, batch: Any) -> tuple[TrainState, Metrics]:
        def losses_of(params: Any, batch: Any) -> tuple[Any, Any]:
            return loss_fn(params, state.rest, constants, batch, state.step)

        gradients, due = sampling.gradients(losses_of, state.step, losses, summed)
        (values, rest), grads = layout.value_and_grads(gradients, due)(state.params, batch)
        # A device that sees a part of the batch has its own losses; the optimizer is to be the same on all.
        whole = layout.average_metrics({name: values[name] for name in losses.trained})
        given, of_losses = (container(*(tree[name] for name in losses.trained)) for tree in (grads, whole))
        opt_state = (state.opt_state, optax.EmptyState())
        updates, (opt_state, _) = optimizer.update(given, opt_state, state.params, losses=of_losses)
        metrics = {f"{name}_loss": values[name] for name in reported} | state_metrics(opt_state)
        if gradient_metrics:
            own, known = sampling.of_the_losses(grads, state.step, due)
            trained = [own[name] for name in losses.trained]
            compared = compare(container(*trained))
            metrics |= _gradient_metrics(compared, losses.trained, reported, known)
        if diagnostics:
            all_known = jnp.all(jnp.array([True, *known.values()]))
            taken = Taken(state.step, trained, all_known, compared, updates, state.params, opt_state)
            metrics |= diagnostics.of(taken)
        # A loss that is not due is NaN, which is no failure.
        computed = [jnp.where(due.get(name, True), loss, 0) for name, loss in values.items()]
        skipped = jnp.float32(~_all_finite((computed, updates, rest)))
        metrics = layout.average_metrics(metrics | {"skipped": skipped})
        new = TrainState(state.step + 1, optax.apply_updates(state.params, updates), rest, opt_state)
        # One condition: into a `where` for every array XLA would fuse the whole check, and compile for a minute.
        kept = jax.lax.cond(metrics["skipped"] > 0, lambda old, new: old, lambda old, new: new, state, new)
        return kept._replace(step=new.step), metrics

    return layout.compile(train_step)


def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _gradient_metrics(
    compared: Comparison, names: Sequence[str], reported: Collection[str], known: dict[str, Any]
) -> Metrics:
    """Norms and, of two losses that are reported, the cosine, where the step knows the gradients."""
    (norms,), (cosines,) = compared.norms, compared.cosines
    knows = {i: known.get(name, True) for i, name in enumerate(names) if name in reported}
    metrics = {f"{names[i]}_grad_norm": jnp.where(here, norms[i], jnp.nan) for i, here in knows.items()}
    if len(knows) == 2:
        (i, knows_i), (j, knows_j) = knows.items()
        metrics["grad_cosine"] = jnp.where(jnp.logical_and(knows_i, knows_j), cosines[i, j], jnp.nan)
    return metrics
