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

# Numbers of a row that one program can hold.
_LONGEST = 32768


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a row is cut.

    Attributes:
      columns: of a block, a power of two.
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
        functools.partial(_kernel, columns=tiling.columns),
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
    """32 numbers for each thread, which leaves room for two programs of 16384 columns."""
    columns = pl.next_power_of_2(vocab_size)
    if columns > _LONGEST:
        columns = 8192
    return Tiling(columns, num_warps=min(max(columns // 1024, 1), 32))


def _kernel(logits_ref, token_ref, loss_ref, gradient_ref, *, columns):
    token, (vocab_size,) = token_ref[...], logits_ref.shape
    num_blocks = pl.cdiv(vocab_size, columns)
    walk = _once if num_blocks == 1 else functools.partial(lax.fori_loop, 0, num_blocks)

    def window(ref, block) -> tuple[jax.Array, Int[Array, " W"], Bool[Array, " W"] | None]:
        places = block * columns + jnp.arange(columns)
        exist = places < vocab_size if vocab_size % columns else None
        return ref.at[pl.ds(block * columns, columns)], places, exist

    def load(block) -> tuple[Float[Array, " W"], Bool[Array, " W"]]:
        """Logits, and which of them is the token's."""
        ref, places, exist = window(logits_ref, block)
        right = places == token
        if exist is None:
            return plgpu.load(ref).astype(jnp.float32), right
        x = plgpu.load(ref, mask=exist, other=-math.inf)
        return x.astype(jnp.float32), right & exist

    if num_blocks == 1:
        row = load(0)
        load = lambda block: row

    def add(block, sums):
        old_largest, total, chosen = sums
        x, right = load(block)
        largest = jnp.maximum(old_largest, jnp.max(x))
        total = total * jnp.exp(old_largest - largest) + jnp.sum(jnp.exp(x - largest))
        # Not read from memory by its place: another warp may have written the gradient there.
        return largest, total, chosen + jnp.sum(jnp.where(right, x, 0.0))

    zero = jnp.float32(0.0)
    largest, total, chosen = walk(add, (jnp.float32(-math.inf), zero, zero))
    loss_ref[...] = jnp.log(total) + (largest - chosen)
    if gradient_ref is None:
        return

    def write(block, _):
        x, right = load(block)
        # Of a row held in registers these are the exponentials that were added above.
        d_x = jnp.exp(x - largest) * (1.0 / total) - right.astype(jnp.float32)
        ref, _, exist = window(gradient_ref, block)
        plgpu.store(ref, d_x.astype(gradient_ref.dtype), mask=exist)

    walk(write, None)


def _once(body, carry):
    return body(0, carry)
