"""The Kernel Inception Distance, which has no bias at any number of images."""

import numpy as np
from jaxtyping import Float, Float64

from lasad_jax.evaluation.checks import check_features


def kid(
    real: Float[np.ndarray, "M D"],
    generated: Float[np.ndarray, "K D"],
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Squared maximum mean discrepancy under the kernel (x . y / D + 1)^3, in float64.

    As Binkowski et al. (2018) and torch-fidelity: the unbiased estimate on random subsets of
    both sides, drawn without replacement. It may be below 0 where both sides are alike.

    Args:
      real, generated: features of the images.
      subsets: how many to draw; subset i depends on the seed and i only.
      subset_size: images of each side in a subset.
      seed: of the draws.

    Returns:
      Mean and standard deviation (1 / subsets) over the subsets.

    Raises:
      ValueError: fewer images than a subset has, a subset of fewer than 2, no subset, or
        features of different D, of a wrong dtype, or not finite.
    """
    real = check_features("real", real)
    generated = check_features("generated", generated, real.shape[1])
    if subsets < 1:
        raise ValueError(f"subsets must be at least 1, got {subsets}")
    fewest = min(len(real), len(generated))
    if not 2 <= subset_size <= fewest:
        raise ValueError(
            f"subset_size must be from 2 to the fewest images of a side, got {subset_size} for "
            f"{len(real)} real and {len(generated)} generated images"
        )
    estimates = []
    for subset in range(subsets):
        rng = np.random.default_rng((seed, subset))
        x, y = (
            side[rng.choice(len(side), subset_size, replace=False)].astype(np.float64)
            for side in (real, generated)
        )
        estimates.append(_discrepancy(x, y))
    return float(np.mean(estimates)), float(np.std(estimates))


def _discrepancy(x: Float64[np.ndarray, "n D"], y: Float64[np.ndarray, "n D"]) -> float:
    within = _mean_of_different(_kernel(x, x)) + _mean_of_different(_kernel(y, y))
    return within - 2 * np.mean(_kernel(x, y))


def _kernel(x: Float64[np.ndarray, "n D"], y: Float64[np.ndarray, "n D"]) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_of_different(kernel: Float64[np.ndarray, "n n"]) -> float:
    """Over pairs of two images, which is what keeps the estimate unbiased."""
    n = len(kernel)
    return (np.sum(kernel) - np.trace(kernel)) / (n * (n - 1))
