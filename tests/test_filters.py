"""Top-k and top-p against forms that sort the vocabulary, and the draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import PartitionSpec
from scipy import stats

from lasad_jax.config import MeshConfig, SamplingConfig
from lasad_jax.sampling.filters import draw, keep_top_k, keep_top_p
from lasad_jax.training.sharding import make_mesh

# Of any size, both zeros among them, and of few values, so that there are ties. Subnormal ones
# are zeros to a processor that flushes them.
FINITE = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False) | st.sampled_from(
    [-1.5, -1.0, -0.0, 0.0, 0.25, 3.0]
)
LOGITS = hnp.arrays(np.float32, (2, 9), elements=FINITE | st.just(-np.inf)).filter(
    lambda x: np.isfinite(x).any(axis=-1).all()
)
JITTED_TOP_K, JITTED_TOP_P = jax.jit(keep_top_k), jax.jit(keep_top_p)


def sorted_top_k(logits, k):
    threshold = -np.sort(-logits, axis=-1)[..., min(k, logits.shape[-1]) - 1, None]
    return np.where(logits < threshold, -np.inf, logits)


def sorted_top_p(logits, p):
    """In float64; the second result says where p is not told from a sum by float32."""
    ordered = -np.sort(-logits.astype(np.float64), axis=-1)
    weights = np.exp(ordered - ordered[..., :1])
    probability = weights / weights.sum(axis=-1, keepdims=True)
    reached = np.cumsum(probability, axis=-1)
    before = np.concatenate([np.zeros_like(reached[..., :1]), reached[..., :-1]], axis=-1)
    threshold = np.min(np.where(before < p, ordered, np.inf), axis=-1, keepdims=True)
    unclear = (np.abs(reached - p) < 1e-5).any(axis=-1)
    return np.where(logits < threshold, -np.inf, logits), unclear


@settings(deadline=None, max_examples=200)
@given(LOGITS, st.integers(1, 12))
def test_top_k_keeps_the_k_largest_and_ties(logits, k):
    np.testing.assert_array_equal(JITTED_TOP_K(logits, k), sorted_top_k(logits, k))


@settings(deadline=None, max_examples=200)
@given(LOGITS, st.floats(1e-4, 0.9999))
def test_top_p_keeps_the_fewest_that_reach_p_and_ties(logits, p):
    expected, unclear = sorted_top_p(logits, p)
    got = np.asarray(JITTED_TOP_P(logits, p))
    np.testing.assert_array_equal(got[~unclear], expected[~unclear])


@pytest.mark.parametrize("p", [1e-60, 1e-40, 1e-9])
def test_the_likeliest_stays_whatever_p(p):
    logits = np.random.default_rng(0).standard_normal((3, 501)).astype(np.float32)
    kept = np.isfinite(keep_top_p(logits, p))
    np.testing.assert_array_equal(kept, logits == logits.max(axis=-1, keepdims=True))


def test_equal_logits_all_stay():
    logits = np.full((2, 7), -3.25, np.float32)
    np.testing.assert_array_equal(keep_top_k(logits, 2), logits)
    np.testing.assert_array_equal(keep_top_p(logits, 0.1), logits)


def test_p_close_to_one_drops_what_has_no_weight_alone():
    logits = np.array([0.0, 1.0, -200.0, -3.0, -np.inf], np.float32)
    kept = np.isfinite(keep_top_p(logits, 1 - 1e-7))
    np.testing.assert_array_equal(kept, [True, True, False, True, False])


@pytest.mark.parametrize("size", [1, 2, 333, 16385])
def test_vocabularies_of_any_size(size):
    logits = (5 * np.random.default_rng(size).standard_normal((3, size))).astype(np.float32)
    for k in {1, -(-size // 3), size}:
        np.testing.assert_array_equal(keep_top_k(logits, k), sorted_top_k(logits, k))
    for p in (0.1, 0.77):
        expected, unclear = sorted_top_p(logits, p)
        got = np.asarray(keep_top_p(logits, p))
        # A probability near p may fall on either side: as many codes, give or take one.
        differing = (got != expected).sum(axis=-1)
        assert (differing <= unclear).all()


def test_under_vmap_and_split_over_devices():
    logits = np.random.default_rng(1).standard_normal((8, 3, 50)).astype(np.float32)
    both = lambda x: keep_top_p(keep_top_k(x, 11), 0.6)
    expected = np.asarray(both(logits))
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.vmap(both)))(logits), expected)
    mesh, rows = make_mesh(MeshConfig()), PartitionSpec("data")
    for check_vma in (True, False):
        split = jax.shard_map(both, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=check_vma)
        np.testing.assert_array_equal(jax.jit(split)(logits), expected)


def test_nothing_is_sorted():
    logits = jax.ShapeDtypeStruct((4, 1024), jnp.float32)
    for keep, value in ((keep_top_k, 100), (keep_top_p, 0.9)):
        text = jax.jit(keep, static_argnums=1).lower(logits, value).as_text()
        assert "reduce" in text
        assert "stablehlo.sort" not in text and "chlo.top_k" not in text


def test_draws_follow_the_distribution():
    logits = np.array([0.0, 1.0, -1.0, 2.0, 0.5], np.float32)
    uniforms = jax.random.uniform(jax.random.key(0), (4000,))
    config = SamplingConfig(temperature=0.7, top_k=4)
    drawn = draw(np.tile(logits, (4000, 1)), uniforms, config)
    expected = np.exp(np.float64(logits) / 0.7) * (logits > -1)
    counts = np.bincount(drawn, minlength=5)
    assert counts[2] == 0
    rest = expected > 0
    p_value = stats.chisquare(counts[rest], 4000 * expected[rest] / expected.sum()).pvalue
    assert p_value > 1e-3
