"""The linear forms of the one-matrix decays: S_t = exp(g_t) S_(t-1) + k_t v_t^T, o_t = q_t S_t.

`scan` computes every S_t with an associative scan, a chunk of tokens at a time;
`chunked` uses matrix products inside a chunk and an associative scan over the chunks'
states only. Prefix tokens enter neither: callers pass zero keys for them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lasad_jax.ops.numerics import accumulator, combine, cumulative_log_decay, einsum


def _split_into_chunks(x: Array, chunk: int) -> Array:
    """(B, N, ...) to (B, M, L, ...), zeros after the last token."""
    padding = -x.shape[1] % chunk
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, chunk, *x.shape[2:])


def chunked(
    q: Float[Array, "B N H Dk"],
    k: Float[Array, "B N H Dk"],
    v: Float[Array, "B N H Dv"],
    g: Float[Array, "one_or_B N one_or_H"],
    memory: Float[Array, "B H Dk Dv"],
    *,
    chunk: int,
) -> tuple[Float[Array, "B N H Dv"], Float[Array, "B H Dk Dv"]]:
    """Matrix products within chunks of `chunk` tokens, a scan over chunk states between them.

    Args:
      q, k, v: queries, keys (zero for tokens that must leave no trace), values.
      g: log-factors; axes of size 1 broadcast.
      memory: the state before the first token.

    Returns:
      the outputs and the state after the last token.
    """
    num_tokens, dtype, acc = q.shape[1], v.dtype, accumulator(q.dtype)
    q, k, v, g = (_split_into_chunks(x, chunk) for x in (q, k, v, g.astype(acc)))
    coarse, fine = cumulative_log_decay(g, axis=2)
    since_start = coarse + fine
    to_end = sum(x[:, :, -1:] - x for x in (coarse, fine))

    pairs = sum(x[:, :, :, None] - x[:, :, None, :] for x in (coarse, fine))
    causal = jnp.tril(jnp.ones((chunk, chunk), bool))
    weights = jnp.exp(jnp.where(causal[:, :, None], pairs, -jnp.inf))
    scores = einsum("bmthd,bmshd->bmhts", q, k) * jnp.moveaxis(weights, -1, 2)
    within = einsum("bmhts,bmshe->bmthe", scores.astype(dtype), v)

    decayed_k = (k * jnp.exp(to_end)[..., None]).astype(dtype)
    update = einsum("bmshd,bmshe->bmhde", decayed_k, v)
    factor = jnp.exp(since_start[:, :, -1])[..., None, None]
    # The state that chunk m starts from is the scan over what came before it.
    before = jnp.concatenate([memory[:, None], update[:, :-1]], axis=1)
    passed = jnp.concatenate([jnp.ones_like(factor[:, :1]), factor[:, :-1]], axis=1)
    _, start = jax.lax.associative_scan(combine, (passed, before), axis=1)
    decayed_q = (q * jnp.exp(since_start)[..., None]).astype(dtype)
    carried = einsum("bmthd,bmhde->bmthe", decayed_q, start.astype(dtype))

    out = (within + carried).astype(dtype)
    out = out.reshape(out.shape[0], -1, *out.shape[3:])[:, :num_tokens]
    return out, factor[:, -1] * start[:, -1] + update[:, -1]


def scan(
    q: Float[Array, "B N H Dk"],
    k: Float[Array, "B N H Dk"],
    v: Float[Array, "B N H Dv"],
    g: Float[Array, "one_or_B N one_or_H"],
    memory: Float[Array, "B H Dk Dv"],
    *,
    chunk: int,
) -> tuple[Float[Array, "B N H Dv"], Float[Array, "B H Dk Dv"]]:
    """`associative_scan` over the recurrent state itself; arguments as in `chunked`.

    Only one chunk's states exist at a time, in the backward pass too (they are recomputed).
    """
    num_tokens, dtype, acc = q.shape[1], v.dtype, accumulator(q.dtype)
    parts = [_split_into_chunks(x.astype(acc), chunk) for x in (q, k, v, g)]

    @jax.checkpoint
    def one_chunk(memory, part):
        q, k, v, g = part
        outer = k[..., :, None] * v[..., None, :]
        factor = jnp.exp(g)[..., None, None]
        _, states = jax.lax.associative_scan(combine, (factor, outer), axis=1)
        # The product of all factors would add up their rounding, from chunk to chunk too.
        since_start = jnp.exp(sum(cumulative_log_decay(g, axis=1)))[..., None, None]
        states = since_start * memory[:, None] + states
        return states[:, -1], einsum("bthd,bthde->bthe", q, states)

    memory, out = jax.lax.scan(one_chunk, memory, [jnp.moveaxis(x, 1, 0) for x in parts])
    out = jnp.moveaxis(out, 0, 1).astype(dtype)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :num_tokens], memory
