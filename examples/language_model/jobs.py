"""The jobs of an experiment: the teacher, if it is trained here, and a student for each method."""

import collections
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from etils import epath
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

import dot_optax
from examples.distill import methods
from examples.distill.objectives import PLAIN
from examples.language_model import data, generate, losses, model, steps, trained
from examples.language_model.corpus import Corpus
from examples.language_model.data import CachedTeacher
from examples.language_model.model import Architecture
from examples.language_model.steps import Problem, Teacher
from examples.language_model.tokenizer import Tokenizer
from examples.trainer import batches, loop, parallel
from examples.trainer.diagnostics import Diagnostics, layers
from examples.trainer.errors import UserError
from examples.trainer.job import Evaluate, Job, MetricNames, Variables
from examples.trainer.preemption import Preempted
from examples.trainer.records import Record
from examples.trainer.sampling import EXACT, Sampling, check_rows
from examples.trainer.step import TrainState, init_state

# Means over the predictions of an epoch, unweighted, as examples/distill/jobs.py says of its own.
_TRAINING = ("task_loss", "kd_loss", "task_grad_norm", "kd_grad_norm", "grad_cosine")
_VALIDATION = ("task_loss", "kd_loss", "bits_per_byte", "top1")


class Shared(NamedTuple):
    """What all jobs of an experiment share."""

    config: ConfigDict
    corpus: Corpus
    tokenizer: Tokenizer
    layout: parallel.Layout
    preempted: Callable[[], bool]  # see preemption.py

    @property
    def devices(self) -> int:
        """How many parts a batch has."""
        return self.layout.mesh.shape[parallel.AXIS]

    @property
    def activations(self) -> jax.sharding.Mesh | None:
        """The mesh on which activations are divided, where a step sees the whole batch."""
        return self.layout.mesh if self.layout.axis_name is None else None


class TeacherAtHand(NamedTuple):
    """A teacher whose parameters are on the devices, and what is cached of its predictions, by split."""

    network: Teacher
    architecture: Architecture
    caches: Mapping[str, CachedTeacher] = {}  # for all splits or for none

    def without_params(self) -> "TeacherAtHand":
        """The same with shapes in the place of parameters: who has the caches need not keep these on the devices."""
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self.network.params)
        return self._replace(network=self.network._replace(params=shapes))


def metrics(method: str, diagnostics: Diagnostics | None = None) -> MetricNames:
    """The metrics of a method."""
    return MetricNames(
        training=(*_TRAINING, *methods.state_metrics(method), *(diagnostics.metrics if diagnostics else ())),
        validation=_VALIDATION,
        best="task_loss",
        lower_is_better=True,
        shown={"task_loss": "task loss", "kd_loss": "KD loss"},
    )


def architecture(section: ConfigDict, vocabulary: int) -> Architecture:
    """The architecture of the section `teacher.model` or `student.model`."""
    return Architecture(vocabulary=vocabulary, **section)


def network(of: Architecture, shared: Shared) -> tuple[nnx.GraphDef, Any]:
    """Returns (graphdef, params) of a new network."""
    config = shared.config
    return model.split(model.build(of, dtype=jnp.dtype(config.dtype), rngs=nnx.Rngs(config.seed)))


def network_shapes(of: Architecture, shared: Shared) -> tuple[nnx.GraphDef, Any]:
    """The same with shapes in the place of arrays."""
    return nnx.eval_shape(lambda: network(of, shared))


def new_params(of: Architecture, shared: Shared) -> Any:
    """The parameters of a new network, each made where it is to be: all together may be larger than a device."""
    _, like = network_shapes(of, shared)
    return jax.jit(lambda: network(of, shared)[1], out_shardings=shared.layout.shardings(like))()


def teacher(shared: Shared, directory: epath.Path) -> Job:
    """The teacher, which is trained with cross-entropy."""
    config = shared.config
    of = architecture(config.teacher.model, shared.tokenizer.vocabulary)
    optimizer = _optimizer("ce", config.teacher.optimizer, shared, config.teacher.epochs)
    return _job(
        "teacher",
        shared,
        directory / "teacher",
        of=of,
        init_params=lambda: new_params(of, shared),
        optimizer=optimizer,
        epochs=config.teacher.epochs,
        remedy="lower --config.teacher.optimizer.learning_rate",
    )


def evaluated_teacher(shared: Shared, directory: epath.Path, at_hand: TeacherAtHand) -> Job:
    """A teacher that comes from elsewhere: a job that is only to be evaluated."""
    return _job(
        "teacher",
        shared,
        directory / "teacher",
        of=at_hand.architecture,
        init_params=lambda: at_hand.network.params,
        optimizer=optax.chain(dot_optax.sum_losses(), optax.set_to_zero()),
        epochs=0,
        remedy="",
    )


def student(method: str, shared: Shared, directory: epath.Path, at_hand: TeacherAtHand) -> Job:
    """The student of a method."""
    config = shared.config
    sampling = Sampling.from_config(config.sampling)
    sampling = sampling.for_task_alone() if method == "ce" else sampling
    every, weights = config.student.every_nth_layer, dot_optax.PerLoss(*_weights(config))
    summed = None
    if not config.gradient_metrics and sampling.sum_is_exact:
        summed = methods.weights_of_the_sum(method, weights)
    of = student_architecture(shared, at_hand.architecture)
    diagnostics = None
    if config.diagnostics:
        objective = PLAIN._replace(weights=weights)
        steps_per_epoch = data.steps_per_epoch(shared.corpus.train, config.sequence_length, config.batch_size)
        diagnostics = methods.diagnostics(method, config.optimizer, objective, steps_per_epoch, config.epochs)
        if config.diagnostics_by == "layer":
            diagnostics = diagnostics._replace(layers=layers(network_shapes(of, shared)[1]))

    def init_params() -> Any:
        if not every:
            return new_params(of, shared)
        kept, _ = model.every_nth_layer(at_hand.network.params, at_hand.architecture, every)
        # Copies: the step uses the memory of what it is given again, and the teacher needs its own.
        return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), kept)

    return _job(
        method,
        shared,
        directory / method,
        of=of,
        init_params=init_params,
        optimizer=_optimizer(method, config.optimizer, shared, config.epochs, weights if summed is None else None),
        epochs=config.epochs,
        remedy="lower --config.optimizer.learning_rate (or, for dot, --config.optimizer.delta)",
        at_hand=at_hand,
        sampling=sampling,
        summed=summed,
        diagnostics=diagnostics,
    )


def student_architecture(shared: Shared, of_teacher: Architecture) -> Architecture:
    """The architecture of the students, whose vocabulary is the teacher's: it may be larger than the tokenizer's."""
    section = shared.config.student
    if not section.every_nth_layer:
        return architecture(section.model, of_teacher.vocabulary)
    return of_teacher._replace(layers=-(-of_teacher.layers // section.every_nth_layer))


def check(names: list[str], shared: Shared, of_teacher: Architecture) -> None:
    """Raises if the networks or the methods of these names cannot be used, before anything is trained."""
    config = shared.config
    data.steps_per_epoch(shared.corpus.train, config.sequence_length, config.batch_size)
    check_rows(Sampling.from_config(config.sampling), config.batch_size, shared.devices)
    losses.build(config.distillation, of_teacher.vocabulary)
    every = config.student.every_nth_layer
    if every > of_teacher.layers:
        raise UserError(
            f"bad --config.student.every_nth_layer={every}: the teacher has {of_teacher.layers} layers; give as many or"
            " fewer"
        )
    of_student = student_architecture(shared, of_teacher)
    for section, of in (("teacher", of_teacher), ("student", of_student)):
        _, params = network_shapes(of, shared)
        numbers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
        batches.check_memory(
            4 * numbers // jax.process_count(),
            f"the {numbers:,} parameters of the {section}",
            f"a smaller {section}, or more hosts",
        )
    if not config.teacher.path:
        _optimizer("ce", config.teacher.optimizer, shared, config.teacher.epochs)
    for name in names:
        optimizer = _optimizer(name, config.optimizer, shared, config.epochs, dot_optax.PerLoss(*_weights(config)))
        methods.check_updates(name, optimizer, network_shapes(of_student, shared)[1])


def _weights(config: ConfigDict) -> tuple[float, float]:
    return config.distillation.task_weight, config.distillation.kd_weight


def _optimizer(
    method: str, config: ConfigDict, shared: Shared, epochs: int, weights: Any = None
) -> optax.GradientTransformation:
    whole = shared.config
    steps_per_epoch = data.steps_per_epoch(shared.corpus.train, whole.sequence_length, whole.batch_size)
    weights = weights or dot_optax.PerLoss(1.0, 1.0)
    return methods.build(method, config, weights, steps_per_epoch, epochs, matrices=model.matrices)


def problem(graphdef: nnx.GraphDef, at_hand: TeacherAtHand | None, shared: Shared) -> Problem:
    """What the steps of a network compute; without a teacher at hand, the loss of the task alone."""
    config = shared.config
    return Problem(
        graphdef,
        at_hand.network.graphdef if at_hand and not at_hand.caches else None,
        losses.build(config.distillation, at_hand.architecture.vocabulary) if at_hand else None,
        shared.tokenizer.separator,
        config.remat,
        shared.activations,
    )


def _job(
    name: str,
    shared: Shared,
    directory: epath.Path,
    *,
    of: Architecture,
    init_params: Callable[[], Any],
    optimizer: optax.GradientTransformation,
    epochs: int,
    remedy: str,
    at_hand: TeacherAtHand | None = None,
    sampling: Sampling = EXACT,
    summed: Any = None,
    diagnostics: Diagnostics | None = None,
) -> Job:
    config, corpus, tokenizer, layout, _ = shared
    optimizer = diagnostics.recording(optimizer) if diagnostics else optimizer
    graphdef, params_like = network_shapes(of, shared)
    length, batch_size = config.sequence_length, config.batch_size
    caches = at_hand.caches if at_hand else {}
    task = problem(graphdef, at_hand, shared)._replace(kd_gradient=config.gradient_metrics or name != "ce")
    teacher_params = at_hand.network.params if at_hand and task.teacher else None
    step = steps.make_train_step(
        task,
        optimizer,
        layout,
        gradient_metrics=config.gradient_metrics,
        state_metrics=functools.partial(methods.read_state, name),
        sampling=sampling,
        summed=summed,
        diagnostics=diagnostics,
    )

    def cost() -> Record:
        """Of a step, on average: how often the teacher sees a batch, and the operations up to the gradients."""
        if task.loss is None:
            return {"teacher_forwards": 0.0, "relative_flops": None}
        assert at_hand
        plain = task._replace(teacher=at_hand.network.graphdef, kd_gradient=True)
        shapes = at_hand.without_params().network.params
        k = caches["train"].log_probs.shape[-1] if caches else 0
        args = (
            params_like,
            {},
            shapes,
            data.batch_shapes(length, batch_size, k),
            data.batch_shapes(length, batch_size),
        )
        return {
            "teacher_forwards": 0.0 if caches else sampling.teacher_forwards,
            "relative_flops": steps.relative_flops(task, plain, sampling, summed, *args),
        }

    def further(variables: Variables) -> Record:
        """What the network is, and what it writes behind each prompt of the config."""
        texts = generate.continue_text(graphdef, variables[0], tokenizer, config.prompts, config.prompt_tokens)
        return trained.description(of, tokenizer) | {"continuations": dict(zip(config.prompts, texts, strict=True))}

    return Job(
        name=name,
        directory=directory,
        init_state=lambda: _new_state(init_params(), optimizer, layout),
        step=lambda state, batch: step(state, teacher_params, batch),
        evaluate=_evaluate(name, task, teacher_params, caches, shared),
        batches=lambda: data.train_batches(
            corpus.train,
            length,
            batch_size,
            config.seed,
            epochs,
            layout.put_batch,
            parallel.host_part(layout.mesh),
            caches.get("train"),
        ),
        batch_size=batch_size * length,
        steps_per_epoch=data.steps_per_epoch(corpus.train, length, batch_size),
        epochs=epochs,
        seed=config.seed,
        splits={split: split for split in ("validation", "test")},
        metrics=metrics(name, diagnostics),
        unit="tokens",
        remedy=remedy,
        cost=cost,
        further=further,
    )


def _new_state(params: Any, optimizer: optax.GradientTransformation, layout: parallel.Layout) -> TrainState:
    """The state before the first step, where it is to be from the first: that of an optimizer may exceed a device."""
    like = jax.eval_shape(lambda: init_state(params, {}, optimizer))
    params = jax.device_put(params, layout.shardings(params))
    opt_state = jax.jit(optimizer.init, out_shardings=layout.shardings(like).opt_state)(params)
    return TrainState(jnp.zeros((), jnp.int32), params, {}, opt_state)


def _evaluate(
    name: str, problem: Problem, teacher_params: Any, caches: Mapping[str, CachedTeacher], shared: Shared
) -> Evaluate:
    """Returns `evaluate(variables, split)`, which gives the means over a split."""
    config, layout = shared.config, shared.layout
    eval_step = steps.make_eval_step(problem)
    length = config.sequence_length
    batch_size = data.eval_batch_size(shared.corpus, length, config.eval_batch_size, shared.devices)
    put, host = functools.partial(parallel.divide, layout.mesh), parallel.host_part(layout.mesh)

    def evaluate(variables: Variables, split: str) -> Record:
        part = getattr(shared.corpus, split)
        sums: collections.Counter[str] = collections.Counter()
        # The bar appears only where one would wonder.
        with tqdm(
            desc=f"{name}, {split} split",
            total=len(part.tokens),
            unit=" tokens",
            unit_scale=True,
            delay=10,
            leave=False,
            disable=jax.process_index() > 0,
        ) as bar:
            found = data.eval_batches(part, length, batch_size, put, host, caches.get(split))
            for batch_sums in loop.fetch(eval_step(variables[0], teacher_params, batch) for batch in found):
                if shared.preempted():
                    raise Preempted
                sums.update({name: float(value) for name, value in batch_sums.items()})
                bar.update(min(batch_size * length, len(part.tokens) - bar.n))
        return means(sums, part.num_bytes)

    return evaluate


def means(sums: dict[str, float], num_bytes: int) -> Record:
    """The means over predictions out of the sums of `steps.make_eval_step`, and what they are in bits per byte.

    The standard error of the latter takes sequences to be independent; they are not all as long.
    """
    count, sequences, nats = sums.pop("count"), sums.pop("sequences"), sums["task_loss"]
    squares, products, lengths = (sums.pop(name) for name in ("squares", "products", "lengths"))
    # Of what each sequence has more than its share.
    residuals = squares - 2 * nats / count * products + (nats / count) ** 2 * lengths
    spread = math.sqrt(max(residuals, 0.0) * sequences / max(sequences - 1, 1))
    return {metric: value / count for metric, value in sums.items()} | {
        "bits_per_byte": steps.bits_per_byte(nats, num_bytes),
        "bits_per_byte_error": steps.bits_per_byte(spread, num_bytes),
        "count": count,
    }
