"""All of a decoder's layer between two mixers in one launch, on Hopper.

    x <- x + mixed out                          products
    y  = local convolution of x / rms(x)        rows
    x <- x + swiglu(y gate_up) down             products
    projection = (x / rms(x)) projection        product, for the next layer's mixer

A Mosaic GPU kernel for bf16: one program per multiprocessor goes through these phases. Each takes
its tiles (`between_tiling`) of a phase as soon as all programs are done with the one before
(`grid_barrier`). Matrices depend on no phase: a warpgroup of its own loads them as far ahead as
shared memory reaches, over phases. Tensor cores take their pieces as the left operand and rows as
the right one, so that a tile may have any multiple of eight rows.

B images, D channels, V values of all heads, F hidden channels, E columns of the projection.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Int

from lasad_jax.ops.kernels import grid_barrier
from lasad_jax.ops.kernels.between_tiling import (
    CLUSTER,
    COUNTERS,
    UNIT,
    best_product,
    num_programs,
    rows_in_flight,
    weight_slots,
)
from lasad_jax.ops.kernels.mosaic_tiles import COLUMN, TILE, transposed

# Phases that others wait for, in their order; the last one comes after them.
MIXED, CONVOLVED, HIDDEN, ADDED = range(4)
_LAST = COUNTERS[0] - 1
_TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED
_TRANSFORMS = (plgpu.TilingTransform((8, UNIT)), plgpu.SwizzleTransform(128))
# Warpgroups of a program.
_MULTIPLY, _LOAD_ROWS, _LOAD_WEIGHTS = range(3)


@functools.partial(
    jax.jit, static_argnames=("offsets", "columns", "epsilon", "programs", "interpret")
)
def between(
    mixed: BFloat16[Array, "B V"],
    x: BFloat16[Array, "B D"],
    recent: BFloat16[Array, "B W D"],
    index: Int[Array, ""],
    counters: Int[Array, "counters stride"],
    *,
    out: BFloat16[Array, "V D"],
    taps: BFloat16[Array, "taps D"],
    gate_up: BFloat16[Array, "D 2*F"],
    down: BFloat16[Array, "F D"],
    projection: BFloat16[Array, "D E"] | None,
    offsets: tuple[tuple[int, int], ...],
    columns: int,
    epsilon: float,
    programs: int | None = None,
    interpret: bool = False,
) -> tuple[
    BFloat16[Array, "B D"],
    BFloat16[Array, "B E"] | None,
    BFloat16[Array, "B W D"],
    Int[Array, "counters stride"],
]:
    """From the output of a layer's heads to the next layer's projection.

    Args:
      mixed: gated output of all heads, of a token after `index` others.
      x: the residual stream before the mixer.
      recent: ring of the newest inputs of the convolution, slot i % W for token i; updated
        in place.
      index: number of tokens before this one, the one prefix token included.
      counters: of shape COUNTERS, zeros before and after; updated in place.
      out, gate_up, down, projection: matrices, the norms' scales in their rows; gate_up has by
        turns 64 columns of gate and of up. projection is the next layer's, or None.
      taps: a weight per channel for each of `offsets`, (rows down, columns right) of the
        neighbour, of which the first is the token itself.
      columns: of the grid.
      epsilon: of both norms.
      programs: at most as many as there are multiprocessors; None for that many.

    Returns:
      x, the projection if there is one, recent and counters. x is rounded once per sum.
    """
    recent, counters = jax.new_ref(recent), jax.new_ref(counters)
    launch = _kernel(
        tuple(a if a is None else a.shape for a in (mixed, recent, out, gate_up, projection)),
        offsets=offsets,
        columns=columns,
        epsilon=epsilon,
        programs=programs or num_programs(),
        interpret=interpret,
    )
    # A loop's own counter is of a weak type, which kernels cannot divide.
    index = index.astype(jnp.int32)[None]
    matrices = [w for w in (out, gate_up, down, projection) if w is not None]
    x, *results = launch(mixed, x, index, taps, *matrices, recent, counters)
    projected = results[-1] if projection is not None else None
    return x, projected, jax.freeze(recent), jax.freeze(counters)


def _kernel(shapes, *, offsets, columns, epsilon, programs, interpret):
    (M, V), (_, window, D), _, (_, both), last = shapes
    sizes = [(V, D, False), (D, both // 2, True), (both // 2, D, False)]
    if last is not None:
        sizes.append((*last, False))
    products = tuple(best_product(M, K, N, programs, gated=gated) for K, N, gated in sizes)
    clusters = programs // CLUSTER
    programs = clusters * CLUSTER
    num_slots, num_rows = weight_slots(products), rows_in_flight(products)
    most_rows = max(p.rows for p in products)
    shared = {} if interpret else {"collective_axes": "rank"}
    bf16, f32 = jnp.bfloat16, jnp.float32

    def body(*refs):
        mixed, x, index_ref, taps, *rest = refs
        matrices, rest = rest[: len(products)], rest[len(products) :]
        recent, counters, x_out, middle, squares_middle, y, hidden, squares, *rest = rest
        projected, rest = (rest[0], rest[1:]) if last is not None else (None, rest)
        scratch = dict(zip(scratch_types, rest, strict=True))
        x_tiles, w_tiles, out_tile = scratch["x"], scratch["w"], scratch["out"]
        if interpret:
            program = lax.axis_index("program")
            cluster, rank = program // CLUSTER, lax.rem(program, CLUSTER)
        else:
            cluster, rank = lax.axis_index("cluster"), lax.axis_index("rank")
        warpgroup = lax.axis_index("wg")
        rows_of = (mixed, y, hidden, x_out)
        results = (middle, hidden, x_out, projected)

        def signal(phase):
            if interpret:
                plgpu.barrier_arrive(scratch[f"phase{phase}"])
            elif phase == _LAST:
                grid_barrier.leave(counters, programs)
            else:
                grid_barrier.signal(counters.at[phase])

        def wait(phase):
            if interpret:
                plgpu.barrier_wait(scratch[f"phase{phase}"])
            else:
                grid_barrier.wait(counters.at[phase], programs * arrivals[phase])

        def own_tiles(product):
            return (product.tiles - cluster + clusters - 1) // clusters

        def place(product, i):
            """Row and column, the latter in units of the result, of this program's i-th tile."""
            tile = cluster + i * clusters
            block = lax.rem(tile, product.blocks) * CLUSTER + rank
            return block * product.rows, tile // product.blocks

        def load_weights():
            position = jnp.int32(0)
            for product, matrix in zip(products, matrices, strict=True):

                def step(i, position, product=product, matrix=matrix):
                    k = lax.rem(i, product.steps)
                    _, column = place(product, i // product.steps)
                    for unit in range(product.units):
                        slot = lax.rem(position + unit, num_slots)

                        @pl.when(position + unit >= num_slots)
                        def _(slot=slot):
                            plgpu.barrier_wait(scratch["w_empty"].at[slot])

                        first = (column * product.units + unit) * UNIT
                        source = matrix.at[pl.ds(k * UNIT, UNIT), pl.ds(first, UNIT)]
                        full = scratch["w_full"].at[slot]
                        plgpu.copy_gmem_to_smem(source, w_tiles.at[slot], full, **shared)
                    return position + product.units

                position = lax.fori_loop(0, own_tiles(product) * product.steps, step, position)
            _drain(scratch["w_empty"], position, num_slots)

        def load_rows(product, source):
            num = own_tiles(product) * product.steps

            def step(i, _):
                slot = lax.rem(i, product.slots)

                @pl.when(i >= product.slots)
                def _():
                    plgpu.barrier_wait(scratch["x_empty"].at[slot])

                row, _ = place(product, i // product.steps)
                k = lax.rem(i, product.steps)
                piece = source.at[pl.ds(row, product.rows), pl.ds(k * UNIT, UNIT)]
                target = x_tiles.at[pl.ds(slot * product.rows, product.rows)]
                plgpu.copy_gmem_to_smem(piece, target, scratch["x_full"].at[slot])

            lax.fori_loop(0, num, step, None)
            _drain(scratch["x_empty"], num, product.slots)

        def multiply(product, result, position, begin, finish):
            """All tiles of a product. `position`: pieces of matrices that were taken before."""
            rows, steps = product.rows, product.steps

            def release(i, position):
                plgpu.barrier_arrive(scratch["x_empty"].at[lax.rem(i, product.slots)])
                for unit in range(product.units):
                    plgpu.barrier_arrive(scratch["w_empty"].at[lax.rem(position + unit, num_slots)])

            def tile(t, position):
                row, column = place(product, t)
                # The copy of the tile before has been read.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                begin(row, column)

                def run(*sums):
                    def step(k, position):
                        i = t * steps + k
                        slot = lax.rem(i, product.slots)
                        plgpu.barrier_wait(scratch["x_full"].at[slot])
                        piece = x_tiles.at[pl.ds(slot * rows, rows)]
                        for unit, total in enumerate(sums):
                            w_slot = lax.rem(position + unit, num_slots)
                            plgpu.barrier_wait(scratch["w_full"].at[w_slot])
                            plgpu.wgmma(total, transposed(w_tiles.at[w_slot]), transposed(piece))
                        plgpu.wgmma_wait(product.units)

                        @pl.when(k > 0)
                        def _():
                            release(i - 1, position - product.units)

                        return position + product.units

                    end = lax.fori_loop(0, steps, step, position)
                    return [total[...] for total in sums], end

                accumulators = [plgpu.ACC((UNIT, rows), f32)] * product.units
                values, position = pl.run_scoped(run, *accumulators)
                release(t * steps + steps - 1, position - product.units)
                value = finish(row, *values).astype(bf16)
                target = out_tile.at[pl.ds(0, rows)]
                transposed(target)[...] = plgpu.layout_cast(value, _TRANSPOSED)
                plgpu.commit_smem()
                there = result.at[pl.ds(row, rows), pl.ds(column * UNIT, UNIT)]
                plgpu.copy_smem_to_gmem(target, there)
                return value, row, column, position

            return tile

        def run_product(product, result, position, begin, finish, after=None):
            tile = multiply(product, result, position, begin, finish)

            def step(t, position):
                value, row, column, position = tile(t, position)
                if after is not None:
                    after(value, row, column)
                return position

            position = lax.fori_loop(0, own_tiles(product), step, position)
            plgpu.wait_smem_to_gmem(0)
            return position

        def add(product, residual, squares):
            """x w + residual, and each row's squares over the columns of a tile."""
            target = out_tile.at[pl.ds(0, product.rows)]

            def begin(row, column):
                piece = residual.at[pl.ds(row, product.rows), pl.ds(column * UNIT, UNIT)]
                plgpu.copy_gmem_to_smem(piece, target, scratch["added"])

            def finish(row, value):
                plgpu.barrier_wait(scratch["added"])
                # As the result is written: each thread reads and writes the same numbers.
                before = plgpu.load(transposed(target), layout=_TRANSPOSED)
                return value + plgpu.layout_cast(before, TILE).astype(f32)

            def after(value, row, column):
                value = value.astype(f32)
                sums = scratch["squares"].at[pl.ds(0, product.rows)]
                sums[...] = jnp.sum(value * value, axis=0)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(sums, squares.at[column, pl.ds(row, product.rows)])

            return begin, finish, after

        def scaled(product):
            """Of rows divided by their root mean square."""
            parts = scratch["parts"]

            def begin(row, column):
                source = squares.at[:, pl.ds(row, product.rows)]
                plgpu.copy_gmem_to_smem(source, parts, scratch["added"])

            def finish(row, value):
                plgpu.barrier_wait(scratch["added"])
                total = sum(plgpu.load(parts.at[j], layout=COLUMN) for j in range(D // UNIT))
                scale = lax.rsqrt(total / D + epsilon)
                return value * lax.broadcast_in_dim(scale, value.shape, [1])

            return begin, finish

        def swiglu(row, gate, up):
            return gate / (1 + jnp.exp(-gate)) * up

        def convolve(side):
            """Every program has a row for each of two warpgroups, then again."""
            load = functools.partial(_load, width=D)
            index = index_ref[0]
            grid_row, column = (index - 1) // columns, lax.rem(index - 1, columns)
            for first in range(0, M, 2 * programs):
                row = first + 2 * (CLUSTER * cluster + rank) + side

                @pl.when(row < M)
                def _(row=row, first=first):
                    # Neighbours do not wait for the token.
                    own, total = load(taps.at[0]) + 1, None
                    for tap, (below, right) in enumerate(offsets[1:], 1):
                        inside = (grid_row + below >= 0) & (column + right >= 0)
                        inside &= column + right < columns
                        slot = lax.rem(index + below * columns + right, window)
                        there = load(recent.at[row, jnp.where(inside, slot, 0)])
                        term = there * load(taps.at[tap]) * inside.astype(f32)
                        total = term if total is None else total + term
                    if not first:
                        wait(MIXED)
                    square = sum(squares_middle[j, row] for j in range(D // UNIT))
                    value = load(middle.at[row]) * lax.rsqrt(square / D + epsilon)
                    value = value.astype(bf16)
                    recent.at[row, lax.rem(index, window)][...] = value
                    y.at[row][...] = (value.astype(f32) * own + total).astype(bf16)

            signal(CONVOLVED)

        def has_tile(product):
            return cluster < product.tiles

        nothing = lambda row, column: None

        @pl.when(warpgroup == _LOAD_WEIGHTS)
        def _():
            load_weights()

        @pl.when(warpgroup == _LOAD_ROWS)
        def _():
            load_rows(products[0], rows_of[0])
            convolve(1)
            for product, source, phase in zip(
                products[1:], rows_of[1:], (CONVOLVED, HIDDEN, ADDED), strict=False
            ):
                pl.when(has_tile(product))(functools.partial(wait, phase))
                load_rows(product, source)

        @pl.when(warpgroup == _MULTIPLY)
        def _():
            position = run_product(
                products[0], results[0], jnp.int32(0), *add(products[0], x, squares_middle)
            )
            signal(MIXED)
            convolve(0)
            position = run_product(products[1], results[1], position, nothing, swiglu)
            signal(HIDDEN)
            pl.when(has_tile(products[2]))(functools.partial(wait, CONVOLVED))
            position = run_product(
                products[2], results[2], position, *add(products[2], middle, squares)
            )
            if last is not None:
                signal(ADDED)
                pl.when(has_tile(products[3]))(functools.partial(wait, ADDED))
                run_product(products[3], results[3], position, *scaled(products[3]))
            if not interpret:
                signal(_LAST)

    like = jax.ShapeDtypeStruct
    out_types = [
        like((M, D), bf16),  # x
        like((M, D), bf16),  # x after the mixer
        like((D // UNIT, M), f32),  # its squares
        like((M, D), bf16),  # y
        like((M, both // 2), bf16),  # hidden
        like((D // UNIT, M), f32),  # squares of x
    ]
    tile = functools.partial(plgpu.SMEM, dtype=bf16, transforms=_TRANSFORMS)
    most_slots = max(p.slots for p in products)
    scratch_types = {
        "x": tile((num_rows, UNIT)),
        "x_full": plgpu.Barrier(num_barriers=most_slots),
        "x_empty": plgpu.Barrier(num_barriers=most_slots),
        "w": tile((num_slots, UNIT, UNIT)),
        "w_full": plgpu.Barrier(num_barriers=num_slots),
        "w_empty": plgpu.ClusterBarrier(collective_axes=("rank",), num_barriers=num_slots),
        "out": tile((most_rows, UNIT)),
        "squares": plgpu.SMEM((most_rows,), f32),
        "added": plgpu.Barrier(),
    }
    if last is not None:
        out_types.append(like((M, last[1]), bf16))
        scratch_types["parts"] = plgpu.SMEM((D // UNIT, products[3].rows), f32)
    # Warpgroups of a program that signal the end of each phase.
    arrivals = {MIXED: 1, CONVOLVED: 2, HIDDEN: 1, ADDED: 1}
    axes = {"grid": (clusters,), "grid_names": ("cluster",)}
    axes |= {"cluster": (CLUSTER,), "cluster_names": ("rank",)}
    if interpret:
        # The interpreter runs the programs of a cluster at the same time, and no others: there,
        # all are of one, and each loads for itself.
        axes = {"cluster": (programs,), "cluster_names": ("program",)}
        axes["interpret"] = plgpu.InterpretGPUParams()
        scratch_types["w_empty"] = plgpu.Barrier(num_barriers=num_slots)
        scratch_types |= {
            f"phase{phase}": plgpu.ClusterBarrier(collective_axes=("program",), num_arrivals=num)
            for phase, num in arrivals.items()
        }
    body.__name__ = "decode_between"
    return plgpu.kernel(
        body,
        out_type=out_types,
        scratch_types=list(scratch_types.values()),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        **axes,
    )


def _load(ref, width):
    """A row of numbers, spread over a warpgroup, in float32."""
    each = width // 128
    layout = plgpu.Layout.WG_STRIDED(
        (width,), vec_size=next(n for n in (8, 4, 2, 1) if each % n == 0)
    )
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)


def _drain(empty, position, slots):
    """Waits for those of the last uses of slots that no refill has waited for."""

    def step(i, _):
        plgpu.barrier_wait(empty.at[lax.rem(i, slots)])

    lax.fori_loop(jnp.maximum(position - slots, 0), position, step, None)
