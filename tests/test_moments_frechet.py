"""Moments against NumPy's covariance, the Frechet distance against SciPy's matrix root."""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from lasad_jax.evaluation.frechet import frechet_distance
from lasad_jax.evaluation.moments import Moments, MomentSums


def features(count, dim, *, seed=0, offset=0.0):
    """Correlated features of spread about 1, float32."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(dim) + rng.normal(0, 0.5 / np.sqrt(dim), (dim, dim))
    return (rng.normal(size=(count, dim)) @ mixing + offset).astype(np.float32)


def sums(x, sizes):
    total = MomentSums.empty(x.shape[1])
    for batch in np.split(x, np.cumsum(sizes)[:-1]):
        total = total.add(batch)
    return total


def moments(x):
    return sums(x, [len(x)]).finish()


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("sizes", [[301], [1, 100, 200], [0, 7, 0, 294], [1] * 301])
def test_moments_are_those_of_numpy_whatever_the_batches(offset, sizes):
    x = features(301, 13, offset=offset)
    got = sums(x, sizes).finish()
    exact = x.astype(np.longdouble)
    mean = exact.mean(axis=0)
    covariance = (exact - mean).T @ (exact - mean) / 300
    scale = np.abs(covariance).max()
    assert got.count == 301
    assert got.mean.dtype == got.covariance.dtype == np.float64
    np.testing.assert_allclose(got.mean, mean.astype(np.float64), rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(
        got.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=0, atol=1e-12 * scale
    )
    np.testing.assert_allclose(
        got.covariance, covariance.astype(np.float64), rtol=0, atol=1e-12 * scale
    )
    np.testing.assert_array_equal(got.covariance, got.covariance.T)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 99))
def test_merged_sums_are_those_of_all_images(sizes, seed):
    x = features(sum(sizes), 5, seed=seed, offset=100)
    merged = MomentSums.empty(5)
    for batch in np.split(x, np.cumsum(sizes)[:-1]):
        merged = merged.merge(MomentSums.empty(5).add(batch))
    expected = MomentSums.empty(5).add(x)
    assert merged.count == expected.count == len(x)
    np.testing.assert_allclose(merged.mean, expected.mean, rtol=1e-13)
    np.testing.assert_allclose(merged.scatter, expected.scatter, rtol=1e-12, atol=1e-11)


def test_adding_leaves_the_sums_as_they_were():
    before = MomentSums.empty(3).add(features(4, 3))
    scatter = before.scatter.copy()
    before.add(features(5, 3, seed=1))
    before.merge(before)
    np.testing.assert_array_equal(before.scatter, scatter)
    assert before.count == 4


def test_too_few_images_are_refused():
    total = MomentSums.empty(4).add(features(4, 4))
    with pytest.raises(ValueError, match=r"4 images are too few .* 4 features.*at least 5"):
        total.finish(minimum=5)
    assert total.finish().count == 4
    assert total.add(features(1, 4)).finish(minimum=5).count == 5
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        MomentSums.empty(4).add(features(1, 4)).finish()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.ones((2, 5), np.float32), "5 values an image where 4"),
        (np.ones(4, np.float32), r"shape \(4,\)"),
        (np.ones((2, 4), np.uint8), "uint8"),
        (np.full((2, 4), np.nan, np.float32), "2 of 2 images .* not finite, the first in row 0"),
        (np.diag([1, 1, np.inf, 1]).astype(np.float32), "1 of 4 images .* row 2"),
    ],
)
def test_features_that_have_no_moments_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        MomentSums.empty(4).add(bad)
    with pytest.raises(ValueError, match="4 and 5 features"):
        MomentSums.empty(4).merge(MomentSums.empty(5))


def by_matrix_root(a, b, offset=0.0):
    """As pytorch-fid and the ADM evaluator, which add an offset where SciPy's root fails."""
    offset = offset * np.eye(len(a.mean))
    root = scipy.linalg.sqrtm((a.covariance + offset) @ (b.covariance + offset))
    own = np.trace(a.covariance) + np.trace(b.covariance)
    return np.sum((a.mean - b.mean) ** 2) + own - 2 * np.trace(root).real


@pytest.mark.parametrize("dim", [1, 2, 17, 96])
@pytest.mark.parametrize("seed", [0, 1])
def test_distance_is_that_of_the_matrix_root(dim, seed):
    a = moments(features(500, dim, seed=seed))
    b = moments(1.3 * features(700, dim, seed=seed + 5, offset=0.1))
    np.testing.assert_allclose(frechet_distance(a, b), by_matrix_root(a, b), rtol=1e-6)


@pytest.mark.parametrize("counts", [(20, 1000), (1000, 20), (20, 30)])
def test_distance_of_singular_covariances(counts):
    a = moments(features(counts[0], 64, seed=2))
    b = moments(features(counts[1], 64, seed=3, offset=0.2))
    expected = by_matrix_root(a, b, offset=1e-9)
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-3)


def test_constant_features_count_by_their_means_only():
    x, y = features(100, 6), features(100, 6, seed=1)
    constant = lambda z, c: np.concatenate([z, np.full((100, 3), c, np.float32)], axis=1)
    got = frechet_distance(moments(constant(x, 1.0)), moments(constant(y, 3.0)))
    expected = by_matrix_root(moments(x), moments(y)) + 3 * 2.0**2
    np.testing.assert_allclose(got, expected, rtol=1e-9)
    # And where nothing varies at all.
    still = lambda c: moments(np.full((5, 4), c, np.float32))
    assert frechet_distance(still(1.0), still(1.5)) == 1.0


def normal(dim, rank, seed, scale=1.0):
    """Moments with a covariance of the given rank."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(dim, rank)) * scale
    return Moments(100, rng.normal(size=dim), factor @ factor.T)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(0, 14),
    st.integers(0, 14),
    st.integers(0, 10**6),
    st.sampled_from([1e-6, 1.0, 1e3]),
)
def test_distance_has_the_properties_of_a_squared_metric(dim, rank_a, rank_b, seed, scale):
    a, b = normal(dim, rank_a, seed, scale), normal(dim, rank_b, seed + 1, scale)
    size = np.trace(a.covariance) + np.trace(b.covariance)
    tolerance = 1e-12 * size + 1e-13
    distance = frechet_distance(a, b)
    assert distance >= 0
    np.testing.assert_allclose(frechet_distance(b, a), distance, rtol=1e-11, atol=tolerance)
    np.testing.assert_allclose(frechet_distance(a, a), 0, atol=tolerance)

    rng = np.random.default_rng(seed + 2)
    turn = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    turned = [Moments(0, turn @ m.mean, turn @ m.covariance @ turn.T) for m in (a, b)]
    # Turning rounds: an eigenvalue of 0 becomes one of 1e-16, its root 1e-8.
    np.testing.assert_allclose(
        frechet_distance(*turned), distance, rtol=1e-9, atol=1e-6 * size + 1e-13
    )

    step = rng.normal(size=dim)
    moved = a._replace(mean=a.mean + step)
    np.testing.assert_allclose(
        frechet_distance(a, moved), np.sum(step**2), rtol=1e-11, atol=tolerance
    )


def test_distance_in_one_dimension_is_known():
    a, b = (Moments(9, np.array([m]), np.array([[s**2]])) for m, s in ((1.0, 2.0), (4.0, 0.5)))
    np.testing.assert_allclose(frechet_distance(a, b), 3**2 + 1.5**2, rtol=1e-14)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": np.zeros(5), "covariance": np.eye(5)}, "4 and 5 features"),
        ({"covariance": np.eye(5)}, r"\(4,\) and \(5, 5\)"),
        ({"mean": np.full(4, np.nan)}, "not finite"),
        ({"covariance": np.diag([1.0, 1.0, 1.0, -0.1])}, "negative eigenvalues"),
    ],
)
def test_moments_without_a_distance_are_refused(change, message):
    good = normal(4, 4, 0)
    with pytest.raises(ValueError, match=message):
        frechet_distance(good, good._replace(**change))
