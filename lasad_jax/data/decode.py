"""From an encoded image to bytes of one or three channels, whatever its file says."""

import contextlib
import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps


class UnreadableImage(ValueError):  # noqa: N818
    """An image that cannot be decoded; the others of its source may still be fine.

    Attributes:
      name: which image, as `ImageSource.name` gives it.
      reason: what is wrong with it, in words.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


def decode_image(
    file: bytes | Path, *, channels: int, background: int = 255, name: str | None = None
) -> UInt8[np.ndarray, "H W channels"]:
    """Decodes an image file, upright by its EXIF tag; of an animation, the first frame.

    Sixteen-bit grey is scaled (65535 becomes 255). Transparent pixels are blended with
    `background`. Grey is Pillow's mode "L", the luma of ITU-R BT.601.

    Args:
      file: its content, or its path.
      channels: 1 for grey or 3 for colour, which the image is converted to.
      background: grey value, 0 to 255, behind transparent pixels.
      name: which image an error is about; by default the path.

    Raises:
      UnreadableImage: no image, a truncated or damaged one, one of more pixels than
        Pillow's limit, or one whose pixels have no fixed range (32-bit, floating point).
    """
    name = name or (str(file) if isinstance(file, Path) else "image")
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            image.load()
            _turn_upright(image)
            return _to_bytes(image, channels, background)
    except UnreadableImage as error:
        raise UnreadableImage(name, error.reason) from None
    except MemoryError:
        raise
    except Exception as error:  # damaged files make Pillow's readers raise almost anything
        raise UnreadableImage(name, _reason(error)) from error


def convert_image(
    image: UInt8[np.ndarray, "H W C"], *, channels: int, background: int = 255
) -> UInt8[np.ndarray, "H W channels"]:
    """Converts a decoded image as `decode_image` does.

    Args:
      image: grey (C = 1), grey and alpha (2), colour (3) or colour and alpha (4).
      channels: 1 or 3.
      background: grey value behind transparent pixels.

    Raises:
      ValueError: pixels that are no bytes, or another number of channels.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or not 1 <= image.shape[-1] <= 4:
        raise ValueError(
            f"images must be uint8 of shape (H, W, 1 to 4), got {image.dtype} of shape "
            f"{image.shape}"
        )
    if image.shape[-1] == channels:
        return image
    return _to_bytes(to_pillow(image), channels, background)


def to_pillow(image: UInt8[np.ndarray, "H W C"]) -> Image.Image:
    """The same pixels as a Pillow image of mode L, LA, RGB or RGBA."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def from_pillow(image: Image.Image) -> UInt8[np.ndarray, "H W C"]:
    """The pixels of a Pillow image of mode L or RGB."""
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def _to_bytes(image: Image.Image, channels: int, background: int) -> np.ndarray:
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        image = _eight_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, (background, background, background))
        canvas.paste(image, mask=image)
        image = canvas
    if image.mode not in ("L", "RGB"):
        # By way of RGB: Pillow takes a palette's or CMYK's grey from it too.
        image = image.convert("L" if image.mode == "1" else "RGB")
    return from_pillow(image.convert("L" if channels == 1 else "RGB"))


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey; Pillow's own conversion clips everything above 255."""
    values = np.asarray(image)
    # Mode I has 32 bits, but is also how some 16-bit formats are read.
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise UnreadableImage("", "its pixels have no fixed range; convert it to 8 or 16 bits")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def _turn_upright(image: Image.Image) -> None:
    # Damaged tags say nothing about the pixels, which are loaded by now.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * Image.MAX_IMAGE_PIXELS
        return f"more than {limit:,} pixels, the limit of Pillow; make it smaller"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
