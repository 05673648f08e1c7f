"""One token at a time from a carried state: the recurrent form that decoding uses."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lasad_jax.ops.decays import Decay, Grid, ManhattanDecay
from lasad_jax.ops.numerics import einsum
from lasad_jax.ops.state import State


def step(
    state: State,
    q: Float[Array, "B H Dk"],
    k: Float[Array, "B H Dk"],
    v: Float[Array, "B H Dv"],
    decay: Decay,
    *,
    grid: Grid,
    log_gate: Float[Array, "B H"] | None = None,
) -> tuple[Float[Array, "B H Dv"], State]:
    """Takes in token number `state.index` and returns its output and the next state.

    Equal to the same token's output in `linear_attention`. Cost and memory do not depend
    on how many tokens came before.

    Args:
      state: from `init_state`, `linear_attention(..., return_state=True)` or `step`.
      q, k, v: of this token.
      decay: as in `linear_attention`.
      grid: (R, C).
      log_gate: optional non-positive addition to the log-decay of this step.
    """
    if isinstance(decay, ManhattanDecay) and log_gate is not None:
        raise ValueError("log_gate: ManhattanDecay takes no content gate; pass log_gate=None")
    acc = state.memory.dtype
    decay = jax.tree.map(lambda rate: rate.astype(acc), decay)
    num_prefix = state.prefix_k.shape[1]
    in_prefix = state.index < num_prefix
    here = (jnp.arange(num_prefix) == state.index)[:, None, None]
    prefix_k = jnp.where(here, k[:, None], state.prefix_k)
    prefix_v = jnp.where(here, v[:, None], state.prefix_v)

    q_acc = q.astype(acc)
    grid_k = jnp.where(in_prefix, 0, k.astype(acc))
    outer = grid_k[..., :, None] * v.astype(acc)[..., None, :]
    place = jnp.maximum(state.index - num_prefix, 0)
    if isinstance(decay, ManhattanDecay):
        columns = jnp.arange(grid[1])
        column = place % grid[1]
        row_factor = jnp.exp(-decay.row_rate)
        own = jnp.take(state.memory, column, axis=2)
        memory = state.memory.at[:, :, column].set(row_factor[:, None, None] * own + outer)
        # Columns further right were last written one row above.
        weights = jnp.exp(-decay.column_rate[:, None] * jnp.abs(columns - column))
        weights *= jnp.where(columns > column, row_factor[:, None], 1.0)
        out = einsum("bhd,bhcde,hc->bhe", q_acc, memory, weights.astype(acc))
    else:
        g = decay.step_log_factor(place[None], grid)[0]
        g = g if log_gate is None else g + log_gate
        factor = jnp.where(in_prefix, 1.0, jnp.exp(g)).astype(acc)
        memory = factor[..., None, None] * state.memory + outer
        out = einsum("bhd,bhde->bhe", q_acc, memory)

    seen = einsum("bhd,bphd->bhp", q_acc, prefix_k.astype(acc))
    out += einsum("bhp,bphe->bhe", seen, prefix_v.astype(acc))
    return out.astype(v.dtype), State(prefix_k, prefix_v, memory, state.index + 1)
