"""The ring of newest keys and values: the recurrence, and what bf16 loses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import quick_jit

from lasad_jax.ops import State
from lasad_jax.ops.ring import ring_step, start_ring


def tokens_of(dtype, steps, widths=(16, 32)):
    """A batch of 2 images with 3 heads of queries, keys, values and log-factors."""
    rng = np.random.default_rng(3)
    q, k = rng.standard_normal((2, steps, 2, 3, widths[0]))
    v = rng.standard_normal((steps, 2, 3, widths[1]))
    g = -rng.exponential(0.1, (steps, 2, 3))
    g[rng.random(g.shape) < 0.05] = -300
    return *(np.asarray(jnp.asarray(x, dtype), np.float64) for x in (q, k, v)), np.float32(g)


def ring_errors(dtype, memory_per_token):
    """Relative errors of outputs and of the final memory against float64, after 95 tokens.

    With `memory_per_token` of a memory in that dtype which every token writes.
    """
    q, k, v, g = tokens_of(dtype, 95)
    memory, outs = np.zeros((2, 3, 16, 32)), []
    for t in range(1, len(q)):
        memory = np.exp(np.float64(g[t]))[..., None, None] * memory
        memory += k[t][..., :, None] * v[t][..., None, :]
        out = np.einsum("bhd,bhde->bhe", q[t], memory)
        outs.append(out + np.einsum("bhd,bhd,bhe->bhe", q[t], k[0], v[0]))

    prefix_k, prefix_v = (jnp.asarray(x[0][:, None], dtype) for x in (k, v))
    state = State(prefix_k, prefix_v, jnp.zeros(memory.shape, jnp.float32), jnp.int32(1))

    def by_ring(ring, token):
        out, ring = ring_step(ring, *token)
        return ring, out

    def by_token(memory, token):
        q, k, v, g, _ = (x.astype(jnp.float32) for x in token)
        memory = jnp.exp(g)[..., None, None] * memory + k[..., :, None] * v[..., None, :]
        memory = memory.astype(memory_per_token)
        out = jnp.einsum("bhd,bhde->bhe", q, memory.astype(jnp.float32), precision="highest")
        seen = jnp.einsum("bhd,bhd->bh", q, prefix_k[:, 0].astype(jnp.float32))
        out += seen[..., None] * prefix_v[:, 0].astype(jnp.float32)
        return memory, out.astype(dtype)

    tokens = (*(jnp.asarray(x[1:], dtype) for x in (q, k, v)), g[1:], jnp.arange(len(q) - 1))
    if memory_per_token is None:
        ring, got = quick_jit(lambda x: jax.lax.scan(by_ring, start_ring(state), x))(tokens)
        weight = np.exp(np.float64(ring.log_weight))
        final = weight[..., 0, None, None] * np.float64(ring.memory)
        rows = (np.float64(x[:, :, 1:]) for x in (ring.recent_k, ring.recent_v))
        final += np.einsum("bhr,bhrd,bhre->bhde", weight[..., 1:], *rows)
    else:
        empty = state.memory.astype(memory_per_token)
        final, got = quick_jit(lambda x: jax.lax.scan(by_token, empty, x))(tokens)
    relative = lambda x, y: np.linalg.norm(np.float64(x) - y) / np.linalg.norm(y)
    return relative(got, np.stack(outs)), relative(final, memory)


def test_a_ring_is_the_recurrence():
    assert max(ring_errors(jnp.float32, None)) < 1e-6


def test_a_bf16_ring_loses_little_to_a_float32_memory():
    """Outputs are rounded to bf16 either way. A bf16 memory that every token writes is worse."""
    out, memory = ring_errors(jnp.bfloat16, None)
    exact_out, _ = ring_errors(jnp.bfloat16, jnp.float32)
    _, rounded_memory = ring_errors(jnp.bfloat16, jnp.bfloat16)
    assert out < 2 * exact_out
    assert memory < rounded_memory / 1.5


def test_a_ring_refuses_more_prefix_tokens():
    state = State(jnp.zeros((1, 2, 1, 4)), jnp.zeros((1, 2, 1, 4)), jnp.zeros((1, 1, 4, 4)), 2)
    with pytest.raises(ValueError, match="num_prefix: a ring holds one prefix token, not 2"):
        start_ring(state)
