"""What the Mosaic GPU kernels are built of: tiles of 64 rows, their products, walk and launch.

A tile in registers is spread over one warpgroup as wgmma leaves it. Vectors live spread by
row or by column of such a tile; shared memory holds tiles swizzled, as wgmma and TMA take
them.

The compiler adds no barriers of its own (`launch`). Within a warpgroup, then: a warp reads
and writes its own 16 rows of a tile as it likes; before wgmma or TMA read what was written,
`plgpu.commit_smem`; a tile that wgmma reads may be overwritten once a later `multiply` or
`commit_smem` is through, since neither returns before every warp has begun it.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 64
DIM = 64

TILE = plgpu.Layout.WGMMA
ROW = TILE.reduce(1)  # a number per row of a tile
COLUMN = TILE.reduce(0)  # a number per column of a tile


# Values in registers


def by_row(x, width=DIM):
    """(64,) by row to a whole tile."""
    return lax.broadcast_in_dim(x, (CHUNK, width), [0])


def by_column(x):
    """(width,) by column to a whole tile."""
    return lax.broadcast_in_dim(x, (CHUNK, x.shape[0]), [1])


def zeros(width=DIM):
    return plgpu.layout_cast(jnp.zeros((CHUNK, width), jnp.float32), TILE)


def without_prefix(since, layout, chunk, num_prefix):
    """Puts +inf for prefix tokens, all of them in chunk 0: as keys, they then weigh nothing."""
    if not num_prefix:
        return since
    token = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=layout)
    return jnp.where(token < jnp.where(chunk == 0, num_prefix, 0), jnp.inf, since)


def masked(scores, weights, mask_tile):
    """scores * weights in bf16 where the mask has ones, else 0, whatever the product is."""
    bits = lambda x: lax.bitcast_convert_type(x, jnp.int16)
    weighted = (scores * weights).astype(jnp.bfloat16)
    return lax.bitcast_convert_type(bits(weighted) & bits(mask_tile[...]), jnp.bfloat16)


def fill_mask(mask_tile, queries):
    """Ones where the query, by row or by column (`queries` 0 or 1), is no earlier than the key."""
    visible = iota(queries) >= iota(1 - queries)
    bits = jnp.where(visible, -1, 0).astype(jnp.int16)
    mask_tile[...] = lax.bitcast_convert_type(bits, jnp.bfloat16)


def iota(dimension, width=DIM):
    return plgpu.broadcasted_iota(jnp.int32, (CHUNK, width), dimension, layout=TILE)


def multiply(*sums, work=lambda: None, interpret):
    """Sums of products, all at once, and the result of `work()`, which is done while they run.

    Each of `sums` lists pairs (a, b) whose products a @ b are added, after a tile to start from
    if there is one. b lies in shared memory, a there or in registers.
    """
    if interpret:  # JAX's interpreter knows no operands in registers
        value = lambda x: x if isinstance(x, jax.Array) else x[...]
        product = lambda a, b: jnp.dot(value(a), value(b), preferred_element_type=jnp.float32)
        add = lambda terms: sum(product(*x) if isinstance(x, tuple) else x for x in terms)
        return [add(terms) for terms in sums], work()

    def run(*accumulators):
        for accumulator, terms in zip(accumulators, sums, strict=True):
            for term in terms:
                if isinstance(term, tuple):
                    plgpu.wgmma(accumulator, *term)
                else:
                    accumulator[...] = term
        done = work()
        return [accumulator[...] for accumulator in accumulators], done

    shape = lambda term: (CHUNK, (term[1] if isinstance(term, tuple) else term).shape[1])
    return pl.run_scoped(run, *(plgpu.ACC(shape(terms[0]), jnp.float32) for terms in sums))


def transposed(tile):
    return tile.transpose((1, 0))


# The walk over chunks


@dataclasses.dataclass(frozen=True)
class Decays:
    """Logarithms to base 2 (exp2 is what the hardware has) of a chunk's decays.

    Attributes:
      row, column: since the chunk's start, by row and by column.
      whole: of the whole chunk, a number.
    """

    row: jax.Array
    column: jax.Array
    whole: jax.Array

    @classmethod
    def load(cls, b, *, base=math.e):
        """From running sums of logarithms in shared memory."""
        log2 = lambda x: x if base == 2 else x * math.log2(base)
        # Not "optimized": that would ask for a second copy of b, laid out for columns.
        column = plgpu.load(b, layout=COLUMN, optimized=False)
        return cls(log2(plgpu.load(b, layout=ROW)), log2(column), log2(b[CHUNK - 1]))


def walk(step, inputs, names, batch, head, chunk_of, chunks, buffers, carry, prepare=lambda: None):
    """Carries a value through the chunks of one program while later ones are fetched.

    Args:
      step: (chunk, tiles, decays, fetch, carry) to carry. `fetch()`, to be called once after
        a barrier, begins to load a later chunk over the tiles of the step before.
      inputs: of the kernel, with "b".
      names: of (B, N, H, D) inputs, in the order of `tiles`; rows past N read as zero.
      batch, head: of the program.
      chunk_of: step number to chunk.
      chunks: number of steps.
      buffers: see `walk_buffers`.
      carry: the first.
      prepare: called while the first chunks are on their way.
    """
    slots, b_slots, ready = buffers
    stages = slots.shape[0]
    own = batch if inputs["b"].shape[0] > 1 else 0

    def fetch(i):
        slot, chunk = lax.rem(i, stages), chunk_of(i)
        rows = pl.ds(chunk * CHUNK, CHUNK)
        for j, name in enumerate(names):
            source = inputs[name].at[batch, rows, head]
            plgpu.copy_gmem_to_smem(source, slots.at[slot, j], ready.at[slot])
        source = inputs["b"].at[own, head, chunk]
        plgpu.copy_gmem_to_smem(source, b_slots.at[slot], ready.at[slot])

    for i in range(min(stages, chunks)):
        fetch(jnp.int32(i))
    prepare()

    def one(i, carry):
        slot = lax.rem(i, stages)
        plgpu.barrier_wait(ready.at[slot])
        later = i + stages - 1
        fetch_later = lambda: pl.when((i > 0) & (later < chunks))(lambda: fetch(later))
        tiles = [slots.at[slot, j] for j in range(len(names))]
        return step(chunk_of(i), tiles, Decays.load(b_slots.at[slot]), fetch_later, carry)

    return lax.fori_loop(0, chunks, one, carry)


def walk_buffers(num_tensors, stages):
    """Scratch memory of a `walk` over so many (B, N, H, D) inputs, `stages` chunks at a time."""
    return (
        tiles(stages, num_tensors),
        plgpu.SMEM((stages, CHUNK), jnp.float32),
        plgpu.Barrier(num_arrivals=num_tensors + 1, num_barriers=stages),
    )


def tiles(*lead, width=DIM, swizzle=128):
    """Scratch memory for tiles. wgmma takes two of the same swizzle, in bytes."""
    transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM((*lead, CHUNK, width), jnp.bfloat16, transforms=transforms)


# The prefix token


def prefix_buffers():
    """Scratch memory of the prefix token: key, value, and a vector to turn."""
    row = plgpu.SMEM((DIM,), jnp.bfloat16)
    return row, row, plgpu.SMEM((DIM,), jnp.float32), plgpu.Barrier(num_arrivals=2)


def _fetch_prefix(inputs, batch, head, buffers):
    """Begins to load it."""
    key, value, _, ready = buffers
    plgpu.copy_gmem_to_smem(inputs["k"].at[batch, 0, head], key, ready)
    plgpu.copy_gmem_to_smem(inputs["v"].at[batch, 0, head], value, ready)


def _multiply_prefix(buffers, tile):
    """k_p v_p^T in bf16 to shared memory, once loaded; commit it before use."""
    plgpu.barrier_wait(buffers[-1])
    key, value = _prefix(buffers)
    tile[...] = (key * value).astype(jnp.bfloat16)


def fill_tiles(inputs, batch, head, mask_tile, queries, buffers, *prefix_tile):
    """Fills what a walk only reads, the mask and the product of a prefix token if there is one."""
    if prefix_tile:
        _fetch_prefix(inputs, batch, head, buffers)
    fill_mask(mask_tile, queries)
    if prefix_tile:
        _multiply_prefix(buffers, *prefix_tile)
    plgpu.commit_smem()


def put_prefix_gradients(buffers, d_product, dk_tile, dv_tile):
    """To the first rows of tiles on their way out, from the gradient of k_p v_p^T."""
    key, value = _prefix(buffers)
    turned = buffers[2]
    turned[...] = jnp.sum(d_product * value, axis=1)
    dv = jnp.sum(d_product * key, axis=0)
    plgpu.commit_smem()
    dk = plgpu.load(turned, layout=COLUMN, optimized=False)
    first = iota(0) == 0
    for tile, row in ((dk_tile, dk), (dv_tile, dv)):
        rows = jnp.where(first, by_column(row), tile[...].astype(jnp.float32))
        tile[...] = rows.astype(jnp.bfloat16)


def _prefix(buffers):
    """Its key by row and its value by column, each as a whole tile."""
    key = plgpu.load(buffers[0], layout=ROW)
    value = plgpu.load(buffers[1], layout=COLUMN, optimized=False)
    return by_row(key.astype(jnp.float32)), by_column(value.astype(jnp.float32))


# The launch


def launch(kernel, inputs, out_type, scratch, grid, interpret, *, name, warpgroups=1):
    """One program for each place of a grid along "b", "h" and "z"; profilers show `name`.

    kernel: called with dictionaries of inputs, outputs and scratch memory.
    warpgroups: of a program, along "wg" if there are several.
    """
    names = [list(x) for x in (inputs, out_type, scratch)]

    def body(*refs):
        refs = iter(refs)
        kernel(*({name: next(refs) for name in group} for group in names))

    body.__name__ = name
    out = plgpu.kernel(
        body,
        out_type=list(out_type.values()),
        scratch_types=list(scratch.values()),
        grid=grid,
        grid_names=tuple("bhz"[: len(grid)]),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=4 * 4 * DIM,
        ),
        **({"num_threads": warpgroups, "thread_name": "wg"} if warpgroups > 1 else {}),
        **({"interpret": plgpu.InterpretGPUParams()} if interpret else {}),
    )(*inputs.values())
    return dict(zip(out_type, out, strict=True))
