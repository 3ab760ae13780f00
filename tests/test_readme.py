"""The README: its code trains, every optimizer that it recommends updates, and its commands are those that CI relies on."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import optax_compositions

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_it_is_short():
    assert len(README.splitlines()) <= 130


def test_its_code_trains():
    key = jax.random.key(0)
    namespace = {"model": lambda params, x: x @ params["w"], "params": {"w": 0.1 * jax.random.normal(key, (4, 3))}}
    namespace |= {"x": jax.random.normal(key, (8, 4)), "y": jnp.arange(8) % 3}
    namespace["teacher_logits"] = 4.0 * jax.nn.one_hot(namespace["y"], 3)
    definitions, step = BLOCKS[0].split("# In the train step")
    exec(definitions, namespace)
    namespace["opt_state"] = namespace["optimizer"].init(namespace["params"])
    history = []
    for _ in range(30):
        exec("#" + step, namespace)
        history.append(np.stack(namespace["losses"]))
    assert (history[-1] < history[0]).all()


def test_its_code_has_ten_lines():
    assert len([line for line in BLOCKS[0].splitlines() if line and not line.startswith("#")]) == 10


_, _, _CHOICE = README.partition("## Which optimizer")
CHOICES = [
    line
    for row in re.findall(r"^\| (.*) \|$", _CHOICE.partition("\n## ")[0], flags=re.MULTILINE)
    for line in re.findall(r"`([^`]+)`", row.split(" | ")[1])
]


@pytest.mark.parametrize("line", CHOICES)
def test_every_optimizer_that_it_names_goes_downhill(line):
    optimizer = eval(line, optax_compositions.NAMESPACE)
    names = ("ce", "hint", "kd") if "hint" in line else ("task", "target", "non_target")[: 3 if "deepkd" in line else 2]
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    grads = [optax.tree.scale(float(i), params) for i in range(1, len(names) + 1)]
    container = dict(zip(names, grads, strict=True)) if "hint" in line else tuple(grads)
    updates, _ = optimizer.update(container, optimizer.init(params), params)
    assert jax.tree.all(jax.tree.map(lambda u: (u < 0).all(), updates))


def test_there_is_an_optimizer_for_every_case():
    assert len(CHOICES) == 9


def test_the_two_commands():
    commands = re.findall(r"```bash\n(.*?)\n```", README, flags=re.DOTALL)
    assert commands[:2] == [
        'pip install -e ".[examples]" && python -m examples.distill',
        'pip install -e ".[test]" && pytest',
    ]
    assert commands[1] in (pathlib.Path(__file__).parent.parent / ".ci" / "run").read_text()
