"""Images as training examples: from memory where they fit, from their files where they do not."""

import math
import os

import numpy as np
from absl import logging
from jaxtyping import Integer, UInt8

from lasad_jax.config import AugmentConfig, DataConfig
from lasad_jax.data.crops import fit_image, random_crop_flip, size_before_crop
from lasad_jax.data.images import common_size, load_images
from lasad_jax.data.loader import Batch
from lasad_jax.data.sources import ImageSource, UnreadableImage, open_source

_MEMORY = 8 * 2**30  # bytes


class ImageExamples:
    """The images of a split; an `Examples` of "images", uint8 (b, rows, columns, channels).

    Args:
      data: the source.
      split: "train" or "test".
      channels: 1 or 3.
      augment: random crops and flips, drawn anew every epoch as a pure function of (seed,
        epoch, row); None for the images as they are.
      progress: show a bar while reading.
      source: the split, where it is open already.
      memory: bytes up to which all images are read at once; None for 8 GiB.

    Raises:
      ValueError, FileNotFoundError: a source that is missing or damaged, or whose images
        have no common size (see `common_size`).
    """

    def __init__(
        self,
        data: DataConfig,
        split: str,
        *,
        channels: int,
        augment: AugmentConfig | None = None,
        progress: bool = False,
        source: ImageSource | None = None,
        memory: int | None = None,
    ):
        self._data, self._augment, self._channels = data, augment, channels
        if source is None:
            source = open_source(data, split, channels=channels)
        self._source = source
        self._size = common_size(data, self._source)
        # Crops are cut from images that are larger by this: no crop enlarges.
        share = 1.0 if augment is None else augment.min_crop
        self._read_size = size_before_crop(self._size, share)
        self._images = None
        memory = _MEMORY if memory is None else memory
        if len(self._source) * math.prod(self._read_size) * channels <= memory:
            self._images = load_images(
                data,
                split,
                channels=channels,
                size=self._read_size,
                progress=progress,
                source=self._source,
            ).images

    @property
    def num_threads(self) -> int:
        """Threads that make batches best: all cores to decode files, but from memory two, as
        more only contend for the interpreter."""
        return 2 if self._images is not None else os.cpu_count() or 1

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of every image."""
        return self._size

    def __len__(self) -> int:
        return len(self._source if self._images is None else self._images)

    def batch(
        self,
        rows: Integer[np.ndarray, " b"],
        epochs: Integer[np.ndarray, " b"] | None = None,
        seed: int = 0,
    ) -> Batch:
        """See `Examples`; without `epochs` not augmented."""
        images = [self._image(int(row)) for row in rows]
        if epochs is not None and self._augment is not None:
            images = [
                random_crop_flip(
                    image,
                    self._size,
                    min_crop=self._augment.min_crop,
                    flip=self._augment.flip,
                    rng=_generator(seed, int(epoch), int(row)),
                )
                for image, row, epoch in zip(images, rows, epochs, strict=True)
            ]
        # Stacking nothing needs a shape: a process may have no row of the last batch.
        channels = (*self._size, self._channels)
        return {"images": np.stack(images) if images else np.zeros((0, *channels), np.uint8)}

    def _image(self, row: int) -> UInt8[np.ndarray, "R C channels"]:
        if self._images is not None:
            return self._images[row]
        for offset in range(len(self)):
            try:
                image = self._source[(row + offset) % len(self)].image
                fit, background = self._data.fit, self._data.background
                return fit_image(image, self._read_size, fit=fit, background=background)
            except UnreadableImage as error:
                logging.warning("%s; its neighbour takes its place", error)
        raise ValueError(f"data.directory: no image in {self._data.directory} can be read")


def _generator(seed: int, epoch: int, row: int) -> np.random.Generator:
    # The counter is the row: 2^64 streams apart, so that no two rows share numbers.
    key = np.array([seed, epoch], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, row]))
