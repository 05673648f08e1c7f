"""Labelled images that fit in memory, from scikit-learn's digits or from IDX files."""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

SOURCES = ("digits", "idx")
SPLITS = ("train", "test")

_IDX_HINT = (
    "Debian's package dataset-fashion-mnist installs such files "
    "in /usr/share/datasets/fashion-mnist"
)


class ImageSet(NamedTuple):
    """Images and their classes.

    Attributes:
      images: (N, R, C, channels), 0 to 255.
      labels: (N,), from 0 to num_classes - 1.
      num_classes: one more than the largest label of the split.
    """

    images: UInt8[np.ndarray, "N R C channels"]
    labels: Int32[np.ndarray, " N"]
    num_classes: int


def load_images(source: str, split: str, *, directory: str = "") -> ImageSet:
    """Reads one split of a source whole.

    Args:
      source: "digits", the 1,797 handwritten 8x8 digits inside scikit-learn, or "idx",
        the four files in which MNIST and Fashion-MNIST come, gzipped or not.
      split: "train" or "test". The digits have no split of their own: every fifth image
        of each class is "test".
      directory: the folder of the IDX files; the digits need none.

    Raises:
      ValueError: an unknown source or split, or a file that is no whole IDX file.
      FileNotFoundError: no such folder, or a file missing from it.
    """
    if split not in SPLITS:
        raise ValueError(f"data.split is {split!r}; choose one of {', '.join(SPLITS)}")
    if source == "digits":
        return _load_digits(split)
    if source == "idx":
        return _load_idx(split, directory)
    raise ValueError(f"data.source is {source!r}; choose one of {', '.join(SOURCES)}")


def _load_digits(split: str) -> ImageSet:
    # Imported here: it takes a second, and only this source needs it.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    labels = bunch.target.astype(np.int32)
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    is_test = np.zeros(labels.shape, bool)
    for label in range(10):
        is_test[np.flatnonzero(labels == label)[4::5]] = True
    chosen = is_test if split == "test" else ~is_test
    return ImageSet(images[chosen], labels[chosen], 10)


def _load_idx(split: str, directory: str) -> ImageSet:
    if not directory:
        raise FileNotFoundError(
            f'data.directory is empty, but data.source="idx" reads files; {_IDX_HINT}'
        )
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"data.directory is {directory!r}, which is no folder; {_IDX_HINT}")
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
    return ImageSet(images, labels, int(labels.max()) + 1)


def _find_idx(folder: Path, prefix: str, kind: str, ndim: int) -> Path:
    names = [f"{prefix}-{kind}{mark}idx{ndim}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"data.directory is {str(folder)!r}, which holds none of {', '.join(names)}; {_IDX_HINT}"
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
