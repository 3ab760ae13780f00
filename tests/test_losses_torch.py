"""All losses against PyTorch's own functions and the published code's arithmetic, with their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.reference import losses as reference
from tests.reference.feature_losses import BATCH, OF_MAPS, K, N, Run, in_pytorch, maps, trajectory, value_and_grads
from tests.tiers import slow_but


@pytest.mark.parametrize("name", slow_but(reference.STATEMENTS, "kd_loss", "jsd_loss, beta 0.5", "nckd_loss"))
def test_logits(name):
    # Values, and gradients in both logits and the temperature. PyTorch's forms cancel, in terms of order ten.
    assert reference.from_torch(name) < 1e-12


@pytest.mark.parametrize("name", OF_MAPS)
def test_features(name):
    """The mean over the batch is the published loss, and so are its gradients."""
    with jax.enable_x64(True):
        features = maps(1, channels=(3, 3) if name == "feature_loss" else (3, 7))
        theirs = [torch.tensor(x, requires_grad=True) for x in features]
        expected = in_pytorch(name, *theirs)
        expected.backward()
        values, grads = value_and_grads(OF_MAPS[name], *features)
        np.testing.assert_allclose(values.mean(), expected.item(), rtol=1e-13)
        for grad, x in zip(grads, theirs, strict=True):
            np.testing.assert_allclose(grad, x.grad, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("eps", [0.0, 1e-7])
def test_crd(eps):
    """The published code's arithmetic and PyTorch's gradients: Z and memory too, with projectors trained on the way."""
    run = Run()
    with jax.enable_x64(True):
        history = trajectory(run, jnp.float64)
    features, memory = [torch.tensor(x) for x in run.features], [torch.tensor(x) for x in run.memory]
    params, z = [torch.tensor(p, requires_grad=True) for p in run.projectors], [None, None]
    for (indices, negatives), (values, log_z, remembered, projectors) in zip(run.batches, history, strict=True):
        for ours, theirs in zip(projectors, params, strict=True):
            # Without eps only the rounding differs, of 1e-16 and in eight steps; with it, 1e-7 of the denominators does.
            np.testing.assert_allclose(ours, theirs.detach(), rtol=0, atol=1e-12 if eps == 0 else 1e-6)
        indices = torch.tensor(indices)
        drawn = torch.cat([indices[:, None], torch.tensor(negatives)], 1)
        projected = [x[indices] @ p for x, p in zip(features, params, strict=True)]
        v = [x / x.pow(2).sum(1, keepdim=True).sqrt() for x in projected]
        loss = 0.0
        for side in (0, 1):  # of the memory
            x = torch.exp((memory[side][drawn] @ v[1 - side][:, :, None])[:, :, 0] / 0.07)
            z[side] = x.mean().detach() * N if z[side] is None else z[side]
            x, noise = x / z[side], K / N
            positive = torch.log(x[:, 0] / (x[:, 0] + noise + eps)).sum()
            loss = loss - (positive + torch.log(noise / (x[:, 1:] + noise + eps)).sum()) / BATCH
        with torch.no_grad():
            for side in (0, 1):
                rows = 0.5 * memory[side][indices] + 0.5 * v[side]
                memory[side][indices] = rows / rows.pow(2).sum(1, keepdim=True).sqrt()
        grads = torch.autograd.grad(loss, params)
        params = [(p - 0.1 * g).detach().requires_grad_() for p, g in zip(params, grads, strict=True)]
        exact = eps == 0
        np.testing.assert_allclose(values.mean(), loss.item(), rtol=1e-12 if exact else 1e-5)
        np.testing.assert_allclose(np.exp(log_z), torch.stack(z), rtol=1e-12)
        np.testing.assert_allclose(remembered, torch.stack(memory), rtol=0, atol=1e-12 if exact else 1e-6)
