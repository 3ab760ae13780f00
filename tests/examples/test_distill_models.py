"""The networks: sizes as published, features, padding, initialization, and computing in bfloat16."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dot_optax
from examples.distill import methods, models, steps
from examples.distill.configs.digits import get_config
from examples.distill.models import layers, shufflenetv2
from examples.trainer.errors import UserError
from tests import networks
from tests.tiers import slow_but

_PARAMETERS = [
    ("resnet8x4", 100, 1_233_540),
    ("resnet32x4", 100, 7_433_860),
    ("vgg8", 100, 3_965_028),
    ("vgg13", 100, 9_462_180),
    ("shufflenetv2", 100, 1_355_528),
    ("shufflenetv2", 200, 1_458_028),
    ("resnet18_small", 200, 11_271_432),
    ("mobilenetv2", 200, 2_497_480),
    ("resnet18", 1000, 11_689_512),
    ("resnet34", 1000, 21_797_672),
    ("resnet50", 1000, 25_557_032),
    ("mobilenetv1", 1000, 4_231_976),
]

# (height, channels) of every feature map of an image of 64 pixels.
_FEATURES = {
    "resnet8x4": [(64, 32), (64, 64), (32, 128), (16, 256)],
    "resnet32x4": [(64, 32), (64, 64), (32, 128), (16, 256)],
    "vgg8": [(64, 64), (32, 128), (16, 256), (8, 512), (4, 512)],
    "vgg13": [(64, 64), (32, 128), (16, 256), (8, 512), (4, 512)],
    "shufflenetv2": [(64, 24), (32, 116), (16, 232), (8, 464), (8, 1024)],
    "resnet18_small": [(64, 64), (64, 64), (32, 128), (16, 256), (8, 512)],
    "mobilenetv2": [(66, 32), (66, 16), (33, 24), (17, 32), (9, 64), (9, 96), (9, 160), (9, 320), (9, 1280)],
    "resnet18": [(32, 64), (16, 64), (8, 128), (4, 256), (2, 512)],
    "resnet34": [(32, 64), (16, 64), (8, 128), (4, 256), (2, 512)],
    "resnet50": [(32, 64), (16, 256), (8, 512), (4, 1024), (2, 2048)],
    "mobilenetv1": [(32, 64), (16, 128), (8, 256), (4, 512), (2, 1024)],
}


def _images(size, batch=2):
    return np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype(np.float32)


def _shapes(graphdef, params, rest, *image_shape, train=False):
    """((logits, features), rest) as shapes."""
    apply = functools.partial(models.apply, graphdef, train=train, with_features=True)
    return jax.eval_shape(apply, params, rest, jnp.zeros((2, *image_shape)))


@pytest.mark.parametrize(("name", "num_classes", "count"), _PARAMETERS)
def test_parameter_counts_are_the_published_ones(name, num_classes, count):
    _, params, _ = models.split(networks.abstract(name, num_classes))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


@pytest.mark.parametrize("name", _FEATURES)
def test_features(name):
    (logits, features), _ = _shapes(*models.split(networks.abstract(name)), 64, 64, 3)
    maps = [(2, size, size, width) for size, width in _FEATURES[name]]
    pooled = (2, maps[-1][-1])
    assert [feature.shape for feature in features] == [*maps, pooled]
    assert logits.shape == (2, 10)


@pytest.mark.parametrize("name", slow_but(_FEATURES, "resnet8x4", "vgg8", "shufflenetv2", "mobilenetv1"))
def test_any_input_size_and_number_of_channels(name):
    for image_shape in [(40, 72, 3), (33, 47, 1)]:
        (logits, _), _ = _shapes(*models.split(networks.abstract(name, input_shape=image_shape)), *image_shape)
        assert logits.shape == (2, 10)


def test_vgg_pools_four_times_at_64_pixels_only():
    sizes = {}
    for size in (32, 64, 96):
        (_, features), _ = _shapes(*models.split(networks.abstract("vgg8")), size, size, 3)
        sizes[size] = features[-2].shape[1]
    assert sizes == {32: 4, 64: 4, 96: 12}


@pytest.mark.parametrize("name", slow_but(_FEATURES, "resnet8x4", "vgg8", "mobilenetv1"))
def test_forward_passes(name):
    graphdef, params, rest = networks.random(name)
    apply = jax.jit(functools.partial(models.apply, graphdef, with_features=True), static_argnames="train")
    (logits, features), new_rest = apply(params, rest, _images(32), train=True)
    assert logits.dtype == jnp.float32
    assert all(np.isfinite(feature).all() for feature in features)
    assert np.abs(logits[0] - logits[1]).max() > 1e-3
    # Every BatchNorm of the network saw the batch.
    assert jax.tree.all(jax.tree.map(lambda old, new: np.abs(new - old).max() > 0, rest, new_rest))
    np.testing.assert_allclose(features[-1], features[-2].mean((1, 2)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", slow_but(["mlp", *_FEATURES], "mlp", "resnet8x4", "vgg8", "shufflenetv2", "mobilenetv1")
)
def test_bfloat16_is_for_computing_only(name):
    options = {"hidden": (8,)} if name == "mlp" else {}
    graphdef, params, rest = models.split(networks.abstract(name, dtype="bfloat16", **options))
    (logits, features), new_rest = _shapes(graphdef, params, rest, 32, 32, 3, train=True)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, rest, new_rest, logits))} == {jnp.dtype("float32")}
    maps = features if name == "mlp" else features[:-1]
    assert {feature.dtype for feature in maps} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("train", [False, True])
def test_bfloat16_logits_are_close(train):
    _, params, rest = networks.random("resnet8x4")

    def logits(dtype):
        graphdef, _, _ = models.split(networks.abstract("resnet8x4", dtype=dtype))
        return jax.jit(functools.partial(models.apply, graphdef, train=train))(params, rest, _images(8))[0]

    exact, rounded = logits(None), logits("bfloat16")
    assert 0 < np.abs(exact - rounded).max() < 0.03 * np.abs(exact).max()


def test_evaluation_does_not_round_the_running_statistics():
    layer = layers.ConvNorm(1, 1, 1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer.conv.kernel[...] = jnp.ones((1, 1, 1, 1))
    layer.norm.mean[...] = jnp.array([256.9])  # 256 or 258 in bfloat16.
    layer.eval()
    assert layer(jnp.full((1, 1, 1, 1), 258.0)).item() == pytest.approx(1.1, rel=2**-8)


@pytest.mark.parametrize("name", _FEATURES)
def test_batch_norms_are_the_published_ones(name):
    norms = [module for _, module in nnx.iter_modules(networks.abstract(name)) if isinstance(module, nnx.BatchNorm)]
    assert {(norm.momentum, norm.epsilon) for norm in norms} == {(0.9, 1e-5)}


@pytest.mark.parametrize("groups", [1, 64])
def test_convolutions_start_he_normal_by_fan_out(groups):
    kernel = layers.ConvNorm(64, 64, 3, groups=groups, rngs=nnx.Rngs(0)).conv.kernel[...]
    assert np.std(kernel) == pytest.approx(math.sqrt(2 / (64 * 3 * 3)), rel=0.1)


def test_stride_two_pads_both_sides():
    layer = layers.ConvNorm(1, 1, 3, 2, rngs=nnx.Rngs(0))
    layer.conv.kernel[...] = jnp.ones((3, 3, 1, 1))
    # How much of each window lies on the image. XLA's "SAME" would give [[9, 6], [6, 4]].
    np.testing.assert_array_equal(layer.conv(jnp.ones((1, 4, 4, 1)))[0, :, :, 0], [[4, 6], [6, 9]])


def test_max_pooling_pads_both_sides():
    image = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(layers.max_pool(image, 3, padding=1)[0, :, :, 0], [[5, 7], [13, 15]])
    np.testing.assert_array_equal(layers.max_pool(-image, 3, padding=1)[0, :, :, 0], [[0, -1], [-4, -5]])


def test_channels_are_shuffled_in_two_groups():
    np.testing.assert_array_equal(shufflenetv2._shuffle(jnp.arange(6).reshape(1, 6)), [[0, 3, 1, 4, 2, 5]])


def test_hidden_activations_of_the_mlp():
    graphdef, params, rest = networks.random("mlp", input_shape=(8, 8, 3), hidden=(5, 4))
    (logits, features), _ = models.apply(graphdef, params, rest, _images(8), train=False, with_features=True)
    assert [feature.shape for feature in features] == [(2, 5), (2, 4)]
    np.testing.assert_array_equal(logits, models.apply(graphdef, params, rest, _images(8), train=False)[0])


@pytest.mark.slow
def test_a_convolutional_pair_trains_in_bfloat16():
    # The first of its three stages, which compiles in seconds.
    graphdef, params, rest = networks.random("resnet8x4", dtype="bfloat16", stage_sizes=(1,), stage_features=(64,))
    teacher_graphdef, *teacher_variables = networks.random("vgg8")
    optimizer = methods.build("dot", get_config().optimizer, dot_optax.PerLoss(task=0.1, kd=0.9), steps_per_epoch=1)
    problem = steps.Problem(graphdef, teacher_graphdef, 4.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    train_step = steps.make_train_step(problem, optimizer)
    state = steps.init_state(*jax.tree.map(jnp.asarray, (params, rest)), optimizer)
    batch = {"image": _images(8, batch=8), "label": np.arange(8) % 10}
    losses = []
    for _ in range(6):
        state, metrics = train_step(state, tuple(teacher_variables), batch)
        losses.append(metrics["task_loss"])
    assert losses[-1] < losses[0]
    arrays = [leaf for leaf in jax.tree.leaves((state, metrics)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in arrays} == {jnp.dtype("float32")}  # parameters, statistics, momenta and losses


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet9", {}, "unknown model 'resnet9'; known: mlp, mobilenetv1, mobilenetv2, resnet18, resnet18_small, "),
        (
            "resnet8x4",
            {"hidden": (32,)},
            "model 'resnet8x4': ResNet.__init__() got an unexpected keyword argument 'hidden'",
        ),
        ("mlp", {}, "model 'mlp': MLP.__init__() missing 1 required keyword-only argument: 'hidden'"),
        ("vgg8", {"dtype": "bfloat61"}, "bad dtype 'bfloat61' of a model"),
        ("vgg8", {"dtype": "int8"}, "bad dtype dtype('int8') of a model"),
    ],
)
def test_what_cannot_be_built(name, options, message):
    with pytest.raises(UserError) as caught:
        models.build(name, 10, rngs=nnx.Rngs(0), **options)
    assert message in str(caught.value)


def test_images_that_are_too_small():
    vgg8 = models.split(networks.abstract("vgg8"))
    models.check_input(vgg8, (8, 8, 3), "vgg8")
    with pytest.raises(UserError, match="images of 4 x 4 pixels are too small for vgg8"):
        models.check_input(vgg8, (4, 4, 3), "vgg8")
