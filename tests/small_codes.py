"""Stored codes of random images, with a tokenizer that a loop can imitate."""

import jax
import jax.numpy as jnp
import numpy as np

from lasad_jax.data.codes import Job, write_codes
from lasad_jax.data.sources.base import Example, UnreadableImage

GRID = (2, 3)
SHAPE = (4, 6, 1)


class ArraySource:
    """Random images; those of `broken` cannot be read."""

    class_names = ("cat", "dog", "emu")

    def __init__(self, size: int, seed: int = 0, broken=()):
        rng = np.random.default_rng(seed)
        self.images = rng.integers(0, 256, (size, *SHAPE), np.uint8)
        self.labels = rng.integers(0, 3, size)
        self.broken = set(broken)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        if index in self.broken:
            raise UnreadableImage(self.name(index), "cut short")
        return Example(self.images[index], int(self.labels[index]))

    def name(self, index: int) -> str:
        return f"image{index}.png"


def three_views(image: np.ndarray) -> np.ndarray:
    return np.stack([image, image[:, ::-1], 255 - image])


def one_view(image: np.ndarray) -> np.ndarray:
    return image[None]


@jax.jit
def encode(pixels) -> jax.Array:
    """Sums of 2x2 pixels, 0 to 1020, as codes of a grid of 2 x 3."""
    blocks = pixels.astype(jnp.int32).reshape(-1, 2, 2, 3, 2)
    return blocks.sum((2, 4)).reshape(len(pixels), 6)


def code_of(view: np.ndarray) -> list[int]:
    """What `encode` must give for one view, by a loop."""
    return [
        int(view[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].astype(int).sum())
        for r in range(GRID[0])
        for c in range(GRID[1])
    ]


def small_sources(train: int = 23, test: int = 5, broken=()) -> dict[str, ArraySource]:
    return {"train": ArraySource(train, 1, broken), "test": ArraySource(test, 2)}


def small_job(sources, **changes) -> Job:
    fields = {
        "source": {"name": "random", "seed": [1, 2]},
        "tokenizer": "0123456789abcdef",
        "grid": GRID,
        "vocab_size": 1021,
        "views": {"train": ("plain", "mirrored", "inverted"), "test": ("plain",)},
        "images_per_shard": 7,
    }
    return Job.of_sources(sources, **fields | changes)


def write(directory, sources=None, *, job=None, **changes):
    """`write_codes` of small sources; `changes` are its arguments."""
    sources = sources or small_sources()
    arguments = {"encode": encode, "batch_size": 4, "progress": False, "num_threads": 2}
    views = {"train": three_views, "test": one_view}
    return write_codes(directory, job or small_job(sources), sources, views, **arguments | changes)


def files_of(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


class KilledError(Exception):
    """Stands for the death of the process."""


def failing_at(call: int):
    """`encode` that dies in its `call`-th call."""
    calls = iter(range(call + 1))

    def dying(pixels):
        if next(calls) == call:
            raise KilledError
        return encode(pixels)

    return dying
