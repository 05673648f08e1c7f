"""What every image source offers, and the plain one that holds its images in memory."""

import dataclasses
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int32, UInt8

from lasad_jax.data.decode import UnreadableImage, convert_image

__all__ = ["SPLITS", "ArraySource", "Example", "ImageSource", "UnreadableImage"]

SPLITS = ("train", "test")


class Example(NamedTuple):
    """A decoded image, of whatever size it has, and its class."""

    image: UInt8[np.ndarray, "H W channels"]
    label: int


class ImageSource(Protocol):
    """One split of a set of labelled images, read one by one and from any thread.

    Attributes:
      class_names: of the classes 0 to len(class_names) - 1.
    """

    class_names: tuple[str, ...]

    def __len__(self) -> int:
        """The number of images, unreadable ones included."""

    def __getitem__(self, index: int) -> Example:
        """Decodes an image.

        Raises:
          UnreadableImage: one that cannot be decoded.
        """

    def name(self, index: int) -> str:
        """Which image that is, for people: a path in the directory, or "train[17]"."""


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images of one size that are in memory anyway.

    Attributes:
      images: (N, R, C, 1 to 4), converted when they are asked for.
      labels: (N,).
      class_names: of the labels' values.
      split: the name of this part.
      channels: 1 or 3, of the images given out.
    """

    images: UInt8[np.ndarray, "N R C stored"]
    labels: Int32[np.ndarray, " N"]
    class_names: tuple[str, ...]
    split: str
    channels: int

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        image = convert_image(self.images[index], channels=self.channels)
        return Example(image, int(self.labels[index]))

    def name(self, index: int) -> str:
        return f"{self.split}[{index}]"
