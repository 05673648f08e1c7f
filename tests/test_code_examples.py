"""Stored codes as examples: the right image and augmentation for every row of every epoch."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_codes import code_of, one_view, small_sources, three_views, write

from lasad_jax.data import held_out_batches, train_batches
from lasad_jax.data.codes import CodeExamples
from lasad_jax.data.codes.reading import draw_augmentations

BROKEN = [0, 8, *range(14, 21)]
ROWS = [i for i in range(31) if i not in BROKEN]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Shards of 7 images, one of them empty, two with an image missing."""
    folder = tmp_path_factory.mktemp("codes")
    write(folder, small_sources(train=31, broken=BROKEN), max_unreadable=0.5)
    return folder


@pytest.fixture(scope="module")
def stored(directory):
    return CodeExamples(directory, "train")


def every_code() -> np.ndarray:
    """(rows, augmentations, codes) of the readable training images, by a loop."""
    source = small_sources(train=31)["train"]
    return np.array([[code_of(view) for view in three_views(source.images[i])] for i in ROWS])


def take(count: int, *args, **kwargs) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(train_batches(*args, **kwargs), count))


def splitmix64(state: int) -> int:
    """The finaliser in whole numbers, to compare with."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, len(ROWS) - 1), max_size=20), st.integers(0, 2**64 - 1), st.data())
def test_rows_in_any_order_give_the_codes_of_their_drawn_augmentation(stored, rows, seed, data):
    epochs = data.draw(st.lists(st.integers(0, 400), min_size=len(rows), max_size=len(rows)))
    rows, epochs = np.array(rows, int), np.array(epochs, int)
    batch = stored.batch(rows, epochs, seed)
    drawn = draw_augmentations(rows, epochs, seed, 3)
    labels = small_sources(train=31)["train"].labels[ROWS]
    assert batch["tokens"].shape == (len(rows), 6)
    assert batch["tokens"].dtype == batch["labels"].dtype == np.int32
    np.testing.assert_array_equal(batch["tokens"], every_code()[rows, drawn].reshape(-1, 6))
    np.testing.assert_array_equal(batch["labels"], labels[rows])
    first = stored.batch(rows)
    np.testing.assert_array_equal(first["tokens"], every_code()[rows, 0].reshape(-1, 6))


@given(
    st.integers(0, 2**64 - 1), st.integers(0, 2**31), st.integers(0, 2**40), st.integers(1, 2**16)
)
def test_the_drawn_augmentation_is_the_hash_of_seed_epoch_and_row(seed, epoch, row, count):
    hashed = splitmix64(splitmix64(splitmix64(seed) ^ epoch) ^ row)
    drawn = draw_augmentations(np.array([row]), np.array([epoch]), seed, count)
    assert drawn.tolist() == [(hashed >> 32) * count >> 32]


def test_the_hash_is_the_published_one():
    # First outputs of SplitMix64 from state 0: its state grows by the constant that `splitmix64`
    # adds, so they are the hashes of 0 and of that constant.
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4


def test_augmentations_are_uniform_over_rows_and_over_epochs():
    many, same = np.arange(20_000), np.zeros(20_000, int)
    for rows, epochs in ((many, same + 3), (same + 5, many), (many, many)):
        counts = np.bincount(draw_augmentations(rows, epochs, 7, 10), minlength=10)
        # Chi-squared with 9 degrees of freedom exceeds 33.7 once in ten thousand times.
        assert ((counts - 2000) ** 2 / 2000).sum() < 33.7
    one, two = (draw_augmentations(many, same + epoch, 7, 10) for epoch in (1, 2))
    assert abs(np.mean(one == two) - 0.1) < 0.01


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**64 - 1), st.integers(0, 12))
def test_batches_are_the_same_for_any_processes_and_from_any_step(directory, size, seed, start):
    kwargs = {"batch_size": 4 * size, "seed": seed}
    whole = take(start + 3, CodeExamples(directory, "train"), **kwargs)[start:]
    for count in (1, 2, 4):
        parts = [
            take(
                3,
                CodeExamples(directory, "train"),
                start_step=start,
                rows=rows,
                **kwargs,
            )
            for rows in np.split(np.arange(4 * size), count)
        ]
        for step, batch in enumerate(whole):
            for key, value in batch.items():
                shares = np.concatenate([part[step][key] for part in parts])
                np.testing.assert_array_equal(shares, value)


def test_every_epoch_shows_each_image_once_and_in_time_every_augmentation(stored):
    epochs, size = 24, len(ROWS)
    batches = take(epochs * size // 11 + 1, stored, batch_size=11, seed=5)
    tokens = np.concatenate([batch["tokens"] for batch in batches])[: epochs * size]
    where = {tuple(code): at for at, code in np.ndenumerate(list_of_tuples())}
    seen = np.array([where[tuple(row)] for row in tokens.tolist()]).reshape(epochs, size, 2)
    for epoch in seen:
        np.testing.assert_array_equal(np.sort(epoch[:, 0]), np.arange(size))
    assert len({tuple(pair) for pair in seen.reshape(-1, 2)}) == size * 3


def list_of_tuples() -> np.ndarray:
    """`every_code` with each image's codes as one tuple."""
    codes = every_code()
    tuples = np.empty(codes.shape[:2], object)
    for at in np.ndindex(tuples.shape):
        tuples[at] = tuple(codes[at].tolist())
    return tuples


def test_held_out_examples_come_once_in_order_as_first_view(stored):
    batches = list(held_out_batches(stored, batch_size=5))
    mask = np.concatenate([batch["mask"] for batch in batches])
    tokens = np.concatenate([batch["tokens"] for batch in batches])[mask == 1]
    np.testing.assert_array_equal(tokens, every_code()[:, 0])


def test_a_process_without_a_row_of_the_last_held_out_batch_gets_zeros(directory):
    part = held_out_batches(CodeExamples(directory, "test"), batch_size=8, rows=np.arange(4, 8))
    (batch,) = part
    source = small_sources()["test"]
    np.testing.assert_array_equal(batch["mask"], [1, 0, 0, 0])
    assert batch["tokens"][0].tolist() == code_of(one_view(source.images[4])[0])
    assert not batch["tokens"][1:].any()
    part = held_out_batches(CodeExamples(directory, "test"), batch_size=20, rows=np.arange(10, 20))
    (batch,) = part
    assert batch["tokens"].shape == (10, 6) and not batch["mask"].any()


def test_pickled_examples_open_their_files_anew(stored):
    rows = np.arange(len(stored))
    before = stored.batch(rows)
    copy = pickle.loads(pickle.dumps(stored))
    assert len(copy) == len(stored) == len(ROWS)
    np.testing.assert_array_equal(copy.batch(rows)["tokens"], before["tokens"])


def test_several_threads_give_the_same_batches(directory, stored):
    kwargs = {"batch_size": 8, "seed": 3}
    several = take(40, CodeExamples(directory, "train"), num_threads=4, **kwargs)
    for a, b in zip(several, take(40, stored, **kwargs), strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])


def test_a_split_without_images_is_refused(directory, tmp_path):
    with pytest.raises(ValueError, match=r"no images of split 'validation', only of .*train.*test"):
        CodeExamples(directory, "validation")
    write(tmp_path, small_sources(train=4, broken=range(4)), max_unreadable=1.0)
    with pytest.raises(ValueError, match=r"no images of split 'train', only of .'test'"):
        CodeExamples(tmp_path, "train")
