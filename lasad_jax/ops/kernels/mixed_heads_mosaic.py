"""A mixer's heads from joint projection to gated output on Hopper: Mosaic GPU, forward.

For bf16 with Dk = 32 and Dv = 64. One warpgroup walks the chunks of one (image, head): queries,
keys, values and gates go from the projection's columns into products, and the gated heads
leave, the next chunk's tiles on their way meanwhile. The state is held transposed, (Dv, Dk): the
longer side fills the rows of wgmma. The first token is the prefix.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32

from lasad_jax.ops.kernels import mixed_heads_decays as md
from lasad_jax.ops.kernels import mixed_heads_tiles as mh
from lasad_jax.ops.kernels import mosaic_tiles as mg
from lasad_jax.ops.kernels.mixed_heads_mosaic_backward import backward
from lasad_jax.ops.kernels.mosaic_columns import Arrivals, tiles

__all__ = ["backward", "forward"]

_HEADS = 4  # of a program, one for each warpgroup: 128 registers of a thread
_STAGES = 2


def forward(
    y: BFloat16[Array, "B N H W"],
    steps: Float32[Array, "H M 64"],
    bias: Float32[Array, " H"] | None,
    table: Float32[Array, "M*64 32"] | None,
    *,
    q_scale: float,
    epsilon: float,
    keep_states: bool,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """The gated heads h (B, N, H, 64) and, with `keep_states`, what `backward` takes: the heads o
    before norm and gate, and the transposed state before each chunk but the first, which begins
    with zeros: (B, H, chunks - 1, 64, 32) in bf16, of one chunk a single one without a meaning.

    Args:
      y: joint projection. A head's columns are [q 32 | k 32 | v 64 | out_gate 64] and, with a
        bias, [content gate 1 | padding 7].
      steps: log-decays in chunks of 64 tokens, M a multiple of 4 that holds N of them. The prefix
        token's and what is past N count for nothing.
      bias: of the content gate, which adds -softplus(its column + bias).
      table: cosine and sine of each pair of a token; None does not rotate.
      q_scale: factor of the queries.
      epsilon: of the norm.
      keep_states: as said.
      interpret: run on any platform, slowly.
    """
    batch, num_tokens, heads, _ = y.shape
    chunks, total = pl.cdiv(num_tokens, mg.CHUNK), batch * heads
    tokens = jax.ShapeDtypeStruct((batch, num_tokens, heads, mh.VALUE_DIM), y.dtype)
    out_type = {"h": tokens}
    if keep_states:
        shape = (batch, heads, max(chunks - 1, 1), mh.VALUE_DIM, mh.KEY_DIM)
        out_type |= {"o": tokens, "states": jax.ShapeDtypeStruct(shape, y.dtype)}
    multiply = functools.partial(mg.multiply, interpret=interpret)
    turns = functools.partial(mh.Turns.load, interpret=interpret)
    load = functools.partial(mh.load, interpret=interpret)
    scale, t = math.log2(q_scale), mg.transposed

    def kernel(inputs, outputs, scratch):
        own = lax.axis_index("wg")
        number = _HEADS * lax.axis_index("b") + own
        tokens, gates = (Arrivals(scratch[x], interpret) for x in ("tokens", "gates"))
        tokens.start(copies=3)
        gates.start(copies=1)

        @pl.when(own == 0)
        def _():
            mg.fill_mask(scratch["mask"], 0)
            plgpu.barrier_arrive(scratch["masked"])

        plgpu.barrier_wait(scratch["masked"])
        walk = functools.partial(one_head, inputs, outputs, scratch, tokens, gates, own, number)
        pl.when(number < total)(walk)

    def one_head(inputs, outputs, scratch, tokens, gates, own, number):
        at, head = lax.div(number, heads), lax.rem(number, heads)
        y, table = inputs["y"], inputs.get("table")
        mask_tile = scratch["mask"]
        names = "prefix", "decayed", "out_gate", "b"
        prefix_tile, decayed_tile, gate_tile, b = (scratch[x].at[own] for x in names)
        slots = [scratch[name].at[own] for name in ("q", "k", "v")]

        def load_decays(c):
            b[...] = md.log_decays(inputs, at, head, c, interpret)
            plgpu.commit_smem()

        def fetch(c):
            slot = lax.rem(c, _STAGES)
            for column, tile in zip((mh.Q, mh.K, mh.V), slots, strict=True):
                stage = own * _STAGES + slot
                tokens.fetch(y, at, c * mg.CHUNK, head, column, tile.at[slot], stage)

        def fetch_gate(c):
            gates.fetch(y, at, c * mg.CHUNK, head, mh.OUT_GATE, gate_tile, own)

        def step(c, state):
            rows = pl.ds(c * mg.CHUNK, mg.CHUNK)
            slot, place = lax.rem(c, _STAGES), lax.rem(c, md.CHUNKS)
            if chunks > md.CHUNKS:
                pl.when((c > 0) & (place == 0))(lambda: load_decays(c))
            q_tile, k_tile, v_tile = (x.at[slot] for x in slots)
            turn = turns(table, rows)
            tokens.wait(own * _STAGES + slot, lax.div(c, _STAGES))
            decays = mg.Decays.load(b.at[place], base=2)
            keys = mg.without_prefix(decays.row, mg.ROW, c, 1)
            queries = decays.row + scale  # not themselves scaled, but what they meet

            active = lambda tile: turn(mh.silu(load(tile)))
            q = mh.narrow(active(q_tile))
            k = active(k_tile)
            k_tile[...] = mh.narrow(k)
            to_end = mg.by_row(jnp.exp2(decays.whole - keys), mh.KEY_DIM)
            decayed_tile[...] = mh.narrow(k * to_end)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            q_tile[...] = mh.narrow(state)  # the queries are in registers
            plgpu.commit_smem()

            @pl.when(c > 0)
            def _():
                fetch_gate(c)
                later = c + _STAGES - 1
                pl.when(later < chunks)(lambda: fetch(later))

            def weigh():
                keys = mg.without_prefix(decays.column, mg.COLUMN, c, 1)
                return jnp.exp2(mg.by_row(queries) - mg.by_column(keys))

            (scores, carried), weights = multiply([(q, t(k_tile))], [(q, t(q_tile))], work=weigh)
            if keep_states:
                place = outputs["states"].at[at, head, jnp.maximum(c - 1, 0)]
                pl.when(c > 0)(lambda: plgpu.copy_smem_to_gmem(q_tile, place))
            scores = mg.masked(scores, weights, mask_tile)

            def meanwhile():
                gates.wait(own, c)
                return mh.silu(load(gate_tile))

            (out, state), gate = multiply(
                [
                    carried * mg.by_row(jnp.exp2(queries)),
                    (scores, v_tile),
                    (q, t(prefix_tile)),
                ],
                [state * jnp.exp2(decays.whole), (t(v_tile), decayed_tile)],
                work=meanwhile,
            )
            plgpu.commit_smem()
            if keep_states:
                v_tile[...] = mh.narrow(out)
            gate_tile[...] = mh.narrow(out * mh.root_mean_square(out, epsilon) * gate)
            plgpu.commit_smem()
            leaving = {"h": gate_tile} | ({"o": v_tile} if keep_states else {})
            for name, tile in leaving.items():
                plgpu.copy_smem_to_gmem(tile, outputs[name].at[at, rows, head])
            return state

        for c in range(min(_STAGES, chunks)):
            fetch(jnp.int32(c))
        fetch_gate(jnp.int32(0))
        load_decays(0)
        product = mh.Prefix.load(y, table, at, head, interpret).product()
        prefix_tile[...] = mh.narrow(product * q_scale)
        plgpu.commit_smem()
        lax.fori_loop(0, chunks, step, mg.zeros(mh.KEY_DIM))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    inputs = {"y": y, "steps": steps, "bias": bias, "table": table}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    narrow = functools.partial(tiles, _HEADS, width=mh.KEY_DIM)
    broad = functools.partial(tiles, _HEADS, width=mh.VALUE_DIM)
    scratch = {
        "q": narrow(_STAGES),
        "k": narrow(_STAGES),
        "v": broad(_STAGES),
        "out_gate": broad(),
        "b": plgpu.SMEM((_HEADS, *md.SHAPE), jnp.float32),
        "tokens": Arrivals.scratch(3, _HEADS * _STAGES, interpret),
        "gates": Arrivals.scratch(1, _HEADS, interpret),
        "mask": tiles(width=mh.VALUE_DIM),
        "masked": plgpu.Barrier(),
        "prefix": narrow(),
        "decayed": narrow(),
    }
    grid = (pl.cdiv(total, _HEADS),)
    how = {"name": "mixed_heads_forward", "warpgroups": _HEADS}
    out = mg.launch(kernel, inputs, out_type, scratch, grid, interpret, **how)
    return tuple(out.values())
