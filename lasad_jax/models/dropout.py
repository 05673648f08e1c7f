"""Dropout whose mask costs a few integer operations, so that it hides behind the memory's pace.

`jax.random.bernoulli` runs twenty rounds of Threefry for every element: at a network's widths
that takes longer than everything else the surrounding kernel does. Here Threefry seeds each
token, and a 32-bit mixing function spreads the seed over the token's channels.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Key

_GOLDEN = 0x9E3779B9


def keep_mask(key: Key[Array, ""], shape: tuple[int, ...], rate: float) -> Bool[Array, "*shape"]:
    """True where an element stays, with probability 1 - rate (to within 2^-32).

    Args:
      key: of the whole array.
      shape: the last axis is a token's channels, the others number the tokens.
      rate: share of elements that are dropped.
    """
    seeds = jax.random.bits(key, (*shape[:-1], 2), jnp.uint32)
    channel = jnp.arange(shape[-1], dtype=jnp.uint32) * jnp.uint32(_GOLDEN)
    bits = _mix(seeds[..., :1] + channel) ^ seeds[..., 1:]
    return _mix(bits) >= jnp.uint32(round(rate * 2**32))


def _mix(x: Array) -> Array:
    """A bijection of 32-bit words in which every bit of the input moves every bit of the output
    (constants: C. Wellons, "Prospecting for hash functions", 2018)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


class Dropout(nn.Module):
    """Zeroes elements at random and scales up the others; draws from the "dropout" key.

    Attributes:
      rate: share of elements that are dropped.
      train: False leaves everything as it is.
    """

    rate: float
    train: bool

    @nn.compact
    def __call__(self, x: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
        if not self.train or self.rate == 0:
            return x
        keep = keep_mask(self.make_rng("dropout"), x.shape, self.rate)
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)
