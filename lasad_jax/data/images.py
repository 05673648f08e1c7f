"""Labelled images of one size, read whole into memory."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Int32, UInt8
from tqdm import tqdm

from lasad_jax.config.sections import DataConfig
from lasad_jax.data.crops import fit_image
from lasad_jax.data.decode import UnreadableImage
from lasad_jax.data.sources import ArraySource, ImageSource, open_source

_LISTED = 20


class ImageSet(NamedTuple):
    """Images and their classes.

    Attributes:
      images: (N, R, C, channels), 0 to 255.
      labels: (N,), from 0 to num_classes - 1.
      class_names: one for each class.
    """

    images: UInt8[np.ndarray, "N R C channels"]
    labels: Int32[np.ndarray, " N"]
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """The number of classes, whether or not each has an image here."""
        return len(self.class_names)


def load_images(
    data: DataConfig,
    split: str,
    *,
    channels: int = 1,
    size: tuple[int, int] | None = None,
    progress: bool = False,
    max_unreadable: float = 0.001,
    source: ImageSource | None = None,
) -> ImageSet:
    """Reads one split of a source whole, on a pool of threads.

    Args:
      data: the section of a run's configuration.
      split: "train" or "test".
      channels: 1 for grey or 3 for colour.
      size: (rows, columns) that images are brought to with `data.fit`; by default
        `data.image_size`. (0, 0) leaves them as they are.
      progress: show a progress bar.
      max_unreadable: share of the images that may be unreadable; these are left out, with
        a warning that lists them.
      source: the split, where it is open already.

    Raises:
      ValueError: more unreadable images, or images of different sizes; and what
        `open_source` refuses.
      FileNotFoundError: a missing directory or file.
    """
    if source is None:
        source = open_source(data, split, channels=channels)
    size = tuple(data.image_size if size is None else size)

    def read(index: int) -> tuple[np.ndarray, int] | UnreadableImage:
        try:
            image, label = source[index]
        except UnreadableImage as error:
            return error
        return fit_image(image, size, fit=data.fit, background=data.background), label

    images = labels = None
    kept, unreadable = 0, []
    pool = ThreadPoolExecutor(min(32, os.cpu_count() or 1))
    try:
        results = pool.map(read, range(len(source)))
        for index, result in enumerate(
            tqdm(results, desc=split, total=len(source), unit="image", disable=not progress)
        ):
            if isinstance(result, UnreadableImage):
                unreadable.append(result)
                continue
            image, label = result
            if images is None:
                images = np.empty((len(source), *image.shape), np.uint8)
                labels = np.empty(len(source), np.int32)
            if image.shape != images.shape[1:]:
                raise ValueError(
                    f"data.image_size is (0, 0), but {source.name(index)} is {_size(image)} and "
                    f"an image before it {_size(images[0])}; set data.image_size, which all are "
                    "brought to"
                )
            images[kept], labels[kept] = image, label
            kept += 1
    finally:
        pool.shutdown(cancel_futures=True)
    _report(data, source, unreadable, max_unreadable)
    if images is None:
        raise ValueError(f"data.source={data.source!r} has no readable images in split {split!r}")
    return ImageSet(images[:kept], labels[:kept], source.class_names)


def common_size(data: DataConfig, source: ImageSource) -> tuple[int, int]:
    """Rows and columns of every image: `data.image_size`, or where that is (0, 0) the size
    that the images of an array have.

    Raises:
      ValueError: (0, 0) for images in files, each of which may have another size.
    """
    if data.image_size != (0, 0):
        return data.image_size
    if isinstance(source, ArraySource):
        return source.images.shape[1:3]
    raise ValueError(
        f"data.image_size: (0, 0) leaves images as they are, but those of "
        f"data.source={data.source!r} may differ in size; set rows and columns"
    )


def _report(
    data: DataConfig, source: ImageSource, unreadable: list[UnreadableImage], share: float
) -> None:
    if not unreadable:
        return
    listed = [f"  {error}" for error in unreadable[:_LISTED]]
    if len(unreadable) > _LISTED:
        listed.append(f"  and {len(unreadable) - _LISTED} more")
    where = f"data.source={data.source!r}"
    text = f"{where}: {len(unreadable)} of {len(source)} images are unreadable"
    if len(unreadable) > int(share * len(source)):
        raise ValueError(
            "\n".join(
                [f"{text}, more than the share of {share:g}; remove or replace them", *listed]
            )
        )
    logging.warning("%s", "\n".join([f"{text} and left out", *listed]))


def _size(image: np.ndarray) -> str:
    return f"{image.shape[0]} x {image.shape[1]}"
