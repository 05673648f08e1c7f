"""The norm and local convolution of a token (`decode_layers`).

What its neighbours add does not wait for the token: a few rows of a program (`neighbours`). The
rest is done by each program to the rows that it multiplies, on their way (`load_rows`):

    z = x / rms(x)        y = (1 + taps[0]) z + neighbours
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lasad_jax.ops.kernels.layer_pipeline import (
    Pipeline,
    load_across,
    next_slot,
    put_across,
    rolled_loop,
)
from lasad_jax.ops.kernels.layer_tiling import DEPTH, MOST_ROWS, UNIT, Product
from lasad_jax.ops.kernels.mosaic_tiles import COLUMN, ROW, by_column, by_row

STAGES = 2  # pieces of rows that become operands
_MOST_ROWS = 8  # at once
_MOST_TAPS = 4  # at once: loads of more would take too many instructions, of fewer too long


def blocks_of_rows(num_rows: int, programs: int) -> list[tuple[int, int]]:
    """(first, each) of every turn: program p takes `each` rows from first + each * p on."""
    each = min(pl.next_power_of_2(pl.cdiv(num_rows, programs)), _MOST_ROWS)
    return [(first, each) for first in range(0, num_rows, each * programs)]


def neighbours(recent, taps, offsets, index, columns: int, rows: list, target: jax.Ref) -> None:
    """What the neighbours add to some rows. Arguments: `decode_layers.all_layers`'s.

    offsets: but for the token's own.
    rows: those beyond the images get what the last image does: in a block of heads, a number that
      is none would spoil other images.
    """
    images = [jnp.minimum(row, recent.shape[0] - 1) for row in rows]
    grid_row, column = lax.div(index - 1, columns), lax.rem(index - 1, columns)
    num_taps = offsets.shape[0]
    at_once = math.gcd(num_taps, _MOST_TAPS)

    def some_taps(i, sums):
        for tap in range(at_once):
            tap += i * at_once
            below, right = offsets[tap, 0], offsets[tap, 1]
            inside = (grid_row + below >= 0) & (column + right >= 0)
            inside &= column + right < columns
            slot = lax.rem(index + below * columns + right, recent.shape[1])
            slot = jnp.where(inside, slot, 0)
            weight = _load(taps.at[1 + tap]) * inside.astype(jnp.float32)
            terms = [_load(recent.at[image, slot]) * weight for image in images]
            sums = [a + b for a, b in zip(sums, terms, strict=True)]
        return sums

    none = [_load(taps.at[0]) * 0] * len(rows)
    for row, total in zip(rows, rolled_loop(num_taps // at_once, some_taps, none), strict=True):
        target.at[row][...] = total.astype(target.dtype)


def scratch_types(D: int) -> dict:
    """Shared memory and barriers of `load_rows`."""
    return {
        "own": plgpu.SMEM((D,), jnp.bfloat16),
        "root": plgpu.SMEM((MOST_ROWS,), jnp.float32),
        "middle_full": plgpu.Barrier(num_arrivals=1 + D // DEPTH),
        "staged": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    }


def load_rows(
    pipeline: Pipeline,
    product: Product,
    x: jax.Ref,
    squares: jax.Ref,
    others: jax.Ref,
    taps: jax.Ref,
    recent: jax.Ref,
    index,
    epsilon: float,
) -> None:
    """`Pipeline.load_rows` of y. Each piece of z is stored in `recent` by one program."""
    scratch = pipeline.scratch
    full, empty, staged = (scratch[n] for n in ("rows_full", "rows_empty", "staged"))
    columns, newest = product.N // UNIT, lax.rem(index, recent.shape[1])
    slots = product.slots

    def stage(k):
        first = (slots + lax.rem(k, STAGES)) * product.rows
        return scratch["rows"].at[pl.ds(first, product.rows)]

    def tile(t, carry):
        row, column = pipeline.place(product, t)
        rows = pl.ds(row, product.rows)

        def fetch_own(k, _):
            some = pl.ds(k * DEPTH, DEPTH)
            ready = scratch["middle_full"]
            plgpu.copy_gmem_to_smem(taps.at[0, some], scratch["own"].at[some], ready)

        rolled_loop(product.steps, fetch_own, None)
        source = squares.at[:, pl.ds(row, MOST_ROWS)]
        plgpu.copy_gmem_to_smem(source, scratch["parts"].at[0], scratch["middle_full"])

        def fetch(k, i, slot):
            pl.when(i >= slots)(lambda: plgpu.barrier_wait(empty.at[slot]))
            piece, here = (rows, pl.ds(k * DEPTH, DEPTH)), staged.at[lax.rem(k, STAGES)]
            # What was written there, and what is still read.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()
            plgpu.copy_gmem_to_smem(x.at[*piece], pipeline.rows(product, slot), here)
            plgpu.copy_gmem_to_smem(others.at[*piece], stage(k), here)

        i, slot = carry
        fetch(jnp.int32(0), i, slot)
        plgpu.barrier_wait(scratch["middle_full"])
        each = plgpu.Layout.WG_STRIDED((MOST_ROWS,), vec_size=1)
        parts = scratch["parts"].at[0]
        total = sum(plgpu.load(parts.at[j], layout=each) for j in range(x.shape[1] // UNIT))
        scratch["root"][...] = lax.rsqrt(total / x.shape[1] + epsilon)
        plgpu.commit_smem()
        root = plgpu.load(scratch["root"].at[pl.ds(0, product.rows)], layout=COLUMN)

        def step(k, carry):
            i, slot = carry
            following = next_slot(slot, slots)
            pl.when(k + 1 < product.steps)(lambda: fetch(k + 1, i + 1, following))
            plgpu.barrier_wait(staged.at[lax.rem(k, STAGES)])
            piece, other = pipeline.rows(product, slot), stage(k)

            def unit(u, _):
                here = pl.ds(0, product.rows), pl.ds(u * UNIT, UNIT)
                z = load_across(piece.at[*here]).astype(jnp.float32) * by_column(root)
                z = z.astype(jnp.bfloat16)
                own = scratch["own"].at[pl.ds(k * DEPTH + u * UNIT, UNIT)]
                own = 1 + plgpu.load(own, layout=ROW).astype(jnp.float32)
                y = z.astype(jnp.float32) * by_row(own, product.rows)
                y += load_across(other.at[*here]).astype(jnp.float32)
                put_across(piece.at[*here], y)
                put_across(other.at[*here], z)

            rolled_loop(DEPTH // UNIT, unit, None)
            plgpu.commit_smem()
            plgpu.barrier_arrive(full.at[slot])

            @pl.when(lax.rem(k, columns) == column)
            def _():
                target = recent.at[rows, newest, pl.ds(k * DEPTH, DEPTH)]
                plgpu.copy_smem_to_gmem(other, target)

            return i + 1, following

        return rolled_loop(product.steps, step, (i, slot))

    rolled_loop(pipeline.tiles(product), tile, (jnp.int32(0), jnp.int32(0)))
    plgpu.wait_smem_to_gmem(0)


def _load(ref):
    """A row of numbers, spread over a warpgroup, in float32."""
    (width,) = ref.shape
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=math.gcd(width // 128, 8))
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)
