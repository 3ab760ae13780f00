"""Malformed input at random: it raises, and names the argument or the tree path.

Each example takes a valid call and spoils one thing. It must raise ValueError or TypeError, from our code or from JAX's,
with a text that names what is wrong. `malformed.py` has a list of such calls, and what each must say.
"""

import collections
import types

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dot_optax
from dot_optax import PerLoss

TREES = st.recursive(
    st.sampled_from([(), (2,), (2, 3)]),
    lambda children: (
        st.dictionaries(st.sampled_from("abcd"), children, min_size=1, max_size=3)
        | st.lists(children, min_size=1, max_size=3).map(tuple)
    ),
    max_leaves=5,
)
EXAMPLES = 150  # at most, for each of the nine tests: some run out of different ones earlier


def is_shape(x):
    return isinstance(x, tuple) and all(isinstance(n, int) for n in x)


def ones(tree):
    return jax.tree.map(jnp.ones, tree, is_leaf=is_shape)


def raises(call, *names):
    """Runs `call`, which must fail with a message that has one of `names`."""
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    message = str(caught.value)
    assert any(name in message for name in names), message


NOT_CONTAINERS = st.sampled_from(
    [
        None,
        1.0,
        "grads",
        np.ones(2),
        jnp.ones(2),
        (),
        {},
        object(),
        {1, 2},
        types.MappingProxyType({"task": 1, "kd": 2}),
    ]
)


def optimizers():
    return st.sampled_from(
        [
            dot_optax.dot(0.1),
            dot_optax.dot(0.1, weight_decay=0.1, nesterov=True),
            dot_optax.scale_by_dot(),
            dot_optax.gain_matched_sgd(0.1),
            dot_optax.scale_by_momenta(PerLoss(0.8, 0.9)),
            dot_optax.dot_adamw(0.1),
            dot_optax.scale_by_dot_adam(nesterov=True),
            dot_optax.per_loss(optax.trace(0.9), optax.trace(0.9)),
            dot_optax.joint(optax.trace(0.9)),
            dot_optax.wrap(lambda tx: optax.apply_if_finite(tx, 2), dot_optax.dot(0.1)),
            dot_optax.wrap(lambda tx: optax.MultiSteps(tx, 2), dot_optax.dot(0.1)),
        ]
    )


@hypothesis.given(TREES, optimizers(), st.data())
@hypothesis.settings(max_examples=EXAMPLES)
def test_containers(tree, tx, data):
    params = ones(tree)
    wrong = data.draw(
        st.sampled_from(["not", "one", "three", "list", "names", "tree", "missing", "fields", "mixed"]).flatmap(
            lambda kind: {
                "not": NOT_CONTAINERS,
                "one": st.just((params,)),
                "three": st.just((params, params, params)),
                "list": st.just([params, params]),
                "names": st.just({"ce": params, "kd": params}),
                "tree": st.just(params).filter(lambda p: not isinstance(p, tuple) or len(p) != 2),
                "missing": st.sampled_from([{"task": params}, {1: params}]),
                "fields": st.just(collections.namedtuple("Grads", "a b")(params, params)),
                "mixed": st.just({"task": params, 1: params}),
            }[kind]
        )
    )
    # Of keys of different types JAX says that they cannot be sorted.
    raises(lambda: tx.update(wrong, tx.init(params), params), "updates: expected", "dictionary keys")


def spoil(draw, tree):
    """A gradient tree that no longer fits the parameters it came from."""
    leaves, treedef = jax.tree.flatten(tree)
    i = draw(st.integers(0, len(leaves) - 1))
    kind = draw(
        st.sampled_from(["shape", "int", "bool", "string", "none", "object", "complex", "nested", "extra", "list"])
    )
    if kind == "extra":
        return {"extra": tree}
    if kind == "list":
        return [tree]
    leaf = leaves[i]
    leaves[i] = {
        "shape": jnp.ones((*leaf.shape, 5)),
        "int": jnp.ones(leaf.shape, int),
        "bool": jnp.ones(leaf.shape, bool),
        "string": "x",
        "none": None,
        "object": object(),
        "complex": 1j * leaf,
        "nested": {"deeper": leaf},
    }[kind]
    return treedef.unflatten(leaves)


@hypothesis.given(TREES, optimizers(), st.sampled_from([0, 1]), st.sampled_from([tuple, PerLoss, dict]), st.data())
@hypothesis.settings(max_examples=EXAMPLES)
def test_gradient_trees(tree, tx, loss, container, data):
    params = ones(tree)
    grads = [params, params]
    grads[loss] = spoil(data.draw, params)
    grads = (
        {"task": grads[0], "kd": grads[1]}
        if container is dict
        else PerLoss(*grads)
        if container is PerLoss
        else tuple(grads)
    )
    name = {
        tuple: f"updates[{loss}]",
        PerLoss: f"updates.{PerLoss._fields[loss]}",
        dict: f"updates['{PerLoss._fields[loss]}']",
    }
    raises(lambda: tx.update(grads, tx.init(params), params), name[container])


@hypothesis.given(TREES, optimizers(), st.sampled_from([0, 1]), st.data())
@hypothesis.settings(max_examples=EXAMPLES)
def test_gradient_trees_without_params(tree, tx, loss, data):
    """Without the parameters, each loss is compared with the other."""
    params = ones(tree)
    grads = [params, params]
    grads[loss] = spoil(data.draw, params)
    raises(
        lambda: tx.update(tuple(grads), tx.init(params)),
        "updates",
        "weight_decay needs",
    )


NOT_BETAS = st.sampled_from(
    [
        1.0,
        1,
        1.5,
        -1e-09,
        float("nan"),
        float("inf"),
        "0.9",
        None,
        [0.9],
        (0.9,),
        {"beta": 0.9},
        True,
        object(),
        0.5j,
        np.float32(1.0),
        np.float64("nan"),
        np.ones(2),
        jnp.ones(2),
        jnp.ones((1,)),
        jnp.complex64(0.5),
        jnp.array(True),
    ]
)
FACTORIES = st.sampled_from(
    [
        lambda task, kd: dot_optax.dot(0.1, task, kd),
        dot_optax.scale_by_dot,
        lambda task, kd: dot_optax.gain_matched_sgd(0.1, task, kd),
        lambda task, kd: dot_optax.dot_adamw(0.1, task, kd),
        lambda task, kd: dot_optax.scale_by_momenta({"task": task, "hint": 0.9, "kd": kd}),
        dot_optax.gains,
    ]
)


@hypothesis.given(FACTORIES, NOT_BETAS, st.booleans())
@hypothesis.settings(max_examples=EXAMPLES)
def test_betas(factory, wrong, first):
    raises(lambda: factory(wrong, 0.9) if first else factory(0.9, wrong), f"beta_{'task' if first else 'kd'} must")


@hypothesis.given(
    NOT_BETAS.filter(lambda x: not isinstance(x, (int, float, np.floating)) or isinstance(x, bool)), st.booleans()
)
@hypothesis.settings(max_examples=EXAMPLES)
def test_momentum_and_delta(wrong, first):
    name = "momentum" if first else "delta"
    raises(lambda: dot_optax.betas(**{name: wrong}), f"{name} must")


@hypothesis.given(
    st.sampled_from([dot_optax.dot, dot_optax.gain_matched_sgd]),
    st.sampled_from(
        [("weight_decay", w) for w in (-1e-9, float("nan"), float("inf"), "0.1", None, [0.1], jnp.ones(2))]
        + [("learning_rate", w) for w in ("0.1", None, [0.1], jnp.ones(2), True, float("nan"), float("inf"))]
        + [("accumulator_dtype", w) for w in (int, "half-ish", 3, object(), bool, "int8")]
        + [("mask", w) for w in (3, "w", {"w": 1.0, "b": True}, {"w": True}, [True], {"w": jnp.array(True), "b": True})]
        + [("mask", lambda tree: {"w": True})]
        + [
            ("reached", w)
            for w in (True, (True,), {"task": True}, (True, {"w": True}), (1, 0), (None, True), [True, True])
        ]
        + [("nesterov", w) for w in ("no", None, 1, jnp.array(True))]
    ),
    TREES,
)
@hypothesis.settings(max_examples=EXAMPLES)
def test_hyperparameters(factory, argument, tree):
    name, wrong = argument
    hypothesis.assume(not (factory is dot_optax.gain_matched_sgd and name == "reached"))
    params = {"w": ones(tree), "b": jnp.ones(2)}

    def call():
        keywords = {"learning_rate": 0.1, "weight_decay": 0.1} | {name: wrong}
        tx = factory(**keywords)
        return tx.update((params, params), tx.init(params), params)

    raises(call, name, "not understood", "as a data type")  # NumPy says these of no dtype


@hypothesis.given(
    st.sampled_from(
        [
            lambda p: jnp.sum(p["x"]),
            lambda p: jnp.stack([jnp.sum(p["x"])] * 2),
            lambda p: [jnp.sum(p["x"])] * 2,
            lambda p: None,
            lambda p: (),
            lambda p: {},
            lambda p: (jnp.sum(p["x"]), p["x"]),
            lambda p: (jnp.sum(p["x"]), None),
            lambda p: (jnp.sum(p["x"]), 1),
            lambda p: (jnp.sum(p["x"]), "loss"),
            lambda p: (jnp.sum(p["x"]), jnp.sum(p["x"]) * 1j),
            lambda p: (jnp.sum(p["x"]), {"loss": jnp.sum(p["x"])}),
            lambda p: (PerLoss(jnp.sum(p["x"]), jnp.sum(p["x"])), "aux"),
            3,
            None,
        ]
    ),
    st.sampled_from([jnp.ones(3), np.ones(3), jnp.ones(3, jnp.bfloat16)]),
    st.sampled_from([dot_optax.value_and_grads, lambda fn: lambda p: dot_optax.reached(fn, p)]),
    st.booleans(),
)
@hypothesis.settings(max_examples=EXAMPLES)
def test_loss_functions(fn, x, transform, jit):
    def call():
        function = transform(fn)
        return (jax.jit(function) if jit and transform is dot_optax.value_and_grads else function)({"x": x})

    raises(call, "loss_fn", "not callable", "the first argument must be callable", "callable object")


@hypothesis.given(
    st.sampled_from(
        [
            ("student_logits", w)
            for w in (
                None,
                "x",
                1,
                jnp.ones((2, 3), int),
                jnp.ones((2, 3), complex),
                jnp.ones((2, 4)),
                jnp.ones(()),
                object(),
            )
        ]
        + [
            ("teacher_logits", w)
            for w in (None, "x", 1, jnp.ones((2, 3), bool), jnp.ones((3, 3)), jnp.ones(3), [[None]])
        ]
        + [
            ("temperature", w)
            for w in (0, 0.0, -1, float("nan"), float("inf"), "4", None, jnp.ones(2), 1j, [4.0], True)
        ]
        + [("where", w) for w in (jnp.ones((2, 3)), jnp.ones(4, bool), "x", 1, [[True]] * 5)]
    )
)
@hypothesis.settings(max_examples=EXAMPLES)
def test_kd_loss(argument):
    name, wrong = argument
    arguments = {"student_logits": jnp.ones((2, 3)), "teacher_logits": jnp.zeros((2, 3)), "temperature": 4.0} | {
        name: wrong
    }
    raises(
        lambda: dot_optax.losses.kd_loss(**arguments),
        name,
        "broadcast",
        "not a valid JAX array",
        "axis -1 is out of bounds",
    )


def test_traced_betas_are_welcome():
    """A tracer cannot be range-checked; one of the wrong shape is refused."""
    params = {"w": jnp.ones(2)}

    @jax.jit
    def update(beta):
        tx = dot_optax.dot(0.1, beta, beta)
        return tx.update((params, params), tx.init(params), params)[0]

    np.testing.assert_allclose(update(0.5)["w"], -0.2, rtol=1e-6)
    raises(lambda: update(jnp.ones(2)), "beta_task must")
