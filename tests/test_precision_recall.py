"""Precision and recall against all distances, compared one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lasad_jax.evaluation import precision_recall as module
from lasad_jax.evaluation.precision_recall import precision_recall


def distances(a, b):
    differences = a[:, None].astype(np.float64) - b[None].astype(np.float64)
    return np.sum(differences**2, axis=-1)


def by_brute_force(real, generated, k):
    """As ADM's ManifoldEstimator, which takes the k + 1 nearest with the image itself."""
    across = distances(real, generated)
    radii = [np.sort(distances(x, x), axis=1)[:, k] for x in (real, generated)]
    precision = np.mean((across <= radii[0][:, None]).any(axis=0))
    return precision, np.mean((across <= radii[1]).any(axis=1))


@pytest.fixture(params=[None, 50], ids=["one block", "many blocks"])
def blocks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(module, "_BLOCK", 7 * request.param)
        monkeypatch.setattr(module, "_CHUNK", request.param)


@pytest.mark.parametrize("neighbours", [1, 3, 5])
@pytest.mark.parametrize(
    ("counts", "dim", "shift"), [((101, 67), 3, 0.5), ((60, 150), 8, 0.7), ((90, 90), 33, 0.3)]
)
def test_counts_are_those_of_brute_force(blocks, counts, dim, shift, neighbours):
    rng = np.random.default_rng(dim)
    real = rng.normal(size=(counts[0], dim)).astype(np.float32)
    generated = rng.normal(shift, 0.8, (counts[1], dim)).astype(np.float32)
    expected = by_brute_force(real, generated, neighbours)
    assert precision_recall(real, generated, neighbours=neighbours) == expected
    assert min(expected) > 0.05 and max(expected) < 1


@pytest.mark.parametrize("scale", [1e-25, 1e-3, 1.0, 1e4, 1e25])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_neither_scale_nor_a_shared_offset_costs_digits(scale, offset):
    rng = np.random.default_rng(4)
    real, generated = (
        ((rng.normal(size=(80, 5)) * spread + offset) * scale).astype(np.float32)
        for spread in (1.0, 0.7)
    )
    assert precision_recall(real, generated) == by_brute_force(real, generated, 3)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ties_and_copies_on_a_grid(data):
    """Whole numbers: most distances occur many times, and borders are hit exactly."""
    dim, side = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    draw = lambda n: rng.integers(0, side, (n, dim)).astype(np.float32)
    real, generated = draw(data.draw(st.integers(5, 40))), draw(data.draw(st.integers(5, 40)))
    neighbours = data.draw(st.integers(1, 4))
    offset = data.draw(st.sampled_from([0, 0.1, 1000]))
    real, generated = (x + np.float32(offset) for x in (real, generated))
    expected = by_brute_force(real, generated, neighbours)
    assert precision_recall(real, generated, neighbours=neighbours) == expected


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0, 1, 5, 100]))
def test_images_a_last_digit_from_a_border(seed, digits):
    """Generated images that are moved from a real image's neighbour by single float32 steps."""
    rng = np.random.default_rng(seed)
    real = rng.normal(size=(40, 6)).astype(np.float32)
    near = real[rng.integers(0, 40, 25)] + np.float32(20)
    steps = rng.integers(-digits, digits + 1, near.shape)
    generated = near - np.float32(20) + np.spacing(near) * steps
    # Real images that are nearly the same as others, too.
    real = np.concatenate([real, real[:9] + np.spacing(real[:9]) * steps[:9]])
    assert precision_recall(real, generated.astype(np.float32), neighbours=2) == by_brute_force(
        real, generated.astype(np.float32), 2
    )


def test_the_error_of_products_stays_within_its_bounds():
    """Also where all terms have one sign and errors add up."""
    rng = np.random.default_rng(5)
    for dim in (1, 2, 64, 2048):
        sides = [
            np.abs(rng.normal(size=(30, dim))).astype(np.float32) + np.float32(shift)
            for shift in (0, 3)
        ]
        a, b = module._prepare(*sides)
        exact = distances(*sides) * a.scale**2
        (_, low, high), *others = module._bounds(a, b)
        assert not others
        assert (low <= exact).all() and (exact <= high).all()
        # And tight enough to be of use.
        assert np.max(high - low) < 1e-3 * exact.max() * max(dim / 512, 1)


def test_the_same_images_have_all():
    x = np.random.default_rng(6).normal(size=(50, 4)).astype(np.float32)
    assert precision_recall(x, x[::-1]) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)


@pytest.fixture
def exact_pairs(monkeypatch):
    """The numbers of pairs whose distances had to be computed one by one."""
    counts = []
    exact = module._squared_distances

    def counted(a, i, b, j):
        counts.append(len(i))
        return exact(a, i, b, j)

    monkeypatch.setattr(module, "_squared_distances", counted)
    return counts


def test_few_pairs_are_computed_one_by_one(exact_pairs):
    rng = np.random.default_rng(10)
    real, generated = (rng.normal(m, 1, (1000, 64)).astype(np.float32) for m in (0, 0.1))
    precision_recall(real, generated)
    assert sum(exact_pairs) < 2 * 1000 * (3 + 2)
    # A generator of nearly the same image, far away: no less precise for that.
    exact_pairs.clear()
    precision_recall(real, 20 + generated * np.float32(1e-4))
    assert sum(exact_pairs) < 2 * 1000 * (3 + 2)


def test_collapsed_images_are_quick(exact_pairs):
    """A generator that always draws the same image would make every pair a tie."""
    rng = np.random.default_rng(7)
    real = rng.normal(size=(300, 256)).astype(np.float32)
    generated = np.repeat(real[:1], 3000, axis=0)
    generated[0] += 1
    precision, recall = precision_recall(real, generated)
    assert precision >= 2999 / 3000
    # Its outlier's ball reaches the 2999 copies, and whatever is nearer.
    radius = np.sum((generated[0] - generated[1]).astype(np.float64) ** 2)
    within = distances(real, generated[:1])[:, 0] <= radius
    within[0] = True
    assert recall == np.mean(within)
    assert sum(exact_pairs) < 20_000


def test_memory_is_that_of_blocks(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 2**14)
    sizes = []
    bounds = module._bounds

    def watched(*sides):
        for rows, low, high in bounds(*sides):
            sizes.append(low.size)
            yield rows, low, high

    monkeypatch.setattr(module, "_bounds", watched)
    x = np.random.default_rng(8).normal(size=(500, 2)).astype(np.float32)
    precision_recall(x, x[:300])
    assert max(sizes) <= 2**14 and sum(sizes) == 500 * 500 + 300 * 300 + 500 * 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"neighbours": 9}, "got 9 for 12 real and 9 generated"),
        ({"neighbours": 0}, "neighbours must be from 1"),
        ({"generated": np.ones((9, 4), np.float32)}, "generated have 4 values an image where 5"),
        ({"real": np.full((12, 5), np.nan, np.float32)}, "real: 12 of 12 images"),
        ({"real": np.ones((12, 5), int)}, "real must be floats"),
        ({"real": np.ones((12, 0))}, "at least one feature"),
    ],
)
def test_wrong_input_is_refused(change, message):
    rng = np.random.default_rng(9)
    draw = lambda n: rng.normal(size=(n, 5)).astype(np.float32)
    good = {"real": draw(12), "generated": draw(9), "neighbours": 8}
    assert precision_recall(**good) == by_brute_force(good["real"], good["generated"], 8)
    with pytest.raises(ValueError, match=message):
        precision_recall(**(good | change))
