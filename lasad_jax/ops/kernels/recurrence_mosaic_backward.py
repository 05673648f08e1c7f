"""The single recurrence on Hopper: the Mosaic GPU kernel of the backward pass.

One walk from the last chunk to the first yields all gradients. Contract of the arguments:
`recurrence.Backend`; how the kernel is built: `recurrence_mosaic`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32

from lasad_jax.ops.kernels import mosaic_tiles as mg
from lasad_jax.ops.numerics import running_sum

# Places of the tiles that are filled before the walk.
_STATE, _MASK = 0, 1


def backward(
    q: BFloat16[Array, "B N H 64"],
    k: BFloat16[Array, "B N H 64"],
    v: BFloat16[Array, "B N H 64"],
    b: Float32[Array, "one_or_B H M 1 L"],
    states: BFloat16[Array, "B H M 64 64"],
    d_o: BFloat16[Array, "B N H 64"],
    d_ends: Float32[Array, "B H Z 64 64"] | None,
    d_prefix: tuple[Float32[Array, "B H 64 64"]] | None,
    *,
    num_prefix: int,
    segments: int,
    return_d_starts: bool,
    interpret: bool = False,
):
    """All gradients. `d_prefix`: sum of q^T d_o over the segments after the first."""
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
    t = mg.transposed
    num_tiles = 4 + num_prefix

    def kernel(inputs, outputs, scratch):
        at, h, z = (lax.axis_index(name) for name in "bhz")
        chunk_of = lambda i: z * chunks + chunks - 1 - i
        own_tiles, state_ready = scratch["tiles"], scratch["state_ready"]

        def fetch_state(c):
            source = inputs["states"].at[at, h, c]
            plgpu.copy_gmem_to_smem(source, own_tiles.at[_STATE], state_ready)

        def step(c, tiles, decays, fetch, carry):
            d_state, d_prefix = carry
            q_tile, k_tile, v_tile, do_tile = tiles
            # The compiler must not see that these places never change: it would keep all it can
            # derive from them in registers, which then do not suffice. `other` takes the
            # decayed d_o, then d_scores; those of d_state, q and v take dk, dq and dv on
            # their way out.
            zero = jnp.where(decays.whole > 0, 1, 0)
            state_tile, mask_tile, d_state_tile, other_tile, *prefix_tile = (
                own_tiles.at[i + zero] for i in range(num_tiles)
            )
            keys = mg.without_prefix(decays.row, mg.ROW, c, num_prefix)
            to_end = mg.by_row(jnp.exp2(decays.whole - keys))
            from_start = mg.by_row(jnp.exp2(decays.row))
            # Of the gradients that the step before sent off, dq may still be on its way.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)

            def prepare():
                d_state_tile[...] = d_state.astype(jnp.bfloat16)
                d_out = do_tile[...].astype(jnp.float32) * from_start
                other_tile[...] = d_out.astype(jnp.bfloat16)
                plgpu.commit_smem()
                weights = jnp.exp2(mg.by_column(decays.column) - mg.by_row(keys))
                return weights, d_state * jnp.exp2(decays.whole)

            # By (key, query), so that only d_scores is needed the other way.
            (scores,), (weights, d_state) = multiply([(k_tile, t(q_tile))], work=prepare)
            (d_scores, d_state), scores = multiply(
                [(v_tile, t(do_tile))],
                [d_state, (t(q_tile), other_tile)],
                work=lambda: mg.masked(scores, weights, mask_tile),
            )
            d_scores = mg.masked(d_scores, weights, mask_tile)
            plgpu.commit_smem()
            other_tile[...] = d_scores
            plgpu.commit_smem()

            def fetch_when_free():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                fetch()

            (dv, dk), _ = multiply(
                [(k_tile, d_state_tile)], [(v_tile, t(d_state_tile))], work=fetch_when_free
            )
            sums = [[dv * to_end, (scores, do_tile)], [dk * to_end, (d_scores, q_tile)]]
            if num_prefix:
                sums.append([d_prefix, (t(q_tile), do_tile)])
            (dv, dk, *rest), _ = multiply(*sums)
            d_prefix = rest[0] if num_prefix else None

            def leave():
                v_tile[...] = dv.astype(jnp.bfloat16)
                d_state_tile[...] = dk.astype(jnp.bfloat16)
                return jnp.sum(k_tile[...].astype(jnp.float32) * dk, axis=1)

            plgpu.barrier_wait(state_ready)
            (dq,), change = multiply([(do_tile, t(state_tile))], work=leave)
            if num_prefix:

                @pl.when(c == 0)
                def _():
                    mg.put_prefix_gradients(scratch["prefix"], d_prefix, d_state_tile, v_tile)

            plgpu.commit_smem()
            rows = pl.ds(c * mg.CHUNK, mg.CHUNK)
            plgpu.copy_smem_to_gmem(d_state_tile, outputs["dk"].at[at, rows, h])
            plgpu.copy_smem_to_gmem(v_tile, outputs["dv"].at[at, rows, h])
            (dq, *from_prefix), through = multiply(
                [dq * from_start, (t(other_tile), k_tile)],
                *([(do_tile, t(tile))] for tile in prefix_tile),
                work=lambda: jnp.sum(state_tile[...].astype(jnp.float32) * d_state, axis=1),
            )
            change -= jnp.sum(q_tile[...].astype(jnp.float32) * dq, axis=1)
            outputs["crossings"][at, h, c, 0] = change
            outputs["crossings"][at, h, c, 1] = through
            for x in from_prefix:
                dq += x
            q_tile[...] = dq.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile, outputs["dq"].at[at, rows, h])
            pl.when(c > z * chunks)(lambda: fetch_state(c - 1))
            return d_state, d_prefix

        def prepare():
            fetch_state(chunk_of(0))
            prefix_tile = [own_tiles.at[num_tiles - 1]] * num_prefix
            mg.fill_tiles(
                inputs, at, h, own_tiles.at[_MASK], 1, scratch.get("prefix"), *prefix_tile
            )

        d_state, d_prefix = mg.zeros(), mg.zeros() if num_prefix else None
        if "d_ends" in inputs:
            d_state = plgpu.load(inputs["d_ends"].at[at, h, z], layout=mg.TILE, optimized=False)
        if "d_prefix" in inputs:
            later = plgpu.load(inputs["d_prefix"].at[at, h], layout=mg.TILE, optimized=False)
            d_prefix = later * jnp.where(z == 0, 1.0, 0.0)
        d_state, _ = mg.walk(
            step,
            inputs,
            ("q", "k", "v", "d_o"),
            at,
            h,
            chunk_of,
            chunks,
            scratch["walk"],
            (d_state, d_prefix),
            prepare,
        )
        if return_d_starts:
            outputs["d_starts"][at, h, z] = d_state
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    inputs = {"q": q, "k": k, "v": v, "d_o": d_o, "states": states, "b": b[:, :, :, 0]}
    if d_ends is not None:
        inputs["d_ends"] = d_ends
    if d_prefix is not None:
        (inputs["d_prefix"],) = d_prefix
    scratch = {
        "walk": mg.walk_buffers(4, stages=2),
        "tiles": mg.tiles(num_tiles),
        "state_ready": plgpu.Barrier(num_arrivals=1),
    }
    if num_prefix:
        scratch["prefix"] = mg.prefix_buffers()
    grid = (batch, heads, segments)
    out = mg.launch(kernel, inputs, out_type, scratch, grid, interpret, name="recurrence_backward")
    dg = _cross(out["crossings"], shared=b.shape[0] == 1)
    return *(out[name] for name in ("dq", "dk", "dv")), dg, out.get("d_starts")


def _cross(
    crossings: Float32[Array, "B H M 2 L"], shared: bool
) -> Float32[Array, "one_or_B H M L"]:
    """dg: the step into row u is crossed by pairs from before the chunk to after it, or into
    it, less those that end before u, and by pairs that start in the chunk before u."""
    if shared:
        crossings = jnp.sum(crossings, axis=0, keepdims=True)
    change, through = crossings[:, :, :, 0], crossings[:, :, :, 1]
    return jnp.sum(through, axis=-1, keepdims=True) + running_sum(change) - change
