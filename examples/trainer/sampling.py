"""Gradients below their exact cost: what `--config.sampling` makes of the losses of a step, the task's and the others.

    losses        the others at every k-th step, with k times their gradients; elsewhere neither they nor the teacher run
    alternating   the task at one step, the others at the next, each with twice its gradients: k is 2
    difference    the sum of all gradients at every step, what tells them apart at every k-th; the teacher at every step
    examples      the others at every step, on every k-th row of the batch

The losses are dicts by name, with the task's first; mostly there is one other, the distillation loss. k is `sampling.period`. The number of the step alone says what is due, so an interrupted run goes on in the right phase.
`dot_optax.sampled_losses` and the other two say why each form is right on average, and what its noise does.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

import dot_optax
from examples.trainer.errors import UserError

LossFn = Callable[[Any, Any], tuple[Any, Any]]  # (params, batch) -> (losses by name, what else they compute)
Gradients = Callable[[Any, Any], tuple[tuple[Any, Any], Any]]  # the same, and the gradients of losses by name


class Losses(NamedTuple):
    """The names of the losses of a step."""

    trained: tuple[str, ...]  # whose gradients the optimizer gets, the task's first
    logged: tuple[str, ...] = ()  # and of those that are there for the log alone: no gradient flows through them


class Sampling(NamedTuple):
    """Which gradients are taken at which step. Configs with the same effect give equal values."""

    form: str = "none"  # all, at every step
    period: int = 2

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Sampling":
        """Returns what a section `sampling` asks for."""
        if config.form == "alternating" and config.period != 2:
            raise UserError(
                f"bad --config.sampling.period={config.period}: in turn, each loss is due at every second step;"
                " give 2, or another --config.sampling.form"
            )
        exact = config.form in ("", EXACT.form)
        if exact and config.period > EXACT.period:
            raise UserError(
                f"--config.sampling.period={config.period} has no effect without a form: give --config.sampling.form as well,"
                f" one of {', '.join(FORMS[2:])}"
            )
        return EXACT if exact or config.period == 1 else cls(config.form, config.period)

    @property
    def turn(self) -> int:
        """After how many steps it begins again."""
        return 1 if self.form == "none" else self.period

    @property
    def teacher_forwards(self) -> float:
        """How often the teacher sees a batch, on average over the steps."""
        return 1.0 if self.form == "difference" else 1 / self.turn

    @property
    def sum_is_exact(self) -> bool:
        """Whether the sum of the gradients is that of the exact ones, at every step."""
        return self.form in ("none", "difference")

    def for_task_alone(self) -> "Sampling":
        """The same for a method without a KD gradient: the task's stays exact, and KD is there for the log."""
        return {"alternating": Sampling("losses", 2), "difference": EXACT}.get(self.form, self)

    def gradients(
        self, loss_fn: LossFn, step: Any, losses: Losses, summed: Collection[float] | None = None
    ) -> tuple[Gradients, dict[str, Any]]:
        """What takes the gradients at a step, and whether a loss is computed there, for those that are not always."""
        if summed is not None:
            return gradient_of_the_sum(loss_fn, losses, summed), {}
        if self == EXACT:
            return _only(losses.trained, dot_optax.value_and_grads(loss_fn, has_aux=True)), {}
        sampled = self._sampled(loss_fn, losses)
        return _only(losses.trained, functools.partial(sampled, step)), sampled.due(step)

    def kinds(self) -> list[int]:
        """For each step of a turn, the first one that costs the same; one for all if all do."""
        if self.form in ("none", "examples"):
            return [0]
        sampled = self._sampled(lambda params, batch: None, Losses(("task", "other")))
        return [sampled.kind(step) for step in range(self.turn)]

    def _sampled(self, loss_fn: LossFn, losses: Losses) -> Any:
        if self.form == "difference":
            reached = {name: name in losses.trained for name in losses.trained + losses.logged}
            return dot_optax.sampled_difference(loss_fn, self.period, reached=reached, has_aux=True)
        task, *trained = losses.trained
        others = dict.fromkeys((*trained, *losses.logged), self.period)
        if self.form == "examples":
            return dot_optax.sampled_examples(loss_fn, others, batch_argnums=1, has_aux=True)
        # Losses that share a teacher are due together.
        if self.form == "losses":
            return dot_optax.sampled_losses(loss_fn, others, offsets=dict.fromkeys(others, 0), has_aux=True)
        offsets = dict.fromkeys(others, 1)
        return dot_optax.sampled_losses(loss_fn, {task: 2} | others, offsets=offsets, has_aux=True)

    def of_the_losses(
        self, grads: dict[str, Any], step: jax.Array, due: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The gradients of the losses out of those that the optimizer gets, and whether each is known at this step."""
        k = self.period
        if self.form == "difference":
            known = step % k == 0
            share = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *grads.values())
            apart = {name: jax.tree.map(lambda g, s: s + (g - s) / k, grad, share) for name, grad in grads.items()}
            return apart, dict.fromkeys(grads, known)
        rare = {name: jax.tree.map(lambda g: g / k, grads[name]) for name in grads if name in due}
        return grads | rare, due


EXACT = Sampling()
FORMS = ("", "none", "losses", "alternating", "difference", "examples")


def check_rows(sampling: Sampling, batch_size: int, devices: int) -> None:
    """Raises if a batch cannot be divided as `examples` does, on each device for itself."""
    rows = batch_size // devices
    if sampling.form == "examples" and rows % sampling.period:
        raise UserError(
            f"bad --config.sampling.period={sampling.period}: with --config.sampling.form=examples it must divide the"
            f" {rows} rows that each device has of a batch"
        )


def _only(names: Collection[str], gradients: Gradients) -> Gradients:
    """The gradients of these losses alone."""

    def taken(params: Any, batch: Any) -> tuple[tuple[Any, Any], Any]:
        values, grads = gradients(params, batch)
        return values, {name: grads[name] for name in names}

    return taken


def gradient_of_the_sum(loss_fn: LossFn, names: Losses, weights: Collection[float]) -> Gradients:
    """One backward pass for an optimizer that sums: the gradient of the weighted sum in the place of the first loss's.

    The others are zeros.
    """

    def gradients(params: Any, batch: Any) -> tuple[tuple[Any, Any], Any]:
        def total(params: Any) -> tuple[jax.Array, tuple[Any, Any]]:
            losses, rest = loss_fn(params, batch)
            weighted = [w * losses[name] for name, w in zip(names.trained, weights, strict=True) if w]
            return sum(weighted), (losses, rest)

        (_, (losses, rest)), grad = jax.value_and_grad(total, has_aux=True)(params)
        first, *others = names.trained
        return (losses, rest), {first: grad} | {name: optax.tree.zeros_like(grad) for name in others}

    return gradients


def counted_flops(jitted: Any, *args: Any) -> float | None:
    """The operations of a call, as XLA counts them before it optimizes. Nothing is compiled or run; `args` may be shapes.

    They are counted for the CPU, since JAX does not count for GPUs and TPUs before it compiles. None: there is no CPU.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return None
    with jax.default_device(cpu):
        return (jitted.lower(*shapes).cost_analysis() or {}).get("flops")


def flops(
    loss_fn: Callable[..., tuple[Any, Any]],
    losses: Losses,
    sampling: Sampling,
    summed: Collection[float] | None,
    *args: Any,
) -> float | None:
    """The operations of the gradients of a step, on average; see `counted_flops`.

    Other arguments are those of `step.make_train_step`, and of its `loss_fn`, or their shapes.
    """

    def count(kind: int) -> float:
        def gradients(params: Any, rest: Any, constants: Any, batch: Any) -> Any:
            def losses_of(params: Any, batch: Any) -> tuple[Any, Any]:
                return loss_fn(params, rest, constants, batch, kind)

            return sampling.gradients(losses_of, kind, losses, summed)[0](params, batch)

        return counted_flops(jax.jit(gradients), *args) or np.nan

    kinds = sampling.kinds()
    of_kind = {kind: count(kind) for kind in set(kinds)}
    mean = sum(of_kind[kind] for kind in kinds) / len(kinds)
    return None if np.isnan(mean) else float(mean)
