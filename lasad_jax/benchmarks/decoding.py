"""How the benchmark draws images: with guidance, from nothing but their classes."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from lasad_jax.config import SamplingConfig
from lasad_jax.models import ModelConfig, decoder
from lasad_jax.models.decoder import Cache, Weights
from lasad_jax.sampling.decode import generate

GUIDANCE = 2.0


def draw_images(
    config: ModelConfig, weights: Weights, labels: Int[Array, " B"], keys: Key[Array, " B"]
) -> Int[Array, "B N"]:
    """All codes of images, with guidance."""
    given = jnp.zeros((len(labels), 0), jnp.int32)
    return generate(config, weights, labels, keys, given, SamplingConfig(guidance=GUIDANCE))


def begin(
    config: ModelConfig, weights: Weights, labels: Int[Array, " B"]
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits of the first code, and the cache to go on from."""
    return decoder.prefill(config, weights, labels, jnp.zeros((len(labels), 0), jnp.int32))
