"""DOT in NumPy, in float64: what the recipes are compared with. It uses neither JAX's gradients nor dot_optax's.

The student is `logits = dropout(relu(norm(x @ w1 + b1))) @ w2 + b2`, where `norm` is a BatchNorm with `scale` and
`bias`, or nothing if theta has no `scale`.
"""

import numpy as np

from examples.recipes.problem import KD_WEIGHT, LEARNING_RATE, TASK_WEIGHT, TEMPERATURE

BETA_TASK, BETA_KD = 0.825, 0.975  # the defaults of `dot_optax.dot`


def softmax(z):
    """The softmax over the last axis."""
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gradients(theta, x, labels, teacher_logits, epsilon=1e-5, kept=1.0):
    """The gradients of the two losses: `[task, kd]`, each a dict as theta.

    `kept` is what Dropout multiplies the hidden units by.
    """
    h = x @ theta["w1"] + theta["b1"]
    if "scale" in theta:
        deviation = np.sqrt(h.var(0) + epsilon)
        normalized = (h - h.mean(0)) / deviation
        a = theta["scale"] * normalized + theta["bias"]
    else:
        a = h
    hidden = kept * np.maximum(a, 0.0)
    logits = hidden @ theta["w2"] + theta["b2"]

    ce = softmax(logits) - np.eye(logits.shape[-1])[labels]
    kl = TEMPERATURE * (softmax(logits / TEMPERATURE) - softmax(teacher_logits / TEMPERATURE))
    grads = []
    for of_logits in (TASK_WEIGHT * ce / len(x), KD_WEIGHT * kl / len(x)):
        of_a = kept * (of_logits @ theta["w2"].T) * (a > 0)
        g = {"w2": hidden.T @ of_logits, "b2": of_logits.sum(0)}
        of_h = of_a
        if "scale" in theta:
            g |= {"scale": (of_a * normalized).sum(0), "bias": of_a.sum(0)}
            d = of_a * theta["scale"]
            of_h = (d - d.mean(0) - normalized * (d * normalized).mean(0)) / deviation
        grads.append(g | {"w1": x.T @ of_h, "b1": of_h.sum(0)})
    return grads


def train(theta, batches, frozen=(), epsilon=1e-5, kept=None, every=1):
    """The parameters after DOT: v <- g + beta v for each loss, theta <- theta - lr (v_task + v_kd).

    Parameters named in `frozen` stay. Gradients are averaged over `every` batches. `kept` has an entry for each batch.
    """
    theta = {k: np.asarray(p, np.float64) for k, p in theta.items()}
    v_task, v_kd = ({k: np.zeros_like(p) for k, p in theta.items()} for _ in range(2))
    kept = kept or [1.0] * len(batches)
    for start in range(0, len(batches), every):
        seen = [gradients(theta, *batches[i], epsilon, kept[i]) for i in range(start, start + every)]
        for k in theta:
            v_task[k] = np.mean([task[k] for task, _ in seen], axis=0) + BETA_TASK * v_task[k]
            v_kd[k] = np.mean([kd[k] for _, kd in seen], axis=0) + BETA_KD * v_kd[k]
            if k not in frozen:
                theta[k] = theta[k] - LEARNING_RATE * (v_task[k] + v_kd[k])
    return theta


def deviation(theta, expected):
    """The largest absolute deviation of any parameter."""
    return max(np.abs(np.asarray(theta[k], np.float64) - expected[k]).max() for k in expected)
