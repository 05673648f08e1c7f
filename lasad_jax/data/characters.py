"""Characters drawn in typefaces: grey images whose class is the typeface.

A character that is held out is held out in every typeface, so that nothing repeats. The
pixels are Pillow's FreeType's, so another release of it, or of a font, may draw some differently.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from fontTools.ttLib import TTFont, TTLibError
from jaxtyping import Bool, Int64, UInt8
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from lasad_jax.data.pixel_tokens import dequantize, quantize

# The 20,902 of Unicode 1.1: what an East Asian font has, if it has Han characters at all.
HAN = range(0x4E00, 0x9FA6)


class Face(NamedTuple):
    """A typeface.

    Attributes:
      name: of the class.
      file: name of the font file.
      index: in the file, where that is a collection.
      package: of Debian, that has the file.
    """

    name: str
    file: str
    index: int
    package: str


# Noto's index 2 has the shapes of mainland China, as most of the others.
HAN_FACES = (
    Face("noto-sans", "NotoSansCJK-Regular.ttc", 2, "fonts-noto-cjk"),
    Face("noto-sans-bold", "NotoSansCJK-Bold.ttc", 2, "fonts-noto-cjk"),
    Face("noto-serif", "NotoSerifCJK-Regular.ttc", 2, "fonts-noto-cjk"),
    Face("noto-serif-bold", "NotoSerifCJK-Bold.ttc", 2, "fonts-noto-cjk"),
    Face("ukai", "ukai.ttc", 0, "fonts-arphic-ukai"),
    Face("uming", "uming.ttc", 0, "fonts-arphic-uming"),
    Face("zenhei", "wqy-zenhei.ttc", 0, "fonts-wqy-zenhei"),
    Face("wenkai-light", "LXGWWenKai-Light.ttf", 0, "fonts-lxgw-wenkai"),
    Face("wenkai-bold", "LXGWWenKai-Bold.ttf", 0, "fonts-lxgw-wenkai"),
    Face("babelstone", "BabelStoneHan.ttf", 0, "fonts-babelstone-han"),
    Face("cwtex-yen", "cwyen.ttf", 0, "fonts-cwtex-yen"),
    Face("cwtex-fs", "cwfs.ttf", 0, "fonts-cwtex-fs"),
    Face("hanamin", "HanaMinA.ttf", 0, "fonts-hanazono"),
)


def find_faces(folder: Path, faces: Sequence[Face] = HAN_FACES) -> list[Path]:
    """The font file of each face, anywhere below a folder.

    Raises:
      FileNotFoundError: naming every face without one, and the packages to install.
    """
    paths = {path.name: path for path in sorted(folder.rglob("*"), reverse=True)}
    if missing := [face for face in faces if face.file not in paths]:
        files = ", ".join(face.file for face in missing)
        packages = " ".join(dict.fromkeys(face.package for face in missing))
        raise FileNotFoundError(
            f"fonts: {folder} has no {files}; on Debian: apt-get install {packages}"
        )
    return [paths[face.file] for face in faces]


def characters_in_font(path: Path, index: int = 0, *, among: Sequence[int] = HAN) -> list[int]:
    """The code points, of those in `among` and in their order, that a font has.

    Raises:
      ValueError: a file that is no font, or that has no face of that index.
    """
    try:
        with TTFont(path, fontNumber=index, lazy=True) as font:
            # fontTools asks collections alone whether they have the face.
            if index >= (faces := getattr(font.reader, "numFonts", 1)):
                raise TTLibError(f"of {faces} in the file, counted from 0")
            known = font.getBestCmap() or {}
    except TTLibError as error:
        raise ValueError(f"fonts: {path}, face {index}, cannot be read ({error})") from error
    return [character for character in among if character in known]


def draw_characters(
    path: Path, index: int, characters: Sequence[int], size: int
) -> UInt8[np.ndarray, "N size size"]:
    """Draws characters in white on black, an em as large as the image and in its middle.

    The middle is that of the line: between ascender and descender, and of the advance. What
    reaches over the border is cut off.

    Args:
      path, index: of the face.
      characters: code points, which the font should have: others look like its missing glyph.
      size: rows, columns, and pixels of an em.
    """
    # The plain layout, since Raqm is not everywhere; single characters need no shaping.
    font = ImageFont.truetype(path, size, index, layout_engine=ImageFont.Layout.BASIC)
    images = np.empty((len(characters), size, size), np.uint8)
    for image, character in zip(images, characters, strict=True):
        canvas = Image.new("L", (size, size))
        middle = (size // 2, size // 2)
        ImageDraw.Draw(canvas).text(middle, chr(character), fill=255, font=font, anchor="mm")
        image[:] = canvas
    return images


class CharacterImages(NamedTuple):
    """Drawn characters.

    Attributes:
      images: grey, black behind the character.
      labels: index of the face.
      characters: code points.
    """

    images: UInt8[np.ndarray, "N size size"]
    labels: UInt8[np.ndarray, " N"]
    characters: Int64[np.ndarray, " N"]

    def part(self, chosen: np.ndarray) -> "CharacterImages":
        """Some of them: those of a mask or of indices."""
        return CharacterImages(*(array[chosen] for array in self))


def draw_faces(
    fonts: Sequence[tuple[Path, int]],
    *,
    size: int,
    levels: int,
    among: Sequence[int] = HAN,
    progress: bool = False,
) -> CharacterImages:
    """Draws the characters that each font has, face by face and in the order of `among`.

    Args:
      fonts: file and index of each face, at most 256.
      size: rows and columns.
      levels: grey levels, 2 to 256, that pixels are rounded to. A glyph that is blank then,
        as some fonts have for characters that they lack, is left out.
      among: code points.
      progress: show a progress bar.

    Raises:
      ValueError: levels out of range, a file that is no font, or nothing to draw.
    """
    drawn = []
    bar = tqdm(fonts, "drawing", unit="typeface", disable=not progress)
    for label, (path, index) in enumerate(bar):
        characters = characters_in_font(path, index, among=among)
        images = draw_characters(path, index, characters, size)
        images = dequantize(quantize(images, levels), levels)
        labels = np.full(len(images), label, np.uint8)
        face = CharacterImages(images, labels, np.array(characters, np.int64))
        drawn.append(face.part(images.any((1, 2))))
    every = CharacterImages(*map(np.concatenate, zip(*drawn, strict=True)))
    if not len(every.images):
        raise ValueError("fonts: none of these fonts has any of the characters; give others")
    return every


def is_held_out(characters: Int64[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    """One character in twenty, by Knuth's multiplicative hash of its code point."""
    return characters * 2654435761 % 2**32 % 20 == 0


def split_by_character(every: CharacterImages) -> dict[str, CharacterImages]:
    """The splits "train", ordered as given, and "test", in an order of its own.

    No character is in both. The held-out images are shuffled, always alike, so that the first
    ones are of all faces.
    """
    held_out = is_held_out(every.characters)
    test = every.part(held_out)
    order = np.random.default_rng(0).permutation(len(test.images))
    return {"train": every.part(~held_out), "test": test.part(order)}
