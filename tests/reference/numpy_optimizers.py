"""DOT, and what Optax does before, after and around it, written by hand in NumPy.

Each function makes a step `(theta, task, kd, **extra) -> update` over dicts of arrays; `tests/optax_compositions.py`
says to which line of Optax it belongs.
"""

import functools

import numpy as np

LEARNING_RATE, BETA_TASK, BETA_KD = 0.1, 0.825, 0.975
MASK = {"w": True, "b": False}


def each(function, *trees):
    return {k: function(*(tree[k] for tree in trees)) for k in trees[0]}


def norm(*trees):
    return np.sqrt(sum((np.abs(x) ** 2).sum() for tree in trees for x in tree.values()))


def clipped(tree, size, limit=1.0):
    return each(lambda x: x * min(1.0, limit / size), tree)


def clipped_by_unit(g, p, limit):
    """Adaptive gradient clipping: by the norms over the first axis of a matrix, or of a whole vector."""
    sizes = [np.sqrt((x**2).sum(axis=0 if x.ndim > 1 else None, keepdims=x.ndim > 1)) for x in (g, p)]
    largest = limit * np.maximum(sizes[1], 1e-3)
    return np.where(sizes[0] > largest, g * largest / np.maximum(sizes[0], 1e-6), g)


class Momentum:
    def __init__(self, beta):
        self.beta, self.v = beta, 0.0

    def __call__(self, g):
        self.v = each(lambda x, v: x + self.beta * v, g, self.v or each(np.zeros_like, g))
        return self.v


class Dot:
    """The two momenta, summed."""

    def __init__(self):
        self.task, self.kd = Momentum(BETA_TASK), Momentum(BETA_KD)

    def __call__(self, task, kd):
        return each(np.add, self.task(task), self.kd(kd))


def down(v):
    return each(lambda x: -LEARNING_RATE * x, v)


def after(function):
    """By hand: DOT's summed momentum, `function(v, theta)` of it, the learning rate."""

    def make():
        dot = Dot()
        return lambda theta, task, kd, **_: down(function(dot(task, kd), theta))

    return make


def before(function):
    """By hand: `function(task, kd, theta)` of the gradients, then DOT."""

    def make():
        dot = Dot()
        return lambda theta, task, kd, **_: down(dot(*function(task, kd, theta)))

    return make


plain = after(lambda v, theta: v)


def with_ema():
    dot, average = Dot(), None

    def step(theta, task, kd):
        nonlocal average
        v = dot(task, kd)
        average = each(lambda a, x: 0.9 * a + 0.1 * x, average or each(np.zeros_like, v), v)
        step.count += 1
        return down(each(lambda a: a / (1 - 0.9**step.count), average))

    step.count = 0
    return step


def with_apply_every():
    dot, total, count = Dot(), None, 0

    def step(theta, task, kd):
        nonlocal total, count
        v = down(dot(task, kd))
        total = v if count % 2 == 0 else each(np.add, total, v)
        count += 1
        return total if count % 2 == 0 else each(np.zeros_like, v)

    return step


def with_multi_steps(skip=False, inner=Dot):
    dot, seen = inner(), []

    def step(theta, task, kd):
        if not (skip and not finite(task, kd)):
            seen.append((task, kd))
        if len(seen) < 2:
            return each(np.zeros_like, task)
        tasks, kds = zip(*seen, strict=True)
        seen.clear()
        return down(dot(*(each(lambda *x: np.mean(x, axis=0), *g) for g in (tasks, kds))))

    return step


def finite(*trees):
    return all(np.isfinite(x).all() for tree in trees for x in tree.values())


def skipping():
    dot = Dot()
    return lambda theta, task, kd: down(dot(task, kd)) if finite(task, kd) else each(np.zeros_like, task)


def every_other(otherwise):
    """By hand: DOT at every second step, `otherwise(task, kd)` at the others."""

    def make():
        dot, count = Dot(), -1

        def step(theta, task, kd):
            nonlocal count
            count += 1
            return down(dot(task, kd)) if count % 2 == 0 else otherwise(task, kd)

        return step

    return make


def with_schedules(delta):
    """By hand: betas and learning rate that change with the step."""

    def make():
        v, count = [None, None], 0

        def step(theta, task, kd):
            nonlocal count
            for i, (g, sign) in enumerate(((task, -1), (kd, 1))):
                beta = 0.9 + sign * delta(count)
                v[i] = each(lambda x, b, beta=beta: x + beta * b, g, v[i] or each(np.zeros_like, g))
            count += 1
            return down(each(np.add, *v))

        return step

    return make


def with_falling_rate():
    dot, count = Dot(), 0

    def step(theta, task, kd):
        nonlocal count
        rate = LEARNING_RATE * max(0.0, 1 - count / 10)
        count += 1
        return each(lambda x: -rate * x, dot(task, kd))

    return step


def only_w(otherwise):
    """By hand: DOT on `w`, `otherwise(g)` of the summed gradient on `b`."""

    def make():
        dot, other = Dot(), otherwise()

        def step(theta, task, kd):
            return down({"w": dot(task, kd)["w"]}) | {"b": other(task["b"] + kd["b"])}

        return step

    return make


def adam(rate=0.1, b1=0.9, b2=0.999, eps=1e-8):
    m = v = count = 0.0

    def step(g):
        nonlocal m, v, count
        count += 1
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        return -rate * (m / (1 - b1**count)) / (np.sqrt(v / (1 - b2**count)) + eps)

    return step


def with_plateau():
    dot, best, bad, scale = Dot(), np.inf, 0, 1.0

    def step(theta, task, kd, value):
        nonlocal best, bad, scale
        if value < best * (1 - 1e-4):
            best, bad = value, 0
        else:
            bad += 1
        if bad >= 2:
            scale, bad = scale * 0.5, 0
        return each(lambda x: scale * x, down(dot(task, kd)))

    return step


def with_zero_nans():
    clean = functools.partial(each, np.nan_to_num)
    return before(lambda task, kd, theta: (clean(task), clean(kd)))()


def with_sam():
    """Sharpness-aware: an ascent step along the normalized summed gradient, then DOT's step from where it began."""
    dot, start = Dot(), None

    def step(theta, task, kd):
        nonlocal start
        if start is None:
            start, g = theta, each(np.add, task, kd)
            return each(lambda x: 0.05 * x / norm(g), g)
        update = each(lambda s, t, u: s - t + u, start, theta, down(dot(task, kd)))
        start = None
        return update

    return step


def with_schedule_free(base):
    """The sequence z follows the base optimizer, x is its mean, and y = theta lies between them."""

    def make():
        dot, z, weights = base(), None, 0.0

        def step(theta, task, kd):
            nonlocal z, weights
            z = z or theta
            x = each(lambda y, z: (y - (1 - 0.9) * z) / 0.9, theta, z)
            z = each(np.add, z, down(dot(task, kd)))
            weight = LEARNING_RATE**2
            weights += weight
            x = each(lambda x, z: (1 - weight / weights) * x + weight / weights * z, x, z)
            return each(lambda x, z, y: 0.9 * x + 0.1 * z - y, x, z, theta)

        return step

    return make


def frozen_w():
    step = plain()
    return lambda theta, task, kd: step(theta, task, kd) | {"w": np.zeros_like(theta["w"])}


def gain_matched():
    momentum = Momentum(0.9)
    weigh = lambda x, y: 0.1 / 0.175 * x + 0.1 / 0.025 * y  # noqa: E731
    return lambda theta, task, kd: down(momentum(each(weigh, task, kd)))


def with_lookahead():
    """The slow parameters go half the way to the fast ones at every second step, and the fast ones begin there."""
    dot, slow, count = Dot(), None, 0

    def step(theta, task, kd):
        nonlocal slow, count
        slow = slow or theta
        fast = each(np.add, theta, down(dot(task, kd)))
        count += 1
        if count % 2 == 0:
            fast = slow = each(lambda s, f: s + 0.5 * (f - s), slow, fast)
        return each(np.subtract, fast, theta)

    return step


def with_mechanic(s_init=1e-6, decay=1e-2, eps=1e-8):
    """Mechanic tunes the scale of DOT's updates online (Cutkosky et al., 2023)."""
    dot, start = Dot(), None
    betas = 1 - 0.1 ** np.arange(1, 7)
    r = v = m = np.zeros(6)
    s = s_init * np.ones(6)

    def step(theta, task, kd):
        nonlocal start, r, v, m, s
        start = start or theta
        update, g = down(dot(task, kd)), each(np.add, task, kd)
        g = each(lambda x, p: x + decay * s.sum() * norm(g) / (norm(theta) + eps) * p, g, theta)
        previous = each(lambda x, x0: (x0 - x) / (s.sum() + eps), theta, start)
        delta = each(np.subtract, previous, update)
        h = sum((g[k] * previous[k]).sum() for k in g)
        clipped_h = np.clip(h, -m, m)
        m = np.maximum(betas * m, np.abs(h) + eps)
        v = betas**2 * v + h**2
        r = betas * r + clipped_h * s
        s = (s_init / 6 * m + np.maximum(0, r)) / (np.sqrt(v) + eps)
        return each(lambda x0, d, x: x0 - s.sum() * d - x, start, delta, theta)

    return step


def gain_matched_with_l2():
    step = gain_matched()
    return lambda theta, task, kd: step(theta, {k: x + 0.01 * MASK[k] * theta[k] for k, x in task.items()}, kd)


class Adam:
    """Adam's step of any number of gradients: a first moment for each, one second moment of their sum."""

    def __init__(self, betas, b2=0.99, eps=1e-8):
        self.betas, self.b2, self.eps = betas, b2, eps
        self.m, self.nu, self.t = [0.0] * len(betas), 0.0, 0

    def __call__(self, *grads):
        self.t += 1
        rate = 1 - sum(self.betas) / len(self.betas)
        self.m = [beta * m + rate * g for beta, m, g in zip(self.betas, self.m, grads, strict=True)]
        self.nu = self.b2 * self.nu + (1 - self.b2) * sum(grads) ** 2
        numerator = sum(m / (1 - beta**self.t) for beta, m in zip(self.betas, self.m, strict=True))
        return numerator / (np.sqrt(self.nu / (1 - self.b2**self.t)) + self.eps)


def adam_of_losses(*betas, decay=0.0, which=(0, 1)):
    """By hand: AdamW, whose i-th loss is the `which[i]`-th of (task, kd)."""

    def make():
        steps = {k: Adam(betas) for k in MASK}

        def step(theta, *grads):
            return down({k: steps[k](*(grads[i][k] for i in which)) + decay * MASK[k] * theta[k] for k in theta})

        return step

    return make


def adam_of_both():
    steps = {k: Adam((BETA_TASK, BETA_KD)) for k in MASK}
    return lambda task, kd: {k: steps[k](task[k], kd[k]) for k in task}


def momenta_of_losses(*betas, which):
    """By hand: a momentum for each loss, whose i-th is the `which[i]`-th of (task, kd)."""

    def make():
        buffers = [Momentum(beta) for beta in betas]

        def step(theta, *grads):
            return down(each(lambda *x: sum(x), *(m(grads[i]) for m, i in zip(buffers, which, strict=True))))

        return step

    return make


def with_muon(steps=5, a=3.4445, b=-4.775, c=2.0315):
    """Newton-Schulz iterations of the matrix, scaled by its shape; the vector is divided by its root mean square."""
    adam = Adam([0.0], b2=0.999)

    def scale(v, theta):
        x = v["w"] / (np.linalg.norm(v["w"]) + 1e-8)
        for _ in range(steps):
            square = x @ x.T
            x = a * x + (b * square + c * square @ square) @ x
        return {"w": np.sqrt(max(1, x.shape[1] / x.shape[0])) * x, "b": adam(v["b"])}

    return after(scale)()


def with_sign():
    """The sign of the momenta with Nesterov's look ahead, and decay, as Lion has it."""
    task, kd = Momentum(BETA_TASK), Momentum(BETA_KD)

    def step(theta, g_task, g_kd):
        v_task, v_kd = task(g_task), kd(g_kd)
        ahead = each(lambda a, x, b, y: a + BETA_TASK * x + b + BETA_KD * y, g_task, v_task, g_kd, v_kd)
        return down(each(lambda x, p: np.sign(x) + 0.01 * p, ahead, theta))

    return step


def with_rms(decay=0.9, eps=1e-8):
    nu = {k: 0.0 for k in MASK}

    def scale(v, theta):
        for k, x in v.items():
            nu[k] = decay * nu[k] + (1 - decay) * x**2
        return {k: x / np.sqrt(nu[k] + eps) for k, x in v.items()}

    return after(scale)()


def with_factored_rms():
    """Adafactor's second moment: of a matrix the means of its rows and columns, of a vector all of it."""
    rows = columns = full = 0.0
    count = 0

    def scale(v, theta):
        nonlocal rows, columns, full, count
        count += 1
        decay = 1 - count**-0.8
        square = v["w"] ** 2 + 1e-30
        rows = decay * rows + (1 - decay) * square.mean(axis=1)
        columns = decay * columns + (1 - decay) * square.mean(axis=0)
        full = decay * full + (1 - decay) * (v["b"] ** 2 + 1e-30)
        w = v["w"] / np.sqrt(rows / rows.mean())[:, None] / np.sqrt(columns)[None]
        return {"w": w, "b": v["b"] / np.sqrt(full)}

    return after(scale)()
