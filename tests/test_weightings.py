"""The weightings of `aggregate`: what each promises, over matrices of many ranks and scales, and against other programs.

Each `J` has a gradient in each row; `d = w J`.  Errors are measured against S, the sum of all |w_i| |g_i|: what rounding makes of d
is of the order of epsilon times S, also where the gradients cancel.
"""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from dot_optax import weightings
from tests.tiers import slow_but

WEIGHTINGS = {
    "projected": weightings.projected(),
    "min_norm": weightings.min_norm(),
    "config": weightings.bisector("config"),
    "imtl": weightings.bisector("imtl"),
    "nash": weightings.bisector("nash"),
    "conflict_averse": weightings.conflict_averse(0.5),
    "conflict_averse, 0.9": weightings.conflict_averse(0.9),
    "aligned": weightings.aligned(),
    "priority": weightings.priority(tau=0.1, eps=0.0),
}
LOSSES = (2, 3, 5)
KINDS = ("similar", "large", "scales", "conflict")


@functools.cache
def jacobians(n):
    """`[M, n, 8]` in float64, of numbers that float32 has too; their ranks; and their kinds."""
    rng, found = np.random.default_rng(n), []
    for rank, kind, _ in itertools.product(range(1, n + 1), KINDS, range(4)):
        j = rng.normal(size=(n, rank)) @ rng.normal(size=(rank, 8))
        j = j - (
            0.9 * j.mean(0) if kind == "conflict" and rank == n else 0
        )  # the mean is short: each opposes the others
        j = j * {"large": 1e15, "scales": 10 ** rng.uniform(0, 15, size=(n, 1))}.get(kind, 1.0)
        found.append((j.astype(np.float32).astype(np.float64), rank, kind))
    return tuple(map(np.array, zip(*found, strict=True)))


@functools.cache
def compiled(name, n):
    weighting = WEIGHTINGS[name]
    return jax.jit(jax.vmap(lambda gram: weighting.weights(gram, None, weighting.init(n))[0]))


def of_grams(name, grams, dtype=np.float32):
    """The weights for each of some Gram matrices, in float64; of one shape, so that each weighting is compiled once."""
    padded = np.resize(grams, (512, *grams.shape[1:]))
    with jax.enable_x64(dtype == np.float64):
        w = compiled(name, grams.shape[1])(jnp.asarray(padded, dtype))
    return np.asarray(w, np.float64)[: len(grams)]


def weights(name, j, dtype=np.float32):
    """The weights for each of some Jacobians."""
    return of_grams(name, np.einsum("mid,mjd->mij", j, j), dtype)


def norms(x):
    return np.linalg.norm(x, axis=-1)


def update(w, j):
    """The update of each, and the size S of what it is the sum of."""
    return np.einsum("mi,mid->md", w, j), (np.abs(w) * norms(j)).sum(1)


def chosen(n, *kinds, full_rank=True):
    j, rank, kind = jacobians(n)
    return j[np.isin(kind, kinds or KINDS) & ((rank == n) | (not full_rank))]


for_all = pytest.mark.parametrize("name", WEIGHTINGS)
for_numbers = pytest.mark.parametrize("n", slow_but(LOSSES, 2, 3))


def for_each(names, *, of_two_alone):
    """All names with all numbers of losses, but some names with two losses alone."""
    pairs = [(name, n) for name in names for n in LOSSES if n == 2 or name not in of_two_alone]
    marks = [pytest.param(name, n, marks=[pytest.mark.slow] * (n == 5)) for name, n in pairs]
    return pytest.mark.parametrize(("name", "n"), marks)


@for_all
@for_numbers
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weights_are_finite(name, n, dtype):
    """Of every rank and scale, with zeros, equal and opposite gradients among them."""
    j, _, _ = jacobians(n)
    zero, equal, opposite = j.copy(), j.copy(), j.copy()
    zero[:, 0], equal[:, 0], opposite[:, 0] = 0, j[:, 1], -j[:, 1]
    every = np.concatenate([j, zero, zero[:, ::-1], equal, opposite, np.zeros_like(j[:1]), np.ones_like(j[:1])])
    w = weights(name, every, dtype)
    assert np.isfinite(w).all()
    assert np.isfinite(np.float32(update(w, every)[0])).all()


# Of more losses, `aligned` drops gradients 1,000 times shorter than others.
@for_each(WEIGHTINGS, of_two_alone=["aligned"])
def test_float32_is_as_good_as_float64(name, n):
    """Where no gradients are parallel or nearly so; 1e-4: cosines are known to 1e-7, and some are divided by 1e-2 or so."""
    j = chosen(n, "similar", "large", "scales")
    (d, size), (exact, _) = (update(weights(name, j, dtype), j) for dtype in (np.float32, np.float64))
    np.testing.assert_array_less(norms(d - exact), 1e-4 * size)


# Of more losses, `projected` takes them in random order: test_projected_takes_each_order.
@for_each(WEIGHTINGS, of_two_alone=["projected"])
def test_the_order_of_the_losses_does_not_matter(name, n):
    j = chosen(n, "similar", "large", "conflict")
    order = [0, *range(n - 1, 0, -1)] if name == "priority" else [*range(n - 1, -1, -1)]
    w, permuted = weights(name, j, np.float64), weights(name, j[:, order], np.float64)
    d, size = update(w, j)
    np.testing.assert_array_less(norms(update(permuted, j[:, order])[0] - d), 1e-9 * size)


@for_all
@for_numbers
@pytest.mark.parametrize("scale", [1e-7, 1e7])
def test_a_common_factor_is_a_factor_of_the_update(name, n, scale):
    """Of all but Nash's, which has no scale. Cosines of scaled gradients differ by a rounding error."""
    j = chosen(n, "similar", "conflict")
    d, size = update(weights(name, j, np.float64), j)
    scaled, _ = update(weights(name, scale * j, np.float64), scale * j)
    np.testing.assert_array_less(norms(scaled / (1 if name == "nash" else scale) - d), 1e-9 * size)


@for_numbers
@pytest.mark.parametrize("name", ["projected", "config"])
def test_the_update_is_linear_in_the_factors_of_the_losses(name, n):
    """For positive factors; the same key gives `projected` the same order."""
    j = chosen(n, "similar", "conflict")
    factors = np.random.default_rng(0).uniform(0.1, 10, size=(2, 1, n, 1))
    d = [update(weights(name, c * j, np.float64), c * j)[0] for c in (factors[0], factors[1], factors.sum(0))]
    np.testing.assert_allclose(d[0] + d[1], d[2], atol=1e-9 * norms(d[2]).max())


# Of more losses, the weights of `imtl` may all change their sign.
@for_each(["config", "imtl", "nash", "priority"], of_two_alone=["imtl"])
def test_the_direction_ignores_the_factors_of_the_losses(name, n):
    j = chosen(n, "similar", "conflict")
    factors = np.random.default_rng(1).uniform(0.1, 10, size=(n, 1))
    d, scaled = (update(weights(name, x, np.float64), x)[0] for x in (j, factors * j))
    np.testing.assert_allclose(d / norms(d)[:, None], scaled / norms(scaled)[:, None], atol=1e-9)


@pytest.mark.parametrize(
    ("name", "numbers"),
    {
        "projected": (2,),
        "min_norm": LOSSES,
        "config": LOSSES,
        "imtl": (2,),  # of more losses its weights may all be negative
        "nash": LOSSES,
    }.items(),
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_gradient_is_opposed_where_that_is_promised(name, numbers, dtype):
    """By more than rounding: 100 epsilon of S, and of the least-squares solution that `conflict_averse` is 1e-4 in float32."""
    for n in numbers:
        j = chosen(n, full_rank=name in ("config", "nash"))
        d, size = update(weights(name, j, dtype), j)
        along = np.einsum("md,mid->mi", d, j) / norms(j)
        tolerance = 100 * np.finfo(dtype).eps * (10 if name.startswith("conflict") else 1)
        assert (along.min(1) >= -tolerance * size).all()


@for_numbers
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_min_norm_is_stationary(n, dtype):
    """Gradients with weight have the same product with d, |d|^2, the others a larger one: nothing convex is shorter."""
    j, _, _ = jacobians(n)
    w = weights("min_norm", j, dtype)
    d, size = update(w, j)
    assert (w >= 0).all()
    np.testing.assert_allclose(w.sum(1), 1, rtol=4 * np.finfo(dtype).eps)
    # The ridge of 4 N epsilon on the diagonal is the largest error, and the rounding of products is no larger.
    excess = (np.einsum("md,mid->mi", d, j) - (norms(d) ** 2)[:, None]) / norms(j)
    tolerance = 16 * n * np.finfo(dtype).eps * size
    np.testing.assert_array_less(-excess.min(1), tolerance)
    np.testing.assert_array_less(np.abs(w * norms(j) * excess).max(1), tolerance * size)


@for_numbers
def test_bisectors_have_their_angle_and_their_length(n):
    j = chosen(n)
    for name in ("config", "imtl", "nash") if n == 2 else ("config", "imtl"):
        w = weights(name, j, np.float64)
        d, size = update(w, j)
        along = np.einsum("md,mid->mi", d, j)
        np.testing.assert_array_less(np.ptp(along / norms(j), axis=1), 1e-10 * size)
        if name == "config":
            np.testing.assert_allclose(norms(d) ** 2, along.sum(1), rtol=1e-9)
        if name == "imtl":
            np.testing.assert_allclose(w.sum(1), 1, rtol=1e-9)
    w = weights("nash", j, np.float64)
    # The ridge moves the solution, where the mean is short, by 1e-14 divided by the least eigenvalue of the cosines.
    np.testing.assert_allclose(w * np.einsum("md,mid->mi", update(w, j)[0], j), 1, rtol=1e-8)


@for_numbers
@pytest.mark.parametrize("name", ["conflict_averse", "conflict_averse, 0.9"])
def test_conflict_averse_is_the_best_for_the_worst(name, n):
    """By duality: the least product with d of a gradient equals g_v . g_0 + kappa |g_0| |g_v|, and no d can do better."""
    kappa = {"conflict_averse": 0.5}.get(name, 0.9)
    j = chosen(n, "similar", "conflict", "large")
    w, g0 = weights(name, j, np.float64), j.mean(1)
    d, _ = update(w, j)
    np.testing.assert_allclose(norms(d - g0), kappa * norms(g0), rtol=1e-9)
    v = (w - 1 / n) / (w - 1 / n).sum(1, keepdims=True)
    gv, _ = update(v, j)
    bound = (gv * g0).sum(1) + kappa * norms(g0) * norms(gv)
    assert (v >= 0).all()
    least = np.einsum("md,mid->mi", d, j).min(1)
    np.testing.assert_array_less(np.abs(bound - least), 1e-8 * norms(g0) * norms(j).max(1))


@for_numbers
def test_aligned_is_the_mean_of_orthogonal_gradients(n):
    j = chosen(n, "similar", "large", "conflict")
    u, s, v = np.linalg.svd(j, full_matrices=False)
    expected = s.min(1)[:, None] * (u @ v).mean(1)  # all singular values are the least one
    d, _ = update(weights("aligned", j, np.float64), j)
    np.testing.assert_allclose(d, expected, atol=1e-9 * norms(expected).max())
    parallel = np.arange(1.0, n + 1)[None, :, None] * np.ones((1, 1, 8))  # of rank one: the mean
    d, _ = update(weights("aligned", parallel, np.float64), parallel)
    np.testing.assert_allclose(d, parallel.mean(1), rtol=1e-9)


@for_numbers
def test_priority_changes_the_first_gradient_as_little_as_it_can(n):
    """The conditions of its quadratic program: each other loss has its share, with equality where it has a weight."""
    j = chosen(n)
    w, sizes = weights("priority", j, np.float64), norms(j)
    d, _ = update(w, j)
    np.testing.assert_allclose(norms(d), sizes[:, 0], rtol=1e-9)
    lengths = 1 / (w[:, 0] * sizes[:, 0]) * sizes[:, 0]  # how much d was stretched
    more = np.einsum("md,mid->mi", d / sizes[:, :1] * lengths[:, None], j)[:, 1:] / sizes[:, 1:] - 0.1
    assert (w >= 0).all() and (more > -1e-9).all()
    np.testing.assert_allclose(more * (w[:, 1:] * sizes[:, 1:] > 1e-9 * sizes[:, :1]), 0, atol=1e-9)


def reference(name, j):
    """The update by the papers' definitions for any number of losses, in NumPy."""
    n, sizes = len(j), norms(j)
    if name == "projected":
        projections = []
        for i in range(2):
            v = j[i].copy()
            v -= min(0, v @ j[1 - i]) / (j[1 - i] @ j[1 - i]) * j[1 - i]
            projections.append(v)
        return sum(projections)
    if name == "min_norm":  # the least |J^T w|^2 + (1 - sum w)^2 over w >= 0 is a multiple of it
        scale = sizes.min()
        w, _ = optimize.nnls(np.vstack([j.T / scale, np.ones((1, n))]), np.append(np.zeros(j.shape[1]), 1.0))
        return w @ j / w.sum()
    if name in ("config", "imtl"):
        direction = np.linalg.pinv(j / sizes[:, None]) @ np.ones(n)
        direction /= norms(direction)
        w = np.linalg.pinv(j @ j.T) @ sizes
        return {"config": (j @ direction).sum() * direction, "imtl": w @ j / w.sum()}[name]
    if name == "nash":
        gram = j @ j.T
        found = optimize.root(lambda x: gram @ np.exp(x) * np.exp(x) - 1, -np.log(sizes), method="lm", tol=1e-14)
        return np.exp(found.x) @ j
    if name.startswith("conflict_averse"):
        g0, kappa = j.mean(0), 0.9 if name.endswith("9") else 0.5
        radius = kappa * norms(g0)

        def cost(t):
            gv = t * j[0] + (1 - t) * j[1]
            return gv @ g0 + radius * norms(gv)

        t = optimize.minimize_scalar(cost, bounds=(0, 1), method="bounded", options={"xatol": 1e-12}).x
        gv = t * j[0] + (1 - t) * j[1]
        return g0 + radius * gv / norms(gv)
    if name == "aligned":
        values, vectors = np.linalg.eigh(j @ j.T)
        return np.sqrt(values[0]) * vectors @ np.diag(values**-0.5) @ vectors.T @ np.full(n, 1 / n) @ j
    unit = j / sizes[:, None]
    d = unit[0] + max(0, 0.1 - unit[0] @ unit[1]) * unit[1]
    return d / norms(d) * sizes[0]


@for_all
def test_two_losses_have_the_closed_form_of_the_definition(name):
    j = np.random.default_rng(7).normal(size=(200, 2, 6)) * 10 ** np.random.default_rng(8).uniform(-1, 1, (200, 2, 1))
    d, size = update(weights(name, j, np.float64), j)
    expected = np.stack([reference(name, x) for x in j])
    # A minimum is found by its values, so to the root of what they are rounded to.
    tolerance = 1e-6 if name.startswith("conflict_averse") else 1e-11
    np.testing.assert_array_less(norms(d - expected), tolerance * size)


@pytest.mark.parametrize(
    ("name", "gram", "expected"),
    [
        ("projected", [[0, 0], [0, 4]], [1, 1]),
        ("projected", [[1, -2], [-2, 4]], [3, 1.5]),  # opposite: d = 0
        ("min_norm", [[0, 0], [0, 4]], [1, 0]),
        ("min_norm", [[1, 1], [1, 1]], [0.5, 0.5]),
        ("min_norm", [[1, 2], [2, 4]], [1, 0]),
        ("min_norm", [[1, -2], [-2, 4]], [2 / 3, 1 / 3]),
        ("config", [[0, 0], [0, 4]], [0, 1]),
        ("config", [[1, 2], [2, 4]], [1.5, 0.75]),
        ("imtl", [[0, 0], [0, 4]], [0, 1]),
        ("nash", [[0, 0], [0, 4]], [0, 0.5]),
        ("conflict_averse", [[0, 0], [0, 4]], [0.5, 0.75]),
        ("aligned", [[0, 0], [0, 4]], [0, 0.5]),
        ("aligned", [[1, 2], [2, 4]], [0.3, 0.6]),  # d = (g_1 + g_2) / 2
        ("priority", [[0, 0], [0, 4]], [0, 0]),
        ("priority", [[4, 0], [0, 0]], [1, 0]),
        *((name, [[0, 0], [0, 0]], [1, 1] if name == "projected" else None) for name in WEIGHTINGS),
    ],
)
@pytest.mark.parametrize("third", [False, True])
def test_degenerate_gradients(name, gram, expected, third):
    """As the docstrings state; a third gradient that is zero changes nothing, but for those that it stops, or the mean."""
    if third:
        gram = [[*gram[0], 0], [*gram[1], 0], [0, 0, 0]]
    w = of_grams(name, np.array([gram]))[0]
    assert np.isfinite(w).all()
    if expected is not None and not (third and (name == "min_norm" or name.startswith(("conflict", "aligned")))):
        np.testing.assert_allclose(w[:2], expected, atol=1e-5)


def test_projected_takes_each_order():
    """The update is that of PCGrad's Algorithm 1 for some orders; the key moves on; a seed repeats itself."""
    n, j = 3, chosen(3, "conflict")[0]
    possible = [[] for _ in range(n)]
    for i, order in itertools.product(range(n), itertools.permutations(range(n))):
        v = j[i].copy()
        for k in order:
            v -= 0 if k == i else min(0, v @ j[k]) / (j[k] @ j[k]) * j[k]
        possible[i].append(v)
    sums = np.array([sum(vs) for vs in itertools.product(*possible)])
    gram, seen = jnp.asarray(j @ j.T, jnp.float32), set()
    state = weightings.projected(3).init(n)
    step = jax.jit(weightings.projected(3).weights)
    for _ in range(20):
        w, state = step(gram, None, state)
        distances = norms(sums - np.asarray(w, np.float64) @ j)
        assert distances.min() < 1e-5 * norms(j).max()
        seen.add(int(distances.argmin()))
    assert len(seen) > 2
    again = weightings.projected(jax.random.key(3))
    np.testing.assert_array_equal(again.init(n), weightings.projected(3).init(n))


@for_numbers
def test_log_takes_the_gradients_of_the_logarithms(n):
    j, losses = chosen(n)[0], np.random.default_rng(n).uniform(0.1, 10, n)
    gram = jnp.asarray(j @ j.T, jnp.float32)
    step = jax.jit(weightings.min_norm(log=True).weights)
    w, _ = step(gram, jnp.asarray(losses, jnp.float32), ())
    of_logs = of_grams("min_norm", np.asarray(gram)[None] / np.outer(losses, losses))[0]
    # Weights of the order of one; the gradients of the logarithms are rounded twice.
    np.testing.assert_allclose(w, of_logs / losses, atol=1e-4)
    w, _ = step(gram, jnp.zeros(n), ())
    np.testing.assert_array_equal(w, jnp.zeros(n))


def test_priority_normalizes_by_a_moving_average():
    rng, decay, tau, eps = np.random.default_rng(0), 0.9, 0.3, 1e-2
    weighting = weightings.priority(tau, decay, eps)
    state, average, step = weighting.init(2), np.zeros(2), jax.jit(weighting.weights)
    for t in range(1, 6):
        j = rng.normal(size=(2, 4))
        w, state = step(jnp.asarray(j @ j.T, jnp.float32), None, state)
        average = decay * average + (1 - decay) * norms(j) ** 2
        scaled = j / np.sqrt(average / (1 - decay**t) + eps)[:, None]
        d = scaled[0] + max(0, tau - scaled[0] @ scaled[1] / (scaled[1] @ scaled[1])) * scaled[1]
        np.testing.assert_allclose(np.asarray(w) @ j, d / norms(d) * norms(j[0]), rtol=1e-5, atol=1e-6)  # float32
    np.testing.assert_allclose(state.ema, average, rtol=1e-6)
    assert state.count == 5


# The weighting, the factor of TorchJD's result, and the largest relative deviation for two losses and for more.
TORCHJD = {
    "UPGrad": (weightings.projected(), 2, 1e-9, None),  # its 1e-12 on the diagonal
    "PCGrad": (weightings.projected(), 1, 1e-13, None),
    "MGDA": (weightings.min_norm(), 1, 1e-13, 5e-4),  # 20,000 steps of Frank and Wolfe are not enough
    "IMTL-G": (weightings.bisector("imtl"), 1, 1e-12, 1e-12),
    "CAGrad": (
        weightings.conflict_averse(0.5),
        1,
        1e-8,
        5e-4,
    ),  # the solver's tolerance of 1e-8, for a minimum by its value
    "Nash-MTL": (weightings.bisector("nash"), None, 1e-5, 1e-5),  # direction only; its own tolerance is 1e-3
    "Aligned-MTL": (weightings.aligned(), 1, 1e-12, 1e-11),
    "ConFIG": (weightings.bisector("config"), 1, 1e-12, 1e-12),
    "PCD": (weightings.priority(0.1, 0.9), 1, 1e-12, 1e-11),
}


def test_conflict_averse_is_the_mean_where_no_direction_helps_the_worst():
    gram = np.array([[1, -1, 0], [-1, 1, 0], [0, 0, 1]])
    np.testing.assert_allclose(of_grams("conflict_averse", gram[None])[0], 1 / 3, rtol=1e-6)


def torchjd_updates(name, n):
    """For each Jacobian of n losses: it, our update, and TorchJD's."""
    weighting, factor, *_ = TORCHJD[name]
    with np.load(pathlib.Path(__file__).parent / "reference" / "torchjd.npz") as file, jax.enable_x64(True):
        state, step = weighting.init(n), jax.jit(weighting.weights)
        for case in sorted({key.split("/")[0] for key in file if key.startswith(f"{n}_")}):
            j, theirs = file[f"{case}/jacobian"], file[f"{case}/{name}"]
            w, state = step(jnp.asarray(j @ j.T), None, state)
            d = np.asarray(w) @ j
            yield (j, d / norms(d), theirs / norms(theirs)) if factor is None else (j, d, factor * theirs)


# Without a tolerance: another definition, or another order, for more than two losses.
@for_each(TORCHJD, of_two_alone=[name for name, settings in TORCHJD.items() if settings[3] is None])
def test_torchjd_gives_the_same(name, n):
    """TorchJD 0.18.0, with the settings of `reference/torchjd_values.py`."""
    tolerance = TORCHJD[name][2 if n == 2 else 3]
    for j, ours, theirs in torchjd_updates(name, n):
        assert norms(ours - theirs) < tolerance * norms(theirs)
        if name == "MGDA":  # ... and where we differ ours is the shorter one,
            assert norms(ours) < norms(theirs) * (1 + 1e-14)
        if name == "CAGrad":  # or the one that serves the worst-off loss better, as far as both lie in the ball
            assert (j @ ours).min() > (j @ theirs).min() - 1e-7 * norms(theirs) * norms(j).max()
