"""The losses of logits, as their papers state them, in NumPy and in PyTorch; and how far ours are from both.

    python -m tests.reference.losses

prints the largest deviations in float64, of values and of gradients, relative to the largest of each.  The golden file
has the published implementation's values of `kd_loss` and `dkd_loss` and its parts.  PyTorch must be there.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dot_optax import losses
from tests.reference import feature_losses, golden


class Statement(NamedTuple):
    """One loss, three times: each from logits of [batch, classes], labels and a temperature to a value per example."""

    ours: Callable[..., Any]
    in_numpy: Callable[..., Any]
    in_torch: Callable[..., Any]


def softmax(z, axis=-1):
    z = np.exp(z - z.max(axis, keepdims=True))
    return z / z.sum(axis, keepdims=True)


def kl(q, p):
    """The sum of q log(q / p) over the last axis."""
    return (q * (np.log(q) - np.log(p))).sum(-1)


def probabilities(s, t, temperature):
    return softmax(t / temperature), softmax(s / temperature)


def two_classes(p, y):
    is_target = np.arange(p.shape[-1]) == y[:, None]
    return np.stack([p.sum(-1, where=is_target), p.sum(-1, where=~is_target)], -1)  # 1 - p_y would cancel


def others(z, y):
    kept = np.arange(z.shape[-1]) != y[:, None]
    return z[kept].reshape(len(z), -1)


def jsd(s, t, y, temperature, beta):
    q, p = probabilities(s, t, temperature)
    m = beta * q + (1 - beta) * p
    return temperature**2 * (beta * kl(q, m) + (1 - beta) * kl(p, m))


def skew(s, t, y, temperature, alpha):
    q, p = probabilities(s, t, temperature)
    return temperature**2 * kl(q, alpha * q + (1 - alpha) * p)


def tckd(s, t, y, temperature):
    q, p = probabilities(s, t, temperature)
    return temperature**2 * kl(two_classes(q, y), two_classes(p, y))


def nckd(s, t, y, temperature):
    return temperature**2 * kl(*probabilities(others(s, y), others(t, y), temperature))


def bernoulli(s, t, y, temperature):
    q, p = (1 / (1 + np.exp(np.stack([-z, z], -1) / temperature)) for z in (t, s))
    return temperature**2 * kl(q, p).sum(-1)


def correlation(a, b):
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    return (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))


def dist(s, t, y, temperature):
    q, p = probabilities(s, t, temperature)
    return temperature**2 * ((1 - correlation(q, p)) + 2 * (1 - correlation(q.T, p.T)).mean())


def standardized(s, t, y, temperature):
    s, t = ((z - z.mean(-1, keepdims=True)) / z.std(-1, keepdims=True) for z in (s, t))
    return temperature**2 * kl(*probabilities(s, t, temperature))


def top_k(s, t, y, temperature, k=3):
    q, p = probabilities(s, t, temperature)
    order = np.argsort(-q, -1)
    q, p = (np.take_along_axis(x, order, -1) for x in (q, p))
    q, p = (np.concatenate([x[:, :k], x[:, k:].sum(-1, keepdims=True)], -1) for x in (q, p))
    return temperature**2 * kl(q, p)


def our_standardized(s, t, y, temperature):
    return losses.kd_loss(*map(losses.standardize_logits, (s, t)), temperature)


def our_top_k(s, t, y, temperature, k=3):
    log_probs, indices = jax.lax.top_k(jax.nn.log_softmax(t / temperature), k)
    return losses.top_k_kd_loss(s, log_probs, indices, temperature)


def our_deepkd(s, t, y, temperature):
    return sum(losses.deepkd_losses(s, t, y, temperature))


class Torch:
    """The same by PyTorch's own functions, as the published implementations call them."""

    @staticmethod
    def kl_div(q, p, temperature):
        """KL(q || p) of two tensors of log probabilities."""
        import torch.nn.functional as F

        return temperature**2 * F.kl_div(p, q, reduction="none", log_target=True).sum(-1)

    @staticmethod
    def log_softmax(z, temperature):
        return (z / temperature).log_softmax(-1)

    @staticmethod
    def kd(s, t, y, temperature):
        return Torch.kl_div(Torch.log_softmax(t, temperature), Torch.log_softmax(s, temperature), temperature)

    @staticmethod
    def reverse(s, t, y, temperature):
        return Torch.kd(t, s, y, temperature)

    @staticmethod
    def jeffreys(s, t, y, temperature):
        return Torch.kd(s, t, y, temperature) + Torch.kd(t, s, y, temperature)

    @staticmethod
    def mixture(s, t, temperature, beta):
        q, p = Torch.log_softmax(t, temperature), Torch.log_softmax(s, temperature)
        return q, p, (beta * q.exp() + (1 - beta) * p.exp()).log()

    @staticmethod
    def jsd(s, t, y, temperature, beta):
        q, p, m = Torch.mixture(s, t, temperature, beta)
        return beta * Torch.kl_div(q, m, temperature) + (1 - beta) * Torch.kl_div(p, m, temperature)

    @staticmethod
    def skew(s, t, y, temperature, alpha):
        q, _, m = Torch.mixture(s, t, temperature, alpha)
        return Torch.kl_div(q, m, temperature)

    @staticmethod
    def tckd(s, t, y, temperature):
        import torch

        both = []
        for z in (t, s):
            target = (z / temperature).softmax(-1).gather(-1, y[:, None])
            both.append(torch.cat([target, 1 - target], -1).log())
        return Torch.kl_div(*both, temperature)

    @staticmethod
    def nckd(s, t, y, temperature):
        hidden = 1000.0 * (y[:, None] == y.new_tensor(range(s.shape[-1])))  # as published: no probability is left
        return Torch.kd(s - hidden, t - hidden, y, temperature)

    @staticmethod
    def bernoulli(s, t, y, temperature):
        import torch
        from torch.distributions import Bernoulli, kl_divergence

        q, p = (Bernoulli(logits=z / temperature) for z in (t, s))
        return temperature**2 * torch.sum(kl_divergence(q, p), -1)

    @staticmethod
    def dist(s, t, y, temperature):
        from torch.nn.functional import cosine_similarity

        def one_minus_correlation(a, b):
            return 1 - cosine_similarity(a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True), dim=-1)

        q, p = ((z / temperature).softmax(-1) for z in (t, s))
        return temperature**2 * (one_minus_correlation(q, p) + 2 * one_minus_correlation(q.T, p.T).mean())

    @staticmethod
    def standardized(s, t, y, temperature):
        s, t = ((z - z.mean(-1, keepdim=True)) / z.std(-1, keepdim=True, correction=0) for z in (s, t))
        return Torch.kd(s, t, y, temperature)

    @staticmethod
    def top_k(s, t, y, temperature, k=3):
        import torch

        q, p = ((z / temperature).softmax(-1) for z in (t, s))
        q, likeliest = q.topk(k)
        both = (q, p.gather(-1, likeliest))
        return Torch.kl_div(*(torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1).log() for x in both), temperature)


def _with(function, *arguments):
    return lambda s, t, y, temperature: function(s, t, y, temperature, *arguments)


def _without_labels(loss, *arguments):
    return lambda s, t, y, temperature: loss(s, t, temperature, *arguments)


STATEMENTS = {
    "kd_loss": Statement(
        _without_labels(losses.kd_loss),
        lambda s, t, y, temperature: temperature**2 * kl(*probabilities(s, t, temperature)),
        Torch.kd,
    ),
    "reverse_kl_loss": Statement(
        _without_labels(losses.reverse_kl_loss),
        lambda s, t, y, temperature: temperature**2 * kl(*probabilities(t, s, temperature)),
        Torch.reverse,
    ),
    "jeffreys": Statement(
        _without_labels(losses.jeffreys),
        lambda s, t, y, temperature: (
            temperature**2 * sum(kl(*probabilities(*pair, temperature)) for pair in ((s, t), (t, s)))
        ),
        Torch.jeffreys,
    ),
    **{
        f"jsd_loss, beta {beta}": Statement(
            _without_labels(losses.jsd_loss, beta), _with(jsd, beta), _with(Torch.jsd, beta)
        )
        for beta in (0.1, 0.5, 0.9)
    },
    **{
        f"skew_kl_loss, alpha {alpha}": Statement(
            _without_labels(losses.skew_kl_loss, alpha), _with(skew, alpha), _with(Torch.skew, alpha)
        )
        for alpha in (0.1, 0.9)
    },
    "bernoulli_kd_loss": Statement(_without_labels(losses.bernoulli_kd_loss), bernoulli, Torch.bernoulli),
    "dist_loss": Statement(_without_labels(losses.dist_loss, 1.0, 2.0), dist, Torch.dist),
    "standardize_logits": Statement(our_standardized, standardized, Torch.standardized),
    "tckd_loss": Statement(losses.tckd_loss, tckd, Torch.tckd),
    "nckd_loss": Statement(losses.nckd_loss, nckd, Torch.nckd),
    "dkd_loss": Statement(
        losses.dkd_loss,
        lambda *args: tckd(*args) + 8 * nckd(*args),
        lambda *args: Torch.tckd(*args) + 8 * Torch.nckd(*args),
    ),
    "deepkd_losses, summed": Statement(
        our_deepkd, lambda s, t, y, temperature: temperature**2 * kl(*probabilities(s, t, temperature)), Torch.kd
    ),
    "top_k_kd_loss": Statement(our_top_k, top_k, Torch.top_k),
    "chunked_kd_loss": Statement(
        lambda s, t, y, temperature: losses.chunked_kd_loss(s, t, temperature, chunk_size=3),
        lambda s, t, y, temperature: temperature**2 * kl(*probabilities(s, t, temperature)),
        Torch.kd,
    ),
}


def examples(batch=16, num_classes=10, scale=3.0, noise=1.0, seed=0):
    """Logits of student and teacher in float64, and labels."""
    rng = np.random.default_rng(seed)
    teacher = scale * rng.normal(size=(batch, num_classes))
    return teacher + noise * rng.normal(size=teacher.shape), teacher, rng.integers(num_classes, size=batch)


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(loss, student, teacher, labels, temperature):
    """The values, and the gradients of their sum in the logits of both and in the temperature."""

    def total(student, teacher, temperature):
        values = loss(student, teacher, labels, temperature)
        return values.astype(jnp.promote_types(values.dtype, jnp.float32)).sum(), values

    (_, values), grads = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(student, teacher, temperature)
    return values, *grads


def torch_with_gradients(loss, student, teacher, labels, temperature):
    import torch

    arrays = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (student, teacher, temperature)]
    values = loss(*arrays[:2], torch.tensor(labels), arrays[2])
    return [x.detach().numpy() for x in (values, *torch.autograd.grad(values.sum(), arrays))]


def relative(actual, expected):
    return float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())


def from_numpy(name, temperature=2.0, **kind):
    """The deviation of our values in float64 from NumPy's."""
    student, teacher, labels = examples(**kind)
    with jax.enable_x64(True):
        ours = with_gradients(STATEMENTS[name].ours, *map(jnp.asarray, (student, teacher, labels)), temperature)[0]
    return relative(ours, STATEMENTS[name].in_numpy(student, teacher, labels, temperature))


def from_torch(name, temperature=2.0, **kind):
    """The largest deviation of our values and gradients in float64 from PyTorch's."""
    given = (*examples(**kind), temperature)
    with jax.enable_x64(True):
        ours = with_gradients(STATEMENTS[name].ours, *map(jnp.asarray, given))
    return max(map(relative, ours, torch_with_gradients(STATEMENTS[name].in_torch, *given)))


def main():
    arrays = golden.deviations("losses", jax.jit)
    published = {
        name: max(deviation for case, deviation in arrays.items() if case.startswith(f"{name}:"))
        for name in ("kd_loss", "tckd_loss", "nckd_loss", "dkd_loss")
    }
    print(f"{'':24} {'NumPy':>9} {'PyTorch':>9} {'golden':>9}")
    for name in STATEMENTS:
        file = f"{published[name]:9.1e}" if name in published else f"{'-':>9}"
        print(f"{name:24} {from_numpy(name):9.1e} {from_torch(name):9.1e} {file}")
    for name in feature_losses.OF_MAPS:
        print(f"{name:24} {'{:9.1e} {:9.1e}'.format(*feature_losses.deviations(name))} {'-':>9}")
    print(f"{'crd_loss, 8 steps':24} {feature_losses.crd_deviation():9.1e} {'-':>9} {'-':>9}")


if __name__ == "__main__":
    main()
