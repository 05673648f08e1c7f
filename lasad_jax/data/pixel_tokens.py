"""Pixels as tokens: an image of one channel, its grey values rounded, is its own code grid."""

import numpy as np
from jaxtyping import Int32, Integer, UInt8


def quantize(images: UInt8[np.ndarray, "..."], levels: int) -> Int32[np.ndarray, "..."]:
    """Rounds bytes to `levels` evenly spaced values: token = round(x / 255 * (levels - 1)).

    Raises:
      ValueError: levels outside 2..256, or images that are not bytes.
    """
    _check_levels(levels)
    if images.dtype != np.uint8:
        raise ValueError(f"images must be uint8, got {images.dtype}; scale them to 0..255")
    return np.rint(np.arange(256) / 255 * (levels - 1)).astype(np.int32)[images]


def dequantize(tokens: Integer[np.ndarray, "..."], levels: int) -> UInt8[np.ndarray, "..."]:
    """The bytes that tokens stand for; `quantize` gives the tokens back.

    Raises:
      ValueError: levels outside 2..256, or a token outside 0..levels - 1.
    """
    _check_levels(levels)
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be integers, got {tokens.dtype}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < levels:
        raise ValueError(
            f"tokens run from {tokens.min()} to {tokens.max()}, but data.levels={levels} has "
            f"only 0 to {levels - 1}; use the levels that the tokens were made with"
        )
    return np.rint(np.arange(levels) / (levels - 1) * 255).astype(np.uint8)[tokens]


def images_to_tokens(
    images: UInt8[np.ndarray, "N R C 1"], levels: int
) -> Int32[np.ndarray, "N R*C"]:
    """Quantized pixels in raster order.

    Raises:
      ValueError: more than one channel, or what `quantize` refuses.
    """
    if images.ndim != 4 or images.shape[-1] != 1:
        raise ValueError(
            f"pixel tokens need images of shape (N, R, C, 1), one channel, got {images.shape}; "
            "convert colour to grey, or encode it with a tokenizer"
        )
    return quantize(images, levels).reshape(len(images), images.shape[1] * images.shape[2])


def tokens_to_images(
    tokens: Integer[np.ndarray, "N L"], grid: tuple[int, int], levels: int
) -> UInt8[np.ndarray, "N R C 1"]:
    """Images from raster-order tokens on a grid (R, C); undoes `images_to_tokens`.

    Raises:
      ValueError: tokens that do not fill the grid, or what `dequantize` refuses.
    """
    rows, columns = grid
    if tokens.ndim != 2 or tokens.shape[1] != rows * columns:
        raise ValueError(
            f"a grid of {rows} x {columns} takes tokens of shape (N, {rows * columns}), "
            f"got {tokens.shape}"
        )
    return dequantize(tokens, levels).reshape(len(tokens), rows, columns, 1)


class PixelCodec:
    """Images and their quantised pixels; the tokenizer's counterpart for small grey images.

    Attributes:
      levels: grey levels of a pixel.
    """

    def __init__(self, levels: int):
        self.levels = levels

    def encode(self, images: UInt8[np.ndarray, "N R C 1"]) -> Int32[np.ndarray, "N R*C"]:
        """As `images_to_tokens`."""
        return images_to_tokens(images, self.levels)

    def decode(
        self, tokens: Integer[np.ndarray, "N L"], grid: tuple[int, int]
    ) -> UInt8[np.ndarray, "N R C 1"]:
        """As `tokens_to_images`."""
        return tokens_to_images(tokens, grid, self.levels)


def _check_levels(levels: int) -> None:
    if not 2 <= levels <= 256:
        raise ValueError(f"data.levels is {levels}; a byte has 2 to 256 levels")
