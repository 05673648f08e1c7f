"""Crops against ADM's recipe and torchvision's ten-crop written out with Pillow."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from lasad_jax.data import crops
from lasad_jax.data.crops import (
    center_crop,
    fit_image,
    pad_to,
    random_crop_flip,
    size_before_crop,
    ten_crop,
    view_names,
    views,
)


def random_image(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def adm_square(image: np.ndarray, size: int) -> np.ndarray:
    """ADM's square crop, in Pillow's (width, height) terms."""
    pillow = Image.fromarray(image)
    while min(pillow.size) >= 2 * size:
        pillow = pillow.resize((pillow.size[0] // 2, pillow.size[1] // 2), Image.BOX)
    factor = size / min(pillow.size)
    wide, high = (round(side * factor) for side in pillow.size)
    array = np.array(pillow.resize((wide, high), Image.BICUBIC))
    y, x = (high - size) // 2, (wide - size) // 2
    return array[y : y + size, x : x + size]


sides = st.integers(1, 70)
few = settings(max_examples=40, deadline=None)


@few
@given(sides, sides, st.integers(1, 33), st.integers(0, 9))
def test_square_crops_are_adms_pixel_for_pixel(height, width, size, seed):
    image = random_image(height, width, seed=seed)
    np.testing.assert_array_equal(center_crop(image, (size, size)), adm_square(image, size))


@pytest.mark.parametrize("shape", [(375, 500), (601, 399), (1200, 517)])
def test_photo_sized_crops_are_adms(shape):
    image = random_image(*shape)
    for size in (256, 281):
        np.testing.assert_array_equal(center_crop(image, (size, size)), adm_square(image, size))


@pytest.mark.parametrize("shape", [(1, 20000), (20000, 2)])
def test_long_thin_images_are_cut_before_they_are_enlarged(monkeypatch, shape):
    image = random_image(*shape)
    size = (64, 65)
    got = center_crop(image, size)  # takes 64 x 1,280,000 pixels on the way
    monkeypatch.setattr(crops, "_LARGEST_COVER", 2**40)
    whole = center_crop(image, size)
    monkeypatch.undo()
    assert np.abs(got.astype(int) - whole).max() <= 4
    larger = center_crop(image, (512, 512))  # 5 billion
    assert larger.shape == (512, 512, 3) and np.ptp(larger) > 0


@few
@given(sides, sides, st.integers(1, 33), st.integers(1, 33), st.sampled_from([1, 3]))
def test_a_transposed_crop_is_the_crop_of_the_transpose(height, width, rows, columns, channels):
    # Contrast is low because overshoot is clipped after each of the two passes, whose order
    # differs; what is left is rounding.
    image = random_image(height, width, channels) // 4 + 96
    got = center_crop(image, (rows, columns))
    assert got.shape == (rows, columns, channels) and got.dtype == np.uint8
    other = center_crop(image.transpose(1, 0, 2), (columns, rows)).transpose(1, 0, 2)
    assert np.abs(got.astype(int) - other).max() <= 2


def test_wide_crops_cut_the_middle_rows_of_a_scaled_image():
    image = random_image(40, 30)
    got = center_crop(image, (10, 20))
    scaled = Image.fromarray(image).resize((20, 27), Image.BICUBIC)  # 40 * 20 / 30 = 26.7
    np.testing.assert_array_equal(got, np.array(scaled)[8:18])


@few
@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 3]), st.integers(0, 255))
def test_padding_centres_a_small_image_untouched(height, width, channels, background):
    image = random_image(height, width, channels)
    got = pad_to(image, (15, 12), background)
    top, left = (15 - height) // 2, (12 - width) // 2
    np.testing.assert_array_equal(got[top : top + height, left : left + width], image)
    outside = np.ones((15, 12), bool)
    outside[top : top + height, left : left + width] = False
    assert got.shape == (15, 12, channels) and (got[outside] == background).all()


def test_padding_shrinks_a_large_image_and_keeps_its_aspect():
    image = random_image(90, 40)
    got = pad_to(image, (20, 20), 7)
    pillow = Image.fromarray(image)
    for size in ((20, 45), (10, 22)):  # halved twice: 9 x 20 is wanted
        pillow = pillow.resize(size, Image.BOX)
    expected = np.full((20, 20, 3), 7)
    expected[:, 5:14] = np.array(pillow.resize((9, 20), Image.BICUBIC))
    np.testing.assert_array_equal(got, expected)


@few
@given(st.integers(1, 300), st.integers(1, 300))
def test_padding_takes_any_aspect(height, width):
    image = np.full((height, width, 1), 200, np.uint8)
    got = pad_to(image, (8, 11), 0)
    rows, columns = (np.flatnonzero((got[..., 0] == 200).any(axis)) for axis in (1, 0))
    scale = min(1, 8 / height, 11 / width)
    assert (len(rows), len(columns)) == (
        max(1, round(height * scale)),
        max(1, round(width * scale)),
    )
    assert (got[np.ix_(rows, columns)] == 200).all()


def test_fit_chooses_and_size_zero_leaves_the_image():
    image = random_image(9, 14)
    crop, pad = (fit_image(image, (6, 5), fit=fit, background=3) for fit in ("crop", "pad"))
    np.testing.assert_array_equal(crop, center_crop(image, (6, 5)))
    np.testing.assert_array_equal(pad, pad_to(image, (6, 5), 3))
    assert fit_image(image, (0, 0), fit="crop") is image
    with pytest.raises(ValueError, match=r"data\.fit is 'squash'; choose one of crop, pad"):
        fit_image(image, (6, 5), fit="squash")


def torchvision_ten_crop(image: np.ndarray, rows: int, columns: int) -> list[np.ndarray]:
    crops = []
    for side in (Image.fromarray(image), ImageOps.mirror(Image.fromarray(image))):
        wide, high = side.size
        y, x = round((high - rows) / 2.0), round((wide - columns) / 2.0)
        for left, top in (
            (0, 0),
            (wide - columns, 0),
            (0, high - rows),
            (wide - columns, high - rows),
            (x, y),
        ):
            crops.append(np.array(side.crop((left, top, left + columns, top + rows))))
    return crops


@few
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9), st.integers(0, 9))
def test_ten_crops_are_torchvisions(rows, columns, more_rows, more_columns):
    image = random_image(rows + more_rows, columns + more_columns)
    expected = torchvision_ten_crop(image, rows, columns)
    np.testing.assert_array_equal(ten_crop(image, (rows, columns)), expected)


def test_ten_crops_of_a_small_image_are_refused():
    with pytest.raises(ValueError, match="image is 5 x 9, too small for crops of 6 x 6"):
        ten_crop(random_image(5, 9), (6, 6))


def test_views_are_llamagens_ten_crops_at_each_ratio():
    image = random_image(300, 420)
    got = views(image, size=(256, 256), crops="ten", ratios=(1.1, 1.05))
    assert got.shape == (20, 256, 256, 3)
    for i, larger in enumerate((281, 268)):
        expected = torchvision_ten_crop(adm_square(image, larger), 256, 256)
        np.testing.assert_array_equal(got[10 * i : 10 * i + 10], expected)


def test_views_are_named_in_their_order():
    names = view_names("ten", (1.1, 1.05))
    assert len(names) == len(set(names)) == 20
    assert names[:2] == ("1.1 top-left", "1.1 top-right")
    assert names[5] == "1.1 mirrored top-left" and names[19] == "1.05 mirrored center"
    assert view_names("center") == ("center",) and len(view_names("flip")) == 2
    image = random_image(8, 9)
    one, two = (views(image, size=(4, 6), crops=crops) for crops in ("center", "flip"))
    np.testing.assert_array_equal(one[0], center_crop(image, (4, 6)))
    np.testing.assert_array_equal(two, [one[0], one[0][:, ::-1]])
    np.testing.assert_array_equal(views(image, size=(0, 0))[0], image)


@pytest.mark.parametrize("call", [views, lambda image, size, **how: view_names(**how)])
def test_impossible_views_are_refused(call):
    image = random_image(8, 8)
    with pytest.raises(ValueError, match="crops is 'five'; choose one of center, flip, ten"):
        call(image, size=(4, 4), crops="five")
    for ratios in ((), (0.9,)):
        with pytest.raises(ValueError, match=r"ratios is \(.*one or more, each >= 1"):
            call(image, size=(4, 4), crops="ten", ratios=ratios)


def test_a_random_crop_of_one_and_no_flip_changes_nothing():
    image = random_image(6, 5)
    got = random_crop_flip(image, (6, 5), min_crop=1, flip=False, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(got, image)


def test_random_crops_are_windows_of_every_scale_and_place():
    """On a picture of its own coordinates: a window shows its place, scale and side."""
    size, min_crop = (20, 30), 0.5
    high, wide = size_before_crop(size, min_crop)
    assert (high, wide) == (40, 60)
    y, x = np.mgrid[:high, :wide]
    image = np.stack([y * 4, x * 4, 0 * x], -1).astype(np.uint8)
    scales, lefts, mirrored = [], [], 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        window = random_crop_flip(image, size, min_crop=min_crop, flip=True, rng=rng)
        assert window.shape == (*size, 3) and window.dtype == np.uint8
        left, right = window[10, 3, 1].astype(int), window[10, -4, 1].astype(int)
        mirrored += left > right
        scales.append(abs(right - left) / 4 / (size[1] - 7))
        lefts.append(min(left, right) / 4)
        np.testing.assert_allclose(np.ptp(window[:, 9, 0]) / 4 / 19, scales[-1], atol=0.15)
    assert 70 < mirrored < 130
    assert min(scales) < 1.05 and max(scales) > 1.9 and 1.2 < np.mean(scales) < 1.6
    assert min(lefts) < 6 and max(lefts) > 24


def test_random_crops_follow_the_generator_alone():
    image = random_image(10, 10)
    crop = lambda seed, flip=True: random_crop_flip(
        image, (8, 8), min_crop=0.8, flip=flip, rng=np.random.default_rng(seed)
    )
    np.testing.assert_array_equal(crop(3), crop(3))
    assert len({crop(seed).tobytes() for seed in range(20)}) > 10
    # The draws do not depend on `flip`: windows are the same, about half of them mirrored.
    mirrored = [not np.array_equal(crop(seed), crop(seed, False)) for seed in range(20)]
    assert 3 < sum(mirrored) < 17
    for seed in range(20):
        side = crop(seed, False)[:, ::-1] if mirrored[seed] else crop(seed, False)
        np.testing.assert_array_equal(crop(seed), side)
    ramp = np.tile(np.arange(10, dtype=np.uint8) * 20, (10, 1))[..., None]
    for seed in range(20):
        rng = np.random.default_rng(seed)
        window = random_crop_flip(ramp, (8, 8), min_crop=0.8, flip=False, rng=rng)
        assert window[0, 0, 0] < window[0, -1, 0]


@few
@given(st.integers(1, 20), st.integers(1, 20), st.floats(0.1, 1), st.integers(0, 99))
def test_random_crops_take_any_size(rows, columns, min_crop, seed):
    high, wide = size_before_crop((rows, columns), min_crop)
    assert (high, wide) == (math.ceil(rows / min_crop), math.ceil(columns / min_crop))
    image = random_image(high, wide, 1)
    rng = np.random.default_rng(seed)
    got = random_crop_flip(image, (rows, columns), min_crop=min_crop, flip=True, rng=rng)
    assert got.shape == (rows, columns, 1)
    with pytest.raises(ValueError, match=r"augment\.min_crop"):
        random_crop_flip(
            random_image(high + 1, wide, 1), (rows, columns), min_crop=min_crop, flip=True, rng=rng
        )


@pytest.mark.parametrize("channels", [1, 3])
def test_a_single_pixel_goes_through_everything(channels):
    pixel = np.full((1, 1, channels), 93, np.uint8)
    assert (center_crop(pixel, (4, 7)) == 93).all()
    padded = pad_to(pixel, (4, 7), 0)
    assert padded[1, 3, 0] == 93 and (padded > 0).sum() == channels
    assert ten_crop(pixel, (1, 1)).shape == (10, 1, 1, channels)
    for kind, ratios, count in (("center", (), 1), ("flip", (), 2), ("ten", (1.1,), 10)):
        got = views(pixel, size=(8, 8), crops=kind, ratios=ratios)
        assert got.shape == (count, 8, 8, channels) and (got == 93).all()
    rng = np.random.default_rng(0)
    assert random_crop_flip(pixel, (1, 1), min_crop=1, flip=True, rng=rng).item(0) == 93
    fitted = fit_image(pixel, size_before_crop((4, 4), 0.8))
    assert (random_crop_flip(fitted, (4, 4), min_crop=0.8, flip=True, rng=rng) == 93).all()
