"""One experiment from start to report: the teacher, then a student for every method, then table and picture."""

from typing import Any

import jax
from etils import epath

from examples.distill import data, jobs, methods, report, smoke_test
from examples.distill import identity as identities
from examples.distill.jobs import Shared
from examples.distill.settings import Settings, validated
from examples.distill.steps import Teacher
from examples.trainer import checkpoint, hosts, identity, loop, parallel, paths, preemption, workdir
from examples.trainer.command_line import Arguments
from examples.trainer.errors import UserError


def run(arguments: Arguments) -> None:
    """Trains what is not trained yet in the working directory and reports on every method that is there."""
    preempted = preemption.watch()
    settings = validated(arguments.config)
    if arguments.smoke_test:
        smoke_test.run(settings, arguments.name, preempted)
        return
    directory = paths.resolve(arguments.workdir, "--workdir")
    with workdir.claim(directory):
        there = identity.check(directory, identities.of(settings))
        if jax.process_index() == 0:
            print(f"Working directory: {directory}")
        epochs = settings.config.epochs
        missing = [method for method in settings.methods if loop.finished_epochs(directory / method) != epochs]
        saved = {job: checkpoint.saved_steps(directory / job) for job in ("teacher", *methods.METHODS)}
        hosts.check_agree([settings.fields, missing, saved])
        if missing:
            _train(missing, settings, directory, there, preempted)
        elif jax.process_index() == 0:
            print("Nothing left to train.")
        if jax.process_index() == 0:
            report.write(settings, arguments.name, directory)


def _train(
    missing: list[str], settings: Settings, directory: epath.Path, there: dict[str, Any], preempted: Any
) -> None:
    config = settings.config
    teacher_path = _find_teacher(missing, settings, directory)
    shared = Shared(config, data.load(config.dataset), parallel.make_layout(config), preempted)
    jobs.check(missing, shared)  # What cannot be used should not wait for the teacher, nor leave a trace.
    teacher_job = jobs.teacher(shared, directory)
    teacher = teacher_path and _load_teacher(teacher_path, shared)
    belongs, checksum = identities.of(settings), identity.recorded_teacher(there)
    if teacher:
        checksum = checkpoint.checksum(teacher.variables)
        identity.check_teacher(directory, belongs, there, teacher_path, checksum)
    elif config.teacher.train:
        identity.check_new_teacher(directory, belongs, there, "--config.teacher.checkpoint")
    identity.record(directory, belongs, checksum)
    options = loop.options(config, shared.layout, preempted)
    if teacher is None and config.teacher.train:
        loop.fit(teacher_job, options)
        teacher = _load_teacher(teacher_job.directory, shared)
        identity.record(directory, belongs, checkpoint.checksum(teacher.variables))
    if teacher:
        teacher = teacher._replace(variables=parallel.replicate(shared.layout.mesh, teacher.variables))
        if not loop.is_finished(teacher_job.directory):
            only_test = teacher_job._replace(splits={"test": config.dataset.test})
            loop.write_result(only_test, teacher.variables)
    for method in missing:
        loop.fit(jobs.student(method, shared, directory, teacher), options)


def _find_teacher(missing: list[str], settings: Settings, directory: epath.Path) -> epath.Path | None:
    """Returns the folder of a teacher that is there; None if it is to be trained, or if no method needs one."""
    teacher = settings.config.teacher
    wanted = f"a {teacher.model.name} (import one with python -m examples.distill.import_teacher, or train one)"
    if teacher.checkpoint:
        folder = paths.resolve(teacher.checkpoint, "--config.teacher.checkpoint")
        if not checkpoint.has_network(folder):
            inside = [path.parent for path in folder.glob("*/checkpoints") if checkpoint.has_network(path.parent)]
            hint = f"did you mean {inside[0]}?" if inside else f"give the folder of {wanted}"
            raise UserError(f"no trained network in --config.teacher.checkpoint={folder}; {hint}")
        return folder
    if checkpoint.has_network(directory / "teacher"):
        return directory / "teacher"
    if teacher.train or missing == ["ce"]:
        return None
    raise UserError(
        f"no teacher: give --config.teacher.checkpoint=FOLDER of {wanted}, or --config.teacher.train=True to train it"
        " first; see examples/distill/README.md"
    )


def _load_teacher(folder: epath.Path, shared: Shared) -> Teacher:
    """Loads the teacher in `folder`, which must fit the config."""
    model = shared.config.teacher.model
    graphdef, *expected = jobs.network_shapes(model, shared)
    try:
        variables = checkpoint.load_fitting(folder, tuple(expected))
    except ValueError as error:
        raise UserError(
            f"the teacher in {folder} is no {model.name} with {shared.dataset.num_classes} classes: {error};"
            " config.teacher.model says which network it is"
        ) from error
    return Teacher(graphdef, variables)
