"""Training on four devices, in every form: the same as on one, with the traffic of one gradient, and to be gone on with."""

import functools
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dot_optax
from benchmarks.pod_cost import collectives
from benchmarks.recipe_cost import FORMS
from examples.distill import methods, steps
from examples.distill.command_line import main
from examples.distill.configs.digits import get_config
from examples.trainer import checkpoint, parallel, records
from examples.trainer.errors import UserError
from examples.trainer.step import init_state
from tests import networks

DEVICES = 4
STEPS = 50
# The first of its three stages, which compiles in seconds: it has BatchNorm, and parameters to be divided.
ONE_STAGE = ("resnet8x4", {"stage_sizes": (1,), "stage_features": (64,)})
MULTILAYER = ("mlp", {"input_shape": (8, 8, 3), "hidden": (32,)})
_STUDENTS = {"one stage": ONE_STAGE, "mlp": MULTILAYER}


def _mesh(devices=DEVICES):
    return jax.sharding.Mesh(np.array(jax.devices()[:devices]), (parallel.AXIS,))


def _mesh_of_hosts(hosts):
    """A mesh data x model, given by the host of each device."""
    devices = np.array([[SimpleNamespace(process_index=host) for host in row] for row in hosts])
    return SimpleNamespace(devices=devices, shape={parallel.AXIS: len(hosts)})


@pytest.mark.parametrize(
    ("hosts", "part"),
    [
        ([[1, 1], [0, 0]], (1, 2)),  # each has a part of its own
        ([[2, 0], [2, 0]], (0, 1)),  # two hosts read all
        ([[1, 2], [1, 2], [0, 3], [0, 3]], (1, 2)),  # two hosts each read a half
    ],
)
def test_which_part_of_a_batch_a_host_reads(hosts, part):
    found = parallel.host_part(_mesh_of_hosts(hosts))
    assert (found.shard_index, found.shard_count) == part


@pytest.mark.parametrize("hosts", [[[0], [1], [0], [1]], [[1], [0], [0]], [[1], [0], [0], [2]]])
def test_a_host_must_have_an_equal_share(hosts):
    with pytest.raises(UserError, match=r"no equal share of \d parts: give another --config\.model_devices"):
        parallel.host_part(_mesh_of_hosts(hosts))


def _batch(step):
    rng = np.random.default_rng(step)
    image = rng.integers(256, size=(8, 8, 8, 3), dtype=np.uint8)
    return {"image": image, "label": rng.integers(10, size=8).astype(np.int32)}


def _start(student, layout, method, dtype):
    """Returns (train step, state, teacher's variables)."""
    name, options = student
    config = get_config().optimizer
    optimizer = methods.build(method, config, dot_optax.PerLoss(task=0.1, kd=0.9), steps_per_epoch=1)
    graphdef, *variables = networks.random(name, axis_name=layout.axis_name, **options)
    teacher, *teacher_variables = networks.random(name, **options | ({"hidden": (16,)} if name == "mlp" else {}))
    variables, teacher_variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (variables, teacher_variables))
    problem = steps.Problem(graphdef, teacher, 4.0, mean=(127.0,) * 3, std=(60.0,) * 3)
    train_step = steps.make_train_step(problem, optimizer, layout)
    state = layout.place(init_state(*variables, optimizer))
    return train_step, state, parallel.replicate(layout.mesh, tuple(teacher_variables))


def _train(student, layout, method="dot", dtype=jnp.float32):
    train_step, state, teacher_variables = _start(student, layout, method, dtype)
    for step in range(10 if student is ONE_STAGE else STEPS):  # a step of the former takes long in float64
        batch = layout.put_batch(_batch(step))
        state, metrics = jax.block_until_ready(train_step(state, teacher_variables, batch))
    return jax.device_get((layout.gather(state), metrics))


@functools.cache
def _on_one_device(student, dtype):
    return _train(_STUDENTS[student], parallel.jit_layout(_mesh(1)), dtype=dtype)


def _assert_close(form, actual, expected, bound):
    """Everything that training changes, and the losses; gradients are those of parts of the batch with shard_map."""
    (state, metrics), (expected_state, expected_metrics) = actual, expected
    compared = [(state, expected_state)]
    names = ("task_loss", "kd_loss") if form == "shard_map" else tuple(metrics)
    compared += [(metrics[name], expected_metrics[name]) for name in names]
    for a, b in compared:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=bound * (1 + np.abs(y).max())), a, b)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_with_batch_norm_in_float64(form):
    """In float32 training amplifies rounding errors, so that little could be compared."""
    with jax.enable_x64(True):
        four = _train(ONE_STAGE, FORMS[form](_mesh()), dtype=jnp.float64)
        _assert_close(form, four, _on_one_device("one stage", jnp.float64), bound=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_a_multilayer_perceptron_in_float32(form):
    """The bound: 50 steps, each with a rounding error or two of 2**-24, that a momentum of 0.975 can keep for 40 steps."""
    four = _train(MULTILAYER, FORMS[form](_mesh()))
    _assert_close(form, four, _on_one_device("mlp", jnp.float32), bound=40 * 2 * 2**-24)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jit", "jit_sharded", "pmap"])
def test_aggregation_sees_the_losses_and_gradients_of_the_whole_batch(form):
    """Its weights follow from them. The bound: as above, through quotients of inner products, and 100 times that."""
    one = _train(MULTILAYER, parallel.jit_layout(_mesh(1)), "dto_kd")
    _assert_close(form, _train(MULTILAYER, FORMS[form](_mesh()), "dto_kd"), one, bound=40 * 2 * 2**-24 * 100)


def test_large_parameters_and_momenta_are_divided():
    layout = parallel.jit_layout(_mesh(), shard_params=True)
    with jax.enable_x64(True):  # as above: the test that comes second need not compile
        train_step, state, teacher_variables = _start(ONE_STAGE, layout, "dot", jnp.float64)
        state, _ = jax.block_until_ready(train_step(state, teacher_variables, layout.put_batch(_batch(0))))
    momenta = jax.tree.leaves(state.opt_state, is_leaf=lambda node: isinstance(node, dict))
    trees = [state.params, *(node for node in momenta if isinstance(node, dict))]
    assert len(trees) == 3
    for tree in trees:
        kernel = tree["stages"][0][0]["conv2"]["conv"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // DEVICES
        assert tree["classifier"]["bias"].sharding.is_fully_replicated


@pytest.mark.parametrize("form", FORMS)
def test_all_devices_skip_a_step_that_is_not_finite_on_one(form):
    layout = FORMS[form](_mesh())
    train_step, state, teacher_variables = _start(MULTILAYER, layout, "dot", jnp.float32)

    def take(state, batch):
        state, metrics = jax.block_until_ready(train_step(state, teacher_variables, layout.put_batch(batch)))
        return state, bool(metrics["skipped"] > 0), jax.device_get(layout.gather(state))

    bad = _batch(1)
    bad["label"][-1] = 99  # of the last device's part
    state, *good = take(state, _batch(0))
    state, *skipped = take(state, bad)
    assert [good[0], skipped[0]] == [False, True]
    jax.tree.map(np.testing.assert_array_equal, good[1][1:], skipped[1][1:])
    _, again, after = take(state, _batch(2))
    assert not again
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


def _moved_bytes(form, method, student):
    layout = FORMS[form](_mesh())
    train_step, state, teacher_variables = _start(student, layout, method, jnp.float32)
    compiled = train_step.lower(state, teacher_variables, layout.put_batch(_batch(0))).compile()
    moved = collectives(compiled.as_text())
    assert set(moved) == {"all-reduce"}
    return moved["all-reduce"]


@pytest.mark.slow
def test_shard_map_moves_no_more_than_plain_distillation():
    student = ("mlp", {"input_shape": (8, 8, 3), "hidden": (512,)})
    parameters = 4 * ((192 + 1) * 512 + (512 + 1) * 10)
    kd, dot = (_moved_bytes("shard_map", method, student) for method in ("kd", "dot"))
    assert parameters < kd < 1.01 * parameters  # the rest: metrics
    assert dot <= 1.01 * kd
    assert 2 * parameters < _moved_bytes("pmap", "dot", student) < 2.01 * parameters


_MIXED = ("jit --config.shard_params=True", "shard_map", "pmap")


@pytest.mark.slow
@pytest.mark.parametrize("forms", [("jit",) * 3, ("pmap",) * 3, ("shard_map",) * 3, _MIXED])
def test_a_run_goes_on_on_another_number_of_devices_and_in_another_form(
    forms, finished, distill, tmp_path, monkeypatch
):
    append_line = records.append_line

    def run(form, devices, until):
        def interrupted(path, record):
            append_line(path, record)
            if path.parent.name == "dot" and record["epoch"] == until:
                raise KeyboardInterrupt

        monkeypatch.setattr(records, "append_line", interrupted)
        flags = [*f"--config.parallel={form}".split(), f"--config.devices={devices}", "--config.method=dot"]
        return distill(tmp_path / "run", "--config.checkpoint_every_steps=14", *flags)

    if forms[0] != "pmap":  # there, the teacher is trained on four devices as well
        shutil.copytree(finished / "teacher", tmp_path / "run" / "teacher")
    assert [run(forms[0], 4, until=3), run(forms[1], 1, until=5), run(forms[2], 2, until=None)] == [130, 130, 0]
    student, expected = (checkpoint.load_variables(path / "dot") for path in (tmp_path / "run", finished))
    # Rounding errors of 84 steps, or of 112 with the teacher's.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), student, expected)
    lines = [json.loads(line) for line in (tmp_path / "run" / "dot" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pmap", "shard_map"])
def test_an_interrupted_run_on_several_devices_ends_with_the_same_bits(form, finished, distill, tmp_path, monkeypatch):
    flags = ("--config.method=dot", f"--config.parallel={form}", "--config.devices=2", "--config.epochs=3")
    append_line = records.append_line

    def interrupted(path, record):
        append_line(path, record)
        if path.parent.name == "dot" and record["epoch"] == 2:
            raise KeyboardInterrupt

    for name in ("run", "again"):
        shutil.copytree(finished / "teacher", tmp_path / name / "teacher")
    assert distill(tmp_path / "run", *flags, "--config.checkpoint_every_steps=10") == 0
    with monkeypatch.context() as patch:
        patch.setattr(records, "append_line", interrupted)
        assert distill(tmp_path / "again", *flags, "--config.checkpoint_every_steps=10") == 130
    assert distill(tmp_path / "again", *flags, "--config.checkpoint_every_steps=10") == 0
    a, b = (checkpoint.load_variables(tmp_path / name / "dot") for name in ("run", "again"))
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.devices=9"], "bad --config.devices=9: there are 8"),
        (
            ["--config.devices=3"],
            "bad --config.batch_size=64: it must be a multiple of the 3 devices; or use fewer with",
        ),
        (["--config.parallel=pjit"], "bad --config.parallel='pjit': give one of jit, pmap, shard_map"),
        (
            ["--config.parallel=pmap", "--config.shard_params=True"],
            "--config.shard_params=True needs --config.parallel=jit",
        ),
    ],
)
def test_devices_that_are_not_there(flags, message, data_dir, tmp_path, capsys):
    assert main([*flags, f"--workdir={tmp_path / 'run'}", f"--config.dataset.data_dir={data_dir}"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
