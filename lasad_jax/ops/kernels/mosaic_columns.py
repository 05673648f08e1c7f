"""TMA between tiles of 32 columns' multiples and the columns of (B, N, H, W) arrays of any W.

Pallas' own copies ask for a W that whole tiles divide.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith

from lasad_jax.ops.kernels import mosaic_tiles as mg

SWIZZLE = 64
_TILING = (8, SWIZZLE // 2)
_TRANSFORMS = (plgpu.TilingTransform(_TILING), plgpu.SwizzleTransform(SWIZZLE))
_TILE, _REF = plgpu.RefType(_TRANSFORMS), plgpu.RefType()
_NUMBER = plgpu.Layout.WG_SPLAT(())


def tiles(*lead, width):
    """Scratch memory for tiles that wgmma can take together, be they 32 or 64 wide."""
    return mg.tiles(*lead, width=width, swizzle=SWIZZLE)


@dataclasses.dataclass(frozen=True)
class Arrivals:
    """Barriers, one for each stage, of tiles on their way.

    Attributes:
      barriers: see `scratch`.
      interpret: whether JAX's interpreter runs the kernel, which knows no code of one's own.
    """

    barriers: jax.Ref
    interpret: bool

    @staticmethod
    def scratch(copies, stages, interpret):
        """Scratch memory for so many copies at each stage."""
        if interpret:
            return plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
        return plgpu.SMEM((2 * stages,), jnp.int32)

    def start(self, copies):
        """To be called by all threads before the first copy; the memory is `scratch`'s."""
        if self.interpret:
            return

        @plgpu.inline_mgpu(arg_types=(_REF,))
        def initialize(_, memory):
            barriers = _barriers(memory)
            first = mgpu.utils.single_thread_predicate(mgpu.ThreadSubset.BLOCK)
            for barrier in barriers:
                mgpu.utils.nvvm.mbarrier_init(
                    barrier.get_ptr(), mgpu.c(copies, _int32()), predicate=first
                )
            fence = "fence.mbarrier_init.release.cluster;"
            mgpu.utils.inline_ptx(fence, has_side_effects=True)
            mgpu.utils.warpgroup_barrier()

        initialize(self.barriers)

    def fetch(self, source, image, row, head, column, tile, stage):
        """Begins to load a tile from a row and a column on; rows past N read as zero."""
        if self.interpret:
            source = source.at[image, pl.ds(row, mg.CHUNK), head, pl.ds(column, tile.shape[1])]
            plgpu.copy_gmem_to_smem(source, tile, self.barriers.at[stage])
            return

        @plgpu.inline_mgpu(arg_types=(_REF, _TILE, _REF, *[_NUMBER] * 5))
        def load(context, source, tile, memory, image, row, head, column, stage):
            where, options = _copy(tile, image, row, head, column)
            context.async_copy(
                src_ref=source,
                dst_ref=tile,
                barrier=_barriers(memory)[_number(stage)],
                arrive=True,
                gmem_slice=where,
                **options,
            )

        load(source, tile, self.barriers, *map(jnp.int32, (image, row, head, column, stage)))

    def wait(self, stage, turn):
        """Until all of a stage's copies have come, for the turn-th time that it is waited for."""
        if self.interpret:
            plgpu.barrier_wait(self.barriers.at[stage])
            return

        @plgpu.inline_mgpu(arg_types=(_REF, _NUMBER, _NUMBER))
        def await_(_, memory, stage, turn):
            odd = arith.trunci(ir.IntegerType.get_signless(1), turn.registers.item())
            _barriers(memory)[_number(stage)].wait_parity(odd)

        await_(self.barriers, *map(jnp.int32, (stage, turn)))


def store(tile, out, image, row, head, column, interpret):
    """Begins to write a tile, as `plgpu.copy_smem_to_gmem` does; rows past N are left out."""
    if interpret:
        out = out.at[image, pl.ds(row, mg.CHUNK), head, pl.ds(column, tile.shape[1])]
        plgpu.copy_smem_to_gmem(tile, out)
        return

    @plgpu.inline_mgpu(arg_types=(_TILE, _REF, *[_NUMBER] * 4))
    def write(context, tile, out, image, row, head, column):
        where, options = _copy(tile, image, row, head, column)
        context.async_copy(src_ref=tile, dst_ref=out, arrive=True, gmem_slice=where, **options)

    write(tile, out, *map(jnp.int32, (image, row, head, column)))


def _copy(tile, image, row, head, column):
    """Where in global memory, and how tiles lie."""
    _, num_tiles, _, width = ir.MemRefType(tile.type).shape
    index = functools.partial(arith.index_cast, ir.IndexType.get())
    image, row, head, column = (index(x.registers.item()) for x in (image, row, head, column))
    where = (image, mgpu.ds(row, mg.CHUNK), head, mgpu.ds(column, num_tiles * width))
    # The columns that fill no tile are beyond what is copied.
    tiling = mgpu.TileTransform(_TILING, rounding=mgpu.launch_context.Rounding.DOWN)
    return where, {"gmem_transform": (tiling,), "swizzle": SWIZZLE}


def _barriers(memory):
    count = ir.MemRefType(memory.type).shape[0] // 2
    return mgpu.BarrierRef(mgpu.utils.memref_ptr(memory), mgpu.c(0, _int32()), None, count)


def _number(x):
    return x.registers.item()


def _int32():
    return ir.IntegerType.get_signless(32)
