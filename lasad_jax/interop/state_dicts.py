"""Tensors by name from PyTorch's own files or from safetensors."""

import argparse
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import safetensors
from jaxtyping import Float32

Tensors = dict[str, Float32[np.ndarray, "..."]]
Shapes = dict[str, tuple[int, ...]]

_WRAPPERS = ("ema", "model", "state_dict")


def read_tensors(
    field: str, path: str | Path, hint: str, names: Collection[str] | None = None
) -> tuple[Tensors, dict[str, str]]:
    """Reads the tensors of a file.

    Args:
      field: of the configuration that names the file, for messages.
      path: ending in .safetensors, or else written by torch.save, which takes torch to read:
        a state dict by itself, or under "ema", "model" or "state_dict" (in this order, as in
        LlamaGen's checkpoints).
      hint: what to do instead, for messages.
      names: the tensors to read where there are more; all by default.

    Returns:
      The tensors, float32, and the metadata of a safetensors file.

    Raises:
      FileNotFoundError: no such file.
      ImportError: a torch file without torch installed.
      ValueError: a file that cannot be read or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{field}: there is no file {path}; {hint}")
    read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
    try:
        return read(path, names)
    except ImportError as error:
        raise ImportError(
            f"{field}: {path} is a torch file, which needs torch (pip install torch); "
            "a .safetensors file needs none"
        ) from error
    except Exception as error:  # whatever unpickling meets in a broken file
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{field}: {path} cannot be read as tensors ({reason}); {hint}") from error


def read_state_dict(field: str, path: str | Path, shapes: Shapes, hint: str) -> Tensors:
    """Reads the tensors in `shapes`, passes over all others, and checks what it read.

    Raises:
      FileNotFoundError, ImportError, ValueError: as `read_tensors`; a tensor missing or of
        another shape.
    """
    tensors, _ = read_tensors(field, path, hint, shapes)
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"{field}: {path} holds no tensor {name!r}; {hint}")
        if tensors[name].shape != shape:
            raise ValueError(
                f"{field}: {name!r} in {path} has shape {tensors[name].shape}, not {shape}; {hint}"
            )
    return tensors


def check_shapes(field: str, source: str | Path, shapes: Shapes, tensors: Mapping) -> None:
    """Refuses tensors that are not exactly those in `shapes`.

    Raises:
      ValueError: as `refuse`.
    """
    refuse(
        field,
        source,
        [f"{name} is missing" for name in shapes if name not in tensors]
        + [f"{name} is extra" for name in tensors if name not in shapes]
        + [
            f"{name} has shape {tensors[name].shape}, expected {shape}"
            for name, shape in shapes.items()
            if name in tensors and tensors[name].shape != shape
        ],
    )


def refuse(field: str, source: str | Path, problems: list[str]) -> None:
    """Raises one ValueError for all problems, if any; it names the first few."""
    if problems:
        more = "; ..." if len(problems) > 3 else ""
        raise ValueError(
            f"{field}: {len(problems)} tensors of {source} do not fit: "
            f"{'; '.join(problems[:3])}{more}"
        )


def _read_safetensors(path: Path, names: Collection[str] | None) -> tuple[Tensors, dict[str, str]]:
    with safetensors.safe_open(path, "numpy") as file:
        present = [name for name in file.keys() if names is None or name in names]  # noqa: SIM118
        tensors = {name: np.asarray(file.get_tensor(name), np.float32) for name in present}
        return tensors, file.metadata() or {}


def _read_torch(path: Path, names: Collection[str] | None) -> tuple[Tensors, dict[str, str]]:
    # Imported here: nothing else needs torch.
    import torch

    # A checkpoint of LlamaGen's training holds its arguments too.
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, map_location="cpu", weights_only=True)
    content = content if isinstance(content, dict) else {}
    wrapped = (content[key] for key in _WRAPPERS if isinstance(content.get(key), dict))
    content = next(wrapped, content)
    if not content or not all(isinstance(x, torch.Tensor) for x in content.values()):
        raise ValueError(f"it holds no state dict, neither by itself nor under {_WRAPPERS}")
    present = [name for name in content if names is None or name in names]
    return {str(name): content[name].to(torch.float32).numpy() for name in present}, {}
