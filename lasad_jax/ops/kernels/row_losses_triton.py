"""Cross-entropy of rows of logits as a Pallas-Triton kernel, for NVIDIA GPUs.

A program takes one row, which it reads once and holds in registers; the gradient is written
over it. Rows too long for that are read twice, block by block.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from lasad_jax.ops.kernels.triton_math import Instructions

# Numbers of a row that one program can hold.
_LONGEST = 32768


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a row is cut.

    Attributes:
      columns: of a block, a power of two, with one for each thread at least: no two then hold
        the same number, which one might read after the other has written.
      num_warps: of the program.
    """

    columns: int
    num_warps: int


def row_losses(
    logits: Float[Array, "M V"],
    tokens: Int[Array, " M"],
    *,
    with_gradient: bool = True,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, " M"], Float[Array, "M V"] | None]:
    """Losses in float32, and their gradients in the memory and the dtype of the logits.

    Args:
      logits: bfloat16, float16 or float32.
      tokens: the column whose logit each row is to raise.
      with_gradient: otherwise there are only losses.
      tiling: instead of the one that suits the arguments.
      interpret: run on any platform, slowly.
    """
    tiling = tiling or _tiling(logits.shape[1])
    row = pl.BlockSpec((None, logits.shape[1]), lambda i: (i, 0))
    number = pl.BlockSpec((None,), lambda i: (i,))
    losses = jax.ShapeDtypeStruct(tokens.shape, jnp.float32)
    gradient = jax.ShapeDtypeStruct(logits.shape, logits.dtype)
    return pl.pallas_call(
        functools.partial(_kernel, columns=tiling.columns, exp=Instructions(interpret).exp),
        grid=tokens.shape,
        in_specs=[row, number],
        out_specs=(number, row if with_gradient else None),
        out_shape=(losses, gradient if with_gradient else None),
        input_output_aliases={0: 1} if with_gradient else {},
        compiler_params=plgpu.CompilerParams(num_warps=tiling.num_warps, num_stages=1),
        interpret=interpret,
        name="row_losses",
    )(logits, tokens)


def _tiling(vocab_size: int) -> Tiling:
    """32 numbers for each thread: two programs of 16384 columns fit on a multiprocessor."""
    columns = pl.next_power_of_2(vocab_size)
    if columns > _LONGEST:
        columns = 8192
    return Tiling(columns, num_warps=min(max(columns // 1024, 1), 32))


def _kernel(logits_ref, token_ref, loss_ref, gradient_ref, *, columns, exp):
    token, (vocab_size,) = token_ref[...], logits_ref.shape
    num_blocks = pl.cdiv(vocab_size, columns)
    walk = _once if num_blocks == 1 else functools.partial(lax.fori_loop, 0, num_blocks)

    def window(ref, block) -> tuple[jax.Array, Int[Array, " W"], Bool[Array, " W"] | None]:
        places = block * columns + jnp.arange(columns)
        exist = places < vocab_size if vocab_size % columns else None
        return ref.at[places], places, exist

    def load(block) -> Float[Array, " W"]:
        ref, _, exist = window(logits_ref, block)
        other = None if exist is None else -math.inf
        return plgpu.load(ref, mask=exist, other=other).astype(jnp.float32)

    if num_blocks == 1:
        row = load(0)
        load = lambda block: row

    def add(block, sums):
        old_largest, total = sums
        x = load(block)
        largest = jnp.maximum(old_largest, jnp.max(x))
        total = total * exp(old_largest - largest) + jnp.sum(exp(x - largest))
        return largest, total

    # The token's own logit lies where the gradient will be. The sums start from it, so that no
    # warp has them, and writes, before all have read it.
    is_code = (token >= 0) & (token < vocab_size)
    place = logits_ref.at[jnp.where(is_code, token, 0)]
    chosen = plgpu.load(place).astype(jnp.float32)
    largest, total = walk(add, (chosen, jnp.float32(0.0)))
    loss_ref[...] = jnp.log(total) + (largest - jnp.where(is_code, chosen, 0.0))
    if gradient_ref is None:
        return

    def write(block, _):
        # Of a row held in registers these are the exponentials that were added above.
        d_x = exp(load(block) - largest) * (1.0 / total)
        ref, places, exist = window(gradient_ref, block)
        d_x = jnp.where(places == token, d_x - 1.0, d_x)
        plgpu.store(ref, d_x.astype(gradient_ref.dtype), mask=exist)

    walk(write, None)


def _once(body, carry):
    return body(0, carry)
