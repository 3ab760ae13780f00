"""How do the costs of a step grow with chips, parameters and losses, against those of plain distillation?  Compiled only.

    python -m benchmarks.scaling                                       some minutes

compiles the steps of a residual MLP for 1 to 256 virtual CPU devices, 1 M to 1 G parameters and 2 to 5 losses, each changed
alone, and prints the costs of a device: those of KD in numbers, those of exact DOT and of DOT with all losses of the teacher at
every 4th step in units of KD. Of the latter it is the mean over a turn; of the memory, the most. Nothing is allocated.
The table that was printed is in benchmarks/README.md.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

import dot_optax
from benchmarks import _measure
from benchmarks.collectives import AXIS, LAYOUTS, Shapes, collectives, compile_step, loss_fn
from benchmarks.train_step import Form, costs

ROWS = 128  # of a batch, on each chip
CHIPS, WIDTHS, LOSSES = (1, 4, 16, 64, 256), (256, 768, 2560, 8192), (2, 3, 4, 5)
BASE = (16, 768, 2)
TIMES = ("flops", "bytes", "memory", "moved")


def points(chips: Sequence[int], widths: Sequence[int], losses: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Each of the three is changed alone."""
    base_chips, base_width, base_losses = min(BASE[0], jax.device_count()), *BASE[1:]
    everything = [(n, base_width, base_losses) for n in chips]
    everything += [(base_chips, width, base_losses) for width in widths]
    everything += [(base_chips, base_width, n) for n in losses]
    yield from dict.fromkeys(everything)


def ways(count: int, period: int) -> dict[str, tuple[Form, optax.GradientTransformation]]:
    """Plain distillation, exact DOT, and all losses of the teacher together at every k-th step."""
    pair = loss_fn(count)

    def losses_of(*args: Any) -> tuple[dict[str, jax.Array], Any]:  # a mapping, whatever their number
        losses, rest = pair(*args)
        named = losses._asdict() if count == 2 else losses
        return dict(named), rest

    def total(*args: Any) -> Any:
        losses, rest = losses_of(*args)
        return sum(losses.values()), (losses, rest)

    def plain(step: Any, *args: Any) -> Any:
        (_, aux), grads = jax.value_and_grad(total, has_aux=True)(*args)
        return aux, grads

    def exact(step: Any, *args: Any) -> Any:
        return dot_optax.value_and_grads(losses_of, has_aux=True)(*args)

    taught = ["kd"] if count == 2 else [f"kd{i}" for i in range(count - 1)]
    periods, offsets = dict.fromkeys(taught, period), dict.fromkeys(taught, 0)
    sampled = dot_optax.sampled_losses(losses_of, periods, offsets=offsets, has_aux=True)
    momenta = {"task": 0.825} | dict.fromkeys(taught, 0.975)
    sgd = optax.sgd(0.1, momentum=0.9)
    dot = optax.chain(dot_optax.scale_by_momenta(momenta), optax.scale(-0.1))
    kinds = {"all": (0, 1 / period), "task": (1, 1 - 1 / period)}
    return {
        "KD": (Form(plain, {"all": (0, 1)}), sgd),
        "DOT": (Form(exact, {"all": (0, 1)}), dot),
        f"losses, {period}": (Form(sampled, kinds), dot),
    }


def measure(point: tuple[int, int, int], layout: str, period: int) -> list[dict[str, Any]]:
    chips, width, losses = point
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:chips]), (AXIS,))
    shapes = Shapes(width=width, losses=losses, rows=ROWS)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.params()))
    rows = []
    for name, (form, optimizer) in ways(losses, period).items():
        row = dict.fromkeys(TIMES, 0.0)
        for number, share in form.kinds.values():
            compiled = compile_step(form, number, mesh, layout, shapes, optimizer)
            found = costs(compiled)
            found["moved"] = sum(size for _, size in collectives(compiled.as_text())[0].values())
            for key in ("flops", "bytes", "moved"):
                row[key] += share * found[key]
            row["memory"] = max(row["memory"], found["memory"])
        rows.append({"layout": layout, "chips": chips, "parameters": parameters, "losses": losses, "form": name} | row)
    return rows


def show(tables: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """KD in numbers, the others in units of KD."""

    def cells(first: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
        point = [f"{row['chips']}", f"{row['parameters'] / 1e6:,.0f} M", f"{row['losses']}", row["form"]]
        if row is first:
            units = {"flops": (1e9, "GFLOP"), "bytes": (1e6, "MB"), "memory": (1e6, "MB"), "moved": (1e6, "MB")}
            return point + [f"{row[key] / unit:,.0f} {name}" for key, (unit, name) in units.items()]
        return point + [f"{row[key] / first[key]:.2f}" if first[key] else "" for key in TIMES]

    header = ["chips", "parameters", "losses", "form", "FLOPs", "bytes", "memory", "moved between chips"]
    return _measure.table(header, [cells(table[0], row) for table in tables for row in table])


def main(argv: Any = None) -> None:
    parser = _measure.parser(__doc__)
    parser.add_argument("--chips", nargs="+", type=int, default=CHIPS)
    parser.add_argument(
        "--widths", nargs="+", type=int, default=WIDTHS, help="of the MLP: 1 M, 10 M, 105 M, 1 G parameters"
    )
    parser.add_argument("--losses", nargs="+", type=int, default=LOSSES)
    parser.add_argument("--layouts", nargs="+", default=("shard_map, average_over",), choices=LAYOUTS)
    parser.add_argument("--period", type=int, default=4, help="k")
    args = parser.parse_args(argv)
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", max(*args.chips, BASE[0]))
    everything = []
    for layout in args.layouts:
        chosen = list(points(args.chips, args.widths, args.losses))
        tables = [measure(point, layout, args.period) for point in chosen]
        everything += [row for table in tables for row in table]
        print(f"{layout}; each chip has {ROWS} rows of a batch\n\n{show(tables)}\n", flush=True)
    _measure.write(args.json, everything)


if __name__ == "__main__":
    main()
