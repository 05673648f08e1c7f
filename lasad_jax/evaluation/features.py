"""What images are compared by: the outputs of a fixed network, taken batch by batch."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float, PyTree, UInt8


class Features(NamedTuple):
    """A network's view of a batch of images, float32.

    Attributes:
      pooled: the means over places before the head, for FID, precision, recall and KID.
      spatial: a few channels of an earlier layer at every place, for sFID.
      logits: of the network's classes, for the Inception Score.
    """

    pooled: Float[Array, "B D"]
    spatial: Float[Array, "B S"]
    logits: Float[Array, "B K"]


@dataclasses.dataclass(frozen=True, eq=False)
class Extractor:
    """A network and its parameters.

    Attributes:
      kind: "inception" or "classifier"; reports never mix the two.
      name: what a reader knows it by, such as its file or the data it was trained on.
      fingerprint: 16 hex digits of the parameters.
      image_shape: (rows, columns, channels) that images must have; None for RGB of any size.
      params: of the network.
      apply: (params, uint8 images (B, h, w, channels)) -> `Features`; pure, to be jitted.
    """

    kind: str
    name: str
    fingerprint: str
    image_shape: tuple[int, int, int] | None
    params: PyTree
    apply: Callable[[PyTree, UInt8[Array, "B h w channels"]], Features]
