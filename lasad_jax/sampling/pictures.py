"""Samples as files: a labelled picture to look at, an .npz to compute with."""

import io
import math
import os
import zipfile
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image, ImageDraw, ImageFont

from lasad_jax.files import whole_file

_WHITE = (255, 255, 255)
_INK = (70, 70, 70)
_SMALLEST = 48  # pixels; smaller images are enlarged to about this
_MARGIN = 12
_LONGEST_NAME = 160  # pixels


def image_grid(
    images: UInt8[np.ndarray, "N H W C"],
    labels: Integer[np.ndarray, " N"] | None = None,
    *,
    columns: int | None = None,
    scale: int | None = None,
    class_names: Sequence[str] | None = None,
) -> Image.Image:
    """A picture of images side by side, in the order given, with their classes.

    Where every row holds a single class, it is named once at the row's left, otherwise
    under each image.

    Args:
      images: grey (C = 1) or colour (C = 3).
      labels: the classes, or None for a picture without text.
      columns: images in a row. By default a row for each class if the labels come in equal
        runs, otherwise about a square.
      scale: whole factor of enlargement; by default one that shows tiny images at 48 pixels.
      class_names: a name for each class, in place of its number.

    Raises:
      ValueError: a wrong dtype or shape, or a label without a name.
    """
    _check_images(images, labels)
    count, height, width, channels = images.shape
    if channels not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels, got shape {images.shape}")
    columns = _default_columns(count, labels) if columns is None else min(columns, count)
    scale = max(1, math.ceil(_SMALLEST / min(height, width))) if scale is None else scale
    if columns < 1 or scale < 1:
        raise ValueError(f"columns ({columns}) and scale ({scale}) must be positive")

    height, width = height * scale, width * scale
    gap = max(4, min(height, width) // 16)
    rows = math.ceil(count / columns)
    names = [] if labels is None else _names(labels, class_names)
    at_left = all(len(set(names[i : i + columns])) == 1 for i in range(0, len(names), columns))
    font = ImageFont.load_default(13 if at_left else 11)
    # Whatever a row names, the space is that of the longest name, so that rows stay aligned.
    room = _LONGEST_NAME if at_left else max(width, 24)
    names = [_shorten(name, font, room) for name in names]
    left = math.ceil(max(map(font.getlength, names))) + 10 if names and at_left else 0
    below = 20 if names and not at_left else 0
    step_x, step_y = max(width, 0 if at_left else 24) + gap, height + below + gap

    size = (2 * _MARGIN + left + columns * step_x - gap, 2 * _MARGIN + rows * step_y - gap)
    picture = Image.new("RGB", size, _WHITE)
    draw = ImageDraw.Draw(picture)
    for i in range(count):
        row, column = divmod(i, columns)
        x, y = _MARGIN + left + column * step_x, _MARGIN + row * step_y
        tile = Image.fromarray(images[i, ..., 0] if channels == 1 else images[i])
        picture.paste(tile.resize((width, height), Image.Resampling.NEAREST), (x, y))
        if left and column == 0:
            draw.text((x - 10, y + height / 2), names[i], _INK, font, anchor="rm")
        elif below:
            draw.text((x + width / 2, y + height + 4), names[i], _INK, font, anchor="mt")
    return picture


def write_png(path: str | os.PathLike, image: Image.Image) -> None:
    """Writes a PNG; the file appears whole or not at all."""
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        image.save(file, format="PNG")


def write_npz(
    path: str | os.PathLike,
    batches: Iterable[UInt8[np.ndarray, "_ H W C"]],
    labels: Integer[np.ndarray, " N"],
    *,
    comment: str = "",
) -> None:
    """Writes samples in the ADM convention; the file appears whole or not at all.

    The arrays are arr_0, the images, and arr_1, the labels: what evaluators of generated
    images read. They are not compressed. The same samples make the same bytes.

    Args:
      path: of the file.
      batches: the images, in order, some at a time; none is kept.
      labels: of all images.
      comment: of the zip file that an .npz is, for `read_comment`.

    Raises:
      ValueError: a wrong dtype or shape.
    """
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.comment = comment.encode()
        written, shape = 0, None
        with _member(archive, "arr_0") as file:
            for images in batches:
                _check_images(images)
                if shape is None:
                    shape = images.shape[1:]
                    _write_header(file, images.dtype, (len(labels), *shape))
                if images.shape[1:] != shape:
                    raise ValueError(
                        f"images must be of one shape, got {shape}, {images.shape[1:]}"
                    )
                file.write(np.ascontiguousarray(images).data)
                written += len(images)
        if labels.shape != (written,):
            raise ValueError(f"labels must be ({written},), one an image, got {labels.shape}")
        with _member(archive, "arr_1") as file:
            _write_header(file, labels.dtype, labels.shape)
            file.write(np.ascontiguousarray(labels).data)


def read_comment(path: str | os.PathLike) -> str:
    """The comment that `write_npz` gave a file; "" for none, a damaged file or no file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment.decode(errors="replace")
    except (OSError, zipfile.BadZipFile):
        return ""


def _member(archive: zipfile.ZipFile, name: str) -> io.BufferedIOBase:
    # ZipInfo has a date of its own, where a bare name takes the time of day.
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)


def _write_header(file: io.BufferedIOBase, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    descr = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _check_images(images: np.ndarray, labels: np.ndarray | None = None) -> None:
    if images.dtype != np.uint8:
        raise ValueError(f"images must be uint8, 0 to 255, got {images.dtype}")
    if images.ndim != 4 or images.size == 0:
        raise ValueError(f"images must be (N, H, W, C) and not empty, got {images.shape}")
    if labels is None:
        return
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels must be ({len(images)},), one an image, got {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}")


def _default_columns(count: int, labels: np.ndarray | None) -> int:
    if labels is not None:
        borders = np.flatnonzero(np.diff(labels)) + 1
        runs = np.diff(np.concatenate([[0], borders, [count]]))
        if len(runs) > 1 and 1 < runs[0] <= 20 and (runs == runs[0]).all():
            return int(runs[0])
    return math.ceil(math.sqrt(count))


def _names(labels: np.ndarray, class_names: Sequence[str] | None) -> list[str]:
    if class_names is None:
        return [str(label) for label in labels]
    if not 0 <= labels.min() <= labels.max() < len(class_names):
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()}, but class_names holds "
            f"{len(class_names)} names"
        )
    return [class_names[label] for label in labels]


def _shorten(name: str, font: ImageFont.FreeTypeFont, room: int) -> str:
    if font.getlength(name) <= room:
        return name
    while name and font.getlength(name + "...") > room:
        name = name[:-1]
    return name.rstrip() + "..."
