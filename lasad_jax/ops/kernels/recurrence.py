"""The single recurrence as one differentiable call over a backend's fused kernels.

    S_t = exp(g_t) S_(t-1) + k_t v_t^T        o_t = q_t S_t + sum over p <= t of (q_t . k_p) v_p

where the P prefix tokens p enter the second term only. Tokens are cut into M chunks of L,
the chunks into Z segments that run in parallel, each from the decayed sum of those before
it. A `Backend` computes what happens within segments; this module prepares the decays,
joins the segments and tells JAX the derivative.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from lasad_jax.ops.keep import keep
from lasad_jax.ops.numerics import exact_parts, running_sum

# In bf16 what is left after a factor of exp(-32) counts for nothing; a bound keeps b exact.
_RESET = -32.0

Memory = Float32[Array, "B H Dk Dv"]


@dataclasses.dataclass(frozen=True)
class Backend:
    """Fused kernels for one kind of device.

    They take whole (B, N, H, D) arrays of tokens; rows past N read as zero and are not
    written. The decays come as b (Bg, H, M, K, L), Bg = 1 or B: running sums of g within
    each chunk, in K parts whose differences are exact when taken part by part (K = 1 for
    bf16, 2 for float32). States are float32, but for the stored `states` of the chunks,
    which have q's dtype.

    Attributes:
      chunk: L.
      segments: (B * H, M) to Z.
      forward: (q, k, v, b, starts, num_prefix=, segments=, keep_states=, return_ends=) to
        o, states (B, H, M, Dk, Dv) before each chunk and ends (B, H, Z, Dk, Dv) after each
        segment; the last two are None unless asked for, as `starts` may be.
      backward: (q, k, v, b, states, d_o, d_ends, d_prefix, num_prefix=, segments=,
        return_d_starts=) to dq, dk, dv, dg (B, H, M, L), and d_starts or None. d_ends and
        d_prefix may be None; the latter is what `segment_gradients` found for the prefix,
        summed over the segments.
      segment_states: (k, v, b, num_prefix=, segments=) to (B, H, Z - 1, Dk, Dv): what each
        segment but the last adds to the state, as of its end. None if never split.
      segment_gradients: (q, d_o, k, v, b, num_prefix=, segments=) to the same of each segment
        but the first for the gradient of its first state, followed by arrays (B, H, Z - 1, ...)
        from which `backward` makes the prefix's gradients.
    """

    chunk: int
    forward: Callable
    backward: Callable
    segment_states: Callable | None = None
    segment_gradients: Callable | None = None
    segments: Callable[[int, int], int] = lambda programs, chunks: 1


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static about one call."""

    backend: Backend
    num_prefix: int
    segments: int
    has_memory: bool
    return_memory: bool


def fused_recurrence(
    q: Float[Array, "B N H Dk"],
    k: Float[Array, "B N H Dk"],
    v: Float[Array, "B N H Dv"],
    g: Float32[Array, "one_or_B N one_or_H"],
    memory: Memory | None = None,
    *,
    num_prefix: int,
    backend: Backend,
    return_memory: bool = False,
) -> tuple[Float[Array, "B N H Dv"], Memory | None]:
    """Outputs, and the state after the last token if asked for.

    Args:
      q, k, v: bf16 or float32, all of one dtype; the first `num_prefix` are prefix tokens.
      g: log-factors, not positive; 0 on prefix tokens.
      memory: the state before the first token; None is zero.
      num_prefix: P.
      backend: which kernels.
      return_memory: also return the final state.
    """
    batch, num_tokens, heads, _ = q.shape
    num_chunks = -(-num_tokens // backend.chunk)
    segments = backend.segments(batch * heads, num_chunks)
    num_chunks = -(-num_chunks // segments) * segments
    g = jnp.broadcast_to(g, (g.shape[0], num_tokens, heads))
    g = jnp.pad(g, [(0, 0), (0, num_chunks * backend.chunk - num_tokens), (0, 0)])
    g = jnp.moveaxis(g, 2, 1).reshape(g.shape[0], heads, num_chunks, backend.chunk)
    # Kernels read all prefix rows: those of tokens yet to come do not exist.
    call = _Call(backend, min(num_prefix, num_tokens), segments, memory is not None, return_memory)
    return _recurrence(call, q, k, v, g, memory)


def _primal(call, q, k, v, g, memory):
    out, memory, _ = _forward(call, q, k, v, g, memory, keep_states=False)
    return out, memory


def _forward_rule(call, q, k, v, g, memory):
    out, end, states = _forward(call, q, k, v, g, memory, keep_states=True)
    return (out, end), (q, k, v, g, keep(states))


def _forward(call, q, k, v, g, memory, keep_states):
    b = _running_sums(g, q.dtype)
    run = functools.partial(_over_batch, num_prefix=call.num_prefix, segments=call.segments)
    starts = None if memory is None else memory[:, :, None]
    if call.segments > 1:
        added = run(call.backend.segment_states)(k, v, b)
        starts = _join(added, memory, _across_segments(b, call.segments))
    forward = run(call.backend.forward, keep_states=keep_states, return_ends=call.return_memory)
    out, states, ends = forward(q, k, v, b, starts)
    return out, None if ends is None else ends[:, :, -1], states


def _backward_rule(call, residuals, cotangents):
    q, k, v, g, states = residuals
    d_out, d_end = cotangents
    b = _running_sums(g, q.dtype)
    run = functools.partial(_over_batch, num_prefix=call.num_prefix, segments=call.segments)
    d_ends, d_prefix = None if d_end is None else d_end[:, :, None], None
    if call.segments > 1:
        added, *parts = run(call.backend.segment_gradients)(q, d_out, k, v, b)
        across = _across_segments(b, call.segments)
        d_ends = _join(added[:, :, ::-1], d_end, across[:, :, ::-1])[:, :, ::-1]
        if call.num_prefix:
            d_prefix = tuple(jnp.sum(part, axis=2) for part in parts)
    backward = run(call.backend.backward, return_d_starts=call.has_memory)
    dq, dk, dv, dg, d_starts = backward(q, k, v, b, states, d_out, d_ends, d_prefix)
    dg = jnp.sum(dg, axis=0, keepdims=True) if g.shape[0] == 1 else dg
    return dq, dk, dv, dg, None if d_starts is None else d_starts[:, :, 0]


_recurrence = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_recurrence.defvjp(_forward_rule, _backward_rule)


def _running_sums(g: Float32[Array, "Bg H M L"], dtype: jnp.dtype) -> Array:
    """b (Bg, H, M, K, L): sums within chunks, split in two where bf16 does not hide rounding."""
    parts = [jnp.maximum(g, _RESET)] if dtype == jnp.bfloat16 else exact_parts(g)
    return jnp.stack([running_sum(x) for x in parts], axis=3)


def _across_segments(b: Float32[Array, "Bg H M K L"], segments: int) -> Float32[Array, "Bg H Z"]:
    """Log-decay across each segment."""
    across = jnp.sum(b[..., -1], axis=-1)
    return jnp.sum(across.reshape(*across.shape[:2], segments, -1), axis=-1)


def _join(
    sums: Float32[Array, "B H Z-1 Dk Dv"],
    start: Memory | None,
    log_factors: Float32[Array, "Bg H Z"],
) -> Float32[Array, "B H Z Dk Dv"]:
    """The state before each segment, from each segment's own sum."""
    state = jnp.zeros_like(sums[:, :, 0]) if start is None else start
    states = [state]
    for z in range(sums.shape[2]):
        state = jnp.exp(log_factors[:, :, z])[..., None, None] * state + sums[:, :, z]
        states.append(state)
    return jnp.stack(states, axis=2)


def _over_batch(function: Callable, **static) -> Callable:
    """`function` of arrays with a batch axis first; under vmap the new axis joins that one."""

    @jax.custom_batching.custom_vmap
    def call(*args):
        return function(*args, **static)

    @call.def_vmap
    def rule(axis_size, in_batched, *args):
        batch = args[0].shape[int(in_batched[0])]

        def fold(x, batched):
            if not batched and x.shape[0] == 1 < batch:
                return x  # shared by the whole batch, old and new
            if not batched:
                x = jnp.broadcast_to(x, (axis_size, *x.shape))
            x = jnp.broadcast_to(x, (axis_size, batch, *x.shape[2:]))
            return x.reshape(axis_size * batch, *x.shape[2:])

        out = _over_batch(function, **static)(*jax.tree.map(fold, args, tuple(in_batched)))
        out = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return call
