"""Dropout masks that cost a few integer operations, so that they hide behind the memory's pace.

`jax.random.bernoulli` runs twenty rounds of Threefry for every element: at a network's widths
that takes longer than everything else the surrounding kernel does. Here Threefry seeds each
token, and a 32-bit mixing function spreads the seed over the token's channels.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, UInt32

_GOLDEN = 0x9E3779B9


def token_seeds(key: Key[Array, ""], shape: tuple[int, ...]) -> UInt32[Array, "*shape"]:
    """A seed for each token of an array."""
    return jax.random.bits(key, shape, jnp.uint32)


def kept(
    seeds: UInt32[Array, "*tokens 1"], channels: Int[Array, " D"], rate: float
) -> Bool[Array, "*tokens D"]:
    """True where an element stays: with probability 1 - rate, to within 2^-32.

    Args:
      seeds: from `token_seeds`, with an axis for the channels.
      channels: their numbers.
      rate: share of elements that are dropped.
    """
    spread = channels.astype(jnp.uint32) * jnp.uint32(_GOLDEN)
    return _mix(seeds + spread) >= jnp.uint32(round(rate * 2**32))


def _mix(x: UInt32[Array, "*any"]) -> UInt32[Array, "*any"]:
    """A bijection of 32-bit words in which every bit of the input moves every bit of the output
    (constants: C. Wellons, "Prospecting for hash functions", 2018)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
