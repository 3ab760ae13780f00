"""Makes `torchjd.npz`: what TorchJD's aggregators give for some Jacobians, in float64.

    pip install "torchjd[full]==0.18.0" && python -m tests.reference.torchjd_values

prints the versions, and writes the file beside this one.  Of its parts `<case>/jacobian` has one gradient in each row, and
`<case>/<aggregator>` is the aggregated gradient; the cases are `<number of losses>_<number>`.  PCD has a state and is given the
cases of a number of losses one after the other.

What keeps its methods from being singular or endless is set so that it hardly changes a result: UPGrad adds 1e-12 to the
diagonal of its normalized Gram matrix (its default is 1e-4), MGDA ends when a step of Frank and Wolfe is shorter than 1e-9, or
after 20,000 steps (1e-3 and 100), CAGrad takes only a norm below 1e-12 for zero (1e-4), and Nash-MTL has no largest norm (1) and
200 steps (20).  Nash-MTL ends at a residual of 1e-3, which cannot be set, and its length depends on the size of the Gram matrix:
only its direction can be compared.  PCGrad takes losses in random order, so it is here for two losses only.
"""

import pathlib

import numpy as np

CASES = {2: 8, 3: 6, 5: 4}  # the number of losses, and how many Jacobians of each


def jacobians():
    """Gradients of 12 parameters: every second Jacobian with conflicts, all with norms that differ by up to 30."""
    rng = np.random.default_rng(13)
    for n, count in CASES.items():
        for i in range(count):
            jacobian = rng.normal(size=(n, 12))
            if i % 2:
                jacobian = jacobian - 0.7 * jacobian.mean(0) - 0.5 * jacobian[::-1]
            yield f"{n}_{i}", jacobian * 10 ** rng.uniform(-0.75, 0.75, size=(n, 1))


def aggregators(n):
    from torchjd import aggregation
    from torchjd.linalg import QuadprogProjector

    found = {
        "UPGrad": aggregation.UPGrad(projector=QuadprogProjector(norm_eps=1e-30, reg_eps=1e-12)),
        "MGDA": aggregation.MGDA(epsilon=1e-9, max_iters=20_000),
        "IMTL-G": aggregation.IMTLG(),
        "CAGrad": aggregation.CAGrad(c=0.5, norm_eps=1e-12),
        "Nash-MTL": aggregation.NashMTL(n_tasks=n, max_norm=0.0, optim_niter=200),
        "Aligned-MTL": aggregation.AlignedMTL(),
        "ConFIG": aggregation.ConFIG(),
        "PCD": aggregation.PCD(tau=0.1, beta=0.9),
    }
    return found | ({"PCGrad": aggregation.PCGrad()} if n == 2 else {})


def main():
    from importlib import metadata

    import torch

    print({name: metadata.version(name) for name in ("torchjd", "torch", "cvxpy", "clarabel", "ecos", "quadprog")})
    arrays, made = {}, {n: aggregators(n) for n in CASES}
    for case, jacobian in jacobians():
        arrays[f"{case}/jacobian"] = jacobian
        for name, aggregator in made[len(jacobian)].items():
            if name == "Nash-MTL":
                aggregator.reset()
            arrays[f"{case}/{name}"] = aggregator(torch.from_numpy(jacobian)).numpy()
    np.savez_compressed(pathlib.Path(__file__).parent / "torchjd.npz", **arrays)


if __name__ == "__main__":
    main()
