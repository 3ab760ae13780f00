"""Replays the published implementation's trajectories, the `.npz` files here, and measures how far we are from them.

    python -m tests.reference.golden

prints the largest absolute deviation from each file.  The arrays are in float64 and stacked over the steps; `meta/*`
holds the hyperparameters.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dot_optax
from dot_optax import PerLoss

FILES = ("dot_shared", "dot_roles", "mlp_kd_cifar", "losses")


def load(name):
    with np.load(pathlib.Path(__file__).parent / f"{name}.npz") as file:
        return dict(file)


def group(arrays, prefix, step=None):
    """The arrays below `prefix/`, at one step if given."""
    found = {k.removeprefix(f"{prefix}/"): v for k, v in arrays.items() if k.startswith(f"{prefix}/")}
    return found if step is None else {k: v[step] for k, v in found.items()}


def deviations(name, transform=lambda f: f):
    """The largest absolute deviation of each quantity in a file; `transform` is applied to the step (`jax.jit`)."""
    with jax.enable_x64(True):
        measure = {"mlp_kd_cifar": _network, "losses": _losses}.get(name, _trajectory)
        return measure(load(name), transform)


def _trajectory(arrays, transform):
    """Given gradients, with L2 and a learning-rate drop or with parameters that one loss alone reaches."""
    params = group(arrays, "init")
    meta = {k: v.item() for k, v in group(arrays, "meta").items() if v.ndim == 0}
    rates = jnp.asarray(arrays["meta/lr"])
    tx = dot_optax.dot(
        lambda count: rates[count],
        *dot_optax.betas(meta["momentum"], meta["delta"]),
        weight_decay=meta["weight_decay"],
        reached=PerLoss(*({k: f"{loss}_grad/{k}" in arrays for k in params} for loss in PerLoss._fields)),
    )
    update, state, largest = transform(tx.update), tx.init(params), _Largest()
    zeros = jax.tree.map(np.zeros_like, params)
    for step in range(meta["steps"]):
        # A gradient that the published optimizer never received is zero here, as JAX gives it.
        grads = PerLoss(*(zeros | group(arrays, f"{loss}_grad", step) for loss in PerLoss._fields))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        largest.see("params", params, group(arrays, "params", step))
        for loss, (trace,) in state[0]._asdict().items():
            buffers = {k: v for k, v in trace.items() if not isinstance(v, optax.MaskedNode)}
            largest.see(f"{loss}_trace", buffers, group(arrays, f"{loss}_trace", step))
    return largest.deviations


def _network(arrays, transform):
    """A small network end to end: `value_and_grads`, `kd_loss` and `dot` together."""
    params = jax.tree.map(jnp.asarray, group(arrays, "init"))
    meta = {k: v.item() for k, v in group(arrays, "meta").items()}

    def loss_fn(params, x, y, teacher_logits):
        hidden = jax.nn.relu(x @ params["w1"] + params["b1"][None])
        logits = hidden @ params["w2"] + params["b2"][None]
        ce = optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        kd = dot_optax.losses.kd_loss(logits, teacher_logits, meta["temperature"]).mean()
        return PerLoss(task=meta["task_weight"] * ce, kd=meta["kd_weight"] * kd)

    betas = dot_optax.betas(meta["momentum"], meta["delta"])
    tx = dot_optax.dot(meta["lr"], *betas, weight_decay=meta["weight_decay"])

    def train_step(params, state, *batch):
        losses, grads = dot_optax.value_and_grads(loss_fn)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, losses

    train_step, state, largest = transform(train_step), tx.init(params), _Largest()
    for step in range(len(arrays["y"])):
        batch = (jnp.asarray(arrays[name][step]) for name in ("x", "y", "teacher_logits"))
        params, state, losses = train_step(params, state, *batch)
        largest.see("params", params, group(arrays, "params", step))
        largest.see("losses", losses, PerLoss(arrays["task_loss"][step], arrays["kd_loss"][step]))
    return largest.deviations


def _losses(arrays, transform):
    """`kd_loss`, `dkd_loss` and the two parts of this, averaged over the batch, and their gradients."""
    largest = _Largest()
    losses = {
        "kd": ("kd_loss", lambda s, t, y, temperature: dot_optax.losses.kd_loss(s, t, temperature)),
        "dkd_a1_b0": ("tckd_loss", dot_optax.losses.tckd_loss),
        "dkd_a0_b1": ("nckd_loss", dot_optax.losses.nckd_loss),
        "dkd_a1_b8": ("dkd_loss", dot_optax.losses.dkd_loss),
    }
    for key in arrays:
        case, _, what = key.partition("/")
        kind, _, temperature = what.rpartition("_T")
        if kind in losses and temperature.isdigit():
            name, loss = losses[kind]
            student, teacher = jnp.asarray(arrays[f"{case}/student"]), jnp.asarray(arrays[f"{case}/teacher"])
            labels = jnp.asarray(arrays[f"{case}/labels"])

            def mean_loss(student, teacher=teacher, labels=labels, loss=loss, temperature=float(temperature)):
                return loss(student, teacher, labels, temperature).mean()

            actual = transform(jax.value_and_grad(mean_loss))(student)
            largest.see(f"{name}: {case}, T {temperature}", actual, (arrays[key], arrays[f"{key}_grad"]))
    return largest.deviations


class _Largest:
    def __init__(self):
        self.deviations = {}

    def see(self, name, actual, expected):
        differences = jax.tree.map(lambda a, e: float(np.abs(a - e).max()), actual, expected)
        self.deviations[name] = max([self.deviations.get(name, 0.0), *jax.tree.leaves(differences)])


if __name__ == "__main__":
    for file in FILES:
        for quantity, deviation in deviations(file, jax.jit).items():
            print(f"{file:13} {quantity:12} {deviation:.1e}")
