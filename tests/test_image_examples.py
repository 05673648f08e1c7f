"""Images as a tokenizer's examples: augmentation, processes, memory and files."""

import os

import numpy as np
import pytest
from absl import logging
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from source_cases import folder

from lasad_jax.config import AugmentConfig, DataConfig
from lasad_jax.data import held_out_batches, image_examples, load_images, train_batches
from lasad_jax.data.image_examples import ImageExamples

TRAIN, TEST = 13, 5
SIZES = ((17, 23), (9, 40), (31, 12), (8, 8))
AUGMENT = AugmentConfig(min_crop=0.6)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Noise of several sizes, in folders train and test of two classes."""
    top, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("test", TEST)):
        for i in range(count):
            path = top / split / f"class{i % 2}" / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (*SIZES[i % 4], 3), np.uint8)).save(path)
    return top


@pytest.fixture(params=["memory", "files"])
def place(request, monkeypatch):
    """Where images are read from while the test runs."""
    if request.param == "files":
        monkeypatch.setattr(image_examples, "_MEMORY", 0)
    return request.param


def open_examples(directory, split="train", *, channels=3, augment=AUGMENT, **fields):
    data = folder(directory, **{"image_size": (10, 7)} | fields)
    return ImageExamples(data, split, channels=channels, augment=augment)


def batch(examples, rows, epochs=None, seed=0):
    epochs = None if epochs is None else np.array(epochs)
    return examples.batch(np.array(rows, np.int64), epochs, seed)["images"]


# Augmentation


@pytest.fixture(scope="module")
def examples(directory):
    return open_examples(directory)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, TRAIN - 1), st.integers(0, 2**40)), max_size=6),
    st.integers(0, 2**64 - 1),
)
def test_an_image_depends_on_seed_epoch_and_row_alone(examples, directory, wanted, seed):
    rows, epochs = [row for row, _ in wanted], [epoch for _, epoch in wanted]
    together = batch(examples, rows, epochs, seed)
    assert together.shape == (len(wanted), 10, 7, 3)
    assert together.dtype == np.uint8
    other = open_examples(directory)
    for i in reversed(range(len(wanted))):
        alone = batch(other, rows[i : i + 1], epochs[i : i + 1], seed)
        np.testing.assert_array_equal(alone[0], together[i])


def test_epochs_seeds_and_rows_each_draw_anew(tmp_path):
    # One picture under several names: rows differ in what is drawn alone.
    pixels = np.random.default_rng(1).integers(0, 256, (40, 28, 3), np.uint8)
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for i in range(3):
            Image.fromarray(pixels).save(tmp_path / split / f"{i}.png")
    examples = open_examples(tmp_path, image_size=(90, 70))
    drawn = [
        batch(examples, [row], [epoch], seed).tobytes()
        for row in range(3)
        for epoch in (0, 1, 2**32)
        for seed in (0, 1, 2**63)
    ]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("flip", [True, False])
def test_without_crops_an_image_is_itself_or_mirrored(directory, flip):
    examples = open_examples(directory, augment=AugmentConfig(min_crop=1.0, flip=flip))
    plain = load_images(folder(directory), "train", channels=3, size=(10, 7)).images
    rows, epochs = np.divmod(np.arange(TRAIN * 20), 20)
    got = batch(examples, rows, epochs)
    same = (got == plain[rows]).all((1, 2, 3))
    mirrored = (got == plain[rows][:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    # Of 260 draws: six standard deviations on either side of a half.
    assert 81 < mirrored.sum() < 179 if flip else not mirrored.any()


def test_crops_keep_no_less_than_the_smallest_share(tmp_path):
    """On a ramp the range of grey values tells the share of the columns that is kept."""
    ramp = np.tile(np.linspace(0, 255, 60), (40, 1)).round().astype(np.uint8)
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        Image.fromarray(ramp).save(tmp_path / split / "0.png")
    augment = AugmentConfig(min_crop=0.5, flip=False)
    examples = open_examples(tmp_path, augment=augment, channels=1, image_size=(20, 30))
    got = batch(examples, np.zeros(300, np.int64), np.arange(300)).astype(float)
    share = (got[..., -1, 0] - got[..., 0, 0]).mean(1) / 255
    assert 0.45 < share.min() < 0.55
    assert 0.95 < share.max() < 1.01
    starts = got[share < 0.6][:, :, 0, 0].mean(1) / 255
    assert starts.min() < 0.05
    assert starts.max() > 0.35


# Processes, memory and files


@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_share_the_batches_of_one(directory, place, num_processes):
    del place
    training, held_out = open_examples(directory), open_examples(directory, "test", augment=None)

    def steps(rows):
        share = {"rows": rows}
        batches = train_batches(training, batch_size=8, seed=3, start_step=1, **share)
        trained = [next(batches)["images"] for _ in range(4)]
        tested = list(held_out_batches(held_out, batch_size=8, **share))
        return [*trained, *(part[name] for part in tested for name in ("images", "mask"))]

    whole = steps(None)
    # Across the border between epochs.
    assert sum(len(part) for part in whole[:4]) > TRAIN
    parts = [steps(rows) for rows in np.split(np.arange(8), num_processes)]
    for i, expected in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([part[i] for part in parts]), expected)


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("channels", [1, 3])
def test_memory_and_files_give_the_same_batches(directory, monkeypatch, channels, fit):
    def both_splits():
        fields = {"channels": channels, "fit": fit, "background": 99}
        training = open_examples(directory, **fields)
        held_out = open_examples(directory, "test", augment=None, **fields)
        rows = np.arange(3 * TRAIN) % TRAIN
        batches = batch(training, rows, np.arange(3 * TRAIN)), batch(held_out, np.arange(TEST))
        assert batches[0].shape[1:] == batches[1].shape[1:] == (10, 7, channels)
        return batches

    from_memory = both_splits()
    monkeypatch.setattr(image_examples, "_MEMORY", 0)
    monkeypatch.setattr(image_examples, "load_images", None)
    from_files = both_splits()
    for ours, theirs in zip(from_memory, from_files, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_images_are_kept_in_memory_up_to_its_size(directory, monkeypatch):
    # Of ceil(10 / 0.6) x ceil(7 / 0.6) pixels.
    needed = TRAIN * 17 * 12 * 3
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    for memory, threads in ((needed, 2), (needed - 1, 5)):
        monkeypatch.setattr(image_examples, "_MEMORY", memory)
        assert open_examples(directory).num_threads == threads


def test_an_unreadable_file_gives_way_to_its_neighbour(tmp_path, monkeypatch):
    rng = np.random.default_rng(2)
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for i in range(6):
            pixels = rng.integers(0, 256, (10, 7, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / f"{i}.png")
    plain = load_images(folder(tmp_path), "train", channels=3).images
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: warnings.append(text % args))
    monkeypatch.setattr(image_examples, "_MEMORY", 0)
    for i in (1, 2, 5):
        (tmp_path / "train" / f"{i}.png").write_bytes(b"broken")
    examples = open_examples(tmp_path, augment=None)
    assert len(examples) == 6
    # Two in a row, and the last one, whose neighbour is the first.
    np.testing.assert_array_equal(batch(examples, range(6)), plain[[0, 3, 3, 3, 4, 0]])
    assert len(warnings) == 4
    assert all("train/" in text and "neighbour" in text for text in warnings)
    # Its neighbour is cut as it would be itself: by its own row.
    augmented = open_examples(tmp_path)
    assert (batch(augmented, [1], [0]) != batch(augmented, [3], [0])).any()

    for i in range(6):
        (tmp_path / "train" / f"{i}.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"data\.directory: no image in .* can be read"):
        batch(open_examples(tmp_path, augment=None), [0])


# Held-out images and sizes


@pytest.mark.parametrize("size", [(10, 7), (1, 1), (33, 2), (1, 50)])
def test_held_out_images_are_those_of_load_images(directory, place, size):
    del place
    examples = open_examples(directory, "test", augment=None, image_size=size)
    expected = load_images(folder(directory, image_size=size), "test", channels=3).images
    assert examples.size == size
    assert len(examples) == TEST
    rows = [3, 0, 3, 4]
    np.testing.assert_array_equal(batch(examples, rows), expected[rows])
    # Without augmentation epochs make no difference.
    np.testing.assert_array_equal(batch(examples, rows, [0, 1, 2, 3]), expected[rows])


@pytest.mark.parametrize("size", [(1, 1), (3, 20), (10, 10)])
def test_training_images_have_the_size_asked_for(directory, place, size):
    del place
    examples = open_examples(directory, image_size=size)
    assert examples.size == size
    rows = np.arange(40) % TRAIN
    assert batch(examples, rows, np.arange(40)).shape == (40, *size, 3)
    assert batch(examples, [], []).shape == (0, *size, 3)


def test_without_a_size_arrays_keep_theirs_and_files_are_refused(tmp_path):
    digits = ImageExamples(DataConfig(), "test", channels=1)
    assert digits.size == (8, 8)
    assert batch(digits, [0]).shape == (1, 8, 8, 1)
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        Image.new("L", (9, 6)).save(tmp_path / name / "0.png")
    with pytest.raises(ValueError, match=r"data.image_size: \(0, 0\) .*'folder' may differ"):
        open_examples(tmp_path, image_size=(0, 0))
