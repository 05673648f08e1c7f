"""Images in MNIST's IDX file format."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from lasad_jax.config.sections import DataConfig
from lasad_jax.data.sources.base import ArraySource

_HINT = (
    "Debian's package dataset-fashion-mnist installs such files "
    "in /usr/share/datasets/fashion-mnist"
)


def open_idx(data: DataConfig, split: str, *, channels: int) -> ArraySource:
    """Images of the four files in which MNIST and Fashion-MNIST come, gzipped or not.

    The classes are 0 to the largest label of the split.

    Raises:
      ValueError: a file that is no whole IDX file.
      FileNotFoundError: no such folder, or a file missing from it.
    """
    directory = data.directory
    if not directory:
        raise FileNotFoundError(
            f'data.directory is empty, but data.source="idx" reads files; {_HINT}'
        )
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"data.directory is {directory!r}, which is no folder; {_HINT}")
    prefix = "train" if split == "train" else "t10k"
    image_path = _find_idx(folder, prefix, "images", 3)
    label_path = _find_idx(folder, prefix, "labels", 1)
    images = _read_idx(image_path, 3)[..., None]
    labels = _read_idx(label_path, 1).astype(np.int32)
    if len(images) != len(labels):
        raise ValueError(
            f"data.directory is {directory!r}: {image_path.name} holds {len(images)} images but "
            f"{label_path.name} {len(labels)} labels; take both from the same release"
        )
    if len(images) == 0:
        raise ValueError(f"data.directory is {directory!r}: {image_path.name} holds no images")
    class_names = tuple(str(label) for label in range(int(labels.max()) + 1))
    return ArraySource(images, labels, class_names, split, channels)


def _find_idx(folder: Path, prefix: str, kind: str, ndim: int) -> Path:
    names = [f"{prefix}-{kind}{mark}idx{ndim}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"data.directory is {str(folder)!r}, which holds none of {', '.join(names)}; {_HINT}"
    )


def _read_idx(path: Path, ndim: int) -> UInt8[np.ndarray, "..."]:
    """An IDX file of bytes: a magic number, `ndim` sizes (big-endian 32 bit), the bytes."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"data.directory holds {str(path)!r}, which does not unpack ({error}); fetch it again"
        ) from error
    magic = 0x0800 + ndim  # 08: unsigned bytes
    if content[:4] != struct.pack(">I", magic):
        raise ValueError(
            f"data.directory holds {str(path)!r}, which begins with {content[:4].hex()!r} and not "
            f"{magic:08x}, the mark of {ndim}-dimensional bytes in IDX form; fetch it again"
        )
    start = 4 + 4 * ndim
    shape = struct.unpack(f">{ndim}I", content[4:start]) if len(content) >= start else (0,)
    if len(content) != start + math.prod(shape):
        raise ValueError(
            f"data.directory holds {str(path)!r} with {len(content)} bytes where its header "
            f"announces {start + math.prod(shape)}: truncated or not IDX; fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
