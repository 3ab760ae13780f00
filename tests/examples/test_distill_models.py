"""The networks: sizes as published, features, padding, initialization, and computing in bfloat16."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dot_optax
from examples.distill import methods, models, steps
from examples.distill.configs.digits import get_config
from examples.distill.models import layers
from examples.trainer import parallel
from examples.trainer.errors import UserError
from examples.trainer.step import init_state
from tests import networks
from tests.tiers import slow_but

_PARAMETERS = [
    ("resnet8", 100, 83_892),
    ("resnet14", 100, 181_108),
    ("resnet20", 100, 278_324),
    ("resnet32", 100, 472_756),
    ("resnet44", 100, 667_188),
    ("resnet56", 100, 861_620),
    ("resnet110", 100, 1_736_564),
    ("resnet8x4", 100, 1_233_540),
    ("resnet32x4", 100, 7_433_860),
    ("wrn_16_1", 100, 180_916),
    ("wrn_16_2", 100, 703_284),
    ("wrn_40_1", 100, 569_780),
    ("wrn_40_2", 100, 2_255_156),
    ("vgg8", 100, 3_965_028),
    ("vgg11", 100, 9_277_284),
    ("vgg13", 100, 9_462_180),
    ("vgg16", 100, 14_774_436),
    ("vgg19", 100, 20_086_692),
    ("resnet50_small", 100, 23_705_252),
    ("mobilenetv2_half", 100, 812_836),
    ("shufflenetv1", 100, 949_258),
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
_OPTIONS = {"mlp": {"hidden": (8,)}, "vit": {"patch_size": 8}}
_FEATURES = {
    "resnet20": [(64, 16), (64, 16), (32, 32), (16, 64)],
    "resnet8x4": [(64, 32), (64, 64), (32, 128), (16, 256)],
    "resnet32x4": [(64, 32), (64, 64), (32, 128), (16, 256)],
    "wrn_16_2": [(64, 16), (64, 32), (32, 64), (16, 128)],
    "vgg8": [(64, 64), (32, 128), (16, 256), (8, 512), (4, 512)],
    "vgg13": [(64, 64), (32, 128), (16, 256), (8, 512), (4, 512)],
    "shufflenetv2": [(64, 24), (32, 116), (16, 232), (8, 464), (8, 1024)],
    "shufflenetv1": [(64, 24), (32, 240), (16, 480), (8, 960)],
    "mobilenetv2_half": [(32, 16), (32, 8), (32, 12), (16, 16), (8, 32), (8, 48), (4, 80), (4, 160), (4, 1280)],
    "fashion_cnn": [(32, 16), (16, 32)],
    "resnet50_small": [(64, 64), (64, 256), (32, 512), (16, 1024), (8, 2048)],
    "resnet18_small": [(64, 64), (64, 64), (32, 128), (16, 256), (8, 512)],
    "mobilenetv2": [(66, 32), (66, 16), (33, 24), (17, 32), (9, 64), (9, 96), (9, 160), (9, 320), (9, 1280)],
    "resnet18": [(32, 64), (16, 64), (8, 128), (4, 256), (2, 512)],
    "resnet34": [(32, 64), (16, 64), (8, 128), (4, 256), (2, 512)],
    "resnet50": [(32, 64), (16, 256), (8, 512), (4, 1024), (2, 2048)],
    "mobilenetv1": [(32, 64), (16, 128), (8, 256), (4, 512), (2, 1024)],
}
# One network of each family, which stands for it in the first tier.
_FAMILIES = (
    *("resnet8x4", "wrn_16_2", "vgg8", "shufflenetv1", "shufflenetv2", "mobilenetv2_half"),
    *("fashion_cnn", "resnet18_small", "resnet50", "mobilenetv1"),
)


def _images(size, batch=2):
    return np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype(np.float32)


def _shapes(graphdef, params, rest, *image_shape, train=False):
    """((logits, features), rest) as shapes."""
    apply = functools.partial(models.apply, graphdef, train=train, with_features=True)
    return jax.eval_shape(apply, params, rest, jnp.zeros((2, *image_shape)))


@pytest.mark.parametrize(
    "network",
    slow_but(_PARAMETERS, *(case for case in _PARAMETERS if case[0] in (*_FAMILIES, "resnet8", "resnet20", "vgg13"))),
    ids="{0[0]}-{0[1]}".format,
)
def test_parameter_counts_are_the_published_ones(network):
    name, num_classes, count = network
    _, params, _ = models.split(networks.abstract(name, num_classes))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


@pytest.mark.parametrize("name", slow_but(_FEATURES, "resnet8x4", "vgg8", "shufflenetv2", "mobilenetv1", "fashion_cnn"))
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
    "name",
    slow_but([*_OPTIONS, *_FEATURES], "mlp", "vit", "resnet8x4", "wrn_16_2", "vgg8", "shufflenetv2", "mobilenetv1"),
)
def test_bfloat16_is_for_computing_only(name):
    options = _OPTIONS.get(name, {})
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


@pytest.mark.parametrize("name", slow_but(_FEATURES, *_FAMILIES))
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


def test_channels_are_shuffled_in_groups():
    np.testing.assert_array_equal(layers.shuffle(jnp.arange(6).reshape(1, 6), 2), [[0, 3, 1, 4, 2, 5]])
    np.testing.assert_array_equal(layers.shuffle(jnp.arange(6).reshape(1, 6), 3), [[0, 2, 4, 1, 3, 5]])


def test_hidden_activations_of_the_mlp():
    graphdef, params, rest = networks.random("mlp", input_shape=(8, 8, 3), hidden=(5, 4))
    (logits, features), _ = models.apply(graphdef, params, rest, _images(8), train=False, with_features=True)
    assert [feature.shape for feature in features] == [(2, 5), (2, 4)]
    np.testing.assert_array_equal(logits, models.apply(graphdef, params, rest, _images(8), train=False)[0])


def test_parameters_of_the_small_networks():
    def count(name, **options):
        _, params, _ = models.split(networks.abstract(name, input_shape=(28, 28, 1), **options))
        return sum(leaf.size for leaf in jax.tree.leaves(params))

    def cnn(*widths):
        convolutions = sum(9 * n * m + 2 * m + 9 * m * m + 2 * m for n, m in itertools.pairwise((1, *widths)))
        return convolutions + (widths[-1] + 1) * 10

    def vit(patch, depth, width, ratio):
        attention = (width + 1) * 4 * width
        mlp = (width + 1) * ratio * width + (ratio * width + 1) * width
        embedding = (patch**2 + 1) * width + (28 // patch) ** 2 * width
        return embedding + depth * (attention + mlp + 4 * width) + 2 * width + (width + 1) * 10

    assert count("fashion_cnn") == cnn(16, 32)
    assert count("fashion_cnn", widths=(64, 128)) == cnn(64, 128)
    assert count("vit") == vit(7, 4, 48, 2)
    assert count("vit", patch_size=4, depth=2, width=40, heads=8, mlp_ratio=3) == vit(4, 2, 40, 3)


def _layer_norm(x, p):
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def _linear(x, p):
    return x @ p["kernel"] + p["bias"]


def _vit(params, images, patch, heads):
    """The vision transformer, one image, head and patch at a time, in float64; returns (logits, features)."""
    params = jax.tree.map(np.float64, params)
    logits, features = [], []
    for image in images:
        starts = [(i, j) for i in range(0, image.shape[0], patch) for j in range(0, image.shape[1], patch)]
        patches = np.stack([image[i : i + patch, j : j + patch].ravel() for i, j in starts])
        kernel = params["embed"]["kernel"]
        x = patches @ kernel.reshape(-1, kernel.shape[-1]) + params["embed"]["bias"] + params["position"]
        after = []
        for _, block in sorted(params["blocks"].items()):
            query, key, value = np.split(_linear(_layer_norm(x, block["norm1"]), block["attention"]["qkv"]), 3, -1)
            attended = []
            for head in np.split(np.arange(x.shape[-1]), heads):
                scores = query[:, head] @ key[:, head].T / math.sqrt(len(head))
                weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
                attended.append(weights @ value[:, head])
            x = x + _linear(np.concatenate(attended, -1), block["attention"]["out"])
            hidden = _linear(_layer_norm(x, block["norm2"]), block["expand"])
            hidden = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))  # GELU
            x = x + _linear(hidden, block["project"])
            after.append(x)
        pooled = _layer_norm(x, params["norm"]).mean(0)
        logits.append(_linear(pooled, params["classifier"]))
        features.append([*after, pooled])
    return np.stack(logits), [np.stack(feature) for feature in zip(*features, strict=True)]


@pytest.mark.parametrize("train", [False, True])
def test_the_vision_transformer_is_the_one_written_in_numpy(train):
    options = {"input_shape": (8, 12, 3), "patch_size": 4, "depth": 2, "width": 12, "heads": 3}
    graphdef, params, rest = networks.random("vit", **options)
    # Biases that are not zero and scales that are not one.
    params = jax.tree.map(
        lambda p: p + np.random.default_rng(1).normal(scale=0.3, size=p.shape).astype(p.dtype), params
    )
    images = np.random.default_rng(2).normal(size=(3, 8, 12, 3)).astype(np.float32)
    (logits, features), _ = models.apply(graphdef, params, rest, images, train=train, with_features=True)
    expected, expected_features = _vit(params, images, patch=4, heads=3)
    # Float32 against float64, over some ten layers of numbers of order one.
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(features, expected_features, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(logits, models.apply(graphdef, params, rest, images, train=train)[0])


@pytest.mark.slow
def test_a_convolutional_pair_trains_in_bfloat16():
    # The first of its three stages, which compiles in seconds.
    graphdef, params, rest = networks.random("resnet8x4", dtype="bfloat16", stage_sizes=(1,), stage_features=(64,))
    teacher_graphdef, *teacher_variables = networks.random("vgg8")
    optimizer = methods.build("dot", get_config().optimizer, dot_optax.PerLoss(task=0.1, kd=0.9), steps_per_epoch=1)
    problem = steps.Problem(graphdef, teacher_graphdef, 4.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    one_device = parallel.jit_layout(jax.sharding.Mesh(jax.devices()[:1], (parallel.AXIS,)))
    train_step = steps.make_train_step(problem, optimizer, one_device)
    state = init_state(*jax.tree.map(jnp.asarray, (params, rest)), optimizer)
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
        ("resnet9", {}, "unknown model 'resnet9'; known: mlp, fashion_cnn, vit, resnet8, resnet14, resnet20, "),
        (
            "resnet8x4",
            {"hidden": (32,)},
            "model 'resnet8x4': ResNet.__init__() got an unexpected keyword argument 'hidden'",
        ),
        ("mlp", {}, "model 'mlp': MLP.__init__() missing 1 required keyword-only argument: 'hidden'"),
        ("vgg8", {"dtype": "bfloat61"}, "bad dtype 'bfloat61' of a model"),
        ("vgg8", {"dtype": "int8"}, "bad dtype dtype('int8') of a model"),
        ("vit", {"patch_size": 5}, "model 'vit': patch_size=5 must divide the 32 x 32 pixels of an image"),
        ("vit", {"patch_size": 8, "heads": 5}, "model 'vit': heads=5 must divide width=48"),
    ],
)
def test_what_cannot_be_built(name, options, message):
    with pytest.raises(UserError) as caught:
        models.build(name, 10, rngs=nnx.Rngs(0), **options)
    assert message in str(caught.value)


def test_images_that_are_too_small():
    vgg8 = models.split(networks.abstract("vgg8"))
    models.check_input(vgg8, (8, 8, 3), "vgg8", 10)
    with pytest.raises(UserError, match="images of 4 x 4 pixels are too small for vgg8"):
        models.check_input(vgg8, (4, 4, 3), "vgg8", 10)


@pytest.fixture
def registry(monkeypatch):
    """Forgets after the test what it registers."""
    monkeypatch.setattr(models, "_MODELS", dict(models._MODELS))


class _Small(nnx.Module):
    """As small as the contract allows."""

    def __init__(self, num_classes, *, width=4, rngs):
        self.hidden = nnx.Linear(3, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.classifier = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, images):
        return self.classifier(self.dropout(nnx.relu(self.norm(self.hidden(images)))).mean((1, 2)))


def test_a_registered_class(registry):
    assert models.register("small")(_Small) is _Small
    model = models.build(
        "small", 5, input_shape=(6, 6, 3), dtype="float32", axis_name="devices", width=7, rngs=nnx.Rngs(0)
    )
    assert model.hidden.kernel.shape == (3, 7)
    assert model.norm.axis_name == "devices"
    graphdef, params, rest = models.split(models.build("small", 5, rngs=nnx.Rngs(0)))
    models.check_input((graphdef, params, rest), (6, 6, 3), "small", 5)
    run = functools.partial(models.apply, graphdef, params, rest, _images(6))
    (trained, new_rest), (evaluated, kept_rest) = run(train=True), run(train=False)
    assert trained.shape == (2, 5)
    assert np.abs(trained - evaluated).max() > 0  # Dropout and BatchNorm are told.
    np.testing.assert_array_equal(kept_rest["norm"]["mean"], rest["norm"]["mean"])
    assert np.abs(new_rest["norm"]["mean"] - rest["norm"]["mean"]).max() > 0
    assert not jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), new_rest["dropout"], rest["dropout"]))


def test_a_registered_network_gets_what_it_has_parameters_for(registry):
    taken = []

    @models.register("function")
    def _build(num_classes, *, rngs, input_shape, dtype, layers):
        taken.append((num_classes, input_shape, dtype, layers))
        return _Small(num_classes, rngs=rngs)

    @models.register("rest")
    def _build_of_any(num_classes, *, rngs, **options):
        taken.append(options)
        return _Small(num_classes, rngs=rngs)

    models.register("partial")(functools.partial(_Small, width=2))
    for name in ("function", "rest"):
        models.build(name, 5, input_shape=(6, 6, 3), layers=2, rngs=nnx.Rngs(0))
    models.build("function", 5, dtype="bfloat16", layers=1, rngs=nnx.Rngs(0))
    assert taken == [(5, (6, 6, 3), None, 2), {"layers": 2}, (5, (32, 32, 3), jnp.bfloat16, 1)]
    assert models.build("partial", 5, rngs=nnx.Rngs(0)).hidden.kernel.shape == (3, 2)


def test_a_name_is_registered_once_but_its_lines_may_run_again(registry):
    for _ in range(2):
        models.register("mine")(_Small)
    with pytest.raises(
        UserError, match=rf"^there is a model 'mine' already in {__file__}, line \d+; choose another name"
    ):
        models.register("mine")(_Small)
    with pytest.raises(UserError, match=r"^there is a model 'vgg8' already; choose another name"):
        models.register("vgg8")(_Small)
    with pytest.raises(UserError, match=r'^a model is registered by a name: register\("NAME"\)'):
        models.register(_Small)


@pytest.mark.parametrize("options", [{"depth": -1}, {"heads": 0}, {"patch_size": 0}, {"width": 0}, {"mlp_ratio": 0}])
def test_sizes_of_a_vit_that_make_no_sense(options):
    with pytest.raises(UserError, match=f"^cannot build model 'vit': .*{next(iter(options))}.* must be at least 1"):
        models.build("vit", 5, rngs=nnx.Rngs(0), input_shape=(28, 28, 1), **options)


@pytest.mark.parametrize("widths", [(), (8, 0), (-8,)])
def test_widths_of_a_cnn_that_make_no_sense(widths):
    with pytest.raises(
        UserError, match=r"^cannot build model 'fashion_cnn': widths=.* must have a number of at least 1"
    ):
        models.build("fashion_cnn", 5, rngs=nnx.Rngs(0), widths=widths)


def _fails(num_classes, *, rngs):
    return {}["key"]


def _no_module(num_classes, *, rngs):
    return lambda images: images


class _NoParameters(nnx.Module):
    def __init__(self, num_classes, *, rngs):
        self.weights = nnx.data(jnp.zeros((3, num_classes)))


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (_fails, {}, "cannot build model 'mine': KeyError: 'key'"),
        (_no_module, {}, "model 'mine' is no NNX module with parameters (`nnx.Param`), but a function"),
        (_NoParameters, {}, "model 'mine' is no NNX module with parameters (`nnx.Param`), but a _NoParameters"),
        (
            _Small,
            {"depth": 1},
            "cannot build model 'mine': _Small.__init__() got an unexpected keyword argument 'depth'",
        ),
        (_Small, {"dtype": "bfloat16"}, "model 'mine' computes in float32 only: it has no parameter `dtype`"),
        (lambda: None, {}, "cannot build model 'mine': "),
    ],
)
def test_registered_networks_that_cannot_be_built(network, options, message, registry):
    models.register("mine")(network)
    with pytest.raises(UserError) as caught:
        models.build("mine", 5, rngs=nnx.Rngs(0), **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            lambda self, images: self.hidden(images),
            "model 'mine' gives float32 [2, 6, 6, 4] for 2 images, not float32 logits [2, 5]",
        ),
        (
            lambda self, images: _Small.__call__(self, images).astype(jnp.bfloat16),
            "model 'mine' gives bfloat16 [2, 5] for 2 images, not float32 logits [2, 5]",
        ),
        (lambda self, images: {"logits": _Small.__call__(self, images)}, "model 'mine' gives {'logits': "),
        (lambda self, images: None, "model 'mine' gives None for 2 images, not "),
        (lambda self, images: images.no, "model 'mine' cannot take images of 6 x 6 pixels: AttributeError: "),
        (lambda self, images: images.reshape(3, 5, 7), "model 'mine' cannot take images of 6 x 6 pixels: "),
        (lambda self: 0, "model 'mine' cannot take images of 6 x 6 pixels: "),
        (lambda self, images: _Small.__call__(self, images[:, 6:]), "images of 6 x 6 pixels are too small for mine"),
    ],
)
def test_registered_networks_that_cannot_be_called(forward, message, registry):
    models.register("mine")(type("Mine", (_Small,), {"__call__": forward}))
    network = models.split(models.build("mine", 5, rngs=nnx.Rngs(0)))
    with pytest.raises(UserError) as caught:
        models.check_input(network, (6, 6, 3), "mine", 5)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
