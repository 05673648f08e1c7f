"""LPIPS with VGG16: how different two images look (Zhang et al. 2018, arXiv 1801.03924)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

# Convolutions (input and output channels) between VGG16's poolings; features are taken
# after the last ReLU of each group: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3.
VGG16_GROUPS = (
    ((3, 64), (64, 64)),
    ((64, 128), (128, 128)),
    ((128, 256), (256, 256), (256, 256)),
    ((256, 512), (512, 512), (512, 512)),
    ((512, 512), (512, 512), (512, 512)),
)
_SMALLEST_SIDE = 2 ** (len(VGG16_GROUPS) - 1)
_EPSILON = 1e-10
# From [-1, 1] to ImageNet's mean 0 and variance 1.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


def lpips(
    params: PyTree, a: Float[Array, "B h w channels"], b: Float[Array, "B h w channels"]
) -> Float[Array, " B"]:
    """The perceptual distance of each pair: 0 for equal images, about 1 for unrelated ones.

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
    total = jnp.zeros(len(a))
    # Apart and not as one batch: training needs no gradient of the image itself.
    features = zip(_features(params, a), _features(params, b), strict=True)
    for weights, (x, y) in zip(params["weights"], features, strict=True):
        difference = jnp.square(_unit(x) - _unit(y))
        total += jnp.mean(jnp.sum(difference * weights, -1), axis=(1, 2))
    return total


def check_perceptual(image_size: tuple[int, int]) -> None:
    """Refuses images (rows, columns) that VGG16's poolings would leave nothing of.

    Raises:
      ValueError: names losses.perceptual_weight and what to do.
    """
    if min(image_size) < _SMALLEST_SIDE:
        raise ValueError(
            f"losses.perceptual_weight: LPIPS needs images of at least {_SMALLEST_SIDE} pixels a "
            f"side, but these are {image_size[0]} x {image_size[1]}; set it to 0"
        )


def _features(
    params: PyTree, images: Float[Array, "B h w channels"]
) -> list[Float[Array, "B r c D"]]:
    images = jnp.broadcast_to(images.astype(jnp.float32), (*images.shape[:-1], 3))
    x = (images - jnp.array(_SHIFT)) / jnp.array(_SCALE)
    features = []
    for group in params["vgg16"]:
        if features:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        for layer in group:
            x = jax.lax.conv_general_dilated(
                x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + layer["bias"])
        features.append(x)
    return features


def _unit(x: Float[Array, "B r c D"]) -> Float[Array, "B r c D"]:
    """x / (|x| + 1e-10) over channels; where x is 0, so are the result and its gradient."""
    square = jnp.sum(jnp.square(x), -1, keepdims=True)
    is_zero = square == 0  # where the square root has no gradient
    norm = jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, square)))
    return x / (norm + _EPSILON)
