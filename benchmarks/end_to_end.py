"""Does a run here train as the same run in PyTorch does, and which of the two is faster?

    pip install -e ".[examples]" torch && JAX_PLATFORMS=cpu python -m benchmarks.end_to_end

trains with DOT the digits' MLP and Fashion-MNIST's CNN with BatchNorm (of the latter a part, for few epochs; options say
how much): with the example's train step, with the library alone, and in an eager PyTorch loop. All have the same weights,
batches and schedule, and take turns by epoch. Reading and augmenting images is not timed. "By the clock" leaves out the first
step, which in JAX compiles; "of the whole run" includes it. Where other programs run, the speed by CPU time is the fairer one.
It measures the work only with one thread, which is the default.

The latest tables are in `README.md`. The losses agree: in float64 to the last bits, so both do the same arithmetic. In
float32 they part by what float32 rounds, which grows with the steps: they are about as far from each other as from themselves
in float64. The two momenta are those of float32 everywhere, since the gain 1 / (1 - 0.975) of the rounded number is off by
1e-6.
"""

import copy
import functools
import itertools
import os
import tempfile
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from ml_collections import ConfigDict

import dot_optax
from benchmarks import _measure
from examples.distill import data, methods, models, steps
from examples.distill.configs import digits, fashion_mnist_cnn
from examples.trainer import loop, parallel
from examples.trainer.errors import UserError
from examples.trainer.step import init_state

REFERENCE, PROJECT, STEP, SCAN = "PyTorch, eager", "the trainer, a step", "the library, a step", "the library, an epoch"


class Run(NamedTuple):
    """What all forms are given: the same networks, batches and schedule, as NumPy arrays."""

    config: ConfigDict
    problem: steps.Problem
    teacher: tuple[Any, Any]  # (params, rest)
    student: tuple[Any, Any]
    epochs: list[dict[str, np.ndarray]]  # each (steps, batch, ...)

    @property
    def weights(self):
        return dot_optax.PerLoss(self.config.distillation.task_weight, self.config.distillation.kd_weight)

    @property
    def betas(self):
        # As float32 has them: the gain 1 / (1 - 0.975) of that number is off by 1e-6, also in float64.
        return jax.tree.map(lambda beta: float(np.float32(beta)), methods.betas(self.config.optimizer))


def digits_config(epochs):
    config = digits.get_config()
    config.epochs = epochs
    return config


def fashion_mnist_config(images, epochs, teacher_epochs):
    config = fashion_mnist_cnn.get_config()
    config.dataset.train = f"train[:{images}]"
    config.epochs, config.teacher.epochs = epochs, teacher_epochs
    return config


def prepare(config):
    """Reads the data, trains the teacher and draws the student's initial weights, all as the example does."""
    methods.check(config, ["dot"])
    with tempfile.TemporaryDirectory() as folder:
        if config.dataset.prepare:
            config.dataset.data_dir = folder  # The digits come out of scikit-learn; all images are kept in memory.
        dataset = data.load(config.dataset)
    epochs = read_epochs(dataset, config, max(config.epochs, config.teacher.epochs))
    teacher, teacher_params, teacher_rest = new_network(config.teacher.model, dataset, config.seed)
    student, *variables = new_network(config.student.model, dataset, config.seed)
    scale = config.distillation.temperature, config.dataset.mean, config.dataset.std
    return Run(
        config,
        steps.Problem(student, teacher, *scale),
        train_teacher(config, steps.Problem(teacher, None, *scale), teacher_params, teacher_rest, epochs),
        jax.device_get(tuple(variables)),
        epochs=epochs[: config.epochs],
    )


def read_epochs(dataset, config, count):
    """The batches that the example would train with, augmented."""
    per_epoch = data.steps_per_epoch(dataset, config.batch_size)
    with data.train_batches(dataset, config.batch_size, config.seed, count, put=lambda batch: batch) as batches:
        epochs = [list(itertools.islice(batches, per_epoch)) for _ in range(count)]
    return [jax.tree.map(lambda *leaves: np.stack(leaves), *epoch) for epoch in epochs]


def steps_per_epoch(run):
    return len(run.epochs[0]["label"])


def schedule(run):
    """The learning rate as a function of the number of steps so far."""
    return methods.learning_rate_schedule(run.config.optimizer, steps_per_epoch(run), run.config.epochs)


def batches_of(epoch):
    return ({name: values[i] for name, values in epoch.items()} for i in range(len(epoch["label"])))


def new_network(model, dataset, seed):
    shapes = {"num_classes": dataset.num_classes, "input_shape": dataset.image_shape}
    return models.split(models.build(**model, **shapes, rngs=nnx.Rngs(seed)))


def one_device():
    return parallel.jit_layout(jax.sharding.Mesh(np.array(jax.devices()[:1]), (parallel.AXIS,)))


def owned(tree):
    """Copies that a compiled step may donate."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def train_teacher(config, problem, params, rest, epochs):
    layout, optimizer = one_device(), config.teacher.optimizer
    per_epoch = len(epochs[0]["label"])
    tx = methods.build("ce", optimizer, dot_optax.PerLoss(1.0, 0.0), per_epoch, config.teacher.epochs)
    step = steps.make_train_step(problem, tx, layout, gradient_metrics=False)
    state = layout.place(init_state(owned(params), owned(rest), tx))
    for epoch in epochs[: config.teacher.epochs]:
        for batch in batches_of(epoch):
            state, _ = jax.block_until_ready(step(state, None, layout.put_batch(batch)))
    return jax.device_get((state.params, state.rest))


# A form is a function of a Run that returns `train(epoch) -> losses (steps, 2)`, which keeps its state from epoch to
# epoch, and the seconds of its first step, taken on a copy of the state: with JAX it includes tracing and compiling.


def project(run):
    """The train step of the example as it stands, with the losses fetched as its loop does."""
    layout = one_device()
    optimizer = methods.build("dot", run.config.optimizer, run.weights, steps_per_epoch(run), run.config.epochs)
    step = steps.make_train_step(run.problem, optimizer, layout, gradient_metrics=False)
    teacher = owned(run.teacher)

    def new_state():
        return layout.place(init_state(*owned(run.student), optimizer))

    spare = new_state()
    batch = next(batches_of(run.epochs[0]))
    seconds = timed(lambda: jax.block_until_ready(step(spare, teacher, layout.put_batch(batch))))
    state = new_state()

    def metrics_of(epoch):
        nonlocal state
        for batch in batches_of(epoch):
            state, metrics = step(state, teacher, layout.put_batch(batch))
            yield metrics

    def train(epoch):
        return np.array([[each["task_loss"], each["kd_loss"]] for each in loop.fetch(metrics_of(epoch))])

    return train, seconds


def library_steps(run):
    """`dot_optax` alone: one compiled program for a step."""
    step, new_state, teacher = library(run)
    step = jax.jit(step, donate_argnums=0)
    spare, batch = new_state(), next(batches_of(run.epochs[0]))
    seconds = timed(lambda: jax.block_until_ready(step(spare, teacher, batch)))
    state = new_state()

    def losses_of(epoch):
        nonlocal state
        for batch in batches_of(epoch):
            state, losses = step(state, teacher, batch)
            yield losses

    return lambda epoch: np.array(list(loop.fetch(losses_of(epoch)))), seconds


def library_scan(run):
    """`dot_optax` alone: one compiled program for an epoch."""
    step, new_state, teacher = library(run)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_epoch(state, teacher, epoch):
        return jax.lax.scan(lambda state, batch: step(state, teacher, batch), state, epoch)

    spare, one_step = new_state(), jax.tree.map(lambda leaf: leaf[:1], run.epochs[0])
    jax.block_until_ready(train_epoch(spare, teacher, one_step))  # What is slow the first time only, compiled or not.
    state = new_state()
    seconds = timed(lambda: train_epoch.lower(state, teacher, run.epochs[0]).compile())

    def train(epoch):
        nonlocal state
        state, losses = train_epoch(state, teacher, epoch)
        return np.asarray(losses)

    return train, seconds


def library(run):
    """A step of `value_and_grads` and `dot` for both, which makes a state, and the teacher's variables."""
    settings = run.config.optimizer
    optimizer = dot_optax.dot(schedule(run), *run.betas, weight_decay=settings.weight_decay)
    dtype = jax.tree.leaves(run.student)[0].dtype
    mean, std = (np.asarray(values, dtype).reshape(1, 1, 1, -1) for values in (run.problem.mean, run.problem.std))

    def losses_of(params, rest, teacher, batch):
        images = (batch["image"].astype(dtype) - mean) / std
        teacher_logits, _ = models.apply(run.problem.teacher, *teacher, images, train=False)
        logits, rest = models.apply(run.problem.student, params, rest, images, train=True)
        task = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        kd = dot_optax.losses.kd_loss(logits, teacher_logits, run.problem.temperature).mean()
        weighted = dot_optax.PerLoss(run.weights.task * task, run.weights.kd * kd)
        return weighted, (rest, jnp.stack([task, kd]))

    def step(state, teacher, batch):
        params, rest, opt_state = state
        values_and_grads = dot_optax.value_and_grads(losses_of, has_aux=True)(params, rest, teacher, batch)
        (_, (rest, losses)), grads = values_and_grads
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), rest, opt_state), losses

    def new_state():
        params, rest = owned(run.student)
        return params, rest, optimizer.init(params)

    return step, new_state, owned(run.teacher)


class TorchDOT:
    """DOT's arithmetic in PyTorch: v <- beta v + g for each loss, L2 with the task's gradient, theta <- theta - lr sum v."""

    def __init__(self, params, betas, weight_decay):
        self.params, self.betas, self.weight_decay = params, betas, weight_decay
        self.buffers = [[torch.zeros_like(param) for param in params] for _ in betas]

    @torch.no_grad()
    def step(self, losses, rate):
        task, kd = losses
        grads = torch.autograd.grad(task, self.params, retain_graph=True), torch.autograd.grad(kd, self.params)
        torch._foreach_add_(grads[0], self.params, alpha=self.weight_decay)
        for buffers, beta, grad in zip(self.buffers, self.betas, grads, strict=True):
            torch._foreach_mul_(buffers, beta)
            torch._foreach_add_(buffers, grad)
        torch._foreach_add_(self.params, torch._foreach_add(*self.buffers), alpha=-rate)


def pytorch(run):
    """The loop that a user of PyTorch writes: eager, two backward passes over one graph."""
    torch.set_num_threads(threads())
    temperature, weights, settings = run.problem.temperature, run.weights, run.config.optimizer
    teacher, student = torch_network(*run.teacher).eval(), torch_network(*run.student).train()
    dtype = next(student.parameters()).dtype
    mean, std = (torch.tensor(values, dtype=dtype).reshape(-1, 1, 1) for values in (run.problem.mean, run.problem.std))
    steps = jnp.arange(len(run.epochs) * steps_per_epoch(run), dtype=jnp.int32)
    rates = iter(np.broadcast_to(jax.jit(jax.vmap(schedule(run)))(steps), steps.shape).tolist())

    def step(student, optimizer, batch, rate):
        images = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2)
        images = (images.to(dtype) - mean) / std
        with torch.no_grad():
            target = torch.softmax(teacher(images) / temperature, dim=1)
        logits = student(images)
        task = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch["label"]).long())
        log_probs = torch.log_softmax(logits / temperature, dim=1)
        kd = temperature**2 * torch.nn.functional.kl_div(log_probs, target, reduction="batchmean")
        optimizer.step((weights.task * task, weights.kd * kd), rate)
        return torch.stack([task.detach(), kd.detach()])

    def new_optimizer(student):
        return TorchDOT(list(student.parameters()), run.betas, settings.weight_decay)

    spare, batch = copy.deepcopy(student), next(batches_of(run.epochs[0]))
    seconds = timed(lambda: step(spare, new_optimizer(spare), batch, 0.0))
    optimizer = new_optimizer(student)

    def train(epoch):
        losses = [step(student, optimizer, batch, next(rates)) for batch in batches_of(epoch)]
        return torch.stack(losses).numpy()

    return train, seconds


def torch_network(params, rest):
    """The network in PyTorch with these weights."""
    layers = []
    for i, stage in params.get("stages", {}).items():
        for j, conv in stage.items():
            kernel, norm = torch.tensor(conv["conv"]["kernel"]), rest["stages"][i][j]["norm"] | conv["norm"]
            layer = torch.nn.Conv2d(*kernel.shape[2:], 3, stride=1 if j else 2, padding=1, bias=False)
            layer.weight.data = kernel.permute(3, 2, 0, 1).contiguous()
            layers += [layer, torch_batch_norm(**norm), torch.nn.ReLU(inplace=True)]
    if layers:
        layers.append(torch.nn.AdaptiveAvgPool2d(1))
    layers.append(torch.nn.Flatten())
    for weights in params.get("hidden", {}).values():
        layers += [torch_linear(**weights), torch.nn.ReLU(inplace=True)]
    return torch.nn.Sequential(*layers, torch_linear(**params["classifier"]))


def torch_linear(kernel, bias):
    layer = torch.nn.Linear(*kernel.shape)
    layer.weight.data, layer.bias.data = torch.tensor(kernel.T), torch.tensor(bias)
    return layer


def torch_batch_norm(scale, bias, mean, var):
    layer = torch.nn.BatchNorm2d(len(scale))
    layer.weight.data, layer.bias.data = torch.tensor(scale), torch.tensor(bias)
    layer.running_mean, layer.running_var = torch.tensor(mean), torch.tensor(var)
    return layer


FORMS = {REFERENCE: pytorch, PROJECT: project, STEP: library_steps, SCAN: library_scan}


def threads():
    """How many threads JAX computes with on the CPU, and so PyTorch should: one for each core of this process."""
    return len(os.sched_getaffinity(0))


def timed(call):
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def cast(run, dtype):
    """The run with networks of another dtype."""
    student, teacher = jax.tree.map(lambda leaf: leaf.astype(dtype), (run.student, run.teacher))
    return run._replace(student=student, teacher=teacher)


def compare(run, forms=FORMS):
    """Trains all forms, epoch by epoch in turns; returns seconds, those of first steps, mean losses, CPU seconds."""
    made = {name: form(run) for name, form in forms.items()}
    losses, work = {name: [] for name in forms}, {name: [] for name in forms}

    def in_turns(name):
        epochs = iter(run.epochs)

        def train_epoch():
            started = time.process_time()
            losses[name].append(made[name][0](next(epochs)))
            work[name].append(time.process_time() - started)

        return train_epoch

    seconds = _measure.alternate({name: in_turns(name) for name in forms}, len(run.epochs), warmup=0)
    means = {name: np.array(values, np.float64).mean(axis=1) for name, values in losses.items()}
    return seconds, {name: first for name, (_, first) in made.items()}, means, work


def deviations(losses, reference):
    """The larger of both losses' relative deviations, for each epoch."""
    return np.max(np.abs(losses - reference) / np.abs(reference), axis=1)


def in_float64(run):
    """The mean losses of the epochs where rounding is next to nothing, in PyTorch and with the library."""
    with jax.enable_x64(True):
        return compare(cast(run, np.float64), {name: FORMS[name] for name in (REFERENCE, STEP)})[2]


def report(title, run):
    """Compares all forms, prints what came out, and returns it."""
    seconds, first, losses, work = compare(run)
    base, epoch = seconds[REFERENCE], np.median(seconds[REFERENCE])
    shape = f"{len(run.epochs)} epochs of {steps_per_epoch(run)} steps of {run.config.batch_size} images"
    print(f"\n{title}: {shape}, threads: {threads()}\n")
    rows = [
        (
            name,
            _measure.ratio(work[REFERENCE], work[name]),
            _measure.ratio(base, taken),
            f"{(first[REFERENCE] + sum(base)) / (first[name] + sum(taken)):.2f}",
            f"{first[name] / epoch:.1f}",
            *(f"{loss:.5f}" for loss in losses[name][-1]),
        )
        for name, taken in seconds.items()
    ]
    print(
        _measure.table(
            (
                "",
                "speed by CPU time",
                "by the clock",
                "of the whole run",
                "first step, in epochs of PyTorch",
                "train task loss",
                "train KD loss",
            ),
            rows,
        )
    )
    exact = in_float64(run)
    apart = {f"{name}, from PyTorch": deviations(losses[name], losses[REFERENCE]) for name in (PROJECT, STEP, SCAN)}
    apart["PyTorch, from itself in float64"] = deviations(losses[REFERENCE], exact[REFERENCE])
    apart["the library, from itself in float64"] = deviations(losses[STEP], exact[STEP])
    apart["both in float64, from each other"] = deviations(exact[STEP], exact[REFERENCE])
    shown = sorted({min(2**i, len(run.epochs)) for i in range(20)})
    print("\nhow far the mean losses of an epoch are from each other, relative\n")
    rows = [(name, *(f"{values[i - 1]:.0e}" for i in shown), f"{max(values):.0e}") for name, values in apart.items()]
    print(_measure.table(("epoch", *shown, "largest"), rows), flush=True)
    return {
        "steps_per_epoch": steps_per_epoch(run),
        "seconds_of_epochs": seconds,
        "cpu_seconds_of_epochs": work,
        "seconds_of_first_step": first,
        "losses": {name: values.tolist() for name, values in losses.items()},
        "losses_in_float64": {name: values.tolist() for name, values in exact.items()},
        "deviations": {name: values.tolist() for name, values in apart.items()},
    }


def main(argv=None):
    parser = _measure.parser(__doc__)
    parser.add_argument("--runs", nargs="+", choices=("digits", "fashion_mnist"), default=("digits", "fashion_mnist"))
    parser.add_argument("--digits_epochs", type=int, default=240)
    parser.add_argument("--fashion_mnist_epochs", type=int, default=6)
    parser.add_argument("--fashion_mnist_images", type=int, default=2560, help="of 55,000")
    parser.add_argument("--teacher_epochs", type=int, default=2, help="of Fashion-MNIST's; that of the digits is quick")
    parser.add_argument("--threads", type=int, default=1, help="for JAX and for PyTorch, each on a core of its own")
    args = parser.parse_args(argv)

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # before JAX starts its threads
    configs = {
        "digits": digits_config(args.digits_epochs),
        "fashion_mnist": fashion_mnist_config(
            args.fashion_mnist_images, args.fashion_mnist_epochs, args.teacher_epochs
        ),
    }
    figures = {"machine": _measure.machine("flax", "optax", "torch"), "threads": threads(), "load": os.getloadavg()[0]}
    print(f"{figures['machine']}; load of others at the start {figures['load']:.1f}")
    for name in args.runs:
        try:
            run = prepare(configs[name])
        except UserError as error:  # such as that the images are not there
            parser.error(str(error))
        figures[name] = report(name, run)
    _measure.write(args.json, figures)


if __name__ == "__main__":
    main()
