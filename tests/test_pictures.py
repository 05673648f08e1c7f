"""Pictures and sample files, read back with Pillow and NumPy."""

import numpy as np
import pytest
from PIL import Image

from lasad_jax.sampling.pictures import image_grid, read_comment, write_npz, write_png


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, shape, dtype=np.uint8)


def find_tiles(picture: Image.Image, images: np.ndarray, scale: int) -> list[tuple[int, int]]:
    """Top left corner (y, x) of each image, each of which must occur exactly once."""
    canvas = np.asarray(picture)
    corners = []
    for image in images:
        big = np.kron(np.broadcast_to(image, (*image.shape[:2], 3)), np.ones((scale, scale, 1)))
        height, width = big.shape[:2]
        places = [
            (int(y), int(x))
            for y, x in np.argwhere((canvas == big[0, 0]).all(-1))
            if np.array_equal(canvas[y : y + height, x : x + width], big)
        ]
        # An enlarged corner pixel is many pixels, but the whole image fits in one place only.
        assert len(places) == 1
        corners.append(places[0])
    return corners


@pytest.mark.parametrize(
    ("shape", "scale"), [((5, 8, 8, 1), 6), ((3, 5, 9, 3), 10), ((2, 64, 50, 3), 1)]
)
def test_tiles_are_whole_and_in_reading_order(shape, scale):
    images = noise(*shape)
    picture = image_grid(images, columns=2)
    assert picture.mode == "RGB"
    corners = find_tiles(picture, images, scale)
    assert corners == sorted(corners)
    assert [x for _, x in corners[::2]] == [corners[0][1]] * len(corners[::2])
    canvas = np.asarray(picture)
    for border in (canvas[:8], canvas[-8:], canvas[:, :8], canvas[:, -8:]):
        assert (border == 255).all()


@pytest.mark.parametrize("columns", [1, 3, None, 50])
def test_any_number_of_columns(columns):
    images = noise(7, 6, 6, 1)
    find_tiles(image_grid(images, np.arange(7), columns=columns), images, 8)


def text_outside(picture: Image.Image, corners: list[tuple[int, int]], side: int) -> np.ndarray:
    canvas = np.array(picture)
    for y, x in corners:
        canvas[y : y + side, x : x + side] = 255
    return np.argwhere((canvas < 255).any(-1))


def test_rows_of_one_class_are_named_at_the_left():
    images, labels = noise(9, 8, 8, 1), np.repeat([4, 1, 7], 3)
    picture = image_grid(images, labels)
    corners = find_tiles(picture, images, 6)
    assert len({y for y, _ in corners}) == 3
    ink = text_outside(picture, corners, 48)
    assert len(ink) and ink[:, 1].max() < min(x for _, x in corners)
    for y in {y for y, _ in corners}:
        assert ((ink[:, 0] >= y) & (ink[:, 0] < y + 48)).any()


def test_other_classes_are_named_under_each_image():
    images, labels = noise(5, 8, 8, 1), np.array([0, 1, 2, 1, 0])
    picture = image_grid(images, labels, columns=3)
    corners = find_tiles(picture, images, 6)
    ink = text_outside(picture, corners, 48)
    for y, x in corners:
        below = (ink[:, 0] > y + 48) & (ink[:, 0] < y + 68)
        assert (below & (ink[:, 1] >= x) & (ink[:, 1] < x + 48)).any()


def test_without_labels_there_is_no_text():
    images = noise(5, 8, 8, 1)
    picture = image_grid(images, columns=3)
    assert len(text_outside(picture, find_tiles(picture, images, 6), 48)) == 0


def test_class_names_replace_numbers_and_are_cut_to_fit():
    images, labels = noise(4, 8, 8, 1), np.array([0, 1, 1, 0])
    plain = image_grid(images, labels, columns=4)
    long = image_grid(images, labels, columns=4, class_names=["a" * 50, "b" * 50])
    assert plain.size == long.size and plain.tobytes() != long.tobytes()
    corners = find_tiles(long, images, 6)
    starts = sorted(x for _, x in corners)
    ink = text_outside(long, corners, 48)
    assert all(any(x <= column < x + 48 for x in starts) for column in ink[:, 1])
    with pytest.raises(ValueError, match="0 to 1, but class_names holds 1 names"):
        image_grid(images, labels, class_names=["a"])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4, 1)), None, "uint8.*float64"),
        (np.zeros((2, 4, 4), np.uint8), None, r"\(N, H, W, C\).*\(2, 4, 4\)"),
        (np.zeros((0, 4, 4, 1), np.uint8), None, "not empty"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, int), r"\(2,\).*\(3,\)"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2), "integers, got float64"),
    ],
)
def test_unfit_arrays_are_refused(tmp_path, images, labels, message):
    with pytest.raises(ValueError, match=message):
        image_grid(images, labels)
    if labels is None:
        labels = np.zeros(len(images), int)
    with pytest.raises(ValueError, match=message):
        write_npz(tmp_path / "samples.npz", [images], labels)
    assert not list(tmp_path.iterdir())


def test_unfit_layouts_are_refused():
    with pytest.raises(ValueError, match="1 or 3 channels"):
        image_grid(noise(2, 4, 4, 2))
    for layout in ({"columns": 0}, {"scale": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            image_grid(noise(2, 4, 4, 1), **layout)


def test_png_round_trip(tmp_path):
    picture = image_grid(noise(3, 8, 8, 3), np.arange(3))
    write_png(tmp_path / "new" / "grid.png", picture)
    with Image.open(tmp_path / "new" / "grid.png") as read:
        assert read.format == "PNG"
        np.testing.assert_array_equal(np.asarray(read), np.asarray(picture))


def test_npz_round_trip(tmp_path):
    images, labels = noise(5, 5, 7, 3), np.array([2, 0, 1, 1, 0])
    for name, batches in (("one", [images]), ("some", [images[:2], images[2:3], images[3:]])):
        write_npz(tmp_path / f"{name}.npz", iter(batches), labels, comment="of é")
        with np.load(tmp_path / f"{name}.npz") as read:
            assert read.files == ["arr_0", "arr_1"] and read["arr_0"].dtype == np.uint8
            np.testing.assert_array_equal(read["arr_0"], images)
            np.testing.assert_array_equal(read["arr_1"], labels)
        assert read_comment(tmp_path / f"{name}.npz") == "of é"
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "some.npz").read_bytes()


def test_files_without_a_comment(tmp_path):
    write_npz(tmp_path / "none.npz", [noise(1, 2, 2, 1)], np.zeros(1, int))
    (tmp_path / "broken.npz").write_bytes((tmp_path / "none.npz").read_bytes()[:-5])
    for name in ("none.npz", "broken.npz", "missing.npz"):
        assert read_comment(tmp_path / name) == ""


def test_batches_that_do_not_fit_leave_no_file(tmp_path):
    for batches, message in (
        ([noise(2, 4, 4, 1), noise(1, 4, 5, 1)], r"one shape, got \(4, 4, 1\), \(4, 5, 1\)"),
        ([noise(2, 4, 4, 1)], r"labels must be \(2,\), one an image, got \(3,\)"),
        ([noise(3, 4, 4, 1), noise(3, 4, 4, 1)], r"labels must be \(6,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            write_npz(tmp_path / "samples.npz", batches, np.arange(3))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    class Broken:
        def save(self, file, format):
            file.write(b"half")
            raise OSError("disk full")

    path = tmp_path / "grid.png"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        write_png(path, Broken())
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
