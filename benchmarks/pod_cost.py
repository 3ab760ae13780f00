"""What would a training step of ImageNet's ResNet50 -> MobileNetV1 cost on a pod of 256 TPU v5e?  Compiled, not run.

    pip install "jax[tpu]"
    JAX_PLATFORMS=cpu python -m benchmarks.pod_cost

compiles it in bfloat16, in each form of data parallelism, with KD and with DOT, for a batch of 4096 over all chips and
for the paper's 512, and prints in a quarter of an hour (libtpu 0.0.42, for JAX 0.10.2; what it says about worker hostnames is no error)

    per chip of 256 batch  method    GFLOP  traffic   memory  collectives
    jit              4096  kd        225.4  8.88 GB  0.57 GB  all-reduce 21.29 MB
    jit              4096  dot       225.5  9.02 GB  0.59 GB  all-reduce 21.29 MB
    jit_sharded      4096  kd        225.4  8.27 GB  0.52 GB  all-reduce 37.82 MB
    jit_sharded      4096  dot       225.4  8.38 GB  0.53 GB  all-reduce 37.82 MB
    pmap             4096  kd        225.5  8.95 GB  0.58 GB  all-reduce 34.12 MB
    pmap             4096  dot       225.5  9.10 GB  0.60 GB  all-reduce 34.12 MB
    shard_map        4096  kd        225.5  9.03 GB  0.59 GB  all-reduce 17.19 MB
    shard_map        4096  dot       225.5  9.37 GB  0.61 GB  all-reduce 17.19 MB
    jit               512  kd         32.3  4.55 GB  0.31 GB  all-reduce 21.29 MB
    jit               512  dot        32.3  4.70 GB  0.33 GB  all-reduce 21.29 MB
    jit_sharded       512  kd         32.2  4.34 GB  0.29 GB  all-reduce 39.87 MB, all-to-all 0.01 MB
    jit_sharded       512  dot        32.2  4.12 GB  0.27 GB  all-reduce 39.87 MB, all-to-all 0.01 MB
    pmap              512  kd         32.3  4.90 GB  0.33 GB  all-reduce 34.12 MB
    pmap              512  dot        32.3  5.13 GB  0.36 GB  all-reduce 34.12 MB
    shard_map         512  kd         32.3  4.81 GB  0.33 GB  all-reduce 17.19 MB
    shard_map         512  dot        32.3  5.09 GB  0.35 GB  all-reduce 17.19 MB

of 16 GB, 197 TFLOP/s and 819 GB/s that a chip has. MobileNetV1 has 16.9 MB of parameters: with `shard_map` the update
is averaged, and DOT moves what KD moves. With `pmap` the gradients of both losses are, for KD too, since the trainer logs
both. With `jit` the compiler averages both gradients as well, but in the bfloat16 that the convolutions compute in;
`jit_sharded`, with --config.shard_params=True, moves more, for less memory.
"""

import argparse
import json
import os
import pathlib
import re

import jax
import numpy as np
from jax.experimental import topologies

from benchmarks.recipe_cost import FORMS, compile_step
from examples.distill.command_line import parse
from examples.trainer import parallel

BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "u8": 1}


def collectives(hlo):
    """Returns how many bytes each kind of collective returns on a chip, read off the shapes in a compiled program."""
    total = {}
    pattern = r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    for shapes, kind in re.findall(pattern, hlo):
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            count = int(np.prod([int(n) for n in dims.split(",") if n], dtype=int))
            total[kind] = total.get(kind, 0) + BYTES.get(dtype, 4) * count
    return total


def cost(config, form, method, batch_size, mesh):
    compiled = compile_step(config, mesh, form=form, method=method, batch_size=batch_size)
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return {
        "gflop": analysis["flops"] / 1e9,
        "traffic_gb": analysis["bytes accessed"] / 1e9,
        "memory_gb": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9,
        "collective_mb": {kind: count / 1e6 for kind, count in collectives(compiled.as_text()).items()},
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="imagenet_r50_mobilenetv1")
    parser.add_argument("--topology", default="v5e:16x16")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=(4096, 512))
    parser.add_argument("--forms", nargs="+", default=tuple(FORMS), choices=FORMS)
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    args = parser.parse_args(argv)

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would look for the machine it thinks it runs on.
    devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    mesh = jax.sharding.Mesh(np.array(devices), (parallel.AXIS,))
    config = parse([f"--config={args.config}"]).config
    rows = []
    print(f"{f'per chip of {len(devices)}':10} batch  method    GFLOP  traffic   memory  collectives")
    for batch_size in args.batch_sizes:
        for form in args.forms:
            for method in ("kd", "dot"):
                row = cost(config, form, method, batch_size, mesh)
                rows.append({"form": form, "batch_size": batch_size, "method": method} | row)
                moved = ", ".join(f"{kind} {count:.2f} MB" for kind, count in row["collective_mb"].items())
                print(
                    f"{form:15} {batch_size:5}  {method:6} {row['gflop']:8.1f}  {row['traffic_gb']:4.2f} GB"
                    f"  {row['memory_gb']:4.2f} GB  {moved}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
