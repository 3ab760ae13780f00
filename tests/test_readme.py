"""The README: its code runs, its table names everything public, and its two commands are the ones that CI relies on."""

import pathlib
import re
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import dot_optax
import dot_optax.nnx

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_first_block_trains():
    key = jax.random.key(0)
    namespace = {"model": lambda params, x: x @ params["w"], "params": {"w": 0.1 * jax.random.normal(key, (4, 3))}}
    namespace |= {"x": jax.random.normal(key, (8, 4)), "y": jnp.arange(8) % 3}
    namespace["teacher_logits"] = 4.0 * jax.nn.one_hot(namespace["y"], 3)
    definitions, step = BLOCKS[0].split("# and in the train step")
    exec(definitions, namespace)
    namespace["opt_state"] = namespace["optimizer"].init(namespace["params"])
    history = []
    for _ in range(30):
        exec("#" + step, namespace)
        history.append(np.stack(namespace["losses"]))
    assert (history[-1] < history[0]).all()


def test_the_first_block_has_ten_lines():
    assert len([line for line in BLOCKS[0].splitlines() if line and not line.startswith("#")]) == 10


class Network(nnx.Module):
    """BatchNorm and Dropout, as students and teachers have them."""

    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.body = nnx.Linear(4, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.body(x)))))


def networks_and_batch():
    student, teacher = Network(0), Network(1)
    x = jax.random.normal(jax.random.key(0), (8, 4))
    logits = teacher(x)  # in training mode, so that its statistics are not those of a new network
    return student, teacher, {"image": x, "label": logits.argmax(-1)}


def assert_trained(student, teacher, untouched, history, steps):
    history = np.array(history)
    assert (history[-10:].mean(0) < 0.75 * history[:3].mean(0)).all()  # means, since Dropout makes losses noisy
    assert student.dropout.rngs.count[...] == steps
    hidden = Network(0).body(networks_and_batch()[2]["image"])
    assert np.abs(student.norm.mean[...]).max() > 0.01 * np.abs(hidden.mean(0)).max()
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(teacher)), untouched)


def test_the_block_with_modules_trains():
    student, teacher, batch = networks_and_batch()
    untouched = nnx.to_pure_dict(nnx.state(teacher))
    namespace = {"student": student, "teacher": teacher}
    exec(BLOCKS[2], namespace)
    history = [namespace["train_step"](student, teacher, namespace["optimizer"], batch) for _ in range(60)]
    assert_trained(student, teacher, untouched, history, 60)


def test_the_block_with_functions_trains():
    student, teacher, batch = networks_and_batch()
    untouched = nnx.to_pure_dict(nnx.state(teacher))
    namespace = {"student": student, "teacher": teacher}
    exec(BLOCKS[3], namespace)
    params, rest = namespace["params"], namespace["rest"]
    opt_state, history = namespace["optimizer"].init(params), []
    for _ in range(60):
        params, rest, opt_state, losses = namespace["train_step"](
            params, rest, opt_state, namespace["teacher_state"], batch
        )
        history.append(losses)
    nnx.update(student, params, rest)
    assert_trained(student, teacher, untouched, history, 60)


def test_the_sentences_are_optimizers():
    namespace = {"optax": optax, "dot_optax": dot_optax}
    exec(BLOCKS[1], namespace)
    params = {"w": jnp.ones(3)}
    two, three = (params, params), {"ce": params, "hint": params, "kd": params}
    for name, grads in {
        "dot_in_these_words": two,
        "clip_the_distillation_gradient_only": two,
        "three_losses": three,
        "accumulate_four_batches": two,
    }.items():
        optimizer = namespace[name]
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        assert updates["w"].shape == (3,), name


def test_the_table_names_everything_public():
    public = {
        f"{prefix}{name}"
        for prefix, module in (
            ("", dot_optax),
            ("diagnostics.", dot_optax.diagnostics),
            ("losses.", dot_optax.losses),
            ("weightings.", dot_optax.weightings),
            ("nnx.", dot_optax.nnx),
        )
        for name in getattr(module, "__all__", dir(module))
        if not name.startswith("_") and not isinstance(getattr(module, name), types.ModuleType)
    }
    assert set(re.findall(r"^\| `([\w.]+)` \|", README, flags=re.MULTILINE)) == public


def test_the_two_commands():
    commands = re.findall(r"```bash\n(.*?)\n```", README, flags=re.DOTALL)
    assert commands[:2] == [
        'pip install -e ".[examples]" && python -m examples.distill',
        'pip install -e ".[test]" && pytest',
    ]
    assert commands[1] in (pathlib.Path(__file__).parent.parent / ".ci" / "run").read_text()
