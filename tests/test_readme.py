"""The README: its code runs, its table names everything public, and its two commands are the ones that CI relies on."""

import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import dot_optax

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


def test_the_block_with_batch_norm_trains():
    class Student(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(4, 3, rngs=rngs)
            self.norm = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.layer(x))

    namespace = {"student": Student(nnx.Rngs(0)), "teacher": lambda x: x[:, :3]}
    exec(BLOCKS[2], namespace)
    x = jax.random.normal(jax.random.key(0), (8, 4))
    batch = {"image": x, "label": x[:, :3].argmax(-1)}
    params, stats = namespace["params"], namespace["batch_stats"]
    opt_state, history = namespace["optimizer"].init(params), []
    for _ in range(30):
        params, stats, opt_state, losses = namespace["train_step"](params, stats, opt_state, batch)
        history.append(np.stack(losses))
    assert (history[-1] < history[0]).all()
    assert stats["norm"]["mean"][...].any()


def test_the_sentences_are_optimizers():
    namespace = {"optax": optax, "dot_optax": dot_optax}
    exec(BLOCKS[1], namespace)
    params = {"w": jnp.ones(3)}
    two, three = (params, params), {"ce": params, "hint": params, "kd": params}
    for name, grads in {
        "dot": two,
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
        for prefix, module in (("", dot_optax), ("losses.", dot_optax.losses))
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
