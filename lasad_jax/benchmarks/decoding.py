"""How the benchmark draws images: the one place that knows what decoding takes."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from lasad_jax.config import SamplingConfig
from lasad_jax.models import ModelConfig, decoder
from lasad_jax.models.decoder import Cache, Weights
from lasad_jax.sampling.decode import generate

GUIDANCE = 2.0


def prepare(config: ModelConfig, params: PyTree) -> tuple[PyTree, Weights]:
    """What the functions below take, from the generator's parameters."""
    return params, decoder.prepare(config, params)


def draw_images(
    config: ModelConfig,
    prepared: tuple[PyTree, Weights],
    labels: Int[Array, " B"],
    keys: Key[Array, " B"],
) -> Int[Array, "B N"]:
    """All codes of images, with guidance."""
    given = jnp.zeros((len(labels), 0), jnp.int32)
    return generate(config, *prepared, labels, keys, given, SamplingConfig(guidance=GUIDANCE))


def begin(
    config: ModelConfig, prepared: tuple[PyTree, Weights], labels: Int[Array, " B"]
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits of the first code, and the cache to go on from."""
    none = jnp.zeros((len(labels), 0), jnp.int32)
    params, _ = prepared
    return decoder.prefill(config, params, labels, none)


def decode(
    config: ModelConfig,
    prepared: tuple[PyTree, Weights],
    tokens: Int[Array, " B"],
    cache: Cache,
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits of the code after these, and the new cache."""
    _, weights = prepared
    return decoder.decode(config, weights, tokens, cache)
