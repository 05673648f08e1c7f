"""One code for every row of logits as a Pallas-Triton kernel, for NVIDIA GPUs.

A program takes one row, which it reads once and holds in registers.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32, Int32

from lasad_jax.ops.passes.categorical import BLOCK, first_over

_NUMBERS_PER_WARP = 2048  # 64 a thread
_MOST_WARPS = 16


def categorical(
    logits: Float[Array, "B V"], uniforms: Float32[Array, " B"], *, interpret: bool = False
) -> Int32[Array, " B"]:
    """`passes.categorical.categorical` in one launch.

    Args:
      logits: bfloat16, float16 or float32.
      uniforms: a number in [0, 1) for each row.
      interpret: run on any platform, slowly.
    """
    rows, vocab_size = logits.shape
    columns = max(pl.next_power_of_2(vocab_size), BLOCK)
    num_warps = min(max(columns // _NUMBERS_PER_WARP, 4), _MOST_WARPS)
    number = pl.BlockSpec((1,), lambda i: (i,))
    return pl.pallas_call(
        functools.partial(_kernel, num_blocks=columns // BLOCK),
        grid=(rows,),
        in_specs=[pl.BlockSpec((None, vocab_size), lambda i: (i, 0)), number],
        out_specs=number,
        out_shape=jax.ShapeDtypeStruct((rows,), jnp.int32),
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name="categorical",
    )(logits, uniforms)


def _kernel(logits_ref, uniform_ref, code_ref, *, num_blocks):
    (vocab_size,) = logits_ref.shape

    def load(places) -> Float32[Array, "*places"]:
        exist = places < vocab_size if vocab_size < num_blocks * BLOCK else None
        other = None if exist is None else -math.inf
        return plgpu.load(logits_ref.at[places], mask=exist, other=other).astype(jnp.float32)

    blocks, within = jnp.arange(num_blocks), jnp.arange(BLOCK)
    x = load(blocks[:, None] * BLOCK + within[None])
    largest = jnp.max(jnp.max(x, axis=1), axis=0)
    sums = jnp.sum(jnp.exp(x - largest), axis=1)
    running = jnp.cumsum(sums)
    target = uniform_ref[...] * jnp.max(running, axis=0)
    block = first_over(target, running, sums)
    before = jnp.max(jnp.where(blocks < block, running, 0.0), axis=0)
    # Once more from memory, where they still lie near: registers are not indexed.
    weights = jnp.exp(load(block * BLOCK + within) - largest)
    place = first_over(target, before + jnp.cumsum(weights), weights)
    code_ref[...] = block * BLOCK + place
