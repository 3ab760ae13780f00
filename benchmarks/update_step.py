"""What does an update of DOT cost, against one momentum and against PyTorch?

    JAX_PLATFORMS=cpu python -m benchmarks.update_step

An update is bound by memory traffic: SGD with momentum makes 5 passes over arrays like the parameters, DOT 8, AdamW 7 and
DOT-AdamW 10. The command prints, for ResNet50 (25.6 M parameters) and SmolLM2-135M, how long each update takes against one
momentum and against DOT, and the same for PyTorch, with as many threads; how many bytes per parameter and how many kernels
the compilers for this machine and for a TPU v5e have (`pip install "jax[tpu]"`; no TPU need be there); and how long 1,000
parameters take to compile. `--parts` picks some of this. The tables are in benchmarks/README.md. In short, on a CPU:

    dot_optax.dot / optax.sgd                         1.64  (limit of memory traffic: 1.60)
    dot_optax.dot_adamw / optax.adamw                 1.57  (1.43)
    PyTorch's DOT, foreach / dot_optax.dot            1.32
    PyTorch's DOT, fused SGD twice / dot_optax.dot    0.71
    PyTorch's DOT-AdamW, foreach / dot_adamw          4.87

Compare with PyTorch on an idle machine only, or on one core (`taskset -c 1`, as these figures were taken): its threads wait
for each other in every operation.
"""

import argparse
import functools
import importlib.util
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import dot_optax
from benchmarks import _measure
from examples.distill import models

LEARNING_RATE, BETAS, MEAN_BETA = 1e-3, (0.825, 0.975), 0.9
B2, EPS, WEIGHT_DECAY = 0.999, 1e-8, 1e-4
NO_KERNELS = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}


class Update(NamedTuple):
    """An optimizer, how many gradients it takes, and how often it must read or write an array like the parameters."""

    optimizer: optax.GradientTransformation
    gradients: int
    reads: int
    writes: int

    @property
    def limit(self) -> int:
        """The least traffic in float32, in bytes per parameter."""
        return 4 * (self.reads + self.writes)


# SGD reads gradient, momentum and parameter, and writes the last two; AdamW has a second moment as well. DOT reads one
# gradient more, and reads and writes one momentum more.
UPDATES = {
    "optax.sgd": Update(optax.sgd(LEARNING_RATE, MEAN_BETA), 1, reads=3, writes=2),
    "dot_optax.dot": Update(dot_optax.dot(LEARNING_RATE, *BETAS), 2, reads=5, writes=3),
    "optax.adamw": Update(optax.adamw(LEARNING_RATE, MEAN_BETA, B2, EPS, weight_decay=WEIGHT_DECAY), 1, 4, 3),
    "dot_optax.dot_adamw": Update(
        dot_optax.dot_adamw(LEARNING_RATE, *BETAS, B2, EPS, weight_decay=WEIGHT_DECAY), 2, reads=6, writes=4
    ),
}
PARTS = ("times", "costs", "compile_times")
FAMILIES = {"sgd": ("optax.sgd", "dot_optax.dot"), "adamw": ("optax.adamw", "dot_optax.dot_adamw")}


def resnet50() -> Any:
    model = nnx.eval_shape(lambda: models.build("resnet50", 1000, rngs=nnx.Rngs(0)))
    return models.split(model)[1]


def smollm2(layers: int = 30, width: int = 576, heads: int = 9, kv_heads: int = 3, ffn: int = 1536) -> Any:
    """The shapes of SmolLM2-135M, whose output layer is its embedding."""
    kv = width // heads * kv_heads
    matrices = {"q": (width, width), "k": (width, kv), "v": (width, kv), "o": (width, width)}
    matrices |= {"gate": (width, ffn), "up": (width, ffn), "down": (ffn, width)}
    layer = matrices | {"attention_norm": (width,), "ffn_norm": (width,)}
    shapes = {"embedding": (49152, width), "norm": (width,), "layers": [layer] * layers}
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def leaves(count: int, size: int = 1000) -> Any:
    return [jax.ShapeDtypeStruct((size,), jnp.float32)] * count


NETWORKS = {"ResNet50": resnet50, "SmolLM2-135M": smollm2, "small": functools.partial(leaves, 4)}


def update_step(optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """Returns the jitted function from parameters, state and gradients to new parameters and state, in place."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def lower(update: Update, params: Any) -> Any:
    """Lowers the step of an update; the shapes of `params` say for which device."""
    sharding = jax.tree.leaves(params)[0].sharding
    state = jax.eval_shape(update.optimizer.init, params)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)
    return update_step(update.optimizer).lower(params, state, gradients_for(update, (params, params)))


def gradients_for(update: Update, grads: tuple[Any, Any]) -> Any:
    return dot_optax.PerLoss(*grads) if update.gradients == 2 else grads[0]


def compiled_cost(update: Update, params: Any) -> dict[str, float]:
    """Bytes per parameter and the number of kernels, as the compiler has them."""
    compiled = lower(update, params).compile()
    program = compiled.as_text()
    operations = re.findall(r"= .*?[\])}] ([a-z][\w-]*)\(", program[program.index("\nENTRY") :])
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {
        "bytes_per_parameter": compiled.cost_analysis()["bytes accessed"] / size,
        "kernels": sum(operation not in NO_KERNELS for operation in operations),
    }


def jax_form(update: Update, params: Any, grads: tuple[Any, Any]) -> Callable[[], Any]:
    """Returns a function that takes one step and returns the parameters and the state."""
    step, grads = update_step(update.optimizer), gradients_for(update, grads)
    carried = (jax.tree.map(jnp.copy, params), update.optimizer.init(params))

    def take() -> Any:
        nonlocal carried
        carried = step(*carried, grads)
        return carried

    return take


def torch_dot_foreach(
    g_task: list[Any], g_kd: list[Any], v_task: list[Any], v_kd: list[Any]
) -> Callable[[list[Any]], None]:
    import torch

    def step(theta: list[Any]) -> None:
        for v, g, beta in ((v_task, g_task, BETAS[0]), (v_kd, g_kd, BETAS[1])):
            torch._foreach_mul_(v, beta)
            torch._foreach_add_(v, g)
            torch._foreach_add_(theta, v, alpha=-LEARNING_RATE)

    return step


def torch_dot_fused(
    g_task: list[Any], g_kd: list[Any], v_task: list[Any], v_kd: list[Any]
) -> Callable[[list[Any]], None]:
    import torch

    options = {"weight_decay": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False, "is_first_step": False}

    def step(theta: list[Any]) -> None:
        for v, g, beta in ((v_task, g_task, BETAS[0]), (v_kd, g_kd, BETAS[1])):
            torch._fused_sgd_(theta, g, v, momentum=beta, lr=LEARNING_RATE, **options)

    return step


def torch_dot_adamw_foreach(
    g_task: list[Any], g_kd: list[Any], m_task: list[Any], m_kd: list[Any], nu: list[Any]
) -> Callable[[list[Any]], None]:
    import torch

    t = 0

    def step(theta: list[Any]) -> None:
        nonlocal t
        t += 1
        for m, g, beta in ((m_task, g_task, BETAS[0]), (m_kd, g_kd, BETAS[1])):
            torch._foreach_mul_(m, beta)
            torch._foreach_add_(m, g, alpha=1 - MEAN_BETA)
        total = torch._foreach_add(g_task, g_kd)
        torch._foreach_mul_(nu, B2)
        torch._foreach_addcmul_(nu, total, total, value=1 - B2)
        numerator = torch._foreach_div(m_task, 1 - BETAS[0] ** t)
        torch._foreach_add_(numerator, m_kd, alpha=1 / (1 - BETAS[1] ** t))
        denominator = torch._foreach_sqrt(nu)
        torch._foreach_div_(denominator, (1 - B2**t) ** 0.5)
        torch._foreach_add_(denominator, EPS)
        torch._foreach_mul_(theta, 1 - LEARNING_RATE * WEIGHT_DECAY)
        torch._foreach_addcdiv_(theta, numerator, denominator, value=-LEARNING_RATE)

    return step


def torch_forms(params: Any, grads: tuple[Any, Any], family: str) -> dict[str, Callable]:
    """The same updates in PyTorch, on the device of the arrays: functions that take one step and return the parameters."""
    import torch

    def tensors(tree: Any) -> list[Any]:
        return [torch.from_dlpack(leaf) for leaf in jax.tree.leaves(tree)]

    def own(tree: Any) -> list[Any]:
        return [leaf.clone() for leaf in tensors(tree)]

    def zeros() -> list[Any]:
        return [torch.zeros_like(leaf) for leaf in tensors(params)]

    g_task, g_kd = map(tensors, grads)

    def of(step: Callable[[list[Any]], Any]) -> Callable[[], Any]:
        theta = own(params)

        @torch.no_grad()
        def take() -> Any:
            step(theta)
            return theta

        return take

    def builtin(optimizer: type, **options: Any) -> Callable[[], Any]:
        theta = own(params)
        for leaf, g in zip(theta, g_task, strict=True):
            leaf.grad = g
        made = optimizer(theta, lr=LEARNING_RATE, **options)

        def take() -> Any:
            made.step()
            return theta

        return take

    if family == "adamw":
        adamw = functools.partial(builtin, torch.optim.AdamW, betas=(MEAN_BETA, B2), eps=EPS, weight_decay=WEIGHT_DECAY)
        return {
            "torch AdamW, foreach": adamw(foreach=True),
            "torch AdamW, fused": adamw(fused=True),
            "torch DOT-AdamW, foreach": of(torch_dot_adamw_foreach(g_task, g_kd, zeros(), zeros(), zeros())),
        }
    sgd = functools.partial(builtin, torch.optim.SGD, momentum=MEAN_BETA)
    forms = {
        "torch SGD, foreach": sgd(foreach=True),
        "torch SGD, fused": sgd(fused=True),
        "torch DOT, foreach": of(torch_dot_foreach(g_task, g_kd, zeros(), zeros())),
        "torch DOT, fused SGD twice": of(torch_dot_fused(g_task, g_kd, zeros(), zeros())),
    }
    return forms


def arrays(shapes: Any) -> tuple[Any, tuple[Any, Any]]:
    """Random parameters and two random gradients."""
    rng = np.random.default_rng(0)

    def random() -> Any:
        return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32)), shapes)

    return random(), (random(), random())


def has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def time_ratios(shapes: Any, family: str, args: argparse.Namespace) -> dict[str, dict[str, _measure.Ratio]]:
    """How long each form of an update took, against one momentum and against DOT."""
    params, grads = arrays(shapes)
    forms = {name: jax_form(UPDATES[name], params, grads) for name in FAMILIES[family]}
    if has_torch():
        forms |= torch_forms(params, grads, family)
    seconds = _measure.alternate(forms, args.rounds, warmup=3)
    return {
        name: {reference: _measure.ratio(taken, seconds[reference]) for reference in FAMILIES[family]}
        for name, taken in seconds.items()
    }


def print_times(networks: list[str], args: argparse.Namespace) -> dict[str, Any]:
    shares, figures = [_measure.busy()], {}
    for family, references in FAMILIES.items():
        by_network = {network: time_ratios(NETWORKS[network](), family, args) for network in networks}
        header = ["time of an update", *(f"{network} / {name}" for network in networks for name in references)]
        rows = []
        for form in by_network[networks[0]]:
            rows.append([form, *(ratios for network in networks for ratios in by_network[network][form].values())])
        print(_measure.table(header, rows), flush=True)
        one, dot = (UPDATES[name].limit for name in references)
        print(f"(limit of {references[1]} / {references[0]}, from memory traffic: {dot / one:.2f})\n")
        figures[family] = by_network
    shares.append(_measure.busy())
    print(f"Other programs used {shares[0]:.0%} of the processors before and {shares[1]:.0%} after this.\n")
    return {"ratios": figures, "busy": shares}


def tpu() -> jax.sharding.Sharding | None:
    """One TPU v5e to compile for, which need not be there; None where there is no compiler for it."""
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would look for the machine it thinks it runs on.
    try:
        chip = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=(1, 1, 1))
    except Exception:
        print('Nothing is compiled for TPUs: libtpu is missing (pip install "jax[tpu]"), or another program uses it.')
        return None
    return jax.sharding.SingleDeviceSharding(chip.devices[0])


def print_costs(network: str) -> dict[str, Any]:
    """Bytes and kernels of each update, by compiler."""
    shapes, figures = NETWORKS[network](), {}
    compilers = {jax.default_backend(): None}
    if sharding := tpu():
        compilers["TPU v5e"] = sharding
    for name, update in UPDATES.items():
        figures[name] = {"limit": update.limit}
        for compiler, sharding in compilers.items():
            placed = jax.tree.map(lambda x, s=sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes)
            figures[name][compiler] = compiled_cost(update, placed)
    header = [f"{network}: bytes per parameter (kernels)", "limit", *compilers]
    rows = [
        [name, row["limit"], *("{bytes_per_parameter:.2f} ({kernels})".format(**row[c]) for c in compilers)]
        for name, row in figures.items()
    ]
    print(_measure.table(header, rows), flush=True)
    return figures


def print_compile_times(count: int, rounds: int) -> dict[str, Any]:
    shapes = leaves(count)

    def compile_anew(update: Update) -> None:
        jax.clear_caches()
        lower(update, shapes).compile()

    forms = {name: functools.partial(compile_anew, update) for name, update in UPDATES.items()}
    seconds = _measure.alternate(forms, rounds, warmup=0)
    ratios = {name: _measure.ratio(taken, seconds["optax.sgd"]) for name, taken in seconds.items()}
    header = [f"{count} parameters", "time to trace and compile / optax.sgd"]
    print("\n" + _measure.table(header, ratios.items()), flush=True)
    return ratios


def main(argv=None):
    parser = _measure.parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["ResNet50", "SmolLM2-135M"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--compile_leaves", type=int, default=1000)
    parser.add_argument("--compile_rounds", type=int, default=3)
    args = parser.parse_args(argv)

    print(_measure.machine("optax", *(["torch"] if has_torch() else [])) + "\n")
    parts = {
        "times": lambda: print_times(args.networks, args),
        "costs": lambda: {network: print_costs(network) for network in args.networks[:1]},
        "compile_times": lambda: print_compile_times(args.compile_leaves, args.compile_rounds),
    }
    figures = {part: parts[part]() for part in args.parts}
    _measure.write(args.json, figures)


if __name__ == "__main__":
    main()
