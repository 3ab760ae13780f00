"""One experiment from start to report: the teacher, then a student for every method, then table and picture."""

from pathlib import Path

from ml_collections import ConfigDict

import dot_optax
from examples.distill import checkpoint, data, methods, report, train, workdir
from examples.distill.errors import UserError
from examples.distill.steps import Teacher


def run(config: ConfigDict, name: str, directory: Path) -> None:
    """Trains what is not trained yet in `directory` and reports on every arm that is there."""
    wanted = methods.parse(config.method)
    _check_counts(config)
    workdir.check(directory, config)
    missing = [method for method in wanted if not train.is_finished(directory / method)]
    if missing:
        _train_missing(missing, config, directory)
    else:
        print(f"Nothing left to train in {directory}.")
    report.write(config, name, directory)


def _train_missing(missing: list[str], config: ConfigDict, directory: Path) -> None:
    dataset = data.load(config.dataset)
    steps_per_epoch = data.steps_per_epoch(dataset, config.batch_size)
    weights = dot_optax.PerLoss(task=config.distillation.task_weight, kd=config.distillation.kd_weight)
    # Everything is built once before the teacher trains: a bad value should not wait for that, nor claim the folder.
    optimizers = {method: methods.build(method, config.optimizer, weights, steps_per_epoch) for method in missing}
    teacher_optimizer = methods.build("ce", config.teacher.optimizer, weights, steps_per_epoch)
    train.new_network(config.student.model, dataset, config.seed)
    graphdef, _, _ = train.new_network(config.teacher.model, dataset, config.seed)
    workdir.claim(directory, config)

    teacher_arm = train.Arm(
        name="teacher",
        directory=directory / "teacher",
        model=config.teacher.model,
        optimizer=teacher_optimizer,
        epochs=config.teacher.epochs,
        teacher=None,
        remedy="lower --config.teacher.optimizer.learning_rate",
    )
    if not train.is_finished(teacher_arm.directory):
        train.fit(teacher_arm, config, dataset)
    teacher = Teacher(graphdef, checkpoint.load_variables(teacher_arm.directory))

    for method, optimizer in optimizers.items():
        student_arm = train.Arm(
            name=method,
            directory=directory / method,
            model=config.student.model,
            optimizer=optimizer,
            epochs=config.epochs,
            teacher=teacher,
            remedy="lower --config.optimizer.learning_rate (or, for dot, --config.optimizer.delta)",
        )
        train.fit(student_arm, config, dataset)


def _check_counts(config: ConfigDict) -> None:
    fields = workdir.fields(config)
    for field in ("epochs", "teacher.epochs", "batch_size", "eval_batch_size", "checkpoint_every_epochs"):
        if fields[field] < 1:
            raise UserError(f"bad --config.{field}={fields[field]}: it must be at least 1")
