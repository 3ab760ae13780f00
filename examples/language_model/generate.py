"""Text that a network continues, always with its likeliest token: for a look at what a student has learnt."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.language_model import model
from examples.language_model.tokenizer import Tokenizer


def continue_text(
    graphdef: nnx.GraphDef, params: Any, tokenizer: Tokenizer, prompts: Sequence[str], num_tokens: int
) -> list[str]:
    """Returns what a network writes behind each prompt, up to a separator or `num_tokens` tokens.

    All prompts share one compiled loop over positions, each of which computes one token of every text; keys and values of
    the positions before it are kept. What one prompt gets does not depend on the others but for rounding.

    Args:
        graphdef, params: of `model.split`.
        tokenizer: the network's.
        prompts: each at least one token long.
        num_tokens: the most that is written behind a prompt.

    Raises:
        ValueError: if a prompt has no tokens, or `num_tokens` is below 1.

    Example:
        >>> from flax import nnx
        >>> from examples.language_model import generate, model, tokenizer
        >>> a = model.Architecture(256, width=8, layers=1, heads=2, kv_heads=1, head_dim=4, feed_forward=8)
        >>> graphdef, params = model.split(model.build(a, rngs=nnx.Rngs(0)))
        >>> (text,) = generate.continue_text(graphdef, params, tokenizer.of_bytes(), ["import"], num_tokens=3)
        >>> len(text) <= 3
        True
    """
    if not prompts:
        return []
    encoded = tokenizer.encode([prompt.encode() for prompt in prompts])
    if num_tokens < 1 or not all(len(ids) for ids in encoded):
        raise ValueError("each prompt needs a token, and num_tokens must be at least 1")
    lengths = np.array([len(ids) for ids in encoded])
    tokens = np.zeros((len(encoded), lengths.max() + num_tokens), np.int32)
    for row, ids in zip(tokens, encoded, strict=True):
        row[: len(ids)] = ids
    written = np.asarray(_continue(graphdef, params, jnp.asarray(tokens), jnp.asarray(lengths)))
    texts = [row[length : length + num_tokens] for row, length in zip(written, lengths, strict=True)]
    ends = [np.append(np.flatnonzero(text == tokenizer.separator), num_tokens)[0] for text in texts]
    return [tokenizer.decode(text[:end]).decode(errors="replace") for text, end in zip(texts, ends, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def _continue(graphdef: nnx.GraphDef, params: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Fills [batch, length] from the lengths on, where rows already have their prompts."""

    def step(position: jax.Array, carry: tuple[jax.Array, model.Cache]) -> tuple[jax.Array, model.Cache]:
        tokens, cache = carry
        logits, cache = model.apply_cached(graphdef, params, tokens[:, position], position, cache)
        following = jnp.where(position + 1 < lengths, tokens[:, position + 1], logits.argmax(-1))
        return tokens.at[:, position + 1].set(following.astype(tokens.dtype)), cache

    cache = model.empty_cache(graphdef, params, *tokens.shape)
    return jax.lax.fori_loop(0, tokens.shape[1] - 1, step, (tokens, cache))[0]
