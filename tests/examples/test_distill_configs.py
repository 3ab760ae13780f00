"""The configs of the paper: every hyperparameter as published, and steps of each of them."""

import functools
import json
import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dot_optax
from examples.distill import data, methods, models, objectives, settings, steps
from examples.distill.command_line import main, parse
from examples.trainer import checkpoint, parallel
from examples.trainer.step import init_state
from tests import networks
from tests.tiers import slow_but

_DISTILL = pathlib.Path(methods.__file__).parent

_CIFAR = {
    "dataset.name": "cifar100",
    "dataset.preprocessing": "cifar",
    "dataset.image_size": 32,
    "dataset.test": "test",
    "batch_size": 64,
    "epochs": 240,
    "optimizer.learning_rate": 0.05,
    "optimizer.drop_epochs": (150, 180, 210),
    "optimizer.weight_decay": 5e-4,
    "distillation.temperature": 4.0,
    "distillation.task_weight": 0.1,
    "distillation.kd_weight": 0.9,
    "optimizer.delta": 0.075,
    "dkd.beta": 8.0,
    "dkd.warmup_epochs": 20,
    "deepkd.task_weight": 0.1,
}
_TINY_IMAGENET = _CIFAR | {
    "dataset.name": "tiny_imagenet",
    "dataset.preprocessing": "tiny_imagenet",
    "dataset.image_size": 64,
    "dataset.test": "validation",
    "batch_size": 256,
    "epochs": 200,
    "optimizer.learning_rate": 0.2,
    "optimizer.drop_epochs": (60, 120, 160),
}
_IMAGENET = {
    "dataset.name": "imagenet2012",
    "dataset.preprocessing": "imagenet",
    "dataset.image_size": 224,
    "dataset.test": "validation",
    "batch_size": 512,
    "epochs": 100,
    "optimizer.learning_rate": 0.2,
    "optimizer.drop_epochs": (30, 60, 90),
    "optimizer.weight_decay": 1e-4,
    "distillation.temperature": 1.0,
    "distillation.task_weight": 0.5,
    "distillation.kd_weight": 0.5,
    "optimizer.delta": 0.09,
    "dkd.beta": 0.5,
    "dkd.warmup_epochs": 1,
    "deepkd.task_weight": 0.5,
}


def _networks(teacher, student):
    return {"teacher.model.name": teacher, "student.model.name": student}


_PUBLISHED = {
    "cifar100_r32x4_r8x4": _CIFAR | _networks("resnet32x4", "resnet8x4") | {"deepkd.task_weight": 0.5},
    "cifar100_vgg13_vgg8": _CIFAR | _networks("vgg13", "vgg8") | {"dkd.beta": 6.0, "deepkd.delta_non_target": 0.05},
    "cifar100_r32x4_shufflev2": _CIFAR | _networks("resnet32x4", "shufflenetv2") | {"optimizer.learning_rate": 0.01},
    "tiny_imagenet_r18_mobilenetv2": _TINY_IMAGENET | _networks("resnet18_small", "mobilenetv2"),
    "tiny_imagenet_r18_shufflev2": _TINY_IMAGENET | _networks("resnet18_small", "shufflenetv2"),
    "imagenet_r34_r18": _IMAGENET | _networks("resnet34", "resnet18"),
    "imagenet_r50_mobilenetv1": _IMAGENET | _networks("resnet50", "mobilenetv1") | {"dkd.beta": 2.0},
}
_SAME_FOR_ALL = {
    "dataset.train": "train",
    "optimizer.momentum": 0.9,
    "optimizer.drop_factor": 0.1,
    "method": "dot",
    "dtype": "float32",
    "dataset.synthetic": False,
    "dkd.task_weight": 1.0,
    "dkd.alpha": 1.0,
    "deepkd.target_weight": 1.0,
    "deepkd.non_target_weight": 1.0,
    "deepkd.delta_task": 0.075,
    "deepkd.delta_target": -0.075,
    "deepkd.delta_non_target": 0.075,
    "deepkd.top_k_fraction": 0.05,
    "deepkd.top_k_phases": (0.25, 0.5),
    "crd.task_weight": 1.0,
    "crd.crd_weight": 0.8,
    "crd.dim": 128,
    "crd.negatives": 16384,
    "crd.temperature": 0.07,
    "crd.momentum": 0.5,
}
# Mean and standard deviation of each channel, of pixels from 0 to 1.
_PIXELS = {
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "tiny_imagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "imagenet2012": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
_SIZES = {
    "cifar100": {"train": 50_000, "test": 10_000},
    "tiny_imagenet": {"train": 100_000, "validation": 10_000},
    "imagenet2012": {"train": 1_281_167, "validation": 50_000},
}
_CLASSES = {"cifar100": 100, "tiny_imagenet": 200, "imagenet2012": 1000}


_TOP1 = {  # in the paper: KD, KD + DOT
    "cifar100_r32x4_r8x4": ("73.33", "75.12"),
    "cifar100_vgg13_vgg8": ("72.98", "73.77"),
    "cifar100_r32x4_shufflev2": ("74.45", "75.55"),
    "tiny_imagenet_r18_mobilenetv2": ("58.35", "64.01"),
    "tiny_imagenet_r18_shufflev2": ("62.26", "65.75"),
    "imagenet_r34_r18": ("71.03", "71.72"),
    "imagenet_r50_mobilenetv1": ("70.50", "73.09"),
}


def _config(name, *overrides):
    return parse([f"--config={name}", *overrides]).config


@pytest.mark.parametrize("name", _PUBLISHED)
def test_every_hyperparameter_is_the_published_one(name):
    fields = settings.validated(_config(name)).fields
    expected = _SAME_FOR_ALL | _PUBLISHED[name]
    assert {field: fields[field] for field in expected} == expected


@pytest.mark.parametrize(
    ("name", "classes"),
    [("cifar100_vgg13_vgg8", 100), pytest.param("imagenet_r34_r18", 1000, marks=pytest.mark.slow)],
)
def test_other_losses_have_their_schedules(name, classes):
    """DKD's weight rises to 1 in its epochs; DeepKD goes from 5% of the classes to all."""
    config = _config(name)
    length = objectives.Length(config.epochs, steps_per_epoch=10)
    dkd, deepkd = (methods.objective_of(method, config, length) for method in ("dkd_dot", "deepkd"))
    if name == "imagenet_r34_r18":
        assert dkd.weights == dot_optax.PerLoss(1.0, 1.0)
    else:
        assert dkd.weights.task == 1.0
        np.testing.assert_allclose([dkd.weights.kd(step) for step in (0, 9, 10, 189, 190)], [0.05, 0.05, 0.1, 0.95, 1])
    assert deepkd.weights == dot_optax.DeepKDLosses(config.deepkd.task_weight, 1.0, 1.0)
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 4, classes)).astype(np.float32)
    labels, temperature = np.arange(4), config.distillation.temperature
    end = config.epochs * 10
    ks = {0: classes // 20, end // 4: classes // 20, end // 2: classes - 1, end: classes - 1}
    for step, k in ks.items():
        found = deepkd.distill(objectives.Seen(student, teacher, labels, temperature, step))
        expected = dot_optax.losses.deepkd_losses(student, teacher, labels, temperature, k=k)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("name", _PUBLISHED)
def test_pixels_and_sizes_are_those_of_the_dataset(name):
    dataset = _config(name).dataset
    mean, std = _PIXELS[dataset.name]
    np.testing.assert_allclose(dataset.mean, np.array(mean) * 255)
    np.testing.assert_allclose(dataset.std, np.array(std) * 255)
    assert dataset.split_sizes.to_dict() == _SIZES[dataset.name]


@pytest.mark.parametrize("name", _PUBLISHED)
def test_a_teacher_that_is_trained_has_the_recipe_of_its_dataset(name):
    config = _config(name)
    settings.validated(config)
    assert config.teacher.epochs == config.epochs
    assert config.teacher.optimizer.learning_rate == (0.05 if config.dataset.name == "cifar100" else 0.2)
    for field in ("momentum", "weight_decay", "drop_epochs", "drop_factor"):
        assert config.teacher.optimizer[field] == config.optimizer[field]


@pytest.mark.parametrize("name", _PUBLISHED)
def test_the_learning_rate_drops_in_the_epochs_of_the_paper(name):
    config = _config(name, "--config.dataset.synthetic=True")
    steps = data.steps_per_epoch(data.load(config.dataset), config.batch_size)
    assert steps == _SIZES[config.dataset.name]["train"] // config.batch_size
    schedule = methods.learning_rate_schedule(config.optimizer, steps)
    rate = config.optimizer.learning_rate
    for drop in _PUBLISHED[name]["optimizer.drop_epochs"]:
        np.testing.assert_allclose(schedule(steps * drop - 1), rate, rtol=1e-6)  # the last step of epoch `drop`
        rate *= 0.1
        np.testing.assert_allclose(schedule(steps * drop), rate, rtol=1e-6)


_FASHION_MNIST = {
    "method": "kd,kd_gain_matched,dot",
    "dataset.name": "fashion_mnist_idx",
    "dataset.image_size": 28,
    "dataset.mean": (72.94,),
    "dataset.std": (90.02,),
    "dataset.preprocessing": "fashion_mnist",
    "dataset.train": "train[:55000]",
    "dataset.validation": "train[55000:]",
    "dataset.test": "test",
    "dataset.data_dir": "",
    "teacher.train": True,
    "teacher.optimizer.name": "sgd",
    "optimizer.schedule": "cosine",
}


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("fashion_mnist_cnn", {"optimizer.name": "sgd", "student.model.widths": (8, 16)}),
        ("fashion_mnist_vit", {"optimizer.name": "adamw", "optimizer.delta_warmup_epochs": 1}),
    ],
)
def test_fashion_mnist_needs_nothing_but_its_folder(name, own):
    config, values, *_ = settings.validated(_config(name))
    expected = _FASHION_MNIST | own
    assert {field: values[field] for field in expected} == expected
    assert (
        "--config.dataset.data_dir=/usr/share/datasets/fashion-mnist"
        in (_DISTILL / "configs" / f"{name}.py").read_text()
    )
    steps = 55_000 // config.batch_size
    for optimizer, epochs in ((config.optimizer, config.epochs), (config.teacher.optimizer, config.teacher.epochs)):
        schedule = methods.learning_rate_schedule(optimizer, steps, epochs)
        np.testing.assert_allclose(schedule(steps), optimizer.learning_rate, rtol=1e-6)  # after the warm-up
        np.testing.assert_allclose(schedule(epochs * steps), 0, atol=1e-9)


def test_recipes_and_configs_state_the_published_accuracies():
    recipes = (_DISTILL / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*→.*)$", recipes, flags=re.MULTILINE))
    assert set(rows) == {path.stem for path in (_DISTILL / "configs").glob("[!_]*.py")}
    for name, (kd, dot) in _TOP1.items():
        assert rows[name].endswith(f"| `{_PUBLISHED[name]['teacher.model.name']}` | {kd} | {dot} | |")
        assert f"Top-1 in the paper: KD {kd}, KD with DOT {dot}." in (_DISTILL / "configs" / f"{name}.py").read_text()


def test_the_commands_of_the_recipes_parse():
    recipes = (_DISTILL / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^python -m examples\.distill (.*)$", recipes, flags=re.MULTILINE)
    assert len(commands) == 12
    for command in commands:
        settings.validated(parse(shlex.split(command.replace("=N", "=2").replace("=I", "=1"))).config)
    for flag in re.findall(r"`(--config\.[\w.]+=[\w,]+)", recipes):
        parse(["--config=imagenet_r34_r18", flag.replace("=N", "=2")])


def test_the_momenta_are_those_of_the_paper():
    assert methods.betas(_config("cifar100_vgg13_vgg8").optimizer) == pytest.approx(dot_optax.PerLoss(0.825, 0.975))
    assert methods.betas(_config("imagenet_r34_r18").optimizer) == pytest.approx(dot_optax.PerLoss(0.81, 0.99))


@pytest.fixture
def run(tmp_path):
    """Runs a config on nine synthetic images, with batches of four: two steps, and a ragged batch in evaluation.

    What is cut: the number of images, the sizes of the batches, and ImageNet's 224 pixels to 64.
    """

    def run(name, *overrides):
        config = _config(name)
        small = ["--config.dataset.image_size=64"] if config.dataset.image_size == 224 else []
        return main(
            [
                f"--config={name}",
                f"--workdir={tmp_path / 'run'}",
                "--config.devices=1",
                "--config.dataset.synthetic=True",
                *(f"--config.dataset.split_sizes.{split}=9" for split in config.dataset.split_sizes),
                "--config.batch_size=4",
                "--config.eval_batch_size=4",
                "--config.epochs=1",
                *small,
                *overrides,
            ]
        )

    return run


def _save_random_teacher(folder, config):
    _, params, rest = networks.random(config.teacher.model.name, num_classes=_CLASSES[config.dataset.name])
    checkpoint.save_variables(folder, params, rest)


@pytest.mark.slow
@pytest.mark.parametrize("name", _PUBLISHED)
def test_a_step_can_be_traced(name):
    config = _config(name)
    student, teacher = (
        models.split(networks.abstract(network.model.name, _CLASSES[config.dataset.name]))
        for network in (config.student, config.teacher)
    )
    weights = dot_optax.PerLoss(config.distillation.task_weight, config.distillation.kd_weight)
    optimizer = methods.build("dot", config.optimizer, weights, steps_per_epoch=1)
    problem = steps.Problem(
        student[0], teacher[0], config.distillation.temperature, config.dataset.mean, config.dataset.std
    )
    one_device = parallel.jit_layout(jax.sharding.Mesh(jax.devices()[:1], (parallel.AXIS,)))
    train_step = steps.make_train_step(problem, optimizer, one_device)
    state = jax.eval_shape(lambda *variables: init_state(*variables, optimizer), *student[1:])
    size = config.dataset.image_size
    batch = {
        "image": jax.ShapeDtypeStruct((config.batch_size, size, size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
    }
    new_state, metrics = jax.eval_shape(train_step, state, teacher[1:], batch)
    shapes_and_dtypes = functools.partial(jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype))
    assert shapes_and_dtypes(new_state) == shapes_and_dtypes(state)
    assert {"task_loss", "kd_loss"} <= set(metrics)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("cifar100_vgg13_vgg8", ["--config.dtype=bfloat16"]),
        # Its own student takes a minute to compile and run.
        ("tiny_imagenet_r18_shufflev2", ["--config.student.model.name=vgg8"]),
        ("imagenet_r34_r18", []),
    ],
)
def test_two_steps_and_an_evaluation_with_each_dataset(name, overrides, run, tmp_path):
    config = _config(name)
    _save_random_teacher(tmp_path / "teacher", config)
    assert run(name, f"--config.teacher.checkpoint={tmp_path / 'teacher'}", *overrides) == 0
    [line] = (tmp_path / "run" / "dot" / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    assert metrics["step"] == 2
    assert np.isfinite([metrics[name] for name in ("task_loss", "kd_loss", "task_grad_norm", "kd_grad_norm")]).all()
    result = json.loads((tmp_path / "run" / "dot" / "result.json").read_text())
    assert [result[split]["count"] for split in ("train", "validation", "test")] == [9, 9, 9]
    teacher = json.loads((tmp_path / "run" / "teacher" / "result.json").read_text())
    assert teacher["test"]["count"] == 9 and "kd_loss" not in teacher["test"]
    params, _ = checkpoint.load_variables(tmp_path / "run" / "dot")
    assert params["classifier"]["kernel"].shape[-1] == _CLASSES[config.dataset.name]
    assert params["classifier"]["kernel"].dtype == jnp.float32


@pytest.mark.slow  # the digits train a teacher in the first tier
def test_a_teacher_is_trained_by_the_same_command_and_taught_with(run, tmp_path, capsys):
    teacher = "--config.student.model.name=resnet8x4"
    assert run("cifar100_vgg13_vgg8", "--config.method=ce", teacher) == 0
    assert "; no teacher\n" in capsys.readouterr().out
    (tmp_path / "run").rename(tmp_path / "resnet8x4")
    folder = f"--config.teacher.checkpoint={tmp_path / 'resnet8x4' / 'ce'}"
    assert run("cifar100_vgg13_vgg8", "--config.teacher.model.name=resnet8x4", teacher, folder) == 0


def test_a_teacher_that_is_another_network(run, tmp_path, capsys):
    _save_random_teacher(
        tmp_path / "resnet8x4", _config("cifar100_r32x4_r8x4", "--config.teacher.model.name=resnet8x4")
    )
    assert run("cifar100_vgg13_vgg8", f"--config.teacher.checkpoint={tmp_path / 'resnet8x4'}") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: the teacher in {tmp_path / 'resnet8x4'} is no vgg13 with 100 classes: missing ")


def test_a_method_that_needs_a_teacher_asks_for_it(run, tmp_path, capsys):
    assert run("imagenet_r50_mobilenetv1", "--config.method=ce,kd") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "error: no teacher: give --config.teacher.checkpoint=FOLDER of a resnet50" in line
    assert not (tmp_path / "run").exists()


_OF_EACH_DATASET = ["cifar100_r32x4_r8x4", "tiny_imagenet_r18_shufflev2", "imagenet_r34_r18"]


@pytest.mark.parametrize("name", slow_but(_OF_EACH_DATASET, "cifar100_r32x4_r8x4"))
def test_missing_data(name, tmp_path, capsys):
    config = _config(name)
    _save_random_teacher(tmp_path / "teacher", config)
    arguments = [f"--config={name}", f"--workdir={tmp_path / 'run'}", f"--config.dataset.data_dir={tmp_path / 'data'}"]
    assert main([*arguments, f"--config.teacher.checkpoint={tmp_path / 'teacher'}"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert f"dataset {config.dataset.name!r} is not prepared in {tmp_path / 'data' / config.dataset.name}" in line
    assert "examples/distill/README.md" in line
    assert not (tmp_path / "run").exists()
