"""The convolutions of VGG16 (Simonyan and Zisserman 2015, arXiv 1409.1556) as features."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from lasad_jax.interop.state_dicts import read_state_dict

# Input and output channels of each 3x3 convolution; a 2x2 pooling between groups.
GROUPS = (
    ((3, 64), (64, 64)),
    ((64, 128), (128, 128)),
    ((128, 256), (256, 256), (256, 256)),
    ((256, 512), (512, 512), (512, 512)),
    ((512, 512), (512, 512), (512, 512)),
)
SMALLEST_SIDE = 2 ** (len(GROUPS) - 1)


def vgg16_features(
    params: PyTree, images: Float[Array, "B h w 3"]
) -> list[Float[Array, "B r c D"]]:
    """Activations relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3.

    Args:
      params: from `load_vgg16`.
      images: normalised as VGG16 expects, at least 16 x 16; each pooling halves the sides and
        rounds down.
    """
    features, x = [], images
    for group in params:
        if features:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        for layer in group:
            x = jax.lax.conv_general_dilated(
                x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + layer["bias"])
        features.append(x)
    return features


def load_vgg16(path: str | Path) -> list[list[dict[str, Float[Array, "..."]]]]:
    """Reads the convolutions from torchvision's file, features.N.weight and features.N.bias.

    Returns:
      For each group a list of {"kernel" (3, 3, in, out), "bias" (out,)}, float32.

    Raises:
      FileNotFoundError, ImportError, ValueError: as `read_state_dict`, naming losses.vgg16.
    """
    names = _torchvision_names()
    layers = zip(itertools.chain(*names), itertools.chain(*GROUPS), strict=True)
    shapes = {}
    for name, (inputs, outputs) in layers:
        shapes |= {f"{name}.weight": (outputs, inputs, 3, 3), f"{name}.bias": (outputs,)}
    hint = "give torchvision's vgg16-397923af.pth, or the same as .safetensors"
    tensors = read_state_dict("losses.vgg16", path, shapes, hint)
    layer = lambda name: {
        "kernel": jnp.asarray(tensors[f"{name}.weight"].transpose(2, 3, 1, 0)),
        "bias": jnp.asarray(tensors[f"{name}.bias"]),
    }
    return [[layer(name) for name in group] for group in names]


def _torchvision_names() -> list[list[str]]:
    """features.N, counting a ReLU after each convolution and a pooling after each group."""
    names, index = [], 0
    for group in GROUPS:
        names.append([f"features.{index + 2 * i}" for i in range(len(group))])
        index += 2 * len(group) + 1
    return names
