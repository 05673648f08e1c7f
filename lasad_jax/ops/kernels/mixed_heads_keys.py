"""Backward through the mixed heads: the warpgroup of queries, keys, decays and the state."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lasad_jax.ops.kernels import mixed_heads_decays as md
from lasad_jax.ops.kernels import mixed_heads_tiles as mh
from lasad_jax.ops.kernels import mosaic_tiles as mg
from lasad_jax.ops.kernels.mixed_heads_program import STAGES, Program

_REGISTERS = 136  # of a thread


def keys(p: Program):
    """Gradients of queries, keys, decays and the prefix token."""
    plgpu.set_max_registers(_REGISTERS, action="increase")
    chunks, t, inputs = p.chunks, mg.transposed, p.inputs
    chunk_of = lambda i: chunks - 1 - i

    def load_decays(c):
        p.group(c)[...] = md.log_decays(inputs, *p.place, c, p.interpret)
        plgpu.commit_smem()

    def put_decays(c):
        """The gradients of a group whose chunks are done."""
        sums = md.load(p["change"]), md.load(p["through"])
        d_g, d_gate = md.gradients(*sums, inputs, *p.place, c, p.interpret)
        out = p.outputs["d_steps"].at[p.place]
        out[0, pl.ds(c, md.CHUNKS)] = d_g
        if d_gate is not None:
            out[1, pl.ds(c, md.CHUNKS)] = d_gate
            md.put_gates(p.outputs["d_y"], d_gate, p.image, c, p.head, p.interpret)

    def fetch(i):
        c, slot = chunk_of(i), lax.rem(i, STAGES)
        for name, column in (("q", mh.Q), ("k", mh.K)):
            p.fetch("keys", "y", c, column, p[name].at[slot], slot)
        state_tile, arrived = p["state"].at[slot], state_barrier(slot)

        @pl.when(c > 0)
        def _():
            plgpu.copy_gmem_to_smem(inputs["states"].at[*p.place, c - 1], state_tile, arrived)

        @pl.when(c == 0)
        def _():
            state_tile[...] = jnp.zeros(state_tile.shape, jnp.bfloat16)
            plgpu.barrier_arrive(arrived)

    def state_barrier(slot):
        return p.scratch["states"].at[p.own * STAGES + slot]

    def activate(tile, slope_tile, turn):
        x, slope = mh.silu_and_slope(p.load(tile))
        slope_tile[...] = mh.narrow(slope)
        x = turn(x)
        tile[...] = mh.narrow(x)
        return x

    def d_active(d_x, slope_tile, turn):
        slope_tile[...] = mh.narrow(turn(d_x, back=True) * p.load(slope_tile))

    def step(i, carry):
        d_state, d_prefix = carry
        c, slot = chunk_of(i), lax.rem(i, STAGES)
        in_group = lax.rem(c, md.CHUNKS)
        stage, turn_of_stage = p.own * STAGES + slot, lax.div(i, STAGES)
        q_tile, k_tile, v_tile, state_tile = (p[x].at[slot] for x in ("q", "k", "v", "state"))
        if chunks > md.CHUNKS:
            new = (i > 0) & (in_group == md.CHUNKS - 1)
            pl.when(new)(lambda: load_decays(c - (md.CHUNKS - 1)))
        turn = p.turns(c)
        decays = p.decays(c)
        from_start = jnp.exp2(decays.row + p.scale)
        p.arrivals["keys"].wait(stage, turn_of_stage)
        # The gradients of queries and keys of the step before left from the slopes' tiles.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        q = activate(q_tile, p["q_slope"], turn)
        p["decayed"][...] = mh.narrow(q * mg.by_row(from_start, mh.KEY_DIM))
        activate(k_tile, p["k_slope"], turn)
        pl.when(i > 0)(lambda: plgpu.barrier_wait(p["read_keys"]))
        p["d_state"][...] = mh.narrow(d_state)
        plgpu.commit_smem()
        plgpu.barrier_arrive(p["gave_keys"])
        pl.when((i > 0) & (i + 1 < chunks))(lambda: fetch(i + 1))

        keys = mg.without_prefix(decays.row, mg.ROW, c, 1)
        p.arrivals["values"].wait(stage, turn_of_stage)
        plgpu.barrier_wait(p["gave_d_o"])
        (d_scores,), weights = p.multiply(
            [(v_tile, t(p["d_o"]))], work=lambda: p.weights(decays, keys)
        )
        d_scores = mg.masked(d_scores, weights, p.scratch["mask"])
        p["d_scores"][...] = d_scores
        plgpu.barrier_wait(state_barrier(slot))
        (dk, dq, dq_prefix, d_state, d_prefix), _ = p.multiply(
            [(v_tile, p["d_state"])],
            [(p["d_o"], state_tile)],
            [(p["d_o"], p["prefix"])],
            [d_state * jnp.exp2(decays.whole), (t(p["d_o"]), p["decayed"])],
            [d_prefix, (t(p["d_o"]), q_tile)],
        )
        plgpu.commit_smem()
        plgpu.barrier_arrive(p["read_d_o"])

        def last():
            # Again: the registers that would keep it are short.
            return jnp.sum(p.load(state_tile) * d_state, axis=1), p.turns(c)

        to_end = jnp.exp2(decays.whole - keys)
        (dk, dq), (through, turn) = p.multiply(
            [dk * mg.by_row(to_end, mh.KEY_DIM), (d_scores, q_tile)],
            [dq * mg.by_row(from_start, mh.KEY_DIM), (t(p["d_scores"]), k_tile)],
            work=last,
        )
        change = p.load(k_tile) * dk - p.load(q_tile) * dq
        p["change"].at[in_group][...] = jnp.sum(change, axis=1)
        p["through"].at[in_group][...] = through
        d_active(dq + dq_prefix, p["q_slope"], turn)
        d_active(dk, p["k_slope"], turn)
        plgpu.commit_smem()
        p.leave(p["q_slope"], c, mh.Q)
        p.leave(p["k_slope"], c, mh.K)
        if chunks > md.CHUNKS:
            pl.when((c > 0) & (in_group == 0))(lambda: put_decays(c))
        return d_state, d_prefix

    for i in range(min(STAGES, chunks)):
        fetch(jnp.int32(i))
    load_decays((chunks - 1) // md.CHUNKS * md.CHUNKS)
    prefix = lambda: mh.Prefix.load(inputs["y"], inputs.get("table"), *p.place, p.interpret)
    p["prefix"][...] = mh.narrow(prefix().product() * p.q_scale)
    plgpu.commit_smem()
    carry = mg.zeros(mh.KEY_DIM), mg.zeros(mh.KEY_DIM)
    _, d_prefix = lax.fori_loop(0, chunks, step, carry)
    put_decays(0)
    # The prefix token's key and value: over what the first chunk wrote there.
    plgpu.barrier_wait(p["read_keys"])
    plgpu.barrier_wait(p["left"])
    plgpu.wait_smem_to_gmem(0)
    # Sums over rows go through memory that all warpgroups share.
    summed = p.scratch["summed"].at[0]
    pl.when(p.own > 0)(lambda: plgpu.barrier_wait(summed))
    d_key, d_value = prefix().gradients(d_prefix * p.q_scale, p["change"].at[0])
    pl.when((p.own == 0) & ~p.is_last)(lambda: plgpu.barrier_arrive(summed))
    for x, column in ((d_key, mh.K), (d_value, mh.V)):
        out = p.outputs["d_y"].at[p.image, 0, p.head, pl.ds(column, x.shape[0])]
        mh.put(out, mh.narrow(x))
