"""What segments of a long sequence add to the state and to its gradient, before the main pass.

For few heads: see `recurrence`. Mosaic GPU kernels in the manner of `recurrence_mosaic`.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32

from lasad_jax.ops.kernels import mosaic_tiles as mg


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
        value_tile = tiles.at[0]
        at, h, z = (lax.axis_index(name) for name in "bhz")
        chunk_of = lambda i: z * chunks + i

        def body(index, k_tile, v_tile, b_tile, b_again_tile, state):
            whole = mg.log2(b_tile[mg.CHUNK - 1])
            to_end = mg.by_row(jnp.exp2(whole - mg.log2(plgpu.load(b_tile, layout=mg.ROW))))
            to_end = mg.off_prefix(to_end, 0, chunk_of(index[0]), num_prefix, 0.0)
            value_tile[...] = (v_tile[...].astype(jnp.float32) * to_end).astype(jnp.bfloat16)
            plgpu.commit_smem()
            (added,), _ = mg.multiply((k_tile.transpose((1, 0)), value_tile), interpret=interpret)
            return state * jnp.exp2(whole) + added

        state = mg.pipeline(body, inputs, "kv", (), at, h, chunk_of, chunks, stages, mg.zeros())
        outputs["states"][at, h, z] = state

    inputs = {"k": k, "v": v, "b": b[:, :, :, 0]}
    shape = (batch, heads, segments - 1, mg.DIM, mg.DIM)
    out_type = {"states": jax.ShapeDtypeStruct(shape, jnp.float32)}
    grid = (batch, heads, segments - 1)
    out = mg.launch(kernel, inputs, out_type, 1, 0, grid, interpret, name="segment_states")
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
        d_out_tile = tiles.at[0]
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
            (added,), _ = mg.multiply((q_tile.transpose((1, 0)), d_out_tile), interpret=interpret)
            sums = [
                mg.prefix_gradients(q_tile, do_tile, rows, 0, 0, d_rows)[1]
                for rows, d_rows in zip(prefix, sums, strict=True)
            ]
            return d_state * whole + added, sums

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
    name = "segment_gradients"
    out = mg.launch(kernel, inputs, out_type, 1, num_prefix, grid, interpret, name=name)
    return out["d_states"], out.get("d_prefix_k"), out.get("d_prefix_v")
