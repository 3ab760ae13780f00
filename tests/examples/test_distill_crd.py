"""The methods `crd` and `crd_dot`: steps by hand, the memory from checkpoint to checkpoint, and what is refused."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from dot_optax import losses
from examples.distill import crd, methods, models, objectives, steps
from examples.distill.command_line import main
from examples.distill.configs.digits import get_config
from examples.trainer import checkpoint, parallel
from examples.trainer.step import OWN, init_state, network
from tests import networks
from tests.tiers import slow_but

IMAGES, BATCH, CLASSES, DIM, NEGATIVES = 12, 4, 3, 2, 5
LABELS = np.arange(IMAGES, dtype=np.int32) % CLASSES


def _config():
    config = get_config()
    config.crd.dim, config.crd.negatives = DIM, NEGATIVES
    config.optimizer.learning_rate, config.optimizer.weight_decay = 0.05, 0.01
    return config


def _problem(config):
    """Returns (problem, params, rest, teacher's variables) of a student with three hidden units, a teacher with two."""
    objective = methods.objective_of("crd", config, objectives.Length(4, steps_per_epoch=3))
    student, params, rest = models.split(_mlp(3, 0))
    teacher, *variables = models.split(_mlp(2, 1))
    of_params, of_rest = objective.own.init((3, 2), IMAGES)
    problem = steps.Problem(student, teacher, 4.0, (0.0,), (1.0,), objective=objective, all_labels=LABELS)
    return problem, params | {OWN: of_params}, rest | {OWN: of_rest}, tuple(variables)


def _mlp(hidden, seed):
    return models.build("mlp", CLASSES, input_shape=(2, 2, 1), hidden=(hidden,), rngs=nnx.Rngs(seed))


def _batch(step):
    index = np.random.default_rng(step).permutation(IMAGES)[:BATCH].astype(np.int32)
    images = np.random.default_rng(0).normal(size=(IMAGES, 2, 2, 1)).astype(np.float32)
    return {"image": images[index], "label": LABELS[index], "index": index}


def _make_step(method, problem, params, rest, variables, config, layout=None):
    layout = layout or parallel.jit_layout(jax.sharding.Mesh(jax.devices()[:1], (parallel.AXIS,)))
    reached = steps.reached(problem, params, rest, variables, _batch(0))
    weights = problem.objective.weights
    optimizer = methods.build(method, config.optimizer, weights, 1, 4, reached=reached)
    train_step = steps.make_train_step(problem, optimizer, layout)
    return train_step, layout.place(init_state(*jax.tree.map(jnp.copy, (params, rest)), optimizer))


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _forward(params, images):
    x = images.reshape(len(images), -1)
    features = np.maximum(x @ params["hidden"][0]["kernel"] + params["hidden"][0]["bias"], 0)
    return features, features @ params["classifier"]["kernel"] + params["classifier"]["bias"]


class _ByHand:
    """Both losses and the memory in NumPy, float64, as the papers define them; the negatives alone are given."""

    def __init__(self, memory, teacher):
        self.memory, self.teacher, self.z = memory, teacher, None

    def losses(self, params, batch, negatives):
        """Returns the means of both losses, the embeddings [2, batch, dim], and the sums that a first batch makes Z."""
        features, logits = _forward(params, batch["image"])
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        task = -log_p[np.arange(BATCH), batch["label"]].mean()
        of_teacher, _ = _forward(self.teacher, batch["image"])
        projected = (
            x @ params[OWN][name]["kernel"] + params[OWN][name]["bias"]
            for name, x in (("student", features), ("teacher", of_teacher))
        )
        embeddings = np.stack([_unit(x) for x in projected])
        rows = np.concatenate([batch["index"][:, None], negatives], axis=1)
        # The student's embedding meets the memory of the teacher, and the other way round.
        x = np.exp(np.einsum("sbd,sbkd->sbk", embeddings, self.memory[::-1][:, rows]) / 0.07)
        z = IMAGES * x.mean(axis=(1, 2)) if self.z is None else self.z
        d = x / (x + z[:, None, None] * NEGATIVES / IMAGES)
        kd = -(np.log(d[:, :, 0]) + np.log(1 - d[:, :, 1:]).sum(axis=2)).sum(axis=0).mean()
        return np.array([task, kd]), embeddings, z

    def gradients(self, params, batch, negatives):
        """By central differences, whose error is some 1e-7 here; Z does not move with the parameters."""
        z_before, self.z = self.z, self.losses(params, batch, negatives)[2]
        leaves, treedef = jax.tree.flatten(params)
        grads = [[np.zeros_like(leaf) for leaf in leaves] for _ in range(2)]
        for which, leaf in enumerate(leaves):
            for place in np.ndindex(leaf.shape):
                kept, ends = leaf[place], []
                for step in (1e-5, -1e-5):
                    leaf[place] = kept + step
                    ends.append(self.losses(params, batch, negatives)[0])
                leaf[place] = kept
                for grad, slope in zip(grads, (ends[0] - ends[1]) / 2e-5, strict=True):
                    grad[which][place] = slope
        self.z = z_before
        return [treedef.unflatten(grad) for grad in grads]

    def remember(self, params, batch, negatives):
        _, embeddings, self.z = self.losses(params, batch, negatives)
        index = batch["index"]
        self.memory[:, index] = _unit(0.5 * self.memory[:, index] + 0.5 * embeddings)


def _momenta(method, path):
    """Of the task's gradient and of CRD's; None where the loss does not reach the parameter."""
    name = path[0].key
    if name in (OWN, "classifier"):
        return (None, 0.9) if name == OWN else (0.9, None)
    return {"crd": (0.9, 0.9), "crd_dot": (0.825, 0.975)}[method]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["crd", "crd_dot"])
def test_three_steps_are_what_they_are_by_hand(method):
    config = _config()
    problem, params, rest, variables = _problem(config)
    train_step, state = _make_step(method, problem, params, rest, variables, config)

    wide = functools.partial(jax.tree.map, lambda leaf: np.array(leaf, np.float64))
    theta, hand = wide(params), _ByHand(wide(rest[OWN]["memory"]), wide(variables[0]))
    buffers = [jax.tree.map(np.zeros_like, theta) for _ in range(2)]
    for step in range(3):
        batch = _batch(step)
        negatives = crd.negatives(config.seed, step, batch["index"], batch["label"], LABELS, NEGATIVES)
        given = (theta, batch, np.asarray(negatives))
        values, grads = hand.losses(*given)[0], hand.gradients(*given)
        hand.remember(*given)
        norms = [np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grad))) for grad in grads]

        def move(path, p, g_task, g_kd, v_task, v_kd):
            update, owner = np.zeros_like(p), 1 if path[0].key == OWN else 0  # of the L2 penalty
            of_losses = zip(_momenta(method, path), (g_task, 0.8 * g_kd), (v_task, v_kd), strict=True)
            for i, (beta, g, v) in enumerate(of_losses):
                if beta is not None:
                    v[...] = g + beta * v + (0.01 * p if i == owner else 0)
                    update += v
            return p - 0.05 * update

        theta = jax.tree.map_with_path(move, theta, *grads, *buffers)
        state, metrics = train_step(state, variables, batch)
        found = [[metrics[f"{name}_{what}"] for name in ("task", "crd")] for what in ("loss", "grad_norm")]
        # float32: a product of embeddings is off by 1e-7, which the temperature makes 1e-6 of an exponential.
        np.testing.assert_allclose(found, [values, norms], rtol=1e-4, err_msg=f"step {step}")
        assert metrics["kd_loss"] > 0
        np.testing.assert_allclose(state.rest[OWN]["memory"], hand.memory, atol=1e-4)
        np.testing.assert_allclose(state.rest[OWN]["log_z"], np.log(hand.z)[::-1], rtol=1e-4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), state.params, theta)


def test_negatives_depend_on_seed_step_and_image_alone():
    index = np.arange(IMAGES, dtype=np.int32)
    draw = functools.partial(crd.negatives, all_labels=LABELS, count=NEGATIVES)
    drawn = np.asarray(draw(0, 5, index, LABELS))
    for row, label in zip(drawn, LABELS, strict=True):
        assert (LABELS[row] != label).all()
        assert len(set(row)) == NEGATIVES
    order = np.random.default_rng(0).permutation(IMAGES)[:BATCH]
    np.testing.assert_array_equal(draw(0, 5, index[order], LABELS[order]), drawn[order])
    for seed, step in ((1, 5), (0, 6)):
        assert (np.sort(draw(seed, step, index, LABELS)) != np.sort(drawn)).any()


def test_more_negatives_than_images_are_drawn_twice():
    index = np.arange(IMAGES, dtype=np.int32)
    drawn = np.asarray(crd.negatives(0, 0, index, LABELS, LABELS, 50))
    assert drawn.shape == (IMAGES, 50)
    assert (LABELS[drawn] != LABELS[:, None]).all()


def test_a_step_that_is_not_finite_leaves_the_memory_alone():
    config = _config()
    problem, params, rest, variables = _problem(config)
    train_step, state = _make_step("crd_dot", problem, params, rest, variables, config)
    bad = _batch(1)
    bad["image"][1, 0, 0] = np.nan
    unset = _batch(0) | {"image": bad["image"]}  # also where no batch has set the normalisers yet
    for batch, is_bad in ((unset, True), (_batch(0), False), (bad, True), (_batch(1), False)):
        before = jax.device_get(state[1:])
        state, metrics = train_step(state, variables, batch)
        after = jax.device_get(state[1:])
        assert (metrics["skipped"] > 0) == is_bad
        same = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before[1], after[1])), strict=True)]
        assert all(same) == is_bad
        if is_bad:
            jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.slow
@pytest.mark.parametrize("shard_params", [False, True])
def test_four_devices_have_one_memory(shard_params):
    config = _config()
    problem, params, rest, variables = _problem(config)
    # Wide enough to be divided, were it a parameter: 2 x 2**13 numbers.
    rest[OWN] = losses.crd_init(jax.random.key(0), 2**12, DIM)._asdict()
    problem = problem._replace(all_labels=np.arange(2**12) % CLASSES)
    found = []
    for devices in (1, 4):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), (parallel.AXIS,))
        layout = parallel.jit_layout(mesh, shard_params=shard_params)
        train_step, state = _make_step("crd_dot", problem, params, rest, variables, config, layout)
        for step in range(3):
            batch = layout.put_batch(_batch(step))
            state, _ = jax.block_until_ready(train_step(state, parallel.replicate(mesh, variables), batch))
        assert state.rest[OWN]["memory"].sharding.is_fully_replicated
        found.append(jax.device_get((state.params, state.rest)))
    # Sums in another order: 1e-7 of a product of embeddings, which the temperature makes 1e-6 of an exponential.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *found)


def test_which_loss_reaches_which_parameter_of_a_convolutional_network():
    config = _config()
    problem, *_ = _problem(config)
    one_stage = {"num_classes": CLASSES, "stage_sizes": (1,), "stage_features": (64,)}
    graphdef, params, rest = networks.random("resnet8x4", **one_stage)
    own = problem.objective.own.init((64, 64), IMAGES)
    params, rest = params | {OWN: own[0]}, rest | {OWN: own[1]}
    batch = _batch(0) | {"image": np.zeros((BATCH, 8, 8, 3), np.uint8)}
    problem = problem._replace(student=graphdef, teacher=graphdef, mean=(0.0,) * 3, std=(1.0,) * 3)
    found = steps.reached(problem, params, rest, (network(params), network(rest)), batch)
    for path, reaches in jax.tree.leaves_with_path(found.task):
        assert reaches == (path[0].key != OWN), path
    for path, reaches in jax.tree.leaves_with_path(found.kd):
        assert reaches == (path[0].key != "classifier"), path


@pytest.mark.parametrize("name", slow_but(sorted(models._OWN), "mlp", "vit", "resnet8x4", "mobilenetv2"))
def test_every_network_says_what_its_head_is_given(name):
    shape = (28, 28, 3) if name == "vit" else (32, 32, 3)
    options = {"hidden": (7,)} if name == "mlp" else {}
    taken = {"input_shape": shape} if name in ("mlp", "vit") else {}
    graphdef, params, rest = models.split(networks.abstract(name, **options, **taken))
    width = models.features_width((graphdef, params, rest), shape, name)
    assert width == params["classifier"]["kernel"].shape[0]


def test_of_digits_there_are_fewer_negatives():
    """About as large a part of the images as of CIFAR-100, whose own are among the published hyperparameters."""
    assert get_config().crd.negatives / 900 == pytest.approx(16384 / 50_000, abs=0.05)


class _WithoutFeatures(nnx.Module):
    def __init__(self, *, rngs, features=None):
        self.classifier, self.features = nnx.Linear(4, CLASSES, rngs=rngs), features

    def __call__(self, images):
        return self.classifier(images.reshape(len(images), -1))


class _WithOtherFeatures(_WithoutFeatures):
    def __call__(self, images, *, with_features=False):
        logits = super().__call__(images)
        return (logits, [images]) if with_features else logits


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (_WithoutFeatures, "model 'mine' gives no features: called with `with_features=True` it must return"),
        (_WithOtherFeatures, r"model 'mine' gives features float32 \[2, 2, 2, 1\] for 2 images"),
    ],
)
def test_a_network_without_features_is_refused(kind, message):
    with pytest.raises(Exception, match=message):
        models.features_width(models.split(kind(rngs=nnx.Rngs(0))), (2, 2, 1), "mine")


def _optimizer(job):
    """The momenta, and what the losses have of their own."""
    folder = job / "checkpoints" / str(max(checkpoint.saved_steps(job))) / "optimizer"
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(folder).item_metadata.tree
        return checkpointer.restore(folder, jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), saved))


@pytest.mark.slow
def test_a_run_goes_on_with_its_memory_and_its_student_is_a_teacher(distill, finished, tmp_path):
    """Parameters, momenta, projectors, memory and log have the bits of a run that was never interrupted."""

    def run(name, *overrides):
        return distill(tmp_path / name, f"--config.teacher.checkpoint={finished / 'teacher'}", *overrides)

    assert run("run", "--config.method=crd_dot", "--config.epochs=1") == 0
    assert run("run", "--config.method=crd_dot", "--config.epochs=2") == 0
    assert run("whole", "--config.method=crd_dot", "--config.epochs=2") == 0
    students = [tmp_path / name / "crd_dot" for name in ("run", "whole")]
    here, there = ((checkpoint.load_variables(student), _optimizer(student)) for student in students)
    jax.tree.map(np.testing.assert_array_equal, here, there)
    (params, rest), own = here[0], here[1]["own"]
    assert OWN not in params
    assert OWN not in rest
    assert own["rest"]["memory"].shape == (2, 900, 128)
    assert np.isfinite(own["rest"]["log_z"]).all()
    assert own["params"]["teacher"]["kernel"].shape == (256, 128)
    here, there = (
        [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()] for student in students
    )
    assert [line | {"seconds": 0} for line in here] == [line | {"seconds": 0} for line in there]
    assert all(line[f"{name}_loss"] > 0 for line in here for name in ("task", "kd", "crd"))
    assert here[1]["crd_grad_norm"] > 0
    teacher = [f"--config.teacher.checkpoint={students[0]}", "--config.teacher.model.hidden=32,"]
    assert distill(tmp_path / "next", "--config.method=kd", "--config.epochs=1", *teacher) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config.parallel=pmap"],
            "error: --config.parallel=pmap would give each device a memory of its own, and 'crd",
        ),
        (
            ["--config.parallel=shard_map"],
            "error: --config.parallel=shard_map would give each device a memory of its own",
        ),
        (
            ["--config.sampling.form=losses"],
            "error: --config.sampling.form=losses leaves out losses or images, and the memory of 'crd' moves with all of"
            " them at every step: give --config.sampling.form=none",
        ),
        (["--config.sampling.form=difference"], "error: --config.sampling.form=difference leaves out losses or images"),
        (
            ["--config.crd.task_weight=0", "--config.crd.crd_weight=0"],
            "error: bad --config.crd.task_weight and --config.crd.crd_weight: both are 0",
        ),
        (["--config.crd.negatives=0"], "error: bad --config.crd.negatives=0: give a whole number of at least 1"),
        (["--config.crd.dim=0"], "error: bad --config.crd.dim=0: give a whole number of at least 1"),
        (["--config.crd.momentum=1"], "error: bad --config.crd.momentum=1.0: give a number of at least 0 and below 1"),
        (["--config.crd.temperature=0"], "error: bad --config.crd.temperature=0.0: give a finite number from 0.001"),
        (
            ["--config.dataset.in_memory=False"],
            "error: method 'crd' needs the labels of all training images at once: give --config.dataset.in_memory=True",
        ),
        (
            ["--config.student.model.hidden=()"],
            "error: model 'mlp' gives no features: called with `with_features=True` it must return (logits, list of",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments, message, data_dir, tmp_path, capsys):
    workdir, data = f"--workdir={tmp_path}", f"--config.dataset.data_dir={data_dir}"
    assert main([workdir, data, "--config.devices=1", "--config.method=crd", *arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith(message), error
