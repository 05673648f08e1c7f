"""What the Mosaic GPU kernels are built of: 64 x 64 tiles, their products, pipeline and launch.

A tile in registers is spread over one warpgroup as wgmma leaves it. Vectors live spread by
row or by column of such a tile; shared memory holds tiles swizzled, as wgmma and TMA take
them.
"""

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
_TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_SQUARE = (64, 64)


def by_row(x):
    """(64,) by row to a whole tile."""
    return lax.broadcast_in_dim(x, _SQUARE, [0])


def by_column(x):
    """(64,) by column to a whole tile."""
    return lax.broadcast_in_dim(x, _SQUARE, [1])


def log2(x):
    """Natural logarithms as logarithms to base 2: exp2 is what the hardware has."""
    return x * math.log2(math.e)


def zeros():
    return plgpu.layout_cast(jnp.zeros(_SQUARE, jnp.float32), TILE)


def multiply(*pairs, work=lambda: None, interpret):
    """All products a @ b at once, and the result of `work()`, which is done while they run.

    b lies in shared memory, a there or in registers.
    """
    if interpret:  # JAX's interpreter knows no operands in registers
        value = lambda x: x if isinstance(x, jax.Array) else x[...]
        product = lambda a, b: jnp.dot(value(a), value(b), preferred_element_type=jnp.float32)
        return [product(a, b) for a, b in pairs], work()

    def run(*accumulators):
        for accumulator, (a, b) in zip(accumulators, pairs, strict=True):
            plgpu.wgmma(accumulator, a, b)
        done = work()
        return [accumulator[...] for accumulator in accumulators], done

    return pl.run_scoped(run, *[plgpu.ACC(_SQUARE, jnp.float32)] * len(pairs))


def iota(dimension):
    return plgpu.broadcasted_iota(jnp.int32, _SQUARE, dimension, layout=TILE)


def off_prefix(tile, dimension, chunk, num_prefix, value):
    """Puts `value` in the rows or columns of prefix tokens, all of them in chunk 0."""
    if not num_prefix:
        return tile
    return jnp.where(iota(dimension) < jnp.where(chunk == 0, num_prefix, 0), value, tile)


def fetch_prefix(inputs, b, h, num_prefix, tiles):
    """Keys and values of the prefix tokens as float32, by column."""
    if not num_prefix:
        return []
    memory, barrier = tiles
    for i, name in enumerate("kv"):
        for p in range(num_prefix):
            plgpu.copy_gmem_to_smem(inputs[name].at[b, p, h], memory.at[i, p], barrier)
    plgpu.barrier_wait(barrier)
    row = lambda i, p: plgpu.load(memory.at[i, p], layout=COLUMN).astype(jnp.float32)
    return [(row(0, p), row(1, p)) for p in range(num_prefix)]


def read_prefix(tile, prefix_row, p, chunk):
    """Products of the tokens of a tile with prefix row p; tokens before p do not see it."""
    tokens = tile[...].astype(jnp.float32)
    if p:
        tokens = jnp.where(iota(0) >= jnp.where(chunk == 0, p, 0), tokens, 0.0)
    return jnp.sum(tokens * by_column(prefix_row), axis=1)


def prefix_gradients(q_tile, do_tile, prefix_rows, p, chunk, sums):
    """A prefix row's part of dq, and its own gradients with this chunk's added to `sums`."""
    (row_k, row_v), (d_row_k, d_row_v) = prefix_rows, sums
    score, d_score = read_prefix(q_tile, row_k, p, chunk), read_prefix(do_tile, row_v, p, chunk)
    d_row_k += jnp.sum(by_row(d_score) * q_tile[...].astype(jnp.float32), axis=0)
    d_row_v += jnp.sum(by_row(score) * do_tile[...].astype(jnp.float32), axis=0)
    return by_row(d_score) * by_column(row_k), (d_row_k, d_row_v)


def pipeline(body, inputs, tokens, squares, b, h, chunk_of, chunks, stages, carry):
    """Runs `body` on one chunk after another while later ones are fetched.

    Arguments `tokens` name (B, N, H, D) inputs, rows past N read as zero; `squares` name
    (B, H, M, D, D) inputs. Two copies of the chunk's decays follow, since one copy cannot
    be laid out both by row and by column.
    """
    token = plgpu.BlockSpec(
        (None, CHUNK, None, DIM), lambda i: (b, chunk_of(i), h, 0), transforms=_TRANSFORMS
    )
    square = plgpu.BlockSpec(
        (None, None, None, DIM, DIM), lambda i: (b, h, chunk_of(i), 0, 0), transforms=_TRANSFORMS
    )
    own = b if inputs["b"].shape[0] > 1 else 0
    decays = plgpu.BlockSpec((None, None, None, CHUNK), lambda i: (own, h, chunk_of(i), 0))
    return plgpu.emit_pipeline(
        body,
        grid=(chunks,),
        in_specs=[token] * len(tokens) + [square] * len(squares) + [decays] * 2,
        max_concurrent_steps=stages,
        init_carry=carry,
    )(*(inputs[name] for name in (*tokens, *squares, "b", "b")))


def launch(kernel, inputs, out_type, num_tiles, num_prefix, grid, interpret, *, name):
    """One program of one warpgroup for each (batch, head, segment); profilers show `name`."""
    prefix_tiles = ()
    if num_prefix:
        rows = plgpu.SMEM((2, num_prefix, DIM), jnp.bfloat16)
        prefix_tiles = (rows, plgpu.Barrier(num_arrivals=2 * num_prefix))
    tiles = plgpu.SMEM((num_tiles, *_SQUARE), jnp.bfloat16, transforms=_TRANSFORMS)
    scratch = (tiles, prefix_tiles)
    in_names, out_names = list(inputs), list(out_type)

    def body(*refs):
        ins, outs = refs[: len(in_names)], refs[len(in_names) : len(in_names) + len(out_names)]
        kernel(
            dict(zip(in_names, ins, strict=True)),
            dict(zip(out_names, outs, strict=True)),
            *refs[len(in_names) + len(out_names) :],
        )

    body.__name__ = name
    out = plgpu.kernel(
        body,
        out_type=list(out_type.values()),
        scratch_types=scratch,
        grid=grid,
        grid_names=("b", "h", "z"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": plgpu.InterpretGPUParams()} if interpret else {}),
    )(*inputs.values())
    return dict(zip(out_names, out, strict=True))
