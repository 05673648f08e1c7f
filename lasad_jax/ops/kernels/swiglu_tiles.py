"""What both products with a SwiGLU inside are built of (`swiglu_mosaic`), beside `mosaic_tiles`.

Each multiprocessor has one program that walks over tiles of the result. One of its warpgroups
loads, as many steps ahead as shared memory holds; others multiply and finish.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lasad_jax.ops.kernels.layer_tiling import num_programs

# Of the square tiles in which numbers come and go: the columns by which gate and up alternate.
SIDE = 64
ROWS, COLUMNS = 128, 128  # of what a warpgroup multiplies at a time
_LOG2_E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class Walk:
    """The tiles of one program, in their order.

    Attributes:
      across: how many lie side by side.
      programs: of the launch.
      count: how many are this program's.
    """

    across: int
    programs: int
    count: jax.Array

    @classmethod
    def over(cls, M: int, N: int, programs: int | None) -> "Walk":
        """All tiles of a result (M, N), inside a program."""
        down, across = pl.cdiv(M, ROWS), pl.cdiv(N, COLUMNS)
        programs = programs or num_programs()
        left = down * across - lax.axis_index("program")
        return cls(across, programs, lax.div(left + programs - 1, programs))

    def place(self, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of this program's tile i: its first row, and which tile across it is."""
        tile = lax.axis_index("program") + i * self.programs
        return lax.div(tile, self.across) * ROWS, lax.rem(tile, self.across)


def load_steps(walk: Walk, steps: int, empty: jax.Ref, load: Callable) -> None:
    """Of all tiles, one step after the other: load(row, across, channels, slot, number of the
    tile) once what was in the slot has been read."""
    stages = empty.shape[0]

    def load_tile(i):
        row, across = walk.place(i)

        def load_step(k):
            number = i * steps + k
            slot = lax.rem(number, stages)
            pl.when(number >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
            load(row, across, pl.ds(k * SIDE, SIDE), slot, i)

        loop(0, steps, load_step)

    loop(0, walk.count, load_tile)
    # The last uses of slots, for which no refill has waited: an arrival that nobody sees is an
    # error to JAX's interpreter.
    total = walk.count * steps
    last = lambda number: plgpu.barrier_wait(empty.at[lax.rem(number, stages)])
    loop(jnp.maximum(total - stages, 0), total, last)


def multiply(i: jax.Array, steps: int, arrived: Callable, empty: jax.Ref, factors: Callable):
    """The sums of tile i, in float32.

    Args:
      arrived: the barrier of a slot's arrival.
      empty: of each slot, to be told that it has been read.
      factors: both tiles in a slot.
    """
    stages = empty.shape[0]
    slot_of = lambda k: lax.rem(i * steps + k, stages)

    def run(sums):
        def step(k):
            plgpu.barrier_wait(arrived(slot_of(k)))
            plgpu.wgmma(sums, *factors(slot_of(k)))
            plgpu.wgmma_wait(1)
            # The step before this one has now read its slot.
            pl.when(k > 0)(lambda: plgpu.barrier_arrive(empty.at[slot_of(k - 1)]))

        loop(0, steps, step)
        value = sums[...]
        plgpu.barrier_arrive(empty.at[slot_of(steps - 1)])
        return value

    return pl.run_scoped(run, plgpu.ACC((ROWS, COLUMNS), jnp.float32))


def launch(body, out_widths, scratch, inputs, *, warpgroups, programs, interpret):
    """Runs body(*inputs, *results, *scratch) as programs of so many warpgroups ("wg"), for
    bf16 results of as many rows as the first input has."""
    out = [jax.ShapeDtypeStruct((len(inputs[0]), width), jnp.bfloat16) for width in out_widths]
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=(programs or num_programs(),),
        grid_names=("program",),
        num_threads=warpgroups,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        **({"interpret": plgpu.InterpretGPUParams()} if interpret else {}),
    )(*inputs)


def loop(low, high, step: Callable) -> None:
    lax.fori_loop(low, high, lambda i, _: step(i), None)


def tiles(*shape: int) -> plgpu.SMEM:
    """Tiles in shared memory, swizzled as wgmma and TMA take them."""
    transforms = plgpu.TilingTransform((8, SIDE)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def window(row, column) -> tuple:
    """Of an array, what a square tile holds."""
    return pl.ds(row, SIDE), pl.ds(column, SIDE)


def send(tile: jax.Ref, target: jax.Ref, row, column) -> None:
    """A square tile on its way to memory."""
    plgpu.copy_smem_to_gmem(tile, target.at[window(row, column)])


def silu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """silu and its derivative. 1 / y costs many instructions; 1 / sqrt(y) is one of them."""
    root = lax.rsqrt(1.0 + jnp.exp2(x * -_LOG2_E))
    share = root * root
    y = x * share
    return y, share + y * (1.0 - share)
