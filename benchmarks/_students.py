"""The students of `sampled_gradients.py` and `trade_off.py`, and the data that they are trained on."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _experiments as experiments
from benchmarks import digits_learning_rates as digits
from benchmarks._experiments import BATCH, Problem, batches
from examples.distill.datasets.fashion_mnist_idx import fashion_mnist_idx

# The digits.


def _digits():
    splits = digits.load()
    teacher, _ = digits.train_teacher(splits)
    data = {f"{name} {what}": part for name, pair in splits.items() for what, part in zip("xy", pair, strict=True)}
    return data | {"teacher": teacher}


def _mlp(params, statistics, x, train):
    del train
    return digits.mlp(params, x), statistics


# Fashion-MNIST.


def fashion(side, teacher_widths, examples=5000, teacher_epochs=10, wrong_labels=0.0, skip=0):
    """Images of 28 pixels without the frame that 2 x `side` leaves over, in means of 2 x 2; and a trained CNN's logits.

    Of the labels to train and to validate on, those of the teacher too, the part `wrong_labels` is that of another class.
    With `skip`, the first images of the random order are left out, and the test split is the next 10,000 of the rest:
    none of these images is in a split of a problem with `skip` = 0 that has at most `skip` images.
    """
    (pixels, labels), (test_pixels, test_labels) = fashion_mnist_idx(None).values()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(labels))[skip:]
    if skip:
        unseen = order[examples + 2500 :][:10_000]
        test_pixels, test_labels = pixels[unseen], labels[unseen]
    order = order[: examples + 2500]
    is_wrong = rng.random(len(labels)) < wrong_labels
    labels = np.where(is_wrong, (labels + rng.integers(1, 10, len(labels))) % 10, labels)
    frame = (28 - 2 * side) // 2

    def prepared(pixels):
        inner = pixels[:, frame : frame + 2 * side, frame : frame + 2 * side].astype(np.float32)
        return jnp.asarray(inner.reshape(-1, side, 2, side, 2).mean((2, 4)) / 128 - 1)[..., None]

    splits = {"train": order[:examples], "validation": order[examples:]}
    data = {f"{name} x": prepared(pixels[rows]) for name, rows in splits.items()} | {"test x": prepared(test_pixels)}
    data |= {f"{name} y": jnp.asarray(labels[rows], jnp.int32) for name, rows in splits.items()}
    data |= {"test y": jnp.asarray(test_labels, jnp.int32), "teacher": jnp.zeros((examples, 10))}

    teacher = cnn_problem(teacher_widths, side)
    rows = batches(examples, teacher_epochs * (examples // BATCH), seed=1000)
    variables, _ = jax.jit(functools.partial(experiments.train, teacher, "ce", experiments.EXACT, 0.1))(
        jax.random.key(1000), rows, data
    )
    data["teacher"] = jnp.concatenate(
        [teacher.apply(*variables, part, train=False)[0] for part in jnp.split(data["train x"], 10)]
    )
    return data


def _init_cnn(widths, side, key):
    keys = jax.random.split(key, len(widths))
    channels = (1, *widths[:-1])
    params = {
        f"conv{i}": {
            "kernel": jax.random.normal(k, (9 * before, width)) * math.sqrt(2 / (9 * before)),
            "scale": jnp.ones(width),
            "bias": jnp.zeros(width),
        }
        for i, (k, before, width) in enumerate(zip(keys, channels, widths, strict=True))
    }
    pixels = math.ceil(side / 2 ** len(widths)) ** 2
    params["head"] = {"kernel": jnp.zeros((pixels * widths[-1], 10)), "bias": jnp.zeros(10)}
    statistics = {f"conv{i}": {"mean": jnp.zeros(width), "var": jnp.ones(width)} for i, width in enumerate(widths)}
    return params, statistics


def _cnn(params, statistics, x, train):
    """Convolutions of 3 x 3 with stride 2, each with BatchNorm and ReLU, and a linear head.

    A convolution is a product with patches: many seeds at once are then one batched product.
    """
    new = {}
    for name in statistics:
        layer = params[name]
        height, width = x.shape[1:3]
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [padded[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)]
        x = jnp.concatenate(shifted, axis=-1) @ layer["kernel"]
        now = {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2))}
        new[name] = jax.tree.map(lambda old, now: 0.9 * old + 0.1 * now, statistics[name], now)
        used = now if train else statistics[name]
        x = jax.nn.relu((x - used["mean"]) * jax.lax.rsqrt(used["var"] + 1e-5) * layer["scale"] + layer["bias"])
    return x.reshape(len(x), -1) @ params["head"]["kernel"] + params["head"]["bias"], new


def cnn_problem(widths, side, **fields):
    fields = {"optimizer": "sgd", "weight_decay": 5e-4, "learning_rate": 0.0, "epochs": 0, "seeds": 0} | fields
    fields = {"load": functools.partial(fashion, side, (32, 64))} | fields
    return Problem(init=functools.partial(_init_cnn, widths, side), apply=_cnn, **fields)


VIT_WIDTH, VIT_HEADS, VIT_DEPTH, VIT_PATCH, VIT_SIDE = 24, 2, 2, 4, 12


def _init_vit(key):
    keys = iter(jax.random.split(key, 2 + 4 * VIT_DEPTH))

    def dense(n_in, n_out):
        return {"kernel": jax.random.normal(next(keys), (n_in, n_out)) / math.sqrt(n_in), "bias": jnp.zeros(n_out)}

    def norm():
        return {"scale": jnp.ones(VIT_WIDTH), "bias": jnp.zeros(VIT_WIDTH)}

    tokens = (VIT_SIDE // VIT_PATCH) ** 2
    params = {
        "embed": dense(VIT_PATCH**2, VIT_WIDTH),
        "position": 0.02 * jax.random.normal(next(keys), (tokens, VIT_WIDTH)),
        "norm": norm(),
        "head": {"kernel": jnp.zeros((VIT_WIDTH, 10)), "bias": jnp.zeros(10)},
    }
    for i in range(VIT_DEPTH):
        params[f"block{i}"] = {
            "norm1": norm(),
            "qkv": dense(VIT_WIDTH, 3 * VIT_WIDTH),
            "out": dense(VIT_WIDTH, VIT_WIDTH),
            "norm2": norm(),
            "expand": dense(VIT_WIDTH, 2 * VIT_WIDTH),
            "project": dense(2 * VIT_WIDTH, VIT_WIDTH),
        }
    return params, {}


def _vit(params, statistics, x, train):
    """A vision transformer with the mean of the tokens as its feature."""
    del train

    def dense(layer, x):
        return x @ layer["kernel"] + layer["bias"]

    def norm(layer, x):
        return jax.nn.standardize(x, epsilon=1e-6) * layer["scale"] + layer["bias"]

    n = VIT_SIDE // VIT_PATCH
    x = x.reshape(-1, n, VIT_PATCH, n, VIT_PATCH).swapaxes(2, 3).reshape(-1, n * n, VIT_PATCH**2)
    x = dense(params["embed"], x) + params["position"]
    for i in range(VIT_DEPTH):
        block = params[f"block{i}"]
        qkv = dense(block["qkv"], norm(block["norm1"], x)).reshape(*x.shape[:2], 3, VIT_HEADS, VIT_WIDTH // VIT_HEADS)
        attended = jax.nn.dot_product_attention(*jnp.unstack(qkv, axis=2)).reshape(x.shape)
        x = x + dense(block["out"], attended)
        x = x + dense(block["project"], jax.nn.gelu(dense(block["expand"], norm(block["norm2"], x))))
    return dense(params["head"], norm(params["norm"], x).mean(1)), statistics


PROBLEMS = {
    "digits, MLP": Problem(
        "sgd",
        weight_decay=5e-4,
        learning_rate=0.02,
        epochs=120,
        seeds=20,
        init=lambda key: (digits.init_mlp(key, (64, 32, 10)), {}),
        apply=_mlp,
        load=_digits,
    ),
    "Fashion-MNIST, CNN": cnn_problem((8, 16), 14, learning_rate=0.04, epochs=6, seeds=5),
    "Fashion-MNIST, ViT": Problem(
        "adamw",
        weight_decay=0.05,
        learning_rate=8e-3,
        epochs=6,
        seeds=5,
        init=_init_vit,
        apply=_vit,
        load=functools.partial(fashion, VIT_SIDE, (32, 64)),
    ),
}
