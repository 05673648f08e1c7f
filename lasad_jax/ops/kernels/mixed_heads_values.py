"""Backward through the mixed heads: the warpgroup of gate, norm and values."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lasad_jax.ops.kernels import mixed_heads_tiles as mh
from lasad_jax.ops.kernels import mosaic_tiles as mg
from lasad_jax.ops.kernels.mixed_heads_program import STAGES, Program

_REGISTERS = 120  # of a thread


def values(p: Program):
    """Through gate and norm; gradients of gates and values."""
    plgpu.set_max_registers(_REGISTERS, action="decrease")
    chunks, t = p.chunks, mg.transposed
    chunk_of = lambda i: chunks - 1 - i

    def fetch_gated(i):
        c = chunk_of(i)
        p.fetch("gated", "y", c, mh.OUT_GATE, p["out_gate"])
        for name in ("o", "d_h"):
            p.fetch("gated", name, c, 0, p[name])

    def fetch_values(i):
        slot = lax.rem(i, STAGES)
        p.fetch("values", "y", chunk_of(i), mh.V, p["v"].at[slot], slot)

    def through_gate():
        """d_o to its tile, h and the gate's gradient to those that o and gate came in."""
        o = p.load(p["o"])
        factor = mh.root_mean_square(o, p.epsilon)
        normal = o * factor
        silu, slope = mh.silu_and_slope(p.load(p["out_gate"]))
        d_h = p.load(p["d_h"])
        p["o"][...] = mh.narrow(normal * silu)
        p["out_gate"][...] = mh.narrow(d_h * normal * slope)
        d_normal = d_h * silu
        d_o = factor * (d_normal - normal * mh.mean(normal * d_normal))
        p["d_o"][...] = mh.narrow(d_o)

    def step(i, _):
        c, slot = chunk_of(i), lax.rem(i, STAGES)
        q_tile, k_tile, v_tile = (p[name].at[slot] for name in ("q", "k", "v"))
        p.arrivals["gated"].wait(p.own, i)
        through_gate()
        plgpu.commit_smem()
        plgpu.barrier_arrive(p["gave_d_o"])
        rows = pl.ds(c * mg.CHUNK, mg.CHUNK)
        plgpu.copy_smem_to_gmem(p["o"], p.outputs["h"].at[p.image, rows, p.head])
        p.leave(p["out_gate"], c, mh.OUT_GATE)

        plgpu.barrier_wait(p["gave_keys"])
        decays = p.decays(c)
        keys = mg.without_prefix(decays.row, mg.ROW, c, 1)
        (scores, dv), weights = p.multiply(
            [(k_tile, t(q_tile))],
            [(k_tile, t(p["d_state"]))],
            work=lambda: p.weights(decays, keys),
        )
        scores = mg.masked(scores, weights, p.scratch["mask"])

        def meanwhile():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(i + 1 < chunks)
            def _():
                fetch_gated(i + 1)
                pl.when(i > 0)(lambda: fetch_values(i + 1))

        to_end = jnp.exp2(decays.whole - keys)
        (dv,), _ = p.multiply([dv * mg.by_row(to_end), (scores, p["d_o"])], work=meanwhile)
        plgpu.barrier_arrive(p["read_keys"])
        plgpu.barrier_wait(p["read_d_o"])
        v_tile[...] = mh.narrow(dv)
        plgpu.commit_smem()
        p.leave(v_tile, c, mh.V)

    fetch_gated(jnp.int32(0))
    for i in range(min(STAGES, chunks)):
        fetch_values(jnp.int32(i))
    lax.fori_loop(0, chunks, step, None)
    plgpu.wait_smem_to_gmem(0)
    plgpu.barrier_arrive(p["left"])
