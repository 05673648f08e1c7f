"""2D rotary embedding as in LlamaGen: half of each head turns by row, half by column."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

BASE = 1e4
_NUM_PREFIX = 1


def rotary_table(
    grid: tuple[int, int], head_dim: int, *, prefix_scale: float
) -> Float[np.ndarray, "tokens pairs 2"]:
    """Cosine and sine for the prefix token and every cell in raster order.

    Args:
      grid: (R, C).
      head_dim: a multiple of 4. Frequencies are 1e4^(-2i / (head_dim / 2)) within an axis.
      prefix_scale: what the prefix token, which has no place, is multiplied by: 1 leaves it
        as it is; LlamaGen's table is all zeros there, so its query and key vanish.
    """
    half = head_dim // 2
    frequencies = BASE ** (-np.arange(0, half, 2) / half)
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    angles = np.concatenate([rows[:, None] * frequencies, columns[:, None] * frequencies], axis=1)
    cells = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    prefix = np.zeros((_NUM_PREFIX, *cells.shape[1:]))
    prefix[..., 0] = prefix_scale
    return np.concatenate([prefix, cells])


def turns(
    grid: tuple[int, int],
    head_dim: int,
    index: Int[Array, ""] | int,
    num_tokens: int,
    *,
    prefix_scale: float,
) -> Float[Array, "N pairs 2"]:
    """Rows of `rotary_table` for the tokens that `index` others come before."""
    table = jnp.asarray(rotary_table(grid, head_dim, prefix_scale=prefix_scale), jnp.float32)
    return jnp.take(table, index + jnp.arange(num_tokens), axis=0)


def rotate(
    x: Float[Array, "B N H Dk"], turns: Float[Array, "N pairs 2"]
) -> Float[Array, "B N H Dk"]:
    """Turns each interleaved pair (2i, 2i + 1) of queries or keys by its token's place."""
    # (-sin, sin) meets each pair read backwards: no pair is taken apart, which on a GPU keeps
    # the rotation inside the kernel that makes x.
    turns = turns[:, None]
    cos, sin = turns[..., :1], turns[..., 1:] * jnp.array([-1.0, 1.0])
    pairs = x.reshape(*x.shape[:-1], -1, 2).astype(jnp.float32)
    turned = pairs * cos + jnp.flip(pairs, axis=-1) * sin
    return turned.reshape(x.shape).astype(x.dtype)


def turn_table(
    grid: tuple[int, int], head_dim: int, *, prefix_scale: float
) -> Float[np.ndarray, "tokens 2 Dk"]:
    """For each token of an image: what `turn` multiplies a head and its swapped pairs by."""
    table = rotary_table(grid, head_dim, prefix_scale=prefix_scale)
    cos, sin = np.moveaxis(np.repeat(table, 2, axis=1), -1, 0)
    return np.stack([cos, np.where(np.arange(head_dim) % 2, sin, -sin)], axis=1)


def turn(x: Float[Array, "*lead Dk"], by: Float[Array, "2 Dk"]) -> Float[Array, "*lead Dk"]:
    """`rotate` for one token, whose row of `turn_table` is given."""
    swapped = jnp.flip(x.reshape(*x.shape[:-1], -1, 2), axis=-1).reshape(x.shape)
    return (x.astype(jnp.float32) * by[0] + swapped.astype(jnp.float32) * by[1]).astype(x.dtype)
