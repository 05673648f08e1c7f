"""Image sources, pixel tokens and loaders, against NumPy and files made here."""

import gzip
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from lasad_jax.config import DataConfig
from lasad_jax.data import (
    dequantize,
    images_to_tokens,
    load_images,
    open_source,
    quantize,
    tokens_to_images,
)
from lasad_jax.data.sources.idx import write_idx

# Digits


def test_digits_are_all_there_and_stratified():
    bunch = load_digits()
    train, test = load_images(DataConfig(), "train"), load_images(DataConfig(), "test")
    assert train.images.dtype == test.images.dtype == np.uint8
    assert train.labels.dtype == test.labels.dtype == np.int32
    assert train.images.shape[1:] == test.images.shape[1:] == (8, 8, 1)
    assert train.num_classes == test.num_classes == 10
    counts = np.bincount(bunch.target)
    np.testing.assert_array_equal(np.bincount(test.labels), counts // 5)
    np.testing.assert_array_equal(np.bincount(train.labels), counts - counts // 5)
    for label in range(10):
        original = bunch.images[bunch.target == label]
        held_out = np.arange(len(original)) % 5 == 4
        for part, chosen in ((train, ~held_out), (test, held_out)):
            values = part.images[part.labels == label, ..., 0] / 255 * 16
            np.testing.assert_array_equal(np.rint(values), original[chosen])


def test_digits_split_is_fixed():
    first, second = load_images(DataConfig(), "test"), load_images(DataConfig(), "test")
    np.testing.assert_array_equal(first.images, second.images)


# IDX files


def idx_config(directory, **fields) -> DataConfig:
    return DataConfig(source="idx", directory=str(directory), **fields)


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def sample():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (7, 3, 5)), np.array([0, 3, 1, 2, 3, 0, 1])


@pytest.mark.parametrize("mark", ["-", "."])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(("split", "prefix"), [("train", "train"), ("test", "t10k")])
def test_idx_files_are_read(tmp_path, sample, mark, zipped, split, prefix):
    for name, array in zip(("images{}idx3", "labels{}idx1"), sample, strict=True):
        path = tmp_path / f"{prefix}-{name.format(mark)}-ubyte{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    got = load_images(idx_config(tmp_path), split)
    assert got.images.shape == (7, 3, 5, 1) and got.images.dtype == np.uint8
    assert got.labels.dtype == np.int32 and got.num_classes == 4
    np.testing.assert_array_equal(got.images[..., 0], sample[0])
    np.testing.assert_array_equal(got.labels, sample[1])


def write_pair(folder, images: bytes, labels: bytes, end: str = ""):
    (folder / f"train-images-idx3-ubyte{end}").write_bytes(images)
    (folder / f"train-labels-idx1-ubyte{end}").write_bytes(labels)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x[:-1], r"images-idx3-ubyte.*120 bytes.*announces 121"),
        (lambda x: x + b"\0", r"122 bytes.*announces 121"),
        (lambda x: x[:9], r"truncated"),
        (lambda x: x[:2], r"begins with '0000'"),
        (lambda x: b"", r"begins with ''"),
        (lambda x: b"\x89PNG" + x[4:], r"begins with '89504e47' and not 00000803"),
        (lambda x: bytes([0, 0, 0x0D, 3]) + x[4:], r"begins with '00000d03'"),
        (lambda x: idx(np.zeros((6, 3, 5))), r"6 images but train-labels.* 7 labels"),
    ],
)
def test_spoiled_idx_files_are_refused(tmp_path, sample, spoil, message):
    write_pair(tmp_path, spoil(idx(sample[0])), idx(sample[1]))
    with pytest.raises(ValueError, match=rf"data\.directory(?s:.*){message}"):
        load_images(idx_config(tmp_path), "train")


@pytest.mark.parametrize("spoil", [lambda x: x[:-9], lambda x: b"plain" + x, lambda x: x[:30]])
def test_spoiled_gzip_is_refused(tmp_path, sample, spoil):
    write_pair(tmp_path, spoil(gzip.compress(idx(sample[0]))), gzip.compress(idx(sample[1])), ".gz")
    with pytest.raises(ValueError, match=r"data\.directory.*does not unpack.*fetch it again"):
        load_images(idx_config(tmp_path), "train")


def test_empty_idx_file_is_refused(tmp_path):
    write_pair(tmp_path, idx(np.zeros((0, 3, 5))), idx(np.zeros(0)))
    with pytest.raises(ValueError, match="no images"):
        load_images(idx_config(tmp_path), "train")


def test_written_idx_files_come_back_with_their_names(tmp_path, sample):
    images, labels = (array.astype(np.uint8) for array in sample)
    parts = {"train": (images, labels), "test": (images[:2], labels[:2] % 2)}
    write_idx(tmp_path, parts, ["a", "b b", "ç", "d", "e"])
    for split, part in parts.items():
        got = load_images(idx_config(tmp_path), split)
        np.testing.assert_array_equal(got.images[..., 0], part[0])
        np.testing.assert_array_equal(got.labels, part[1])
        assert got.class_names == ("a", "b b", "ç", "d", "e")
    content = gzip.decompress((tmp_path / "train-images-idx3-ubyte.gz").read_bytes())
    assert content == idx(images)
    with pytest.raises(ValueError, match="train labels must be uint8, got int64"):
        write_idx(tmp_path, {"train": (images, sample[1])}, [])
    (tmp_path / "class_names.txt").write_text("a\nb\n")
    assert load_images(idx_config(tmp_path), "test").class_names == ("a", "b")
    with pytest.raises(ValueError, match=r"class_names\.txt.* names 2 classes.* run to 3"):
        load_images(idx_config(tmp_path), "train")


def test_missing_idx_files_are_named(tmp_path, sample):
    hint = "dataset-fashion-mnist"
    with pytest.raises(FileNotFoundError, match=rf"data\.directory is empty.*{hint}"):
        load_images(idx_config(""), "train")
    with pytest.raises(FileNotFoundError, match=rf"data\.directory.*nowhere.*{hint}"):
        load_images(idx_config(tmp_path / "nowhere"), "train")
    with pytest.raises(FileNotFoundError, match=rf"train-images-idx3-ubyte\.gz.*{hint}"):
        load_images(idx_config(tmp_path), "train")
    write_pair(tmp_path, idx(sample[0]), idx(sample[1]))
    with pytest.raises(FileNotFoundError, match="t10k-images"):
        load_images(idx_config(tmp_path), "test")


@pytest.mark.parametrize(("fit", "border"), [("pad", 0), ("crop", None)])
def test_image_size_and_channels_apply_to_arrays_in_memory(tmp_path, sample, fit, border):
    write_pair(tmp_path, idx(sample[0]), idx(sample[1]))
    data = idx_config(tmp_path, image_size=(7, 9), fit=fit, background=0)
    got = load_images(data, "train", channels=3)
    assert got.images.shape == (7, 7, 9, 3) and got.num_classes == 4
    np.testing.assert_array_equal(got.images[..., 0], got.images[..., 2])
    if fit == "pad":
        np.testing.assert_array_equal(got.images[:, 2:5, 2:7, 1], sample[0])
        assert got.images[:, :2].max() == border


def test_unknown_sources_splits_and_channels_are_named():
    with pytest.raises(ValueError, match=r"data\.source is 'codes'.*digits, idx, folder, tfds"):
        load_images(DataConfig(source="codes"), "train")
    with pytest.raises(ValueError, match=r"split is 'valid'.*train, test"):
        load_images(DataConfig(), "valid")
    with pytest.raises(ValueError, match=r"channels is 4; choose 1 .* or 3"):
        open_source(DataConfig(), "train", channels=4)


# Pixel tokens


@given(st.integers(2, 256))
def test_quantize_rounds_to_the_nearest_level(levels):
    x = np.arange(256, dtype=np.uint8)
    tokens = quantize(x, levels)
    assert tokens.dtype == np.int32
    distance = np.abs(x[:, None] / 255 - np.arange(levels) / (levels - 1))
    np.testing.assert_array_equal(tokens, distance.argmin(1))


@given(st.integers(2, 256))
def test_tokens_survive_the_round_trip(levels):
    tokens = np.arange(levels, dtype=np.int32)
    images = dequantize(tokens, levels)
    assert images.dtype == np.uint8 and images[0] == 0 and images[-1] == 255
    np.testing.assert_array_equal(quantize(images, levels), tokens)


@given(st.integers(2, 256))
def test_bytes_come_back_within_half_a_level(levels):
    x = np.arange(256, dtype=np.uint8)
    error = np.abs(dequantize(quantize(x, levels), levels).astype(int) - x.astype(int))
    assert error.max() <= 127.5 / (levels - 1) + 0.5
    assert levels < 256 or error.max() == 0


def test_images_are_their_own_grid_in_raster_order():
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 1), dtype=np.uint8)
    tokens = images_to_tokens(images, 256)
    assert tokens.shape == (4, 15) and tokens.dtype == np.int32
    assert tokens[2, 1 * 5 + 4] == images[2, 1, 4, 0]
    np.testing.assert_array_equal(tokens_to_images(tokens, (3, 5), 256), images)
    assert tokens_to_images(tokens[:0], (3, 5), 256).shape == (0, 3, 5, 1)
    assert images_to_tokens(images[:0], 256).shape == (0, 15)


@pytest.mark.parametrize("levels", [0, 1, 257])
def test_impossible_levels_are_refused(levels):
    for call in (quantize, dequantize):
        with pytest.raises(ValueError, match=rf"data\.levels is {levels}"):
            call(np.zeros(3, np.uint8), levels)


def test_unfit_images_and_tokens_are_refused():
    with pytest.raises(ValueError, match="one channel"):
        images_to_tokens(np.zeros((2, 4, 4, 3), np.uint8), 16)
    with pytest.raises(ValueError, match="uint8"):
        quantize(np.zeros((2, 4, 4, 1)), 16)
    for token in (-1, 16):
        with pytest.raises(ValueError, match=r"data\.levels=16"):
            dequantize(np.array([3, token]), 16)
    with pytest.raises(ValueError, match="must be integers"):
        dequantize(np.zeros(3), 16)
    with pytest.raises(ValueError, match=r"3 x 5 takes tokens of shape \(N, 15\)"):
        tokens_to_images(np.zeros((2, 16), np.int32), (3, 5), 16)
