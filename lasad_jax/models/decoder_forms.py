"""The forms that a step of decoding has, and which can run.

    xla     runs anywhere
    triton  two kernels of the mixers for NVIDIA GPUs; single recurrences only
    mosaic  a layer in two launches, one of them all that lies between the heads of two layers:
            for Hopper GPUs, bf16 and a local convolution

In all but "xla" matrix products are kernels where they can be.
"""

import jax
import jax.numpy as jnp

from lasad_jax.models.config import ModelConfig
from lasad_jax.models.local_conv import NUM_PREFIX
from lasad_jax.models.mixers import FAMILIES
from lasad_jax.models.sizes import ffn_width
from lasad_jax.ops.kernels import between_tiling, choice

IMPLEMENTATIONS = ("auto", "xla", "triton", "mosaic")
# The joint projection is this many columns wide, or a multiple: what matrix products like.
_COLUMNS = 64


def resolve_implementation(
    config: ModelConfig, implementation: str = "auto", num_rows: int | None = None
) -> str:
    """The form that "auto" stands for on this device; any other, if it can run.

    Args:
      config: the generator's.
      implementation: one of `IMPLEMENTATIONS`.
      num_rows: that the device decodes at a time, with guidance two for each image; None for
        as many as suit.

    Raises:
      ValueError: for an unknown form, or saying why the named one cannot run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: {implementation!r} is not one of {IMPLEMENTATIONS}")
    if implementation == "xla":
        return implementation
    mixers = _obstacle(config)
    if implementation == "auto":
        if mixers is not None:
            return "xla"
        return "triton" if _obstacle_between(config, num_rows) else "mosaic"
    if mixers:
        raise ValueError(
            f"implementation: {implementation!r} cannot decode here: {mixers}; use 'xla'"
        )
    if implementation == "mosaic" and (why := _obstacle_between(config, num_rows)):
        raise ValueError(f"implementation: 'mosaic' cannot decode here: {why}; use 'triton'")
    return implementation


def projection_columns(config: ModelConfig) -> int:
    """Of the joint projection of LASAD's mixer, filled up with zeros."""
    columns = config.num_heads * 2 * (config.query_dim + config.value_dim)
    if not config.selective:
        return columns
    return -(-(columns + config.num_heads) // _COLUMNS) * _COLUMNS


def _obstacle(config: ModelConfig) -> str | None:
    if config.mixer != "lasad" or config.decay == "manhattan":
        name = "softmax" if config.mixer == "softmax" else config.decay
        return f"it decodes single recurrences, not {name!r}"
    q, v = (
        jax.ShapeDtypeStruct((1, 1, config.num_heads, size), config.compute_dtype)
        for size in (config.query_dim, config.value_dim)
    )
    return choice.obstacle("triton", q, v, FAMILIES[config.decay], NUM_PREFIX)


def _obstacle_between(config: ModelConfig, num_rows: int | None) -> str | None:
    dtype = config.compute_dtype
    if dtype != jnp.bfloat16 or not config.has_local_conv:
        return f"it takes bfloat16 and a local convolution, not {dtype}, {config.local_conv!r}"
    others = config.num_heads * config.value_dim, ffn_width(config), projection_columns(config)
    return between_tiling.obstacle(num_rows, config.width, others)
