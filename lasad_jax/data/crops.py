"""Images brought to a size, cut and mirrored. All sizes are (rows, columns).

Resizing is ADM's (arXiv 2105.05233): halve with a box filter while the image is at least
twice as large as wanted, then go the rest of the way bicubically.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from lasad_jax.config.sections import FITS
from lasad_jax.data.decode import from_pillow, to_pillow

CROPS = ("center", "flip", "ten")
# Pixels; at 256 x 256 an image must be 1,024 times as long as wide to reach it.
_LARGEST_COVER = 2**26
_PLACES = ("top-left", "top-right", "bottom-left", "bottom-right", "center")


def center_crop(
    image: UInt8[np.ndarray, "H W channels"], size: tuple[int, int]
) -> UInt8[np.ndarray, "rows columns channels"]:
    """Scales the image until it just covers `size` and cuts from the centre, as ADM does.

    For square sizes the pixels are those of ADM's and LlamaGen's `center_crop_arr`.
    """
    rows, columns = size
    pixels = _halve(to_pillow(image), size)
    scale = max(rows / pixels.height, columns / pixels.width)
    covering = (round(pixels.height * scale), round(pixels.width * scale))
    top, left = (covering[0] - rows) // 2, (covering[1] - columns) // 2
    if covering[0] * covering[1] > _LARGEST_COVER:
        # A long thin image would take gigabytes: make only the part that is kept, at the
        # price of places rounded to single precision.
        y, x = pixels.height / covering[0], pixels.width / covering[1]
        box = (left * x, top * y, (left + columns) * x, (top + rows) * y)
        return from_pillow(pixels.resize((columns, rows), Image.Resampling.BICUBIC, box))
    pixels = _resize(pixels, covering)
    return from_pillow(pixels.crop((left, top, left + columns, top + rows)))


def pad_to(
    image: UInt8[np.ndarray, "H W channels"], size: tuple[int, int], background: int
) -> UInt8[np.ndarray, "rows columns channels"]:
    """Shrinks an image larger than `size`, never enlarges one, and centres it on a canvas.

    Args:
      image: keeps its aspect.
      size: of the canvas.
      background: grey value of the canvas.
    """
    height, width = image.shape[:2]
    scale = min(1.0, size[0] / height, size[1] / width)
    shrunk = (max(1, round(height * scale)), max(1, round(width * scale)))
    pixels = from_pillow(_resize(_halve(to_pillow(image), shrunk), shrunk))
    canvas = np.full((*size, image.shape[-1]), background, np.uint8)
    top, left = (size[0] - shrunk[0]) // 2, (size[1] - shrunk[1]) // 2
    canvas[top : top + shrunk[0], left : left + shrunk[1]] = pixels
    return canvas


def fit_image(
    image: UInt8[np.ndarray, "H W channels"],
    size: tuple[int, int],
    *,
    fit: str = "crop",
    background: int = 255,
) -> UInt8[np.ndarray, "rows columns channels"]:
    """Brings an image to a size.

    Args:
      image: any size.
      size: wanted; (0, 0) returns the image as it is.
      fit: "crop", see `center_crop`, or "pad", see `pad_to`.
      background: grey value of the canvas of "pad".

    Raises:
      ValueError: another `fit`.
    """
    if fit not in FITS:
        raise ValueError(f"data.fit is {fit!r}; choose one of {', '.join(FITS)}")
    if size == (0, 0):
        return image
    return center_crop(image, size) if fit == "crop" else pad_to(image, size, background)


def ten_crop(
    image: UInt8[np.ndarray, "H W channels"], size: tuple[int, int]
) -> UInt8[np.ndarray, "10 rows columns channels"]:
    """The four corners and the centre of the image, then those of its mirror image.

    Order and rounding are torchvision's: top-left, top-right, bottom-left, bottom-right,
    centre. The sixth is the mirror image's own top-left corner.

    Raises:
      ValueError: an image smaller than `size`.
    """
    _check_covers(image, size)
    rows, columns = size
    bottom, right = image.shape[0] - rows, image.shape[1] - columns
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right)]
    places = [*corners, (round(bottom / 2), round(right / 2))]
    return np.stack(
        [
            side[top : top + rows, left : left + columns]
            for side in (image, image[:, ::-1])
            for top, left in places
        ]
    )


def views(
    image: UInt8[np.ndarray, "H W channels"],
    *,
    size: tuple[int, int],
    fit: str = "crop",
    background: int = 255,
    crops: str = "center",
    ratios: Sequence[float] = (),
) -> UInt8[np.ndarray, "A rows columns channels"]:
    """The versions of an image whose codes are stored; `view_names` says which is which.

    Args:
      image: any size.
      size: of a view; (0, 0) is the image's own.
      fit, background: as for `fit_image`.
      crops: "center" (A = 1), "flip" (A = 2, the second mirrored) or "ten" (A = 10 a ratio):
        the image is brought to int(ratio * size) and `ten_crop` cuts from that.
      ratios: of "ten", each at least 1; LlamaGen stores 1.1 and 1.05. The others use none.

    Raises:
      ValueError: another `crops`, or ratios that do not fit.
    """
    _check_views(crops, ratios)
    if crops == "ten":
        size = image.shape[:2] if size == (0, 0) else size
        larger = [(int(ratio * size[0]), int(ratio * size[1])) for ratio in ratios]
        fitted = [fit_image(image, each, fit=fit, background=background) for each in larger]
        return np.concatenate([ten_crop(each, size) for each in fitted])
    fitted = fit_image(image, size, fit=fit, background=background)
    return np.stack([fitted] if crops == "center" else [fitted, fitted[:, ::-1]])


def view_names(crops: str, ratios: Sequence[float] = ()) -> tuple[str, ...]:
    """What each of the A views is, in their order, such as "1.1 mirrored top-left".

    Raises:
      ValueError: as `views` does.
    """
    _check_views(crops, ratios)
    if crops == "ten":
        return tuple(
            f"{ratio:g} {side}{place}"
            for ratio in ratios
            for side in ("", "mirrored ")
            for place in _PLACES
        )
    return ("center",) if crops == "center" else ("center", "mirrored center")


def size_before_crop(size: tuple[int, int], min_crop: float) -> tuple[int, int]:
    """The size ceil(size / min_crop) that `random_crop_flip` takes its images at."""
    return math.ceil(size[0] / min_crop), math.ceil(size[1] / min_crop)


def random_crop_flip(
    image: UInt8[np.ndarray, "H W channels"],
    size: tuple[int, int],
    *,
    min_crop: float,
    flip: bool,
    rng: np.random.Generator,
) -> UInt8[np.ndarray, "rows columns channels"]:
    """LlamaGen's augmentation of a tokenizer's training images, for any aspect.

    Args:
      image: of `size_before_crop(size, min_crop)`. Its rows become a number drawn evenly
        from those of `size` to its own, its columns follow, and a window is drawn.
      size: of the window.
      min_crop: smallest share of the sides that the window keeps, above 0, at most 1.
      flip: mirror with probability 1/2.
      rng: drawn from as often whatever the other arguments.

    Raises:
      ValueError: an image of another size.
    """
    rows, columns = size
    height, width = image.shape[:2]
    if (height, width) != size_before_crop(size, min_crop):
        raise ValueError(
            f"image is {height} x {width}, but windows of {rows} x {columns} with augment."
            f"min_crop={min_crop} are cut from {size_before_crop(size, min_crop)}; fit it first"
        )
    tall = int(rng.integers(rows, height + 1))
    wide = max(columns, round(width * tall / height))
    top = int(rng.integers(tall - rows + 1))
    left = int(rng.integers(wide - columns + 1))
    mirror = rng.random() < 0.5
    if (tall, wide) != (height, width):
        image = from_pillow(_resize(_halve(to_pillow(image), (tall, wide)), (tall, wide)))
    window = image[top : top + rows, left : left + columns]
    return np.ascontiguousarray(window[:, ::-1]) if flip and mirror else window


def _halve(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    while image.height >= 2 * size[0] and image.width >= 2 * size[1]:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize((size[1], size[0]), Image.Resampling.BICUBIC)


def _check_covers(image: np.ndarray, size: tuple[int, int]) -> None:
    if image.shape[0] < size[0] or image.shape[1] < size[1]:
        raise ValueError(
            f"image is {image.shape[0]} x {image.shape[1]}, too small for crops of "
            f"{size[0]} x {size[1]}; fit it to a larger size first"
        )


def _check_views(crops: str, ratios: Sequence[float]) -> None:
    if crops not in CROPS:
        raise ValueError(f"crops is {crops!r}; choose one of {', '.join(CROPS)}")
    if crops == "ten" and not (ratios and all(1 <= ratio < math.inf for ratio in ratios)):
        raise ValueError(f"ratios is {tuple(ratios)}; crops='ten' needs one or more, each >= 1")
