"""How the benchmark draws images: with guidance, from nothing but their classes."""

import jax.numpy as jnp
from absl import flags
from jaxtyping import Array, Float, Int, Key, PyTree

from lasad_jax.config import SamplingConfig
from lasad_jax.models import ModelConfig, decoder
from lasad_jax.models.decoder import Cache, Weights
from lasad_jax.sampling.decode import generate

GUIDANCE = 2.0
DECODER = flags.DEFINE_enum(
    "decoder",
    "auto",
    decoder.IMPLEMENTATIONS,
    "Form of the decoder; softmax has no other than xla.",
)


def draw_images(
    config: ModelConfig, weights: Weights, labels: Int[Array, " B"], keys: Key[Array, " B"]
) -> Int[Array, "B N"]:
    """All codes of images, with guidance."""
    given = jnp.zeros((len(labels), 0), jnp.int32)
    sampling = SamplingConfig(guidance=GUIDANCE)
    return generate(config, weights, labels, keys, given, sampling)


def begin(
    config: ModelConfig, weights: Weights, labels: Int[Array, " B"]
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits of the first code, and the cache to go on from."""
    nothing = jnp.zeros((len(labels), 0), jnp.int32)
    features, cache = decoder.prefill(config, weights, labels, nothing)
    return decoder.logits(weights, features), cache


def prepare(config: ModelConfig, params: PyTree, num_rows: int | None = None) -> Weights:
    """The decoder's weights, for the form that is asked for."""
    return decoder.prepare(config, params, num_rows, DECODER.value)


def step(
    config: ModelConfig, weights: Weights, tokens: Int[Array, " B"], cache: Cache
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits of the code after `tokens`, and the cache to go on from."""
    features, cache = decoder.decode(config, weights, tokens, cache)
    return decoder.logits(weights, features), cache
