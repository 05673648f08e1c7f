"""The Inception Score, from sums over the images of each split."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int64

from lasad_jax.evaluation.checks import check_features


class ScoreSums(NamedTuple):
    """What is kept of the images seen so far: sums for every split.

    Split s of S takes images s N // S to (s + 1) N // S - 1 of N in their order, as
    torch-fidelity does. ADM's evaluator takes 5000 at a time, which for 50,000 images and 10
    splits is the same. Neither sorts: images in the order of their classes give splits of a
    few classes each, and a score far too low, so classes must alternate.

    Attributes:
      num_images: N, of all images that are to come.
      counts: images seen of each split.
      probabilities: sums over them of p, the softmax of the logits.
      products: sums over them of sum p log p over the K classes.
    """

    num_images: int
    counts: Int64[np.ndarray, " S"]
    probabilities: Float64[np.ndarray, "S K"]
    products: Float64[np.ndarray, " S"]

    @classmethod
    def empty(cls, num_classes: int, num_images: int, splits: int = 10) -> "ScoreSums":
        """Of no image yet.

        Raises:
          ValueError: fewer images than splits, or no split.
        """
        if not 1 <= splits <= num_images:
            raise ValueError(
                f"the Inception Score of {num_images} images cannot take {splits} splits; "
                "choose splits from 1 to the number of images"
            )
        zeros = np.zeros((splits, num_classes))
        return cls(num_images, np.zeros(splits, np.int64), zeros, np.zeros(splits))

    def add(self, first_index: int, logits: Float[np.ndarray, "B K"]) -> "ScoreSums":
        """With the images from `first_index` on.

        Raises:
          ValueError: an image beyond the last, or logits of another K, of a wrong dtype, or
            not finite.
        """
        logits = check_features("logits", logits, self.probabilities.shape[1]).astype(np.float64)
        end = first_index + len(logits)
        if not 0 <= first_index <= end <= self.num_images:
            raise ValueError(
                f"images {first_index} to {end - 1} are not among the {self.num_images} to score"
            )
        shifted = logits - logits.max(axis=1, keepdims=True)
        exponentials = np.exp(shifted)
        totals = exponentials.sum(axis=1, keepdims=True)
        p = exponentials / totals
        products = np.sum(p * (shifted - np.log(totals)), axis=1)
        split = np.searchsorted(self._ends(), np.arange(first_index, end), side="right")
        counts, probabilities, sums = (x.copy() for x in self[1:])
        for s in np.unique(split):
            counts[s] += np.sum(split == s)
            probabilities[s] += p[split == s].sum(axis=0)
            sums[s] += products[split == s].sum()
        return ScoreSums(self.num_images, counts, probabilities, sums)

    def merge(self, other: "ScoreSums") -> "ScoreSums":
        """Of the images of both, which must be different ones of the same N.

        Raises:
          ValueError: sums of other images, splits or classes.
        """
        mine, others = ((x.num_images, *x.probabilities.shape) for x in (self, other))
        if mine != others:
            raise ValueError(
                f"scores of (images, splits, classes) {mine} and {others} cannot be merged"
            )
        return ScoreSums(
            self.num_images, *(a + b for a, b in zip(self[1:], other[1:], strict=True))
        )

    def finish(self) -> tuple[float, float]:
        """exp(mean over images of KL(p, mean p)) of each split: its mean and standard deviation
        (1 / S) over the splits, from 1 to K.

        Raises:
          ValueError: an image is missing or was added twice.
        """
        sizes = np.diff(self._ends(), prepend=0)
        if not np.array_equal(sizes, self.counts):
            raise ValueError(
                f"the Inception Score needs each of {self.num_images} images once, but the splits "
                f"hold {self.counts.tolist()} in place of {sizes.tolist()}"
            )
        mean = self.probabilities / sizes[:, None]
        # A class that no image has counts 0, the limit of p log p.
        entropies = np.sum(mean * np.log(np.where(mean > 0, mean, 1.0)), axis=1)
        scores = np.exp(self.products / sizes - entropies)
        return float(scores.mean()), float(scores.std())

    def _ends(self) -> Int64[np.ndarray, " S"]:
        """The first image after each split."""
        splits = len(self.counts)
        return np.arange(1, splits + 1) * self.num_images // splits
