"""How the benchmark draws images: the one place that knows what decoding takes."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from lasad_jax.config import SamplingConfig
from lasad_jax.models import LASADGen, ModelConfig
from lasad_jax.sampling.decode import generate

GUIDANCE = 2.0


def prepare(config: ModelConfig, params: PyTree) -> PyTree:
    """What the functions below take, from the generator's parameters."""
    del config
    return params


def draw_images(
    config: ModelConfig, prepared: PyTree, labels: Int[Array, " B"], keys: Key[Array, " B"]
) -> Int[Array, "B N"]:
    """All codes of images, with guidance."""
    given = jnp.zeros((len(labels), 0), jnp.int32)
    return generate(config, prepared, labels, keys, given, SamplingConfig(guidance=GUIDANCE))


def begin(
    config: ModelConfig, prepared: PyTree, labels: Int[Array, " B"]
) -> tuple[Float[Array, "B V"], PyTree]:
    """Logits of the first code, and the cache to go on from."""
    none = jnp.zeros((len(labels), 0), jnp.int32)
    return LASADGen(config).apply({"params": prepared}, labels, none, method="prefill")


def decode(
    config: ModelConfig, prepared: PyTree, tokens: Int[Array, " B"], cache: PyTree
) -> tuple[Float[Array, "B V"], PyTree]:
    """Logits of the code after these, and the new cache."""
    return LASADGen(config).apply({"params": prepared}, tokens, cache, method="decode_step")
