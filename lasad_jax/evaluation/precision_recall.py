"""Improved precision and recall: do images lie among the other side's nearest neighbours?"""

import collections
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int

from lasad_jax.evaluation.checks import check_features

# Squared distances in a block, and features in a chunk of pairs: bounds on memory.
_BLOCK = 2**23
_CHUNK = 2**22


def precision_recall(
    real: Float[np.ndarray, "M D"], generated: Float[np.ndarray, "K D"], *, neighbours: int = 3
) -> tuple[float, float]:
    """How many generated images look real, and how many real ones could be generated.

    As Kynkaanniemi et al. (2019) and ADM's evaluator: around each image of a side lies a ball
    that reaches its `neighbours`-th nearest other image of that side, copies included. Precision
    is the share of generated images in at least one real image's ball (its border included),
    recall the share of real images in at least one generated image's ball.

    Equal to comparing all sums of squared differences in float64. (ADM's own are products in
    float16, so it can differ from this in the last digits that it prints.) Products in float32
    decide wherever their rounding error, which has a proven bound, cannot matter; the few other
    pairs are computed in float64. Memory is that of a few blocks of distances, never M x M.

    Raises:
      ValueError: neighbours below 1 or not below M and K; features of different D, of a wrong
        dtype, or not finite.
    """
    real = check_features("real", real)
    generated = check_features("generated", generated, real.shape[1])
    fewest = min(len(real), len(generated))
    if not 1 <= neighbours < fewest:
        raise ValueError(
            f"neighbours must be from 1 to one less than the images of a side, got {neighbours} "
            f"for {len(real)} real and {len(generated)} generated images"
        )
    real_radii, generated_radii = _radii(real, neighbours), _radii(generated, neighbours)
    real, generated = _prepare(real, generated)
    among_real = np.zeros(len(generated.features), bool)
    among_generated = np.zeros(len(real.features), bool)
    for rows, low, high in _bounds(real, generated):
        for radii, axis, inside in (
            (real_radii[rows, None], 0, among_real),
            (generated_radii[None, :], 1, among_generated[rows]),
        ):
            scaled = (radii * real.scale**2).astype(np.float32)
            inside |= np.any(high <= scaled, axis=axis)
            unsure = (low <= scaled) & ~np.expand_dims(inside, axis)
            if unsure.any():
                i, j = np.nonzero(unsure)
                exact = _squared_distances(real.features[rows], i, generated.features, j)
                within = exact <= np.broadcast_to(radii, low.shape)[i, j]
                inside[(j if axis == 0 else i)[within]] = True
    return float(np.mean(among_real)), float(np.mean(among_generated))


class _Side(NamedTuple):
    """One side's images.

    Attributes:
      features: as given.
      rounded: (features - shared middle) * scale in float32, each at most 1.
      low, high: what they add to a squared scaled distance at least and at most, beside -2
        times the product of `rounded`.
      scale: a power of 2, so that scaling does not round.
    """

    features: Float[np.ndarray, "N D"]
    rounded: Float32[np.ndarray, "N D"]
    low: Float32[np.ndarray, " N"]
    high: Float32[np.ndarray, " N"]
    scale: float


def _prepare(*sides: Float[np.ndarray, "_ D"]) -> list[_Side]:
    """The sides, moved and scaled alike."""
    middle = sides[0].mean(axis=0, dtype=np.float64)
    # Some rows at a time, since in float64 all would take more memory than the features.
    step = max(1, _CHUNK // len(middle))
    largest = max(np.abs(x[rows] - middle).max() for x in sides for rows in _slices(len(x), step))
    scale = float(2.0 ** -np.ceil(np.log2(largest))) if largest > 0 else 1.0
    # With u the unit of rounding and n the sum of both squared norms, a product of D terms in
    # any order errs by D u n / 2 at most, which counts twice; rounding the features by 4 u n,
    # the norms, their sum, the difference and a radius by less than 8 u n together. Below the
    # least normal number, errors are absolute.
    terms = len(middle) + 16
    relative = 1.1 * terms * np.finfo(np.float32).eps / 2
    absolute = terms * float(np.finfo(np.float32).tiny)
    prepared = []
    for side in sides:
        rounded = np.empty(side.shape, np.float32)
        for rows in _slices(len(side), step):
            rounded[rows] = (side[rows] - middle) * scale
        norms = np.einsum("nd,nd->n", rounded, rounded, dtype=np.float64)
        low = ((1 - relative) * norms - absolute).astype(np.float32)
        high = ((1 + relative) * norms + absolute).astype(np.float32)
        prepared.append(_Side(side, rounded, low, high, scale))
    return prepared


def _bounds(
    rows: _Side, columns: _Side
) -> Iterator[tuple[slice, Float32[np.ndarray, "R N"], Float32[np.ndarray, "R N"]]]:
    """Squared scaled distances of some rows to all columns: at least, at most."""
    step = max(1, _BLOCK // len(columns.rounded))
    for block in _slices(len(rows.rounded), step):
        product = -2 * (rows.rounded[block] @ columns.rounded.T)
        low = (rows.low[block, None] + columns.low) + product
        high = (rows.high[block, None] + columns.high) + product
        yield block, low, high


def _radii(features: Float[np.ndarray, "N D"], neighbours: int) -> Float64[np.ndarray, " N"]:
    """Squared distance of each image to its `neighbours`-th nearest other one."""
    # About the side's own middle, so that products stay precise if it is far from the other's.
    (side,) = _prepare(features)
    radii = np.zeros(len(features))
    # Images with so many copies need no search, in which each copy would be a candidate.
    search = ~_has_copies(features, neighbours)
    for rows, low, high in _bounds(side, side):
        own = np.arange(rows.start, rows.stop)
        low[own - rows.start, own] = high[own - rows.start, own] = np.inf
        # The farthest that the neighbour can be; whoever may be nearer is a candidate.
        farthest = np.partition(high, neighbours - 1, axis=1)[:, neighbours - 1 : neighbours]
        i, j = np.nonzero((low <= farthest) & search[rows, None])
        exact = _squared_distances(features[rows], i, features, j)
        order = np.lexsort((exact, i))
        found, first = np.unique(i, return_index=True)
        radii[rows][found] = exact[order][first + neighbours - 1]
    return radii


def _has_copies(features: Float[np.ndarray, "N D"], count: int) -> Bool[np.ndarray, " N"]:
    """Whether at least `count` other images have the very same features."""
    digests = [hashlib.sha256(row.tobytes()).digest() for row in features]
    numbers = collections.Counter(digests)
    return np.array([numbers[digest] > count for digest in digests])


def _slices(count: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _squared_distances(
    a: Float[np.ndarray, "M D"],
    i: Int[np.ndarray, " P"],
    b: Float[np.ndarray, "K D"],
    j: Int[np.ndarray, " P"],
) -> Float64[np.ndarray, " P"]:
    """Of pairs (a[i], b[j]), summed in one order whatever the pair, so that ties are ties."""
    step = max(1, _CHUNK // a.shape[1])
    parts = [
        np.sum(np.square(np.subtract(a[i[pairs]], b[j[pairs]], dtype=np.float64)), axis=1)
        for pairs in _slices(len(i), step)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)
