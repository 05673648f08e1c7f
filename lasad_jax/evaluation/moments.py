"""Mean and covariance of features, from batches of any size, in float64."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

from lasad_jax.evaluation.checks import check_features


class Moments(NamedTuple):
    """The first two moments of the features of images.

    Attributes:
      count: of images; 0 where it is not known.
      mean: over images.
      covariance: with 1 / (count - 1), symmetric.
    """

    count: int
    mean: Float64[np.ndarray, " D"]
    covariance: Float64[np.ndarray, "D D"]


class MomentSums(NamedTuple):
    """What is kept of the images seen so far, whatever their number.

    Sums about the mean, not about 0, so that nothing cancels where the mean is far larger
    than the spread; two are merged by the rule of Chan, Golub & LeVeque (1983).

    Attributes:
      count: of images.
      mean: over images.
      scatter: the sum over images of the outer product of (features - mean) with itself.
    """

    count: int
    mean: Float64[np.ndarray, " D"]
    scatter: Float64[np.ndarray, "D D"]

    @classmethod
    def empty(cls, dim: int) -> "MomentSums":
        """Of no image with `dim` features."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    def add(self, features: Float[np.ndarray, "B D"]) -> "MomentSums":
        """With more images, B >= 0.

        Raises:
          ValueError: features of another D, of a wrong dtype, or not finite.
        """
        features = check_features("features", features, len(self.mean)).astype(np.float64)
        if len(features) == 0:
            return self
        mean = features.mean(axis=0)
        count, step, weight = self._towards(len(features), mean)
        # The merging rule's term is one more row, so that all is a single product.
        rows = np.concatenate([features - mean, np.sqrt(weight) * (mean - self.mean)[None]])
        return MomentSums(count, self.mean + step, self.scatter + rows.T @ rows)

    def merge(self, other: "MomentSums") -> "MomentSums":
        """Of the images of both.

        Raises:
          ValueError: sums of features of another D.
        """
        if len(other.mean) != len(self.mean):
            raise ValueError(
                f"moments of {len(self.mean)} and {len(other.mean)} features cannot be merged; "
                "take both from the same network"
            )
        if other.count == 0:
            return self
        count, step, weight = self._towards(other.count, other.mean)
        between = other.mean - self.mean
        scatter = self.scatter + other.scatter + weight * np.outer(between, between)
        return MomentSums(count, self.mean + step, scatter)

    def finish(self, minimum: int | None = None) -> Moments:
        """The moments.

        Args:
          minimum: the least number of images to accept. A covariance of D features from
            fewer than D + 1 images is singular and the Frechet distance from it too high,
            so D + 1 is what to ask for; None accepts any covariance, from 2 images on.

        Raises:
          ValueError: fewer images than that.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        if minimum is not None and self.count < minimum:
            raise ValueError(
                f"{self.count} images are too few for the covariance of {len(self.mean)} "
                f"features: below {len(self.mean) + 1} it is singular, and the Frechet distance "
                f"too high; use at least {minimum} images (50,000 are usual), or force it and "
                "compare only with numbers of as many images"
            )
        return Moments(self.count, self.mean, self.scatter / (self.count - 1))

    def _towards(
        self, count: int, mean: Float64[np.ndarray, " D"]
    ) -> tuple[int, Float64[np.ndarray, " D"], float]:
        """Joint count, step of the mean, and weight of the outer product of the means' difference,
        when `count` images of another mean join."""
        total = self.count + count
        return total, (mean - self.mean) * (count / total), self.count * count / total
