"""How good reconstructions are, and how well a tokenizer uses its codebook.

Images are (B, h, w, channels) with values 0 to 255, uint8 or float.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, Integer, Num

DATA_RANGE = 255.0
MAX_PSNR = 100.0
_LEAST_ERROR = DATA_RANGE**2 * 10 ** (-MAX_PSNR / 10)
_WINDOW = 7


def psnr(a: Num[Array, "B h w channels"], b: Num[Array, "B h w channels"]) -> Float[Array, " B"]:
    """Peak signal-to-noise ratio 10 log10(255^2 / mean squared error) of each pair, in dB.

    At most 100 dB, which a pair of identical images gets instead of infinity, so that a mean
    over images stays a number. (Bytes of 256 x 256 x 3 that differ at all reach 101.)

    Raises:
      ValueError: images of different shapes.
    """
    _check_pair(a, b)
    error = jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)).mean((1, 2, 3))
    return 10 * jnp.log10(DATA_RANGE**2 / jnp.maximum(error, _LEAST_ERROR))


def ssim(a: Num[Array, "B h w channels"], b: Num[Array, "B h w channels"]) -> Float[Array, " B"]:
    """Structural similarity of each pair, from -1 to 1, which identical images reach.

    As scikit-image's structural_similarity(data_range=255, channel_axis=-1), which LlamaGen
    reports: plain 7x7 windows wholly inside the image, sample (co)variances, K1 = 0.01 and
    K2 = 0.03, mean over windows and channels (Wang et al. 2004, equation 13).

    Raises:
      ValueError: images of different shapes, or below 7x7.
    """
    _check_pair(a, b)
    if min(a.shape[1:3]) < _WINDOW:
        raise ValueError(
            f"ssim: images of {a.shape[1]} x {a.shape[2]} are smaller than its window of "
            f"{_WINDOW} x {_WINDOW}; leave ssim out"
        )
    # Covariances do not change with the middle at 0, but fewer of their digits cancel.
    middle = (DATA_RANGE + 1) / 2
    x, y = a.astype(jnp.float32) - middle, b.astype(jnp.float32) - middle
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    count = _WINDOW**2
    covariance = lambda u, v, mean_u, mean_v: (
        (_window_mean(u * v) - mean_u * mean_v) * (count / (count - 1))
    )
    variance_x = covariance(x, x, mean_x, mean_x)
    variance_y = covariance(y, y, mean_y, mean_y)
    covariance_xy = covariance(x, y, mean_x, mean_y)
    mean_x, mean_y = mean_x + middle, mean_y + middle
    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance_xy + c2) / (variance_x + variance_y + c2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


def count_codes(codes: Int[Array, "*places"], codebook_size: int) -> Int32[Array, " V"]:
    """How often each code occurs; codes outside 0..codebook_size - 1 are not counted."""
    # A negative index would count from the end.
    codes = jnp.where(codes < 0, codebook_size, codes)
    return jnp.zeros(codebook_size, jnp.int32).at[codes].add(1, mode="drop")


def codebook_usage(counts: Integer[np.ndarray, " V"]) -> tuple[float, float]:
    """From how often each code was used: the share of codes used at all, and the perplexity
    exp(-sum p log p), from 1 (one code) to V (all alike).

    Raises:
      ValueError: nothing was counted.
    """
    counts = np.asarray(counts, np.float64)
    if not counts.sum() > 0:
        raise ValueError("counts: no code was counted; encode at least one image first")
    used = counts[counts > 0] / counts.sum()
    return len(used) / len(counts), float(np.exp(-np.sum(used * np.log(used))))


def _window_mean(x: Float[Array, "B h w channels"]) -> Float[Array, "B h2 w2 channels"]:
    """Mean of every 7x7 window that lies inside."""
    total = lambda x, window: jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1,) * 4, "VALID")
    return total(total(x, (1, _WINDOW, 1, 1)), (1, 1, _WINDOW, 1)) / _WINDOW**2


def _check_pair(a: Array, b: Array) -> None:
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(
            f"images to compare must both be (B, h, w, channels), got {a.shape} and {b.shape}"
        )
