"""Where labelled images come from: one interface, a module for each kind of source."""

from lasad_jax.config.sections import DataConfig
from lasad_jax.data.sources.base import SPLITS, ArraySource, Example, ImageSource, UnreadableImage
from lasad_jax.data.sources.digits import open_digits
from lasad_jax.data.sources.folder import open_folder
from lasad_jax.data.sources.idx import open_idx
from lasad_jax.data.sources.tfds import open_tfds

__all__ = ["SPLITS", "ArraySource", "Example", "ImageSource", "UnreadableImage", "open_source"]

_OPEN = {"digits": open_digits, "idx": open_idx, "folder": open_folder, "tfds": open_tfds}


def open_source(data: DataConfig, split: str, *, channels: int) -> ImageSource:
    """Opens one split of `data.source`; images are decoded when they are asked for.

    Args:
      data: the section of a run's configuration.
      split: "train" or "test".
      channels: 1 for grey or 3 for colour, which images are converted to.

    Raises:
      ValueError: a source without images, another split or number of channels, or files
        that do not hold together.
      FileNotFoundError: a missing directory or file.
    """
    if data.source not in _OPEN:
        raise ValueError(f"data.source is {data.source!r}; choose one of {', '.join(_OPEN)}")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}; choose 1 (grey) or 3 (colour)")
    return _OPEN[data.source](data, split, channels=channels)
