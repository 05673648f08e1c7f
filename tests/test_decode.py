"""Decoding of every kind of image file, against arithmetic in NumPy."""

import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lasad_jax.data.decode import UnreadableImage, convert_image, decode_image


def encode(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def random_bytes(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def luma(colour: np.ndarray) -> np.ndarray:
    return colour.astype(float) @ [0.299, 0.587, 0.114]


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3)])
def test_colour_comes_back_and_grey_is_its_luma(size):
    pixels = random_bytes(*size, 3)
    file = encode(Image.fromarray(pixels))
    got = decode_image(file, channels=3)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, pixels)
    grey = decode_image(file, channels=1)
    assert grey.shape == (*size, 1) and grey.dtype == np.uint8
    np.testing.assert_allclose(grey[..., 0], luma(pixels), atol=0.51)


def test_grey_is_repeated_for_colour(tmp_path):
    pixels = random_bytes(4, 6)
    path = tmp_path / "grey.png"
    Image.fromarray(pixels).save(path)
    np.testing.assert_array_equal(decode_image(path, channels=1)[..., 0], pixels)
    np.testing.assert_array_equal(decode_image(path, channels=3), pixels[..., None].repeat(3, 2))


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(form):
    values = np.array([[0, 128, 129], [257 * 100, 40000, 65535]], np.uint16)
    file = encode(Image.fromarray(values), form)
    with Image.open(io.BytesIO(file)) as image:
        assert image.mode.startswith("I")
    expected = np.array([[0, 0, 1], [100, 156, 255]])
    np.testing.assert_array_equal(decode_image(file, channels=1)[..., 0], expected)
    np.testing.assert_array_equal(decode_image(file, channels=3)[..., 1], expected)


def test_a_palette_is_looked_up():
    index, palette = random_bytes(5, 4) % 7, random_bytes(7, 3)
    image = Image.fromarray(index, "P")
    image.putpalette(palette.tobytes())
    np.testing.assert_array_equal(decode_image(encode(image), channels=3), palette[index])


def test_a_palette_with_a_transparent_colour_shows_the_background():
    index, palette = random_bytes(5, 4) % 3, random_bytes(3, 3)
    image = Image.fromarray(index, "P")
    image.putpalette(palette.tobytes())
    palette[2] = 77
    got = decode_image(encode(image, transparency=2), channels=3, background=77)
    np.testing.assert_array_equal(got, palette[index])


def test_one_bit_is_black_and_white():
    bits = random_bytes(3, 9) > 127
    file = encode(Image.fromarray(bits))
    np.testing.assert_array_equal(decode_image(file, channels=1)[..., 0], bits * 255)


def test_cmyk_ink_takes_light_away():
    ink = random_bytes(8, 8, 4)
    ink[:4, :, 3] = 0
    got = decode_image(encode(Image.fromarray(ink, "CMYK"), "TIFF"), channels=3)
    light = 255 - ink.astype(float)
    np.testing.assert_allclose(got, light[..., :3] * light[..., 3:] / 255, atol=1.01)
    jpeg = encode(Image.new("CMYK", (9, 7), (255, 0, 0, 0)), "JPEG")
    got = decode_image(jpeg, channels=3)
    assert got.shape == (7, 9, 3)
    np.testing.assert_allclose(got, np.broadcast_to([0, 255, 255], got.shape), atol=3)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["LA", "RGBA"]), st.integers(0, 255), st.integers(0, 99))
def test_transparency_is_blended_with_the_background(mode, background, seed):
    pixels = random_bytes(4, 5, len(mode), seed=seed)
    pixels[0, 0, -1], pixels[0, 1, -1] = 0, 255
    got = decode_image(encode(Image.fromarray(pixels, mode)), channels=3, background=background)
    colour, alpha = pixels[..., :-1].astype(float), pixels[..., -1:] / 255
    blended = colour * alpha + background * (1 - alpha)
    np.testing.assert_allclose(got, np.broadcast_to(blended, got.shape), atol=1.01)
    assert (got[0, 0] == background).all()
    assert (got[0, 1] == pixels[0, 1, :-1]).all()
    np.testing.assert_array_equal(convert_image(pixels, channels=3, background=background), got)


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (1, lambda x: x),
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (4, lambda x: x[::-1]),
        (5, lambda x: x.transpose(1, 0, 2)),
        (6, lambda x: np.rot90(x)),
        (7, lambda x: x[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda x: np.rot90(x, -1)),
    ],
)
def test_exif_orientation_is_applied(orientation, stored):
    upright = random_bytes(3, 5, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encode(Image.fromarray(np.ascontiguousarray(stored(upright))), exif=exif)
    np.testing.assert_array_equal(decode_image(file, channels=3), upright)


@pytest.mark.parametrize("tags", [b"", b"no TIFF header", b"II*\0\xff\xff\xff\xff"])
def test_damaged_exif_does_not_spoil_the_pixels(tags):
    pixels = random_bytes(3, 5, 3)
    file = encode(Image.fromarray(pixels), exif=b"Exif\0\0" + tags)
    np.testing.assert_array_equal(decode_image(file, channels=3), pixels)


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue", "green")]
    file = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    got = decode_image(file, channels=3)
    np.testing.assert_array_equal(got, np.broadcast_to([255, 0, 0], (4, 6, 3)))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_truncated_files_are_refused(tmp_path, form):
    file = encode(Image.fromarray(random_bytes(64, 48, 3)), form)
    assert decode_image(file, channels=3).shape == (64, 48, 3)
    path = tmp_path / "half"
    path.write_bytes(file[: len(file) // 2])
    with pytest.raises(UnreadableImage, match=r"my photo: \w+") as caught:
        decode_image(path, channels=3, name="my photo")
    assert caught.value.name == "my photo" and caught.value.reason
    if form == "JPEG":
        assert "truncated" in caught.value.reason


def test_what_is_no_image_is_refused(tmp_path):
    for content in (b"", b"plain text"):
        with pytest.raises(UnreadableImage, match="image: not an image of a known format"):
            decode_image(content, channels=3)
    with pytest.raises(UnreadableImage, match=r"gone\.png: No such file"):
        decode_image(tmp_path / "gone.png", channels=3)
    for values in (np.ones((2, 2), np.float32), np.full((2, 2), 70000, np.int32)):
        with pytest.raises(UnreadableImage, match="x: its pixels have no fixed range"):
            decode_image(encode(Image.fromarray(values), "TIFF"), channels=1, name="x")


def test_a_decompression_bomb_is_refused():
    header = (60000).to_bytes(4) * 2 + bytes([8, 0, 0, 0, 0])
    chunk = lambda kind, data: (
        len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)
    )
    data = zlib.compress(bytes(100))
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )
    with pytest.raises(UnreadableImage, match=r"more than 178,956,970 pixels"):
        decode_image(bomb, channels=1)


def test_arrays_are_converted_like_files():
    pixels = random_bytes(5, 4, 3)
    assert convert_image(pixels, channels=3) is pixels
    grey = convert_image(pixels, channels=1)
    np.testing.assert_array_equal(grey, decode_image(encode(Image.fromarray(pixels)), channels=1))
    assert convert_image(grey, channels=3).shape == (5, 4, 3)
    for bad in (pixels.astype(np.float32), pixels[..., 0], random_bytes(2, 2, 5)):
        with pytest.raises(ValueError, match="must be uint8 of shape"):
            convert_image(bad, channels=3)
