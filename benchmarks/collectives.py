"""What do the devices of a data-parallel training step say to each other, of each way to take gradients?  Compiled only.

    python -m benchmarks.collectives --topologies cpu                  4 virtual devices
    python -m benchmarks.collectives --topologies v5e:16x16            256 chips that need not be there; needs jax[tpu]

prints for a residual MLP, in each layout and of each kind of step, how often the bytes of the parameters come out of
collectives on a device, and which these are. The tables that were printed are in benchmarks/README.md.

The layouts: `jit` with replicated or with divided parameters; `shard_map`, where JAX adds the gradients up, where the
user averages them, or where `dot_optax.average_over` averages the update. In "one program for all" a `lax.switch` chooses
the kind of step: "bytes" is what moves at every step, "bytes in branches" what further moves in a step of each kind.
"""

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dot_optax
from benchmarks import _measure
from benchmarks.pod_cost import BYTES
from benchmarks.train_step import ONE, Form, forms

AXIS, CLASSES = "data", 100
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
LAYOUTS = (
    "jit",
    "jit, parameters divided",
    "shard_map, sums by JAX",
    "shard_map, pmean of gradients",
    "shard_map, average_over",
)


class Shapes(NamedTuple):
    """A student, which is a residual MLP, and its training; the teacher is twice as deep."""

    width: int = 256
    depth: int = 2
    losses: int = 2
    rows: int = 8  # of a batch, on each device

    def params(self) -> Any:
        leaf = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        block = {"in": leaf((self.width, 4 * self.width)), "out": leaf((4 * self.width, self.width))}
        return {"blocks": [dict(block) for _ in range(self.depth)], "head": leaf((self.width, CLASSES))}


def network(params: Any, x: jax.Array) -> jax.Array:
    for block in params["blocks"]:
        x = x + jax.nn.relu(x @ block["in"]) @ block["out"]
    return x @ params["head"]


def loss_fn(count: int) -> Callable[..., Any]:
    """Losses of the same network: of the labels, and of the teacher's logits at several temperatures."""

    def losses_of(params: Any, batch: Any, rest: Any, teacher: Any) -> tuple[Any, Any]:
        x, labels = batch
        logits, wanted = network(params, x), network(teacher, x)
        task = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        kd = [dot_optax.losses.kd_loss(logits, wanted, 2.0**i).mean() for i in range(1, count)]
        if count == 2:
            return dot_optax.PerLoss(task, *kd), rest
        return {"task": task} | {f"kd{i}": loss for i, loss in enumerate(kd)}, rest

    return losses_of


def compile_step(
    form: Form,
    number: int | None,
    mesh: jax.sharding.Mesh,
    layout: str,
    shapes: Shapes,
    optimizer: optax.GradientTransformation,
) -> Any:
    """Compiles the kind of step that has this number, or for None one program of all kinds."""
    params = shapes.params()
    teacher = shapes._replace(depth=2 * shapes.depth).params()
    rows = shapes.rows * mesh.size
    batch = jax.ShapeDtypeStruct((rows, shapes.width), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    state = jax.eval_shape(optimizer.init, params)
    local = layout.startswith("shard_map")
    stays = layout == "shard_map, average_over"  # each device has a state of its own

    def step(number: Any, params: Any, state: Any, teacher: Any, batch: Any) -> Any:
        if stays:
            state = jax.tree.map(lambda leaf: leaf[0], state)
        varying = local and "JAX" not in layout
        mine = jax.lax.pcast(params, AXIS, to="varying") if varying else params
        (losses, _), grads = form.gradients(number, mine, batch, (), teacher)
        if "JAX" in layout:
            grads = jax.tree.map(lambda g: g / mesh.size, grads)
        if "pmean" in layout:
            grads = jax.lax.pmean(grads, AXIS)
        updates, state = optimizer.update(grads, state, params)
        if stays:
            updates, _ = dot_optax.average_over(AXIS).update(updates, optax.EmptyState())
            state = jax.tree.map(lambda leaf: leaf[None], state)
        losses = jax.lax.pmean(losses, AXIS) if local else losses
        return optax.apply_updates(params, updates), state, losses

    def sharding(leaf: Any) -> jax.NamedSharding:
        divided = layout == "jit, parameters divided" and len(leaf.shape) == 2
        return jax.NamedSharding(mesh, jax.P(AXIS) if divided and leaf.shape[0] % mesh.size == 0 else jax.P())

    def put(tree: Any, sharding: Callable[[Any], Any]) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x)), tree)

    parts = jax.NamedSharding(mesh, jax.P(AXIS))
    if stays:
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct((mesh.size, *x.shape), x.dtype), state)
    placed = (
        put(params, sharding),
        put(state, (lambda leaf: parts) if stays else sharding),
        put(teacher, sharding),
        put(batch, lambda leaf: parts),
    )
    known = number is not None
    counter = [] if known else [put(jax.ShapeDtypeStruct((), jnp.int32), lambda leaf: jax.NamedSharding(mesh, jax.P()))]
    # `shard_map` would make an array of a number that it is given.
    program = functools.partial(step, number) if known else step
    options = {}
    if local:
        of_state = jax.P(AXIS) if stays else jax.P()
        specs = (*[jax.P() for _ in counter], jax.P(), of_state, jax.P(), jax.P(AXIS))
        program = jax.shard_map(program, mesh=mesh, in_specs=specs, out_specs=(jax.P(), of_state, jax.P()))
    else:
        replicated = jax.NamedSharding(mesh, jax.P())
        options["out_shardings"] = (jax.tree.map(sharding, params), jax.tree.map(sharding, state), replicated)
    donated = (len(counter), len(counter) + 1)
    return jax.jit(program, donate_argnums=donated, **options).lower(*counter, *placed).compile()


def collectives(hlo: str) -> list[dict[str, list[int]]]:
    """Of each kind of collective, how many there are, and how many bytes they return on a device, read off a program.

    The first entry is what runs at every step, the others what further runs in each branch of the conditionals.
    """
    bodies = {}
    for part in re.split(r"\n(?=(?:ENTRY )?%?[\w.-]+ \([^\n]*\{\n)", hlo):
        name = re.match(r"(ENTRY )?%?([\w.-]+) \(", part)
        if name:
            bodies["ENTRY" if name[1] else name[2]] = part

    def branches(line: str) -> list[str]:
        listed = re.search(r"branch_computations=\{(.*?)\}", line)
        named = re.findall(r"(?:true|false)_computation=%?([\w.-]+)", line)
        return re.findall(r"[\w.-]+", listed[1].replace("%", "")) if listed else named

    def count(name: str) -> list[dict[str, list[int]]]:
        always, others = {}, []
        for line in bodies[name].splitlines():
            found = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
            if found:
                shapes = re.findall(r"(\w+)\[([\d,]*)\]", found[1])
                if found[3] and found[2] != "all-reduce":  # those return their operands as well
                    shapes = shapes[len(shapes) // 2 :]
                sizes = [BYTES.get(t, 4) * int(np.prod([int(n) for n in d.split(",") if n])) for t, d in shapes]
                add(always, {found[2]: [1, sum(sizes)]})
            inside = branches(line)
            for i, branch in enumerate(inside):
                others += [{}] * (i + 1 - len(others))
                merged = dict(others[i])
                for part in count(branch):
                    add(merged, part)
                others[i] = merged
            for called in re.findall(r"(?:calls|body|to_apply|called_computations)=\{?%?([\w.-]+)", line):
                if called in bodies and not inside:
                    more = count(called)
                    add(always, more[0])
        return [always, *others]

    def add(total: dict[str, list[int]], more: Mapping[str, Sequence[int]]) -> None:
        for kind, (number, size) in more.items():
            before = total.get(kind, [0, 0])
            total[kind] = [before[0] + number, before[1] + size]

    return count("ENTRY")


def optimizers() -> dict[str, optax.GradientTransformation]:
    return {"kd": optax.sgd(0.1, momentum=0.9), "dot": dot_optax.dot(0.1)}


def measure(
    mesh: jax.sharding.Mesh, layout: str, period: int, shapes: Shapes, one: bool = True
) -> list[dict[str, Any]]:
    rows = []
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(shapes.params()))
    for name, form in forms(loss_fn(shapes.losses), period).items():
        optimizer = optimizers()[form.optimizer]
        kinds = [(kind, number) for kind, (number, _) in form.kinds.items()]
        for kind, number in kinds + [(ONE, None)] * (len(kinds) > 1 and one):
            compiled = compile_step(form, number, mesh, layout, shapes, optimizer)
            always, *branches = collectives(compiled.as_text())
            row = {"devices": mesh.size, "layout": layout, "form": name, "step": kind, "parameter bytes": size}
            rows.append(row | {"always": always, "branches": branches})
    return rows


def moved(row: Mapping[str, Any], found: Mapping[str, Sequence[int]]) -> float:
    """How many times the bytes of the parameters."""
    return sum(size for _, size in found.values()) / row["parameter bytes"]


def show(rows: Sequence[Mapping[str, Any]]) -> str:
    def cells(row: Mapping[str, Any]) -> list[str]:
        always = row["always"]
        counts = ", ".join(f"{number} {kind}" for kind, (number, _) in always.items()) or "none"
        branches = " or ".join(f"{moved(row, branch):.2f}" for branch in row["branches"] if any(row["branches"]))
        return [row["form"], row["step"], f"{moved(row, always):.2f}", counts, branches]

    header = ["form", "step computes", "bytes", "collectives", "bytes in branches"]
    title = f"{rows[0]['layout']}, {rows[0]['devices']} devices"
    return f"{title}\n\n{_measure.table(header, map(cells, rows))}\n"


def mesh_of(topology: str, devices: int) -> jax.sharding.Mesh:
    if topology == "cpu":
        return jax.sharding.Mesh(np.array(jax.devices("cpu")[:devices]), (AXIS,))
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would look for the machine it thinks it runs on.
    return jax.sharding.Mesh(
        np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices), (AXIS,)
    )


def main(argv: Any = None) -> None:
    parser = _measure.parser(__doc__)
    parser.add_argument("--topologies", nargs="+", default=("cpu", "v5e:16x16"))
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    parser.add_argument("--period", type=int, default=4, help="k")
    args = parser.parse_args(argv)
    if "cpu" in args.topologies and "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", 4)
    tables = []
    for topology in args.topologies:
        for layout in args.layouts:
            rows = measure(mesh_of(topology, 4), layout, args.period, Shapes())
            tables += [{"topology": topology} | row for row in rows]
            print(f"{topology}: {show(rows)}", flush=True)
    _measure.write(args.json, tables)


if __name__ == "__main__":
    main()
