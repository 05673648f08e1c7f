"""The tokenizer against the one in PyTorch beside this file: codes, pixels, gradients."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_tokenizer import SMALL, pair, to_numpy, to_torch

from lasad_jax.interop.tokenizer_files import load_tokenizer
from lasad_jax.models import quantizer
from lasad_jax.models.quantizer import l2_normalize, nearest_codes
from lasad_jax.models.tokenizer import VQTokenizer, abstract_tokenizer, init_tokenizer
from lasad_jax.models.tokenizer_config import VQ8, VQ16, TokenizerConfig


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return pair(SMALL, tmp_path_factory.mktemp("weights"))


def random_images(config: TokenizerConfig, *shape: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with noise on top, so that places differ at every scale."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-0.5, 0.5, (*shape, config.channels))
    for axis in (1, 2):
        wave = np.sin(np.linspace(0, 9, shape[axis]))[:, None]
        x += 0.5 * np.expand_dims(wave, 1) if axis == 1 else 0.3 * wave
    return x.clip(-1, 1).astype(np.float32)


def assert_same_codes_and_pixels(reference, variables, config, images):
    model = VQTokenizer(config)

    @jax.jit
    def encode(variables, images):
        z = model.apply(variables, images, method="encode")
        return l2_normalize(z), model.apply(variables, z, method="nearest")

    @jax.jit
    def decode(variables, codes):
        vectors = model.apply(variables, codes, method="lookup")
        return model.apply(variables, vectors, method="decode")

    with torch.no_grad():
        z, vectors, codes = reference.quantize(reference.encode(to_torch(images)))
        pixels = to_numpy(reference.decode(vectors))
    got_z, got_codes = encode(variables, images)
    rows, columns = (size // config.downsampling for size in images.shape[1:3])
    assert got_codes.shape == codes.shape == (len(images), rows, columns)
    assert got_codes.dtype == jnp.int32
    assert np.mean(np.asarray(got_codes) == codes.numpy()) >= 0.999
    np.testing.assert_allclose(got_z, z, atol=1e-3)
    # Pixels from the reference's codes, so that one differing code hides nothing.
    got_pixels = decode(variables, codes.numpy())
    assert got_pixels.shape == images.shape and got_pixels.dtype == jnp.float32
    np.testing.assert_allclose(got_pixels, pixels, atol=1e-3)
    return codes


@pytest.mark.parametrize(("config", "size"), [(VQ16, (64, 96)), (VQ8, (48, 40))])
def test_llamagen_tokenizers_agree_with_pytorch(tmp_path, config, size):
    reference, variables = pair(config, tmp_path)
    images = random_images(config, 1, *size)
    codes = assert_same_codes_and_pixels(reference, variables, config, images)
    assert len(codes.unique()) > 0.1 * codes.numel()


@pytest.mark.parametrize(
    ("multipliers", "channels", "shape"),
    [
        ((1, 1), 1, (3, 6, 10)),
        # Not (2, 2, 2): a norm of two numbers, which PyTorch itself rounds by 7e-4.
        ((1, 2), 3, (2, 4, 2)),
        ((2, 1, 1), 1, (2, 4, 28)),
        ((1, 2, 1, 3), 3, (1, 24, 8)),
        ((1,), 3, (2, 1, 1)),  # a pixel; a single one PyTorch's norm refuses
        ((1,), 1, (2, 1, 7)),
    ],
)
def test_small_tokenizers_agree_with_pytorch(tmp_path, multipliers, channels, shape):
    config = dataclasses.replace(SMALL, multipliers=multipliers, channels=channels)
    reference, variables = pair(config, tmp_path)
    images = random_images(config, *shape)
    assert_same_codes_and_pixels(reference, variables, config, images)


# Gradients


@pytest.mark.parametrize("codebook_size", [60, 1100])  # looked up by product and by gather
def test_gradients_agree_with_pytorch(tmp_path, codebook_size):
    config = dataclasses.replace(SMALL, codebook_size=codebook_size)
    reference, variables = pair(config, tmp_path)
    images = random_images(config, 2, 8, 6)
    towards = random_images(config, 2, 8, 6, seed=1)

    x = to_torch(images)
    pixels, z, quantized, _ = reference(x)
    loss = ((pixels - to_torch(towards)) ** 2).mean()
    loss = loss + 2 * ((quantized - z.detach()) ** 2).mean()
    loss = loss + 3 * ((quantized.detach() - z) ** 2).mean()
    loss.backward()
    expected = {name: p.grad for name, p in reference.named_parameters()}
    state = reference.state_dict()
    for name, gradient in expected.items():
        state[name] = gradient
    torch.save(state, tmp_path / "gradients.pt")
    _, expected = load_tokenizer(tmp_path / "gradients.pt")

    @jax.jit
    @jax.value_and_grad
    def objective(params):
        out = VQTokenizer(config).apply({"params": params}, images)
        stop = jax.lax.stop_gradient
        return (
            jnp.mean((out.images - towards) ** 2)
            + 2 * jnp.mean((out.quantized - stop(out.z)) ** 2)
            + 3 * jnp.mean((stop(out.quantized) - out.z) ** 2)
        )

    value, gradients = objective(variables["params"])
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    assert np.abs(expected["quantize"]["embedding"]).max() > 0
    assert np.abs(expected["encoder"]["conv_in"]["kernel"]).max() > 0

    def compare(path, got, want):
        scale = np.abs(want).max()
        np.testing.assert_allclose(got, want, atol=2e-4 * scale + 1e-7, err_msg=str(path))

    jax.tree_util.tree_map_with_path(compare, gradients, expected)


def test_each_output_sends_its_gradient_where_documented(tmp_path):
    config = dataclasses.replace(SMALL, multipliers=(1,), decoder_blocks=1)
    _, variables = pair(config, tmp_path)
    images = random_images(config, 1, 8, 4)

    @jax.jit
    def pull_each(params):
        def differentiable(params):
            out = VQTokenizer(config).apply({"params": params}, images)
            return out.images, out.z, out.quantized

        outputs, pull = jax.vjp(differentiable, params)
        rng = np.random.default_rng(0)
        towards = [rng.normal(size=x.shape).astype(np.float32) for x in outputs]
        keep = lambda i: tuple(jnp.where(i == j, x, 0) for j, x in enumerate(towards))
        return [pull(keep(i))[0] for i in range(3)]

    def parts(gradients):
        size = lambda tree: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))
        return {part for part, tree in gradients.items() if size(tree) > 1e-6}

    of_images, of_z, of_quantized = map(parts, pull_each(variables["params"]))
    assert of_images == {"encoder", "quant_conv", "decoder", "post_quant_conv"}
    assert of_z == {"encoder", "quant_conv"}
    assert of_quantized == {"quantize"}


def test_normalising_a_zero_vector_is_finite_and_so_is_its_gradient():
    x = jnp.zeros((2, 3)).at[1].set(jnp.array([3.0, 0, 4]))
    np.testing.assert_allclose(l2_normalize(x), [[0, 0, 0], [0.6, 0, 0.8]], rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(l2_normalize(x) ** 2))(x)
    assert np.isfinite(gradient).all()


# Codes


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 50), st.integers(1, 4), st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_the_search_in_parts_finds_the_nearest_code(V, d, most, seed):
    rng = np.random.default_rng(seed)
    z, codebook = rng.normal(size=(2, 3, d)), rng.normal(size=(V, d))
    expected = ((z[..., None, :] - codebook) ** 2).sum(-1).argmin(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizer, "_MAX_DISTANCES", most)
        codes = nearest_codes(jnp.asarray(z, jnp.float32), jnp.asarray(codebook, jnp.float32))
    np.testing.assert_array_equal(codes, expected)


def test_of_equally_near_codes_the_first_is_taken(monkeypatch):
    codebook = jnp.eye(3)[jnp.array([2, 0, 1, 0, 1, 0])]
    for most in (1, 6, 10, 18, 100):
        monkeypatch.setattr(quantizer, "_MAX_DISTANCES", most)
        np.testing.assert_array_equal(nearest_codes(jnp.eye(3), codebook), [1, 2, 0])


def test_the_search_needs_little_memory_for_many_places():
    z = jax.ShapeDtypeStruct((128, 64, 64, 8), jnp.float32)
    codebook = jax.ShapeDtypeStruct((16384, 8), jnp.float32)
    memory = jax.jit(nearest_codes).lower(z, codebook).compile().memory_analysis()
    # All distances at once would take 34 GB.
    assert memory.temp_size_in_bytes < 0.7e9


@pytest.mark.parametrize("codebook_size", [60, 1100])
def test_every_code_is_nearest_to_its_own_vector(tmp_path, codebook_size):
    config = dataclasses.replace(SMALL, codebook_size=codebook_size)
    model = VQTokenizer(config)
    _, variables = pair(config, tmp_path)
    codes = jnp.arange(codebook_size).reshape(1, 2, -1)
    vectors = model.apply(variables, codes, method="lookup")
    np.testing.assert_allclose(jnp.linalg.norm(vectors, axis=-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(model.apply(variables, 7 * vectors, method="nearest"), codes)


# Initialisation and precision


def test_initial_parameters_are_spread_as_documented():
    params = init_tokenizer(SMALL, jax.random.key(0))
    same = init_tokenizer(SMALL, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, same)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert shapes == abstract_tokenizer(SMALL)
    conv = params["encoder"]["mid_0"]["conv1"]
    bound = 1 / math.sqrt(9 * 64)
    for name, kind in conv.items():
        assert 0.9 * bound < jnp.abs(kind).max() <= bound, name
    np.testing.assert_allclose(jnp.std(conv["kernel"]), bound / math.sqrt(3), rtol=0.02)
    norms = jnp.linalg.norm(params["quantize"]["embedding"], axis=-1)
    np.testing.assert_allclose(norms, 1, rtol=1e-6)


def test_half_precision_stays_near_float32(weights):
    _, variables = weights
    images = random_images(SMALL, 1, 16, 12)
    half = dataclasses.replace(SMALL, dtype="bfloat16")
    exact, rough = (jax.jit(VQTokenizer(c).apply)(variables, images) for c in (SMALL, half))
    assert rough.images.dtype == rough.z.dtype == rough.quantized.dtype == jnp.float32
    assert 1e-5 < np.abs(rough.z - exact.z).max() < 0.1
    decoded = [
        jax.jit(lambda v, c=c: VQTokenizer(c).apply(variables, v, method="decode"))(exact.quantized)
        for c in (SMALL, half)
    ]
    assert 1e-5 < np.abs(decoded[0] - decoded[1]).max() < 0.1


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 8, 8, 1), r"\(1, 8, 8, 1\) must be \(B, h, w, 3\)"),
        ((8, 8, 3), r"\(8, 8, 3\) must be"),
        ((1, 8, 7, 3), r"8 x 7 pixels must be multiples of 2"),
        ((1, 0, 8, 3), r"0 x 8 pixels"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape, message):
    variables = {"params": abstract_tokenizer(SMALL)}
    with pytest.raises(ValueError, match=rf"images: .*{message}"):
        jax.eval_shape(VQTokenizer(SMALL).apply, variables, jnp.zeros(shape))
