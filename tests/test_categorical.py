"""Codes drawn by running sums, plain and by the kernel, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import lower, quick_jit
from scipy import stats
from scipy.special import softmax

from lasad_jax.ops.passes.categorical import BLOCK, categorical, kernel

WAYS = {
    "plain": quick_jit(functools.partial(categorical, implementation="plain")),
    "kernel": quick_jit(kernel(interpret=True)),
}
JUST_BELOW_ONE = 1 - 2.0**-24


def rows(vocab_size, num, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng([seed, vocab_size])
    logits = rng.normal(0, 3, (num, vocab_size))
    logits[rng.random(logits.shape) < 0.3] = -np.inf
    logits[:, rng.integers(vocab_size)] = 0.5
    uniforms = rng.random(num).astype(np.float32)
    uniforms[:3] = 0, JUST_BELOW_ONE, 0.5
    return jnp.asarray(logits, dtype), jnp.asarray(uniforms)


def assert_drawn(codes, logits, uniforms):
    """Each number lies within its code's part of the running sum, as far as float32 tells."""
    assert codes.dtype == jnp.int32
    probability = softmax(np.asarray(logits, np.float64), axis=-1)
    at = (np.arange(len(codes)), np.asarray(codes))
    assert (probability[at] > 0).all()
    end = np.cumsum(probability, axis=-1)[at]
    room = 3e-6
    assert (end - probability[at] - room <= uniforms).all()
    assert (uniforms <= end + room).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("vocab_size", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 1000, 4096])
@pytest.mark.parametrize("way", WAYS)
def test_a_number_falls_to_the_code_whose_part_it_lies_in(way, vocab_size, dtype):
    logits, uniforms = rows(vocab_size, 9, dtype)
    assert_drawn(WAYS[way](logits, uniforms), logits, uniforms)


LOGITS = st.lists(st.sampled_from([-np.inf, -90.0, -3.0, 0.0, 0.25, 80.0]), min_size=5, max_size=5)


@settings(deadline=None, max_examples=200)
@given(LOGITS.filter(lambda x: max(x) > -np.inf), st.floats(0, JUST_BELOW_ONE, width=32))
def test_ties_zeros_and_extremes(logits, uniform):
    logits, uniforms = jnp.asarray([logits], jnp.float32), jnp.asarray([uniform], jnp.float32)
    codes = {name: way(logits, uniforms) for name, way in WAYS.items()}
    np.testing.assert_array_equal(codes["kernel"], codes["plain"])
    assert_drawn(codes["plain"], logits, uniforms)


@pytest.mark.parametrize("way", WAYS)
def test_codes_are_as_likely_as_they_should_be(way):
    vocab_size, num = 2 * BLOCK + 3, 20000
    logits = rows(vocab_size, 3)[0][:1]
    uniforms = jax.random.uniform(jax.random.key(1), (num,))
    if way == "kernel":
        uniforms = uniforms[:200]  # the interpreter takes rows one by one
    codes = WAYS[way](jnp.tile(logits, (len(uniforms), 1)), uniforms)
    expected = softmax(np.float64(logits[0])) * len(uniforms)
    counts = np.bincount(codes, minlength=vocab_size)
    assert not counts[expected == 0].any()
    # Rare codes together, as the test is one of large numbers.
    common = expected > 5
    counts, expected = (np.append(x[common], x[~common].sum()) for x in (counts, expected))
    assert stats.chisquare(counts, expected).pvalue > 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_all_codes_alike(way):
    vocab_size = 3 * BLOCK
    uniforms = (np.arange(0, vocab_size, 17) + 0.5) / vocab_size
    codes = WAYS[way](np.full((len(uniforms), vocab_size), -7.5, np.float32), np.float32(uniforms))
    np.testing.assert_array_equal(codes, np.arange(0, vocab_size, 17))


def test_on_gpus_it_is_one_launch():
    logits, uniforms = jax.ShapeDtypeStruct((6, 16384), jnp.float32), jnp.zeros(6)
    text = lower("A100", categorical, logits, uniforms)
    assert text.count('name = "categorical"') == 1
    assert "stablehlo.reduce" not in text


def test_wrong_shapes_and_options_are_refused():
    with pytest.raises(ValueError, match=r"a number for each row; got \(2, 5\) and \(3,\)"):
        categorical(jnp.zeros((2, 5)), jnp.zeros(3))
    with pytest.raises(ValueError, match="'triton' cannot run here"):
        categorical(jnp.zeros((2, 5)), jnp.zeros(2), implementation="triton")
