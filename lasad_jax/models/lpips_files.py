"""LPIPS's parameters from the files in which torchvision and LPIPS publish them."""

import itertools
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors
from jaxtyping import Array, Float, PyTree

from lasad_jax.models.lpips import VGG16_GROUPS

Tensors = Mapping[str, np.ndarray]

_VGG16_FIELD, _LPIPS_FIELD = "losses.vgg16", "losses.lpips"
_VGG16_HINT = "give torchvision's vgg16-397923af.pth, or the same as .safetensors"
_LPIPS_HINT = "give LPIPS's lpips/weights/v0.1/vgg.pth, or the same as .safetensors"


def load_lpips(vgg16_path: str | Path, lpips_path: str | Path = "") -> PyTree:
    """Reads VGG16's convolutions and LPIPS's weights of its channels.

    Args:
      vgg16_path: torchvision's VGG16, tensors features.N.weight and .bias; others, of the
        classifier, are passed over. A .safetensors file, or else one of torch.save, which
        needs torch.
      lpips_path: LPIPS's own file, tensors lin0.model.1.weight to lin4.model.1.weight, in
        either format. "" weighs a layer's channels equally, 1 / channels each: a perceptual
        distance, but not comparable with published LPIPS.

    Returns:
      What `lpips` takes, float32: "vgg16", a list of groups of {"kernel" (3, 3, in, out),
      "bias" (out,)}; "weights", a list of (channels,).

    Raises:
      FileNotFoundError: no such file.
      ValueError: an unreadable file, a tensor missing or of another shape, no torch. Like the
        other it names the field, losses.vgg16 or losses.lpips.
    """
    return {
        "vgg16": _convolutions(Path(vgg16_path)),
        "weights": _channel_weights(Path(lpips_path) if str(lpips_path) else None),
    }


def _convolutions(path: Path) -> list[list[dict[str, Float[Array, "..."]]]]:
    names = iter(_convolution_names())
    shapes = {}
    for inputs, outputs in itertools.chain(*VGG16_GROUPS):
        name = next(names)
        shapes |= {f"{name}.weight": (outputs, inputs, 3, 3), f"{name}.bias": (outputs,)}
    tensors = _read(_VGG16_FIELD, path, shapes, _VGG16_HINT)
    names = iter(_convolution_names())
    load = lambda name: {
        "kernel": jnp.asarray(tensors[f"{name}.weight"].transpose(2, 3, 1, 0)),
        "bias": jnp.asarray(tensors[f"{name}.bias"]),
    }
    return [[load(next(names)) for _ in group] for group in VGG16_GROUPS]


def _convolution_names() -> list[str]:
    """features.N as torchvision numbers them: a ReLU after each convolution, a pooling after
    each group."""
    names, index = [], 0
    for group in VGG16_GROUPS:
        names += [f"features.{index + 2 * i}" for i in range(len(group))]
        index += 2 * len(group) + 1
    return names


def _channel_weights(path: Path | None) -> list[Float[Array, " D"]]:
    channels = [group[-1][1] for group in VGG16_GROUPS]
    if path is None:
        return [jnp.full(count, 1 / count) for count in channels]
    shapes = {f"lin{i}.model.1.weight": (1, count, 1, 1) for i, count in enumerate(channels)}
    tensors = _read(_LPIPS_FIELD, path, shapes, _LPIPS_HINT)
    return [jnp.asarray(tensors[name].reshape(-1)) for name in shapes]


def _read(field: str, path: Path, shapes: dict[str, tuple[int, ...]], hint: str) -> Tensors:
    """The tensors named in `shapes`, float32, after checking that they have these shapes."""
    if not path.is_file():
        raise FileNotFoundError(f"{field}: {str(path)!r} is no file; {hint}")
    read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
    tensors = read(field, path, list(shapes), hint)
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"{field}: {str(path)!r} holds no tensor {name}; {hint}")
        if tensors[name].shape != shape:
            raise ValueError(
                f"{field}: {name} in {str(path)!r} has shape {tensors[name].shape}, not {shape}; "
                f"{hint}"
            )
    return tensors


def _read_safetensors(field: str, path: Path, names: list[str], hint: str) -> Tensors:
    try:
        with safetensors.safe_open(path, "numpy") as file:
            present = set(file.keys())
            return {n: np.asarray(file.get_tensor(n), np.float32) for n in names if n in present}
    except (safetensors.SafetensorError, TypeError) as error:  # TypeError: bfloat16
        raise ValueError(
            f"{field}: {str(path)!r} cannot be read as float32 safetensors ({error}); {hint}"
        ) from error


def _read_torch(field: str, path: Path, names: list[str], hint: str) -> Tensors:
    try:
        # Imported here: the library itself needs no torch.
        import torch
    except ImportError as error:
        raise ValueError(
            f"{field}: {str(path)!r} is read by torch, which is not installed; "
            "pip install torch, or convert the file to .safetensors"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {n: content[n].to(torch.float32).numpy() for n in names if n in content}
    except Exception as error:  # whatever unpickling meets in a broken file
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{field}: {str(path)!r} cannot be read as a state dict of torch ({reason}); {hint}"
        ) from error
