"""The causal 5x5 depthwise convolution on the grid, plain and with fused kernels.

    y[n] = x[n] + sum over taps t of  kernel[t] * x[the token at tap t of n]

The sum and its gradients are float32 (or wider, as x is) until they are rounded once.
"""

import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from lasad_jax.ops.kernels import choice
from lasad_jax.ops.numerics import wide

REACH = 2
# Columns of which three rows fit into registers.
_NARROW = 24
# Rows down and columns to the right of each tap: itself, then all earlier ones from its own row
# upwards.
TAPS = (
    *((0, -right) for right in range(REACH + 1)),
    *((-up, right) for up in range(1, REACH + 1) for right in range(-REACH, REACH + 1)),
)


def num_recent(columns: int) -> int:
    """How many tokens lie between a token and its furthest tap, that one counted."""
    return REACH * columns + REACH


def neighbour(
    tokens: Int[Array, "*n"], tap: int, columns: int, num_prefix: int, *, later: bool = False
) -> tuple[Int[Array, "*n"], Bool[Array, "*n"]]:
    """The token at a tap's place relative to each token, and whether there is one.

    Prefix tokens have only themselves and are nobody's neighbour; nothing wraps around the end
    of a row. Where there is none, the number means nothing.

    Args:
      tokens: their numbers in the sequence, the prefix first.
      tap: index into `TAPS`.
      columns: C.
      num_prefix: P.
      later: instead, the token that has each token at the tap's place; it may lie beyond the
        last row.
    """
    if tap == 0:
        return tokens, tokens >= 0
    down, right = (-step if later else step for step in TAPS[tap])
    place = tokens - num_prefix
    column = place % columns + right
    source = tokens + down * columns + right
    exists = (place >= 0) & (source >= num_prefix) & (column >= 0) & (column < columns)
    return source, exists


def next_token(
    x: Float[Array, "B D"],
    recent: Float[Array, "B W D"],
    index: Int[Array, ""],
    kernel: Float[Array, "taps D"],
    *,
    columns: int,
    num_prefix: int = 1,
) -> tuple[Float[Array, "B D"], Float[Array, "B W D"]]:
    """Convolves the token after `index` others.

    Args:
      x: the token.
      recent: ring of the W = `num_recent(C)` newest inputs, slot i % W for token i.
      index: its number in the sequence, the prefix counted.
      kernel: a weight for each of `TAPS` and each channel.
      columns: C.
      num_prefix: P.

    Returns:
      y in x's dtype and the ring with x in it.
    """
    window, y = recent.shape[1], wide(x) * (1 + kernel[0])
    # Tap by tap: of a product over all taps XLA makes, on a CPU, one small product per channel.
    for tap in range(1, len(TAPS)):
        source, exists = neighbour(jnp.asarray(index), tap, columns, num_prefix)
        there = jax.lax.dynamic_index_in_dim(recent, source % window, axis=1, keepdims=False)
        y += there * (kernel[tap] * exists)
    recent = jax.lax.dynamic_update_slice_in_dim(recent, x[:, None], index % window, axis=1)
    return y.astype(x.dtype), recent


def local_conv(
    x: Float[Array, "B N D"],
    kernel: Float[Array, "taps D"],
    *,
    grid: tuple[int, int],
    num_prefix: int = 1,
    implementation: str = "auto",
    batch_axes: str | tuple[str, ...] | None = None,
) -> Float[Array, "B N D"]:
    """Convolves a sequence from its start: of prefix and grid, or the first N tokens of them.

    Args:
      x: tokens in raster order, the prefix first.
      kernel: a weight for each of `TAPS` and each channel.
      grid: rows and columns (R, C).
      num_prefix: P.
      implementation: "plain", "triton" (for NVIDIA GPUs), or "auto": the latter where it can run.
      batch_axes: axes of the current mesh, if there is one, over which images are split.

    Returns:
      y in x's dtype.

    Raises:
      ValueError: if shapes or options do not fit, or "triton" cannot run.
    """
    _check(x, kernel, grid, num_prefix)
    columns = grid[1]
    if not choice.prefers_triton(x, implementation):
        return _plain(x, kernel, columns, num_prefix)
    forward, backward = kernels(columns=columns, num_prefix=num_prefix)
    if not jax.sharding.get_abstract_mesh().empty:
        images, all_ = PartitionSpec(batch_axes), PartitionSpec()
        # The parts of the kernel's gradient stay with their images: their sum, outside, is the
        # only communication.
        split = functools.partial(jax.shard_map, out_specs=images, check_vma=False)
        forward = split(forward, in_specs=(images, all_))
        backward = split(backward, in_specs=(images, images, all_))
    return fused(x, kernel, forward, backward)


def kernels(*, columns: int, **options) -> tuple[Callable, Callable]:
    """The forward and backward kernel; those of narrow grids take no tiling."""
    # Imported when first used: it needs a part of Pallas that not every installation has.
    narrow = columns <= _NARROW and "tiling" not in options
    name = "local_conv_rows_triton" if narrow else "local_conv_triton"
    module = importlib.import_module(f"lasad_jax.ops.kernels.{name}")
    options["columns"] = columns
    return tuple(functools.partial(way, **options) for way in (module.forward, module.backward))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def fused(
    x: Float[Array, "B N D"],
    kernel: Float[Array, "taps D"],
    forward: Callable,
    backward: Callable,
) -> Float[Array, "B N D"]:
    """The convolution by one kernel each way, whose contracts are in `local_conv_triton`."""
    return forward(x, kernel.astype(jnp.float32))


def _fused_forward(x, kernel, forward, backward):
    return fused(x, kernel, forward, backward), (x, kernel)


def _fused_backward(forward, backward, residuals, d_y):
    x, kernel = residuals
    d_x, parts = backward(d_y, x, kernel.astype(jnp.float32))
    return d_x, jnp.sum(parts, axis=(0, 1)).astype(kernel.dtype)


fused.defvjp(_fused_forward, _fused_backward)


def _plain(x, kernel, columns, num_prefix):
    """The same with XLA's own operations."""
    num_tokens, wide_x = x.shape[1], wide(x)
    kernel = kernel.astype(wide_x.dtype)
    tokens = jnp.arange(num_tokens)
    y = wide_x
    for tap, (down, right) in enumerate(TAPS):
        # In a narrow grid no token has a tap that would lie ahead.
        back = max(0, -down * columns - right)
        shifted = jnp.pad(wide_x, [(0, 0), (back, 0), (0, 0)])[:, :num_tokens]
        exists = neighbour(tokens, tap, columns, num_prefix)[1]
        # The tokens masked, not the weights: on a mesh, a weight for every token would be sent.
        y += jnp.where(exists[:, None], shifted, 0.0) * kernel[tap]
    return y.astype(x.dtype)


def _check(x, kernel, grid, num_prefix):
    longest = num_prefix + grid[0] * grid[1]
    if x.ndim != 3 or x.shape[1] > longest:
        raise ValueError(
            f"x: expected (B, N, D) with N up to {longest}, the {num_prefix} prefix tokens and "
            f"the grid {tuple(grid)}; got {x.shape}"
        )
    if kernel.shape != (len(TAPS), x.shape[2]):
        raise ValueError(
            f"kernel: expected {(len(TAPS), x.shape[2])}, taps and channels; got {kernel.shape}"
        )
