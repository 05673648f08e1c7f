"""The quadratic form: masked (N, N) weights. The oracle, and fast for short sequences."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lasad_jax.ops.decays import Decay, Grid, log_decay_matrix
from lasad_jax.ops.numerics import accumulator, cumulative_log_decay, einsum


def quadratic(
    q: Float[Array, "B N H Dk"],
    k: Float[Array, "B N H Dk"],
    v: Float[Array, "B N H Dv"],
    decay: Decay,
    *,
    grid: Grid,
    num_prefix: int,
    log_gate: Float[Array, "B N H"] | None,
) -> Float[Array, "B N H Dv"]:
    """o = ((q k^T) * D) v with D written out; see `linear_attention` for the arguments."""
    num_tokens = q.shape[1]
    log_weights = log_decay_matrix(decay, num_tokens=num_tokens, grid=grid, num_prefix=num_prefix)
    if log_gate is not None:
        t = jnp.arange(num_tokens)
        gate = jnp.where((t < num_prefix)[:, None], 0.0, log_gate)
        coarse, fine = cumulative_log_decay(gate.astype(accumulator(q.dtype)), axis=1)
        pairs = sum(x[:, :, None] - x[:, None, :] for x in (coarse, fine))
        grown = (t[None, :] >= num_prefix) & (t[:, None] >= t[None, :])
        pairs = jnp.where(grown[:, :, None], pairs, 0.0)
        log_weights = log_weights + jnp.moveaxis(pairs, -1, 1)
    scores = einsum("bthd,bshd->bhts", q, k) * jnp.exp(log_weights)
    return einsum("bhts,bshe->bthe", scores.astype(v.dtype), v).astype(v.dtype)
