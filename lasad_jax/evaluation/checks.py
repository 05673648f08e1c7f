"""Features that no metric can be computed from are refused alike everywhere."""

import numpy as np
from jaxtyping import Float


def check_features(
    name: str, features: Float[np.ndarray, "N D"], dim: int | None = None
) -> Float[np.ndarray, "N D"]:
    """The features as an array, if they are finite floats, a row an image.

    Args:
      name: of the features, for messages.
      features: to look at.
      dim: D, if it is known.

    Raises:
      ValueError: a wrong dtype or shape, or a value that is not finite.
    """
    features = np.asarray(features)
    form = features.ndim == 2 and features.shape[1] > 0
    if not form or not np.issubdtype(features.dtype, np.floating):
        raise ValueError(
            f"{name} must be floats of shape (images, features), at least one feature, "
            f"got {features.dtype} of shape {features.shape}"
        )
    if dim is not None and features.shape[1] != dim:
        raise ValueError(
            f"{name} have {features.shape[1]} values an image where {dim} are expected; "
            "take both sides from the same network"
        )
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"{name}: {np.sum(~finite)} of {len(features)} images have values that are not finite, "
            f"the first in row {np.argmin(finite)}; look at these images and at the network"
        )
    return features
