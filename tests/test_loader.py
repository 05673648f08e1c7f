"""Batches: pure in (seed, step), whole epochs, and the same for any number of processes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lasad_jax.data import TokenExamples, held_out_batches, train_batches


def arrays(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that tell which example they are of: the first one is its index."""
    tokens = np.arange(size * 3, dtype=np.int32).reshape(size, 3) // 3
    return tokens, np.arange(size, dtype=np.int32) % 7


def examples(size: int) -> TokenExamples:
    return TokenExamples(*arrays(size))


def take(count: int, *args, **kwargs) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(train_batches(*args, **kwargs), count))


def joined(batches: list[dict[str, np.ndarray]], key: str) -> np.ndarray:
    return np.concatenate([batch[key] for batch in batches])


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


sizes = st.integers(1, 40)
batch_sizes = st.integers(1, 5).map(lambda n: 4 * n)
seeds = st.integers(0, 2**64 - 1)


@settings(max_examples=20, deadline=None)
@given(sizes, batch_sizes, seeds, st.integers(0, 6))
def test_a_run_goes_on_from_any_step(size, batch_size, seed, start):
    kwargs = {"batch_size": batch_size, "seed": seed}
    whole = take(start + 3, examples(size), **kwargs)
    assert_same(take(3, examples(size), start_step=start, **kwargs), whole[start:])


@settings(max_examples=20, deadline=None)
@given(sizes, batch_sizes, seeds, st.sampled_from([1, 2, 4]))
def test_processes_share_the_same_batch(size, batch_size, seed, count):
    kwargs = {"batch_size": batch_size, "seed": seed}
    parts = [
        take(4, examples(size), rows=rows, **kwargs)
        for rows in np.split(np.arange(batch_size), count)
    ]
    whole = take(4, examples(size), **kwargs)
    for step, batch in enumerate(whole):
        for key, value in batch.items():
            shares = [part[step][key] for part in parts]
            assert {len(share) for share in shares} == {batch_size // count}
            np.testing.assert_array_equal(np.concatenate(shares), value)


def test_rows_need_not_be_consecutive():
    kwargs = {"batch_size": 8, "seed": 3}
    rows = np.array([1, 2, 6])
    # 21 images: the third batch runs across the border between epochs.
    for some, whole in zip(
        take(6, examples(21), rows=rows, **kwargs), take(6, examples(21), **kwargs), strict=True
    ):
        assert_same([some], [{name: value[rows] for name, value in whole.items()}])
    parts = held_out_batches(examples(21), batch_size=8, rows=rows)
    np.testing.assert_array_equal(
        [part["mask"] for part in parts], [[1, 1, 1], [1, 1, 1], [1, 1, 0]]
    )


@settings(max_examples=20, deadline=None)
@given(sizes, batch_sizes, seeds)
def test_an_epoch_holds_every_example_once(size, batch_size, seed):
    steps = -(-3 * size // batch_size)
    batches = take(steps, examples(size), batch_size=batch_size, seed=seed)
    rows = joined(batches, "tokens")[:, 0]
    np.testing.assert_array_equal(joined(batches, "labels"), rows % 7)
    for epoch in range(3):
        seen = rows[epoch * size : (epoch + 1) * size]
        np.testing.assert_array_equal(np.sort(seen), np.arange(size))


def test_epochs_and_seeds_are_shuffled_differently():
    orders = [
        tuple(joined(take(8, examples(64), batch_size=8, seed=seed, start_step=s), "tokens")[:, 0])
        for seed in (0, 1)
        for s in (0, 8, 16)
    ]
    orders.append(tuple(range(64)))
    assert len(set(orders)) == 7


def test_batches_are_independent_int32_arrays():
    tokens, labels = arrays(10)
    narrow = TokenExamples(tokens.astype(np.uint16), labels)
    first, second = take(2, narrow, batch_size=8, seed=0)
    for batch in (first, second):
        assert batch["tokens"].shape == (8, 3) and batch["tokens"].dtype == np.int32
        assert batch["labels"].shape == (8,) and batch["labels"].dtype == np.int32
    before = tokens.copy()
    first["tokens"][:] = -1
    np.testing.assert_array_equal(tokens, before)
    assert second["tokens"].min() >= 0


@given(sizes, batch_sizes, st.sampled_from([1, 2, 4]))
def test_held_out_examples_come_once_in_order(size, batch_size, count):
    tokens, labels = arrays(size)
    parts = [
        list(held_out_batches(examples(size), batch_size=batch_size, rows=rows))
        for rows in np.split(np.arange(batch_size), count)
    ]
    assert {len(part) for part in parts} == {-(-size // batch_size)}
    seen = []
    for shares in zip(*parts, strict=True):
        for share in shares:
            assert share["tokens"].shape == (batch_size // count, 3)
            assert share["labels"].shape == share["mask"].shape == (batch_size // count,)
            assert share["mask"].dtype == np.float32 and share["tokens"].dtype == np.int32
            seen.append({key: value[share["mask"] == 1] for key, value in share.items()})
            assert not share["tokens"][share["mask"] == 0].any()
    np.testing.assert_array_equal(joined(seen, "tokens"), tokens)
    np.testing.assert_array_equal(joined(seen, "labels"), labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rows": np.array([2, 4])}, r"rows are \[2 4\].* 0 to 3"),
        ({"rows": np.array([-1, 2])}, r"rows are \[-1  2\]"),
        ({"rows": np.array([2, 1])}, r"rows are \[2 1\]: they must ascend"),
        ({"rows": np.array([], int)}, r"rows are \[\]"),
        ({"seed": -1}, "seed is -1"),
        ({"start_step": -1}, "start_step is -1"),
        ({"num_threads": 0}, "num_threads is 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    kwargs = {"examples": examples(10), "batch_size": 4} | change
    # At the call, not when the first batch is asked for.
    with pytest.raises(ValueError, match=message):
        train_batches(**{"seed": 0} | kwargs)
    if not {"seed", "start_step", "num_threads"} & change.keys():
        with pytest.raises(ValueError, match=message):
            held_out_batches(**kwargs)


@pytest.mark.parametrize(
    ("tokens", "labels", "message"),
    [
        ((10, 3), (9,), r"\(10, 3\) and \(9,\)"),
        ((10,), (10,), r"\(10,\) and \(10,\)"),
        ((0, 3), (0,), "N > 0"),
    ],
)
def test_tokens_and_labels_that_do_not_fit_are_refused(tokens, labels, message):
    with pytest.raises(ValueError, match=message):
        TokenExamples(np.zeros(tokens, np.int32), np.zeros(labels, np.int32))


def test_several_threads_give_the_same_batches():
    kwargs = {"batch_size": 8, "seed": 3}
    assert_same(take(9, examples(21), num_threads=3, **kwargs), take(9, examples(21), **kwargs))
