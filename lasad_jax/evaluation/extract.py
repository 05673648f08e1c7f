"""Features of any number of images, batch by batch, on all devices of all processes."""

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import UInt8
from tqdm import tqdm

from lasad_jax.data.codes.ahead import map_ahead
from lasad_jax.evaluation.features import Extractor, Features

# Features are given out in blocks of so many images whatever the devices, so that sums over
# blocks are the same to the last bit.
BLOCK = 512


class Images(Protocol):
    """Images of one shape, of which any stretch can be read.

    Attributes:
      shape: rows, columns and channels of each.
    """

    shape: tuple[int, int, int]

    def __len__(self) -> int:
        """The number of images."""

    def read(self, first: int, last: int) -> UInt8[np.ndarray, "n h w channels"]:
        """Images first to last - 1; `Extraction` asks for stretches in rising order."""


class ArrayImages:
    """Images in memory."""

    def __init__(self, images: UInt8[np.ndarray, "N h w channels"]):
        self._images, self.shape = images, images.shape[1:]

    def __len__(self) -> int:
        return len(self._images)

    def read(self, first: int, last: int) -> UInt8[np.ndarray, "n h w channels"]:
        """A view of the array."""
        return self._images[first:last]


class MadeImages:
    """Images that are made when they are asked for.

    Args:
      count: how many there are.
      shape: rows, columns and channels of each.
      make: (first, last) -> uint8 (last - first, *shape).
    """

    def __init__(
        self, count: int, shape: tuple[int, int, int], make: Callable[[int, int], np.ndarray]
    ):
        self._count, self.shape, self.read = count, shape, make

    def __len__(self) -> int:
        return self._count


class Extraction:
    """An extractor at work: its parameters on every device of this process, compiled once.

    A device sees `per_device` images at a time, whatever there are of others: so each image's
    features are the same, to the last bit, on any number of devices of a kind.

    Args:
      extractor: the network.
      devices: of this process; by default all. Every process must have as many.
      per_device: images that a device computes at once.
    """

    def __init__(
        self,
        extractor: Extractor,
        *,
        devices: Sequence[jax.Device] | None = None,
        per_device: int = 64,
    ):
        devices = jax.local_devices() if devices is None else list(devices)
        self.extractor = extractor
        self._share = per_device * len(devices)
        self._mesh = jax.make_mesh(
            (len(devices),), ("batch",), axis_types=(AxisType.Auto,), devices=devices
        )
        rows, whole = PartitionSpec("batch"), PartitionSpec()
        self._rows = NamedSharding(self._mesh, rows)
        self._params = jax.device_put(extractor.params, NamedSharding(self._mesh, whole))
        self._apply = jax.jit(
            jax.shard_map(
                extractor.apply,
                mesh=self._mesh,
                in_specs=(whole, rows),
                out_specs=rows,
                check_vma=False,
            )
        )

    def dims(self, shape: tuple[int, int, int]) -> Features:
        """The numbers (D, S, K) of features of an image of `shape`.

        Raises:
          ValueError: images that the extractor does not take.
        """
        self.check(shape)
        image = jax.ShapeDtypeStruct((1, *shape), np.uint8)
        features = jax.eval_shape(self.extractor.apply, self.extractor.params, image)
        return Features(*(feature.shape[1] for feature in features))

    def check(self, shape: tuple[int, int, int]) -> None:
        """Refuses images that the extractor does not take.

        Raises:
          ValueError: images of another shape.
        """
        wanted, name = self.extractor.image_shape, self.extractor.name
        if wanted is not None and tuple(shape) != tuple(wanted):
            raise ValueError(
                f"samples: images are {size(shape)}, but {name} was trained on {size(wanted)}; "
                "compare with the images that the generator was trained on"
            )

    def __call__(self, images: Images, *, name: str = "") -> Iterator[tuple[int, Features]]:
        """Features of all images in order, in blocks of `BLOCK` images.

        Every process calls it together, reads and computes its share, and gets all features.

        Args:
          images: to look at.
          name: of the progress bar; "" for none.

        Returns:
          an iterator of the number of a block's first image, and float32 features on the host.

        Raises:
          ValueError: images that the extractor does not take.
        """
        self.check(images.shape)
        return _blocks(self._passes(images, name))

    def _passes(self, images: Images, name: str) -> Iterator[Features]:
        """Features of as many images as all devices compute at once, one pass after another."""
        count, step = len(images), self._share * jax.process_count()
        first = jax.process_index() * self._share
        spans = [
            tuple(min(start + first + offset, count) for offset in (0, self._share))
            for start in range(0, count, step)
        ]
        bar = tqdm(
            total=count,
            desc=name,
            unit="image",
            dynamic_ncols=True,
            disable=not name or jax.process_index() > 0,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )
        with ThreadPoolExecutor(1) as pool, bar:
            started = map(self._start, map_ahead(pool, self._read(images), spans, 2))
            # The next pass is begun before the results of the last are waited for.
            for index, features in enumerate(_one_ahead(started)):
                fresh = min(step, count - index * step)
                yield Features(*(_from_all(feature)[:fresh] for feature in features))
                bar.update(fresh)

    def _read(self, images: Images) -> Callable[[int, int], UInt8[np.ndarray, "n h w channels"]]:
        def read(first: int, last: int) -> np.ndarray:
            # One shape, one compilation: filled up with black images.
            batch = np.zeros((self._share, *images.shape), np.uint8)
            if last > first:
                batch[: last - first] = images.read(first, last)
            return batch

        return read

    def _start(self, batch: UInt8[np.ndarray, "b h w channels"]) -> Features:
        # The mesh of a training run around this call would not go with these devices.
        with jax.set_mesh(self._mesh):
            return self._apply(self._params, jax.device_put(batch, self._rows))


def _from_all(feature: jax.Array) -> np.ndarray:
    feature = np.asarray(feature)
    if jax.process_count() == 1:
        return feature
    return multihost_utils.process_allgather(feature, tiled=True)


def _one_ahead(items: Iterator) -> Iterator:
    waiting = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def _blocks(passes: Iterator[Features]) -> Iterator[tuple[int, Features]]:
    first, kept = 0, None
    join = lambda *parts: Features(*map(np.concatenate, zip(*parts, strict=True)))
    for features in passes:
        kept = features if kept is None else join(kept, features)
        while len(kept.pooled) >= BLOCK:
            yield first, Features(*(feature[:BLOCK] for feature in kept))
            first, kept = first + BLOCK, Features(*(feature[BLOCK:] for feature in kept))
    if kept is not None and len(kept.pooled):
        yield first, kept


def size(shape: tuple[int, ...]) -> str:
    """A shape in words: rows x columns x channels."""
    return " x ".join(map(str, shape))
