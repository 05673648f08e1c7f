"""The single recurrence as Pallas-Triton kernels, for NVIDIA GPUs.

Each function is one launch. A program per (batch, head, segment) walks the chunks of its
segment one after another with the state in its registers. float32 is multiplied as three
TF32 products, exact to about 1e-6. Contract of the arguments: `recurrence.Backend`.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lasad_jax.ops.kernels.triton_program import (
    ChunkDecay,
    launch,
    prefix_rows,
    prefix_tile,
    store_prefix,
)


def forward(
    q: Float[Array, "B N H Dk"],
    k: Float[Array, "B N H Dk"],
    v: Float[Array, "B N H Dv"],
    b: Float[Array, "one_or_B H M K L"],
    starts: Float[Array, "B H Z Dk Dv"] | None,
    *,
    num_prefix: int,
    segments: int,
    keep_states: bool,
    return_ends: bool,
    interpret: bool = False,
) -> tuple[
    Float[Array, "B N H Dv"],
    Float[Array, "B H M Dk Dv"] | None,
    Float[Array, "B H Z Dk Dv"] | None,
]:
    """Outputs and, if asked for, the state before each chunk and after each segment.

    Raises:
      ValueError: if Dk, Dv or L is not a power of two of at least 16.
    """
    lead, matrix = (q.shape[0], q.shape[2]), (q.shape[3], v.shape[3])
    states = jax.ShapeDtypeStruct((*lead, b.shape[2], *matrix), q.dtype)
    ends = _float32(*lead, segments, *matrix)
    (o,), (states, ends) = launch(
        _forward_kernel,
        (q, k, v),
        (b, starts),
        (v,),
        (states if keep_states else None, ends if return_ends else None),
        num_prefix=num_prefix,
        segments=segments,
        interpret=interpret,
    )
    return o, states, ends


def backward(
    q: Float[Array, "B N H Dk"],
    k: Float[Array, "B N H Dk"],
    v: Float[Array, "B N H Dv"],
    b: Float[Array, "one_or_B H M K L"],
    states: Float[Array, "B H M Dk Dv"],
    d_o: Float[Array, "B N H Dv"],
    d_ends: Float[Array, "B H Z Dk Dv"] | None,
    d_prefix: tuple[Float[Array, "B H P Dk"], Float[Array, "B H P Dv"]] | None,
    *,
    num_prefix: int,
    segments: int,
    return_d_starts: bool,
    interpret: bool = False,
) -> tuple[
    Float[Array, "B N H Dk"],
    Float[Array, "B N H Dk"],
    Float[Array, "B N H Dv"],
    Float[Array, "B H M L"],
    Float[Array, "B H Z Dk Dv"] | None,
]:
    """All gradients in one pass over the chunks, from the last to the first.

    Raises:
      ValueError: as `forward`.
    """
    lead, (key_dim, value_dim) = (q.shape[0], q.shape[2]), (q.shape[3], v.shape[3])
    d_starts = _float32(*lead, segments, key_dim, value_dim)
    later = [None, None]
    if d_prefix is not None:
        more = (0, prefix_rows(num_prefix) - num_prefix)
        later = [jnp.pad(x, [(0, 0), (0, 0), more, (0, 0)])[:, :, None] for x in d_prefix]
        later = [jnp.repeat(x, segments, axis=2) for x in later]
    (dq, dk, dv), (dg, d_starts) = launch(
        _backward_kernel,
        (q, k, v, d_o),
        (b, states, d_ends, *later),
        (q, k, v),
        (
            _float32(*lead, b.shape[2], b.shape[4]),
            d_starts if return_d_starts else None,
        ),
        num_prefix=num_prefix,
        segments=segments,
        interpret=interpret,
    )
    return dq, dk, dv, dg, d_starts


def segment_states(
    k: Float[Array, "B N H Dk"],
    v: Float[Array, "B N H Dv"],
    b: Float[Array, "one_or_B H M K L"],
    *,
    num_prefix: int,
    segments: int,
    interpret: bool = False,
) -> Float[Array, "B H Z-1 Dk Dv"]:
    """What each segment but the last adds to the state, as of the segment's end."""
    (), (states,) = launch(
        _segment_states_kernel,
        (k, v),
        (b,),
        (),
        (_float32(k.shape[0], k.shape[2], segments - 1, k.shape[3], v.shape[3]),),
        num_prefix=num_prefix,
        segments=segments,
        interpret=interpret,
        leave_out="last",
    )
    return states


def segment_gradients(
    q: Float[Array, "B N H Dk"],
    d_o: Float[Array, "B N H Dv"],
    k: Float[Array, "B N H Dk"],
    v: Float[Array, "B N H Dv"],
    b: Float[Array, "one_or_B H M K L"],
    *,
    num_prefix: int,
    segments: int,
    interpret: bool = False,
) -> tuple[
    Float[Array, "B H Z-1 Dk Dv"],
    Float[Array, "B H Z-1 P Dk"] | None,
    Float[Array, "B H Z-1 P Dv"] | None,
]:
    """What each segment but the first adds to the gradients of its first state and the prefix."""
    lead, (key_dim, value_dim) = (q.shape[0], q.shape[2], segments - 1), (q.shape[3], v.shape[3])
    rows = prefix_rows(num_prefix)
    (), (d_states, *d_prefix) = launch(
        _segment_gradients_kernel,
        (q, k, v, d_o),
        (b,),
        (),
        (
            _float32(*lead, key_dim, value_dim),
            _float32(*lead, rows, key_dim) if num_prefix else None,
            _float32(*lead, rows, value_dim) if num_prefix else None,
        ),
        num_prefix=num_prefix,
        segments=segments,
        interpret=interpret,
        leave_out="first",
    )
    return d_states, *(None if x is None else x[:, :, :, :num_prefix] for x in d_prefix)


def _forward_kernel(program, tokens, others, out_tokens, out_others):
    (q_ref, k_ref, v_ref), (b_ref, starts_ref) = tokens, others
    (o_ref,), (states_ref, ends_ref) = out_tokens, out_others
    dtype, num_prefix, dot = q_ref.dtype, program.num_prefix, program.dot
    prefix_k, prefix_v = (prefix_tile(ref, num_prefix) for ref in (k_ref, v_ref))

    def one_chunk(c, state):
        rows = program.rows(c)
        decay = ChunkDecay.load(b_ref, c, rows)
        q, k, v = (rows.load(ref) for ref in tokens)
        rounded = state.astype(dtype)
        if states_ref is not None:
            states_ref[c] = rounded
        out = decay.from_start() * dot(q, rounded, 1, 0)
        out += dot((dot(q, k, 1, 1) * decay.between()).astype(dtype), v, 1, 0)
        if num_prefix:
            out += dot(rows.seen(dot(q, prefix_k, 1, 1)).astype(dtype), prefix_v, 1, 0)
        rows.store(o_ref, out)
        return decay.whole() * state + dot(k, (decay.to_end() * v).astype(dtype), 0, 0)

    state = starts_ref[0] if starts_ref is not None else _zeros(q_ref, v_ref)
    state = lax.fori_loop(0, b_ref.shape[0], one_chunk, state)
    if ends_ref is not None:
        ends_ref[0] = state


def _backward_kernel(program, tokens, others, out_tokens, out_others):
    (q_ref, k_ref, v_ref, _), (b_ref, states_ref, d_ends_ref, *later) = tokens, others
    (dq_ref, dk_ref, dv_ref), (dg_ref, d_starts_ref) = out_tokens, out_others
    dtype, num_prefix, dot = q_ref.dtype, program.num_prefix, program.dot
    num_chunks = b_ref.shape[0]
    prefix_k, prefix_v = (prefix_tile(ref, num_prefix) for ref in (k_ref, v_ref))

    def one_chunk(i, carry):
        d_state, d_prefix = carry
        c = num_chunks - 1 - i
        rows = program.rows(c)
        decay = ChunkDecay.load(b_ref, c, rows)
        state, d_rounded = states_ref[c], d_state.astype(dtype)
        through = decay.whole() * jnp.sum(jnp.sum(state * d_state, 1), 0)
        q, k, v, d_o = (rows.load(ref) for ref in tokens)
        d_state = decay.whole() * d_state
        d_state += dot(q, (decay.from_start() * d_o).astype(dtype), 0, 0)

        d_scores = (dot(d_o, v, 1, 1) * decay.between()).astype(dtype)
        dq = decay.from_start() * dot(d_o, state, 1, 1)
        dq += dot(d_scores, k, 1, 0)
        gain = jnp.sum(q * dq, 1)
        if num_prefix:
            score = rows.seen(dot(q, prefix_k, 1, 1))
            d_score = rows.seen(dot(d_o, prefix_v, 1, 1))
            dq += dot(d_score.astype(dtype), prefix_k, 1, 0)
            d_prefix = _add_to_prefix(program, d_prefix, q, d_o, score, d_score)
        rows.store(dq_ref, dq)

        # Computed anew, not transposed: Triton can miscompile a product with a transposed
        # accumulator on Hopper.
        turned = decay.between(transposed=True)
        scores = (dot(k, q, 1, 1) * turned).astype(dtype)
        dv = decay.to_end() * dot(k, d_rounded, 1, 0)
        dv += dot(scores, d_o, 1, 0)
        rows.store(dv_ref, dv, prefix=False)
        d_scores = (dot(v, d_o, 1, 1) * turned).astype(dtype)
        within = dot(d_scores, q, 1, 0)
        across = decay.to_end() * dot(v, d_rounded, 1, 1)
        rows.store(dk_ref, within + across, prefix=False)

        # g_u scales what the tokens t >= u read from those s < u and from before the chunk.
        gain, loss = gain - jnp.sum(k * within, 1), jnp.sum(k * across, 1)
        change = loss - gain
        dg_ref[c] = (jnp.sum(gain, 0) + through) + (jnp.cumsum(change) - change)
        return d_state, d_prefix

    d_state = d_ends_ref[0] if d_ends_ref is not None else _zeros(q_ref, v_ref)
    d_prefix = _no_prefix_gradients(num_prefix, q_ref, v_ref)
    d_state, d_prefix = lax.fori_loop(0, num_chunks, one_chunk, (d_state, d_prefix))
    if num_prefix:
        for ref, total, from_later in zip((dk_ref, dv_ref), d_prefix, later, strict=True):
            total = jnp.swapaxes(total, 0, 1)
            store_prefix(ref, total if from_later is None else total + from_later[0], program)
    if d_starts_ref is not None:
        d_starts_ref[0] = d_state


def _segment_states_kernel(program, tokens, others, out_tokens, out_others):
    (k_ref, v_ref), (b_ref,), (), (states_ref,) = tokens, others, out_tokens, out_others

    def one_chunk(c, state):
        rows = program.rows(c)
        decay = ChunkDecay.load(b_ref, c, rows)
        k, v = rows.load(k_ref), rows.load(v_ref)
        v = (decay.to_end() * v).astype(v.dtype)
        return decay.whole() * state + program.dot(k, v, 0, 0)

    states_ref[0] = lax.fori_loop(0, b_ref.shape[0], one_chunk, _zeros(k_ref, v_ref))


def _segment_gradients_kernel(program, tokens, others, out_tokens, out_others):
    (q_ref, k_ref, v_ref, do_ref), (b_ref,), () = tokens, others, out_tokens
    d_states_ref, *d_prefix_refs = out_others
    num_chunks, num_prefix, dot = b_ref.shape[0], program.num_prefix, program.dot
    prefix_k, prefix_v = (prefix_tile(ref, num_prefix) for ref in (k_ref, v_ref))

    def one_chunk(i, carry):
        (d_state, d_prefix), c = carry, num_chunks - 1 - i
        rows = program.rows(c)
        decay = ChunkDecay.load(b_ref, c, rows)
        q, d_o = rows.load(q_ref), rows.load(do_ref)
        d_state = decay.whole() * d_state
        d_state += dot(q, (decay.from_start() * d_o).astype(q.dtype), 0, 0)
        if num_prefix:
            score, d_score = dot(q, prefix_k, 1, 1), dot(d_o, prefix_v, 1, 1)
            d_prefix = _add_to_prefix(program, d_prefix, q, d_o, score, d_score)
        return d_state, d_prefix

    carry = _zeros(q_ref, v_ref), _no_prefix_gradients(num_prefix, q_ref, v_ref)
    d_states_ref[0], d_prefix = lax.fori_loop(0, num_chunks, one_chunk, carry)
    if num_prefix:
        for ref, total in zip(d_prefix_refs, d_prefix, strict=True):
            ref[0] = jnp.swapaxes(total, 0, 1)


def _no_prefix_gradients(num_prefix, k_ref, v_ref):
    """Sums over the tokens so far, (Dk, p) and (Dv, p): large sides first suit the products."""
    if not num_prefix:
        return None
    shapes = ((ref.shape[1], prefix_rows(num_prefix)) for ref in (k_ref, v_ref))
    return tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)


def _add_to_prefix(program, d_prefix, q, d_o, score, d_score):
    d_prefix_k, d_prefix_v = d_prefix
    # In two parts: rounding weighs more in these sums over all tokens.
    for x, y in zip(_parts(d_score, q.dtype), _parts(score, q.dtype), strict=True):
        d_prefix_k += program.dot(q, x, 0, 0)
        d_prefix_v += program.dot(d_o, y, 0, 0)
    return d_prefix_k, d_prefix_v


def _zeros(k_ref, v_ref):
    return jnp.zeros((k_ref.shape[1], v_ref.shape[1]), jnp.float32)


def _parts(x: Array, dtype: jnp.dtype) -> list[Array]:
    """Matrices of `dtype` that add up to the float32 matrix x, to twice the digits of bf16."""
    high = x.astype(dtype)
    return [high] if dtype == x.dtype else [high, (x - high).astype(dtype)]


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
