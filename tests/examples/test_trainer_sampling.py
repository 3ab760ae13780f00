"""Training with `--config.sampling`: steps, metrics and cost by hand, in every form of parallelism, and runs that go on.

Tolerances: losses and gradients are of order one, float32 rounds at 6e-8, and five steps with factors up to k = 4, through
BatchNorm on some ten rows, multiply that by less than 200.
"""

import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dot_optax
from benchmarks.pod_cost import collectives
from benchmarks.recipe_cost import FORMS as LAYOUTS
from examples.distill import jobs, methods, models, objectives, settings, steps
from examples.distill.configs.digits import get_config
from examples.trainer import checkpoint, parallel, records
from examples.trainer.sampling import EXACT, Sampling
from examples.trainer.step import init_state
from tests import networks
from tests.tiers import slow_but

DEVICES, ROWS, CLASSES = 4, 16, 3
FORMS = {
    "losses": Sampling("losses", 4),
    "alternating": Sampling("alternating", 2),
    "difference": Sampling("difference", 4),
    "examples": Sampling("examples", 4),
}
WEIGHTS = dot_optax.PerLoss(task=0.1, kd=0.9)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


class _Network(nnx.Module):
    def __init__(self, width=8, axis_name=None, *, rngs):
        self.hidden = nnx.Linear(5, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, axis_name=axis_name, rngs=rngs)
        self.classifier = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, images):
        return self.classifier(nnx.tanh(self.norm(self.hidden(images))))


def _network(seed=0, **options):
    return models.split(_Network(rngs=nnx.Rngs(seed), **options))


def _problem(axis_name=None, **options):
    student, teacher = _network(axis_name=axis_name)[0], _network(1, width=32)[0]
    return steps.Problem(student, teacher, 4.0, mean=(0.0,) * 5, std=(1.0,) * 5, **options)


def _batch(step, rows=ROWS):
    rng = np.random.default_rng(step)
    return {
        "image": rng.normal(size=(rows, 5)).astype(np.float32),
        "label": rng.integers(CLASSES, size=rows).astype(np.int32),
    }


def _optimizer(method="dot", weights=WEIGHTS, **options):
    config = get_config().optimizer
    config.update(options)
    return methods.build(method, config, weights, steps_per_epoch=1)


_ONE_DEVICE = parallel.jit_layout(jax.sharding.Mesh(jax.devices()[:1], (parallel.AXIS,)))


def _start(sampling, layout=_ONE_DEVICE, optimizer=None, problem=None, **options):
    """Returns (train step, state, teacher's variables)."""
    optimizer = optimizer or _optimizer()
    problem = problem or _problem(layout.axis_name)
    train_step = steps.make_train_step(problem, optimizer, layout, sampling=sampling, **options)
    state = layout.place(init_state(*jax.tree.map(jnp.copy, _network()[1:]), optimizer))
    return train_step, state, parallel.replicate(layout.mesh, tuple(_network(1, width=32)[1:]))


def _train(count, *args, layout=_ONE_DEVICE, **options):
    """Returns the state, as one device has it, and the metrics of each step."""
    train_step, state, teacher = _start(*args, layout=layout, **options)
    metrics = []
    for step in range(count):
        state, of_step = jax.block_until_ready(train_step(state, teacher, layout.put_batch(_batch(step))))
        metrics.append(jax.device_get(of_step))
    return jax.device_get(layout.gather(state)), metrics


@jax.jit
def _exact(params, rest, batch):
    """Each loss with its gradient, and the statistics, one after the other."""
    teacher, *teacher_variables = _network(1, width=32)
    wanted, _ = models.apply(teacher, *teacher_variables, batch["image"], train=False)

    def task(params):
        logits, new = models.apply(_network()[0], params, rest, batch["image"], train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), new

    def kd(params):
        logits, _ = models.apply(_network()[0], params, rest, batch["image"], train=True)
        return dot_optax.losses.kd_loss(logits, wanted, 4.0).mean()

    (task_loss, new), task_grad = jax.value_and_grad(task, has_aux=True)(params)
    kd_loss, kd_grad = jax.value_and_grad(kd)(params)
    return (task_loss, kd_loss), (task_grad, kd_grad), new


def _by_hand(form, count, optimizer):
    """What five lines in Python would do: the parameters and statistics at the end, and the metrics of each step."""
    params, rest = _network()[1:]
    opt_state, metrics = optimizer.init(params), []
    for step in range(count):
        batch = _batch(step)
        losses, grads, new_rest = _exact(params, rest, batch)
        due = step % 4 == 0
        computed, apart = [True, True], [True, True]
        if form == "examples":
            part = {name: value[step % 4 :: 4] for name, value in batch.items()}
            (_, kd_loss), (_, kd_grad), _ = _exact(params, rest, part)
            losses, grads = (losses[0], kd_loss), (grads[0], kd_grad)
        elif form == "losses":
            computed = apart = [True, due]
        elif form == "alternating":
            computed = apart = [step % 2 == 0, step % 2 == 1]
        else:
            apart = [due, due]
        factors = {
            "losses": [[1, 0], [0, 4 * due]],
            "alternating": [[2 * computed[0], 0], [0, 2 * computed[1]]],
            "difference": [[2.5, -1.5], [-1.5, 2.5]] if due else [[0.5, 0.5], [0.5, 0.5]],
            "examples": [[1, 0], [0, 1]],
        }[form]
        norms = [float(optax.tree.norm(grad)) for grad in grads]
        metrics.append(
            {
                "task_loss": losses[0] if computed[0] else np.nan,
                "kd_loss": losses[1] if computed[1] else np.nan,
                "task_grad_norm": norms[0] if apart[0] else np.nan,
                "kd_grad_norm": norms[1] if apart[1] else np.nan,
                "grad_cosine": optax.tree.vdot(*grads) / norms[0] / norms[1] if all(apart) else np.nan,
                "skipped": 0.0,
            }
        )
        given = dot_optax.PerLoss(*(jax.tree.map(lambda t, k, m=m: m[0] * t + m[1] * k, *grads) for m in factors))
        updates, opt_state = optimizer.update(given, opt_state, params)
        params, rest = optax.apply_updates(params, updates), new_rest
    return params, rest, metrics


@functools.cache
def _expected(form):
    return _by_hand(form, 6, _optimizer())


_CASES = [(layout, form) for layout in LAYOUTS for form in FORMS]


@pytest.mark.parametrize(
    "case",
    slow_but(
        _CASES,
        ("jit", "losses"),
        ("jit", "difference"),
        ("jit", "examples"),
        ("pmap", "losses"),
        ("shard_map", "alternating"),
    ),
)
def test_training_is_what_it_is_by_hand(case):
    """Statistics move once a step, from the whole batch; a metric is NaN where a step does not know it."""
    layout, form = case
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), (parallel.AXIS,))
    state, metrics = _train(6, FORMS[form], layout=LAYOUTS[layout](mesh))
    params, rest, expected = _expected(form)
    jax.tree.map(close, (state.params, state.rest), (params, rest))
    for found, wanted in zip(metrics, expected, strict=True):
        assert set(found) == set(wanted)
        for name, value in found.items():
            if layout == "shard_map" and ("norm" in name or "cosine" in name):  # of each device's part
                assert np.isnan(value) == np.isnan(wanted[name]), name
            else:
                close(value, wanted[name], err_msg=name)


@pytest.mark.parametrize("method", slow_but(["kd", "kd_gain_matched", "dot"], "dot"))
@pytest.mark.parametrize("form", slow_but(FORMS, "losses"))
def test_every_method_is_fed_the_same(method, form):
    optimizer = _optimizer(method, name="adamw", learning_rate=0.001, eps=1e-3)
    state, _ = _train(5, FORMS[form], optimizer=optimizer)
    params, rest, _ = _by_hand(form, 5, optimizer)
    jax.tree.map(close, (state.params, state.rest), (params, rest))


_CONFIG = get_config()
_OBJECTIVES = {name: objectives.build(name, _CONFIG, objectives.Length(2, 4)) for name in ("dkd", "deepkd")}


@functools.partial(jax.jit, static_argnums=0)
def _exact_of(name, params, rest, batch, step):
    """The losses of an objective, their gradients, the plain distillation loss, and the statistics."""
    teacher, *teacher_variables = _network(1, width=32)
    wanted, _ = models.apply(teacher, *teacher_variables, batch["image"], train=False)

    def losses(params):
        logits, new = models.apply(_network()[0], params, rest, batch["image"], train=True)
        task = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        seen = objectives.Seen(logits, wanted, batch["label"], 4.0, step)
        plain = dot_optax.losses.kd_loss(logits, wanted, 4.0).mean()
        return [loss.mean() for loss in (task, *_OBJECTIVES[name].distill(seen))], (plain, new)

    values, (plain, new) = losses(params)
    grads = [jax.grad(lambda params, i=i: losses(params)[0][i])(params) for i in range(len(values))]
    return values, grads, plain, new


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    slow_but(
        [
            (name, form, layout)
            for name in _OBJECTIVES
            for form in (*FORMS, "none")
            for layout in LAYOUTS
            if layout == "jit" or form in ("difference", "examples")
        ],
        ("dkd", "difference", "jit"),
        ("deepkd", "alternating", "jit"),
    ),
)
def test_other_losses_are_sampled_as_the_distillation_loss_is(case):
    """One that is there for the log alone takes no part in the sum, and is known where the others are."""
    name, form, layout = case
    objective, mesh = _OBJECTIVES[name], jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), (parallel.AXIS,))
    layout = LAYOUTS[layout](mesh)
    weights = dot_optax.DeepKDLosses(0.5, 1.0, 2.0) if name == "deepkd" else WEIGHTS
    method = "dkd_dot" if name == "dkd" else name
    optimizer = methods.build(method, _CONFIG.optimizer, weights, 1, deltas=objective.deltas)
    problem = _problem(layout.axis_name, objective=objective)
    state, metrics = _train(5, FORMS.get(form, EXACT), layout=layout, optimizer=optimizer, problem=problem)

    params, rest = _network()[1:]
    opt_state, count = optimizer.init(params), len(objective.names)
    for step in range(5):
        values, grads, plain, new_rest = _exact_of(name, params, rest, _batch(step), step)
        if form == "examples":
            part = {key: value[step % 4 :: 4] for key, value in _batch(step).items()}
            rare_values, rare_grads, plain, _ = _exact_of(name, params, rest, part, step)
            values, grads = [values[0], *rare_values[1:]], [grads[0], *rare_grads[1:]]
        factors = {
            "losses": [1] + [4 * (step % 4 == 0)] * (count - 1),
            "alternating": [2 * (step % 2 == 0)] + [2 * (step % 2 == 1)] * (count - 1),
        }.get(form, [1] * count)
        if form == "difference":
            share = jax.tree.map(lambda *leaves: sum(leaves) / count, *grads)
            k = 4 * (step % 4 == 0)
            given = [jax.tree.map(lambda g, s, k=k: s + k * (g - s), grad, share) for grad in grads]
        else:
            given = [jax.tree.map(lambda g, f=f: f * g, grad) for f, grad in zip(factors, grads, strict=True)]
        known = dict(zip(objective.names, factors, strict=True)) | {"kd": factors[1]}
        for loss, value in {**dict(zip(objective.names, values, strict=True)), "kd": plain}.items():
            close(metrics[step][f"{loss}_loss"], value if known[loss] else np.nan, err_msg=f"{loss}, step {step}")
        updates, opt_state = optimizer.update(objective.container(*given), opt_state, params)
        params, rest = optax.apply_updates(params, updates), new_rest
    jax.tree.map(close, (state.params, state.rest), (params, rest))


def test_a_period_of_one_is_exact():
    config = get_config()
    assert settings.validated(config).fields["sampling.form"] == "none"
    for form in ("", "none", "losses", "difference", "examples"):
        config.sampling.form, config.sampling.period = form, 1
        assert Sampling.from_config(config.sampling) == EXACT
        # A working directory is of the same config.
        assert settings.validated(config).fields == settings.validated(get_config()).fields
    config.sampling.form, config.sampling.period = "losses", 3
    assert Sampling.from_config(config.sampling) == Sampling("losses", 3)
    found = settings.validated(config).fields
    assert (found["sampling.form"], found["sampling.period"]) == ("losses", 3)


def test_what_is_not_finite_is_skipped_and_what_is_not_computed_is_not():
    """The teacher of the second half gives NaN: that is seen where it runs, and only there."""
    train_step, state, teacher = _start(Sampling("losses", 2))
    wrong_teacher = jax.tree.map(lambda leaf: leaf * jnp.nan, teacher)
    wrong = _batch(1)
    wrong["image"][3, 2] = np.nan
    for step, (variables, batch, skipped) in enumerate(
        [
            (teacher, _batch(0), False),
            (teacher, wrong, True),
            (teacher, _batch(2), False),
            (wrong_teacher, _batch(3), False),
            (wrong_teacher, _batch(4), True),
            (teacher, _batch(5), False),
        ]
    ):
        before = jax.device_get(state)
        state, metrics = train_step(state, variables, batch)
        after = jax.device_get(state)
        assert (metrics["skipped"] > 0) == skipped, step
        same = jax.tree.map(np.array_equal, before.params, after.params)
        assert all(jax.tree.leaves(same)) == skipped
        assert after.step == step + 1
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


@pytest.mark.parametrize("form", slow_but(FORMS, "alternating"))
def test_without_a_gradient_of_the_distillation_loss_the_tasks_is_exact(form):
    sampling = FORMS[form].for_task_alone()
    state, metrics = _train(4, sampling, optimizer=_optimizer("ce"))
    expected, exact = _train(4, EXACT, optimizer=_optimizer("ce"))
    jax.tree.map(close, (state.params, state.rest), (expected.params, expected.rest))
    close([m["task_loss"] for m in metrics], [m["task_loss"] for m in exact])
    computed = [not np.isnan(m["kd_loss"]) for m in metrics]
    assert computed == {"losses": [True, False, False, False], "alternating": [True, False] * 2}.get(form, [True] * 4)


@pytest.mark.parametrize("sampling", slow_but([EXACT, FORMS["difference"]], EXACT))
def test_plain_distillation_takes_one_backward_pass_where_no_metric_needs_two(sampling):
    config = get_config()
    config.gradient_metrics = False
    plain = objectives.PLAIN._replace(weights=WEIGHTS)
    summed = jobs._summed("kd", plain, sampling, config)
    assert jobs._summed("dot", plain, sampling, config) is jobs._summed("kd", plain, FORMS["losses"], config) is None
    once = _optimizer("kd", weights=dot_optax.PerLoss(1.0, 1.0))
    state, metrics = _train(4, sampling, optimizer=once, summed=summed, gradient_metrics=False)
    expected, both = _train(4, EXACT, optimizer=_optimizer("kd"))
    jax.tree.map(close, (state.params, state.opt_state), (expected.params, expected.opt_state))
    assert jax.tree.structure(state) == jax.tree.structure(expected)  # a run may go on with other metrics
    assert all(set(m) == {"task_loss", "kd_loss", "skipped"} for m in metrics)
    close([m["kd_loss"] for m in metrics], [m["kd_loss"] for m in both])
    # Of digits' small student one backward pass more is 3% of a step; the weights cost an operation or two.
    assert _relative_flops(sampling, summed) == pytest.approx(1, abs=1e-4)
    assert _relative_flops(EXACT) > 1.02


_STUDENT, _TEACHER = ({"input_shape": (8, 8, 1), "hidden": hidden} for hidden in ((32,), (256, 256)))


def _arguments():
    """A problem with the networks of digits, in which products count, and the arguments of its losses."""
    (student, *variables), (teacher, *teacher_variables) = (networks.random("mlp", **o) for o in (_STUDENT, _TEACHER))
    batch = {"image": np.zeros((64, 8, 8, 1), np.uint8), "label": np.zeros(64, np.int32)}
    return steps.Problem(student, teacher, 4.0, (0.0,), (16.0,)), (*variables, tuple(teacher_variables), batch)


def _relative_flops(sampling, summed=None):
    problem, arguments = _arguments()
    return steps.relative_flops(problem, problem, sampling, summed, *arguments)


def test_the_plain_distillation_loss_of_the_log_costs_no_backward_pass():
    problem, arguments = _arguments()
    dkd = _OBJECTIVES["dkd"]
    without = dkd._replace(names=("task", "kd"))  # so that there is no other one to log
    logged, alone = (
        steps.relative_flops(problem._replace(objective=objective), problem, EXACT, None, *arguments)
        for objective in (dkd, without)
    )
    assert logged - alone < 0.01  # 0.005, the KL of 64 x 10 logits; a backward pass of this student is 0.03


@pytest.mark.parametrize("form", slow_but(FORMS, "losses"))
def test_the_cost_is_that_of_the_compiled_steps(form):
    """Of programs without a branch. The tolerance: what is not a product is 3% of it, and XLA fuses some of that away."""
    problem, arguments = _arguments()

    def compiled(sampling, step, summed=None):
        def gradients(params, rest, teacher, batch):
            def of_params(params, batch):
                return steps._train_losses(problem, params, rest, teacher, batch, step)

            return sampling.gradients(of_params, step, problem.losses, summed)[0](params, batch)

        return jax.jit(gradients).lower(*arguments).compile().cost_analysis()["flops"]

    sampling = FORMS[form]
    mean = np.mean([compiled(sampling, step) for step in range(sampling.turn)])
    assert _relative_flops(sampling) == pytest.approx(mean / compiled(EXACT, 0, (1.0, 1.0)), rel=0.01)


@pytest.mark.parametrize("name", slow_but(["kd", "dkd"], "dkd"))
@pytest.mark.parametrize("form", slow_but([*FORMS, "none"], "losses"))
def test_the_teacher_sees_as_many_batches_as_is_said(form, name, monkeypatch):
    seen = []
    apply = models.apply

    def count(images):
        seen.append(len(images))
        return images

    def counted(graphdef, params, rest, images, train):
        if not train:  # Pure, so that it runs only where its result is used.
            images = jax.pure_callback(count, jax.ShapeDtypeStruct(images.shape, images.dtype), images)
        return apply(graphdef, params, rest, images, train=train)

    monkeypatch.setattr(models, "apply", counted)
    sampling = FORMS.get(form, EXACT)
    _train(8, sampling, problem=_problem(objective=_OBJECTIVES.get(name, objectives.PLAIN)))
    jax.effects_barrier()
    assert sum(seen) / (8 * ROWS) == sampling.teacher_forwards


def test_with_pmap_devices_exchange_no_gradient_that_is_not_due():
    """Of two losses one is exchanged in a branch alone."""
    layout = parallel.pmap_layout(jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), (parallel.AXIS,)))
    train_step, state, teacher = _start(Sampling("losses", 4), layout=layout)
    text = train_step.lower(state, teacher, layout.put_batch(_batch(0))).compile().as_text()
    entry = next(part for part in re.split(r"\n(?=ENTRY|%?[\w.-]+ \()", text) if part.startswith("ENTRY"))
    gradient = 4 * sum(leaf.size for leaf in jax.tree.leaves(state.params))
    few = 4 * 32  # numbers: metrics and statistics
    assert gradient <= collectives(entry)["all-reduce"] <= gradient + few
    assert collectives(text)["all-reduce"] >= 2 * gradient


@pytest.mark.slow
@pytest.mark.parametrize("form", ["losses", "alternating", "difference", "examples"])
def test_a_run_that_was_interrupted_goes_on_in_its_phase(form, finished, distill, tmp_path, monkeypatch, capsys):
    """The log and the report are those of a whole run."""
    period = {"alternating": 2, "examples": 4}.get(form, 3)
    flags = ["--config.method=dot", f"--config.sampling.form={form}", f"--config.sampling.period={period}"]
    flags += ["--config.checkpoint_every_steps=25", "--config.epochs=3"]
    append_line = records.append_line

    def interrupted(path, record):
        append_line(path, record)
        if path.parent.name == "dot" and record["epoch"] == 2:
            raise KeyboardInterrupt

    for name in ("run", "again"):
        shutil.copytree(finished / "teacher", tmp_path / name / "teacher")
    assert distill(tmp_path / "run", *flags) == 0
    printed = capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(records, "append_line", interrupted)
        assert distill(tmp_path / "again", *flags) == 130
    saved = max(checkpoint.saved_steps(tmp_path / "again" / "dot"))
    assert saved == 25  # in the middle of a turn of 2, 3 or 4
    assert distill(tmp_path / "again", *flags) == 0
    a, b = (checkpoint.load_variables(tmp_path / name / "dot") for name in ("run", "again"))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    logs = [
        [
            json.loads(line) | {"seconds": 0}
            for line in (tmp_path / name / "dot" / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("run", "again")
    ]
    assert logs[0] == logs[1]
    unknown = {name for line in logs[0] for name, value in line.items() if value is None}
    assert unknown == ({"grad_cosine"} if form == "alternating" else set())
    assert all(line["skipped_steps"] == 0 for line in logs[0])
    cost = records.read_json(tmp_path / "run" / "dot" / "result.json")["cost"]
    table = {row.split("  ")[0]: row.split()[-1] for row in printed.splitlines() if row.strip()}
    assert (
        table["teacher forwards"]
        == f"{cost['teacher_forwards']:.2f}"
        == f"{1 if form == 'difference' else 1 / period:.2f}"
    )
    assert table["gradient FLOPs / KD"] == f"{cost['relative_flops']:.2f}"
    assert distill(tmp_path / "run", *flags, "--config.sampling.form=none", "--config.sampling.period=2") == 1
    assert "belongs to another config: sampling.form is" in capsys.readouterr().err


@pytest.mark.slow
def test_the_smoke_test_takes_a_whole_turn(capsys, distill, tmp_path):
    assert distill(tmp_path, "--smoke_test", "--config.sampling.form=examples", "--config.sampling.period=8") == 0
    assert "It works." in capsys.readouterr().out
