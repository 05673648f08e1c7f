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

_STAGES = 2
_STAGED = {"q": mh.Q, "k": mh.K, "v": mh.V, "out_gate": mh.OUT_GATE}


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
        bias, [content gate 1 | padding 7], in groups (`passes.mixed_heads.join`).
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
    chunks = pl.cdiv(num_tokens, mg.CHUNK)
    tokens = jax.ShapeDtypeStruct((batch, num_tokens, heads, mh.VALUE_DIM), y.dtype)
    out_type = {"h": tokens}
    if keep_states:
        shape = (batch, heads, max(chunks - 1, 1), mh.VALUE_DIM, mh.KEY_DIM)
        out_type |= {"o": tokens, "states": jax.ShapeDtypeStruct(shape, y.dtype)}
    multiply = functools.partial(mg.multiply, interpret=interpret)
    turns = functools.partial(mh.Turns.load, interpret=interpret)
    load = functools.partial(mh.load, interpret=interpret)
    scale, t = math.log2(q_scale), mg.transposed
    fresh = functools.partial(mh.fresh, interpret=interpret)

    def kernel(inputs, outputs, scratch):
        at, head = lax.axis_index("b"), lax.axis_index("h")
        y, table = inputs["y"], inputs.get("table")
        columns, b = mh.Columns.of(y, heads, head), scratch["b"]
        arrivals = Arrivals(scratch["arrivals"], interpret)
        rows = lambda c: pl.ds(c * mg.CHUNK, mg.CHUNK)

        def load_decays(c):
            b[...] = md.log_decays(inputs, at, head, c, interpret)
            plgpu.commit_smem()

        def fetch(c):
            slot = lax.rem(c, _STAGES)
            for name, column in _STAGED.items():
                place = columns.group, columns.first + column
                arrivals.fetch(y, at, c * mg.CHUNK, *place, scratch[name].at[slot], slot)

        def step(c, carry):
            state, turn = carry
            slot, place = lax.rem(c, _STAGES), lax.rem(c, md.CHUNKS)
            if chunks > md.CHUNKS:
                pl.when((c > 0) & (place == 0))(lambda: load_decays(c))
            tile = lambda name: scratch[name].at[fresh(slot if name in _STAGED else 0, c)]
            arrivals.wait(slot, lax.div(c, _STAGES))
            decays = mg.Decays.load(b.at[place], base=2)
            keys = mg.without_prefix(decays.row, mg.ROW, c, 1)
            queries = decays.row + scale  # not themselves scaled, but what they meet

            active = lambda name: turn(mh.silu(load(tile(name))))
            q = mh.narrow(active("q"))
            k = active("k")
            tile("k")[...] = mh.narrow(k)
            to_end = mg.by_row(jnp.exp2(decays.whole - keys), mh.KEY_DIM)
            tile("decayed")[...] = mh.narrow(k * to_end)
            tile("q")[...] = mh.narrow(state)  # the queries are in registers
            plgpu.commit_smem()

            def weigh():
                keys = mg.without_prefix(decays.column, mg.COLUMN, c, 1)
                return jnp.exp2(mg.by_row(queries) - mg.by_column(keys))

            (scores, carried), weights = multiply(
                [(q, t(tile("k")))], [(q, t(tile("q")))], work=weigh
            )
            # The heads of the step before have left: their tiles are loaded into next.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if keep_states:
                place = outputs["states"].at[at, head, jnp.maximum(c - 1, 0)]
                pl.when(c > 0)(lambda: plgpu.copy_smem_to_gmem(tile("q"), place))
            scores = mg.masked(scores, weights, tile("mask"))

            def meanwhile():
                later = c + _STAGES - 1
                pl.when((c > 0) & (later < chunks))(lambda: fetch(later))
                turn = turns(table, rows(jnp.minimum(c + 1, chunks - 1)))
                return mh.silu(load(tile("out_gate"))), turn

            (out, state), (gate, turn) = multiply(
                [
                    carried * mg.by_row(jnp.exp2(queries)),
                    (scores, tile("v")),
                    (q, t(tile("prefix"))),
                ],
                [state * jnp.exp2(decays.whole), (t(tile("v")), tile("decayed"))],
                work=meanwhile,
            )
            plgpu.commit_smem()
            if keep_states:
                tile("v")[...] = mh.narrow(out)
            tile("out_gate")[...] = mh.narrow(out * mh.root_mean_square(out, epsilon) * gate)
            plgpu.commit_smem()
            leaving = {"h": "out_gate"} | ({"o": "v"} if keep_states else {})
            for name, source in leaving.items():
                plgpu.copy_smem_to_gmem(tile(source), outputs[name].at[at, rows(c), head])
            return state, turn

        arrivals.start(copies=len(_STAGED))
        for c in range(min(_STAGES, chunks)):
            fetch(jnp.int32(c))
        # What comes from far is asked for before anything waits.
        prefix = mh.Prefix.load(y, table, at, columns, interpret)
        turn = turns(table, rows(0))
        mg.fill_mask(scratch["mask"].at[0], 0)
        load_decays(0)
        scratch["prefix"].at[0][...] = mh.narrow(prefix.product() * q_scale)
        plgpu.commit_smem()
        lax.fori_loop(0, chunks, step, (mg.zeros(mh.KEY_DIM), turn))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    inputs = {"y": mh.in_groups(y), "steps": steps, "bias": bias, "table": table}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    narrow, broad = (functools.partial(tiles, width=x) for x in (mh.KEY_DIM, mh.VALUE_DIM))
    scratch = {
        "q": narrow(_STAGES),
        "k": narrow(_STAGES),
        "v": broad(_STAGES),
        "out_gate": broad(_STAGES),
        "b": md.scratch(),
        "arrivals": Arrivals.scratch(4, _STAGES, interpret),
        "mask": broad(1),
        "prefix": narrow(1),
        "decayed": narrow(1),
    }
    grid = (batch, heads)
    out = mg.launch(kernel, inputs, out_type, scratch, grid, interpret, name="mixed_heads_forward")
    return tuple(out.values())
