"""The single recurrence on Hopper: the Mosaic GPU kernel of the forward pass.

For bf16 with Dk = Dv = 64. One warpgroup walks the chunks of one (batch, head, segment).
Tiles arrive by TMA, the next while one is computed on; products run on wgmma with the state
in registers; nothing of size (N, N) and no state per token exists. Two such programs share a
multiprocessor, so that one computes while the other waits. Contract of the arguments:
`recurrence.Backend`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32

from lasad_jax.ops.kernels import mosaic_tiles as mg
from lasad_jax.ops.kernels.mosaic_segments import segment_gradients, segment_states
from lasad_jax.ops.kernels.recurrence_mosaic_backward import backward

__all__ = ["backward", "forward", "segment_gradients", "segment_states"]


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

    def kernel(inputs, outputs, scratch):
        at, h, z = (lax.axis_index(name) for name in "bhz")
        state_tile, value_tile, mask_tile, *prefix_tile = (
            scratch["tiles"].at[i] for i in range(3 + num_prefix)
        )

        prepare = lambda: mg.fill_tiles(
            inputs, at, h, mask_tile, 0, scratch.get("prefix"), *prefix_tile
        )

        def step(c, tiles, decays, fetch, state):
            q_tile, k_tile, v_tile = tiles
            # Of what the step before sent off, its outputs may still be on their way.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)

            def prepare():
                state_tile[...] = state.astype(jnp.bfloat16)
                keys = mg.without_prefix(decays.row, mg.ROW, c, num_prefix)
                to_end = mg.by_row(jnp.exp2(decays.whole - keys))
                value_tile[...] = (v_tile[...].astype(jnp.float32) * to_end).astype(jnp.bfloat16)
                plgpu.commit_smem()
                keys = mg.without_prefix(decays.column, mg.COLUMN, c, num_prefix)
                return jnp.exp2(mg.by_row(decays.row) - mg.by_column(keys))

            (scores,), weights = multiply([(q_tile, mg.transposed(k_tile))], work=prepare)
            scores = mg.masked(scores, weights, mask_tile)
            if keep_states:
                plgpu.copy_smem_to_gmem(state_tile, outputs["states"].at[at, h, c])

            def fetch_when_free():
                plgpu.wait_smem_to_gmem(1 if keep_states else 0, wait_read_only=True)
                fetch()

            (carried, state), _ = multiply(
                [(q_tile, state_tile)],
                [state * jnp.exp2(decays.whole), (mg.transposed(k_tile), value_tile)],
                work=fetch_when_free,
            )
            carried *= mg.by_row(jnp.exp2(decays.row))
            from_prefix = [(q_tile, tile) for tile in prefix_tile]
            (out,), _ = multiply([carried, (scores, v_tile), *from_prefix])
            plgpu.commit_smem()
            q_tile[...] = out.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile, outputs["o"].at[at, pl.ds(c * mg.CHUNK, mg.CHUNK), h])
            return state

        start = mg.zeros()
        if "starts" in inputs:
            start = plgpu.load(inputs["starts"].at[at, h, z], layout=mg.TILE, optimized=False)
        chunk_of = lambda i: z * chunks + i
        state = mg.walk(
            step, inputs, "qkv", at, h, chunk_of, chunks, scratch["walk"], start, prepare
        )
        if return_ends:
            outputs["ends"][at, h, z] = state
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    inputs = {"q": q, "k": k, "v": v, "b": b[:, :, :, 0]}
    if starts is not None:
        inputs["starts"] = starts
    scratch = {"walk": mg.walk_buffers(3, stages=2), "tiles": mg.tiles(3 + num_prefix)}
    if num_prefix:
        scratch["prefix"] = mg.prefix_buffers()
    grid = (batch, heads, segments)
    out = mg.launch(kernel, inputs, out_type, scratch, grid, interpret, name="recurrence_forward")
    return out["o"], out.get("states"), out.get("ends")
