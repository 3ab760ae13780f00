"""Vision transformer (Dosovitskiy et al., ICLR 2021) for small images, with the mean of the tokens as its feature.

All arrays between the first and the last layer are tokens: (batch, tokens, width).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


class Attention(nnx.Module):
    """Multi-head self-attention: every token attends to all."""

    def __init__(self, width: int, heads: int, *, dtype: DTypeLike | None, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.qkv = nnx.Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        return self.out(jax.nn.dot_product_attention(*jnp.unstack(qkv, axis=2)).reshape(x.shape))


class Block(nnx.Module):
    """Attention, then two linear layers with GELU between them; each added to its input, which is normalized first."""

    def __init__(self, width: int, heads: int, mlp_ratio: int, *, dtype: DTypeLike | None, rngs: nnx.Rngs) -> None:
        self.norm1 = LayerNorm(width, rngs=rngs)
        self.attention = Attention(width, heads, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(width, rngs=rngs)
        self.expand = nnx.Linear(width, mlp_ratio * width, dtype=dtype, rngs=rngs)
        self.project = nnx.Linear(mlp_ratio * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.project(nnx.gelu(self.expand(self.norm2(x))))


class LayerNorm(nnx.LayerNorm):
    """LayerNorm computed in float32; its output has the dtype of its input."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x).astype(x.dtype)


class ViT(nnx.Module):
    """Square patches to tokens by one linear layer, a learned position added to each, blocks, and a linear classifier."""

    def __init__(
        self,
        num_classes: int,
        *,
        input_shape: tuple[int, ...],
        patch_size: int = 7,
        depth: int = 4,
        width: int = 48,
        heads: int = 4,
        mlp_ratio: int = 2,  # the hidden width of a block's two linear layers, in widths
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        if min(patch_size, depth, width, heads, mlp_ratio) < 1:
            raise ValueError("patch_size, depth, width, heads and mlp_ratio must be at least 1")
        *size, channels = input_shape
        if any(pixels % patch_size for pixels in size):
            raise ValueError(f"{patch_size=} must divide the {size[0]} x {size[1]} pixels of an image")
        if width % heads:
            raise ValueError(f"{heads=} must divide {width=}")
        tokens = (size[0] // patch_size) * (size[1] // patch_size)
        patch = (patch_size, patch_size)
        self.embed = nnx.Conv(channels, width, patch, patch, padding="VALID", dtype=dtype, rngs=rngs)
        self.position = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (tokens, width), jnp.float32))
        self.blocks = nnx.List(Block(width, heads, mlp_ratio, dtype=dtype, rngs=rngs) for _ in range(depth))
        self.norm = LayerNorm(width, rngs=rngs)
        self.classifier = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(
        self, images: jax.Array, *, with_features: bool = False
    ) -> jax.Array | tuple[jax.Array, list[jax.Array]]:
        """Returns the logits; `with_features`, also the tokens after each block and, last, their mean (batch, width)."""
        x = self.embed(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = x + self.position[None].astype(x.dtype)
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        x = self.norm(x)
        features.append(x.mean(axis=1, dtype=jnp.promote_types(x.dtype, jnp.float32)))
        logits = self.classifier(features[-1])
        return (logits, features) if with_features else logits
