"""The codec: bytes to codes and back, against PyTorch, on any number of devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_tokenizer import SMALL, pair, to_numpy, to_torch

from lasad_jax.models.codec import TokenizerCodec, bytes_to_floats, floats_to_bytes


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return pair(SMALL, tmp_path_factory.mktemp("weights"))


def test_bytes_survive_the_way_to_floats_and_back():
    x = np.arange(256, dtype=np.uint8)
    floats = bytes_to_floats(jnp.asarray(x))
    np.testing.assert_allclose(floats, x / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(floats_to_bytes(floats), x)
    far = floats_to_bytes(jnp.array([-7.0, 0.0, 7.0]))
    assert far.dtype == jnp.uint8
    np.testing.assert_array_equal(far, [0, 128, 255])


def random_bytes(count: int, rows: int = 6, columns: int = 10) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, rows, columns, 3), dtype=np.uint8)


@pytest.mark.parametrize("count", [0, 1, 4, 11])
@pytest.mark.parametrize("devices", [1, 3, 8])
def test_codec_agrees_with_pytorch_for_any_number_of_images_and_devices(weights, count, devices):
    reference, variables = weights
    codec = TokenizerCodec(
        SMALL, variables["params"], batch_size=4, devices=jax.devices()[:devices]
    )
    assert codec.batch_size == {1: 4, 3: 6, 8: 8}[devices]
    images = random_bytes(count)
    codes = codec.encode(images)
    assert codes.shape == (count, 15) and codes.dtype == np.int32
    pixels = codec.decode(codes.astype(np.uint16), (3, 5))
    assert pixels.shape == images.shape and pixels.dtype == np.uint8
    if count:
        with torch.no_grad():
            x = to_torch(images).float() / 127.5 - 1
            _, vectors, expected = reference.quantize(reference.encode(x))
            exact = np.clip(127.5 * to_numpy(reference.decode(vectors)) + 128, 0, 255)
        np.testing.assert_array_equal(codes, expected.flatten(1))
        # A float just below a whole number may fall on either side of it.
        assert np.abs(pixels + 0.5 - exact).max() <= 0.51


def test_codec_compiles_once_and_starts_batches_without_waiting(weights):
    codec = TokenizerCodec(SMALL, weights[1]["params"], batch_size=8)
    images = random_bytes(19)
    codes = codec.encode(images)
    batch = codec.encode_batch(images[:8])
    assert isinstance(batch, jax.Array) and len(batch.sharding.device_set) == 8
    np.testing.assert_array_equal(batch, codes[:8])
    codec.encode(images[:1])
    assert codec._encode._cache_size() == 1


def test_codec_works_within_the_mesh_of_a_training_run(weights):
    codec = TokenizerCodec(SMALL, weights[1]["params"], batch_size=2, devices=jax.devices()[1:3])
    codes = codec.encode(random_bytes(2))
    axes = (jax.sharding.AxisType.Auto,) * 2
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "tensor"), axis_types=axes)):
        np.testing.assert_array_equal(codec.encode(random_bytes(2)), codes)


def test_codec_tells_what_it_is(weights):
    codec = TokenizerCodec(SMALL, weights[1]["params"])
    assert codec.batch_size == 32 and codec.downsampling == 2 and codec.vocab_size == 60
    rough = dataclasses.replace(SMALL, dtype="bfloat16")
    assert codec.fingerprint == TokenizerCodec(rough, weights[1]["params"]).fingerprint


def test_codec_refuses_what_does_not_fit(weights):
    params = weights[1]["params"]
    with pytest.raises(ValueError, match="batch_size: 0 must be at least 1"):
        TokenizerCodec(SMALL, params, batch_size=0)
    codec = TokenizerCodec(SMALL, params, batch_size=8)
    with pytest.raises(ValueError, match="images: float32 must be uint8"):
        codec.encode(random_bytes(1).astype(np.float32))
    with pytest.raises(ValueError, match=r"images: shape \(1, 6, 10, 1\) must be \(B, h, w, 3\)"):
        codec.encode(random_bytes(1)[..., :1])
    with pytest.raises(ValueError, match="images: 5 x 10 pixels must be multiples of 2"):
        codec.encode(random_bytes(1, rows=5))
    with pytest.raises(ValueError, match="a batch of 3 must have batch_size = 8"):
        codec.encode_batch(random_bytes(3))
    with pytest.raises(ValueError, match=r"tokens: shape \(2, 15\) must be \(N, 12\).* 3 x 4"):
        codec.decode(np.zeros((2, 15), int), (3, 4))
    with pytest.raises(ValueError, match="tokens: -1 to 59 must be within 0 to 59"):
        codec.decode(np.array([[-1, 59]]), (1, 2))
    with pytest.raises(ValueError, match="tokens: 0 to 60 must be within 0 to 59"):
        codec.decode(np.array([[0, 60]]), (1, 2))
    with pytest.raises(ValueError, match="tokens: float64 must be integers"):
        codec.decode(np.zeros((1, 2)), (1, 2))
