"""What one call hands to the next: prefix keys and values, and the decayed memory."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lasad_jax.ops.decays import Decay, Grid, ManhattanDecay
from lasad_jax.ops.numerics import accumulator


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything the operator remembers of the tokens seen so far.

    The states of several layers may be stacked along new first axes.

    Attributes:
      prefix_k, prefix_v: keys and values of the prefix tokens, zero until seen.
      memory: sum of decayed k v^T as of the last token, (B, H, Dk, Dv) in float32;
        for `ManhattanDecay` (B, H, C, Dk, Dv), each column as of its own last token.
      index: number of tokens seen, prefix included.
    """

    prefix_k: Float[Array, "*layers B P H Dk"]
    prefix_v: Float[Array, "*layers B P H Dv"]
    memory: Float[Array, "*layers_B_H_columns Dk Dv"]
    index: Int[Array, "*layers"]


def init_state(
    decay: Decay | type[Decay],
    *,
    batch: int,
    num_heads: int,
    key_dim: int,
    value_dim: int,
    grid: Grid,
    num_prefix: int = 1,
    dtype: jnp.dtype = jnp.float32,
) -> State:
    """The state before any token.

    Args:
      decay: a decay family, or one of its instances; it decides the memory's shape.
      batch, num_heads, key_dim, value_dim, num_prefix: B, H, Dk, Dv, P.
      grid: (R, C).
      dtype: of the prefix keys and values. The memory is float32 (float64 for float64).
    """
    family = decay if isinstance(decay, type) else type(decay)
    columns = (grid[1],) if family is ManhattanDecay else ()
    memory = (batch, num_heads, *columns, key_dim, value_dim)
    return State(
        prefix_k=jnp.zeros((batch, num_prefix, num_heads, key_dim), dtype),
        prefix_v=jnp.zeros((batch, num_prefix, num_heads, value_dim), dtype),
        memory=jnp.zeros(memory, accumulator(dtype)),
        index=jnp.zeros((), jnp.int32),
    )
