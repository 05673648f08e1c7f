"""Backward SwiGLU behind its product."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

SIDE, ROWS, COLUMNS, FINISHERS = 64, 128, 128, 2
ACROSS = COLUMNS // SIDE
_LOG2_E = 1.4426950408889634


def backward(
    d_out, down, gate_up, *, stages=4, multipliers=1, units=2, band=1, cluster=1, profile="", programs=132,
    interpret=False,
):  # fmt: skip
    (M, D), (_, _, F), bf16 = d_out.shape, gate_up.shape, jnp.bfloat16
    steps = D // SIDE
    tiles_m, tiles_n = pl.cdiv(M, ROWS * cluster), pl.cdiv(F, COLUMNS)
    tiles = tiles_m * tiles_n
    programs //= cluster
    rows_each = ROWS // multipliers
    registers = {1: (24, 208, 136), 2: (24, 104, 120)}[multipliers]
    warpgroups = multipliers + FINISHERS + 1

    def body(x_ref, w_ref, gate_up_ref, d_ref, h_ref, *scratch):
        x_tiles, w_tiles, full, empty, sums_tiles, ready, done, in_tiles, arrived = scratch
        wg, program = lax.axis_index("wg"), lax.axis_index("program")
        rank = lax.axis_index("rank") if cluster > 1 else 0
        count = lax.div(tiles - 1 - program, programs) + 1
        loop = lambda low, high, step: lax.fori_loop(low, high, lambda i, _: step(i), None)

        def place(i):
            tile = program + i * programs
            whole = band * tiles_n
            first = lax.div(tile, whole) * band
            height = jnp.minimum(band, tiles_m - first)
            inside = lax.rem(tile, whole)
            row = first + lax.rem(inside, height)
            return (row * cluster + rank) * ROWS, lax.div(inside, height) * COLUMNS

        @pl.when(wg == warpgroups - 1)
        def _load():
            plgpu.set_max_registers(registers[0], action="decrease")

            def load_tile(i):
                row, column = place(i)

                def load_step(k):
                    number = i * steps + k
                    slot = lax.rem(number, stages)

                    @pl.when(number >= stages)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    channels = pl.ds(k * SIDE, SIDE)
                    plgpu.copy_gmem_to_smem(
                        x_ref.at[pl.ds(row, ROWS), channels], x_tiles.at[slot], full.at[slot]
                    )
                    plgpu.copy_gmem_to_smem(
                        w_ref.at[pl.ds(column, COLUMNS), channels], w_tiles.at[slot], full.at[slot],
                        **({"collective_axes": "rank"} if cluster > 1 else {}),
                    )

                loop(0, steps, load_step)

            loop(0, count, load_tile)
            total = count * steps
            last = lambda number: plgpu.barrier_wait(empty.at[lax.rem(number, stages)])
            loop(jnp.maximum(total - stages, 0), total, last)

        @pl.when(wg < multipliers)
        def _multiply():
            plgpu.set_max_registers(registers[1], action="increase" if registers[1] > (128 if multipliers == 1 else 96) else "decrease")
            rows = () if multipliers == 1 else (pl.ds(wg * rows_each, rows_each),)

            def take_tile(i):
                def run(sums):
                    def step(k):
                        slot = lax.rem(i * steps + k, stages)
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.wgmma(
                            sums, x_tiles.at[(slot, *rows)], w_tiles.at[slot].transpose((1, 0))
                        )
                        plgpu.wgmma_wait(1)

                        @pl.when(k > 0)
                        def _():
                            plgpu.barrier_arrive(empty.at[lax.rem(i * steps + k - 1, stages)])

                    with jax.named_scope("multiply"):
                        loop(0, steps, step)
                    value = sums[...]
                    plgpu.barrier_arrive(empty.at[lax.rem(i * steps + steps - 1, stages)])
                    return value.astype(bf16)

                value = pl.run_scoped(run, plgpu.ACC((rows_each, COLUMNS), jnp.float32))

                @pl.when(i > 0)
                def _():
                    with jax.named_scope("done"):
                        plgpu.barrier_wait(done)

                for r in range(rows_each // SIDE):
                    for c in range(ACROSS):
                        piece = value[r * SIDE : (r + 1) * SIDE, c * SIDE : (c + 1) * SIDE]
                        part = r if multipliers == 1 else wg
                        sums_tiles[part * ACROSS + c] = piece
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready)

            loop(0, count, take_tile)
            plgpu.barrier_wait(done)

        @pl.when((wg >= multipliers) & (wg < warpgroups - 1))
        def _finish():
            plgpu.set_max_registers(registers[2], action="increase")
            own = wg - multipliers

            def fetch(i, c):
                row, column = place(i)
                unit = own * units + c % units
                for part in range(2):
                    plgpu.copy_gmem_to_smem(
                        gate_up_ref.at[
                            pl.ds(row + own * SIDE, SIDE), part, pl.ds(column + c * SIDE, SIDE)
                        ],
                        in_tiles.at[unit, part],
                        arrived.at[unit],
                    )

            for c in range(ACROSS):
                fetch(0, c)

            def take_tile(i):
                row, column = place(i)
                with jax.named_scope("ready"):
                    plgpu.barrier_wait(ready)
                for c in range(ACROSS):
                    unit = own * units + c % units
                    with jax.named_scope("arrive"):
                        plgpu.barrier_wait(arrived.at[unit])
                    gate_tile, up_tile = in_tiles.at[unit, 0], in_tiles.at[unit, 1]
                    h_tile = sums_tiles.at[own * ACROSS + c]
                    with jax.named_scope("math"):
                        gate, up, d_h = (
                            tile[...].astype(jnp.float32) for tile in (gate_tile, up_tile, h_tile)
                        )
                        silu, slope = _silu(gate)
                        gate_tile[...] = (d_h * up * slope).astype(bf16)
                        up_tile[...] = (d_h * silu).astype(bf16)
                        h_tile[...] = (silu * up).astype(bf16)
                        plgpu.commit_smem()
                    where = pl.ds(row + own * SIDE, SIDE), pl.ds(column + c * SIDE, SIDE)
                    send = functools.partial(plgpu.copy_smem_to_gmem, commit_group=False)
                    send(gate_tile, d_ref.at[where[0], 0, where[1]])
                    send(up_tile, d_ref.at[where[0], 1, where[1]])
                    send(h_tile, h_ref.at[where])
                    plgpu.commit_smem_to_gmem_group()
                    if c > 0:
                        plgpu.wait_smem_to_gmem(1, wait_read_only=True)

                        @pl.when(i + 1 < count)
                        def _():
                            fetch(i + 1, c - 1)

                with jax.named_scope("sent"):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(done)

                @pl.when(i + 1 < count)
                def _():
                    fetch(i + 1, ACROSS - 1)

            loop(0, count, take_tile)

    swizzled = (plgpu.TilingTransform((8, SIDE)), plgpu.SwizzleTransform(128))
    tile = lambda *shape: plgpu.SMEM(shape, bf16, transforms=swizzled)
    kind = plgpu.Barrier
    if cluster > 1:
        kind = functools.partial(plgpu.ClusterBarrier, collective_axes=("rank",))
    body.__name__ = "swiglu_backward"
    clusters = {"cluster": (cluster,), "cluster_names": ("rank",)} if cluster > 1 else {}
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(s, bf16) for s in ((M, 2, F), (M, F))],
        scratch_types=[
            tile(stages, ROWS, SIDE),
            tile(stages, COLUMNS, SIDE),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            kind(num_arrivals=multipliers, num_barriers=stages),
            tile(ROWS // SIDE * ACROSS, SIDE, SIDE),
            plgpu.Barrier(num_arrivals=multipliers),
            plgpu.Barrier(num_arrivals=FINISHERS),
            tile(FINISHERS * units, 2, SIDE, SIDE),
            plgpu.Barrier(num_arrivals=2, num_barriers=FINISHERS * units),
        ],
        grid=(programs,),
        grid_names=("program",),
        **clusters,
        num_threads=warpgroups,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            **({"profile_dir": profile, "profile_space": 40, "profile_bounds_check": True} if profile else {}),
        ),
        **({"interpret": plgpu.InterpretGPUParams()} if interpret else {}),
    )(d_out, down, gate_up)


def _silu(x):
    root = lax.rsqrt(1.0 + jnp.exp2(x * -_LOG2_E))
    share = root * root
    y = x * share
    return y, share + y * (1.0 - share)
