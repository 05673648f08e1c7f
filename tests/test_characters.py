"""Drawn characters: against outlines filled by matplotlib, and as files that are read back."""

import re
from pathlib import Path

import numpy as np
import pytest
from fontTools.subset import Subsetter
from fontTools.ttLib import TTCollection, TTFont
from matplotlib import get_data_path
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath
from processes import command

from lasad_jax.config import DataConfig
from lasad_jax.data import load_images, quantize
from lasad_jax.data.characters import (
    HAN,
    HAN_FACES,
    characters_in_font,
    draw_characters,
    draw_faces,
    find_faces,
    is_held_out,
    split_by_character,
)

FONTS = Path(get_data_path()) / "fonts" / "ttf"
SANS, SERIF = FONTS / "DejaVuSans.ttf", FONTS / "DejaVuSerif.ttf"
LETTERS = range(ord("A"), ord("Z") + 1)


@pytest.fixture(scope="module")
def latin(tmp_path_factory):
    """Three faces in a file, none with a Han character."""
    faces = TTCollection()
    faces.fonts = [TTFont(SANS) for _ in range(3)]
    path = tmp_path_factory.mktemp("fonts") / "latin.ttc"
    faces.save(path)
    return path


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """Three faces in a file: the letters of two fonts, in place of the first Han characters."""
    faces = TTCollection()
    for path in (SANS, SERIF, SANS):
        font = TTFont(path)
        cut = Subsetter()
        cut.populate(unicodes=LETTERS)
        cut.subset(font)
        for table in font["cmap"].tables:
            table.cmap = {HAN[code - LETTERS[0]]: name for code, name in table.cmap.items()}
        faces.fonts.append(font)
    path = tmp_path_factory.mktemp("fonts") / "three.ttc"
    faces.save(path)
    return path


def outline(path: Path, character: str, size: int) -> np.ndarray:
    """How much of each pixel lies within a glyph's outline: of 8x8 points, by even-odd filling."""
    font = TTFont(path)
    em, line = font["head"].unitsPerEm, font["hhea"]
    advance = font["hmtx"][font.getBestCmap()[ord(character)]][0]
    shape = TextPath((0, 0), character, size, prop=FontProperties(fname=path))
    at = (np.arange(size * 8) + 0.5) / 8 - size / 2
    x, y = np.meshgrid(
        at + advance / em * size / 2, (line.ascent + line.descent) / em * size / 2 - at
    )
    inside = np.zeros(x.size, bool)
    for polygon in shape.to_polygons():
        inside ^= Outline(polygon).contains_points(np.stack([x.ravel(), y.ravel()], 1))
    return inside.reshape(size, 8, size, 8).mean((1, 3))


@pytest.mark.parametrize("path", [SANS, SERIF], ids=["sans", "serif"])
def test_drawn_characters_fill_their_outlines(path):
    characters = "Rgþ8"
    drawn = draw_characters(path, 0, [ord(each) for each in characters], 96) / 255
    assert drawn.shape == (4, 96, 96)
    expected = np.stack([outline(path, each, 96) for each in characters])
    # Hinting moves an edge by up to a pixel.
    error = np.abs(drawn[:, None] - expected).sum((2, 3)) / expected.sum((1, 2))
    assert np.diag(error).max() < 0.2
    assert error[~np.eye(4, dtype=bool)].min() > 0.6


def test_a_face_is_drawn_whatever_its_place_in_a_collection(collection):
    for index, path in ((0, SANS), (1, SERIF), (2, SANS)):
        assert characters_in_font(collection, index) == list(HAN[: len(LETTERS)])
        np.testing.assert_array_equal(
            draw_characters(collection, index, HAN[:5], 24),
            draw_characters(path, 0, LETTERS[:5], 24),
        )
    with pytest.raises(ValueError, match=r"three\.ttc, face 3, cannot be read"):
        characters_in_font(collection, 3)


def test_characters_are_those_of_the_font_in_their_order(tmp_path):
    assert characters_in_font(SANS, among=[ord("z"), HAN[0], ord("a")]) == [ord("z"), ord("a")]
    assert characters_in_font(SANS) == []
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    with pytest.raises(ValueError, match=r"fonts: .*broken\.ttf, face 0, cannot be read"):
        characters_in_font(tmp_path / "broken.ttf")


@pytest.mark.parametrize("levels", [2, 8, 256])
def test_pixels_have_the_levels_and_blank_images_are_left_out(levels):
    among = [ord(" "), *LETTERS, 0xA0]
    every = draw_faces([(SANS, 0), (SERIF, 0)], size=24, levels=levels, among=among)
    assert every.characters.tolist() == 2 * list(LETTERS)
    assert every.labels.tolist() == [0] * 26 + [1] * 26
    for label, path in enumerate((SANS, SERIF)):
        drawn = draw_characters(path, 0, LETTERS, 24)
        nearest = np.rint(drawn / 255 * (levels - 1)) / (levels - 1) * 255
        np.testing.assert_array_equal(every.images[every.labels == label], np.rint(nearest))
    with pytest.raises(ValueError, match="none of these fonts has any of the characters"):
        draw_faces([(SANS, 0)], size=24, levels=levels)


def test_a_character_is_held_out_in_every_face():
    among = range(0x20, 0x250)
    every = draw_faces([(SANS, 0), (SERIF, 0)], size=8, levels=4, among=among)
    parts = split_by_character(every)
    train, test = parts["train"], parts["test"]
    assert len(test.labels) + len(train.labels) == len(every.labels)
    assert 0.02 < len(test.labels) / len(every.labels) < 0.08
    assert not set(train.characters) & set(test.characters)
    for label in (0, 1):
        held_out = set(test.characters[test.labels == label])
        assert held_out == set(test.characters)
        assert train.characters[train.labels == label].tolist() == [
            character
            for character in every.characters[every.labels == label]
            if character not in held_out
        ]
    # Shuffled, but image, label and character together.
    assert 0 < test.labels[: len(test.labels) // 2].mean() < 1
    where = {pair: i for i, pair in enumerate(zip(every.labels, every.characters, strict=True))}
    for part in parts.values():
        at = [where[pair] for pair in zip(part.labels, part.characters, strict=True)]
        np.testing.assert_array_equal(part.images, every.images[at])


def test_one_han_character_in_twenty_is_held_out():
    held_out = is_held_out(np.array(HAN))
    assert all(0.04 < part.mean() < 0.06 for part in np.array_split(held_out, 7))
    # In Python's integers of any size, and always these: another split has other figures.
    assert held_out.tolist() == [(code * 2654435761 & 0xFFFFFFFF) % 20 == 0 for code in HAN]
    assert held_out.sum() == 1043


def test_missing_fonts_are_named_with_their_packages(tmp_path):
    missing = {face.file for face in HAN_FACES} - {"ukai.ttc", "cwfs.ttf"}
    for file in missing:
        (tmp_path / "deep" / "er").mkdir(parents=True, exist_ok=True)
        (tmp_path / "deep" / "er" / file).touch()
    message = "has no ukai.ttc, cwfs.ttf; on Debian: apt-get install fonts-arphic-ukai fonts-cwtex-"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        find_faces(tmp_path)


def test_the_command_writes_what_the_source_reads(tmp_path, collection, latin):
    fonts = tmp_path / "fonts"
    fonts.mkdir()
    flags = (f"--out={tmp_path}/han", f"--fonts={fonts}", "--size=12", "--levels=4")

    def put(path):
        for face in HAN_FACES:
            (fonts / face.file).unlink(missing_ok=True)
            (fonts / face.file).symlink_to(path)

    put(SANS)
    message = "NotoSansCJK-Regular.ttc, face 2, cannot be read (of 1 in the file"
    assert message in command("render_characters", *flags, fails=True)
    put(latin)
    assert "none of these fonts" in command("render_characters", *flags, fails=True)
    assert not (tmp_path / "han").exists()
    put(collection)
    said = command("render_characters", *flags)
    data = DataConfig(source="idx", directory=f"{tmp_path}/han", levels=4)
    train, test = load_images(data, "train"), load_images(data, "test")
    held_out = is_held_out(np.array(HAN[:26])).sum()
    assert f"{13 * (26 - held_out)} train + {13 * held_out} test images" in said
    assert train.class_names == test.class_names == tuple(face.name for face in HAN_FACES)
    assert train.images.shape == (13 * (26 - held_out), 12, 12, 1)
    assert np.bincount(test.labels).tolist() == [held_out] * 13
    drawn = draw_characters(collection, HAN_FACES[0].index, HAN[:26], 12)
    drawn = drawn[~is_held_out(np.array(HAN[:26]))]
    first = train.images[train.labels == 0, ..., 0]
    np.testing.assert_array_equal(quantize(first, 4), quantize(drawn, 4))
    assert "han exists already" in command("render_characters", *flags, fails=True)


def test_debians_fonts_have_han_characters():
    try:
        paths = find_faces(Path("/usr/share/fonts"))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    fonts = list(zip(paths, (face.index for face in HAN_FACES), strict=True))
    assert len(characters_in_font(*fonts[0])) == len(HAN)
    # A line, a box and a cross, of as many shapes as there are faces.
    every = draw_faces(fonts, size=24, levels=8, among=[ord(each) for each in "一口十"])
    line, box, cross = every.images.reshape(len(fonts), 3, 24, 24).swapaxes(0, 1)
    for images in (line, box, cross):
        assert len(np.unique(images, axis=0)) == len(fonts)
    ink = line > 0
    assert (ink.any(1).sum(1) >= 3 * ink.any(2).sum(1)).all()
    for images, filled in ((box, 0), (cross, 1)):
        middle = images[:, 10:14, 10:14].reshape(len(fonts), -1)
        assert ((middle.max(1) > 127) == filled).all()
