"""What every source of labelled images offers."""

from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import UInt8


class Example(NamedTuple):
    """An image and its class.

    Attributes:
      image: (H, W, channels), 0 to 255.
      label: index into the source's `class_names`.
    """

    image: UInt8[np.ndarray, "H W channels"]
    label: int


class UnreadableImage(ValueError):  # noqa: N818 -- what it is about, as in a report
    """An image that cannot be decoded.

    Attributes:
      name: of the image, for a report.
      reason: in words.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class ImageSource(Protocol):
    """Images that are decoded one at a time, from any thread."""

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Decodes one image; raises `UnreadableImage`."""
        ...

    def name(self, index: int) -> str:
        """What to call the image in a report."""
        ...
