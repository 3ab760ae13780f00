"""One experiment from start to report: the teacher, then a student for every method, then table and picture."""

from pathlib import Path

from ml_collections import ConfigDict

import dot_optax
from examples.distill import checkpoint, data, methods, report, settings, train, workdir
from examples.distill.steps import Teacher


def run(config: ConfigDict, name: str, directory: Path) -> None:
    """Trains what is not trained yet in `directory` and reports on every arm that is there."""
    settings.check(config)
    methods.betas(config.optimizer)  # The report needs them, whichever methods are trained.
    wanted = methods.parse(config.method)
    workdir.check(directory, config)
    print(f"Working directory: {directory}")
    missing = [method for method in wanted if not train.is_finished(directory / method)]
    if missing:
        # Before the folder is claimed: a value that cannot be used should not wait for the teacher, nor leave a trace.
        dataset = data.load(config.dataset)
        teacher, students = _build(missing, config, directory, dataset)
    with workdir.claim(directory, config):
        if missing:
            _train(teacher, students, config, dataset)
        else:
            print("Nothing left to train.")
        report.write(config, name, directory)


def _build(
    missing: list[str], config: ConfigDict, directory: Path, dataset: data.Dataset
) -> tuple[train.Arm, list[train.Arm]]:
    """Returns the teacher and the students that are missing."""
    steps_per_epoch = data.steps_per_epoch(dataset, config.batch_size)
    weights = dot_optax.PerLoss(task=config.distillation.task_weight, kd=config.distillation.kd_weight)
    for model in (config.teacher.model, config.student.model):
        train.new_network(model, dataset, config.seed)
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


def _train(teacher: train.Arm, students: list[train.Arm], config: ConfigDict, dataset: data.Dataset) -> None:
    if not train.is_finished(teacher.directory):
        train.fit(teacher, config, dataset)
    graphdef, _, _ = train.new_network(teacher.model, dataset, config.seed)
    trained = Teacher(graphdef, checkpoint.load_variables(teacher.directory))
    for student in students:
        train.fit(student._replace(teacher=trained), config, dataset)
