"""Classifier-free guidance: how strongly the class is followed, token by token."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lasad_jax.config import SamplingConfig


def guidance_scale(
    config: SamplingConfig, token: Int[Array, ""], num_tokens: int
) -> Float[Array, ""]:
    """The scale s for token number `token` of `num_tokens`.

    "constant" is s throughout. "linear" and "power-cosine" rise from 1 at the first token
    to s at the last; the latter as (1 - cos(pi x^power)) / 2 (MDT, arXiv 2303.14389).
    """
    done = token / max(num_tokens - 1, 1)
    rise = {
        "constant": jnp.ones_like(done),
        "linear": done,
        "power-cosine": (1 - jnp.cos(jnp.pi * done**config.guidance_power)) / 2,
    }[config.guidance_schedule]
    return 1 + (config.guidance - 1) * rise


def guide(
    conditional: Float[Array, "B D"], unconditional: Float[Array, "B D"], scale: Float[Array, ""]
) -> Float[Array, "B D"]:
    """u + s (c - u), of logits (arXiv 2207.12598) or of features that a matrix makes them from."""
    return unconditional + scale * (conditional - unconditional)
