"""The single recurrence on Hopper: Mosaic GPU kernels for bf16 with Dk = Dv = 64.

One warpgroup walks the chunks of one (batch, head, segment). Tiles arrive by TMA, the next
while one is computed on; products run on wgmma with the state in registers; nothing of size
(N, N) and no state per token exists. Two or three such programs share a multiprocessor, so
that one computes while another waits. Contract of the arguments: `recurrence.Backend`.
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
from lasad_jax.ops.numerics import einsum

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

    during = functools.partial(mg.multiply_during, interpret=interpret)

    def kernel(inputs, outputs, tiles, prefix_tiles):
        state_tile, value_tile, out_tile = tiles
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

            (scores,), weights = during(prepare, (q_tile, k_tile.transpose((1, 0))))
            if keep_states:
                plgpu.copy_smem_to_gmem(state_tile, outputs["states"].at[at, h, c])
            (carried, added), weighted = during(
                lambda: (scores * weights).astype(jnp.bfloat16),
                (q_tile, state_tile),
                (k_tile.transpose((1, 0)), value_tile),
            )
            out = carried * mg.by_row(jnp.exp2(since))
            for p, (row_k, row_v) in enumerate(prefix):
                out += mg.by_row(mg.read_prefix(q_tile, row_k, p, c)) * mg.by_column(row_v)
            (out,) = multiply((out, weighted, v_tile))
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
    out = mg.launch(kernel, inputs, out_type, 3, num_prefix, grid, interpret)
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
    during = functools.partial(mg.multiply_during, interpret=interpret)

    def kernel(inputs, outputs, tiles, prefix_tiles):
        # Three tiles serve twice: as operands, then for the gradients on their way out.
        d_state_tile, d_scores_tile, d_out_tile = tiles
        at, h, z = (lax.axis_index(name) for name in "bhz")
        prefix = mg.fetch_prefix(inputs, at, h, num_prefix, prefix_tiles)
        chunk_of = lambda i: z * chunks + chunks - 1 - i

        def body(index, q_tile, k_tile, v_tile, do_tile, state_tile, b_tile, b_again_tile, carry):
            d_state, sums = carry
            c = chunk_of(index[0])
            since = mg.log2(plgpu.load(b_tile, layout=mg.ROW))
            since_by_column = mg.log2(plgpu.load(b_again_tile, layout=mg.COLUMN))
            whole = mg.log2(b_tile[mg.CHUNK - 1])
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
            (scores, d_scores), (weights, across) = during(
                prepare,
                (k_tile, q_tile.transpose((1, 0))),
                (v_tile, do_tile.transpose((1, 0))),
            )

            def weigh():
                d_weighted = (d_scores * weights).astype(jnp.bfloat16)
                d_scores_tile[...] = d_weighted
                plgpu.commit_smem()
                return (scores * weights).astype(jnp.bfloat16), d_weighted

            (dv, dk, added), (scores, d_scores) = during(
                weigh,
                (k_tile, d_state_tile),
                (v_tile, d_state_tile.transpose((1, 0))),
                (q_tile.transpose((1, 0)), d_out_tile),
            )
            dv, dk, d_state = dv * to_end, dk * to_end, d_state * decayed + added
            later = jnp.sum(k_tile[...].astype(jnp.float32) * dk, axis=1)
            dv, dk = multiply((dv, scores, do_tile), (dk, d_scores, q_tile))

            def leave():
                ending = later - jnp.sum(k_tile[...].astype(jnp.float32) * dk, axis=1)
                if not num_prefix:
                    d_state_tile[...] = dk.astype(jnp.bfloat16)
                    d_out_tile[...] = dv.astype(jnp.bfloat16)
                return ending

            (dq,), ending = during(leave, (do_tile, state_tile.transpose((1, 0))))
            (dq,) = multiply((dq * from_start, d_scores_tile.transpose((1, 0)), k_tile))
            ending += jnp.sum(q_tile[...].astype(jnp.float32) * dq, axis=1)
            outputs["crossings"][at, h, c, 0] = ending + across
            outputs["crossings"][at, h, c, 1] = later + across

            new_sums = []
            for p, (rows, d_rows) in enumerate(zip(prefix, sums, strict=True)):
                d_query, d_rows = mg.prefix_gradients(q_tile, do_tile, rows, p, c, d_rows)
                dq += d_query
                own = (mg.iota(0) == p) & (c == 0)
                dk = jnp.where(own, mg.by_column(d_rows[0]), dk)
                dv = jnp.where(own, mg.by_column(d_rows[1]), dv)
                new_sums.append(d_rows)

            d_scores_tile[...] = dq.astype(jnp.bfloat16)
            if num_prefix:
                d_state_tile[...] = dk.astype(jnp.bfloat16)
                d_out_tile[...] = dv.astype(jnp.bfloat16)
            plgpu.commit_smem()
            for tile, name in (
                (d_scores_tile, "dq"),
                (d_state_tile, "dk"),
                (d_out_tile, "dv"),
            ):
                rows = pl.ds(c * mg.CHUNK, mg.CHUNK)
                plgpu.copy_smem_to_gmem(tile, outputs[name].at[at, rows, h])
            return d_state, new_sums

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
    out = mg.launch(kernel, inputs, out_type, 3, num_prefix, grid, interpret)
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


def segment_states(
    k: BFloat16[Array, "B N H 64"],
    v: BFloat16[Array, "B N H 64"],
    b: Float32[Array, "one_or_B H M 1 L"],
    *,
    num_prefix: int,
    segments: int,
    interpret: bool = False,
    stages: int = 4,
):
    """What each segment but the last adds to the state, as of the segment's end."""
    batch, _, heads, _ = k.shape
    chunks = b.shape[2] // segments

    def kernel(inputs, outputs, tiles, prefix_tiles):
        (value_tile,) = tiles
        at, h, z = (lax.axis_index(name) for name in "bhz")
        chunk_of = lambda i: z * chunks + i

        def body(index, k_tile, v_tile, b_tile, b_again_tile, state):
            whole = mg.log2(b_tile[mg.CHUNK - 1])
            to_end = mg.by_row(jnp.exp2(whole - mg.log2(plgpu.load(b_tile, layout=mg.ROW))))
            to_end = mg.off_prefix(to_end, 0, chunk_of(index[0]), num_prefix, 0.0)
            value_tile[...] = (v_tile[...].astype(jnp.float32) * to_end).astype(jnp.bfloat16)
            plgpu.commit_smem()
            term = (state * jnp.exp2(whole), k_tile.transpose((1, 0)), value_tile)
            (state,) = mg.multiply(term, interpret=interpret)
            return state

        state = mg.pipeline(body, inputs, "kv", (), at, h, chunk_of, chunks, stages, mg.zeros())
        outputs["states"][at, h, z] = state

    inputs = {"k": k, "v": v, "b": b[:, :, :, 0]}
    shape = (batch, heads, segments - 1, mg.DIM, mg.DIM)
    out_type = {"states": jax.ShapeDtypeStruct(shape, jnp.float32)}
    grid = (batch, heads, segments - 1)
    return mg.launch(kernel, inputs, out_type, 1, 0, grid, interpret)["states"]


def segment_gradients(
    q: BFloat16[Array, "B N H 64"],
    d_o: BFloat16[Array, "B N H 64"],
    k: BFloat16[Array, "B N H 64"],
    v: BFloat16[Array, "B N H 64"],
    b: Float32[Array, "one_or_B H M 1 L"],
    *,
    num_prefix: int,
    segments: int,
    interpret: bool = False,
    stages: int = 4,
):
    """What each segment but the first adds to the gradients of its first state and the prefix."""
    batch, _, heads, _ = q.shape
    chunks = b.shape[2] // segments
    of = lambda *shape: jax.ShapeDtypeStruct((batch, heads, segments - 1, *shape), jnp.float32)
    out_type = {"d_states": of(mg.DIM, mg.DIM)}
    if num_prefix:
        out_type["d_prefix_k"] = out_type["d_prefix_v"] = of(num_prefix, mg.DIM)

    def kernel(inputs, outputs, tiles, prefix_tiles):
        (d_out_tile,) = tiles
        at, h, z = (lax.axis_index(name) for name in "bhz")
        prefix = mg.fetch_prefix(inputs, at, h, num_prefix, prefix_tiles)
        chunk_of = lambda i: (z + 2) * chunks - 1 - i

        def body(index, q_tile, do_tile, b_tile, b_again_tile, carry):
            d_state, sums = carry
            from_start = mg.by_row(jnp.exp2(mg.log2(plgpu.load(b_tile, layout=mg.ROW))))
            d_out = do_tile[...].astype(jnp.float32)
            d_out_tile[...] = (d_out * from_start).astype(jnp.bfloat16)
            plgpu.commit_smem()
            whole = jnp.exp2(mg.log2(b_tile[mg.CHUNK - 1]))
            term = (d_state * whole, q_tile.transpose((1, 0)), d_out_tile)
            (d_state,) = mg.multiply(term, interpret=interpret)
            new_sums = [
                mg.prefix_gradients(q_tile, do_tile, rows, 0, 0, d_rows)[1]
                for rows, d_rows in zip(prefix, sums, strict=True)
            ]
            return d_state, new_sums

        nothing = plgpu.layout_cast(jnp.zeros((mg.DIM,), jnp.float32), mg.COLUMN)
        carry = mg.zeros(), [(nothing, nothing)] * num_prefix
        d_state, sums = mg.pipeline(
            body, inputs, ("q", "d_o"), (), at, h, chunk_of, chunks, stages, carry
        )
        outputs["d_states"][at, h, z] = d_state
        for p, rows in enumerate(sums):
            for name, row in zip(("d_prefix_k", "d_prefix_v"), rows, strict=True):
                outputs[name][at, h, z, p] = row

    inputs = {"q": q, "d_o": d_o, "k": k, "v": v, "b": b[:, :, :, 0]}
    grid = (batch, heads, segments - 1)
    out = mg.launch(kernel, inputs, out_type, 1, num_prefix, grid, interpret)
    return out["d_states"], out.get("d_prefix_k"), out.get("d_prefix_v")
