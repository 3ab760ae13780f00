"""What does a training step cost, of each way to take the gradients of both losses, against plain distillation?

    python -m benchmarks.train_step                                    compiles, and times few rows on the CPU
    python -m benchmarks.train_step --tpu --checkpoint no              compiles for a TPU v5e that need not be there
    python -m benchmarks.train_step --trainer                          what the example's trainer adds to a step

prints, for ResNet50 -> MobileNetV1, ResNet32x4 -> ResNet8x4 and a CNN -> ViT, FLOPs, bytes and memory from the compiler and
times, all in units of plain KD. The tables that were printed are in benchmarks/README.md.

The forms are `dot_optax.value_and_grads` and the three of `dot_optax._sampling`, with k = 4. Each kind of step is compiled apart
(the step's number is a Python number), and "on average" is over a turn: of FLOPs, bytes and times the mean, of memory the
most. "one program for all" has a `lax.switch` between the kinds; its time is a turn's, divided by the length of the turn, and
its FLOPs and bytes are left out, since the compiler counts branches that no step takes together. With checkpoints, each block of
the student is computed anew in a backward pass (`nnx.remat`, which is `jax.checkpoint`).

The FLOPs of MobileNetV1 are right with --tpu only: for CPUs the compiler counts the gradient of a depthwise convolution as that
of a dense one. The memory that checkpoints save is seen there, too: the compiler for CPUs joins what was computed twice.
"""

import functools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import dot_optax
from benchmarks import _measure
from examples.distill import methods, models, steps
from examples.distill.command_line import parse
from examples.trainer import parallel
from examples.trainer.step import init_state

CONFIGS = ("imagenet_r50_mobilenetv1", "cifar100_r32x4_r8x4", "fashion_mnist_vit")
ROWS = {
    "imagenet_r50_mobilenetv1": 4,
    "cifar100_r32x4_r8x4": 16,
    "fashion_mnist_vit": 128,
}  # so that a step takes a second
CLASSES = {"cifar100": 100, "imagenet2012": 1000, "fashion_mnist_idx": 10}


ONE = "one program for all"  # lax.switch between the kinds


class Form(NamedTuple):
    """A way to take gradients."""

    gradients: Callable[..., Any]  # (step, params, batch, rest, teacher) -> ((losses, rest), grads)
    kinds: dict[str, tuple[int, float]]  # of steps, by what they compute: one of its steps, and its share of a turn
    optimizer: str = "dot"


def forms(loss_fn: Callable[..., Any], period: int) -> dict[str, Form]:
    """The forms of `loss_fn(params, batch, rest, teacher) -> (PerLoss, rest)`."""

    def total(*args: Any) -> Any:
        losses, rest = loss_fn(*args)
        return sum(losses), (losses, rest)

    def plain(step: Any, *args: Any) -> Any:
        (_, aux), grads = jax.value_and_grad(total, has_aux=True)(*args)
        return aux, grads

    def exact(step: Any, *args: Any) -> Any:
        return dot_optax.value_and_grads(loss_fn, has_aux=True)(*args)

    k, rest = period, 1 - 1 / period
    losses = functools.partial(dot_optax.sampled_losses, loss_fn, has_aux=True)
    return {
        "KD": Form(plain, {"both": (0, 1)}, "kd"),
        "DOT": Form(exact, {"both": (0, 1)}),
        f"losses, {k}": Form(losses({"kd": k}), {"both": (0, 1 / k), "task": (1, rest)}),
        "alternating": Form(losses({"task": 2, "kd": 2}), {"task": (0, 0.5), "KD": (1, 0.5)}),
        f"difference, {k}": Form(
            dot_optax.sampled_difference(loss_fn, k, has_aux=True), {"both": (0, 1 / k), "sum": (1, rest)}
        ),
        f"examples, {k}": Form(
            dot_optax.sampled_examples(loss_fn, {"kd": k}, batch_argnums=1, has_aux=True), {"task, part of KD": (0, 1)}
        ),
    }


class Remat(nnx.Module):
    """A block whose activations are computed anew in the backward pass."""

    def __init__(self, block: nnx.Module):
        self.block = block

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.remat(lambda block, x: block(x))(self.block, x)


def network(entry: Any, num_classes: int, image_shape: tuple[int, ...], remat: bool = False, **options: Any) -> Any:
    """Returns (graphdef, params, rest), with shapes in the place of arrays."""

    def build() -> nnx.Module:
        fields = dict(entry)
        name = fields.pop("name")
        model = models.build(name, num_classes, input_shape=image_shape, rngs=nnx.Rngs(0), **fields, **options)
        if remat:
            lists = [module for _, module in nnx.iter_modules(model) if isinstance(module, nnx.List)]
            for blocks in lists:
                for i, block in enumerate(blocks):
                    if not isinstance(block, nnx.List):
                        blocks[i] = Remat(block)
        return model

    return models.split(nnx.eval_shape(build))


class Problem(NamedTuple):
    loss_fn: Callable[..., Any]
    optimizers: dict[str, optax.GradientTransformation]
    params: Any
    rest: Any
    teacher: Any
    batch: Callable[[int], Any]


def problem(name: str, *, remat: bool = False, dtype: str = "float32") -> Problem:
    config = parse([f"--config={name}"]).config
    dataset, size = config.dataset, config.dataset.image_size
    shape, classes = (size, size, len(dataset.mean)), CLASSES[dataset.name]
    student, params, rest = network(config.student.model, classes, shape, remat, dtype=dtype)
    teacher, *teacher_variables = network(config.teacher.model, classes, shape, dtype=dtype)
    weights, temperature = config.distillation, config.distillation.temperature

    def loss_fn(params: Any, batch: Any, rest: Any, variables: Any) -> Any:
        images, labels = batch
        logits, rest = models.apply(student, params, rest, images, train=True)
        teacher_logits, _ = models.apply(teacher, *variables, images, train=False)
        task = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        kd = dot_optax.losses.kd_loss(logits, teacher_logits, temperature).mean()
        return dot_optax.PerLoss(weights.task_weight * task, weights.kd_weight * kd), rest

    rate, decay, beta = config.optimizer.learning_rate, config.optimizer.weight_decay, config.optimizer.momentum
    momenta = dot_optax.betas(beta, config.optimizer.delta)
    if config.optimizer.name == "adamw":
        kd = optax.adamw(rate, beta, weight_decay=decay)
        dot = dot_optax.dot_adamw(rate, *momenta, weight_decay=decay)
    else:
        kd = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum=beta))
        dot = dot_optax.dot(rate, *momenta, weight_decay=decay)

    def batch(rows: int) -> Any:
        return jax.ShapeDtypeStruct((rows, *shape), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.int32)

    return Problem(loss_fn, {"kd": kd, "dot": dot}, params, rest, tuple(teacher_variables), batch)


def train_step(form: Form, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """A step of the library alone: gradients and update, without what a trainer adds."""

    def step(number: Any, state: Any, teacher: Any, batch: Any) -> Any:
        params, rest, opt_state = state
        (losses, rest), grads = form.gradients(number, params, batch, rest, teacher)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), rest, opt_state), losses

    return step


def compile_step(problem: Problem, form: Form, number: int | None, rows: int, place: Callable[[Any], Any]) -> Any:
    """Compiles the kind of step that has this number, or for None one program of all kinds."""
    optimizer = problem.optimizers[form.optimizer]
    state = problem.params, problem.rest, jax.eval_shape(optimizer.init, problem.params)
    arguments = place((state, problem.teacher, problem.batch(rows)))
    step = train_step(form, optimizer)
    if number is None:
        counter = place(jax.ShapeDtypeStruct((), jnp.int32))
        return jax.jit(step, donate_argnums=1).lower(counter, *arguments).compile()
    return jax.jit(functools.partial(step, number), donate_argnums=0).lower(*arguments).compile()


def costs(compiled: Any) -> dict[str, float]:
    """What the compiler says of a program: FLOPs, bytes that go to and from memory, and memory that it needs at once."""
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return {
        "flops": analysis["flops"],
        "bytes": analysis["bytes accessed"],
        # What is donated is an argument, and the memory of the output.
        "memory": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
    }


def arrays(tree: Any, seed: int = 0) -> Any:
    """Numbers for shapes: kernels of He et al.'s size, so that a step computes with normal numbers."""
    rng = np.random.default_rng(seed)

    def fill(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if name == "kernel":
            return jnp.asarray(rng.normal(0, math.sqrt(2 / math.prod(leaf.shape[:-1])), leaf.shape), leaf.dtype)
        return jnp.full(leaf.shape, name in ("scale", "var"), leaf.dtype)

    return jax.tree.map_with_path(fill, tree)


def calls(problem: Problem, programs: dict[Any, Any], forms: dict[str, Form], rows: int) -> dict[Any, Any]:
    """Functions without arguments that make a step each, and wait for nothing."""
    rng = np.random.default_rng(1)
    images, labels = problem.batch(rows)
    batch = jnp.asarray(rng.normal(size=images.shape), images.dtype), jnp.zeros(labels.shape, labels.dtype)
    teacher = arrays(problem.teacher)

    def call_of(name: str, kind: str, compiled: Any) -> Callable[[], Any]:
        params = arrays(problem.params)
        kept = [(params, arrays(problem.rest), problem.optimizers[forms[name].optimizer].init(params)), 0]

        def call() -> Any:
            state, number = kept
            numbers = [jnp.int32(number)] if kind == ONE else []
            state, losses = compiled(*numbers, state, teacher, batch)
            kept[:] = state, number + 1
            return state, losses

        return call

    return {(name, kind): call_of(name, kind, compiled) for (name, kind), compiled in programs.items()}


def measure(config: str, args: Any, *, remat: bool, place: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """The rows of a table."""
    step = problem(config, remat=remat, dtype="bfloat16" if args.tpu else "float32")
    rows = args.rows or (parse([f"--config={config}"]).config.batch_size if args.tpu else ROWS[config])
    ways = forms(step.loss_fn, args.period)
    wanted = [(name, kind, number) for name, way in ways.items() for kind, (number, _) in way.kinds.items()]
    wanted += [(name, ONE, None) for name, way in ways.items() if len(way.kinds) > 1 and not remat]
    programs = {
        (name, kind): compile_step(step, ways[name], number, rows, place)
        for name, kind, number in sorted(wanted, key=lambda item: list(ways).index(item[0]))
    }
    found = {key: costs(compiled) for key, compiled in programs.items()}
    if args.rounds and not args.tpu:
        # A call of a program with all kinds is a whole turn.
        single = calls(step, programs, ways, rows)
        turns = {key: len_of_turn(ways[key[0]]) if key[1] == ONE else 1 for key in programs}
        whole = {key: functools.partial(several, call, turns[key]) for key, call in single.items()}
        seconds = _measure.alternate(whole, args.rounds)
        for key, taken in seconds.items():
            found[key]["seconds"] = [second / turns[key] for second in taken]
    table = []
    for name, way in ways.items():
        for kind in way.kinds:
            table.append({"form": name, "step": kind} | found[name, kind])
        if len(way.kinds) > 1:
            table.append({"form": name, "step": "on average"} | average(way, {k: found[name, k] for k in way.kinds}))
        if (name, ONE) in found:  # its FLOPs and bytes are those of all branches together, which no step makes
            row = {key: value for key, value in found[name, ONE].items() if key not in ("flops", "bytes")}
            table.append({"form": name, "step": ONE} | row)
    return [{"config": config, "rows": rows, "checkpoint": remat} | row for row in table]


def measure_trainer(config: str, args: Any) -> list[dict[str, Any]]:
    """What the step of the example's trainer costs: it also logs norms, and skips a step that is not finite."""
    settings = parse([f"--config={config}"]).config
    dataset, size = settings.dataset, settings.dataset.image_size
    rows, shape, classes = args.rows or ROWS[config], (size, size, len(dataset.mean)), CLASSES[dataset.name]
    student, params, rest = network(settings.student.model, classes, shape)
    teacher, *variables = network(settings.teacher.model, classes, shape)
    weights = dot_optax.PerLoss(settings.distillation.task_weight, settings.distillation.kd_weight)
    whole = steps.Problem(student, teacher, settings.distillation.temperature, dataset.mean, dataset.std)
    layout = parallel.jit_layout(jax.sharding.Mesh(np.array(jax.devices()[:1]), (parallel.AXIS,)))
    image, label = jax.ShapeDtypeStruct((rows, *shape), jnp.uint8), jax.ShapeDtypeStruct((rows,), jnp.int32)
    table = []
    for method in ("kd", "dot"):
        for logged in (False, True):
            summed = None if logged else methods.weights_of_the_sum(method, weights)
            weights_left = dot_optax.PerLoss(1.0, 1.0) if summed else weights
            optimizer = methods.build(
                method, settings.optimizer, weights_left, steps_per_epoch=1000, epochs=settings.epochs
            )
            state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer), params, rest)
            step = steps.make_train_step(whole, optimizer, layout, gradient_metrics=logged, summed=summed)
            found = costs(step.lower(state, tuple(variables), {"image": image, "label": label}).compile())
            kind = "both, and their norms" if logged else "sum" if summed else "both"
            table.append({"form": f"trainer, {method}", "step": kind} | found)
    return [{"config": config, "rows": rows, "checkpoint": False} | row for row in table]


def several(call: Callable[[], Any], count: int) -> Any:
    for _ in range(count):
        result = call()
    return result


def len_of_turn(way: Form) -> int:
    return round(1 / min(share for _, share in way.kinds.values()))


def average(way: Form, found: dict[str, Any]) -> dict[str, Any]:
    """Over a turn; of the memory, the most."""
    shares = {kind: share for kind, (_, share) in way.kinds.items()}
    result = {key: sum(share * found[kind][key] for kind, share in shares.items()) for key in ("flops", "bytes")}
    result["memory"] = max(row["memory"] for row in found.values())
    if all("seconds" in row for row in found.values()):
        rounds = zip(*(found[kind]["seconds"] for kind in shares), strict=True)
        result["seconds"] = [
            sum(share * second for share, second in zip(shares.values(), each, strict=True)) for each in rounds
        ]
    return result


def show(table: list[dict[str, Any]]) -> str:
    first = table[0]  # KD

    def row(found: dict[str, Any]) -> list[str]:
        ratios = [f"{found[key] / first[key]:.2f}" if key in found else "" for key in ("flops", "bytes", "memory")]
        timed = [str(_measure.ratio(found["seconds"], first["seconds"]))] if "seconds" in found else []
        return [found["form"], found["step"], *ratios, *timed]

    header = ["form", "step computes", "FLOPs", "bytes", "memory"] + ["time"] * ("seconds" in first)
    checkpoint = ", jax.checkpoint around each block" if first["checkpoint"] else ""
    title = (
        f"{first['config']}, {first['rows']} rows{checkpoint}; KD is {first['flops'] / 1e9:.2f} GFLOP,"
        f" {first['bytes'] / 1e9:.2f} GB moved, {first['memory'] / 1e6:.0f} MB of memory"
    )
    return f"{title}\n\n{_measure.table(header, map(row, table))}\n"


def tpu_chip() -> Callable[[Any], Any]:
    """Puts shapes on a TPU v5e, which need not be there."""
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would look for the machine it thinks it runs on.
    chip = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=(1, 1, 1))
    sharding = jax.NamedSharding(jax.sharding.Mesh(np.array(chip.devices), ("data",)), jax.P())
    return lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def main(argv: Any = None) -> None:
    parser = _measure.parser(__doc__)
    parser.add_argument("--configs", nargs="+", default=CONFIGS, choices=CONFIGS)
    parser.add_argument("--period", type=int, default=4, help="k")
    parser.add_argument("--rows", type=int, help="of a batch; default: few on the CPU, the config's for a TPU")
    parser.add_argument("--rounds", type=int, default=7, help="of timing; 0: compile only")
    parser.add_argument("--checkpoint", nargs="+", default=("no", "yes"), choices=("no", "yes"))
    parser.add_argument("--tpu", action="store_true", help="compile for a TPU v5e, in bfloat16; nothing is timed")
    parser.add_argument("--trainer", action="store_true", help="compile the steps of examples/trainer instead")
    args = parser.parse_args(argv)
    place = tpu_chip() if args.tpu else lambda tree: tree
    tables = []
    print(_measure.machine(), end="\n\n")
    if args.trainer:
        for config in args.configs:
            bare = problem(config)
            rows = args.rows or ROWS[config]
            plain = costs(compile_step(bare, forms(bare.loss_fn, args.period)["KD"], 0, rows, lambda tree: tree))
            kd = {"config": config, "rows": rows, "checkpoint": False, "form": "KD", "step": "both"} | plain
            tables += [[kd, *measure_trainer(config, args)]]
            print(show(tables[-1]), flush=True)
        _measure.write(args.json, [row for table in tables for row in table])
        return
    for config in args.configs:
        for checkpoint in args.checkpoint:
            tables += [measure(config, args, remat=checkpoint == "yes", place=place)]
            print(show(tables[-1]), flush=True)
    _measure.write(args.json, [row for table in tables for row in table])


if __name__ == "__main__":
    main()
