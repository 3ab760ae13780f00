"""How fast are an update and a training step on this GPU, and what part of what the card can do is that?

    pip install "jax[cuda12]" torch
    python -m benchmarks.gpu

prints, for the update of DOT and of one momentum (see `update_step.py`) and for a training step of ImageNet's
ResNet34 -> ResNet18 with KD and with DOT, in JAX and in PyTorch: milliseconds, the percentage of the card's memory
bandwidth (updates: of the least traffic) or of its peak FLOP/s (steps: of the FLOPs of the networks), and ratios.

No table stands here yet: nobody has run it on a GPU. Without one it says so and prints ratios only, which is how it was
tried; `python -m benchmarks.gpu --smoke_test` takes a minute on a CPU.
"""

import functools
import os
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import dot_optax
from benchmarks import _measure, update_step
from benchmarks.update_step import BETAS, LEARNING_RATE, MEAN_BETA, UPDATES
from examples.distill import models
from examples.trainer.sampling import counted_flops

TASK_WEIGHT, KD_WEIGHT, TEMPERATURE = 0.5, 0.5, 4.0
SMALL = {"batch_size": 2, "image_size": 32, "rounds": 1, "repeat": 2, "network": "small"}


class Card(NamedTuple):
    """What a card can do at most: bytes per second, and FLOP per second in 16 bits and in float32 as networks use it."""

    bandwidth: float
    half: float
    single: float


# From NVIDIA's data sheets of the H100, H200, A100, V100, T4 and L4. Dense products on tensor cores: where a sheet gives
# the rate "with sparsity", half of it. float32 is TF32 where there is such a thing, as JAX computes by default.
CARDS = {
    "NVIDIA H100 80GB HBM3": Card(3.35e12, 989e12, 494e12),
    "NVIDIA H100 PCIe": Card(2.0e12, 756e12, 378e12),
    "NVIDIA H200": Card(4.8e12, 989e12, 494e12),
    "NVIDIA A100-SXM4-40GB": Card(1.555e12, 312e12, 156e12),
    "NVIDIA A100-SXM4-80GB": Card(2.039e12, 312e12, 156e12),
    "NVIDIA A100 80GB PCIe": Card(1.935e12, 312e12, 156e12),
    "Tesla V100-SXM2-16GB": Card(0.9e12, 125e12, 15.7e12),
    "Tesla V100-SXM2-32GB": Card(0.9e12, 125e12, 15.7e12),
    "Tesla T4": Card(0.32e12, 65e12, 8.1e12),
    "NVIDIA L4": Card(0.3e12, 121e12, 60e12),
}


class Form(NamedTuple):
    """A way to train: its optimizer, and from a loss function `params -> (PerLoss, aux)` to its gradients.

    `gradients(loss_fn)(params)` returns `((losses, aux), grads)`, and `optimizer` takes these grads.
    """

    optimizer: optax.GradientTransformation
    gradients: Callable[..., Any]


def gradient_of_the_sum(loss_fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def summed(params: Any) -> Any:
        losses, aux = loss_fn(params)
        return sum(losses), aux

    return jax.value_and_grad(summed, has_aux=True)


# Another form is another line here, if every step of it is the same program.
FORMS = {
    "KD": Form(optax.sgd(LEARNING_RATE, MEAN_BETA), gradient_of_the_sum),
    "exact DOT": Form(dot_optax.dot(LEARNING_RATE, *BETAS), functools.partial(dot_optax.value_and_grads, has_aux=True)),
}


def card(bandwidth: float | None, flops: float | None, dtype: str) -> tuple[float, float] | None:
    """Bytes and FLOP per second at most; None on a CPU, or if nobody knows."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        print("This is a CPU: no percentages and no milliseconds, only ratios.")
        return None
    known = CARDS.get(device.device_kind)
    if known:
        bandwidth = bandwidth or known.bandwidth
        flops = flops or (known.single if dtype == "float32" else known.half)
    if not bandwidth or not flops:
        print(f"Unknown card {device.device_kind!r}: for percentages give --bandwidth (B/s) and --flops (FLOP/s).")
        return None
    return bandwidth, flops


def repeated(take: Callable[[], Any], count: int) -> Callable[[], Any]:
    """`count` steps at once, so that the GPU has work while Python prepares the next one."""

    def call() -> Any:
        for _ in range(count - 1):
            take()
        return take()

    return call


def with_torch() -> bool:
    """Whether PyTorch is there, and computes where JAX does."""
    if not update_step.has_torch():
        print("PyTorch is not installed: JAX alone.")
        return False
    import torch

    if jax.default_backend() != "cpu" and not torch.cuda.is_available():
        print("This PyTorch knows no GPU: JAX alone.")
        return False
    return True


def build(name: str, dtype: str) -> tuple[Any, Any, Any]:
    return models.split(models.build(name, 1000, dtype=dtype, rngs=nnx.Rngs(0)))


def jax_steps(images: jax.Array, labels: jax.Array, dtype: str) -> tuple[dict[str, Callable], dict[str, float]]:
    """Training steps of each form, and their FLOPs."""
    student, *student_variables = build("resnet18", dtype)
    teacher, *teacher_variables = build("resnet34", dtype)

    def loss_fn(rest: Any, teacher_variables: Any, images: Any, labels: Any, params: Any) -> Any:
        logits, rest = models.apply(student, params, rest, images, train=True)
        teacher_logits, _ = models.apply(teacher, *teacher_variables, images, train=False)
        task = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        kd = dot_optax.losses.kd_loss(logits, jax.lax.stop_gradient(teacher_logits), TEMPERATURE).mean()
        return dot_optax.PerLoss(TASK_WEIGHT * task, KD_WEIGHT * kd), rest

    def form_of(form: Form) -> tuple[Callable[[], Any], float]:
        @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
        def step(params: Any, rest: Any, state: Any, *batch: Any) -> Any:
            (_, rest), grads = form.gradients(functools.partial(loss_fn, rest, *batch))(params)
            updates, state = form.optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), rest, state

        params, rest = jax.tree.map(jnp.copy, student_variables)
        carried, batch = (params, rest, form.optimizer.init(params)), (teacher_variables, images, labels)
        # Before the compiler has turned convolutions into calls of a library, whose FLOPs it may not know.
        flops = counted_flops(step, *carried, *batch)

        def take() -> Any:
            nonlocal carried
            carried = step(*carried, *batch)
            return carried

        return take, flops

    made = {name: form_of(form) for name, form in FORMS.items()}
    return {name: take for name, (take, _) in made.items()}, {name: flops for name, (_, flops) in made.items()}


def torch_resnet(stage_sizes: tuple[int, ...]) -> Any:
    """The ResNet of basic blocks of `examples/distill/models/resnet.py`."""
    import torch
    from torch import nn

    def conv_norm(width_in: int, width: int, size: int, stride: int) -> list[Any]:
        return [nn.Conv2d(width_in, width, size, stride, size // 2, bias=False), nn.BatchNorm2d(width)]

    class Block(nn.Module):
        def __init__(self, width_in: int, width: int, stride: int) -> None:
            super().__init__()
            relu = nn.ReLU(inplace=True)
            self.body = nn.Sequential(*conv_norm(width_in, width, 3, stride), relu, *conv_norm(width, width, 3, 1))
            self.shortcut = nn.Sequential(*(conv_norm(width_in, width, 1, stride) if width_in != width else []))

        def forward(self, x: Any) -> Any:
            return torch.relu(self.body(x) + self.shortcut(x))

    layers, width_in = [*conv_norm(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)], 64
    for stage, size in enumerate(stage_sizes):
        for i in range(size):
            width = 64 * 2**stage
            layers.append(Block(width_in, width, 2 if i == 0 and stage else 1))
            width_in = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width_in, 1000))


def torch_steps(images: np.ndarray, labels: np.ndarray, dtype: str) -> dict[str, Callable]:
    """The same training steps in PyTorch: eager, channels last, autocast, `foreach` updates."""
    import torch
    from torch.nn import functional

    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    x = torch.from_numpy(images).permute(0, 3, 1, 2).to(device, memory_format=torch.channels_last)
    y = torch.from_numpy(labels).long().to(device)
    autocast = functools.partial(
        torch.autocast, device, dtype=getattr(torch, dtype), enabled=dtype != "float32", cache_enabled=True
    )

    def network(stage_sizes: tuple[int, ...]) -> Any:
        return torch_resnet(stage_sizes).to(device, memory_format=torch.channels_last)

    teacher = network((3, 4, 6, 3)).eval()

    def losses(student: Any) -> tuple[Any, Any]:
        with autocast():
            with torch.no_grad():
                teacher_logits = teacher(x).float() / TEMPERATURE
            logits = student(x).float()
        kd = functional.kl_div(
            functional.log_softmax(logits / TEMPERATURE, -1),
            functional.softmax(teacher_logits, -1),
            reduction="batchmean",
        )
        return TASK_WEIGHT * functional.cross_entropy(logits, y), KD_WEIGHT * TEMPERATURE**2 * kd

    def kd() -> Callable[[], None]:
        student = network((2, 2, 2, 2)).train()
        optimizer = torch.optim.SGD(student.parameters(), lr=LEARNING_RATE, momentum=MEAN_BETA, foreach=True)

        def take() -> None:
            optimizer.zero_grad()
            sum(losses(student)).backward()
            optimizer.step()

        return take

    def dot() -> Callable[[], None]:
        student = network((2, 2, 2, 2)).train()
        theta = list(student.parameters())
        buffers = [[torch.zeros_like(leaf) for leaf in theta] for _ in BETAS]

        def take() -> None:
            task, kd = losses(student)
            grads = torch.autograd.grad(task, theta, retain_graph=True), torch.autograd.grad(kd, theta)
            with torch.no_grad():
                for v, g, beta in zip(buffers, grads, BETAS, strict=True):
                    torch._foreach_mul_(v, beta)
                    torch._foreach_add_(v, g)
                    torch._foreach_add_(theta, v, alpha=-LEARNING_RATE)

        return take

    return {"torch KD": kd(), "torch exact DOT": dot()}


def report(title: str, seconds: dict[str, list[float]], work: dict[str, float], peak: float | None) -> dict[str, Any]:
    """Prints and returns ratios to the first form, and with a peak, in units of `work` per second, the rest."""
    first, figures, rows = next(iter(seconds)), {}, []
    for name, taken in seconds.items():
        row = figures[name] = {"ratio": _measure.ratio(taken, seconds[first])}
        if jax.default_backend() != "cpu":
            row["milliseconds"] = 1e3 * statistics.median(taken)
        if peak:
            row["of_peak"] = work[name] / statistics.median(taken) / peak
        has = [f"{row['milliseconds']:.3f}"] if "milliseconds" in row else []
        rows.append([name, row["ratio"], *has, *([f"{row['of_peak']:.1%}"] if peak else [])])
    header = [title, f"/ {first}", *(["ms"] if len(rows[0]) > 2 else []), *(["of the peak"] if peak else [])]
    print("\n" + _measure.table(header, rows), flush=True)
    return figures


def updates(family: str, args: Any, compare: bool, peak: float | None) -> dict[str, Any]:
    shapes = update_step.NETWORKS[args.network]()
    params, grads = update_step.arrays(shapes)
    forms = {name: update_step.jax_form(UPDATES[name], params, grads) for name in update_step.FAMILIES[family]}
    if compare:
        forms |= update_step.torch_forms(params, grads, family)
    one, dot = (UPDATES[name].limit for name in update_step.FAMILIES[family])
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    work = {name: size * args.repeat * (dot if "dot" in name.lower() else one) for name in forms}
    seconds = _measure.alternate({name: repeated(take, args.repeat) for name, take in forms.items()}, args.rounds)
    return report(f"{args.repeat} updates of {args.network}", seconds, work, peak)


def train_steps(args: Any, compare: bool, peak: float | None) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((args.batch_size, args.image_size, args.image_size, 3), np.float32)
    labels = rng.integers(1000, size=args.batch_size, dtype=np.int32)
    forms, flops = jax_steps(jnp.asarray(images), jnp.asarray(labels), args.dtype)
    if compare:
        forms |= torch_steps(images, labels, args.dtype)
    work = {name: args.repeat * flops[name.removeprefix("torch ")] for name in forms}
    seconds = _measure.alternate({name: repeated(take, args.repeat) for name, take in forms.items()}, args.rounds)
    title = f"{args.repeat} steps, {args.batch_size} images of {args.image_size}, {args.dtype}"
    print(f"\nFLOPs of DOT / KD: {flops['exact DOT'] / flops['KD']:.3f}", end="")
    return {"flops": flops, "forms": report(title, seconds, work, peak)}


def main(argv=None):
    parser = _measure.parser(__doc__)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--network", choices=update_step.NETWORKS, default="ResNet50", help="whose updates are timed")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--repeat", type=int, default=10, help="how many steps are timed at once")
    parser.add_argument("--bandwidth", type=float, help="of the card's memory, in bytes per second")
    parser.add_argument("--flops", type=float, help="of the card at most, per second, in --dtype")
    parser.add_argument("--smoke_test", action="store_true", help="on the smallest scale, to see whether it runs")
    args = parser.parse_args(argv)
    if args.smoke_test:
        vars(args).update(SMALL)

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory to PyTorch
    compare = with_torch()
    print(_measure.machine("optax", *(["torch"] if compare else [])))
    bandwidth, flops = card(args.bandwidth, args.flops, args.dtype) or (None, None)
    figures = {family: updates(family, args, compare, bandwidth) for family in update_step.FAMILIES}
    figures["train_steps"] = train_steps(args, compare, flops)
    _measure.write(args.json, figures)


if __name__ == "__main__":
    main()
