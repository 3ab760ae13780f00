"""The losses of distillation by name, each of every prediction, in nats.

    forward   T² KL(teacher || student)                  `dot_optax.losses.kd_loss`
    reverse   T² KL(student || teacher)                  `dot_optax.losses.reverse_kl_loss`
    jsd       the generalised Jensen-Shannon divergence  `dot_optax.losses.jsd_loss`, of weight `beta`
    skew      KL of the teacher to a mixture             `dot_optax.losses.skew_kl_loss`, of weight `alpha`
    top_k     forward, of the teacher's k likeliest      `dot_optax.losses.top_k_kd_loss`

A cache has the k likeliest tokens of the teacher. If these are all, each loss can be taken of it, else `top_k` alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dot_optax import losses
from examples.trainer.errors import UserError

NAMES = ("forward", "reverse", "jsd", "skew", "top_k")


class Likeliest(NamedTuple):
    """The teacher's k likeliest tokens at each position."""

    log_probs: jax.Array  # of `logits / temperature`: [batch, length, k]
    indices: jax.Array  # likewise


class Loss(NamedTuple):
    """A loss of distillation."""

    name: str
    temperature: float
    # (the student's, the teacher's, temperature) -> [batch, length]
    of_logits: Callable[[jax.Array, jax.Array, float], jax.Array]

    def of_likeliest(self, logits: jax.Array, teacher: Likeliest) -> jax.Array:
        """The loss of the student's logits [batch, length, vocabulary] and what is kept of the teacher."""
        if self.name == "top_k":
            return losses.top_k_kd_loss(logits, *teacher, self.temperature)
        # They are all: log-probabilities of `logits / temperature` are logits, but for a constant.
        unsorted = jnp.zeros(logits.shape, teacher.log_probs.dtype)
        unsorted = jnp.put_along_axis(unsorted, teacher.indices, teacher.log_probs, axis=-1, inplace=False)
        return self.of_logits(logits, self.temperature * unsorted.astype(logits.dtype), self.temperature)


def build(config: ConfigDict, vocabulary: int) -> Loss:
    """Returns the loss that `config` (the `distillation` part of a config) asks for."""
    k, name = config.k or vocabulary, config.loss
    if k > vocabulary:
        raise UserError(
            f"bad --config.distillation.k={k}: the vocabulary has {vocabulary} tokens; give as many or fewer"
        )
    if config.cache and name != "top_k" and k < vocabulary:
        raise UserError(
            f"--config.distillation.loss={name} compares all {vocabulary} tokens, and the cache holds {k}: give"
            " --config.distillation.loss=top_k, or --config.distillation.k=0 to cache all, or --config.distillation.cache=False"
        )

    def top_k(student: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
        return losses.top_k_kd_loss(student, *likeliest(teacher, temperature, k), temperature)

    def jsd(*args: Any) -> jax.Array:
        return losses.jsd_loss(*args, beta=config.beta)

    def skew(*args: Any) -> jax.Array:
        return losses.skew_kl_loss(*args, alpha=config.alpha)

    by_name = {"forward": losses.kd_loss, "reverse": losses.reverse_kl_loss, "jsd": jsd, "skew": skew, "top_k": top_k}
    return Loss(name, config.temperature, by_name[name])


def likeliest(logits: jax.Array, temperature: float, k: int) -> Likeliest:
    """What a cache keeps of the teacher's logits [..., vocabulary]."""
    return Likeliest(*jax.lax.top_k(jax.nn.log_softmax(logits / temperature), k))
