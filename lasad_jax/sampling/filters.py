"""From logits to one code: temperature, top-k, top-p, and the draw."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from lasad_jax.config import SamplingConfig


def keep_top_k(logits: Float[Array, "*B V"], k: int) -> Float[Array, "*B V"]:
    """-inf for all but the k largest (ties with the k-th stay)."""
    threshold = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits < threshold, -jnp.inf, logits)


def keep_top_p(logits: Float[Array, "*B V"], p: float) -> Float[Array, "*B V"]:
    """-inf for all but the fewest likeliest codes whose probability reaches p."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    threshold = jnp.min(jnp.where(before < p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < threshold, -jnp.inf, logits)


def draw(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], config: SamplingConfig
) -> Int[Array, " B"]:
    """One code for each image, with a key of its own."""
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / config.temperature
    if 0 < config.top_k < logits.shape[-1]:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p < 1:
        logits = keep_top_p(logits, config.top_p)
    return jax.vmap(jax.random.categorical)(keys, logits)
