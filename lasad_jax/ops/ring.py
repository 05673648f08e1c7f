"""The single recurrence for decoding: a memory that is written once in many tokens.

The newest keys and values stand in a ring beside the memory; when it is full, all of them
are folded in at once. A step then reads the memory but does not write it, and a memory in
bfloat16 is rounded once per round instead of once per token.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lasad_jax.ops.numerics import accumulator, einsum
from lasad_jax.ops.state import State

# Rows of a ring: the prefix token, then the newest tokens. Tensor cores take 16 at once.
ROWS = 16
NUM_RECENT = ROWS - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ring:
    """What decoding remembers of one layer's tokens; grid token j has row 1 + j % 15.

    Attributes:
      memory: sum of decayed k v^T as of the last time that the ring was folded into it; in
        bfloat16 for bfloat16 tokens, else as `State`'s.
      recent_k, recent_v: row 0 is the prefix token, the others the newest grid tokens.
      log_weight: float32. Entry 0 is the log-decay of the memory since it was folded, the
        others that of each row since its token; -inf for rows that are in the memory.
    """

    memory: Float[Array, "B H Dk Dv"]
    recent_k: Float[Array, "B H rows Dk"]
    recent_v: Float[Array, "B H rows Dv"]
    log_weight: Float[Array, "B H rows"]


def start_ring(state: State) -> Ring:
    """An empty ring beside the memory of `state`, which has seen its one prefix token.

    Raises:
      ValueError: if the state has another number of prefix tokens.
    """
    batch, num_prefix, num_heads, _ = state.prefix_k.shape
    if num_prefix != 1:
        raise ValueError(f"num_prefix: a ring holds one prefix token, not {num_prefix}; use step")
    dtype = state.prefix_k.dtype
    row_0 = lambda x: jnp.pad(jnp.swapaxes(x, 1, 2), [(0, 0), (0, 0), (0, NUM_RECENT), (0, 0)])
    return Ring(
        memory=state.memory.astype(dtype if dtype == jnp.bfloat16 else accumulator(dtype)),
        recent_k=row_0(state.prefix_k),
        recent_v=row_0(state.prefix_v),
        log_weight=jnp.broadcast_to(empty_log_weight(), (batch, num_heads, ROWS)),
    )


def empty_log_weight() -> Float[Array, " rows"]:
    """Log-weights just after folding: the memory's 0, of no row anything."""
    return jnp.where(jnp.arange(ROWS) == 0, 0.0, -jnp.inf)


def ring_step(
    ring: Ring,
    q: Float[Array, "B H Dk"],
    k: Float[Array, "B H Dk"],
    v: Float[Array, "B H Dv"],
    g: Float[Array, "*B H"],
    place: Int[Array, ""],
) -> tuple[Float[Array, "B H Dv"], Ring]:
    """Takes in grid token number `place`: `step` on a ring.

    Args:
      ring: from `start_ring` or `ring_step`.
      q, k, v: of this token.
      g: the log-factor of this step, content gate included.
      place: the token's raster index j.

    Returns:
      the output, in the dtype of v, and the ring after this token.
    """
    acc = accumulator(q.dtype)
    row = jnp.arange(ROWS)
    slot = 1 + place % NUM_RECENT
    new = row == slot
    log_weight = jnp.where(new, 0.0, ring.log_weight + g[..., None])
    recent_k = jnp.where(new[:, None], k[..., None, :], ring.recent_k)
    recent_v = jnp.where(new[:, None], v[..., None, :], ring.recent_v)
    weight = jnp.exp(log_weight)
    of_memory = weight[..., 0]
    weight = weight.at[..., 0].set(0.0)

    q = q.astype(acc)
    scores = einsum("bhd,bhrd->bhr", q, recent_k.astype(acc)) * jnp.where(row == 0, 1.0, weight)
    out = einsum("bhr,bhre->bhe", scores, recent_v.astype(acc))
    out += of_memory[..., None] * einsum("bhd,bhde->bhe", q, ring.memory.astype(acc))

    def fold(memory):
        weighted = (weight[..., None] * recent_v).astype(recent_v.dtype)
        recent = einsum("bhrd,bhre->bhde", recent_k.astype(acc), weighted.astype(acc))
        return (of_memory[..., None, None] * memory + recent).astype(memory.dtype)

    full = slot == NUM_RECENT
    memory = jax.lax.cond(full, fold, lambda memory: memory, ring.memory)
    log_weight = jnp.where(full, empty_log_weight(), log_weight)
    return out.astype(v.dtype), Ring(memory, recent_k, recent_v, log_weight)
