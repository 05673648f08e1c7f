"""The 1,797 handwritten 8x8 digits inside scikit-learn."""

import numpy as np

from lasad_jax.config.sections import DataConfig
from lasad_jax.data.sources.base import ArraySource


def open_digits(data: DataConfig, split: str, *, channels: int) -> ArraySource:
    """The digits; they have no split of their own: every fifth of each class is "test"."""
    del data
    # Imported here: it takes a second, and only this source needs it.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    labels = bunch.target.astype(np.int32)
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    is_test = np.zeros(labels.shape, bool)
    for label in range(10):
        is_test[np.flatnonzero(labels == label)[4::5]] = True
    chosen = is_test if split == "test" else ~is_test
    class_names = tuple(str(label) for label in range(10))
    return ArraySource(images[chosen], labels[chosen], class_names, split, channels)
