"""Images in MNIST's IDX file format."""

import gzip
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from lasad_jax.config.sections import DataConfig
from lasad_jax.data.sources.base import ArraySource

_HINT = (
    "Debian's package dataset-fashion-mnist installs such files "
    "in /usr/share/datasets/fashion-mnist, and python -m lasad_jax.render_characters draws some"
)
_PREFIXES = {"train": "train", "test": "t10k"}
_UNSIGNED_BYTES = 0x0800  # and the number of dimensions: an IDX file's first four bytes
_NAMES_FILE = "class_names.txt"


def open_idx(data: DataConfig, split: str, *, channels: int) -> ArraySource:
    """Images of the four files in which MNIST and Fashion-MNIST come, gzipped or not.

    The classes are 0 to the largest label of the split, or as many as a file class_names.txt
    beside them has lines, which are their names.

    Raises:
      ValueError: a file that is no whole IDX file, or a class without a name.
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
    image_path = _find_idx(folder, _PREFIXES[split], "images", 3)
    label_path = _find_idx(folder, _PREFIXES[split], "labels", 1)
    images = _read_idx(image_path, 3)[..., None]
    labels = _read_idx(label_path, 1).astype(np.int32)
    if len(images) != len(labels):
        raise ValueError(
            f"data.directory is {directory!r}: {image_path.name} holds {len(images)} images but "
            f"{label_path.name} {len(labels)} labels; take both from the same release"
        )
    if len(images) == 0:
        raise ValueError(f"data.directory is {directory!r}: {image_path.name} holds no images")
    class_names = _class_names(folder, int(labels.max()) + 1)
    return ArraySource(images, labels, class_names, split, channels)


def write_idx(
    folder: Path,
    splits: Mapping[str, tuple[UInt8[np.ndarray, "N R C"], UInt8[np.ndarray, " N"]]],
    class_names: Sequence[str],
) -> None:
    """Writes the files that `open_idx` reads, gzipped; the same images give the same bytes.

    Args:
      folder: that the files are put in.
      splits: images and labels of "train" and "test".
      class_names: of the labels 0 to len(class_names) - 1.

    Raises:
      ValueError: images or labels that are not bytes.
    """
    for split, arrays in splits.items():
        for kind, array in zip(("images", "labels"), arrays, strict=True):
            if array.dtype != np.uint8:
                raise ValueError(f"{split} {kind} must be uint8, got {array.dtype}")
            path = folder / f"{_PREFIXES[split]}-{kind}-idx{array.ndim}-ubyte.gz"
            content = _header(array.shape) + array.tobytes()
            # Level 6 takes an eighth of the time of 9, for 4 % more bytes.
            path.write_bytes(gzip.compress(content, 6, mtime=0))
    text = "".join(f"{name}\n" for name in class_names)
    (folder / _NAMES_FILE).write_text(text, encoding="utf-8")


def _class_names(folder: Path, count: int) -> tuple[str, ...]:
    path = folder / _NAMES_FILE
    if not path.is_file():
        return tuple(str(label) for label in range(count))
    names = tuple(path.read_text(encoding="utf-8").rstrip("\n").split("\n"))
    if len(names) < count:
        raise ValueError(
            f"data.directory holds {str(path)!r}, which names {len(names)} classes, but the "
            f"labels run to {count - 1}; put the name of each class on a line, or remove the file"
        )
    return names


def _header(shape: tuple[int, ...]) -> bytes:
    return struct.pack(f">{1 + len(shape)}I", _UNSIGNED_BYTES + len(shape), *shape)


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
    magic = _UNSIGNED_BYTES + ndim
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
