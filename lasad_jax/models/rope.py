"""2D rotary embedding as in LlamaGen: half of each head turns by row, half by column."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

BASE = 1e4


def rotary_table(grid: tuple[int, int], head_dim: int) -> Float[np.ndarray, "cells pairs 2"]:
    """Cosine and sine for every cell in raster order.

    Args:
      grid: (R, C).
      head_dim: a multiple of 4. Frequencies are 1e4^(-2i / (head_dim / 2)) within an axis.
    """
    half = head_dim // 2
    frequencies = BASE ** (-np.arange(0, half, 2) / half)
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    angles = np.concatenate([rows[:, None] * frequencies, columns[:, None] * frequencies], axis=1)
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def rotate(
    x: Float[Array, "B N H Dk"],
    grid: tuple[int, int],
    index: Int[Array, ""] | int,
    *,
    prefix_scale: float,
    num_prefix: int = 1,
) -> Float[Array, "B N H Dk"]:
    """Turns each interleaved pair (2i, 2i + 1) by its token's place.

    Args:
      x: queries or keys.
      grid: (R, C).
      index: number of tokens before the first of x, prefix included.
      prefix_scale: what prefix tokens, which have no place, are multiplied by: 1 leaves
        them as they are; LlamaGen's table is all zeros there, so their keys vanish.
      num_prefix: prefix tokens before the grid.
    """
    cells = rotary_table(grid, x.shape[-1])
    prefix = np.zeros((num_prefix, *cells.shape[1:]))
    prefix[..., 0] = prefix_scale
    table = jnp.asarray(np.concatenate([prefix, cells]), jnp.float32)
    turn = jnp.take(table, index + jnp.arange(x.shape[1]), axis=0)[:, None]
    # (-sin, sin) meets each pair read backwards: no pair is taken apart, which on a GPU keeps
    # the rotation inside the kernel that makes x.
    cos, sin = turn[..., :1], turn[..., 1:] * jnp.array([-1.0, 1.0])
    pairs = x.reshape(*x.shape[:-1], -1, 2).astype(jnp.float32)
    turned = pairs * cos + jnp.flip(pairs, axis=-1) * sin
    return turned.reshape(x.shape).astype(x.dtype)


def turn_table(
    grid: tuple[int, int], head_dim: int, *, prefix_scale: float, num_prefix: int = 1
) -> Float[np.ndarray, "tokens 2 Dk"]:
    """For each token of an image: what `turn` multiplies a head and its swapped pairs by."""
    cos, sin = np.moveaxis(np.repeat(rotary_table(grid, head_dim), 2, axis=1), -1, 0)
    cells = np.stack([cos, np.where(np.arange(head_dim) % 2, sin, -sin)], axis=1)
    prefix = np.zeros((num_prefix, *cells.shape[1:]))
    prefix[:, 0] = prefix_scale
    return np.concatenate([prefix, cells])


def turn(x: Float[Array, "*lead Dk"], by: Float[Array, "2 Dk"]) -> Float[Array, "*lead Dk"]:
    """`rotate` for one token, whose row of `turn_table` is given."""
    swapped = jnp.flip(x.reshape(*x.shape[:-1], -1, 2), axis=-1).reshape(x.shape)
    return (x.astype(jnp.float32) * by[0] + swapped.astype(jnp.float32) * by[1]).astype(x.dtype)
