"""From logits to one code: temperature, top-k, top-p, and the draw.

Neither filter sorts the vocabulary. Both ask for the largest threshold t at which something
that only grows as t falls (how many logits are at least t, how likely they are together) is
enough, and a float has only 32 bits to try.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, UInt32

from lasad_jax.config import SamplingConfig
from lasad_jax.ops.passes.categorical import categorical

# Bits of the threshold found by one pass over the vocabulary, which asks about 2**_BITS - 1
# thresholds at once. A pass waits for the one before it, and costs a GPU two launches.
_BITS = 2


def keep_top_k(logits: Float[Array, "*B V"], k: int) -> Float[Array, "*B V"]:
    """-inf for all but the k largest (ties with the k-th stay); exact for normal float32."""
    count = lambda above: jnp.sum(above, axis=-1, keepdims=True)
    threshold = _largest_threshold(logits, lambda above: count(above) >= k)
    return jnp.where(logits < threshold, -jnp.inf, logits)


def keep_top_p(logits: Float[Array, "*B V"], p: float) -> Float[Array, "*B V"]:
    """-inf for all but the fewest likeliest codes whose probability reaches p.

    Ties with the last of them stay, and the likeliest does whatever p.
    """
    likeliest = jnp.max(logits, axis=-1, keepdims=True)
    weight = jnp.exp((logits - likeliest).astype(jnp.float32))
    total = jnp.sum(weight, axis=-1, keepdims=True)
    # Not zero, which no code at all would reach.
    target = jnp.maximum(p * total, jnp.finfo(jnp.float32).tiny)
    mass = lambda above: jnp.sum(jnp.where(above, weight, 0), axis=-1, keepdims=True)
    threshold = _largest_threshold(logits, lambda above: mass(above) >= target)
    return jnp.where(logits < threshold, -jnp.inf, logits)


def _largest_threshold(
    logits: Float[Array, "*B V"],
    enough: Callable[[Bool[Array, "*B V"]], Bool[Array, "*B 1"]],
) -> Float[Array, "*B 1"]:
    """The largest float32 t for which the logits that are at least t are `enough`; NaN if none.

    Found digit by digit, from its highest bits to its lowest.
    """
    ordered = _to_ordered(logits.astype(jnp.float32))
    threshold = jnp.zeros_like(ordered[..., :1])
    # Not a loop in the compiled program, where XLA launches twice as much on a GPU.
    for shift in range(32 - _BITS, -1, -_BITS):
        tried = [threshold | np.uint32(digit << shift) for digit in range(1, 2**_BITS)]
        # What is enough for a threshold is so for all below: their number is the digit.
        digit = sum(enough(ordered >= t).astype(jnp.uint32) for t in tried)
        threshold = threshold | (digit << shift)
    return _from_ordered(threshold)


# The bits of floats as integers in the order of the floats: those of positive ones are, once
# above all negative ones; those of negative ones run backwards.
_SIGN = np.uint32(1 << 31)


def _to_ordered(values: Float[Array, "*S"]) -> UInt32[Array, "*S"]:
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    return jnp.where(bits < _SIGN, bits | _SIGN, ~bits)


def _from_ordered(ordered: UInt32[Array, "*S"]) -> Float[Array, "*S"]:
    bits = jnp.where(ordered < _SIGN, ~ordered, ordered ^ _SIGN)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def draw(
    logits: Float[Array, "B V"], uniforms: Float32[Array, " B"], config: SamplingConfig
) -> Int[Array, " B"]:
    """One code for each image, by a number of its own, uniform in [0, 1)."""
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / config.temperature
    if 0 < config.top_k < logits.shape[-1]:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p < 1:
        logits = keep_top_p(logits, config.top_p)
    return categorical(logits, uniforms)
