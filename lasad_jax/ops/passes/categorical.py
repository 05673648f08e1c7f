"""One code for every row of logits, by a number of its own: plain, and with a fused kernel.

The first code at which the running sum of the probabilities exceeds the number. A row so takes one
random number and not one for each code, as the largest of perturbed logits would.
"""

import functools
import importlib
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from lasad_jax.ops.kernels import choice

# Codes summed up at a time: the running sum is one over blocks, then one within a block.
BLOCK = 128


def categorical(
    logits: Float[Array, "B V"],
    uniforms: Float32[Array, " B"],
    *,
    implementation: str = "auto",
) -> Int32[Array, " B"]:
    """Draws each code with probability softmax(logits), where uniforms are uniform in [0, 1).

    Sums are of float32; probabilities below 2^-24 are as good as none, and a logit of -inf is none.

    Args:
      logits: of each row, at least one of them finite.
      uniforms: a number for each row.
      implementation: "plain", "triton" (for NVIDIA GPUs), or "auto": the latter where it can run.

    Raises:
      ValueError: if shapes or options do not fit, or "triton" cannot run.
    """
    if uniforms.shape != logits.shape[:1] or logits.ndim != 2:
        raise ValueError(
            "logits, uniforms: expected (B, V) and a number for each row; "
            f"got {logits.shape} and {uniforms.shape}"
        )
    run = kernel() if choice.prefers_triton(logits, implementation) else _plain
    return run(logits, uniforms)


def kernel(**options) -> Callable:
    """The kernel, whose contract is in `categorical_triton`."""
    # Imported when first used: it needs a part of Pallas that not every installation has.
    module = importlib.import_module("lasad_jax.ops.kernels.categorical_triton")
    return functools.partial(module.categorical, **options)


def first_over(
    target: Float32[Array, "*rows 1"],
    running: Float32[Array, "*rows n"],
    weights: Float32[Array, "*rows n"],
) -> Int32[Array, "*rows 1"]:
    """The first place whose running sum exceeds the target, among those that weigh anything; if
    roundings leave none, the last of these."""
    places, number = jnp.arange(weights.shape[-1], dtype=jnp.int32), weights.shape[-1]
    over = jnp.where((weights > 0) & (running > target), places, number)
    last = jnp.max(jnp.where(weights > 0, places, 0), axis=-1, keepdims=True)
    return jnp.minimum(jnp.min(over, axis=-1, keepdims=True), last)


def _plain(logits, uniforms):
    """The same with XLA's own operations."""
    x = logits.astype(jnp.float32)
    weights = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
    weights = jnp.pad(weights, [(0, 0), (0, -weights.shape[1] % BLOCK)])
    blocks = weights.reshape(len(weights), -1, BLOCK)
    sums = jnp.sum(blocks, axis=-1)
    running = jnp.cumsum(sums, axis=-1)
    target = uniforms[:, None] * running[:, -1:]
    block = first_over(target, running, sums)
    earlier = jnp.arange(sums.shape[1]) < block
    before = jnp.max(jnp.where(earlier, running, 0.0), axis=-1, keepdims=True)
    weights = jnp.take_along_axis(blocks, block[:, :, None], axis=1)[:, 0]
    place = first_over(target, before + jnp.cumsum(weights, axis=-1), weights)
    return (block * BLOCK + place)[:, 0]
