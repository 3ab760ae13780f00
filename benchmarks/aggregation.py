"""What does aggregation of two losses cost in a step, of each weighting, against the sum of the losses and against TorchJD?

    pip install "torchjd[full]" && JAX_PLATFORMS=cpu python -m benchmarks.aggregation

trains an MLP (4 hidden layers of 512 units, 0.9 million parameters, batches of 256) with SGD on cross-entropy and the distance
to a teacher that contradicts the labels, whose logits are given, and prints times in units of one gradient of the summed loss in JAX, the memory of a step
beside what it is given (of JAX what the compiler says, of PyTorch the most that is allocated at once), and how far our aggregated
gradient, in float32, is from TorchJD's of the same two gradients in float64.  TorchJD runs eagerly, as its users run it, with its
default settings, which add 1e-4 to the diagonal of the Gram matrix of UPGrad.  Without TorchJD its columns are left out.
"""

import importlib.util
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dot_optax
from benchmarks import _measure
from dot_optax import PerLoss, weightings

LEARNING_RATE, WIDTH, DEPTH, ROWS, INPUTS, CLASSES = 1e-4, 512, 4, 256, 256, 10


class Pair(NamedTuple):
    """A weighting here, and what it is called in TorchJD: its class, its arguments, and the factor of its result."""

    weighting: weightings.Weighting
    theirs: str
    arguments: dict[str, Any]
    factor: float = 1.0


PAIRS = {
    "projected": Pair(weightings.projected(), "PCGrad", {}),
    "projected / 2": Pair(weightings.projected(), "UPGrad", {}, 2.0),
    "min_norm": Pair(weightings.min_norm(), "MGDA", {}),
    "bisector": Pair(weightings.bisector("config"), "ConFIG", {}),
    "bisector, imtl": Pair(weightings.bisector("imtl"), "IMTLG", {}),
    "bisector, nash": Pair(weightings.bisector("nash"), "NashMTL", {"n_tasks": 2}),
    "conflict_averse": Pair(weightings.conflict_averse(0.5), "CAGrad", {"c": 0.5}),
    "aligned": Pair(weightings.aligned(), "AlignedMTL", {}),
    "priority": Pair(weightings.priority(), "PCD", {}),
}
SUM, GRADIENTS, DOT = "sum: one gradient", "sum of two gradients", "dot"


def arrays(width: int) -> tuple[list[np.ndarray], tuple[np.ndarray, ...]]:
    """Kernels and a batch: images, labels, the teacher's logits."""
    rng = np.random.default_rng(0)
    sizes = [INPUTS, *[width] * DEPTH, CLASSES]
    kernels = [rng.normal(0, math.sqrt(2 / a), (a, b)).astype(np.float32) for a, b in itertools.pairwise(sizes)]
    x, logits = (rng.normal(size=(ROWS, size)).astype(np.float32) for size in (INPUTS, CLASSES))
    labels = rng.integers(CLASSES // 2, size=ROWS)
    # The teacher is sure of classes that are no label, so that the gradients oppose each other.
    logits[np.arange(ROWS), labels + CLASSES // 2] += 20
    return kernels, (x, labels, logits)


def loss_fn(kernels: list[Any], x: Any, y: Any, teacher: Any) -> PerLoss:
    for kernel in kernels[:-1]:
        x = jax.nn.relu(x @ kernel)
    logits = x @ kernels[-1]
    task = optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return PerLoss(task, dot_optax.losses.kd_loss(logits, teacher, 4.0).mean())


def jax_forms(width: int) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """Steps without arguments, and the bytes that each needs beside what it is given."""
    kernels, batch = jax.tree.map(jnp.asarray, arrays(width))

    def summed(kernels: Any) -> Any:
        return jax.grad(lambda kernels: sum(loss_fn(kernels, *batch)))(kernels)

    def apart(kernels: Any) -> Any:
        return dot_optax.value_and_grads(loss_fn)(kernels, *batch)[1]

    sgd = optax.sgd(LEARNING_RATE)
    ways = {SUM: (summed, sgd), GRADIENTS: (apart, optax.chain(dot_optax.sum_losses(), sgd))}
    ways[DOT] = apart, dot_optax.dot(LEARNING_RATE / 10)
    for name, pair in PAIRS.items():
        ways[name] = apart, optax.chain(dot_optax.aggregate(pair.weighting), sgd)
    forms, memory = {}, {}
    for name, (gradients, optimizer) in ways.items():

        def step(kernels: Any, state: Any, gradients: Any = gradients, optimizer: Any = optimizer) -> Any:
            updates, state = optimizer.update(gradients(kernels), state, kernels)
            return optax.apply_updates(kernels, updates), state

        start = jax.tree.map(jnp.copy, kernels), optimizer.init(kernels)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*start).compile()
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
        forms[name] = _repeated(compiled, start)
    return forms, memory


def _repeated(step: Callable[..., Any], start: Any) -> Callable[[], Any]:
    kept = [start]

    def call() -> Any:
        kept[0] = step(*kept[0])
        return kept[0]

    return call


def torch_forms(width: int) -> dict[str, Callable[[], Any]]:
    """Eager steps: TorchJD's backward pass and `torch.optim.SGD`."""
    import torch
    from torchjd import aggregation, autojac

    kernels, (x, y, teacher) = arrays(width)
    x, y, teacher = map(torch.from_numpy, (x, y, teacher))
    soft = torch.softmax(teacher / 4, 1)

    def losses(parameters: list[Any]) -> list[Any]:
        hidden = x
        for kernel in parameters[:-1]:
            hidden = torch.relu(hidden @ kernel)
        logits = hidden @ parameters[-1]
        student = torch.log_softmax(logits / 4, 1)
        return [
            torch.nn.functional.cross_entropy(logits, y),
            16 * torch.nn.functional.kl_div(student, soft, reduction="batchmean"),
        ]

    def form(aggregator: Any) -> Callable[[], Any]:
        parameters = [torch.from_numpy(kernel.copy()).requires_grad_() for kernel in kernels]
        optimizer = torch.optim.SGD(parameters, LEARNING_RATE)

        def step() -> None:
            if aggregator is None:
                sum(losses(parameters)).backward()
            else:
                autojac.backward(losses(parameters))
                autojac.jac_to_grad(parameters, aggregator)
            optimizer.step()
            optimizer.zero_grad()

        return step

    made = {name: getattr(aggregation, pair.theirs)(**pair.arguments) for name, pair in PAIRS.items()}
    return {name: form(aggregator) for name, aggregator in {SUM: None, **made}.items()}


def torch_memory(step: Callable[[], Any]) -> int:
    """The most bytes that a step has allocated at once."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(np.cumsum(changes).max())


def deviations(width: int) -> dict[str, float]:
    """Between our aggregated gradient and TorchJD's in float64, of the gradients at the start; relative to its norm."""
    import torch
    from torchjd import aggregation

    kernels, batch = arrays(width)
    grads = jax.jit(lambda kernels: dot_optax.value_and_grads(loss_fn)(kernels, *map(jnp.asarray, batch))[1])(kernels)
    jacobian = np.stack([np.concatenate([np.ravel(leaf) for leaf in tree]) for tree in grads])
    found = {}
    for name, pair in PAIRS.items():
        aggregator = getattr(aggregation, pair.theirs)(**pair.arguments)
        theirs = pair.factor * aggregator(torch.from_numpy(jacobian.astype(np.float64))).numpy()
        optimizer = dot_optax.aggregate(pair.weighting)
        ours = optimizer.update(grads, optimizer.init(kernels), kernels)[0]
        ours = np.concatenate([np.ravel(leaf) for leaf in ours])
        if name == "bisector, nash":  # theirs has another length
            ours, theirs = ours / np.linalg.norm(ours), theirs / np.linalg.norm(theirs)
        found[name] = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    return found


def main(argv: Any = None) -> None:
    parser = _measure.parser(__doc__)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(argv)
    with_torch = importlib.util.find_spec("torchjd") is not None
    busy = _measure.busy()
    forms, memory = jax_forms(args.width)
    forms, memory = {("JAX", name): form for name, form in forms.items()}, {("JAX", k): v for k, v in memory.items()}
    apart: dict[str, float] = {}
    if with_torch:
        theirs = torch_forms(args.width)
        apart = deviations(args.width)
        memory |= {("TorchJD", name): torch_memory(step) for name, step in theirs.items()}
        forms |= {("TorchJD", name): step for name, step in theirs.items()}
    else:
        print('TorchJD is not installed: pip install "torchjd[full]" adds its columns.\n')
    seconds = _measure.alternate(forms, args.rounds)
    base = seconds["JAX", SUM]
    kinds = ("JAX", "TorchJD") if with_torch else ("JAX",)

    def row(name: str) -> list[str]:
        known = [(kind, name) in forms for kind in kinds]
        times = [
            str(_measure.ratio(seconds[kind, name], base)) if k else "" for kind, k in zip(kinds, known, strict=True)
        ]
        megabytes = [f"{memory[kind, name] / 1e6:.0f}" if k else "" for kind, k in zip(kinds, known, strict=True)]
        return [name, *[PAIRS[name].theirs if name in PAIRS else ""] * with_torch, *times, *megabytes] + (
            [f"{apart[name]:.0e}" if name in apart else ""] if with_torch else []
        )

    header = [
        "",
        *["TorchJD's name"] * with_torch,
        *(f"time, {kind}" for kind in kinds),
        *(f"MB, {kind}" for kind in kinds),
    ]
    packages = ("torchjd", "torch") if with_torch else ()
    print(f"({_measure.machine('optax', *packages)}; {busy:.0%} busy before; 1.00 is {np.median(base) * 1e3:.1f} ms)\n")
    print(_measure.table(header + ["deviation"] * with_torch, map(row, (SUM, GRADIENTS, DOT, *PAIRS))))
    figures = {f"{kind}, {name}": {"seconds": seconds[kind, name], "bytes": memory[kind, name]} for kind, name in forms}
    _measure.write(args.json, {"steps": figures, "deviations": apart})


if __name__ == "__main__":
    main()
