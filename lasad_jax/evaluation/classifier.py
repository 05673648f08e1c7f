"""A small residual network whose features compare images where Inception's mean nothing.

Such as grey digits of 8 x 8 or clip art of 64 x 64. `fit_classifier` trains it on the data
set itself. Everything is computed in float32.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Integer, PyTree, UInt8

from lasad_jax.evaluation.features import Features

SMALLEST_SIDE = 8
SPATIAL_CHANNELS = 7
LARGEST_GRID = 7
_GROUPS = 8


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What shapes a `Classifier`.

    Attributes:
      image_shape: rows, columns and channels of the images.
      num_classes: of the head, K.
      stride: of the first convolution.
      widths: channels of each residual block; every block after the first halves both sides.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    stride: int
    widths: tuple[int, ...]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the spatial features, at most 7 x 7."""
        rows, columns, _ = self.image_shape
        halved = (-(-side // (2 * self.stride)) for side in (rows, columns))
        return tuple(min(side, LARGEST_GRID) for side in halved)


def choose_architecture(image_shape: tuple[int, int, int], num_classes: int) -> Architecture:
    """The network for images of a shape; meant for sides of 8 to 64 pixels.

    Raises:
      ValueError: sides below 8 pixels, channels other than 1 or 3, or fewer than two classes.
    """
    rows, columns, channels = image_shape
    side = min(rows, columns)
    if side < SMALLEST_SIDE:
        raise ValueError(
            f"classifier: images of {rows} x {columns} are too small to tell much by; "
            f"it needs at least {SMALLEST_SIDE} pixels a side"
        )
    if channels not in (1, 3):
        raise ValueError(f"classifier: images must have 1 or 3 channels, got {channels}")
    if num_classes < 2:
        raise ValueError(
            f"classifier: there is nothing to tell apart among {num_classes} classes; it needs "
            "images of at least two"
        )
    widths = (32, 64) if side < 16 else (32, 64, 128)
    return Architecture((rows, columns, channels), num_classes, 1 if side < 48 else 2, widths)


class Classifier(nn.Module):
    """A pre-activation residual network (He et al. 2016, arXiv 1603.05027).

    With group norm (Wu and He 2018, arXiv 1803.08494), so that an image's features do not
    depend on the others of its batch, nor on whether the network is being trained.

    Images (B, rows, columns, channels) of the architecture's shape, uint8, become `Features`:
    pooled (B, D), D the last of `widths`; spatial (B, S), S the places of `grid` times 7
    channels of the middle block; logits (B, num_classes).
    """

    architecture: Architecture

    @nn.compact
    def __call__(self, images: UInt8[Array, "B h w channels"]) -> Features:
        stride, widths = self.architecture.stride, self.architecture.widths
        x = images.astype(jnp.float32) / 127.5 - 1
        x = _conv(widths[0], 3, stride, "stem")(x)
        for index, width in enumerate(widths):
            x = _Block(width, stride=1 if index == 0 else 2, name=f"block_{index}")(x)
            if index == (len(widths) - 1) // 2:
                spatial = _pool(x[..., :SPATIAL_CHANNELS], self.architecture.grid)
        pooled = jnp.mean(_norm_relu("norm", x), axis=(1, 2))
        head = nn.Dense(
            self.architecture.num_classes, precision=jax.lax.Precision.HIGHEST, name="head"
        )
        return Features(pooled, spatial.reshape(len(spatial), -1), head(pooled))


class _Block(nn.Module):
    width: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "B R C D"]) -> Float[Array, "B r c width"]:
        y = _norm_relu("norm_1", x)
        if self.stride > 1 or x.shape[-1] != self.width:
            x = _conv(self.width, 1, self.stride, "shortcut")(y)
        y = _conv(self.width, 3, self.stride, "conv_1")(y)
        return x + _conv(self.width, 3, 1, "conv_2")(_norm_relu("norm_2", y))


def _conv(width: int, size: int, stride: int, name: str) -> nn.Conv:
    return nn.Conv(
        width,
        (size, size),
        stride,
        # float32 stays float32, where a GPU would take TF32.
        precision=jax.lax.Precision.HIGHEST,
        name=name,
    )


def _norm_relu(name: str, x: Float[Array, "B R C D"]) -> Float[Array, "B R C D"]:
    return nn.relu(nn.GroupNorm(_GROUPS, use_fast_variance=False, name=name)(x))


def _pool(x: Float[Array, "B R C D"], grid: tuple[int, int]) -> Float[Array, "B r c D"]:
    """Means over `grid` boxes that cover the rows and columns evenly; neighbours may overlap."""
    rows, columns = (_boxes(side, count) for side, count in zip(x.shape[1:3], grid, strict=True))
    return jnp.einsum("rR,BRCD,cC->BrcD", rows, x, columns, precision=jax.lax.Precision.HIGHEST)


def _boxes(side: int, count: int) -> Float[np.ndarray, "count side"]:
    """Row i averages places floor(i * side / count) to ceil((i + 1) * side / count) - 1."""
    boxes = np.zeros((count, side), np.float32)
    for i in range(count):
        box = slice(i * side // count, math.ceil((i + 1) * side / count))
        boxes[i, box] = 1 / (box.stop - box.start)
    return boxes


def init_classifier(architecture: Architecture, key: Array) -> PyTree[Float[Array, "..."]]:
    """Parameters of a `Classifier` before training."""
    images = jnp.zeros((1, *architecture.image_shape), jnp.uint8)
    return Classifier(architecture).init(key, images)["params"]


def classifier_features(
    architecture: Architecture, params: PyTree, images: UInt8[Array, "B h w channels"]
) -> Features:
    """The features of images, see `Classifier`.

    Raises:
      ValueError: images that are not uint8 or not of the architecture's shape.
    """
    if images.dtype != jnp.uint8 or images.shape[1:] != architecture.image_shape:
        raise ValueError(
            f"classifier: images must be uint8 of shape (B, {_list(architecture.image_shape)}), "
            f"got {images.dtype} of shape {images.shape}; compare images of the data set that the "
            "classifier was trained on"
        )
    return Classifier(architecture).apply({"params": params}, images)


def class_agreement(logits: Float[np.ndarray, "N K"], labels: Integer[np.ndarray, " N"]) -> float:
    """The share of images whose largest logit is that of the class asked for.

    Raises:
      ValueError: labels that are not one integer in 0 to K - 1 for each image, or no image.
    """
    if logits.ndim != 2 or len(logits) == 0:
        raise ValueError(f"logits must have shape (N, K), N > 0, got {logits.shape}")
    if labels.shape != logits.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be integers of shape ({len(logits)},), one an image, "
            f"got {labels.dtype} of shape {labels.shape}"
        )
    if unknown := [
        label for label in (labels.min(), labels.max()) if not 0 <= label < logits.shape[1]
    ]:
        raise ValueError(
            f"labels hold class {unknown[0]}, but the classifier knows 0 to "
            f"{logits.shape[1] - 1}; compare with the data set that it was trained on"
        )
    return float(np.mean(np.argmax(logits, axis=1) == labels))


def _list(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
