"""The Inception network of FID: Inception v3 as released by Google on 2015-12-05.

Szegedy et al. 2015 (arXiv 1512.00567), with the ways of that release: average pools count no
padding, the last block pools by the maximum, images are resized as TensorFlow 1 did, and the
head has 1008 classes. Modules bear the names of the weights in PyTorch's files of it, see
`lasad_jax.interop.inception_files`; batch norms are folded into the convolutions.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, PyTree, UInt8

from lasad_jax.evaluation.features import Features

SIDE = 299
NUM_CLASSES = 1008
# The sFID of ADM's evaluator: mixed_6/conv:0 at 17 x 17 places, its first 7 channels.
SPATIAL_CHANNELS = 7

# Features are compared with statistics made elsewhere: no TF32 or bfloat16 products.
_EXACT = jax.lax.Precision.HIGHEST

Map = Float[Array, "B r c D"]


def inception_features(params: PyTree, images: UInt8[Array, "B h w channels"]) -> Features:
    """What ADM's evaluator (openai/guided-diffusion, evaluations/evaluator.py) sees of images.

    Args:
      params: from `load_inception`.
      images: values 0 to 255, uint8, of any size; 3 channels, or 1, which is repeated.

    Returns:
      `pooled` (B, 2048), its pool_3. `spatial` (B, 2023), its mixed_6/conv: the 1x1 branch of
      Mixed_6d after batch norm and ReLU, first 7 of 192 channels, flattened from (17, 17, 7).
      `logits` (B, 1008), of its softmax: `pooled` times the head's weights, without the bias.
      All float32.

    Raises:
      ValueError: images of another dtype or shape.
    """
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            "images: Inception takes (B, h, w, 1 or 3) of uint8, values 0 to 255, got "
            f"{images.shape} of {images.dtype}"
        )
    x = (resize(images.astype(jnp.float32)) - 128) / 128
    x = jnp.broadcast_to(x, (*x.shape[:-1], 3))
    return Inception().apply({"params": params}, x)


def resize(images: Float[Array, "B h w channels"], side: int = SIDE) -> Map:
    """Bilinear, as TensorFlow 1's resize_bilinear(align_corners=False).

    Place i of the result lies at i * size / side of the image: corners meet at the top left,
    not at the bottom right, and nothing is averaged when shrinking.
    """
    for axis in (2, 1):  # in the original's order
        low, high, fraction = _neighbours(images.shape[axis], side)
        shape = [1] * images.ndim
        shape[axis] = side
        a, b = jnp.take(images, low, axis), jnp.take(images, high, axis)
        images = a + (b - a) * fraction.reshape(shape)
    return images


def _neighbours(size: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the pixels on either side of each place, and how far it is to the second."""
    # In float32, like the original: rounding decides between neighbours.
    place = np.arange(side, dtype=np.float32) * (np.float32(size) / np.float32(side))
    low = place.astype(np.int32)
    return low, np.minimum(low + 1, size - 1), place - low.astype(np.float32)


class Inception(nn.Module):
    """From images (B, 299, 299, 3) in [-1, 1] to `Features`."""

    @nn.compact
    def __call__(self, images: Map) -> Features:
        x = _conv("Conv2d_1a_3x3", 32, (3, 3), images, stride=2)
        x = _conv("Conv2d_2a_3x3", 32, (3, 3), x, padding="VALID")
        x = _conv("Conv2d_2b_3x3", 64, (3, 3), x)
        x = _shrink(x)
        x = _conv("Conv2d_3b_1x1", 80, (1, 1), x)
        x = _conv("Conv2d_4a_3x3", 192, (3, 3), x, padding="VALID")
        x = _shrink(x)  # (B, 35, 35, 192)
        x = BlockA(32, name="Mixed_5b")(x)
        x = BlockA(64, name="Mixed_5c")(x)
        x = BlockA(64, name="Mixed_5d")(x)
        x = BlockB(name="Mixed_6a")(x)  # (B, 17, 17, 768)
        x = BlockC(128, name="Mixed_6b")(x)
        x = BlockC(160, name="Mixed_6c")(x)
        x = BlockC(160, name="Mixed_6d")(x)
        # The 1x1 branch is the first of the block's.
        spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
        x = BlockC(192, name="Mixed_6e")(x)
        x = BlockD(name="Mixed_7a")(x)  # (B, 8, 8, 1280)
        x = BlockE(_average, name="Mixed_7b")(x)
        x = BlockE(_largest, name="Mixed_7c")(x)  # (B, 8, 8, 2048)
        pooled = jnp.mean(x, axis=(1, 2))
        logits = nn.Dense(NUM_CLASSES, use_bias=False, precision=_EXACT, name="fc")(pooled)
        return Features(pooled, spatial, logits)


class BlockA(nn.Module):
    """Places stay; 224 + `pool_channels` channels."""

    pool_channels: int

    @nn.compact
    def __call__(self, x: Map) -> Map:
        one = _conv("branch1x1", 64, (1, 1), x)
        five = _conv("branch5x5_1", 48, (1, 1), x)
        five = _conv("branch5x5_2", 64, (5, 5), five)
        three = _conv("branch3x3dbl_1", 64, (1, 1), x)
        three = _conv("branch3x3dbl_2", 96, (3, 3), three)
        three = _conv("branch3x3dbl_3", 96, (3, 3), three)
        pool = _conv("branch_pool", self.pool_channels, (1, 1), _average(x))
        return jnp.concatenate([one, five, three, pool], -1)


class BlockB(nn.Module):
    """Halves the sides; adds 480 channels."""

    @nn.compact
    def __call__(self, x: Map) -> Map:
        three = _conv("branch3x3", 384, (3, 3), x, stride=2)
        double = _conv("branch3x3dbl_1", 64, (1, 1), x)
        double = _conv("branch3x3dbl_2", 96, (3, 3), double)
        double = _conv("branch3x3dbl_3", 96, (3, 3), double, stride=2)
        return jnp.concatenate([three, double, _shrink(x)], -1)


class BlockC(nn.Module):
    """Places stay; 768 channels, by way of `channels` within the branches."""

    channels: int

    @nn.compact
    def __call__(self, x: Map) -> Map:
        one = _conv("branch1x1", 192, (1, 1), x)
        seven = _conv("branch7x7_1", self.channels, (1, 1), x)
        seven = _conv("branch7x7_2", self.channels, (1, 7), seven)
        seven = _conv("branch7x7_3", 192, (7, 1), seven)
        double = _conv("branch7x7dbl_1", self.channels, (1, 1), x)
        double = _conv("branch7x7dbl_2", self.channels, (7, 1), double)
        double = _conv("branch7x7dbl_3", self.channels, (1, 7), double)
        double = _conv("branch7x7dbl_4", self.channels, (7, 1), double)
        double = _conv("branch7x7dbl_5", 192, (1, 7), double)
        pool = _conv("branch_pool", 192, (1, 1), _average(x))
        return jnp.concatenate([one, seven, double, pool], -1)


class BlockD(nn.Module):
    """Halves the sides; adds 512 channels."""

    @nn.compact
    def __call__(self, x: Map) -> Map:
        three = _conv("branch3x3_1", 192, (1, 1), x)
        three = _conv("branch3x3_2", 320, (3, 3), three, stride=2)
        seven = _conv("branch7x7x3_1", 192, (1, 1), x)
        seven = _conv("branch7x7x3_2", 192, (1, 7), seven)
        seven = _conv("branch7x7x3_3", 192, (7, 1), seven)
        seven = _conv("branch7x7x3_4", 192, (3, 3), seven, stride=2)
        return jnp.concatenate([three, seven, _shrink(x)], -1)


class BlockE(nn.Module):
    """Places stay; 2048 channels.

    Attributes:
      pool: of the branch that pools.
    """

    pool: Callable[[Map], Map]

    @nn.compact
    def __call__(self, x: Map) -> Map:
        one = _conv("branch1x1", 320, (1, 1), x)
        three = _conv("branch3x3_1", 384, (1, 1), x)
        three_wide = _conv("branch3x3_2a", 384, (1, 3), three)
        three_high = _conv("branch3x3_2b", 384, (3, 1), three)
        double = _conv("branch3x3dbl_1", 448, (1, 1), x)
        double = _conv("branch3x3dbl_2", 384, (3, 3), double)
        double_wide = _conv("branch3x3dbl_3a", 384, (1, 3), double)
        double_high = _conv("branch3x3dbl_3b", 384, (3, 1), double)
        pool = _conv("branch_pool", 192, (1, 1), self.pool(x))
        return jnp.concatenate([one, three_wide, three_high, double_wide, double_high, pool], -1)


def _conv(
    name: str,
    channels: int,
    kernel: tuple[int, int],
    x: Map,
    *,
    stride: int = 1,
    padding: str = "SAME",
) -> Map:
    """A convolution with ReLU; those with a stride keep within the image."""
    padding = padding if stride == 1 else "VALID"
    conv = nn.Conv(channels, kernel, (stride, stride), padding=padding, precision=_EXACT, name=name)
    return nn.relu(conv(x))


def _shrink(x: Map) -> Map:
    return nn.max_pool(x, (3, 3), (2, 2), "VALID")


def _largest(x: Map) -> Map:
    return nn.max_pool(x, (3, 3), (1, 1), "SAME")


def _average(x: Map) -> Map:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
