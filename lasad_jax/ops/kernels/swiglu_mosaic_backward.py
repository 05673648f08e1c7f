"""Backward of the product behind a SwiGLU, and of the SwiGLU, in one kernel (Mosaic GPU, Hopper).

d_h never reaches memory: gate and up come in, and their gradients and h go out. One warpgroup
multiplies, rounds the sums of a tile and leaves them in shared memory; two finish a tile while
the next one is multiplied, half of its rows each.

Letters and layout: `swiglu_mosaic`.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16

from lasad_jax.ops.kernels.swiglu_tiles import (
    COLUMNS,
    ROWS,
    SIDE,
    Walk,
    launch,
    load_steps,
    loop,
    multiply,
    send,
    silu,
    tiles,
    window,
)

_STAGES = 4
_FINISHERS = ROWS // SIDE
_ACROSS = COLUMNS // SIDE
_REGISTERS = {"load": 24, "multiply": 208, "finish": 136}  # of a thread


def backward(
    d_out: BFloat16[Array, "M D"],
    down: BFloat16[Array, "F D"],
    both: BFloat16[Array, "M 2*F"],
    *,
    programs: int | None = None,
    interpret: bool = False,
) -> tuple[BFloat16[Array, "M 2*F"], BFloat16[Array, "M F"]]:
    """The gradient with respect to `both` of d_h = d_out @ down.T, and h again.

    d_h is rounded to bf16, as if it had been written. Options: `swiglu_mosaic.forward`'s.
    """
    (M, D), F = d_out.shape, down.shape[0]
    steps = D // SIDE

    def swiglu_backward(x_ref, w_ref, both_ref, d_ref, h_ref, *scratch):
        x_tiles, w_tiles, full, empty, sums, ready, done, both_tiles, arrived = scratch
        warpgroup, walk = lax.axis_index("wg"), Walk.over(M, F, programs)

        @pl.when(warpgroup == 0)
        def _multiply():
            plgpu.set_max_registers(_REGISTERS["multiply"], action="increase")

            def take(i):
                factors = lambda slot: (x_tiles.at[slot], w_tiles.at[slot].transpose((1, 0)))
                value = multiply(i, steps, lambda slot: full.at[slot], empty, factors)
                value = value.astype(jnp.bfloat16)
                pl.when(i > 0)(lambda: plgpu.barrier_wait(done))
                for half in range(_FINISHERS):
                    for c in range(_ACROSS):
                        rows, columns = (slice(n * SIDE, (n + 1) * SIDE) for n in (half, c))
                        sums[half, c] = value[rows, columns]
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready)

            loop(0, walk.count, take)
            pl.when(walk.count > 0)(lambda: plgpu.barrier_wait(done))

        @pl.when((warpgroup > 0) & (warpgroup <= _FINISHERS))
        def _finish():
            plgpu.set_max_registers(_REGISTERS["finish"], action="increase")
            half = warpgroup - 1
            finisher = _Finisher(walk, half, both_ref, d_ref, h_ref, both_tiles, arrived)
            pl.when(walk.count > 0)(finisher.fetch_first)

            def finish(i):
                plgpu.barrier_wait(ready)
                finisher.finish(i, sums.at[half])
                plgpu.barrier_arrive(done)

            loop(0, walk.count, finish)

        @pl.when(warpgroup > _FINISHERS)
        def _load():
            plgpu.set_max_registers(_REGISTERS["load"], action="decrease")

            def load(row, across, channels, slot, i):
                x_piece = x_ref.at[pl.ds(row, ROWS), channels]
                w_piece = w_ref.at[pl.ds(across * COLUMNS, COLUMNS), channels]
                plgpu.copy_gmem_to_smem(x_piece, x_tiles.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(w_piece, w_tiles.at[slot], full.at[slot])

            load_steps(walk, steps, empty, load)

    units = _FINISHERS * _ACROSS
    scratch = [
        tiles(_STAGES, ROWS, SIDE),
        tiles(_STAGES, COLUMNS, SIDE),
        plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
        plgpu.Barrier(num_barriers=_STAGES),
        tiles(_FINISHERS, _ACROSS, SIDE, SIDE),
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=_FINISHERS),
        tiles(units, 2, SIDE, SIDE),
        plgpu.Barrier(num_arrivals=2, num_barriers=units),
    ]
    options = {"warpgroups": _FINISHERS + 2, "programs": programs, "interpret": interpret}
    return launch(swiglu_backward, (2 * F, F), scratch, (d_out, down, both), **options)


class _Finisher:
    """What a warpgroup does with its half of the rows of each tile, square by square."""

    def __init__(self, walk: Walk, half, both_ref, d_ref, h_ref, both_tiles, arrived):
        self._walk, self._half = walk, half
        self._both, self._d_both, self._h = both_ref, d_ref, h_ref
        self._tiles, self._arrived = both_tiles, arrived

    def fetch_first(self):
        for c in range(_ACROSS):
            self._fetch(0, c)

    def finish(self, i: jax.Array, sums: jax.Ref):
        """Of tile i, whose rounded sums may be overwritten afterwards."""
        wide = lambda tile: tile[...].astype(jnp.float32)
        row, columns = self._place(i)
        for c in range(_ACROSS):
            unit = self._half * _ACROSS + c
            gate_tile, up_tile, h_tile = (
                self._tiles.at[unit, 0],
                self._tiles.at[unit, 1],
                sums.at[c],
            )
            plgpu.barrier_wait(self._arrived.at[unit])
            gate, up, d_h = map(wide, (gate_tile, up_tile, h_tile))
            value, slope = silu(gate)
            gate_tile[...] = (d_h * up * slope).astype(jnp.bfloat16)
            up_tile[...] = (d_h * value).astype(jnp.bfloat16)
            h_tile[...] = (value * up).astype(jnp.bfloat16)
            plgpu.commit_smem()
            column = columns + c * SIDE
            send(gate_tile, self._d_both, row, 2 * column)
            send(up_tile, self._d_both, row, 2 * column + SIDE)
            send(h_tile, self._h, row, column)
            if c > 0:
                plgpu.wait_smem_to_gmem(3, wait_read_only=True)
                self._fetch_next(i, c - 1)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self._fetch_next(i, _ACROSS - 1)

    def _fetch_next(self, i, c):
        """Of the next tile, now that what lay in its place has left."""
        pl.when(i + 1 < self._walk.count)(lambda: self._fetch(i + 1, c))

    def _fetch(self, i, c):
        row, columns = self._place(i)
        unit = self._half * _ACROSS + c
        for part in range(2):
            square = window(row, 2 * (columns + c * SIDE) + part * SIDE)
            target = self._tiles.at[unit, part]
            plgpu.copy_gmem_to_smem(self._both.at[square], target, self._arrived.at[unit])

    def _place(self, i):
        """First row and hidden channel."""
        row, across = self._walk.place(i)
        return row + self._half * SIDE, across * COLUMNS
