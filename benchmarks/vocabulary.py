"""What memory does the distillation loss of a large vocabulary take, whole and in chunks?  Compiled, not run.

    python -m benchmarks.vocabulary

compiles the loss and its gradient for this machine's CPU and for a TPU v5e (`pip install "jax[tpu]"`; no TPU need be there)
with the sizes of SmolLM2-135M: a vocabulary of 49,152, a width of 576; and prints what memory they take besides arguments and
results.  The gradient is that in the logits, or in the student's features and output layer.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import _measure
from benchmarks.update_step import tpu
from dot_optax import losses

WIDTH, VOCABULARY = 576, 49_152


def from_logits(loss: Any) -> Any:
    return jax.value_and_grad(lambda student, teacher: loss(student, teacher).astype(jnp.float32).mean())


def from_features(loss: Any) -> Any:
    def mean(params: Any, features: Any, kernel: Any) -> jax.Array:
        return loss(*params, features, kernel).astype(jnp.float32).mean()

    return jax.value_and_grad(mean)


def in_chunks(features: Any, kernel: Any, teacher_features: Any, teacher_kernel: Any) -> jax.Array:
    kernels = {"student_kernel": kernel, "teacher_kernel": teacher_kernel}
    return losses.chunked_kd_loss(features, teacher_features, **kernels)


FORMS = {
    "from logits": {"kd_loss": from_logits(losses.kd_loss), "chunked_kd_loss": from_logits(losses.chunked_kd_loss)},
    "from features": {
        "kd_loss": from_features(lambda x, w, t, v: losses.kd_loss(x @ w, t @ v)),
        "chunked_kd_loss": from_features(in_chunks),
    },
}


def temporary(step: Any, given: str, tokens: int, dtype: Any, sharding: Any) -> float:
    """The bytes besides arguments and results, in units of the student's logits in float32."""

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    logits, layer = shape(1, tokens, VOCABULARY), (shape(1, tokens, WIDTH), shape(WIDTH, VOCABULARY))
    arguments = (logits, logits) if given == "from logits" else (layer, *layer)
    found = jax.jit(step).lower(*arguments).compile().memory_analysis()
    return found.temp_size_in_bytes / (4 * math.prod(logits.shape))


def main(argv: Sequence[str] | None = None) -> None:
    parser = _measure.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=2048, help="in a batch")
    args = parser.parse_args(argv)
    chips = {"CPU": None} | ({"TPU v5e": chip} if (chip := tpu()) else {})
    figures: dict[str, dict[str, float]] = {}
    for given, forms in FORMS.items():
        for name, step in forms.items():
            figures[f"{name} {given}"] = {
                f"{chip}, {dtype}": temporary(step, given, args.tokens, dtype, sharding)
                for chip, sharding in chips.items()
                for dtype in ("float32", "bfloat16")
            }
    print(f"{args.tokens} tokens; 1.00 is {4 * args.tokens * VOCABULARY / 1e6:,.0f} MB; {_measure.machine()}\n")
    columns = list(next(iter(figures.values())))
    rows = [[name, *(f"{found[column]:.2f}" for column in columns)] for name, found in figures.items()]
    print(_measure.table(["memory besides arguments and results", *columns], rows))
    _measure.write(args.json, {"tokens": args.tokens, "temporary": figures})


if __name__ == "__main__":
    main()
