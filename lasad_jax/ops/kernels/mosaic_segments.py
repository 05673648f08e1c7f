"""What segments of a long sequence add to the state and to its gradient, before the main pass.

For few heads: see `recurrence`. Mosaic GPU kernels in the manner of `recurrence_mosaic`.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32

from lasad_jax.ops.kernels import mosaic_tiles as mg

_STAGES = 4


def segment_states(
    k: BFloat16[Array, "B N H 64"],
    v: BFloat16[Array, "B N H 64"],
    b: Float32[Array, "one_or_B H M 1 L"],
    *,
    num_prefix: int,
    segments: int,
    interpret: bool = False,
):
    """What each segment but the last adds to the state, as of the segment's end."""
    batch, _, heads, _ = k.shape
    chunks = b.shape[2] // segments

    def kernel(inputs, outputs, scratch):
        value_tile = scratch["tile"]
        at, h, z = (lax.axis_index(name) for name in "bhz")

        def step(c, tiles, decays, fetch, state):
            k_tile, v_tile = tiles
            keys = mg.without_prefix(decays.row, mg.ROW, c, num_prefix)
            to_end = mg.by_row(jnp.exp2(decays.whole - keys))
            plgpu.commit_smem()  # every warp is done with the product before
            value_tile[...] = (v_tile[...].astype(jnp.float32) * to_end).astype(jnp.bfloat16)
            plgpu.commit_smem()
            fetch()
            decayed = state * jnp.exp2(decays.whole)
            add = [decayed, (mg.transposed(k_tile), value_tile)]
            (state,), _ = mg.multiply(add, interpret=interpret)
            return state

        chunk_of = lambda i: z * chunks + i
        walk = scratch["walk"]
        state = mg.walk(step, inputs, "kv", at, h, chunk_of, chunks, walk, mg.zeros())
        outputs["states"][at, h, z] = state

    inputs = {"k": k, "v": v, "b": b[:, :, :, 0]}
    shape = (batch, heads, segments - 1, mg.DIM, mg.DIM)
    out_type = {"states": jax.ShapeDtypeStruct(shape, jnp.float32)}
    scratch = {"walk": mg.walk_buffers(2, _STAGES), "tile": mg.tiles()}
    grid = (batch, heads, segments - 1)
    out = mg.launch(kernel, inputs, out_type, scratch, grid, interpret, name="segment_states")
    return out["states"]


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
):
    """What each segment but the first adds to the gradient of its first state.

    With a prefix also its sum of q^T d_o, from which the prefix's gradients follow.
    """
    del k, v
    batch, _, heads, _ = q.shape
    chunks = b.shape[2] // segments
    shape = (batch, heads, segments - 1, mg.DIM, mg.DIM)
    names = ("d_states", "d_prefix") if num_prefix else ("d_states",)
    out_type = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name in names}

    def kernel(inputs, outputs, scratch):
        d_out_tile = scratch["tile"]
        at, h, z = (lax.axis_index(name) for name in "bhz")

        def step(c, tiles, decays, fetch, sums):
            q_tile, do_tile = tiles
            from_start = mg.by_row(jnp.exp2(decays.row))
            plgpu.commit_smem()  # every warp is done with the products before
            d_out_tile[...] = (do_tile[...].astype(jnp.float32) * from_start).astype(jnp.bfloat16)
            plgpu.commit_smem()
            fetch()
            decayed = (sums[0] * jnp.exp2(decays.whole), *sums[1:])
            factors = (d_out_tile, do_tile)[: len(names)]
            add = [[x, (mg.transposed(q_tile), y)] for x, y in zip(decayed, factors, strict=True)]
            return mg.multiply(*add, interpret=interpret)[0]

        chunk_of = lambda i: (z + 2) * chunks - 1 - i
        walk, start = scratch["walk"], [mg.zeros() for _ in names]
        sums = mg.walk(step, inputs, ("q", "d_o"), at, h, chunk_of, chunks, walk, start)
        for name, x in zip(names, sums, strict=True):
            outputs[name][at, h, z] = x

    inputs = {"q": q, "d_o": d_o, "b": b[:, :, :, 0]}
    scratch = {"walk": mg.walk_buffers(2, _STAGES), "tile": mg.tiles()}
    grid = (batch, heads, segments - 1)
    out = mg.launch(kernel, inputs, out_type, scratch, grid, interpret, name="segment_gradients")
    return tuple(out.values())
