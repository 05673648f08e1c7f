"""The single recurrence on Hopper: Mosaic GPU kernels for bf16 with Dk = Dv = 64.

One warpgroup walks the chunks of one (batch, head, segment). Tiles arrive by TMA, the next
while one is computed on; products run on wgmma with the state in registers; nothing of size
(N, N) and no state per token exists. Two such programs share a multiprocessor, so that one
computes while the other waits. Contract of the arguments: `recurrence.Backend`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32

from lasad_jax.ops.kernels import mosaic_tiles as mg
from lasad_jax.ops.kernels.mosaic_segments import segment_gradients, segment_states
from lasad_jax.ops.numerics import einsum

__all__ = ["backward", "forward", "segment_gradients", "segment_states"]

_STAGES = 2


def forward(
    q: BFloat16[Array, "B N H 64"],
    k: BFloat16[Array, "B N H 64"],
    v: BFloat16[Array, "B N H 64"],
    b: Float32[Array, "one_or_B H M 1 L"],
    starts: Float32[Array, "B H Z 64 64"] | None,
    *,
    num_prefix: int,
    segments: int,
    keep_states: bool,
    return_ends: bool,
    interpret: bool = False,
    stages: int = _STAGES,
):
    """Outputs and, if asked for, the state before each chunk (bf16) and after each segment."""
    batch, _, heads, _ = q.shape
    num_chunks = b.shape[2]
    chunks = num_chunks // segments
    out_type = {"o": jax.ShapeDtypeStruct(v.shape, v.dtype)}
    if keep_states:
        shape = (batch, heads, num_chunks, mg.DIM, mg.DIM)
        out_type["states"] = jax.ShapeDtypeStruct(shape, q.dtype)
    if return_ends:
        shape = (batch, heads, segments, mg.DIM, mg.DIM)
        out_type["ends"] = jax.ShapeDtypeStruct(shape, jnp.float32)

    multiply = functools.partial(mg.multiply, interpret=interpret)

    def kernel(inputs, outputs, tiles, prefix_tiles):
        state_tile, value_tile, out_tile = (tiles.at[i] for i in range(3))
        at, h, z = (lax.axis_index(name) for name in "bhz")
        prefix = mg.fetch_prefix(inputs, at, h, num_prefix, prefix_tiles)
        chunk_of = lambda i: z * chunks + i

        def body(index, q_tile, k_tile, v_tile, b_tile, b_again_tile, state):
            c = chunk_of(index[0])
            since = mg.log2(plgpu.load(b_tile, layout=mg.ROW))
            since_by_column = mg.log2(plgpu.load(b_again_tile, layout=mg.COLUMN))
            whole = mg.log2(b_tile[mg.CHUNK - 1])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def prepare():
                state_tile[...] = state.astype(jnp.bfloat16)
                to_end = mg.off_prefix(mg.by_row(jnp.exp2(whole - since)), 0, c, num_prefix, 0.0)
                value_tile[...] = (v_tile[...].astype(jnp.float32) * to_end).astype(jnp.bfloat16)
                plgpu.commit_smem()
                pairs = mg.by_row(since) - mg.by_column(since_by_column)
                pairs = jnp.where(mg.iota(0) >= mg.iota(1), pairs, -jnp.inf)
                return jnp.exp2(mg.off_prefix(pairs, 1, c, num_prefix, -jnp.inf))

            (scores,), weights = multiply((q_tile, k_tile.transpose((1, 0))), work=prepare)
            if keep_states:
                plgpu.copy_smem_to_gmem(state_tile, outputs["states"].at[at, h, c])
            (carried, added), weighted = multiply(
                (q_tile, state_tile),
                (k_tile.transpose((1, 0)), value_tile),
                work=lambda: (scores * weights).astype(jnp.bfloat16),
            )
            (out,), _ = multiply((weighted, v_tile))
            out += carried * mg.by_row(jnp.exp2(since))
            for p, (row_k, row_v) in enumerate(prefix):
                out += mg.by_row(mg.read_prefix(q_tile, row_k, p, c)) * mg.by_column(row_v)
            out_tile[...] = out.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_tile, outputs["o"].at[at, pl.ds(c * mg.CHUNK, mg.CHUNK), h])
            return state * jnp.exp2(whole) + added

        start = mg.zeros()
        if "starts" in inputs:
            start = plgpu.load(inputs["starts"].at[at, h, z], layout=mg.TILE, optimized=False)
        state = mg.pipeline(body, inputs, "qkv", (), at, h, chunk_of, chunks, stages, start)
        if return_ends:
            outputs["ends"][at, h, z] = state
        plgpu.wait_smem_to_gmem(0)

    inputs = {"q": q, "k": k, "v": v, "b": b[:, :, :, 0]}
    if starts is not None:
        inputs["starts"] = starts
    grid = (batch, heads, segments)
    out = mg.launch(
        kernel, inputs, out_type, 3, num_prefix, grid, interpret, name="recurrence_forward"
    )
    return out["o"], out.get("states"), out.get("ends")


def backward(
    q: BFloat16[Array, "B N H 64"],
    k: BFloat16[Array, "B N H 64"],
    v: BFloat16[Array, "B N H 64"],
    b: Float32[Array, "one_or_B H M 1 L"],
    states: BFloat16[Array, "B H M 64 64"],
    d_o: BFloat16[Array, "B N H 64"],
    d_ends: Float32[Array, "B H Z 64 64"] | None,
    d_prefix: tuple[Float32[Array, "B H P 64"], Float32[Array, "B H P 64"]] | None,
    *,
    num_prefix: int,
    segments: int,
    return_d_starts: bool,
    interpret: bool = False,
    stages: int = _STAGES,
):
    """All gradients in one pass over the chunks, from the last to the first."""
    batch, _, heads, _ = q.shape
    num_chunks = b.shape[2]
    chunks = num_chunks // segments
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    out_type = {"dq": like(q), "dk": like(k), "dv": like(v)}
    of = lambda *shape: jax.ShapeDtypeStruct((batch, heads, *shape), jnp.float32)
    out_type["crossings"] = of(num_chunks, 2, mg.CHUNK)
    if return_d_starts:
        out_type["d_starts"] = of(segments, mg.DIM, mg.DIM)

    multiply = functools.partial(mg.multiply, interpret=interpret)

    def kernel(inputs, outputs, tiles, prefix_tiles):
        at, h, z = (lax.axis_index(name) for name in "bhz")
        prefix = mg.fetch_prefix(inputs, at, h, num_prefix, prefix_tiles)
        chunk_of = lambda i: z * chunks + chunks - 1 - i

        def body(index, q_tile, k_tile, v_tile, do_tile, state_tile, b_tile, b_again_tile, carry):
            d_state, sums = carry
            c = chunk_of(index[0])
            since = mg.log2(plgpu.load(b_tile, layout=mg.ROW))
            since_by_column = mg.log2(plgpu.load(b_again_tile, layout=mg.COLUMN))
            whole = mg.log2(b_tile[mg.CHUNK - 1])
            # Three tiles serve twice: as operands, then for the gradients on their way out. The
            # compiler must not see that their places never change: it would keep all it can
            # derive from them in registers, which then do not suffice.
            zero = jnp.where(whole > 0, 1, 0)
            d_state_tile, d_scores_tile, d_out_tile = (tiles.at[i + zero] for i in range(3))
            from_start = mg.by_row(jnp.exp2(since))
            to_end = mg.off_prefix(mg.by_row(jnp.exp2(whole - since)), 0, c, num_prefix, 0.0)
            decayed = jnp.exp2(whole)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def prepare():
                d_state_tile[...] = d_state.astype(jnp.bfloat16)
                d_out = do_tile[...].astype(jnp.float32) * from_start
                d_out_tile[...] = d_out.astype(jnp.bfloat16)
                plgpu.commit_smem()
                across = jnp.sum(state_tile[...].astype(jnp.float32) * d_state, axis=1) * decayed
                pairs = mg.by_column(since_by_column) - mg.by_row(since)
                pairs = jnp.where(mg.iota(1) >= mg.iota(0), pairs, -jnp.inf)
                return jnp.exp2(mg.off_prefix(pairs, 0, c, num_prefix, -jnp.inf)), across

            # Scores by (key, query), so that only one of the two is needed the other way.
            (scores, d_scores), (weights, across) = multiply(
                (k_tile, q_tile.transpose((1, 0))),
                (v_tile, do_tile.transpose((1, 0))),
                work=prepare,
            )

            scores = (scores * weights).astype(jnp.bfloat16)
            d_scores = (d_scores * weights).astype(jnp.bfloat16)
            d_scores_tile[...] = d_scores
            plgpu.commit_smem()

            from_prefix = [
                mg.prefix_gradients(q_tile, do_tile, rows, p, c, d_rows)
                for p, (rows, d_rows) in enumerate(zip(prefix, sums, strict=True))
            ]
            sums = [d_rows for _, d_rows in from_prefix]

            def put(tile, gradient, which):
                """On its way out; prefix rows get their sums, complete once chunk 0 is done."""
                for p, d_rows in enumerate(sums):
                    own = (mg.iota(0) == p) & (c == 0)
                    gradient = jnp.where(own, mg.by_column(d_rows[which]), gradient)
                tile[...] = gradient.astype(jnp.bfloat16)

            (added, dv_later, dv), _ = multiply(
                (q_tile.transpose((1, 0)), d_out_tile),
                (k_tile, d_state_tile),
                (scores, do_tile),
            )
            # Now, not at the end of the loop: until then it would take twice the registers.
            d_state = lax.optimization_barrier(d_state * decayed + added)
            dv += dv_later * to_end
            (dk_later, dk), _ = multiply(
                (v_tile, d_state_tile.transpose((1, 0))),
                (d_scores, q_tile),
                work=lambda: put(d_out_tile, dv, 1),
            )
            dk_later *= to_end

            def leave():
                keys = k_tile[...].astype(jnp.float32)
                put(d_state_tile, dk + dk_later, 0)
                return jnp.sum(keys * dk_later, axis=1), jnp.sum(keys * dk, axis=1)

            (dq_before, dq), (later, within) = multiply(
                (do_tile, state_tile.transpose((1, 0))),
                (d_scores_tile.transpose((1, 0)), k_tile),
                work=leave,
            )
            dq += dq_before * from_start
            ending = jnp.sum(q_tile[...].astype(jnp.float32) * dq, axis=1) - within
            outputs["crossings"][at, h, c, 0] = ending + across
            outputs["crossings"][at, h, c, 1] = later + across
            for d_query, _ in from_prefix:
                dq += d_query
            d_scores_tile[...] = dq.astype(jnp.bfloat16)
            plgpu.commit_smem()
            rows = pl.ds(c * mg.CHUNK, mg.CHUNK)
            plgpu.copy_smem_to_gmem(d_scores_tile, outputs["dq"].at[at, rows, h])
            plgpu.copy_smem_to_gmem(d_state_tile, outputs["dk"].at[at, rows, h])
            plgpu.copy_smem_to_gmem(d_out_tile, outputs["dv"].at[at, rows, h])
            return d_state, sums

        d_state = mg.zeros()
        if "d_ends" in inputs:
            d_state = plgpu.load(inputs["d_ends"].at[at, h, z], layout=mg.TILE, optimized=False)
        nothing = plgpu.layout_cast(jnp.zeros((mg.DIM,), jnp.float32), mg.COLUMN)
        sums = [(nothing, nothing)] * num_prefix
        if d_prefix is not None:
            names = ("d_prefix_k", "d_prefix_v")
            sums = [
                tuple(
                    plgpu.load(inputs[name].at[at, h, p], layout=mg.COLUMN, optimized=False)
                    for name in names
                )
                for p in range(num_prefix)
            ]
        carry = d_state, sums
        carry = mg.pipeline(
            body,
            inputs,
            ("q", "k", "v", "d_o"),
            ("states",),
            at,
            h,
            chunk_of,
            chunks,
            stages,
            carry,
        )
        if return_d_starts:
            outputs["d_starts"][at, h, z] = carry[0]
        plgpu.wait_smem_to_gmem(0)

    inputs = {
        "q": q,
        "k": k,
        "v": v,
        "d_o": d_o,
        "states": states,
        "b": b[:, :, :, 0],
    }
    if d_ends is not None:
        inputs["d_ends"] = d_ends
    if d_prefix is not None:
        inputs["d_prefix_k"], inputs["d_prefix_v"] = d_prefix
    grid = (batch, heads, segments)
    out = mg.launch(
        kernel, inputs, out_type, 3, num_prefix, grid, interpret, name="recurrence_backward"
    )
    dg = _cross(out["crossings"], shared=b.shape[0] == 1)
    return *(out[name] for name in ("dq", "dk", "dv")), dg, out.get("d_starts")


def _cross(
    crossings: Float32[Array, "B H M 2 L"], shared: bool
) -> Float32[Array, "one_or_B H M L"]:
    """dg: the step into row u is crossed by pairs that end at u or later in the chunk, and by
    the keys before u that are read in later chunks."""
    reach = np.tril(np.ones((mg.CHUNK, mg.CHUNK), np.float32))
    reach = np.stack([reach, 1 - reach])
    if not shared:
        return einsum("bhmjt,jtu->bhmu", crossings, reach)
    total = jnp.sum(crossings, axis=0, keepdims=True)
    return jnp.sum(total[..., None] * reach, axis=(3, 4))
