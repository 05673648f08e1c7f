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

B images in M rows, D channels, V values of all heads, F hidden channels, E columns of the
projection.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Int

from lasad_jax.ops.kernels.between_conv import NormConv, blocks_of_rows
from lasad_jax.ops.kernels.between_pipeline import TRANSPOSED, Pipeline, scratch_types
from lasad_jax.ops.kernels.between_tiling import (
    CLUSTER,
    MOST_ROWS,
    UNIT,
    Counters,
    best_product,
    num_programs,
)
from lasad_jax.ops.kernels.grid_barrier import Phases, clear
from lasad_jax.ops.kernels.mosaic_tiles import COLUMN, TILE, transposed

# What is done of a layer when everybody has signalled it, in this order.
MIXED, CONVOLVED, HIDDEN, ADDED, SUMMED = PHASES = range(5)
# Warpgroups of a program.
_MULTIPLY, _LOAD_ROWS, _LOAD_WEIGHTS = range(3)


@functools.partial(
    jax.jit, static_argnames=("offsets", "columns", "epsilon", "programs", "interpret")
)
def between(
    mixed: BFloat16[Array, "M V"],
    x: BFloat16[Array, "M D"],
    recent: BFloat16[Array, "B W D"],
    index: Int[Array, ""],
    counters: Counters,
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
    BFloat16[Array, "M D"],
    BFloat16[Array, "M E"] | None,
    BFloat16[Array, "B W D"],
    Counters,
]:
    """From the output of a layer's heads to the next layer's projection.

    Args:
      mixed: gated output of all heads, of a token after `index` others. M is `whole_rows(B)` of
        `between_tiling`: what rows beyond the images hold, here and in the results, means nothing.
      x: the residual stream before the mixer.
      recent: ring of the newest inputs of the convolution, slot i % W for token i; updated
        in place.
      index: number of tokens before this one, the one prefix token included.
      counters: `new_counters`, or what the launch before this one returned; updated in place.
      out, gate_up, down, projection: matrices, the norms' scales in their rows; gate_up has by
        turns 64 columns of gate and of up. projection is the next layer's, or None.
      taps: a weight per channel for each of `offsets`, (rows down, columns right) of the
        neighbour, of which the first is the token itself.
      columns: of the grid.
      epsilon: of both norms.
      programs: at most as many as there are multiprocessors; None for that many.

    Returns:
      x, the projection if there is one, recent, and the counters for the next launch. x is rounded
      once per sum.
    """
    recent, (counters, counted) = jax.tree.map(jax.new_ref, (recent, counters))
    run = _kernel(
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
    x, *results = run(mixed, x, index, taps, *matrices, recent, counters, counted)
    projected = results[-1] if projection is not None else None
    return x, projected, jax.freeze(recent), (jax.freeze(counted), jax.freeze(counters))


def _kernel(shapes, *, offsets, columns, epsilon, programs, interpret):
    (M, V), (B, _, D), _, (_, both), last = shapes
    programs -= programs % CLUSTER
    sizes = [(V, D, False), (D, both // 2, True), (both // 2, D, False)]
    if last is not None:
        sizes.append((*last, False))
    products = tuple(best_product(M, K, N, programs, gated=gated) for K, N, gated in sizes)
    # Copies of squares are not clipped at the last row.
    padded = max(p.blocks * CLUSTER * p.rows for p in products) + MOST_ROWS
    bf16, f32 = jnp.bfloat16, jnp.float32

    def body(*refs):
        mixed, x, index_ref, taps, *refs = refs
        matrices, refs = refs[: len(products)], refs[len(products) :]
        recent, counters, counted, added, middle, y, hidden, squares, *refs = refs
        projected, refs = (refs[0], refs[1:]) if last is not None else (None, refs)
        scratch = dict(zip(scratch_of, refs, strict=True))
        if interpret:
            program = lax.axis_index("program")
            cluster, rank = program // CLUSTER, lax.rem(program, CLUSTER)
        else:
            cluster, rank = lax.axis_index("cluster"), lax.axis_index("rank")
            program = cluster * CLUSTER + rank
        pipeline = Pipeline(cluster, rank, programs // CLUSTER, scratch, interpret)
        phases = Phases(counters, programs, scratch.get("phases"))
        signal, wait = phases.signal, phases.wait
        warpgroup = lax.axis_index("wg")

        def wait_for(product, phase):
            """Those who have nothing to do need not wait."""
            pl.when(pipeline.tiles(product) > 0)(functools.partial(wait, phase))

        def swiglu(_, gate, up):
            root = lax.rsqrt(1 + jnp.exp(-gate))  # a division takes longer
            return gate * (root * root) * up

        def add(product, result, slot, residual, after=None):
            """residual + x w"""
            target = pipeline.out(product)

            def begin(row, column):
                piece = residual.at[pl.ds(row, product.rows), pl.ds(column * UNIT, UNIT)]
                plgpu.copy_gmem_to_smem(piece, target, scratch["arrived"])

            def finish(_, value):
                plgpu.barrier_wait(scratch["arrived"])
                # As the result is written: each thread reads and writes the same numbers.
                before = plgpu.load(transposed(target), layout=TRANSPOSED)
                return value + plgpu.layout_cast(before, TILE).astype(f32)

            return pipeline.multiply(product, result, slot, finish, begin, after)

        def signal_and_square(product):
            """Signals `ADDED`, then each row's squares over the columns of a tile.

            Nobody needs these before the end of the next product.
            """
            pl.when(pipeline.tiles(product) == 0)(functools.partial(signal, ADDED))

            def after(value, row, column, is_last):
                @pl.when(is_last)
                def _():
                    plgpu.wait_smem_to_gmem(0)
                    signal(ADDED)

                sums = scratch["squares"].at[pl.ds(0, product.rows)]
                sums[...] = jnp.sum(jnp.square(value.astype(f32)), axis=0)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(sums, squares.at[column, pl.ds(row, product.rows)])

            return after

        def load_squares(product):
            wait(SUMMED)
            for t in range(product.most_tiles(programs)):

                @pl.when(t < pipeline.tiles(product))
                def _(t=t):
                    row, _ = pipeline.place(product, t)
                    source = squares.at[:, pl.ds(row, MOST_ROWS)]
                    plgpu.copy_gmem_to_smem(source, scratch["parts"].at[t], scratch["summed"].at[t])

        def project(product, result, slot):
            """Of rows divided by their root mean square."""
            scales = scratch["scales"]

            def finish(t, value):
                plgpu.barrier_wait(scratch["summed"].at[t])
                # A row for each thread, then as the tile lies.
                rows = plgpu.Layout.WG_STRIDED((MOST_ROWS,), vec_size=1)
                parts = scratch["parts"].at[t]
                total = sum(plgpu.load(parts.at[j], layout=rows) for j in range(D // UNIT))
                scales[...] = lax.rsqrt(total / D + epsilon)
                plgpu.commit_smem()
                scale = plgpu.load(scales.at[pl.ds(0, product.rows)], layout=COLUMN)
                return value * lax.broadcast_in_dim(scale, value.shape, [1])

            pipeline.multiply(product, result, slot, finish)

        def convolve():
            """A few rows of a program, then as many below all programs' rows."""
            row_of = functools.partial(
                NormConv, recent, taps, index_ref[0], offsets, columns, epsilon
            )
            for first, each in blocks_of_rows(B, programs):
                begin = first + each * program

                @pl.when(begin < B)
                def _(begin=begin, first=first, each=each):
                    # The last image again for images that do not exist.
                    rows = row_of([jnp.minimum(begin + i, B - 1) for i in range(each)])
                    if not first:
                        wait(MIXED)
                    rows.finish(middle, y)

        @pl.when(warpgroup == _LOAD_WEIGHTS)
        def _():
            if not interpret:
                pl.when(program == 0)(lambda: clear(counted))
            pipeline.load_weights(products, matrices)

        @pl.when(warpgroup == _LOAD_ROWS)
        def _():
            pipeline.load_rows(products[0], mixed)
            convolve()
            signal(CONVOLVED)
            sources = zip((y, hidden, added), (CONVOLVED, HIDDEN, ADDED), strict=True)
            for before, product, (source, phase) in zip(
                products, products[1:], sources, strict=False
            ):
                pipeline.rows_are_taken(before)
                wait_for(product, phase)
                then = functools.partial(load_squares, product) if phase == ADDED else None
                pipeline.load_rows(product, source, then)
            pipeline.rows_are_taken(products[-1])

        @pl.when(warpgroup == _MULTIPLY)
        def _():
            mix, gate_up, down, *following = products
            slot = add(mix, middle, jnp.int32(0), x)
            signal(MIXED)
            slot = pipeline.multiply(gate_up, hidden, slot, swiglu)
            signal(HIDDEN)
            # Also for itself: another warpgroup's waiting is none of this one's.
            wait_for(down, CONVOLVED)
            slot = add(down, added, slot, middle, signal_and_square(down))
            signal(SUMMED)
            for product in following:
                project(product, projected, slot)

    like = jax.ShapeDtypeStruct
    out_types = [
        like((M, D), bf16),  # x
        like((M, D), bf16),  # x after the mixer
        like((M, D), bf16),  # y
        like((M, both // 2), bf16),  # hidden
        like((D // UNIT, padded), f32),  # squares of x
    ]
    scratch_of = scratch_types(products, programs, interpret)
    scratch_of["squares"] = plgpu.SMEM((products[2].rows,), f32)
    scratch_of["arrived"] = plgpu.Barrier()
    if last is not None:
        out_types.append(like((M, last[1]), bf16))
        scratch_of["parts"] = plgpu.SMEM(
            (products[3].most_tiles(programs), D // UNIT, MOST_ROWS), f32
        )
        scratch_of["scales"] = plgpu.SMEM((MOST_ROWS,), f32)
        scratch_of["summed"] = plgpu.Barrier(num_barriers=products[3].most_tiles(programs))
    axes = {"grid": (programs // CLUSTER,), "grid_names": ("cluster",)}
    axes |= {"cluster": (CLUSTER,), "cluster_names": ("rank",)}
    if interpret:
        # The interpreter runs the programs of a cluster at the same time, and no others.
        axes = {"cluster": (programs,), "cluster_names": ("program",)}
        axes["interpret"] = plgpu.InterpretGPUParams()
        scratch_of["phases"] = plgpu.ClusterBarrier(
            collective_axes=("program",), num_barriers=len(PHASES)
        )
    body.__name__ = "decode_between"
    return plgpu.kernel(
        body,
        out_type=out_types,
        scratch_types=list(scratch_of.values()),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        **axes,
    )
