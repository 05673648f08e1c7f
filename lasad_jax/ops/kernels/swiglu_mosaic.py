"""The product before a SwiGLU, and the SwiGLU, in one kernel on Hopper (Mosaic GPU, for bf16).

Gate, up and h are written at once, so that the elementwise work costs no pass over memory of its
own. Two warpgroups take tiles in turn: while one finishes and sends its own, the other has the
tensor cores.

M rows, D channels, F hidden channels. Gate and up lie side by side in blocks of 64 columns
(`interleave`), in memory and in the matrix, so that a tile holds both of a hidden channel.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16

from lasad_jax.ops.kernels.swiglu_mosaic_backward import backward
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
)

__all__ = ["backward", "forward"]

_STAGES = 5
_SLOTS = 3  # tiles of a warpgroup on their way out at once
_REGISTERS = {"load": 24, "multiply": 240}  # of a thread


def forward(
    x: BFloat16[Array, "M D"],
    gate_up: BFloat16[Array, "D 2*F"],
    *,
    programs: int | None = None,
    interpret: bool = False,
) -> tuple[BFloat16[Array, "M 2*F"], BFloat16[Array, "M F"]]:
    """both = x @ gate_up, and h = silu(gate) * up of the rounded gate and up.

    Args:
      x: the rows.
      gate_up: both matrices, interleaved.
      programs: at most as many as there are multiprocessors; None for that many.
      interpret: run on any platform, slowly.
    """
    (M, D), N = x.shape, gate_up.shape[1]
    steps = D // SIDE

    def swiglu_forward(x_ref, w_ref, both_ref, h_ref, x_tiles, w_tiles, full, empty, out_tiles):
        warpgroup, walk = lax.axis_index("wg"), Walk.over(M, N, programs)
        # Who waits for a barrier must wait each time: each warpgroup has its own.
        arrived = lambda owner, slot: full.at[owner * _STAGES + slot]

        @pl.when(warpgroup == 2)
        def _load():
            plgpu.set_max_registers(_REGISTERS["load"], action="decrease")

            def load(row, across, channels, slot, i):
                barrier = arrived(lax.rem(i, 2), slot)
                x_piece = x_ref.at[pl.ds(row, ROWS), channels]
                w_piece = w_ref.at[channels, pl.ds(across * COLUMNS, COLUMNS)]
                plgpu.copy_gmem_to_smem(x_piece, x_tiles.at[slot], barrier)
                plgpu.copy_gmem_to_smem(w_piece, w_tiles.at[slot], barrier)

            load_steps(walk, steps, empty, load)

        @pl.when(warpgroup < 2)
        def _multiply():
            plgpu.set_max_registers(_REGISTERS["multiply"], action="increase")

            def take(turn):
                i = 2 * turn + warpgroup
                factors = lambda slot: (x_tiles.at[slot], w_tiles.at[slot])
                sums = multiply(i, steps, lambda slot: arrived(warpgroup, slot), empty, factors)
                row, across = walk.place(i)
                for first in range(0, ROWS, SIDE):
                    gate, up = (_rounded(sums, first, column) for column in (0, SIDE))
                    leave = lambda *args, first=first: _leave(
                        out_tiles, warpgroup, row + first, *args
                    )
                    leave(0, gate, both_ref, across * COLUMNS)
                    leave(1, up, both_ref, across * COLUMNS + SIDE)
                    h, _ = silu(gate.astype(jnp.float32))
                    h = (h * up.astype(jnp.float32)).astype(jnp.bfloat16)
                    leave(2, h, h_ref, across * SIDE)

            loop(0, lax.div(walk.count - warpgroup + 1, 2), take)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    scratch = [
        tiles(_STAGES, ROWS, SIDE),
        tiles(_STAGES, SIDE, COLUMNS),
        plgpu.Barrier(num_arrivals=2, num_barriers=2 * _STAGES),
        plgpu.Barrier(num_barriers=_STAGES),
        tiles(2, _SLOTS, SIDE, SIDE),
    ]
    options = {"warpgroups": 3, "programs": programs, "interpret": interpret}
    return launch(swiglu_forward, (N, N // 2), scratch, (x, gate_up), **options)


def _rounded(sums, row, column):
    """A square of the sums in bf16."""
    square = sums[row : row + SIDE, column : column + SIDE].astype(jnp.bfloat16)
    # Two numbers at a time: left to itself, the compiler rounds one by one those that are
    # widened again, four times as slowly as it divides.
    return lax.optimization_barrier(square)


def _leave(out_tiles, warpgroup, row, slot, value, target, column):
    """Sends a square by one of the warpgroup's slots, which take turns."""
    plgpu.wait_smem_to_gmem(_SLOTS - 1, wait_read_only=True)
    tile = out_tiles.at[warpgroup, slot]
    tile[...] = value
    plgpu.commit_smem()
    send(tile, target, row, column)
