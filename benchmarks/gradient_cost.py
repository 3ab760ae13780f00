"""What does one gradient per loss cost, against one gradient of their sum?  Compiled FLOPs, which do not vary.

    python -m benchmarks.gradient_cost

prints, after some seconds (JAX 0.10.2 and 0.12.0, CPU)

    one gradient of the sum      2.97 GFLOP  1.000
    dot_optax.value_and_grads    4.95 GFLOP  1.663
    two jax.grad in one jit      4.95 GFLOP  1.663

for a student of seven convolutions.  The backward passes share one forward pass, so the cost of a deep network is that
of 1 forward and 2 backward passes instead of 1 and 1: about 5/3.
"""

import argparse
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import optax

import dot_optax
from dot_optax import PerLoss

BATCH, WIDTHS, CLASSES = 64, (3, 32, 64, 64, 128, 128, 256, 256), 100


def network(params, x):
    for kernel in params["convolutions"]:
        stride = 2 if kernel.shape[2] != kernel.shape[3] else 1
        x = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x)
    return x.mean((1, 2)) @ params["head"]


def loss_fn(params, images, labels, teacher_logits):
    logits = network(params, images)
    return PerLoss(
        task=optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean(),
        kd=dot_optax.losses.kd_loss(logits, teacher_logits, 4.0).mean(),
    )


def two_grads(params, *batch):
    return loss_fn(params, *batch), PerLoss(
        task=jax.grad(lambda p: loss_fn(p, *batch).task)(params), kd=jax.grad(lambda p: loss_fn(p, *batch).kd)(params)
    )


FORMS = {
    "one gradient of the sum": jax.value_and_grad(lambda *args: sum(loss_fn(*args))),
    "dot_optax.value_and_grads": dot_optax.value_and_grads(loss_fn),
    "two jax.grad in one jit": two_grads,
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="also write the FLOPs to this file")
    args = parser.parse_args(argv)

    array = jax.ShapeDtypeStruct
    kernels = [array((3, 3, i, o), jnp.float32) for i, o in itertools.pairwise(WIDTHS)]
    params = {"convolutions": kernels, "head": array((WIDTHS[-1], CLASSES), jnp.float32)}
    batch = (
        array((BATCH, 32, 32, 3), jnp.float32),
        array((BATCH,), jnp.int32),
        array((BATCH, CLASSES), jnp.float32),
    )
    flops = {
        name: jax.jit(form).lower(params, *batch).compile().cost_analysis()["flops"] for name, form in FORMS.items()
    }
    for name, value in flops.items():
        print(f"{name:26} {value / 1e9:6.2f} GFLOP  {value / flops['one gradient of the sum']:.3f}")
    if args.json:
        args.json.write_text(json.dumps(flops, indent=1))


if __name__ == "__main__":
    main()
