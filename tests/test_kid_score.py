"""The Inception Score and KID against their definitions, written out plainly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from lasad_jax.evaluation.inception_score import ScoreSums
from lasad_jax.evaluation.kid import kid


def logits(count, classes, seed=0, spread=3.0):
    rng = np.random.default_rng(seed)
    return rng.normal(0, spread, (count, classes)).astype(np.float32)


def scores_of_slices(p, slices):
    """As improved-gan's model.py: exp of the mean over a slice of KL(p, mean p)."""
    scores = []
    for part in slices:
        q = p[part].mean(axis=0)
        scores.append(np.exp(np.mean(np.sum(p[part] * (np.log(p[part]) - np.log(q)), axis=1))))
    return np.mean(scores), np.std(scores)


def equal_slices(count, splits):
    return [slice(i * count // splits, (i + 1) * count // splits) for i in range(splits)]


def added(x, batch, splits=10):
    sums = ScoreSums.empty(x.shape[1], len(x), splits)
    for first in range(0, len(x), batch):
        sums = sums.add(first, x[first : first + batch])
    return sums


@pytest.mark.parametrize("count", [10, 37, 200])
@pytest.mark.parametrize("splits", [1, 3, 10])
@pytest.mark.parametrize("batch", [1, 16, 200])
def test_score_is_that_of_equal_slices(count, splits, batch):
    x = logits(count, 7, seed=count)
    p = softmax(x.astype(np.float64), axis=1)
    got = added(x, batch, splits).finish()
    np.testing.assert_allclose(
        got, scores_of_slices(p, equal_slices(count, splits)), rtol=1e-12, atol=1e-12
    )


def test_slices_of_fixed_size_are_equal_ones_where_they_divide():
    x = logits(500, 11)
    p = softmax(x.astype(np.float64), axis=1)
    fixed = [slice(i, i + 50) for i in range(0, 500, 50)]
    np.testing.assert_allclose(
        added(x, 64).finish(), scores_of_slices(p, fixed), rtol=1e-12, atol=1e-12
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_parts_may_be_added_in_any_order_and_merged(count, splits, data):
    splits = min(splits, count)
    x = logits(count, 5, seed=count)
    cut = data.draw(st.integers(0, count))
    empty = ScoreSums.empty(5, count, splits)
    merged = empty.add(cut, x[cut:]).merge(empty.add(0, x[:cut]))
    np.testing.assert_allclose(
        merged.finish(), added(x, count, splits).finish(), rtol=1e-12, atol=1e-12
    )
    assert empty.counts.sum() == 0


def test_score_of_extremes():
    sure = np.where(np.eye(4, dtype=bool), 0, -1e4).astype(np.float32)
    x = np.tile(sure, (6, 1))
    np.testing.assert_allclose(added(x, 5, splits=2).finish(), (4, 0), rtol=1e-12, atol=1e-12)
    # Images of one class only, though the network is sure of each: the lowest score.
    np.testing.assert_allclose(added(np.tile(sure[:1], (9, 1)), 4, 3).finish(), (1, 0), atol=1e-12)
    # Sorted by class, splits see few classes each.
    assert added(np.repeat(sure, 5, axis=0), 20, splits=4).finish()[0] < 1.001


def test_score_of_wrong_images_is_refused():
    x = logits(20, 5)
    sums = ScoreSums.empty(5, 20, 2).add(0, x[:15])
    with pytest.raises(ValueError, match=r"each of 20 images once.*\[10, 5\] in place of"):
        sums.finish()
    with pytest.raises(ValueError, match=r"\[10, 15\] in place of \[10, 10\]"):
        sums.add(10, x[10:]).finish()
    with pytest.raises(ValueError, match="images 15 to 34 are not among the 20"):
        sums.add(15, x)
    with pytest.raises(ValueError, match="images -1 to 18 are not"):
        sums.add(-1, x)
    with pytest.raises(ValueError, match="5 values an image where 6"):
        ScoreSums.empty(6, 20).add(0, x)
    with pytest.raises(ValueError, match=r"\(20, 2, 5\) and \(21, 2, 5\) cannot be merged"):
        sums.merge(ScoreSums.empty(5, 21, 2))
    for splits in (0, 21):
        with pytest.raises(ValueError, match=f"20 images cannot take {splits} splits"):
            ScoreSums.empty(5, 20, splits)


def discrepancy_of_loops(x, y):
    """Equation 4 of Binkowski et al. pair by pair."""
    kernel = lambda a, b: (float(np.dot(a, b)) / len(a) + 1) ** 3
    x, y = x.astype(np.float64), y.astype(np.float64)
    n, m = len(x), len(y)
    pairs = lambda z: sum(
        kernel(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j
    )
    across = sum(kernel(a, b) for a in x for b in y)
    return pairs(x) / (n * (n - 1)) + pairs(y) / (m * (m - 1)) - 2 * across / (n * m)


def test_kid_of_all_images_is_that_of_loops():
    rng = np.random.default_rng(0)
    x = rng.gamma(1, 0.5, (23, 9)).astype(np.float32)
    y = rng.gamma(1, 0.6, (23, 9)).astype(np.float32)
    mean, std = kid(x, y, subsets=3, subset_size=23)
    np.testing.assert_allclose(mean, discrepancy_of_loops(x, y), rtol=1e-11)
    # Every subset is the whole, in another order.
    assert std < 1e-12


def polynomial_mmd(x, y):
    """The formula of torch-fidelity's metric_kid.py with its default arguments."""
    n = len(x)
    kernels = [(a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    within = sum(k.sum() - np.diagonal(k).sum() for k in kernels[:2])
    return within / (n * (n - 1)) - 2 * kernels[2].sum() / n**2


def test_kid_of_subsets():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 6)).astype(np.float32)
    y = rng.normal(0.3, 1, (31, 6)).astype(np.float32)
    expected = []
    for i in range(5):
        draws = np.random.default_rng((7, i))
        first, second = (z[draws.choice(len(z), 20, replace=False)] for z in (x, y))
        expected.append(polynomial_mmd(first.astype(np.float64), second.astype(np.float64)))
    got = kid(x, y, subsets=5, subset_size=20, seed=7)
    np.testing.assert_allclose(got, (np.mean(expected), np.std(expected)), rtol=1e-11)
    assert got != kid(x, y, subsets=5, subset_size=20, seed=8)
    assert got == kid(x, y, subsets=5, subset_size=20, seed=7)


def test_kid_is_unbiased():
    """Small subsets on average give what all images give; alike sides give about 0."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(600, 4)).astype(np.float32)
    y = rng.normal(0.5, 1, (600, 4)).astype(np.float32)
    whole, _ = kid(x, y, subsets=1, subset_size=600)
    mean, std = kid(x, y, subsets=3000, subset_size=10)
    assert abs(mean - whole) < 4 * std / np.sqrt(3000)
    mean, std = kid(x[:300], x[300:], subsets=500, subset_size=10)
    assert abs(mean) < 0.02 * whole + 4 * std / np.sqrt(500)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subset_size": 13}, "got 13 for 15 real and 12 generated"),
        ({"subset_size": 1}, "from 2 to"),
        ({"subsets": 0}, "at least 1, got 0"),
        ({"generated": np.ones((12, 4), np.float32)}, "generated have 4 values an image where 5"),
        ({"real": np.full((15, 5), np.inf, np.float32)}, "real: 15 of 15 images"),
    ],
)
def test_kid_of_wrong_input_is_refused(change, message):
    good = {"real": logits(15, 5), "generated": logits(12, 5), "subset_size": 10, "subsets": 2}
    kid(**good)
    with pytest.raises(ValueError, match=message):
        kid(**(good | change))
