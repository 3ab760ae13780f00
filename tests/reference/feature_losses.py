"""The losses of features, as their papers state them, in NumPy and in PyTorch; `losses.py` prints how far ours are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dot_optax import losses

OF_MAPS = {
    "feature_loss": functools.partial(losses.feature_loss, axis=(1, 2, 3)),
    "attention_transfer_loss": losses.attention_transfer_loss,
    "similarity_loss": losses.similarity_loss,
}
WITHOUT_SCALE = ("attention_transfer_loss", "similarity_loss")


def maps(seed=0, channels=(3, 3), dtype=np.float64):
    """Feature maps of a student and a teacher, for six examples with 4 x 5 places."""
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(6, 4, 5, c)).astype(dtype) for c in channels)


def in_numpy(name, student, teacher):
    """Each formula as its docstring has it, in float64."""
    student, teacher = np.float64(student), np.float64(teacher)
    if name == "feature_loss":
        return ((student - teacher) ** 2).mean((1, 2, 3))

    def attention(x):
        a = (x**2).mean(-1).reshape(len(x), -1)
        return a / np.sqrt((a**2).sum(-1, keepdims=True))

    def similarities(x):
        g = np.array([[(a * b).sum() for a in x] for b in x])
        return g / np.sqrt((g**2).sum(-1, keepdims=True))

    of = {"attention_transfer_loss": attention, "similarity_loss": similarities}[name]
    return ((of(student) - of(teacher)) ** 2).mean(-1)


def in_pytorch(name, student, teacher):
    """The arithmetic of the published code, whose result is one number for the batch; channels come second there."""
    from torch.nn import functional

    student, teacher = student.movedim(-1, 1), teacher.movedim(-1, 1)
    if name == "feature_loss":
        return functional.mse_loss(student, teacher)
    if name == "attention_transfer_loss":
        attention = [functional.normalize(x.pow(2).mean(1).flatten(1)) for x in (student, teacher)]
        return (attention[0] - attention[1]).pow(2).mean()
    rows = [x.flatten(1) for x in (student, teacher)]
    similarities = [functional.normalize(x @ x.T) for x in rows]
    return (similarities[1] - similarities[0]).pow(2).sum() / len(student) ** 2


@functools.partial(jax.jit, static_argnums=0)
def value_and_grads(loss, student, teacher):
    """The loss of each example, and the gradients of their mean in both arguments."""

    def mean(*features):
        values = loss(*features)
        return values.astype(jnp.promote_types(values.dtype, jnp.float32)).mean(), values

    (_, values), grads = jax.value_and_grad(mean, argnums=(0, 1), has_aux=True)(student, teacher)
    return values, grads


N, DIM, BATCH, K, STEPS = 12, 5, 4, 3, 8


class Run:
    """Features of a student and a teacher, projectors for both, and batches whose negatives repeat now and then."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.features = rng.normal(size=(N, 6)), rng.normal(size=(N, 7))
        self.projectors = 0.5 * rng.normal(size=(6, DIM)), 0.5 * rng.normal(size=(7, DIM))
        bound = np.sqrt(3 / DIM)
        self.memory = rng.uniform(-bound, bound, size=(2, N, DIM))
        self.batches = [(rng.permutation(N)[:BATCH], rng.integers(N, size=(BATCH, K))) for _ in range(STEPS)]


def unit(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


def crd_in_numpy(student, teacher, indices, negatives, memory, z, temperature=0.07, momentum=0.5, eps=0.0):
    """The published arithmetic: the loss of each example; memory and Z are changed in place."""
    v = unit(student), unit(teacher)
    total = np.zeros(len(indices))
    for side in (0, 1):  # of the memory
        for_all = np.exp(np.einsum("bd,nd->bn", v[1 - side], memory[side]) / temperature)
        x = np.array([[row[j] for j in (i, *js)] for row, i, js in zip(for_all, indices, negatives, strict=True)])
        if z[side] < 0:
            z[side] = x.mean() * len(memory[side])
        x, noise = x / z[side], negatives.shape[1] / len(memory[side])
        total -= np.log(x[:, 0] / (x[:, 0] + noise + eps)) + np.log(noise / (x[:, 1:] + noise + eps)).sum(-1)
    for side in (0, 1):
        memory[side][indices] = unit(momentum * memory[side][indices] + (1 - momentum) * v[side])
    return total


@jax.jit
def crd_step(params, state, batch, indices, negatives):
    """The loss of each example, its mean's gradients in both projectors, and the next state."""

    def mean(params):
        projected = (x @ p for x, p in zip(batch, params, strict=True))
        values, after = losses.crd_loss(*projected, indices, negatives, state)
        return values.mean(), (values, after)

    grads, (values, after) = jax.grad(mean, has_aux=True)(params)
    return values, grads, after


def trajectory(run, dtype):
    """Values, log Z and memory of each step, and the projectors before it, which gradient descent moves."""
    features, params, memory = jax.tree.map(lambda x: jnp.asarray(x, dtype), (run.features, run.projectors, run.memory))
    state = losses.CRDState(memory, jnp.full(2, -jnp.inf, dtype))
    history = []
    for indices, negatives in run.batches:
        batch = tuple(x[indices] for x in features)
        values, grads, after = crd_step(params, state, batch, indices, negatives)
        history.append((values, after.log_z, after.memory, params))
        state, params = after, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    return jax.tree.map(np.asarray, history)


def deviations(name):
    """The largest relative deviations of our values in float64 from NumPy's, and of values and gradients from PyTorch's."""
    import torch

    with jax.enable_x64(True):
        features = maps(1)
        values, grads = jax.tree.map(np.asarray, value_and_grads(OF_MAPS[name], *features))
    theirs = [torch.tensor(x, requires_grad=True) for x in features]
    expected = in_pytorch(name, *theirs)
    expected.backward()
    pairs = [(values.mean(), expected.item()), *((g, x.grad.numpy()) for g, x in zip(grads, theirs, strict=True))]
    from_torch = max(float(np.abs(ours - other).max() / np.abs(other).max()) for ours, other in pairs)
    return float(np.abs(values / in_numpy(name, *features) - 1).max()), from_torch


def crd_deviation():
    """That of the values of CRD through all steps from NumPy's."""
    run, largest = Run(), 0.0
    memory, z = run.memory.copy(), np.full(2, -1.0)
    with jax.enable_x64(True):
        history = trajectory(run, jnp.float64)
    for (indices, negatives), (values, _, _, params) in zip(run.batches, history, strict=True):
        projected = (x[indices] @ p for x, p in zip(run.features, params, strict=True))
        expected = crd_in_numpy(*projected, indices, negatives, memory, z)
        largest = max(largest, float(np.abs(np.asarray(values) / expected - 1).max()))
    return largest
