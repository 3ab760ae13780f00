"""The decoder of examples/language_model: documents, rematerialisation, devices, continuation. Its logits are compared
with those of `transformers` in test_language_model_pretrained.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dot_optax
from examples.language_model import generate, model, tokenizer

ARCHITECTURE = model.Architecture(
    vocabulary=32, width=16, layers=4, heads=4, kv_heads=2, head_dim=4, feed_forward=24, tied_embeddings=False
)
SEPARATOR = 0


@functools.cache
def decoder(architecture=ARCHITECTURE, dtype=jnp.float32):
    """Returns (graphdef, params), with weights so large that a mistake in attention shows in the logits."""
    graphdef, like = model.split(nnx.eval_shape(lambda: model.build(architecture, dtype=dtype, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    return graphdef, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype), like)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("mesh", "remat"))
def logits_of(graphdef, params, tokens, **options):
    return model.apply(graphdef, params, tokens, separator=SEPARATOR, **options)


def tokens(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).integers(1, ARCHITECTURE.vocabulary, shape))


def mesh(data=4, of_model=2):
    return jax.sharding.Mesh(np.array(jax.devices()).reshape(data, of_model), ("data", "model"))


def test_documents_do_not_see_each_other():
    graphdef, params = decoder()
    packed = tokens(0, 2, 12).at[:, jnp.array([3, 4])].set(SEPARATOR)  # the second document is empty
    got = logits_of(graphdef, params, packed)
    for start, stop in ((0, 4), (4, 5), (5, 12)):
        alone = jnp.zeros_like(packed).at[:, : stop - start].set(packed[:, start:stop])
        wanted = logits_of(graphdef, params, alone)[:, : stop - start]
        # Rotary angles differ by a constant, so sums of float32 are rounded differently.
        np.testing.assert_allclose(got[:, start:stop], wanted, atol=1e-5)


def test_nothing_sees_what_follows():
    graphdef, params = decoder()
    text = tokens(0, 2, 12)
    changed = text.at[:, 8].set(text[:, 8] % 31 + 1)
    a, b = logits_of(graphdef, params, text), logits_of(graphdef, params, changed)
    np.testing.assert_array_equal(a[:, :8], b[:, :8])
    assert (np.abs(a[:, 8:] - b[:, 8:]).max(-1) > 1e-3).all()


def test_rematerialised_gradients_are_the_same():
    graphdef, params = decoder()
    text = tokens(1, 2, 13)

    def losses(params, remat):
        logits = model.apply(graphdef, params, text[:, :-1], separator=SEPARATOR, remat=remat)
        task = optax.losses.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()
        return dot_optax.PerLoss(task, jnp.square(logits).mean())

    @jax.jit
    def grads(params):
        _, each = dot_optax.value_and_grads(functools.partial(losses, remat=True))(params)
        return jax.grad(lambda params: sum(losses(params, remat=False)))(params), each

    kept, each = grads(params)
    anew = jax.tree.map(jnp.add, *each)
    # The same sums; XLA may fuse them in another order.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), kept, anew)


def test_computes_in_bfloat16():
    _, params = decoder()
    graphdef, _ = decoder(dtype=jnp.bfloat16)
    text = tokens(2, 2, 12)
    got, wanted = logits_of(graphdef, params, text), logits_of(decoder()[0], params, text)
    assert got.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    # bfloat16 has 8 bits: 0.4% in each of some ten roundings one after the other.
    error = np.abs(got - wanted).max() / np.abs(wanted).max()
    assert 1e-4 < error < 0.05


def test_initial_weights():
    architecture = ARCHITECTURE._replace(width=64, feed_forward=64)
    graphdef = model.split(nnx.eval_shape(lambda: model.build(architecture, rngs=nnx.Rngs(0))))[0]
    params = jax.jit(lambda: model.split(model.build(architecture, rngs=nnx.Rngs(0)))[1])()
    layers = params["layers"]
    for name, std in {"gate": 0.02, "q": 0.02, "down": 0.02 / np.sqrt(8), "o": 0.02 / np.sqrt(8)}.items():
        # At least 4 x 1,024 numbers: the standard deviation of their standard deviation is 1.1%.
        np.testing.assert_allclose(layers[name].std(), std, rtol=0.05)
        assert not np.array_equal(layers[name][0], layers[name][1])
    assert hash(graphdef) == hash(decoder(architecture)[0])


@pytest.mark.parametrize("bad", [{"kv_heads": 3}, {"head_dim": 3}])
def test_bad_architecture(bad):
    with pytest.raises(ValueError, match="heads must be a multiple of kv_heads, and head_dim even"):
        model.build(ARCHITECTURE._replace(**bad), rngs=nnx.Rngs(0))


def test_every_nth_layer():
    _, params = decoder()
    for n, kept in {1: [0, 1, 2, 3], 3: [0, 3], 9: [0]}.items():
        student, architecture = model.every_nth_layer(params, ARCHITECTURE, n)
        assert architecture == ARCHITECTURE._replace(layers=len(kept))
        np.testing.assert_array_equal(student["layers"]["q"], params["layers"]["q"][np.array(kept)])
        assert student["embedding"] is params["embedding"]
    graphdef, like = model.split(nnx.eval_shape(lambda: model.build(architecture, rngs=nnx.Rngs(0))))
    assert jax.tree.map(jnp.shape, student) == jax.tree.map(jnp.shape, like)
    assert logits_of(graphdef, student, tokens(0, 2, 12)).shape == (2, 12, 32)


# With 4 x 2 devices the heads divide; with 2 x 4 the two key-value heads do not, nor does a batch of 1.
@pytest.mark.parametrize("grid, batch", [((4, 2), 4), ((2, 4), 1)])
def test_many_devices_give_the_same(grid, batch):
    graphdef, params = decoder()
    devices = mesh(*grid)
    text = tokens(3, batch, 12).at[0, 5].set(SEPARATOR)

    def put(path, leaf):
        return jax.device_put(leaf, NamedSharding(devices, model.sharding_spec(path, leaf, devices)))

    placed = jax.tree.map_with_path(put, params)
    got = logits_of(graphdef, placed, text, mesh=devices)
    assert got.sharding.spec == P("data" if batch > 1 else None, None, "model")
    # Sums over several devices are taken in another order.
    np.testing.assert_allclose(jax.device_get(got), logits_of(graphdef, params, text), atol=1e-5)


def test_sharding_of_parameters_and_states():
    _, params = decoder()
    devices = mesh()
    state = {"opt_state": optax.adamw(1e-3).init(params), "params": params}
    specs = {
        jax.tree_util.keystr(path, simple=True, separator="/"): model.sharding_spec(path, leaf, devices)
        for path, leaf in jax.tree.leaves_with_path(state)
    }
    wanted = {
        "embedding": P("model", "data"),
        "head": P("model", "data"),
        "norm": P(),
        "layers/attention_norm": P(),
        "layers/q": P(None, "data", "model", None),
        "layers/k": P(None, "data", "model", None),
        "layers/o": P(None, "model", None, "data"),
        "layers/up": P(None, "data", "model"),
        "layers/down": P(None, "model", "data"),
    }
    for place in ("params", "opt_state/0/mu", "opt_state/0/nu"):
        for name, spec in wanted.items():
            assert specs[f"{place}/{name}"] == spec
    assert specs["opt_state/0/count"] == P()


def test_sharding_where_it_does_not_divide():
    def spec(name, *shape, of_model=8):
        path = (jax.tree_util.DictKey("layers"), jax.tree_util.DictKey(name))
        return model.sharding_spec(path, jax.ShapeDtypeStruct(shape, jnp.float32), mesh(8 // of_model, of_model))

    assert spec("k", 2, 16, 2, 4) == P(None, "data", None, None)
    assert spec("up", 2, 15, 24, of_model=2) == P(None, None, "model")
    assert spec("up", 2, 24) == P()  # such as the factors of a second moment
    assert spec("projector", 16, 16) == P()


def test_cached_logits_are_the_same():
    graphdef, params = decoder()
    text = tokens(4, 2, 12)
    wanted, cache = logits_of(graphdef, params, text), model.empty_cache(graphdef, params, 2, 12)
    step = jax.jit(functools.partial(model.apply_cached, graphdef))
    for position in range(12):
        got, cache = step(params, text[:, position], jnp.int32(position), cache)
        np.testing.assert_allclose(got, wanted[:, position], atol=1e-5)  # sums of other shapes


def test_continues_with_the_likeliest_token():
    architecture = ARCHITECTURE._replace(vocabulary=256)
    graphdef, params = decoder(architecture)
    prompts, count = ["if", "return x", "é"], 5
    texts = generate.continue_text(graphdef, params, tokenizer.of_bytes(), prompts, count)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = list(prompt.encode())
        for _ in range(count):  # A fixed length compiles once; what follows is not seen.
            padded = jnp.zeros((1, 16), int).at[0, : len(ids)].set(jnp.array(ids))
            ids.append(int(logits_of(graphdef, params, padded)[0, len(ids) - 1].argmax()))
        continued = bytes(ids[len(prompt.encode()) :]).split(b"\0")[0]
        assert text == continued.decode(errors="replace")


def test_stops_at_a_separator():
    architecture = ARCHITECTURE._replace(vocabulary=256)
    graphdef, params = decoder(architecture)
    (text,) = generate.continue_text(graphdef, params, tokenizer.of_bytes(), ["if"], 5)
    # All logits are 0, and the first of them is the separator.
    params = params | {"norm": jnp.zeros_like(params["norm"])}
    assert generate.continue_text(graphdef, params, tokenizer.of_bytes(), ["if"], 5) == [""] != [text]


@pytest.mark.parametrize("prompts, count", [(["a", ""], 1), (["a"], 0)])
def test_nothing_to_continue(prompts, count):
    with pytest.raises(ValueError, match="each prompt needs a token"):
        generate.continue_text(*decoder(), tokenizer.of_bytes(), prompts, count)
