"""One experiment from start to report: the teacher, then a student for every method, then table and picture."""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import dot_optax
from examples.distill import checkpoint, data, methods, models, parallel, preemption, report, settings, train, workdir
from examples.distill.errors import UserError
from examples.distill.steps import Teacher


def run(config: ConfigDict, name: str, directory: Path) -> None:
    """Trains what is not trained yet in `directory` and reports on every arm that is there."""
    preempted = preemption.watch()
    settings.check(config)
    methods.betas(config.optimizer)  # The report needs them, whichever methods are trained.
    wanted = methods.parse(config.method)
    workdir.check(directory, config)
    if jax.process_index() == 0:
        print(f"Working directory: {directory}")
    missing = [method for method in wanted if not train.is_finished(directory / method)]
    if jax.process_count() > 1:
        _check_hosts_agree(config, directory, missing)
    if missing:
        # Before the folder is claimed: a value that cannot be used should not wait for the teacher, nor leave a trace.
        teacher_folder = _find_teacher(missing, config, directory)
        for model in (config.teacher.model, config.student.model):
            models.check_name(model.name)
        setup = train.Setup(config, data.load(config.dataset), parallel.make_layout(config), preempted)
        teacher, students = _arms(missing, setup, directory)
        given = _load_teacher(teacher, teacher_folder, setup)
    with workdir.claim(directory, config):
        if missing:
            _train(teacher, students, given, setup)
        elif jax.process_index() == 0:
            print("Nothing left to train.")
        if jax.process_index() == 0:
            report.write(config, name, directory)


def _check_hosts_agree(config: ConfigDict, directory: Path, missing: list[str]) -> None:
    """Raises if hosts were started differently, or do not see the same files: they would wait for each other forever."""
    saved = {arm: checkpoint.saved_steps(directory / arm) for arm in ("teacher", *methods.METHODS)}
    seen = json.dumps([settings.fields(config), missing, saved], sort_keys=True)
    try:
        multihost_utils.assert_equal(np.frombuffer(hashlib.sha256(seen.encode()).digest(), np.uint8))
    except AssertionError:
        with contextlib.suppress(
            Exception
        ):  # It waits for the others: the first to end would abort those that still talk.
            jax.distributed.shutdown()
        raise UserError(
            "the hosts do not agree: start the same command on each, with a --workdir that all of them see"
        ) from None


def _find_teacher(missing: list[str], config: ConfigDict, directory: Path) -> Path | None:
    """Returns the folder of a teacher that is there; None if it is to be trained, or if no method needs one."""
    wanted = f"a {config.teacher.model.name} (import one with python -m examples.distill.import_teacher, or train one)"
    if config.teacher.checkpoint:
        folder = Path(config.teacher.checkpoint).absolute()
        if not checkpoint.has_network(folder):
            inside = [path.parent for path in folder.glob("*/checkpoints") if checkpoint.has_network(path.parent)]
            hint = f"did you mean {inside[0]}?" if inside else f"give the folder of {wanted}"
            raise UserError(f"no trained network in --config.teacher.checkpoint={folder}; {hint}")
        return folder
    if checkpoint.has_network(directory / "teacher"):
        return directory / "teacher"
    if config.teacher.train or missing == ["ce"]:
        return None
    raise UserError(
        f"no teacher: give --config.teacher.checkpoint=FOLDER of {wanted}, or --config.teacher.train=True to train it"
        " first; see examples/distill/README.md"
    )


def _arms(missing: list[str], setup: train.Setup, directory: Path) -> tuple[train.Arm, list[train.Arm]]:
    """Returns the teacher and the students that are missing."""
    config, dataset, *_ = setup
    steps_per_epoch = data.steps_per_epoch(dataset, config.batch_size)
    weights = dot_optax.PerLoss(task=config.distillation.task_weight, kd=config.distillation.kd_weight)
    for model in (config.teacher.model, config.student.model):
        models.check_input(_shapes(model, setup), dataset.image_shape, model.name)
    teacher = train.Arm(
        name="teacher",
        directory=directory / "teacher",
        model=config.teacher.model,
        optimizer=methods.build("ce", config.teacher.optimizer, weights, steps_per_epoch),
        epochs=config.teacher.epochs,
        remedy="lower --config.teacher.optimizer.learning_rate",
    )
    students = [
        train.Arm(
            name=method,
            directory=directory / method,
            model=config.student.model,
            optimizer=methods.build(method, config.optimizer, weights, steps_per_epoch),
            epochs=config.epochs,
            remedy="lower --config.optimizer.learning_rate (or, for dot, --config.optimizer.delta)",
        )
        for method in missing
    ]
    return teacher, students


def _load_teacher(arm: train.Arm, folder: Path | None, setup: train.Setup) -> Teacher | None:
    """Loads the teacher in `folder`, which must fit the config."""
    if folder is None:
        return None
    graphdef, *expected = _shapes(arm.model, setup)
    variables = checkpoint.load_variables(folder)
    wanted, found = (
        {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)} for tree in (tuple(expected), variables)
    )
    try:
        checkpoint.check_fit({name: leaf.shape for name, leaf in wanted.items()}, found)
    except ValueError as error:
        raise UserError(
            f"the teacher in {folder} is no {arm.model.name} with {setup.dataset.num_classes} classes: {error}"
        ) from error
    return Teacher(graphdef, variables)


def _shapes(model: ConfigDict, setup: train.Setup) -> tuple[nnx.GraphDef, Any, Any]:
    """Returns (graphdef, params, rest) of a network, with shapes in the place of arrays."""
    return nnx.eval_shape(lambda: train.new_network(model, setup))


def _name(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path[1:], simple=True, separator=".")  # The first key tells params from rest.


def _train(teacher: train.Arm, students: list[train.Arm], given: Teacher | None, setup: train.Setup) -> None:
    if given is None and setup.config.teacher.train:
        train.fit(teacher, setup)
        given = _load_teacher(teacher, teacher.directory, setup)
    if given is not None:
        given = given._replace(variables=parallel.replicate(setup.layout.mesh, given.variables))
    if given is not None and not train.is_finished(teacher.directory):
        evaluate = train.make_evaluate(teacher, setup, given.graphdef)
        train.write_result(teacher, setup, evaluate, given.variables, splits=("test",))
    for student in students:
        train.fit(student._replace(teacher=given), setup)
