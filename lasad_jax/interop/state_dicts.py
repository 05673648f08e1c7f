"""Tensors by name from PyTorch's own files or from safetensors."""

from pathlib import Path

import numpy as np
import safetensors
from jaxtyping import Float32

Tensors = dict[str, Float32[np.ndarray, "..."]]
Shapes = dict[str, tuple[int, ...]]


def read_state_dict(field: str, path: str | Path, shapes: Shapes, hint: str) -> Tensors:
    """Reads some tensors of a file, and passes over all others.

    Args:
      field: of the configuration that names the file, for messages.
      path: ending in .safetensors, or else a state dict written by torch.save, for which
        torch must be installed.
      shapes: the tensors to read.
      hint: which file to give instead, for messages.

    Returns:
      The tensors in `shapes`, float32.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file that cannot be read, a tensor missing or of another shape, no torch.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{field}: {str(path)!r} is no file; {hint}")
    try:
        if path.suffix == ".safetensors":
            tensors = _read_safetensors(path, shapes)
        else:
            tensors = _read_torch(path, shapes)
    except ImportError as error:
        raise ValueError(
            f"{field}: {str(path)!r} is read by torch, which is not installed; "
            "pip install torch, or convert the file to .safetensors"
        ) from error
    except Exception as error:  # whatever unpickling meets in a broken file
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{field}: {str(path)!r} cannot be read as a state dict ({reason}); {hint}"
        ) from error
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"{field}: {str(path)!r} holds no tensor {name!r}; {hint}")
        if tensors[name].shape != shape:
            raise ValueError(
                f"{field}: {name!r} in {str(path)!r} has shape {tensors[name].shape}, not "
                f"{shape}; {hint}"
            )
    return tensors


def _read_safetensors(path: Path, names: Shapes) -> Tensors:
    with safetensors.safe_open(path, "numpy") as file:
        present = names.keys() & set(file.keys())
        return {name: np.asarray(file.get_tensor(name), np.float32) for name in present}


def _read_torch(path: Path, names: Shapes) -> Tensors:
    # Imported here: nothing else needs torch.
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True)
    present = names.keys() & content.keys()
    return {name: content[name].to(torch.float32).numpy() for name in present}
