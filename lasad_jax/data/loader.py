"""Batches as a pure function of (seed, step), whatever the number of processes.

The epochs laid end to end are one endless sequence of examples; the batch of step k is its
k-th block of `batch_size`, of which a process makes the rows that its devices hold. So a run
goes on from a single stored number, the step, on any number of processes.
"""

import functools
import sys
from collections.abc import Iterator
from typing import Protocol

import grain
import numpy as np
from jaxtyping import Integer

Batch = dict[str, np.ndarray]


class Examples(Protocol):
    """What a model is trained on, image by image; each may look different in every epoch."""

    def __len__(self) -> int:
        """N, the number of images."""
        ...

    def batch(
        self,
        rows: Integer[np.ndarray, " b"],
        epochs: Integer[np.ndarray, " b"] | None = None,
        seed: int = 0,
    ) -> Batch:
        """Some images, from any thread.

        Args:
          rows: which, from 0 to N - 1.
          epochs: of each row, for images that look different in each; None for how they look
            when held out, the same always.
          seed: of that difference, from 0 to 2^64 - 1.

        Returns:
          New arrays with b rows that are a pure function of the arguments: "tokens" (b, L)
          and "labels" (b,), both int32, or "images" (b, R, C, channels), uint8.
        """
        ...


class TokenExamples:
    """Tokens in memory or memory-mapped, the same in every epoch."""

    def __init__(self, tokens: Integer[np.ndarray, "N L"], labels: Integer[np.ndarray, " N"]):
        """Raises a ValueError for shapes that do not fit, or no images."""
        if tokens.ndim != 2 or labels.shape != tokens.shape[:1] or len(tokens) == 0:
            raise ValueError(
                "tokens and labels must have shapes (N, L) and (N,) with N > 0, "
                f"got {tokens.shape} and {labels.shape}"
            )
        self._tokens, self._labels = tokens, labels

    def __len__(self) -> int:
        return len(self._tokens)

    def batch(
        self,
        rows: Integer[np.ndarray, " b"],
        epochs: Integer[np.ndarray, " b"] | None = None,
        seed: int = 0,
    ) -> Batch:
        """See `Examples`; epochs and seed make no difference."""
        del epochs, seed
        return {
            "tokens": np.asarray(self._tokens[rows], np.int32),
            "labels": np.asarray(self._labels[rows], np.int32),
        }


def train_batches(
    examples: Examples,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: Integer[np.ndarray, " b"] | None = None,
    num_threads: int = 1,
) -> Iterator[Batch]:
    """Endless shuffled batches, made ahead of time on threads.

    Each epoch has its own order and holds every example once; where N is no multiple of
    `batch_size`, batches run across the border between epochs.

    Args:
      batch_size: of the global batch, all processes together.
      seed: of the order and of `examples`, from 0 to 2^64 - 1.
      start_step: where to begin: the first batch is the one of this step.
      rows: which of each batch are this process's, ascending from 0 to batch_size - 1 at most;
        None for all.
      num_threads: that make batches. More than one helps only where reading waits for the
        disk or the network: they contend for the interpreter.

    Returns:
      An iterator over what `examples` give for those rows.

    Raises:
      ValueError: numbers out of range.
    """
    rows = _check_rows(batch_size, rows)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}; choose one from 0 to 2^64 - 1")
    if start_step < 0:
        raise ValueError(f"start_step is {start_step}; steps count from 0")
    if num_threads < 1:
        raise ValueError(f"num_threads is {num_threads}; it must be at least 1")
    size = len(examples)

    # Philox is a counter-based generator whose stream NumPy promises never to change, unlike
    # that of Generator.permutation; (seed, epoch) is its whole key. Two epochs are kept, as
    # a batch may reach from one into the next.
    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        key = np.array([seed, epoch], np.uint64)
        return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")

    def make_batch(step: int) -> Batch:
        epochs, places = np.divmod(step * batch_size + rows, size)
        chosen = np.concatenate([order(int(e))[places[epochs == e]] for e in np.unique(epochs)])
        return examples.batch(chosen, epochs, seed)

    steps = grain.MapDataset.range(start_step, sys.maxsize)
    ahead = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * num_threads)
    return iter(steps.map(make_batch).to_iter_dataset(ahead))


def held_out_batches(
    examples: Examples, *, batch_size: int, rows: Integer[np.ndarray, " b"] | None = None
) -> Iterator[Batch]:
    """One pass in order, every batch of full size.

    Args:
      batch_size, rows: as of `train_batches`.

    Returns:
      An iterator over what `train_batches` gives and "mask" (b,) float32: 1 for an example, 0
      for the zeros that fill up the last batch.

    Raises:
      ValueError: numbers out of range.
    """
    rows = _check_rows(batch_size, rows)

    def make_batch(start: int) -> Batch:
        real = start + rows
        real = real[real < len(examples)]
        batch = examples.batch(real) | {"mask": np.ones(len(real), np.float32)}
        fill = len(rows) - len(real)
        return {
            name: np.pad(value, [(0, fill)] + [(0, 0)] * (value.ndim - 1))
            for name, value in batch.items()
        }

    return map(make_batch, range(0, len(examples), batch_size))


def _check_rows(
    batch_size: int, rows: Integer[np.ndarray, " b"] | None
) -> Integer[np.ndarray, " b"]:
    """The rows, or all, after checking them."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if rows is None:
        return np.arange(batch_size)
    if len(rows) == 0 or rows[0] < 0 or rows[-1] >= batch_size or np.any(np.diff(rows) <= 0):
        raise ValueError(f"rows are {rows}: they must ascend and lie in 0 to {batch_size - 1}")
    return rows
