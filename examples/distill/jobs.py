"""The jobs of an experiment: the teacher, and a student for each method."""

import collections
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax
from etils import epath
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

from examples.distill import data, methods, models, objectives, steps
from examples.distill.objectives import Length, Objective
from examples.distill.steps import Teacher
from examples.trainer import loop, parallel
from examples.trainer.batches import check_memory
from examples.trainer.diagnostics import Diagnostics, layers
from examples.trainer.errors import UserError
from examples.trainer.job import Evaluate, Job, MetricNames, Variables
from examples.trainer.preemption import Preempted
from examples.trainer.records import Record
from examples.trainer.sampling import EXACT, Sampling, check_rows
from examples.trainer.step import OWN, init_state
from examples.trainer.step import network as of_network


def metrics(
    method: str, names: Sequence[str] = objectives.PLAIN.names, diagnostics: Diagnostics | None = None
) -> MetricNames:
    """The metrics of a method that trains on losses of these names."""
    losses = dict.fromkeys((*names[:1], "kd", *names[1:]))  # the plain distillation loss, whatever is trained
    return MetricNames(
        # Means over the images of an epoch, unweighted; the norms of the gradients of the unweighted losses that are
        # trained; and of two of them the cosine between these: below 0, the losses are in conflict. Norms and cosine are
        # over all parameters: the task's norm has the head in it, CRD's the projectors, which the other does not reach. With
        # --config.parallel=shard_map norms and cosine are those of each device's own part of a batch, averaged: the
        # gradients themselves are never averaged there, and the noise of a smaller batch makes their norms larger. null:
        # without a teacher, or without config.gradient_metrics. With --config.sampling the means are over the steps that
        # know: a loss that they compute, gradients that are apart (with alternating no step has both, and so no cosine).
        # With form=examples the losses of distillation and their gradients are those of the rows that were taken, which
        # are noisier: the norm is larger and the cosine closer to 0.
        # trainer/diagnostics.py says what config.diagnostics adds.
        training=(
            *(f"{name}_loss" for name in losses),
            *(f"{name}_grad_norm" for name in names),
            *(("grad_cosine",) if len(names) == 2 else ()),
            *methods.state_metrics(method),
            *(diagnostics.metrics if diagnostics else ()),
        ),
        validation=("task_loss", "kd_loss", "top1", "top5"),  # accuracies are fractions of 1
        best="top1",
        shown={"task_loss": "task loss", "kd_loss": "KD loss"},
    )


class Shared(NamedTuple):
    """What all jobs of an experiment share."""

    config: ConfigDict
    dataset: data.Dataset
    layout: parallel.Layout
    preempted: Callable[[], bool]  # see preemption.py


def student(method: str, shared: Shared, directory: epath.Path, teacher: Teacher | None) -> Job:
    """The student of a method, which imitates a teacher whose variables are on all devices."""
    config = shared.config
    sampling = _sampling(method, config) if teacher else EXACT
    objective = _objective(method, shared)
    summed = _summed(method, objective, sampling, config)
    return _job(
        method,
        shared,
        directory / method,
        model=config.student.model,
        objective=objective,
        optimizer=_optimizer(method, config.optimizer, shared, config.epochs, objective, weighted=summed is None),
        epochs=config.epochs,
        remedy="lower --config.optimizer.learning_rate (or, for dot, --config.optimizer.delta)",
        teacher=teacher,
        sampling=sampling,
        summed=summed,
        diagnostics=_diagnostics(method, objective, shared) if config.diagnostics else None,
    )


def _diagnostics(method: str, objective: Objective, shared: Shared) -> Diagnostics:
    """What is to be known of a student; see trainer/diagnostics.py."""
    config, dataset = shared.config, shared.dataset
    steps_per_epoch = data.steps_per_epoch(dataset, config.batch_size)
    found = methods.diagnostics(method, config.optimizer, objective, steps_per_epoch, config.epochs)
    if config.diagnostics_by == "layer":
        found = found._replace(layers=layers(_start_shapes(config.student.model, objective, shared)[0]))
    if config.optimizer.name != "sgd":  # Adam's and Muon's steps do not shrink as the weights grow.
        return found
    invariant = models.scale_invariant(network(config.student.model, shared), dataset.image_shape)
    if not any(invariant):
        return found

    def kernels(params: Any) -> list[Any]:
        return list(itertools.compress(jax.tree.leaves(of_network(params)), invariant))

    return found._replace(scale_invariant=kernels)


def teacher(shared: Shared, directory: epath.Path) -> Job:
    """The teacher, which is trained with cross-entropy."""
    config = shared.config.teacher
    return _job(
        "teacher",
        shared,
        directory / "teacher",
        model=config.model,
        objective=objectives.PLAIN,
        optimizer=_optimizer("ce", config.optimizer, shared, config.epochs, objectives.PLAIN),
        epochs=config.epochs,
        remedy="lower --config.teacher.optimizer.learning_rate",
    )


def check(names: Sequence[str], shared: Shared) -> None:
    """Raises if the networks or the methods of these names cannot be used, before anything is trained."""
    config, dataset = shared.config, shared.dataset
    for section in ("teacher", "student"):
        model = config[section].model
        shapes = network_shapes(model, shared)
        numbers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes[1]))
        check_memory(
            4 * numbers, f"the {numbers:,} parameters of {model.name}", f"--config.{section}.model another size"
        )
        models.check_input(shapes, dataset.image_shape, model.name, dataset.num_classes)
    check_rows(Sampling.from_config(config.sampling), config.batch_size, shared.layout.mesh.size)
    _optimizer("ce", config.teacher.optimizer, shared, config.teacher.epochs, objectives.PLAIN)
    for name in names:
        objective = _objective(name, shared)
        objectives.check(name, objective, dataset.num_classes)
        if objective.own:
            _check_own(name, objective, shared)
        optimizer = _optimizer(name, config.optimizer, shared, config.epochs, objective)
        params, _ = _start_shapes(config.student.model, objective, shared)
        methods.check_updates(name, optimizer, params, objective.container)


def network(model: ConfigDict, shared: Shared, *, axis_name: str | None = None) -> tuple[nnx.GraphDef, Any, Any]:
    """Returns (graphdef, params, rest) of a freshly initialized network."""
    return models.split(
        models.build(
            **model,
            num_classes=shared.dataset.num_classes,
            input_shape=shared.dataset.image_shape,
            dtype=shared.config.dtype,
            axis_name=axis_name,
            rngs=nnx.Rngs(shared.config.seed),
        )
    )


def network_shapes(model: ConfigDict, shared: Shared) -> tuple[nnx.GraphDef, Any, Any]:
    """The same with shapes in the place of arrays."""
    return nnx.eval_shape(lambda: network(model, shared))


def _start(model: ConfigDict, objective: Objective, shared: Shared) -> tuple[Any, Any]:
    """Returns (params, rest) before the first step, of a student and of its losses."""
    _, params, rest = network(model, shared)
    if objective.own is None:
        return params, rest
    config, shape = shared.config, shared.dataset.image_shape
    widths = tuple(
        models.features_width(network_shapes(each, shared), shape, each.name) for each in (model, config.teacher.model)
    )
    of_params, of_rest = objective.own.init(widths, len(shared.dataset.labels()))
    return params | {OWN: of_params}, rest | {OWN: of_rest}


def _start_shapes(model: ConfigDict, objective: Objective, shared: Shared) -> tuple[Any, Any]:
    """The same with shapes in the place of arrays."""
    return jax.eval_shape(lambda: _start(model, objective, shared))


def _check_own(name: str, objective: Objective, shared: Shared) -> None:
    """Raises if what the losses of method `name` have of their own cannot be had."""
    if shared.dataset.labels is None:
        raise UserError(
            f"method {name!r} needs the labels of all training images at once: give --config.dataset.in_memory=True"
        )
    _, rest = _start_shapes(shared.config.student.model, objective, shared)
    check_memory(
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(rest[OWN])),
        f"what method {name!r} remembers of {len(shared.dataset.labels()):,} images",
        "--config.dataset.train fewer",
    )


def _sampling(method: str, config: ConfigDict) -> Sampling:
    sampling = Sampling.from_config(config.sampling)
    return sampling.for_task_alone() if method == "ce" else sampling


def _objective(method: str, shared: Shared) -> Objective:
    config = shared.config
    length = Length(config.epochs, data.steps_per_epoch(shared.dataset, config.batch_size))
    return methods.objective_of(method, config, length)


def _summed(method: str, objective: Objective, sampling: Sampling, config: ConfigDict) -> Any:
    """With which weights losses are summed before one backward pass; None where each needs its own."""
    if config.gradient_metrics or not sampling.sum_is_exact:
        return None
    return methods.weights_of_the_sum(method, objective.weights)


def _optimizer(
    method: str, config: ConfigDict, shared: Shared, epochs: int, objective: Objective, *, weighted: bool = True
) -> optax.GradientTransformation:
    weights = objective.weights if weighted else objective.container(*[1.0] * len(objective.names))
    steps_per_epoch = data.steps_per_epoch(shared.dataset, shared.config.batch_size)
    reached = _reached(objective, shared) if objective.own else None
    return methods.build(method, config, weights, steps_per_epoch, epochs, objective.deltas, reached)


def _reached(objective: Objective, shared: Shared) -> Any:
    """Which loss reaches which parameter of a student whose losses have parameters of their own."""
    config = shared.config
    student, teacher = (network_shapes(config[section].model, shared) for section in ("student", "teacher"))
    problem = _problem(student[0], teacher[0], objective, shared)
    start = _start_shapes(config.student.model, objective, shared)
    return steps.reached(problem, *start, teacher[1:], data.batch_shapes(shared.dataset, config.batch_size))


def _problem(
    student: nnx.GraphDef, teacher: nnx.GraphDef | None, objective: Objective, shared: Shared
) -> steps.Problem:
    config = shared.config
    return steps.Problem(
        student=student,
        teacher=teacher,
        temperature=config.distillation.temperature,
        mean=config.dataset.mean,
        std=config.dataset.std,
        objective=objective,
        all_labels=shared.dataset.labels() if objective.own else None,
    )


def _job(
    name: str,
    shared: Shared,
    directory: epath.Path,
    *,
    model: ConfigDict,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    epochs: int,
    remedy: str,
    teacher: Teacher | None = None,
    sampling: Sampling = EXACT,
    summed: Any = None,
    diagnostics: Diagnostics | None = None,
) -> Job:
    config, dataset, layout, _ = shared
    optimizer = diagnostics.recording(optimizer) if diagnostics else optimizer
    teacher_graphdef, teacher_variables = teacher or (None, None)
    new_network = functools.partial(network, model, shared, axis_name=layout.axis_name)
    problem = _problem(nnx.eval_shape(new_network)[0], teacher_graphdef, objective, shared)
    problem = problem._replace(kd_gradient=config.gradient_metrics or name != "ce")
    step = steps.make_train_step(
        problem,
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
        teacher, *teacher_shapes = network_shapes(config.teacher.model, shared)
        student, *_ = network_shapes(model, shared)
        here = problem._replace(student=student, teacher=problem.teacher and teacher)
        plain = here._replace(teacher=teacher, objective=objectives.PLAIN, kd_gradient=True)
        args = (
            *_start_shapes(model, objective, shared),
            tuple(teacher_shapes),
            data.batch_shapes(dataset, config.batch_size),
        )
        return {
            "teacher_forwards": sampling.teacher_forwards if problem.teacher else 0.0,
            "relative_flops": steps.relative_flops(here, plain, sampling, summed, *args),
        }

    return Job(
        name=name,
        directory=directory,
        init_state=lambda: init_state(*_start(model, objective, shared), optimizer),
        step=lambda state, batch: step(state, teacher_variables, batch),
        evaluate=_evaluate(name, problem, teacher_variables, shared),
        batches=lambda: data.train_batches(dataset, config.batch_size, config.seed, epochs, layout.put_batch),
        batch_size=config.batch_size,
        steps_per_epoch=data.steps_per_epoch(dataset, config.batch_size),
        epochs=epochs,
        seed=config.seed,
        splits={split: config.dataset[split] for split in ("train", "validation", "test")},
        metrics=metrics(name, objective.names, diagnostics),
        unit="images",
        remedy=remedy,
        cost=cost,
    )


def _evaluate(name: str, problem: steps.Problem, teacher_variables: Variables | None, shared: Shared) -> Evaluate:
    """Returns `evaluate(variables, split)`, which gives means over a split, and how many images it has."""
    eval_step = steps.make_eval_step(problem)
    mesh = shared.layout.mesh
    batch_size = data.eval_batch_size(shared.dataset, shared.config.eval_batch_size, mesh.size)
    put = functools.partial(parallel.divide, mesh)

    def evaluate(variables: Variables, split: str) -> Record:
        examples = getattr(shared.dataset, split)
        batches = data.eval_batches(shared.dataset, examples, batch_size, put)
        sums: collections.Counter[str] = collections.Counter()
        # The bar appears only where one would wonder.
        with tqdm(
            desc=f"{name}, {split} split",
            total=len(examples),
            unit=" images",
            delay=10,
            leave=False,
            disable=jax.process_index() > 0,
        ) as bar:
            for batch_sums in loop.fetch(eval_step(variables, teacher_variables, batch) for batch in batches):
                if shared.preempted():
                    raise Preempted
                sums.update({name: float(value) for name, value in batch_sums.items()})
                bar.update(min(batch_size, len(examples) - bar.n))
        return {name: value / len(examples) for name, value in sums.items()} | {"count": len(examples)}

    return evaluate
