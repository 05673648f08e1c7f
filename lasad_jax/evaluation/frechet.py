"""The distance between two sets of images, seen as normal distributions of their features."""

import numpy as np
from jaxtyping import Float64

from lasad_jax.evaluation.moments import Moments

# Of the largest eigenvalue: rounding, even that of a file in float32, makes none so negative.
_NEGATIVE = 1e-4


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2), S the covariances, in float64.

    FID and sFID are this distance of the respective features (Heusel et al. 2017, equation 6).
    With any factors S_a = A A^T, S_b = B B^T, the trace of the root is the sum of the singular
    values of A^T B. So no root of a product that is not symmetric is taken: nothing turns
    complex, and singular covariances (few images, constant features) need no offset.

    Raises:
      ValueError: moments of different shapes, not finite, or a matrix that is no covariance.
    """
    _check(a, b)
    between = np.sum(np.square(a.mean - b.mean))
    own = np.trace(a.covariance) + np.trace(b.covariance)
    shared = np.linalg.svd(_factor(a.covariance).T @ _factor(b.covariance), compute_uv=False)
    # Rounding alone could take equal moments below 0.
    return float(max(between + own - 2 * np.sum(shared), 0.0))


def _factor(covariance: Float64[np.ndarray, "D D"]) -> Float64[np.ndarray, "D r"]:
    """A of S = A A^T, with a column for every eigenvalue that is not 0 up to rounding."""
    values, vectors = np.linalg.eigh(covariance)
    largest = np.max(np.abs(values), initial=0.0)
    if np.min(values, initial=0.0) < -_NEGATIVE * largest:
        raise ValueError(
            f"a covariance has no negative eigenvalues, but this has {values.min():.3g} beside "
            f"{values.max():.3g}; it is damaged or no covariance"
        )
    kept = values > len(values) * np.finfo(np.float64).eps * largest
    return vectors[:, kept] * np.sqrt(values[kept])


def _check(a: Moments, b: Moments) -> None:
    for moments in a, b:
        dim = len(moments.mean)
        if moments.mean.shape != (dim,) or moments.covariance.shape != (dim, dim):
            raise ValueError(
                f"moments must be a mean (D,) and a covariance (D, D), got shapes "
                f"{moments.mean.shape} and {moments.covariance.shape}"
            )
        if not (np.isfinite(moments.mean).all() and np.isfinite(moments.covariance).all()):
            raise ValueError("moments hold values that are not finite; compute them anew")
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"moments of {len(a.mean)} and {len(b.mean)} features cannot be compared; "
            "take both from the same network"
        )
