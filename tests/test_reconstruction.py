"""PSNR and SSIM against scikit-image, codebook usage against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from lasad_jax.evaluation.reconstruction import (
    MAX_PSNR,
    codebook_usage,
    count_codes,
    psnr,
    ssim,
)


def pair(shape, noise, seed=0):
    """Smooth images and noisy copies, as bytes."""
    rng = np.random.default_rng(seed)
    B, h, w, channels = shape
    phase = rng.uniform(0, 6, (B, 1, 1, channels))
    waves = np.sin(np.arange(h)[:, None, None] / 3 + np.arange(w)[:, None] / 5 + phase)
    a = 127.5 + 110 * waves
    b = a + rng.normal(0, noise, shape)
    return (np.clip(np.rint(x), 0, 255).astype(np.uint8) for x in (a, b))


SHAPES = [(3, 7, 7, 1), (2, 33, 40, 3), (1, 8, 64, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("noise", [1, 20, 200])
def test_psnr_and_ssim_are_those_of_scikit_image(shape, noise):
    a, b = pair(shape, noise)
    got = jax.jit(psnr)(a, b)
    expected = [peak_signal_noise_ratio(x, y, data_range=255) for x, y in zip(a, b, strict=True)]
    assert got.shape == shape[:1] and got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5)

    got = jax.jit(ssim)(a, b)
    expected = [
        structural_similarity(x, y, channel_axis=-1, data_range=255)
        for x, y in zip(a, b, strict=True)
    ]
    assert got.shape == shape[:1] and got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_floats_with_the_same_values_give_the_same_numbers():
    a, b = pair((2, 9, 12, 3), 30)
    floats = a.astype(np.float32), b.astype(np.float32)
    np.testing.assert_array_equal(psnr(a, b), psnr(*floats))
    np.testing.assert_array_equal(ssim(a, b), ssim(*floats))


def test_fractions_are_not_rounded():
    a, b = (x + np.float32(0.25) for x in pair((1, 9, 12, 1), 30))
    b = b + np.float32(0.5)
    expected = peak_signal_noise_ratio(a[0], b[0], data_range=255)
    np.testing.assert_allclose(psnr(a, b), [expected], rtol=1e-5)
    expected = structural_similarity(a[0], b[0], channel_axis=-1, data_range=255)
    np.testing.assert_allclose(ssim(a, b), [expected], atol=1e-5)


@pytest.mark.parametrize("value", [0, 131, 255])
def test_ssim_is_exact_on_flat_images(value):
    flat = np.full((1, 16, 16, 3), value, np.uint8)
    other = np.full((1, 16, 16, 3), 255 - value, np.uint8)
    expected = structural_similarity(flat[0], other[0], channel_axis=-1, data_range=255)
    np.testing.assert_allclose(ssim(flat, other), [expected], atol=1e-5)


def test_identical_images_reach_the_best_values_and_keep_means_finite():
    a, b = pair((2, 11, 9, 3), 20)
    b[0] = a[0]
    values = psnr(a, b)
    assert values[0] == MAX_PSNR == 100 and 0 < values[1] < 100
    assert np.isfinite(values.mean())
    np.testing.assert_allclose(ssim(a, b)[0], 1, atol=1e-6)


def test_psnr_of_hand_made_cases():
    black, white = np.zeros((1, 1, 1, 1), np.uint8), np.full((1, 1, 1, 1), 255, np.uint8)
    np.testing.assert_allclose(psnr(black, white), [0], atol=1e-5)
    tenth = np.full((1, 1, 1, 1), 25.5, np.float32)
    np.testing.assert_allclose(psnr(black, tenth), [20], atol=1e-5)
    # Bytes must not wrap around.
    np.testing.assert_array_equal(psnr(black, white), psnr(white, black))


def test_unfit_images_are_refused():
    small = np.zeros((1, 6, 9, 3), np.uint8)
    with pytest.raises(ValueError, match=r"ssim: images of 6 x 9 are smaller .* 7 x 7"):
        ssim(small, small)
    for measure in (psnr, ssim):
        for other in (np.zeros((1, 9, 6, 3), np.uint8), small[0]):
            with pytest.raises(ValueError, match=r"both be \(B, h, w, channels\)"):
                measure(small, other)


# Codes


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(-3, 12), max_size=20))
def test_codes_are_counted_and_those_outside_are_not(size, codes):
    got = count_codes(jnp.asarray(codes, jnp.int32), size)
    inside = [code for code in codes if 0 <= code < size]
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, np.bincount(np.array(inside, int), minlength=size))


def test_codes_are_counted_in_grids_and_under_jit():
    codes = np.random.default_rng(0).integers(0, 7, (2, 3, 5))
    got = jax.jit(count_codes, static_argnums=1)(codes, 9)
    np.testing.assert_array_equal(got, np.bincount(codes.ravel(), minlength=9))


def test_usage_of_hand_made_counts():
    assert codebook_usage(np.array([3, 0, 0, 0])) == (0.25, 1.0)
    usage, perplexity = codebook_usage(np.array([5, 5, 0, 5, 5, 0, 0, 0]))
    assert usage == 0.5
    assert perplexity == pytest.approx(4)
    usage, perplexity = codebook_usage(jnp.array([1, 3]))
    assert usage == 1
    assert perplexity == pytest.approx(0.25**-0.25 * 0.75**-0.75)
    with pytest.raises(ValueError, match="no code was counted"):
        codebook_usage(np.zeros(4, int))
