"""What would a step take that distils a Llama of 7 billion parameters into one of 1 billion on 256 TPU v5e?  Compiled only.

    pip install "jax[tpu]"
    JAX_PLATFORMS=cpu python -m benchmarks.language_model_pod

compiles it in bfloat16, with KD and with DOT, for 256 sequences of 2,048 tokens, and prints in about half an hour
(libtpu 0.0.42, for JAX 0.10.2; what it says about worker hostnames is no error)

    per chip of 256 method    state   memory  collectives
    16x16           kd      0.12 GB  8.00 GB  all-gather 0.88 GB, all-reduce 35.25 GB, collective-permute 1.69 GB
    16x16           dot     0.15 GB  8.04 GB  all-gather 1.01 GB, all-reduce 47.40 GB, collective-permute 2.04 GB
    32x8            kd      0.13 GB  4.48 GB  all-gather 0.85 GB, all-reduce 17.83 GB, all-to-all 0.34 GB, collective-permute 3.33 GB
    32x8            dot     0.16 GB  4.82 GB  all-gather 1.08 GB, all-reduce 23.91 GB, all-to-all 0.47 GB, collective-permute 4.01 GB
    64x4            kd      0.12 GB  2.15 GB  all-gather 4.39 GB, all-reduce 8.42 GB, all-to-all 0.17 GB, collective-permute 0.00 GB
    64x4            dot     0.14 GB  2.18 GB  all-gather 4.96 GB, all-reduce 10.88 GB, all-to-all 0.23 GB, collective-permute 0.00 GB

of the 16 GB that a chip has. The teacher has the shapes of Llama-2-7B, the student those of TinyLlama. `64x4` are 64 groups
of 4 chips: a group shares each sequence (`--config.model_devices=4`). `state` is what lies there between steps: teacher,
student, momenta. `collectives` are the bytes that they return on a chip in a step, those in loops as often as the loops run.

Most of it are the two sums over a group that each layer needs of its activations: smaller groups have fewer sequences for
each chip, and move and keep less. What is gathered are the weights, each layer's when it is due. DOT goes back through the
student twice.
"""

import argparse
import functools
import json
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils, topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dot_optax
from benchmarks.pod_cost import BYTES
from examples.distill import methods
from examples.language_model import jobs, losses, model, steps
from examples.language_model.configs import llama_pod
from examples.trainer import parallel
from examples.trainer.step import init_state

# Llama-2-7B and the config's student, TinyLlama-1.1B.
TEACHER = model.Architecture(32_000, 4096, 32, 32, 32, 128, 11_008, tied_embeddings=False)
STUDENT = jobs.architecture(llama_pod.get_config().student.model, TEACHER.vocabulary)
SEPARATOR = 2


def network(architecture, dtype):
    """Returns (graphdef, params), with shapes in the place of arrays; parameters of `dtype`, computing in bfloat16."""
    abstract = nnx.eval_shape(lambda: model.build(architecture, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graphdef, params = model.split(abstract)
    return graphdef, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)


def compile_step(method, mesh, *, batch_size, length, teacher=TEACHER, student=STUDENT):
    """Returns the compiled train step of a student with parameters and momenta in float32, and a teacher in bfloat16."""
    config = llama_pod.get_config()
    spec = functools.partial(model.sharding_spec, mesh=mesh)
    student_graph, params = network(student, jnp.float32)
    teacher_graph, teacher_params = network(teacher, jnp.bfloat16)
    weights = dot_optax.PerLoss(config.distillation.task_weight, config.distillation.kd_weight)
    summed = methods.weights_of_the_sum(method, weights)
    given = dot_optax.PerLoss(1.0, 1.0) if summed else weights
    optimizer = methods.build(method, config.optimizer, given, 1000, config.epochs, matrices=model.matrices)
    loss = losses.build(config.distillation, student.vocabulary)
    problem = steps.Problem(student_graph, teacher_graph, loss, SEPARATOR, config.remat, mesh)
    layout = parallel.jit_layout(mesh, spec=spec)
    step = steps.make_train_step(problem, optimizer, layout, gradient_metrics=False, summed=summed)

    def placed(tree):
        def place(path, leaf):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec(path, leaf)))

        return jax.tree.map_with_path(place, tree)

    state = jax.eval_shape(lambda params: init_state(params, {}, optimizer), params)
    tokens = jax.ShapeDtypeStruct((batch_size, length + 1), jnp.int32, sharding=NamedSharding(mesh, P(parallel.AXIS)))
    return step.lower(placed(state), placed(teacher_params), {"tokens": tokens}).compile()


def collectives(hlo):
    """Returns how many bytes each kind of collective returns on a chip, those inside loops as often as these run.

    What runs beside other work appears in several parts, of one channel, and counts once.
    """
    computations, root = {}, None
    for text in hlo.split("\n}\n"):
        if header := re.search(r"^(ENTRY )?%(\S+) \(.*\{$", text, re.MULTILINE):
            computations[header[2]] = text[header.end() :]
            root = header[2] if header[1] else root
    found = {}

    def visit(name, times):
        for line in computations[name].splitlines():
            pattern = r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
            if operation := re.search(pattern, line):
                count = sum(
                    BYTES.get(dtype, 4) * int(np.prod([int(n) for n in dims.split(",") if n], dtype=int))
                    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", operation[1])
                )
                channel = re.search(r"channel_id=(\d+)", line)
                key = channel[1] if channel else line
                found[key] = (operation[2], count, min(times, found.get(key, (0, 0, times))[2]))
            if loop := re.search(r" while\(.*condition=%([^\s,]+), body=%([^\s,]+)", line):
                # A loop counts up to a constant in its condition.
                limits = re.findall(r"constant\((\d+)\)", computations[loop[1]])
                visit(loop[2], times * max(map(int, limits), default=1))
                continue
            for called in re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%([^\s,}]+)", line):
                visit(called, times)
            for branches in re.findall(r"branch_computations=\{(.*?)\}", line):
                for called in re.findall(r"%([^\s,}]+)", branches):
                    visit(called, times)

    visit(root, 1)
    total = {}
    for kind, count, times in found.values():
        total[kind] = total.get(kind, 0) + count * times
    return dict(sorted(total.items()))


def cost(compiled):
    memory = compiled.memory_analysis()
    return {
        "state_gb": memory.argument_size_in_bytes / 1e9,
        "memory_gb": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9,
        "collective_gb": {kind: count / 1e9 for kind, count in collectives(compiled.as_text()).items()},
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:16x16")
    parser.add_argument("--meshes", nargs="+", default=("16x16", "32x8", "64x4"), help="devices of data x model")
    parser.add_argument("--batch_size", type=int, default=256, help="sequences")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--methods", nargs="+", default=("kd", "dot"), choices=("kd", "dot"))
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    args = parser.parse_args(argv)

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would look for the machine it thinks it runs on.
    devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    rows = []
    print(f"{f'per chip of {len(devices)}':15} method    state   memory  collectives")
    for name in args.meshes:
        grid = mesh_utils.create_device_mesh(tuple(map(int, name.split("x"))), devices, allow_split_physical_axes=True)
        mesh = jax.sharding.Mesh(grid, (parallel.AXIS, parallel.MODEL_AXIS))
        for method in args.methods:
            row = cost(compile_step(method, mesh, batch_size=args.batch_size, length=args.length))
            rows.append({"mesh": name, "method": method} | row)
            moved = ", ".join(f"{kind} {count:.2f} GB" for kind, count in row["collective_gb"].items())
            print(
                f"{name:15} {method:6} {row['state_gb']:5.2f} GB {row['memory_gb']:5.2f} GB  {moved}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
