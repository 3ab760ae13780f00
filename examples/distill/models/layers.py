"""What the convolutional networks share: convolution and BatchNorm, and the way from feature maps to logits.

All arrays are channels-last. `dtype` is the dtype that convolutions compute in; parameters and BatchNorm statistics are
float32 whatever it is.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

_HE_NORMAL_FAN_OUT = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(
    in_features: int,
    out_features: int,
    kernel_size: int = 3,
    strides: int = 1,
    *,
    padding: int | None = None,
    groups: int = 1,
    use_bias: bool = False,
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A square convolution, zero-padded on every side by `padding` (default: half the kernel)."""
    return nnx.Conv(
        in_features,
        out_features,
        (kernel_size, kernel_size),
        strides,
        # In numbers, as in PyTorch: with stride 2, XLA's "SAME" pads an input of even size at the far end only.
        padding=kernel_size // 2 if padding is None else padding,
        feature_group_count=groups,
        use_bias=use_bias,
        kernel_init=_HE_NORMAL_FAN_OUT,
        dtype=dtype,
        rngs=rngs,
    )


class BatchNorm(nnx.BatchNorm):
    """BatchNorm over all axes but the last, computed in float32; its output has the dtype of its input."""

    def __init__(self, features: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(features, momentum=0.9, epsilon=1e-5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        # Its own `dtype` would round the running statistics to it in evaluation.
        return super().__call__(x).astype(x.dtype)


class ConvNorm(nnx.Module):
    """A convolution, of the arguments of `conv`, then BatchNorm."""

    def __init__(self, in_features: int, out_features: int, *args: int, rngs: nnx.Rngs, **options: Any) -> None:
        self.conv = conv(in_features, out_features, *args, rngs=rngs, **options)
        self.norm = BatchNorm(out_features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class ConvNet(nnx.Module):
    """A network that classifies the global average of its last feature map, so the size of its input is free.

    A subclass has `classifier` and `feature_maps`.
    """

    classifier: nnx.Linear  # computes in float32: what it would round in bfloat16, both losses would see

    def feature_maps(self, images: jax.Array) -> list[jax.Array]:
        """Returns the feature maps, first to last: (batch, height, width, features)."""
        raise NotImplementedError

    def __call__(
        self, images: jax.Array, *, with_features: bool = False
    ) -> jax.Array | tuple[jax.Array, list[jax.Array]]:
        """Returns the logits; `with_features`, also the feature maps and, last, the pooled features (batch, features)."""
        features = self.feature_maps(images)
        last = features[-1]
        features.append(last.mean(axis=(1, 2), dtype=jnp.promote_types(last.dtype, jnp.float32)))
        logits = self.classifier(features[-1])
        return (logits, features) if with_features else logits


def max_pool(x: jax.Array, window: int, *, padding: int = 0) -> jax.Array:
    """Max pooling of stride 2, padded on every side as PyTorch does."""
    return nnx.max_pool(x, (window, window), (2, 2), padding=((padding, padding), (padding, padding)))


def shuffle(x: jax.Array, groups: int) -> jax.Array:
    """Interleaves groups of channels: for two groups, a0 a1 ... b0 b1 ... becomes a0 b0 a1 b1 ..."""
    *batch, channels = x.shape
    return x.reshape(*batch, groups, channels // groups).swapaxes(-1, -2).reshape(x.shape)
