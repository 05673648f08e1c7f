"""The generator: sizes, decoding, and its parts against references of their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny import initial_parameters

from lasad_jax.config import Config
from lasad_jax.models import SIZES, LASADGen, ModelConfig, count_parameters
from lasad_jax.models.generator import abstract_parameters, init_cache
from lasad_jax.models.rope import rotate, turns
from lasad_jax.training.sharding import RULES, make_mesh
from lasad_jax.training.state import abstract_state
from lasad_jax.training.step import make_train_step

# Millions of parameters (arXiv 2406.06525).
PUBLISHED = {"B": 111, "L": 343, "XL": 775, "XXL": 1400, "3B": 3100}
TINY = ModelConfig(
    vocab_size=11,
    num_classes=3,
    grid=(4, 5),
    num_layers=2,
    width=16,
    num_heads=2,
    dropout=0.0,
    class_dropout=0.0,
    dtype="float32",
)
SOFTMAX = {"mixer": "softmax"}
VARIANTS = [
    SOFTMAX,
    {"decay": "raster"},
    {"decay": "raster", "key_dim": 4, "grid": (1, 7)},
    {"decay": "sequence", "selective": False, "local_conv": "off", "rope": False},
    {"decay": "none", "grid": (5, 1), "rope": False},
    {"decay": "manhattan", "selective": False, "local_conv": "off"},
]


def tiny_model(seed=0, **changes):
    """A model whose every parameter is random, and a batch of codes and labels."""
    config = dataclasses.replace(TINY, **changes)
    params = initial_parameters(config, seed)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape, np.float32), params)
    tokens = rng.integers(0, config.vocab_size, (3, config.num_tokens))
    return config, {"params": params}, tokens, np.array([0, 2, config.num_classes])


@pytest.mark.parametrize("size", PUBLISHED)
def test_sizes_are_the_published_ones_for_both_mixers(size):
    config = ModelConfig(**SIZES[size])
    ours = count_parameters(config) / 1e6
    softmax = count_parameters(dataclasses.replace(config, **SOFTMAX)) / 1e6
    assert abs(softmax / PUBLISHED[size] - 1) < 0.03
    assert abs(ours / PUBLISHED[size] - 1) < 0.03
    assert abs(ours / softmax - 1) < 0.01


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_parameter_names_its_axes(changes):
    boxes = jax.tree.leaves(
        abstract_parameters(dataclasses.replace(TINY, **changes)),
        is_leaf=lambda x: isinstance(x, nn.Partitioned),
    )
    for box in boxes:
        assert isinstance(box, nn.Partitioned)
        assert len(box.names) == len(box.value.shape)
        assert set(box.names) <= {name for name, _ in RULES}


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_decoding_gives_the_logits_of_the_full_pass(changes):
    config, variables, tokens, labels = tiny_model(**changes)
    model = LASADGen(config)
    full = jax.jit(model.apply)(variables, tokens, labels)
    step = jax.jit(lambda *args: model.apply(variables, *args, method="decode_step"))
    prefill = jax.jit(lambda *args: model.apply(variables, *args, method="prefill"))
    for num_given in (0, 3):
        logits, cache = prefill(labels, tokens[:, :num_given])
        decoded = [logits]
        for i in range(num_given, config.num_tokens - 1):
            logits, cache = step(tokens[:, i], cache)
            decoded.append(logits)
        np.testing.assert_allclose(np.stack(decoded, 1), full[:, num_given:], atol=1e-4)


@pytest.mark.parametrize("changes", VARIANTS[:2], ids=str)
def test_a_code_changes_only_what_comes_after_it(changes):
    config, variables, tokens, labels = tiny_model(**changes)
    apply = jax.jit(LASADGen(config).apply)
    other = tokens.copy()
    other[:, 8] = (other[:, 8] + 1) % config.vocab_size
    before, after = apply(variables, tokens, labels), apply(variables, other, labels)
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert np.abs(before[:, 9:] - after[:, 9:]).max() > 1e-3


def test_the_class_reaches_every_code():
    config, variables, tokens, labels = tiny_model()
    apply = jax.jit(LASADGen(config).apply)
    difference = apply(variables, tokens, labels) - apply(variables, tokens, (labels + 1) % 4)
    assert np.abs(difference).max(axis=(0, 2)).min() > 1e-3


def test_remat_changes_no_gradient():
    gradients = []
    for remat in ("none", "block", "lean", "cheap"):
        config, variables, tokens, labels = tiny_model(remat=remat)
        loss = lambda v, c=config, t=tokens, y=labels: jnp.sin(LASADGen(c).apply(v, t, y)).sum()
        gradients.append(jax.jit(jax.grad(loss))(variables))
    for other in gradients[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradients[0], other
        )


def test_bf16_computes_in_bf16_over_float32_parameters():
    config, variables, tokens, labels = tiny_model(dtype="bfloat16")
    reference = LASADGen(dataclasses.replace(config, dtype="float32"))
    logits = jax.jit(LASADGen(config).apply)(variables, tokens, labels)
    assert logits.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    exact = jax.jit(reference.apply)(variables, tokens, labels)
    assert 1e-4 < np.linalg.norm(logits - exact) / np.linalg.norm(exact) < 5e-2


def test_class_dropout_and_dropout_follow_the_key():
    config, variables, tokens, labels = tiny_model(class_dropout=0.5, dropout=0.0)
    model = LASADGen(config, train=True)
    tokens, labels = np.repeat(tokens[:1], 64, 0), np.zeros(64, int)
    apply = jax.jit(model.apply)
    run = lambda key: apply(variables, tokens, labels, rngs={"dropout": jax.random.key(key)})
    with_class = jax.jit(LASADGen(config).apply)(variables, tokens[:1], labels[:1])
    kept = np.isclose(run(0), with_class, atol=1e-4).all(axis=(1, 2))
    assert 16 < kept.sum() < 48
    np.testing.assert_array_equal(run(0), run(0))
    assert not np.array_equal(run(0), run(1))


def test_the_state_does_not_grow_with_the_rows():
    size = lambda rows, **changes: sum(
        x.size
        for x in jax.tree.leaves(
            jax.eval_shape(
                lambda: init_cache(dataclasses.replace(TINY, grid=(rows, 5), **changes), 2)
            )
        )
    )
    assert size(4) == size(400)
    assert size(400, **SOFTMAX) > 50 * size(4, **SOFTMAX)


def test_rotary_embedding_is_a_complex_rotation_by_row_and_column():
    grid, dim = (3, 5), 8
    x = np.random.default_rng(0).standard_normal((2, 16, 3, dim), np.float32)
    frequencies = 1e4 ** (-2 * np.arange(dim // 4) / (dim // 2))
    pairs = x[..., ::2] + 1j * x[..., 1::2]
    for token in range(1, 16):
        row, column = divmod(token - 1, grid[1])
        angles = np.concatenate([row * frequencies, column * frequencies])
        pairs[:, token] *= np.exp(1j * angles)
    expected = np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)
    np.testing.assert_allclose(
        rotate(x, turns(grid, x.shape[-1], 0, x.shape[1], prefix_scale=1.0)), expected, atol=1e-5
    )
    expected[:, 0] = 0
    np.testing.assert_allclose(
        rotate(x, turns(grid, x.shape[-1], 0, x.shape[1], prefix_scale=0.0)), expected, atol=1e-5
    )


@pytest.mark.parametrize("size", ["B", "L", "XL"])
@pytest.mark.parametrize("mixer", ["lasad", "softmax"])
def test_full_size_train_step_traces(size, mixer):
    """The ImageNet recipes, with nothing allocated."""
    config = Config(model=ModelConfig(mixer=mixer, remat="cheap", **SIZES[size]))
    state = abstract_state(config, make_mesh(config.mesh, jax.devices()[:1]))
    batch = {
        "tokens": jax.ShapeDtypeStruct((256, 256), jnp.int32),
        "labels": jax.ShapeDtypeStruct((256,), jnp.int32),
    }
    after, metrics = jax.eval_shape(make_train_step(config), state, batch)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(after) == shapes(state)
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("changes", VARIANTS[:2], ids=str)
def test_train_step_lowers_for_accelerators(platform, changes):
    config = Config(model=dataclasses.replace(TINY, **changes))
    state = abstract_state(config, make_mesh(config.mesh, jax.devices()[:1]))
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    batch = {
        "tokens": jax.ShapeDtypeStruct((4, config.model.num_tokens), jnp.int32),
        "labels": jax.ShapeDtypeStruct((4,), jnp.int32),
    }
    traced = jax.jit(make_train_step(config)).trace(state, batch)
    assert "func.func public @main" in traced.lower(lowering_platforms=(platform,)).as_text()
