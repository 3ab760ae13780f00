"""The pages below `examples/`: their code runs, one names everything public, and their links lead somewhere."""

import importlib
import pathlib
import pkgutil
import re
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dot_optax

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *(path for folder in ("examples", "benchmarks") for path in (ROOT / folder).rglob("*.md"))]


def page(folder):
    return (ROOT / folder / "README.md").read_text()


def blocks(folder):
    return re.findall(r"```python\n(.*?)```", page(folder), flags=re.DOTALL)


TRAIN_STEPS = blocks("examples/recipes")[:2]  # those after them are in files, which tests/examples/test_recipes.py runs


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
    exec(TRAIN_STEPS[0], namespace)
    history = [namespace["train_step"](student, teacher, namespace["optimizer"], batch) for _ in range(60)]
    assert_trained(student, teacher, untouched, history, 60)


def test_the_block_with_functions_trains():
    student, teacher, batch = networks_and_batch()
    untouched = nnx.to_pure_dict(nnx.state(teacher))
    namespace = {"student": student, "teacher": teacher}
    exec(TRAIN_STEPS[1], namespace)
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
    for block in blocks("examples/reference"):
        exec(block, namespace)
    params = {"w": jnp.ones(3)}
    two, three = (params, params), {"ce": params, "hint": params, "kd": params}
    for name, grads in {
        "dot_in_these_words": two,
        "clip_the_distillation_gradient_only": two,
        "three_losses": three,
        "accumulate_four_batches": two,
        "one_momentum_behind": two,
        "a_momentum_for_each_before": two,
    }.items():
        optimizer = namespace[name]
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        assert updates["w"].shape == (3,), name


def public_modules():
    """The modules that a user imports, by name: `dot_optax` itself and what lies in it without an underscore."""
    inside = [info.name for info in pkgutil.iter_modules(dot_optax.__path__) if not info.name.startswith("_")]
    return {"": dot_optax} | {f"{name}.": importlib.import_module(f"dot_optax.{name}") for name in inside}


def test_the_table_names_everything_public():
    public = {
        f"{prefix}{name}"
        for prefix, module in public_modules().items()
        for name in getattr(module, "__all__", dir(module))
        if not name.startswith("_") and not isinstance(getattr(module, name), types.ModuleType)
    }
    rows = re.findall(r"^\| `([\w.]+)` \|", page("examples/reference"), flags=re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == public


def anchors(text):
    """Those that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("https:", "http:")):
            file, _, anchor = target.partition("#")
            other = (path.parent / file).resolve() if file else path
            assert other.exists(), target
            assert not anchor or anchor in anchors(other.read_text()), target
