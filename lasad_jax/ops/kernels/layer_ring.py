"""A layer's ring of keys and values as `decode_layers` reads it: by head, eight images at a time.

What one program takes of a head then lies together: a block of images' memories, and each token's
keys, values and log-weights of all images of the block beside each other.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from lasad_jax.ops.ring import ROWS, Ring

BLOCK = 8  # images
# Rows of a ring are two halves: keys of one lie beside those of the other.
HALF = ROWS // 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockedRing:
    """The arrays of a `Ring`, of M images: b counts those of a block, r the rows of a half.

    Attributes:
      memory: row image * Dk + d.
      recent_k: row block * 64 + r * 8 + b, column half * Dk + d.
      recent_v, log_weight: row block * 128 + (half * 8 + r) * 8 + b.
    """

    memory: Float[Array, "H M*Dk Dv"]
    recent_k: Float[Array, "H M*HALF 2*Dk"]
    recent_v: Float[Array, "H M*ROWS Dv"]
    log_weight: Float32[Array, "H M*ROWS"]


def to_blocks(ring: Ring, num_rows: int) -> BlockedRing:
    """Of `num_rows` images, a multiple of 8: those that a ring lacks remember nothing."""
    missing = num_rows - ring.memory.shape[0]
    pad = lambda x: jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
    ring = jax.tree.map(pad, ring)
    num_heads, _, key_dim = ring.recent_k.shape[1:]
    blocks = lambda x, *rows: x.reshape(-1, BLOCK, num_heads, *rows, *x.shape[3:])
    keys = blocks(ring.recent_k, 2, HALF).transpose(2, 0, 4, 1, 3, 5)
    values = blocks(ring.recent_v, ROWS).transpose(2, 0, 3, 1, 4)
    weights = blocks(ring.log_weight, ROWS).transpose(2, 0, 3, 1)
    return BlockedRing(
        memory=jnp.swapaxes(ring.memory, 0, 1).reshape(num_heads, -1, ring.memory.shape[3]),
        recent_k=keys.reshape(num_heads, -1, 2 * key_dim),
        recent_v=values.reshape(num_heads, -1, values.shape[-1]),
        log_weight=weights.reshape(num_heads, -1),
    )
