"""What does a cache of the teacher's likeliest tokens save in a step, and what does it cost to keep few of them?

    python -m benchmarks.teacher_cache --config=smollm2 --workdir=runs/smollm2

takes text, teacher and student of a finished run, `python -m examples.language_model` with the same flags.  A training step of
plain distillation is taken with the teacher's forward pass, with `--k` cached tokens and without a teacher.  Then caches of several
k are written of some sequences of the test split, and the loss from their float16 log-probabilities, and its gradient in the
student's logits, are compared with those of the forward KL from all logits.
"""

import functools
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

import dot_optax
from benchmarks import _measure
from examples.distill import methods
from examples.language_model import command_line, data, experiment, jobs, losses, model, steps, teacher_logits
from examples.language_model.jobs import Shared, TeacherAtHand
from examples.language_model.losses import Likeliest
from examples.language_model.steps import Problem
from examples.trainer import checkpoint
from examples.trainer.sampling import EXACT
from examples.trainer.step import init_state

LIVE, ALONE = "the teacher's forward pass", "no teacher"
KS = (1, 4, 16, 64, 256, 1024)


class Run(NamedTuple):
    """What is measured: a finished run's networks and text."""

    shared: Shared
    teacher: TeacherAtHand
    student: nnx.GraphDef
    params: Any  # of the student

    @property
    def config(self) -> ConfigDict:
        return self.shared.config

    @property
    def vocabulary(self) -> int:
        return self.teacher.architecture.vocabulary

    def problem(self, loss: str | None, *, live: bool) -> Problem:
        """That of a step with this loss of distillation, of the teacher's logits or of what is cached of them."""
        section = self.config.distillation.copy_and_resolve_references()
        section.update({"loss": loss or "forward", "cache": False})
        graphdef = self.teacher.network.graphdef if live else None
        of_loss = losses.build(section, self.vocabulary) if loss else None
        separator, mesh = self.shared.tokenizer.separator, self.shared.activations
        return Problem(self.student, graphdef, of_loss, separator, self.config.remat, mesh)


def open_run(method: str, arguments: Sequence[str]) -> Run:
    """Opens the working directory of a command line of examples/language_model, and the student of a method there."""
    parsed = command_line.parse(arguments)
    params, _ = checkpoint.load_variables(epath.Path(parsed.workdir).expanduser() / method)
    shared, teacher = experiment.open_finished(parsed)
    graphdef, like = jobs.network_shapes(jobs.student_architecture(shared, teacher.architecture), shared)
    return Run(shared, teacher, graphdef, jax.device_put(params, shared.layout.shardings(like)))


def measure_steps(run: Run, k: int, rounds: int) -> dict[str, dict[str, Any]]:
    """The seconds of a training step in each round, and its operations in units of those with the teacher."""
    config, layout, teacher = run.config, run.shared.layout, run.teacher.network.params
    length, batch_size = config.sequence_length, config.batch_size
    weights = dot_optax.PerLoss(config.distillation.task_weight, config.distillation.kd_weight)
    count = data.steps_per_epoch(run.shared.corpus.train, length, batch_size), config.epochs
    optimizer = methods.build("kd", config.optimizer, dot_optax.PerLoss(1.0, 1.0), *count, matrices=model.matrices)
    live = run.problem("forward", live=True)
    sequences = [data.sequence(run.shared.corpus.train, length, i) for i in range(batch_size)]
    batch = {"tokens": np.stack(sequences)}
    kept = jax.device_get(steps.make_predict(live, k)(teacher, jnp.asarray(batch["tokens"][:, :-1])))
    of_cache = {"teacher_log_probs": kept.log_probs.astype(np.float16), "teacher_indices": kept.indices}
    problems = {
        LIVE: (live, batch),
        f"{k} cached tokens": (run.problem("top_k", live=False), batch | of_cache),
        ALONE: (run.problem(None, live=False), batch),
    }
    # One state for all: a step uses the memory of the one that it is given again.
    params = jax.tree.map(jnp.copy, run.params)
    state = layout.place(init_state(params, {}, optimizer))

    def form(problem: Problem, batch: Any) -> Callable[[], Any]:
        step = steps.make_train_step(problem, optimizer, layout, gradient_metrics=False, summed=weights)
        on_devices = layout.put_batch(batch)

        def take() -> Any:
            nonlocal state
            state, metrics = step(state, teacher if problem.teacher else None, on_devices)
            return state, metrics

        return take

    seconds = _measure.alternate({name: form(*given) for name, given in problems.items()}, rounds)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (run.params, teacher))
    args = like[0], {}, like[1]
    flops = {
        name: steps.relative_flops(problem, live, EXACT, weights, *args, given, batch)
        for name, (problem, given) in problems.items()
    }
    return {name: {"flops": flops[name], "seconds": seconds[name]} for name in problems}


def measure_losses(run: Run, ks: Sequence[int], sequences: int) -> dict[int, dict[str, float]]:
    """What caches of these k take, and how far from the forward KL is what is computed of them."""
    split, length, vocabulary = run.shared.corpus.test, run.config.sequence_length, run.vocabulary
    sequences, temperature = min(sequences, data.num_sequences(split, length)), run.config.distillation.temperature
    live, cached = run.problem("forward", live=True), run.problem("top_k", live=False)
    of_student = jax.jit(functools.partial(live.logits, run.student))
    of_teacher = jax.jit(functools.partial(live.logits, run.teacher.network.graphdef))
    compare, most_likely = (
        jax.jit(functools.partial(_compare, live, cached)),
        jax.jit(losses.likeliest, static_argnums=2),
    )
    tokens = [data.sequence(split, length, i)[None, :-1] for i in range(sequences)]
    logits = [(of_student(run.params, each), of_teacher(run.teacher.network.params, each)) for each in tokens]

    def predict(given: Iterator[Any], k: int, tokens: jax.Array) -> Likeliest:
        """What is known of these tokens already: the cache asks for the sequences in their order."""
        del tokens
        return most_likely(next(given)[1], temperature, k)

    found = {}
    for k in ks:
        with tempfile.TemporaryDirectory() as folder:
            cache = teacher_logits.open_cache(
                folder,
                split=split,
                length=length,
                sequences=sequences,
                vocabulary=vocabulary,
                k=k,
                temperature=temperature,
                teacher={},  # The folder is of this process alone.
                predict=functools.partial(predict, iter(logits), k),
                batch_size=1,
            )
            size = sum(path.stat().st_size for path in pathlib.Path(folder).glob("*.bin"))
            parts = [
                compare(*both, Likeliest(cache.log_probs[i : i + 1], np.asarray(cache.indices[i : i + 1], np.int32)))
                for i, both in enumerate(logits)
            ]
        sums = jax.tree.map(lambda *leaves: float(np.sum(leaves)), *parts)
        count = sequences * length
        found[k] = {
            "bytes": size / count,
            "outside": sums["outside"] / count,
            "loss": sums["loss"] / count,
            "full_loss": sums["full_loss"] / count,
            "deviation": (sums["deviation"] / sums["full_square"]) ** 0.5,
            "cosine": sums["product"] / (sums["square"] * sums["full_square"]) ** 0.5,
        }
    return found


def _compare(live: Problem, cached: Problem, student: Any, teacher: Any, kept: Likeliest) -> dict[str, jax.Array]:
    """Sums over the predictions of a sequence, of logits [1, length, vocabulary]."""
    assert live.loss and cached.loss
    of_logits, of_likeliest, temperature = live.loss.of_logits, cached.loss.of_likeliest, live.loss.temperature
    full_loss, full = jax.value_and_grad(lambda s: of_logits(s, teacher, temperature).sum())(student)
    loss, grad = jax.value_and_grad(lambda s: of_likeliest(s, kept).sum())(student)
    probabilities = jax.nn.softmax(teacher / temperature)
    return {
        "outside": jnp.put_along_axis(probabilities, kept.indices, 0.0, axis=-1, inplace=False).sum(),
        "loss": loss,
        "full_loss": full_loss,
        "deviation": jnp.sum((grad - full) ** 2),
        "square": jnp.sum(grad**2),
        "full_square": jnp.sum(full**2),
        "product": jnp.sum(grad * full),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = _measure.parser(__doc__)
    parser.add_argument("--method", default="kd", help="the student of which method")
    parser.add_argument("--k", type=int, help="cached tokens in a step; those of the config, or 64")
    parser.add_argument("--ks", type=int, nargs="+", default=KS, help="whose losses to compare, besides all tokens")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--sequences", type=int, default=8, help="of the test split, to compare losses on")
    args, arguments = parser.parse_known_args(argv)
    logging.set_verbosity(logging.ERROR)  # Orbax
    run = open_run(args.method, arguments)
    config, vocabulary = run.config, run.vocabulary
    k = min(args.k or config.distillation.k or 64, vocabulary)
    of_steps = measure_steps(run, k, args.rounds)
    of_ks = measure_losses(run, [*(k for k in sorted(args.ks) if k < vocabulary), vocabulary], args.sequences)

    numbers = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (run.teacher.network.params, run.params)]
    print(
        f"{numbers[0]:,} parameters teach {numbers[1]:,}; a vocabulary of {vocabulary:,}; batches of {config.batch_size} x"
        f" {config.sequence_length} tokens; {_measure.machine()}\n"
    )
    rows = [
        [
            name,
            f"{form['flops']:.2f}" if form["flops"] else "not known",
            _measure.ratio(form["seconds"], of_steps[LIVE]["seconds"]),
            f"{config.batch_size * config.sequence_length / statistics.median(form['seconds']):,.0f}",
        ]
        for name, form in of_steps.items()
    ]
    print(_measure.table(["a step of plain distillation with", "FLOPs", "time", "tokens/s"], rows))
    columns = ["k", "bytes a token", "probability outside", "KD loss", "of the full", "gradient: deviation", "cosine"]
    rows = [
        [
            f"{k:,}" if k < vocabulary else f"all {k:,}",
            f"{found['bytes']:,.1f}",
            f"{found['outside']:.4f}",
            f"{found['loss']:.4f}",
            f"{found['loss'] / found['full_loss']:.4f}",
            f"{found['deviation']:.4f}",
            f"{found['cosine']:.4f}",
        ]
        for k, found in of_ks.items()
    ]
    print(
        f"\n{_measure.table(columns, rows)}\n\nall logits, in float32: a KD loss of {of_ks[vocabulary]['full_loss']:.4f}"
    )
    _measure.write(args.json, {"steps": of_steps, "ks": of_ks})


if __name__ == "__main__":
    main()
