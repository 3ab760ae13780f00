"""What does a training step of each experiment of the paper cost, and the whole run at least?  Compiled, not run.

    pip install "jax[tpu]"
    JAX_PLATFORMS=cpu python -m benchmarks.recipe_cost

compiles every config's step with DOT, in its own batch size and in bfloat16, for one TPU v5e chip, which need not be
there (what libtpu says to stderr about worker hostnames is no error), and prints in 10 minutes (libtpu 0.0.42, for JAX 0.10.2)

    one TPU v5e, bfloat16          batch  GFLOP/image  memory  bound by    images/s at most  hours at least
    cifar100_r32x4_r8x4               64         3.64  0.1 GB  traffic               21,894             0.2
    cifar100_vgg13_vgg8               64         1.21  0.1 GB  traffic               37,552             0.1
    cifar100_r32x4_shufflev2          64         2.47  0.3 GB  traffic                9,789             0.3
    tiny_imagenet_r18_mobilenetv2    256         6.58  2.9 GB  traffic                4,716             1.2
    tiny_imagenet_r18_shufflev2      256         6.14  2.4 GB  traffic                3,884             1.4
    imagenet_r34_r18                 512        23.33  7.5 GB  traffic                6,248             5.7
    imagenet_r50_mobilenetv1         512        14.08  8.0 GB  traffic                3,535            10.1

FLOP and memory are the compiler's. The hours are those of all training steps on a chip that is never idle: whichever
takes longer, the arithmetic at its 197 TFLOP/s or the traffic at its 819 GB/s. It is a bound from below, evaluation and
input not counted.
"""

import argparse
import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dot_optax
from examples.distill import methods, models, steps
from examples.distill.command_line import parse
from examples.trainer import parallel
from examples.trainer.step import init_state

CONFIGS = (
    "cifar100_r32x4_r8x4",
    "cifar100_vgg13_vgg8",
    "cifar100_r32x4_shufflev2",
    "tiny_imagenet_r18_mobilenetv2",
    "tiny_imagenet_r18_shufflev2",
    "imagenet_r34_r18",
    "imagenet_r50_mobilenetv1",
)
CLASSES = {"cifar100": 100, "tiny_imagenet": 200, "imagenet2012": 1000}
FLOPS_PER_SECOND, BYTES_PER_SECOND = 197e12, 819e9  # TPU v5e: bfloat16, HBM
FORMS = {
    "jit": parallel.jit_layout,
    "jit_sharded": functools.partial(parallel.jit_layout, shard_params=True),
    "pmap": parallel.pmap_layout,
    "shard_map": parallel.shard_map_layout,
}


def network(name, num_classes, dtype, axis_name=None):
    """Returns (graphdef, params, rest), with shapes in the place of arrays."""
    options = {"dtype": dtype, "axis_name": axis_name}
    return models.split(nnx.eval_shape(lambda: models.build(name, num_classes, rngs=nnx.Rngs(0), **options)))


def placed(form, mesh, state, teacher_variables, batch):
    """The shapes of a step's arguments in a form of parallelism, from those that one device alone would have."""

    def put(tree, sharding):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(leaf)), tree)

    def everywhere(leaf):
        return NamedSharding(mesh, P())

    def in_parts(leaf):
        return NamedSharding(mesh, P(parallel.AXIS))

    if form == "pmap":
        sizes = (mesh.size, -1)
        parts = jax.eval_shape(
            lambda batch: jax.tree.map(lambda leaf: leaf.reshape(*sizes, *leaf.shape[1:]), batch), batch
        )
        return state, teacher_variables, parts
    if form == "shard_map":  # each device has momenta of its own
        stacked = jax.eval_shape(
            lambda tree: jax.tree.map(lambda leaf: jnp.stack([leaf] * mesh.size), tree), state.opt_state
        )
        state = put(state._replace(opt_state=None), everywhere)._replace(opt_state=put(stacked, in_parts))
    else:
        state = put(state, functools.partial(parallel.state_sharding, mesh, divided=form == "jit_sharded"))
    return state, put(teacher_variables, everywhere), put(batch, in_parts)


def compile_step(config, mesh, *, form="jit", method="dot", dtype="bfloat16", batch_size=None):
    """Returns the compiled train step of a config."""
    layout = FORMS[form](mesh)
    classes, size = CLASSES[config.dataset.name], config.dataset.image_size
    student, params, rest = network(config.student.model.name, classes, dtype, layout.axis_name)
    teacher, *teacher_variables = network(config.teacher.model.name, classes, dtype)
    weights = dot_optax.PerLoss(config.distillation.task_weight, config.distillation.kd_weight)
    optimizer = methods.build(method, config.optimizer, weights, steps_per_epoch=1)
    problem = steps.Problem(student, teacher, config.distillation.temperature, config.dataset.mean, config.dataset.std)
    state = jax.eval_shape(lambda params, rest: init_state(params, rest, optimizer), params, rest)
    batch_size = batch_size or config.batch_size
    batch = {"image": ((batch_size, size, size, 3), jnp.uint8), "label": ((batch_size,), jnp.int32)}
    batch = {name: jax.ShapeDtypeStruct(*leaf) for name, leaf in batch.items()}
    arguments = placed(form, mesh, state, tuple(teacher_variables), batch)
    return steps.make_train_step(problem, optimizer, layout).lower(*arguments).compile()


def cost(config, dtype, chip):
    compiled = compile_step(config, jax.sharding.Mesh(chip, (parallel.AXIS,)), dtype=dtype)
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    flops, traffic = analysis["flops"], analysis["bytes accessed"]
    step_seconds = max(flops / FLOPS_PER_SECOND, traffic / BYTES_PER_SECOND)
    train_steps = config.epochs * (config.dataset.split_sizes.train // config.batch_size)
    return {
        "batch": config.batch_size,
        "gflop_per_image": flops / config.batch_size / 1e9,
        "gigabytes": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9,
        "bound": "arithmetic" if flops / FLOPS_PER_SECOND > traffic / BYTES_PER_SECOND else "traffic",
        "images_per_second": config.batch_size / step_seconds,
        "hours": train_steps * step_seconds / 3600,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    args = parser.parse_args(argv)

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would look for the machine it thinks it runs on.
    chip = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=(1, 1, 1))
    costs = {}
    print(f"{'one TPU v5e, ' + args.dtype:30} batch  GFLOP/image  memory  bound by    images/s at most  hours at least")
    for name in args.configs:
        costs[name] = row = cost(parse([f"--config={name}"]).config, args.dtype, chip.devices)
        print(
            f"{name:30} {row['batch']:5}  {row['gflop_per_image']:11.2f} {row['gigabytes']:4.1f} GB  {row['bound']:10}"
            f"  {row['images_per_second']:16,.0f}  {row['hours']:14.1f}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(costs, indent=1))


if __name__ == "__main__":
    main()
