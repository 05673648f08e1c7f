"""A folder of stored codes of random images, for timing what reads it."""

from pathlib import Path

import numpy as np

from lasad_jax.data.codes import Job, write_codes
from lasad_jax.data.sources.base import Example

_NUM_CLASSES = 1000


class BlankImages:
    """One pixel for each image; its number is its class."""

    def __init__(self, size: int):
        self.class_names = tuple(f"class{i}" for i in range(_NUM_CLASSES))
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        return Example(np.zeros((1, 1, 1), np.uint8), index % _NUM_CLASSES)

    def name(self, index: int) -> str:
        """The number."""
        return str(index)


def write_random_codes(
    directory: Path,
    *,
    images: int,
    augmentations: int,
    grid: tuple[int, int],
    vocab_size: int,
    images_per_shard: int,
    progress: bool = False,
) -> None:
    """Writes one split "train" of 1000 classes.

    Args:
      directory: a new or empty folder.
      images, augmentations: how many, and how many of each.
      grid: rows and columns of an image's codes.
      vocab_size: codes are below.
      images_per_shard: images in a file.
      progress: show a bar.
    """
    sources = {"train": BlankImages(images)}
    rng = np.random.default_rng(0)
    job = Job.of_sources(
        sources,
        source={"name": "random"},
        tokenizer="",
        grid=grid,
        vocab_size=vocab_size,
        views={"train": tuple(map(str, range(augmentations)))},
        images_per_shard=images_per_shard,
    )
    shape = (grid[0] * grid[1],)
    write_codes(
        directory,
        job,
        sources,
        {"train": lambda image: np.repeat(image[None], augmentations, 0)},
        lambda pixels: rng.integers(0, vocab_size, (len(pixels), *shape), np.uint16),
        batch_size=4096,
        progress=progress,
    )
