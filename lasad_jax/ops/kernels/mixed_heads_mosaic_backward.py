"""A mixer's heads from joint projection to gated output on Hopper: Mosaic GPU, backward.

One walk from the last chunk to the first: through gate and norm, the recurrence and what is done
to queries and keys. How the kernel is built: `mixed_heads_mosaic`.
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
from lasad_jax.ops.kernels.mosaic_columns import Arrivals, store, tiles

_STAGES = 2
# The stage of `Arrivals` that what gate and norm take arrives at.
_GATED = _STAGES
_STAGED = ("q", "k", "v", "state")


def backward(
    y: BFloat16[Array, "B N H W"],
    steps: Float32[Array, "H M 64"],
    bias: Float32[Array, " H"] | None,
    table: Float32[Array, "M*64 32"] | None,
    o: BFloat16[Array, "B N H 64"],
    states: BFloat16[Array, "B H boundaries 64 32"],
    d_h: BFloat16[Array, "B N H 64"],
    *,
    q_scale: float,
    epsilon: float,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """(d_y, h, d_steps): the gradient with respect to y, 0 in the padding; the gated heads again;
    and what each image adds to the gradient of steps and, with a bias, as if there were one for
    each token, of bias: (B, H, 1 or 2, M, 64) in float32.

    Args:
      o, states: from `forward`.
      d_h: the gradient with respect to h.

    The other arguments are `forward`'s.
    """
    batch, num_tokens, heads, _ = y.shape
    chunks = pl.cdiv(num_tokens, mg.CHUNK)
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    shape = (batch, heads, 1 if bias is None else 2, *steps.shape[1:])
    d_steps = jax.ShapeDtypeStruct(shape, jnp.float32)
    out_type = {"d_y": like(mh.in_groups(y)), "h": like(d_h), "d_steps": d_steps}
    multiply = functools.partial(mg.multiply, interpret=interpret)
    turns = functools.partial(mh.Turns.load, interpret=interpret)
    load = functools.partial(mh.load, interpret=interpret)
    scale, t = math.log2(q_scale), mg.transposed
    fresh = functools.partial(mh.fresh, interpret=interpret)

    def kernel(inputs, outputs, scratch):
        at, head = lax.axis_index("b"), lax.axis_index("h")
        y, table = inputs["y"], inputs.get("table")
        columns = mh.Columns.of(y, heads, head)
        b, through_sums, ready = (scratch[x] for x in ("b", "through", "ready"))
        arrivals = Arrivals(scratch["arrivals"], interpret)
        rows = lambda c: pl.ds(c * mg.CHUNK, mg.CHUNK)

        def fetch(i):
            slot, c = lax.rem(i, _STAGES), chunks - 1 - i
            for name, column in (("q", mh.Q), ("k", mh.K), ("v", mh.V)):
                place = columns.group, columns.first + column
                arrivals.fetch(y, at, c * mg.CHUNK, *place, scratch[name].at[slot], slot)
            state_tile = scratch["state"].at[slot]

            @pl.when(c > 0)
            def _():
                source = inputs["states"].at[at, head, c - 1]
                plgpu.copy_gmem_to_smem(source, state_tile, ready.at[slot])

            @pl.when(c == 0)
            def _():
                state_tile[...] = jnp.zeros(state_tile.shape, y.dtype)
                plgpu.barrier_arrive(ready.at[slot])

        def fetch_gated(i):
            row = (chunks - 1 - i) * mg.CHUNK
            place = columns.group, columns.first + mh.OUT_GATE
            arrivals.fetch(y, at, row, *place, scratch["out_gate"], _GATED)
            for name in ("o", "d_h"):
                arrivals.fetch(inputs[name], at, row, head, 0, scratch[name], _GATED)

        def through_gate(do_tile):
            """d_o to its tile, h and the gate's gradient to those that o and gate came in."""
            o_tile, gate_tile, dh_tile = (scratch[x] for x in ("o", "out_gate", "d_h"))
            o = load(o_tile)
            factor = mh.root_mean_square(o, epsilon)
            normal = o * factor
            silu, slope = mh.silu_and_slope(load(gate_tile))
            d_h = load(dh_tile)
            o_tile[...] = mh.narrow(normal * silu)
            gate_tile[...] = mh.narrow(d_h * normal * slope)
            d_normal = d_h * silu
            d_o = factor * (d_normal - normal * mh.mean(normal * d_normal))
            do_tile[...] = mh.narrow(d_o)

        def activate(tile, slope_tile, turn):
            x, slope = mh.silu_and_slope(load(tile))
            slope_tile[...] = mh.narrow(slope)
            x = turn(x)
            tile[...] = mh.narrow(x)
            return x

        def d_active(d_x, slope_tile, turn):
            slope_tile[...] = mh.narrow(turn(d_x, back=True) * load(slope_tile))

        def load_decays(c):
            b[...] = md.log_decays(inputs, at, head, c, interpret)
            plgpu.commit_smem()

        def put_decays(c):
            """The gradients of a group whose chunks are done: `b` holds what they changed."""
            sums = md.load(b), md.load(through_sums)
            d_g, d_gate = md.gradients(*sums, inputs, at, head, c, interpret)
            place = outputs["d_steps"].at[at, head]
            place[0, pl.ds(c, md.CHUNKS)] = d_g
            if d_gate is not None:
                place[1, pl.ds(c, md.CHUNKS)] = d_gate
                md.put_gates(outputs["d_y"], d_gate, at, c, columns, interpret)

        def step(i, carry):
            d_state, d_prefix = carry
            c = chunks - 1 - i
            slot, place = lax.rem(i, _STAGES), lax.rem(c, md.CHUNKS)
            if chunks > md.CHUNKS:
                new = (i > 0) & (place == md.CHUNKS - 1)
                pl.when(new)(lambda: load_decays(c - (md.CHUNKS - 1)))
            tile = lambda name: scratch[name].at[fresh(slot if name in _STAGED else 0, i)]
            turn = turns(table, rows(c))
            arrivals.wait(_GATED, i)
            through_gate(tile("d_o"))
            arrivals.wait(slot, lax.div(i, _STAGES))
            plgpu.barrier_wait(ready.at[slot])
            decays = mg.Decays.load(b.at[place], base=2)
            keys = mg.without_prefix(decays.row, mg.ROW, c, 1)
            # Queries are not scaled, but what they meet.
            to_end, from_start = jnp.exp2(decays.whole - keys), jnp.exp2(decays.row + scale)
            # The gradients of queries and keys of the step before left from the slopes' tiles.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            q = activate(tile("q"), tile("q_slope"), turn)
            tile("decayed")[...] = mh.narrow(q * mg.by_row(from_start, mh.KEY_DIM))
            activate(tile("k"), tile("k_slope"), turn)
            tile("d_state")[...] = mh.narrow(d_state)
            plgpu.commit_smem()

            def leave(source, column):
                place = at, c * mg.CHUNK, columns.group, columns.first + column
                store(source, outputs["d_y"], *place, interpret)

            plgpu.copy_smem_to_gmem(scratch["o"], outputs["h"].at[at, rows(c), head])
            leave(scratch["out_gate"], mh.OUT_GATE)

            # By (key, query), so that only d_scores is needed the other way.
            weigh = lambda: jnp.exp2(mg.by_column(decays.column + scale) - mg.by_row(keys))
            (scores, d_scores), weights = multiply(
                [(tile("k"), t(tile("q")))], [(tile("v"), t(tile("d_o")))], work=weigh
            )
            d_scores = mg.masked(d_scores, weights, tile("mask"))
            tile("d_scores")[...] = d_scores

            def meanwhile():
                masked = mg.masked(scores, weights, tile("mask"))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                @pl.when(i + 1 < chunks)
                def _():
                    fetch_gated(i + 1)
                    pl.when(i > 0)(lambda: fetch(i + 1))

                return masked

            (dv, dk, dq, d_state, d_prefix), scores = multiply(
                [(tile("k"), t(tile("d_state")))],
                [(tile("v"), tile("d_state"))],
                [(tile("d_o"), tile("state"))],
                [d_state * jnp.exp2(decays.whole), (t(tile("d_o")), tile("decayed"))],
                [d_prefix, (t(tile("d_o")), tile("q"))],
                work=meanwhile,
            )
            plgpu.commit_smem()
            (dv, dk, dq, dq_prefix), through = multiply(
                [dv * mg.by_row(to_end), (scores, tile("d_o"))],
                [dk * mg.by_row(to_end, mh.KEY_DIM), (d_scores, tile("q"))],
                [dq * mg.by_row(from_start, mh.KEY_DIM), (t(tile("d_scores")), tile("k"))],
                [(tile("d_o"), tile("prefix"))],
                work=lambda: jnp.sum(load(tile("state")) * d_state, axis=1),
            )
            change = load(tile("k")) * dk - load(tile("q")) * dq
            b.at[place][...] = jnp.sum(change, axis=1)
            through_sums.at[place][...] = through
            plgpu.commit_smem()
            tile("v")[...] = mh.narrow(dv)
            d_active(dq + dq_prefix, tile("q_slope"), turn)
            d_active(dk, tile("k_slope"), turn)
            pl.when(place == 0)(lambda: put_decays(c))
            pl.when(c == 0)(lambda: put_prefix(tile, d_prefix))
            plgpu.commit_smem()
            for name, column in (("q_slope", mh.Q), ("k_slope", mh.K), ("v", mh.V)):
                leave(tile(name), column)
            return d_state, d_prefix

        def put_prefix(tile, d_product):
            """The prefix token's gradients, to the first rows of tiles on their way out."""
            prefix = mh.Prefix.load(y, table, at, columns, interpret)
            plgpu.commit_smem()  # the decays' sums have been read
            gradients = prefix.gradients(d_product * q_scale, b.at[0])
            for name, row in zip(("k_slope", "v"), gradients, strict=True):
                first = mg.iota(0, row.shape[0]) == 0
                whole = jnp.where(first, mg.by_column(row), load(tile(name)))
                tile(name)[...] = mh.narrow(whole)

        arrivals.start(copies=3)
        fetch_gated(jnp.int32(0))
        for i in range(min(_STAGES, chunks)):
            fetch(jnp.int32(i))
        # What comes from far is asked for before anything waits.
        prefix = mh.Prefix.load(y, table, at, columns, interpret)
        mg.fill_mask(scratch["mask"].at[0], 1)
        load_decays((chunks - 1) // md.CHUNKS * md.CHUNKS)
        scratch["prefix"].at[0][...] = mh.narrow(prefix.product() * q_scale)
        plgpu.commit_smem()
        lax.fori_loop(0, chunks, step, (mg.zeros(mh.KEY_DIM), mg.zeros(mh.KEY_DIM)))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    inputs = {"y": mh.in_groups(y), "o": o, "states": states, "d_h": d_h}
    inputs |= {"steps": steps, "bias": bias, "table": table}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    narrow, broad = (functools.partial(tiles, width=x) for x in (mh.KEY_DIM, mh.VALUE_DIM))
    scratch = {name: narrow(_STAGES) for name in ("q", "k", "state")}
    scratch |= {"v": broad(_STAGES), "b": md.scratch(), "through": md.scratch()}
    scratch |= {name: broad() for name in ("out_gate", "o", "d_h")}
    scratch |= {name: broad(1) for name in ("d_o", "mask", "d_scores")}
    scratch |= {name: narrow(1) for name in ("q_slope", "k_slope", "d_state", "decayed", "prefix")}
    scratch |= {
        "ready": plgpu.Barrier(num_arrivals=1, num_barriers=_STAGES),
        "arrivals": Arrivals.scratch(3, _STAGES + 1, interpret),
    }
    grid = (batch, heads)
    out = mg.launch(kernel, inputs, out_type, scratch, grid, interpret, name="mixed_heads_backward")
    return out["d_y"].reshape(y.shape), out["h"], out["d_steps"]
