"""Malformed input of every kind, and what it must say.

    python -m tests.malformed

prints, for each, the exception and its first line.  `test_malformed.py` wants each to raise ValueError or TypeError (or
what JAX raises), with the words that name what is wrong.
"""

import collections
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.core import FrozenDict

import dot_optax
from dot_optax import PerLoss, losses


class Malformed(NamedTuple):
    what: str
    call: Callable[[], Any]
    says: str  # a regular expression


P = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
TASK, KD = jax.tree.map(lambda p: 2 * p, P), jax.tree.map(lambda p: 3 * p, P)
THREE = {"ce": TASK, "hint": TASK, "kd": KD}


def _update(tx, grads, *params):
    return lambda: tx().update(grads, tx().init(P), *params)


def _init(make):
    return lambda: make().init(P)


def _gradients(what, grads, says):
    """One malformed container, given to every optimizer of two losses."""
    optimizers = {
        "dot": lambda: dot_optax.dot(0.1),
        "dot_adamw": lambda: dot_optax.dot_adamw(0.1),
        "per_loss": lambda: dot_optax.per_loss(optax.trace(0.1), optax.trace(0.1)),
        "joint": lambda: dot_optax.joint(optax.identity()),
        "accumulate": lambda: dot_optax.wrap(lambda tx: optax.MultiSteps(tx, 2), dot_optax.dot(0.1)),
    }
    return [Malformed(f"{name}: {what}", _update(tx, grads, P), says) for name, tx in optimizers.items()]


_CONTAINER = r"updates: expected PerLoss\(task=..., kd=...\).*'task', 'kd'.* got "
_SINGLE = "looks like one gradient tree instead of one per loss: take the gradients with dot_optax.value_and_grads"
_ONE_SCALAR = r"loss_fn must return one real scalar per loss, such as PerLoss.* got "

CONTAINERS = [
    *_gradients("one gradient tree", TASK, f"{_CONTAINER}a dict of 2: 'w', 'b'|{_CONTAINER}a dict of 2: 'b', 'w'"),
    *_gradients("one gradient tree, the remedy", TASK, _SINGLE),
    *_gradients("an array", jnp.ones(2), _CONTAINER + r"an array of shape \(2,\).*" + _SINGLE),
    *_gradients("a list", [TASK, KD], _CONTAINER + "a list of 2"),
    *_gradients("nothing", None, _CONTAINER + "None"),
    *_gradients("an empty tuple", (), _CONTAINER + "a tuple of 0"),
    *_gradients("one loss", (TASK,), _CONTAINER + "a tuple of 1"),
    *_gradients("three losses", (TASK, KD, KD), _CONTAINER + "a tuple of 3"),
    *_gradients("a missing loss", {"task": TASK}, _CONTAINER + "a dict of 1: 'task'"),
    *_gradients("an unknown loss", {"task": TASK, "kd": KD, "x": KD}, _CONTAINER + "a dict of 3: 'task', 'kd', 'x'"),
    *_gradients("another name", {"ce": TASK, "kd": KD}, _CONTAINER + "a dict of 2: 'ce', 'kd'"),
    *_gradients("other fields", collections.namedtuple("G", "a b")(TASK, KD), _CONTAINER + "a G of 2: 'a', 'b'"),
    *_gradients(
        "another shape",
        PerLoss(TASK, KD | {"b": jnp.ones(4)}),
        r"updates.kd\['b'\]: expected what params has there, an array of shape \(3,\).* got an array of shape \(4,\)",
    ),
    *_gradients("a broadcastable shape", (TASK | {"b": jnp.ones(1)}, KD), r"updates\[0\]\['b'\]: expected .*\(1,\)"),
    *_gradients("a missing leaf", {"task": {"w": TASK["w"]}, "kd": KD}, r"updates\['task'\]\['b'\]: .* got no leaf"),
    *_gradients(
        "an extra leaf", PerLoss(TASK, KD | {"c": jnp.ones(1)}), r"updates.kd\['c'\]: .* there, no leaf; got an"
    ),
    *_gradients("no gradient", PerLoss(TASK, None), r"updates.kd\['w'\]: .* got no leaf|updates.kd\['b'\]: .* got no"),
    *_gradients("a gradient that is None", PerLoss(TASK, KD | {"b": None}), r"updates.kd\['b'\]: .* got no leaf"),
    *_gradients("a string", PerLoss(TASK, KD | {"b": "x"}), r"updates.kd\['b'\]: .* got 'x'"),
    *_gradients("whole numbers", PerLoss(TASK, KD | {"b": jnp.ones(3, int)}), r"updates.kd\['b'\]: .* dtype int32"),
    *_gradients("complex numbers", PerLoss(TASK, KD | {"b": 1j * KD["b"]}), r"updates.kd\['b'\]: .* dtype complex64"),
    *_gradients("another container", PerLoss(TASK, FrozenDict(KD)), "updates.kd: its containers differ"),
    *_gradients(
        "all of value_and_grads", (PerLoss(1.0, 2.0), PerLoss(TASK, KD)), "returned: unpack it, `values, grads"
    ),
]

PAIR = (jnp.ones(3), jnp.ones(3))  # parameters that are a 2-tuple themselves
ALGEBRA = [
    Malformed(
        "dot: parameters that are a pair, as gradients",
        lambda: dot_optax.dot(0.1).update(PAIR, dot_optax.dot(0.1).init(PAIR), PAIR),
        _SINGLE,
    ),
    Malformed(
        "... without params",
        lambda: dot_optax.dot(0.1).update(PAIR, dot_optax.dot(0.1).init(PAIR)),
        _SINGLE,
    ),
    Malformed(
        "per_loss of nothing", lambda: dot_optax.per_loss(), "transformations: expected a container .* tuple of 0"
    ),
    Malformed(
        "per_loss of a number", lambda: dot_optax.per_loss(optax.identity(), 3), "per_loss, 'kd': expected an optax"
    ),
    Malformed(
        "per_loss of a dict of numbers", lambda: dot_optax.per_loss({"a": 1}), "per_loss, 'a': expected an optax"
    ),
    Malformed(
        "per_loss by position: a dict of other names",
        lambda: dot_optax.per_loss(*[optax.identity()] * 3).update(THREE, None, P),
        "updates: expected a mapping with the keys 0, 1, 2, or a 3-tuple in this order, got a dict of 3: 'ce', 'hint', 'kd'",
    ),
    Malformed(
        "per_loss by name: a tuple",
        lambda: dot_optax.per_loss({"a": optax.identity(), "b": optax.identity()}).update((TASK, KD), None, P),
        "updates: expected a mapping with the keys 'a', 'b', got a tuple of 2",
    ),
    Malformed(
        "joint of a number", lambda: dot_optax.joint(3), "joint: expected an optax.GradientTransformation, got 3"
    ),
    *(
        Malformed(
            f"joint: losses={losses!r}",
            lambda losses=losses: dot_optax.joint(optax.identity(), losses=losses),
            "joint: `losses` must be a tuple of distinct names, or their number",
        )
        for losses in (("a", "a"), 0, "kd", ())
    ),
    Malformed("wrap of a string", lambda: dot_optax.wrap(optax.flatten, "x"), "wrap: expected an optax.*, got 'x'"),
    Malformed("wrap by a number", lambda: dot_optax.wrap(3, dot_optax.dot(0.1)), "'int' object is not callable"),
    Malformed(
        "wrap to a number", lambda: dot_optax.wrap(lambda tx: 3, optax.identity()), "wrap: `wrapper`: expected an"
    ),
    Malformed("sum_losses of an array", lambda: dot_optax.sum_losses().update(TASK["w"], None), "one entry per loss"),
    Malformed(
        "sum_losses of whole numbers",
        lambda: dot_optax.sum_losses().update(({"w": jnp.arange(2)}, {"w": jnp.arange(2)}), None),
        r"updates\[0\]\['w'\] must be floating point or complex, got an array of shape \(2,\) and dtype int32; split it off",
    ),
    Malformed(
        "sum_losses of different trees",
        lambda: dot_optax.sum_losses().update((TASK, TASK | {"b": jnp.ones(4)}), None),
        r"updates\[1\]\['b'\]: expected what the first loss has there",
    ),
]

_FACTORIES = {
    "dot": lambda task, kd: dot_optax.dot(0.1, task, kd),
    "scale_by_dot": lambda task, kd: dot_optax.scale_by_dot(task, kd),
    "dot_adamw": lambda task, kd: dot_optax.dot_adamw(0.1, task, kd),
    "gain_matched_sgd": lambda task, kd: dot_optax.gain_matched_sgd(0.1, task, kd),
    "gains": lambda task, kd: dot_optax.gains(task, kd),
}
HYPERPARAMETERS = [
    *(
        Malformed(
            f"{name}: a momentum of {beta!r:.40}", lambda make=make, beta=beta: make(0.9, beta), "beta_kd must be"
        )
        for name, make in _FACTORIES.items()
        for beta in (1.0, -0.1, float("nan"), None, "0.9", True, 0.5j, jnp.ones(2), jnp.ones(1), jnp.array(True))
    ),
    Malformed(
        "scale_by_momenta: a momentum",
        lambda: dot_optax.scale_by_momenta({"ce": 0.9, "kd": 1.5}),
        r"beta_kd must be in \[0, 1\), got 1.5",
    ),
    Malformed(
        "scale_by_momenta: one number", lambda: dot_optax.scale_by_momenta(0.9), "betas: expected a container .* 0.9"
    ),
    Malformed(
        "deepkd: a variant", lambda: dot_optax.deepkd(0.1, variant="x"), "variant must be one of 'paper', 'code'"
    ),
    Malformed("deepkd: a momentum", lambda: dot_optax.deepkd(0.1, beta_target=1.0), "beta_target must be in"),
    Malformed(
        "betas: too large", lambda: dot_optax.betas(0.9, 0.1), r"momentum \+ delta must lie in \[0, 1\), got 0.9 \+ 0.1"
    ),
    Malformed("betas: too small", lambda: dot_optax.betas(0.05, 0.1), r"momentum - delta must lie in \[0, 1\)"),
    Malformed(
        "betas: a string", lambda: dot_optax.betas("0.9"), "momentum must be a number or a scalar array, got '0.9'"
    ),
    Malformed(
        "betas: no delta", lambda: dot_optax.betas(0.9, None), "delta must be a number or a scalar array, got None"
    ),
    *(
        Malformed(
            f"{make.__name__}: {name}={value!r:.40}",
            lambda make=make, kw={name: value}: make(**{"learning_rate": 0.1} | kw),
            name,
        )
        for make in (dot_optax.dot, dot_optax.gain_matched_sgd, dot_optax.deepkd, dot_optax.dot_adamw)
        for name, value in [
            *(("learning_rate", value) for value in ("0.1", None, jnp.ones(2), True, float("nan"))),
            *(("weight_decay", value) for value in (-1e-4, float("nan"), float("inf"), "0.1", None, jnp.ones(2))),
            *(("nesterov", value) for value in ("no", None, 1)),
            *(("mask", value) for value in (True,)),
        ]
        if not (make is dot_optax.gain_matched_sgd and name == "nope")
    ),
    *(
        Malformed(f"{make.__name__}: {name}={value!r:.40}", lambda make=make, kw={name: value}: make(0.1, **kw), name)
        for make, name in ((dot_optax.dot, "accumulator_dtype"), (dot_optax.dot_adamw, "mu_dtype"))
        for value in (int, bool)
    ),
    *(
        Malformed(f"dot_adamw: {name}={value}", lambda kw={name: value}: dot_optax.dot_adamw(0.1, **kw), name)
        for name in ("b2", "eps", "eps_root")
        for value in (-0.1, None, float("nan"))
    ),
    Malformed(
        "dot_adamw: normalize=1", lambda: dot_optax.dot_adamw(0.1, normalize=1), "normalize must be True or False"
    ),
]

MASKS = [
    Malformed(
        "dot: reached=True", _init(lambda: dot_optax.dot(0.1, reached=True)), "reached: expected PerLoss.* got True"
    ),
    Malformed("dot: one mask", _init(lambda: dot_optax.dot(0.1, reached=(True,))), "reached: expected .* a tuple of 1"),
    Malformed(
        "dot: reached without an entry",
        _init(lambda: dot_optax.dot(0.1, reached=(True, {"w": True}))),
        "reached, kd: no entry for the parameter b",
    ),
    Malformed(
        "dot: reached of numbers",
        _init(lambda: dot_optax.dot(0.1, reached=(True, {"w": jnp.ones(3), "b": True}))),
        r"reached, kd\['w'\]: expected True or False, known before tracing; got an array of shape \(3,\)",
    ),
    *(
        Malformed(
            f"{make.__name__}: mask without an entry",
            lambda make=make: make(0.1, weight_decay=0.1, mask={"w": True}).update((TASK, KD), make(0.1).init(P), P),
            "mask: no entry for the parameter b",
        )
        for make in (dot_optax.dot, dot_optax.dot_adamw, dot_optax.gain_matched_sgd)
    ),
    Malformed(
        "dot: mask with a stranger",
        _init(lambda: dot_optax.dot(0.1, weight_decay=0.1, mask={"w": True, "b": True, "bais": False})),
        "mask: the entry bais belongs to no parameter",
    ),
    *(
        Malformed(
            f"{name}: L2 without params",
            _update(make, (TASK, KD)),
            r"weight_decay needs the parameters: call update\(grads, state, params\)",
        )
        for name, make in {
            "dot": lambda: dot_optax.dot(0.1, weight_decay=0.1),
            "dot_adamw": lambda: dot_optax.dot_adamw(0.1),
            "gain_matched_sgd": lambda: dot_optax.gain_matched_sgd(0.1, weight_decay=0.1),
        }.items()
    ),
    Malformed(
        "dot: a mask that is a function, without params",
        _update(lambda: dot_optax.dot(0.1, reached=(True, lambda p: True)), (TASK, KD)),
        r"reached, kd is a function of the parameters: call update\(grads, state, params\)",
    ),
    Malformed(
        "dot: a state made with other masks",
        lambda: dot_optax.dot(0.1).update(
            (TASK, KD), dot_optax.dot(0.1, reached=(True, {"w": True, "b": False})).init(P), P
        ),
        "updates: the state was made for other parameters, or with other masks",
    ),
    Malformed(
        "dot: a state made for other shapes",
        lambda: dot_optax.dot(0.1).update((TASK, KD), dot_optax.dot(0.1).init(P | {"b": jnp.ones(1)}), P),
        "updates: the state was made for other parameters, or with other masks",
    ),
]


class _Module(nnx.Module):
    def __init__(self, **others):
        self.w = nnx.Param(jnp.ones(2))
        for name, value in others.items():
            setattr(self, name, self.w if value == "tied" else value)


def _value_and_grads(fn, argument=1.0, **options):
    return lambda: dot_optax.value_and_grads(fn, **options)(argument)


LEAVES = [
    Malformed(
        f"{name}: a parameter that is {what}",
        lambda make=make, leaf=leaf: make().init({"w": jnp.ones(2), "f": leaf}),
        rf"params\['f'\] must be floating point or complex, got {says}.*; split it off, .*equinox.partition",
    )
    for name, make in {"dot": lambda: dot_optax.dot(0.1), "dot_adamw": lambda: dot_optax.dot_adamw(0.1)}.items()
    for what, leaf, says in (
        ("a function", jax.nn.gelu, "<"),
        ("whole", jnp.ones(2, int), "an array"),
        ("text", "x", "'x'"),
    )
]

_LOGITS = (jnp.zeros((2, 3)), jnp.zeros((2, 3)))

LOSSES = [
    Malformed("a loss that is no function", _value_and_grads(3), "'int' object is not callable"),
    Malformed("one summed loss", _value_and_grads(lambda x: x**2), _ONE_SCALAR + r"an array of shape \(\)"),
    Malformed(
        "an array of losses", _value_and_grads(lambda x: jnp.stack([x, x])), _ONE_SCALAR + r"an array of shape \(2,\)"
    ),
    Malformed(
        "a list of losses",
        _value_and_grads(lambda x: [x, x]),
        _ONE_SCALAR + "a list of 2: return them apart, in a tuple",
    ),
    Malformed("no loss", _value_and_grads(lambda x: ()), _ONE_SCALAR + "a tuple of 0"),
    Malformed(
        "no reduction", _value_and_grads(lambda x: (x, x * jnp.ones(3))), _ONE_SCALAR + r".*\(3,\).* for the loss 1"
    ),
    Malformed("a whole number", _value_and_grads(lambda x: PerLoss(x, 1)), _ONE_SCALAR + "1 for the loss 'kd'"),
    Malformed(
        "a nested loss", _value_and_grads(lambda x: PerLoss(x, {"kd": x})), _ONE_SCALAR + "a dict of 1: 'kd' for"
    ),
    Malformed(
        "a complex loss", _value_and_grads(lambda x: PerLoss(x, x * 1j)), _ONE_SCALAR + ".* complex64 for the loss"
    ),
    Malformed(
        "aux without has_aux", _value_and_grads(lambda x: (PerLoss(x, x), {"aux": x})), _ONE_SCALAR + "a PerLoss.*"
    ),
    *(
        Malformed(
            f"has_aux and {what}",
            _value_and_grads(fn, has_aux=True),
            rf"with has_aux, loss_fn must return \(losses, aux\), got {got}",
        )
        for what, fn, got in (
            ("no aux", lambda x: PerLoss(x, x), "a PerLoss of 2"),
            ("three outputs", lambda x: (x, x, x), "a tuple of 3"),
            ("a dict", lambda x: {"task": x, "kd": x}, "a dict of 2"),
        )
    ),
    Malformed("a whole parameter", _value_and_grads(lambda x: (x, x), {"n": 1}), r"argument 0\['n'\] must be floating"),
    Malformed("a function as a parameter", _value_and_grads(lambda x: (x, x), {"f": jax.nn.relu}), "equinox.partition"),
    Malformed("a string as a parameter", _value_and_grads(lambda x: (x, x), "x"), "argument 0 must be .* got 'x'"),
    Malformed(
        "an NNX module", _value_and_grads(lambda m: (m.w.sum(),) * 2, _Module()), "dot_optax.nnx.value_and_grads"
    ),
    *(
        Malformed(
            f"argnums={n!r}", _value_and_grads(lambda x: (x, x), argnums=n), "argnums=.* must name some of the 1 "
        )
        for n in (2, "x", None, (0, 0), (), (0, -1))
    ),
    *(
        Malformed(
            f"reached of an NNX module with {what}",
            lambda others=others: dot_optax.reached(lambda m: (m.w.sum(),) * 2, _Module(**others)),
            "reached: params: a Flax NNX module goes to dot_optax.nnx.reached",
        )
        for what, others in (("tied weights", {"v": "tied"}), ("counters", {"rngs": nnx.Rngs(0)}))
    ),
    Malformed(
        "reached of a whole parameter",
        lambda: dot_optax.reached(lambda p: (p["n"], p["n"]), {"n": 1}),
        r"reached: params\['n'\] must be floating point or complex",
    ),
    *(
        Malformed(
            f"{name}: other shapes",
            lambda name=name, args=args: getattr(dot_optax.losses, name)(jnp.zeros((2, 3)), jnp.zeros((2, 4)), *args),
            r"same shape .* got \(2, 3\) and \(2, 4\)",
        )
        for name, args in (
            *((name, ()) for name in ("reverse_kl_loss", "jeffreys", "jsd_loss", "skew_kl_loss", "bernoulli_kd_loss")),
            *((name, (jnp.zeros(2, int),)) for name in ("tckd_loss", "nckd_loss", "dkd_loss", "deepkd_losses")),
            ("dist_loss", ()),
            ("chunked_kd_loss", ()),
        )
    ),
    *(
        Malformed(
            f"{name} of two classes",
            lambda name=name: getattr(dot_optax.losses, name)(*[jnp.zeros((2, 2))] * 2, jnp.zeros(2, int)),
            "with three classes or more",
        )
        for name in ("nckd_loss", "dkd_loss", "deepkd_losses")
    ),
    *(
        Malformed(
            f"dkd_loss: labels {what}",
            lambda labels=labels: dot_optax.losses.dkd_loss(*[jnp.zeros((2, 3))] * 2, labels),
            r"labels must be integers of shape \(2,\), one per example; got ",
        )
        for what, labels in (
            ("as probabilities", jnp.zeros((2, 3))),
            ("of other examples", jnp.zeros(3, int)),
            ("as floats", jnp.zeros(2)),
        )
    ),
    *(
        Malformed(what, call, says)
        for what, call, says in (
            (
                "jsd_loss: beta 2",
                lambda: dot_optax.losses.jsd_loss(*_LOGITS, beta=2),
                r"beta must be in \[0, 1\], got 2",
            ),
            ("jsd_loss: beta as a string", lambda: dot_optax.losses.jsd_loss(*_LOGITS, beta="x"), "beta must be a num"),
            ("skew_kl_loss: alpha 1", lambda: dot_optax.losses.skew_kl_loss(*_LOGITS, alpha=1.0), "alpha must be in"),
            (
                "standardize_logits of whole numbers",
                lambda: dot_optax.losses.standardize_logits(jnp.arange(3)),
                "float",
            ),
            ("top_k_mask: k 0", lambda: dot_optax.losses.top_k_mask(_LOGITS[0], jnp.zeros(2, int), 0), "k must be in"),
            (
                "top_k_mask: k 2.5",
                lambda: dot_optax.losses.top_k_mask(_LOGITS[0], jnp.zeros(2, int), 2.5),
                "an integer",
            ),
            (
                "dkd_loss: alpha of each example",
                lambda: dot_optax.losses.dkd_loss(*_LOGITS, jnp.zeros(2, int), alpha=jnp.ones((2, 1))),
                "alpha must be a number or a scalar array",
            ),
            ("dist_loss: gamma as a string", lambda: dot_optax.losses.dist_loss(*_LOGITS, gamma="1"), "gamma must be"),
            (
                "top_k_kd_loss: classes as where",
                lambda: dot_optax.losses.top_k_kd_loss(
                    *_LOGITS, jnp.zeros((2, 3), int), 1.0, where=jnp.ones((2, 3), bool)
                ),
                r"where of shape \(2, 3\) does not fit \(2, 1\)",
            ),
            ("dkd_warmup: no epochs", lambda: dot_optax.losses.dkd_warmup(10, 0), "epochs must be in"),
            ("dkd_warmup: no steps", lambda: dot_optax.losses.dkd_warmup(0), "steps_per_epoch must be in"),
            ("top_k_schedule: backwards", lambda: dot_optax.losses.top_k_schedule(10, 5, 5), "end must be in"),
            ("top_k_schedule: two classes", lambda: dot_optax.losses.top_k_schedule(2, 0, 5), "num_classes must be"),
            (
                "chunked_kd_loss: chunks of nothing",
                lambda: dot_optax.losses.chunked_kd_loss(*_LOGITS, chunk_size=0),
                "chunk_size must be in",
            ),
            (
                "chunked_kd_loss: numbers as where",
                lambda: dot_optax.losses.chunked_kd_loss(*_LOGITS, where=jnp.ones((2, 1))),
                "where must be bools",
            ),
            (
                "chunked_kd_loss: a kernel of another width",
                lambda: dot_optax.losses.chunked_kd_loss(*_LOGITS, student_kernel=jnp.zeros((4, 3))),
                r"student_kernel must have .* for features of shape \(2, 3\), got \(4, 3\)",
            ),
            (
                "chunked_kd_loss: other vocabularies",
                lambda: dot_optax.losses.chunked_kd_loss(*_LOGITS, student_kernel=jnp.zeros((3, 50))),
                r"same shape .* got \(2, 50\) and \(2, 3\)",
            ),
            (
                "top_k_kd_loss: another remainder",
                lambda: dot_optax.losses.top_k_kd_loss(*_LOGITS, jnp.zeros((2, 3), int), 1.0, remainder="none"),
                "remainder must be 'other' or 'zero', got 'none'",
            ),
            (
                "top_k_kd_loss: indices of another shape",
                lambda: dot_optax.losses.top_k_kd_loss(*_LOGITS, jnp.zeros((2, 2), int), 1.0),
                r"teacher_log_probs and teacher_indices must have .* got \(2, 3\) and \(2, 2\)",
            ),
            (
                "top_k_kd_loss: other tokens",
                lambda: dot_optax.losses.top_k_kd_loss(_LOGITS[0], jnp.zeros((4, 3)), jnp.zeros((4, 3), int), 1.0),
                r"must have the same shape \[..., k\] beside logits of shape \(2, 3\)",
            ),
        )
    ),
    *(
        Malformed(
            f"kd_loss: {what}",
            lambda kw=kw: dot_optax.losses.kd_loss(
                **{"student_logits": jnp.zeros((2, 3)), "teacher_logits": jnp.zeros((2, 3))} | kw
            ),
            says,
        )
        for what, kw, says in (
            ("other shapes", {"teacher_logits": jnp.zeros((2, 4))}, r"same shape .* got \(2, 3\) and \(2, 4\)"),
            ("a broadcastable shape", {"teacher_logits": jnp.zeros(3)}, "same shape"),
            ("scalars", {"student_logits": jnp.zeros(()), "teacher_logits": jnp.zeros(())}, "axis -1 is out of bounds"),
            ("an axis that is not there", {"axis": 5}, "axis 5 is out of bounds"),
            (
                "one class",
                {"student_logits": jnp.zeros((2, 1)), "teacher_logits": jnp.zeros((2, 1))},
                "two classes or more",
            ),
            ("whole numbers", {"student_logits": jnp.zeros((2, 3), int)}, "student_logits must be .* got .* int32"),
            ("complex numbers", {"teacher_logits": jnp.zeros((2, 3), complex)}, "teacher_logits must be .* complex64"),
            ("None", {"student_logits": None}, "student_logits must be .* got None"),
            *(
                (f"temperature {t!r:.30}", {"temperature": t}, "temperature must be")
                for t in (0, 0.0, -1, float("nan"), float("inf"), "4", None, jnp.ones(2), 1j, [4.0], True, 1e-50)
            ),
            ("numbers as where", {"where": jnp.ones((2, 3))}, "where must be bools"),
            ("another where", {"where": jnp.ones(4, bool)}, r"4.*2, ?3"),
            ("a larger where", {"where": jnp.ones((5, 2, 3), bool)}, r"5, ?2, ?3.*2, ?3"),
        )
    ),
]


def _two_losses(w, x=1.0):
    return PerLoss(w * jnp.mean(x), w)


def _sampled(make=dot_optax.sampled_losses, periods=None, step=0, args=(1.0,), **options):
    periods = {"kd": 2} if periods is None else periods
    return lambda: make(_two_losses, periods, **options)(step, *args)


_examples = functools.partial(dot_optax.sampled_examples, batch_argnums=1)
_ROWS = (1.0, jnp.ones(6))

SAMPLING = [
    Malformed(
        "sampled_losses: offsets in order",
        _sampled(offsets=(0, 1)),
        "offsets must be a mapping, such as .* got a tuple",
    ),
    Malformed(
        "sampled_losses: a long period", _sampled(periods={"kd": 100_000}), "the most is 65536; give smaller ones"
    ),
    Malformed(
        "sampled_losses: the kind of a key",
        lambda: dot_optax.sampled_losses(_two_losses, {"kd": 2}).kind(jax.random.key(0)),
        "the step must be an int, and was an array or a key",
    ),
    Malformed(
        "sampled_examples: the parameters as rows",
        _sampled(dot_optax.sampled_examples, batch_argnums=0),
        "argument 0 is in batch_argnums and",
    ),
    Malformed(
        "sampled_losses: the kind of an array",
        lambda: dot_optax.sampled_losses(_two_losses, {"kd": 2}).kind(jnp.int32(1)),
        r"the step must be an int, .* give int\(step\)",
    ),
    Malformed(
        "sampled_losses: an unknown loss", _sampled(periods={"hint": 2}), "has 'hint', but the losses are 'task', 'kd'"
    ),
    Malformed(
        "sampled_losses: three periods for two losses", _sampled(periods=(1, 2, 1)), "has 3 entries, but there are 2"
    ),
    Malformed("sampled_losses: one period for two losses", _sampled(periods=(2,)), "has 1 entries, but there are 2"),
    Malformed(
        "sampled_losses: a period of 1 for an unknown loss", _sampled(periods={"hint": 1}), "has 'hint', but the"
    ),
    Malformed(
        "sampled_losses: a period of 0", _sampled(periods={"kd": 0}), r"periods\['kd'\] must be a whole number.* got 0"
    ),
    Malformed("sampled_losses: a period of 2.5", _sampled(periods={"kd": 2.5}), "must be a whole number.* got 2.5"),
    Malformed("sampled_losses: one number", _sampled(periods=4), "periods must be a mapping, such as .*; got 4"),
    Malformed("sampled_losses: nothing", _sampled(periods={}), "periods must be a mapping"),
    Malformed(
        "sampled_losses: an offset of k", _sampled(offsets={"kd": 2}), r"offsets\['kd'\] must be .* below the period"
    ),
    Malformed(
        "sampled_losses: an offset without a period", _sampled(offsets={"task": 1}), "has 'task', but periods has 'kd'"
    ),
    Malformed(
        "sampled_losses: periods that never meet", _sampled(periods=(65_537, 2)), "start together only every 131074"
    ),
    Malformed(
        "sampled_losses: a step of 0.5",
        _sampled(step=0.5),
        "step, which comes before .*, must be a whole number or a key .* got 0.5",
    ),
    Malformed(
        "sampled_losses: the parameters in the step's place",
        _sampled(step={"w": 1.0}),
        "step, which comes before .*, must be .* got a dict",
    ),
    Malformed(
        "sampled_losses: several steps",
        _sampled(step=jnp.arange(3)),
        r"step, which comes before .*, must be .* shape \(3,\)",
    ),
    Malformed(
        "sampled_losses: whole numbers", _sampled(args=(1,)), "sampled_losses: argument 0 must be floating point"
    ),
    Malformed(
        "sampled_losses: losses that are no scalars", _sampled(args=(jnp.ones(2),)), "one real scalar per loss, such as"
    ),
    Malformed(
        "sampled_difference: a mapping", _sampled(dot_optax.sampled_difference, {"kd": 2}), "period must be a whole"
    ),
    Malformed(
        "sampled_difference: a period of True", _sampled(dot_optax.sampled_difference, True), "period must be a whole"
    ),
    Malformed(
        "sampled_difference: a foreign `reached`",
        _sampled(dot_optax.sampled_difference, 2, reached={"ce": True, "kd": True}),
        "reached: expected .*'task', 'kd'",
    ),
    Malformed(
        "sampled_examples: 6 rows by 4", _sampled(_examples, {"kd": 4}, args=_ROWS), r"argument 1.*4 divides.*\(6,\)"
    ),
    Malformed(
        "sampled_examples: no such argument",
        _sampled(_examples),
        "batch_argnums=1 counts the arguments of loss_fn from 0.*, and there are 1",
    ),
    Malformed("sampled_examples: a number for rows", _sampled(_examples, args=(1.0, 2.0)), r"argument 1.* shape \(\)"),
]

_MAPS = jnp.ones((4, 3, 3, 2))
_UNLIKE = r"features do not fit: student of shape \({}\), teacher of shape \({}\); project the student's features first"
_UNFIT = r"embeddings .*, indices .*, negatives .*, memory .* do not fit: \(\({}\), \({}\), \({}\), \(2, 8, {}\)\)"


def _crd(student=None, teacher=None, indices=None, negatives=None, dim=5, **options):
    embeddings = (jnp.ones((4, 5)) if x is None else x for x in (student, teacher))
    indices = jnp.arange(4) if indices is None else indices
    negatives = jnp.ones((4, 3), int) if negatives is None else negatives
    return lambda: losses.crd_loss(
        *embeddings, indices, negatives, losses.crd_init(jax.random.key(0), 8, dim), **options
    )


FEATURES = [
    Malformed(
        "feature_loss: other widths",
        lambda: losses.feature_loss(jnp.ones((4, 2)), jnp.ones((4, 3))),
        _UNLIKE.format("4, 2", "4, 3"),
    ),
    Malformed(
        "feature_loss: widths that would broadcast",
        lambda: losses.feature_loss(jnp.ones((4, 1)), jnp.ones((4, 3))),
        _UNLIKE.format("4, 1", "4, 3"),
    ),
    Malformed(
        "feature_loss: whole numbers",
        lambda: losses.feature_loss(jnp.ones((4, 3), int), jnp.ones((4, 3))),
        r"features must be real floating point, got an array of shape \(4, 3\) and dtype int32 and",
    ),
    Malformed(
        "feature_loss: complex numbers",
        lambda: losses.feature_loss(jnp.ones((4, 3)), 1j * jnp.ones((4, 3))),
        "features must be real floating point, .* dtype complex64",
    ),
    Malformed("feature_loss: nothing", lambda: losses.feature_loss(None, jnp.ones(3)), "None is not a valid value"),
    Malformed(
        "feature_loss: a mask of numbers",
        lambda: losses.feature_loss(jnp.ones((4, 3)), jnp.ones((4, 3)), where=jnp.ones((4, 1))),
        "where must be None or a boolean array",
    ),
    Malformed(
        "feature_loss: a mask that fits nothing",
        lambda: losses.feature_loss(jnp.ones((4, 3)), jnp.ones((4, 3)), where=jnp.ones(4, bool)),
        r"Incompatible .* for broadcasting: .*4.*4, ?3",
    ),
    Malformed(
        "attention_transfer_loss: other sizes",
        lambda: losses.attention_transfer_loss(_MAPS, jnp.ones((4, 6, 6, 2))),
        _UNLIKE.format("4, 3, 3, 2", "4, 6, 6, 2") + ", or resize them",
    ),
    Malformed(
        "attention_transfer_loss: no maps",
        lambda: losses.attention_transfer_loss(jnp.ones((4, 2)), jnp.ones((4, 2))),
        "axis -3 is out of bounds for array of dimension 2",
    ),
    Malformed(
        "similarity_loss: other examples",
        lambda: losses.similarity_loss(_MAPS, _MAPS[:3]),
        _UNLIKE.format("4, 3, 3, 2", "3, 3, 3, 2"),
    ),
    Malformed(
        "similarity_loss: a mask of numbers",
        lambda: losses.similarity_loss(_MAPS, _MAPS, where=jnp.ones(4, int)),
        "where must be None or a boolean array",
    ),
    Malformed(
        "similarity_loss: a mask of another length",
        lambda: losses.similarity_loss(_MAPS, _MAPS, where=jnp.ones(3, bool)),
        r"Incompatible .* for broadcasting: .*3.*4",
    ),
    Malformed("crd_loss: other widths", _crd(student=jnp.ones((4, 6))), _UNLIKE.format("4, 6", "4, 5")),
    Malformed("crd_loss: another width than the memory's", _crd(dim=6), _UNFIT.format("4, 5", "4,", "4, 3", 6)),
    Malformed("crd_loss: one example", _crd(jnp.ones(5), jnp.ones(5)), _UNFIT.format("5,", "4,", "4, 3", 5)),
    Malformed("crd_loss: whole numbers", _crd(student=jnp.ones((4, 5), int)), "must be real floating point"),
    Malformed(
        "crd_loss: indices of another batch",
        _crd(indices=jnp.arange(3)),
        _UNFIT.format("4, 5", "3,", "4, 3", 5),
    ),
    Malformed(
        "crd_loss: indices in a column",
        _crd(indices=jnp.arange(4)[:, None]),
        _UNFIT.format("4, 5", "4, 1", "4, 3", 5),
    ),
    Malformed("crd_loss: one row of negatives", _crd(negatives=jnp.ones(3, int)), _UNFIT.format("4, 5", "4,", "3,", 5)),
    Malformed("crd_loss: no negatives", _crd(negatives=jnp.ones((4, 0), int)), _UNFIT.format("4, 5", "4,", "4, 0", 5)),
    Malformed(
        "crd_loss: negatives of another batch",
        _crd(negatives=jnp.ones((3, 3), int)),
        _UNFIT.format("4, 5", "4,", "3, 3", 5),
    ),
    Malformed("crd_loss: negatives that are no indices", _crd(negatives=jnp.ones((4, 3))), "integer"),
    Malformed("crd_loss: a temperature of 0", _crd(temperature=0.0), r"temperature must be in .* got 0.0"),
    Malformed("crd_loss: a momentum of 1", _crd(momentum=1.0), r"momentum must be in \[0, 1\), got 1.0"),
    Malformed(
        "crd_negatives: labels that are one-hot",
        lambda: losses.crd_negatives(jax.random.key(0), jnp.eye(4), jnp.arange(9), 3),
        r"\(9,\).*\(4,\)",
    ),
]

_aggregate = functools.partial(dot_optax.aggregate, dot_optax.weightings.projected())
AGGREGATION = [
    *(
        Malformed(f"aggregate: {what}", _update(_aggregate, grads, P), says)
        for what, grads, says in (
            ("one gradient tree", TASK, _SINGLE),
            ("a list", [TASK, KD], _CONTAINER + "a list of 2"),
            ("three losses", (TASK, KD, KD), _CONTAINER + "a tuple of 3"),
            ("another shape", PerLoss(TASK, KD | {"b": jnp.ones(4)}), r"updates.kd\['b'\]: .* got an array of shape"),
        )
    ),
    Malformed("aggregate: a number", lambda: dot_optax.aggregate(0.5), "aggregate: expected a Weighting.* got 0.5"),
    Malformed(
        "aggregate: a weighting not called",
        lambda: dot_optax.aggregate(dot_optax.weightings.projected),
        r"aggregate: expected a Weighting, such as weightings.projected\(\), got <function projected",
    ),
    Malformed(
        "aggregate: losses", lambda: _aggregate(losses="kd"), "aggregate: `losses` must be a tuple of distinct names"
    ),
    *(
        Malformed(
            f"aggregate: groups={groups!r}", lambda groups=groups: _aggregate(groups=groups), "groups must be 'all'"
        )
        for groups in ("layers", 3, None)
    ),
    Malformed("aggregate: one mask", _init(lambda: _aggregate(reached=(True,))), "reached: expected .* a tuple of 1"),
    Malformed(
        "aggregate: reached without an entry",
        _init(lambda: _aggregate(reached=(True, {"w": True}))),
        "reached, kd: no entry for the parameter b",
    ),
    Malformed(
        "aggregate: a parameter that is whole",
        lambda: _aggregate().init({"f": jnp.ones(2, int)}),
        r"params\['f'\] must be floating point or complex",
    ),
    Malformed(
        "min_norm(log=True) without losses",
        _update(lambda: dot_optax.aggregate(dot_optax.weightings.min_norm(log=True)), (TASK, KD), P),
        r"min_norm\(log=True\) needs losses: call update\(grads, state, params, losses=values\)",
    ),
    Malformed(
        "aggregate: the values of other losses",
        lambda: _aggregate().update((TASK, KD), _aggregate().init(P), P, losses={"ce": 1.0, "kd": 2.0}),
        "losses: expected .*'task', 'kd'.* got a dict of 2: 'ce', 'kd'",
    ),
    Malformed("bisector: a length", lambda: dot_optax.weightings.bisector("x"), "length must be 'config', .* got 'x'"),
    *(
        Malformed(
            f"{make.__name__}: {name}={value!r}", lambda make=make, kw={name: value}: make(**kw), f"{name} must be"
        )
        for make, name, values in (
            (dot_optax.weightings.conflict_averse, "kappa", (-0.1, 1.0, None, float("nan"))),
            (dot_optax.weightings.priority, "tau", (-0.1, 1.0, "0.1")),
            (dot_optax.weightings.priority, "decay", (1.0, -0.1)),
            (dot_optax.weightings.priority, "eps", (-1e-8, None)),
        )
        for value in values
    ),
]

GROUPS = {
    "aggregation": AGGREGATION,
    "sampled gradients": SAMPLING,
    "feature losses": FEATURES,
    "containers and gradients": CONTAINERS,
    "the algebra": ALGEBRA,
    "hyperparameters": HYPERPARAMETERS,
    "masks and states": MASKS,
    "parameters": LEAVES,
    "loss functions": LOSSES,
}


def outcome(case):
    """The exception of a case and its first line; None if there is none."""
    try:
        case.call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def main():
    for group, cases in GROUPS.items():
        print(f"{group}:")
        for case in cases:
            print(f"  {case.what}\n      {outcome(case) or 'SILENT'}")


if __name__ == "__main__":
    main()
