"""LPIPS with VGG16: how different two images look (Zhang et al. 2018, arXiv 1801.03924)."""

from pathlib import Path

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from lasad_jax.interop.state_dicts import read_state_dict
from lasad_jax.models.vgg16 import GROUPS, SMALLEST_SIDE, load_vgg16, vgg16_features

_EPSILON = 1e-10
# LPIPS's own rounding of ImageNet's mean and deviation, for values in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


def lpips(
    params: PyTree, a: Float[Array, "B h w channels"], b: Float[Array, "B h w channels"]
) -> Float[Array, " B"]:
    """The perceptual distance of each pair, 0 for equal images.

    The squared difference of VGG16's features, each place's made a unit vector, weighed by
    channel, as a mean over places and a sum over five depths (equation 1). In float32; a GPU
    multiplies in TF32, as PyTorch's convolutions do.

    Args:
      params: from `load_lpips`.
      a, b: values in [-1, 1], 3 channels or 1, which is repeated; at least 16 x 16 pixels.

    Raises:
      ValueError: images of different shapes, of other channels, or too small.
    """
    if a.ndim != 4 or a.shape != b.shape or a.shape[-1] not in (1, 3):
        raise ValueError(
            f"lpips: both images must be (B, h, w, 1 or 3), got {a.shape} and {b.shape}"
        )
    check_perceptual(a.shape[1:3])
    # Two passes and not one of both: training needs no gradient of the original.
    features = zip(*(vgg16_features(params["vgg16"], _normalize(x)) for x in (a, b)), strict=True)
    total = jnp.zeros(len(a))
    for weights, (x, y) in zip(params["weights"], features, strict=True):
        difference = jnp.square(_unit(x) - _unit(y))
        total += jnp.mean(jnp.sum(difference * weights, -1), axis=(1, 2))
    return total


def check_perceptual(image_size: tuple[int, int]) -> None:
    """Refuses images (rows, columns) that VGG16's poolings would leave nothing of.

    Raises:
      ValueError: names losses.perceptual_weight and what to do.
    """
    if min(image_size) < SMALLEST_SIDE:
        raise ValueError(
            f"losses.perceptual_weight: LPIPS needs images of at least {SMALLEST_SIDE} pixels a "
            f"side, but these are {image_size[0]} x {image_size[1]}; set it to 0"
        )


def load_lpips(vgg16_path: str | Path, lpips_path: str | Path = "") -> PyTree:
    """Reads VGG16's convolutions and LPIPS's weights of its channels.

    Args:
      vgg16_path: torchvision's VGG16, .safetensors or .pth (which needs torch).
      lpips_path: LPIPS's own file, in either format, with tensors lin0.model.1.weight to
        lin4.model.1.weight. "" weighs a layer's channels equally, 1 / channels each: a
        perceptual distance, but not comparable with published LPIPS.

    Returns:
      What `lpips` takes, float32: "vgg16", see `load_vgg16`, and "weights", a list of
      (channels,) for each depth.

    Raises:
      FileNotFoundError, ImportError, ValueError: as `read_state_dict`, naming losses.vgg16
        or losses.lpips.
    """
    return {"vgg16": load_vgg16(vgg16_path), "weights": _load_weights(lpips_path)}


def _load_weights(path: str | Path) -> list[Float[Array, " D"]]:
    channels = [group[-1][1] for group in GROUPS]
    if not str(path):
        return [jnp.full(count, 1 / count) for count in channels]
    shapes = {f"lin{i}.model.1.weight": (1, count, 1, 1) for i, count in enumerate(channels)}
    hint = "give LPIPS's lpips/weights/v0.1/vgg.pth, or the same as .safetensors"
    tensors = read_state_dict("losses.lpips", path, shapes, hint)
    return [jnp.asarray(tensors[name].reshape(-1)) for name in shapes]


def _normalize(images: Float[Array, "B h w channels"]) -> Float[Array, "B h w 3"]:
    """From [-1, 1] to about mean 0 and variance 1, in three channels."""
    return (images.astype(jnp.float32) - jnp.array(_SHIFT)) / jnp.array(_SCALE)


def _unit(x: Float[Array, "B r c D"]) -> Float[Array, "B r c D"]:
    """x / (|x| + 1e-10) over channels; where x is 0, so are the result and its gradient."""
    square = jnp.sum(jnp.square(x), -1, keepdims=True)
    is_zero = square == 0  # where the square root has no gradient
    norm = jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, square)))
    return x / (norm + _EPSILON)
