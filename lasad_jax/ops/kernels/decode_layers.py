"""All layers of the decoder in one launch, on Hopper.

    projection = (x / rms(x)) projection        product
    mixed = the heads                           `layer_heads`
    x <- x + mixed out                          product
    y  = local convolution of x / rms(x)        `layer_conv`
    x <- x + swiglu(y gate_up) down             products

A Mosaic GPU kernel for bf16: one program per multiprocessor goes through these phases of one layer
after the other. Each takes its tiles (`layer_tiling`) of a phase as soon as all programs are done
with the one before (`grid_barrier`). Matrices and memories depend on no phase: a warpgroup of its
own loads them as far ahead as shared memory reaches, over phases and layers. Tensor cores take
their pieces as the left operand and rows as the right one, so that a tile may have any multiple of
eight rows.

M rows, D channels, H heads of 32 keys and 64 values, F hidden channels, E columns of the
projection, W slots of the convolution's ring.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int

from lasad_jax.ops.kernels import layer_conv, layer_heads
from lasad_jax.ops.kernels.grid_barrier import Phases
from lasad_jax.ops.kernels.layer_heads import Heads
from lasad_jax.ops.kernels.layer_pipeline import TRANSPOSED, Pipeline, rolled_loop, scratch_types
from lasad_jax.ops.kernels.layer_ring import BLOCK, BlockedRing
from lasad_jax.ops.kernels.layer_tiling import (
    CLUSTER,
    MOST_ROWS,
    PHASES,
    UNIT,
    Product,
    best_product,
    num_programs,
)
from lasad_jax.ops.kernels.mosaic_tiles import COLUMN, TILE, transposed

# What is done of a layer when everybody has signalled it, in this order.
NEIGHBOURS, PROJECTED, MIXED, SUMMED, HIDDEN, ADDED = range(PHASES)
# Copies of squares are not clipped at the last row: so far beyond it a cluster's tile may reach.
_MORE_ROWS = CLUSTER * MOST_ROWS
# Warpgroups of a program.
_MULTIPLY, _LOAD_ROWS, _LOAD_WEIGHTS, _HELP = range(4)
# Registers of their threads, of 512 altogether.
_REGISTERS = {_MULTIPLY: 168, _LOAD_WEIGHTS: 24, _HELP: 160}


@functools.partial(
    jax.jit, static_argnames=("sizes", "offsets", "columns", "epsilon", "programs", "interpret")
)
def all_layers(
    x: BFloat16[Array, "M D"],
    ring: BlockedRing,
    recent: BFloat16[Array, "layers B W D"],
    index: Int[Array, ""],
    counters: Int[Array, "counters stride"],
    *,
    pieces: BFloat16[Array, "layers pieces 128 64"],
    sizes: tuple[int, int],
    taps: BFloat16[Array, "layers taps D"],
    log_factor: Float32[Array, "layers places heads"],
    turns: Float32[Array, "tokens 2 64"] | None,
    gate_bias: Float32[Array, "layers heads"] | None,
    offsets: tuple[tuple[int, int], ...],
    columns: int,
    epsilon: float,
    programs: int | None = None,
    interpret: bool = False,
) -> tuple[
    BFloat16[Array, "M D"],
    BlockedRing,
    BFloat16[Array, "layers B W D"],
    Int[Array, "counters stride"],
]:
    """Takes a token through all layers.

    Args:
      x: the residual stream. M is `whole_rows(B)` of `layer_tiling`: what rows beyond the images
        hold, here and in the results, means nothing, but must be numbers.
      ring: of all mixers, of M images; updated in place.
      recent: rings of the newest inputs of the convolutions, slot i % W for token i; updated
        in place.
      index: number of tokens before this one, the one prefix token included.
      counters: `layer_tiling.counters`, zeros before and after; updated in place.
      pieces: of each layer's matrices, the norms' scales in their rows (`layer_tiling.pack`): the
        projection to [q | k | v | out_gate] of one head after the other, then the content gates;
        out; gate and up, by turns 64 columns of each (2 units); and down.
      sizes: E and F.
      taps: a weight per channel for each of `offsets`, (rows down, columns right) of the
        neighbour, of which the first is the token itself.
      log_factor: log-factor of the step to each place, without the content gate; of H heads,
        filled up to a multiple of four.
      turns: for each token, what RoPE multiplies a head and its swapped pairs by, twice.
      gate_bias: of the content gates, filled up too; None for none.
      columns: of the grid.
      epsilon: of all norms.
      programs: at most as many as there are multiprocessors; None for that many.

    Returns:
      x, rings and counters. x is rounded once per sum.
    """
    state = x, _sums_of_squares(x), ring, recent, counters
    state = jax.tree.map(jax.new_ref, state)
    tables = [y for y in (log_factor, turns, gate_bias) if y is not None]
    launch = _kernel(
        (x.shape, recent.shape, sizes, (ring.memory.shape[1], log_factor.shape[2])),
        has_turns=turns is not None,
        has_gates=gate_bias is not None,
        columns=columns,
        epsilon=epsilon,
        programs=programs or num_programs(),
        interpret=interpret,
    )
    # A loop's own counter is of a weak type, which kernels cannot divide.
    index = index.astype(jnp.int32)[None]
    neighbours = jnp.asarray(offsets[1:], jnp.int32)
    launch(index, neighbours, taps, *tables, pieces, *jax.tree.leaves(state))
    x, _, ring, recent, counters = jax.tree.map(jax.freeze, state)
    return x, ring, recent, counters


def _sums_of_squares(x):
    """Of each row, over every 64 channels, and zeros for rows that tiles have beyond."""
    squares = jnp.square(x.astype(jnp.float32)).reshape(len(x), -1, UNIT)
    return jnp.pad(jnp.sum(squares, axis=2).T, ((0, 0), (0, _MORE_ROWS)))


def _kernel(shapes, *, has_turns, has_gates, columns, epsilon, programs, interpret):
    (M, D), (L, *_), (E, F), (H, num_factors) = shapes
    programs -= programs % CLUSTER
    V = H * UNIT
    projecting, summing, hiding, adding = products = tuple(
        best_product(M, K, N, programs, gated=gated, staged=layer_conv.STAGES if gated else 0)
        for K, N, gated in ((D, E, False), (V, D, False), (D, F, True), (F, D, False))
    )
    parts = Product(M, V, V, BLOCK)
    bf16, f32 = jnp.bfloat16, jnp.float32
    names = [
        "index",
        "offsets",
        "taps",
        "log_factor",
        *["turns"] * has_turns,
        *["gate_bias"] * has_gates,
    ]
    names += [
        "pieces",
        "x",
        "squares",
        "memory",
        "recent_k",
        "recent_v",
        "log_weight",
        "recent",
        "counters",
    ]

    def body(*refs):
        known = [*names, *out_types]
        given = dict(zip(known, refs, strict=False))
        scratch = dict(zip(scratch_of, refs[len(known) :], strict=True))
        scratch["rows"], others = scratch["rows"]
        scratch |= others
        if interpret:
            cluster, rank = divmod(lax.axis_index("program"), CLUSTER)
        else:
            cluster, rank = lax.axis_index("cluster"), lax.axis_index("rank")
        phases = Phases(given["counters"], programs, scratch.get("phases"))
        warpgroup = lax.axis_index("wg")
        x, projected, mixed = given["x"], given["projected"], given["mixed"]
        middle, hidden, others = (given[n] for n in ("middle", "hidden", "neighbours"))
        squares, middle_squares = given["squares"], given["middle_squares"]

        def signal(phase, layer):
            phases.signal(layer * PHASES + phase)

        def wait(phase, layer):
            phases.wait(layer * PHASES + phase)

        def of_layer(layer):
            """What warpgroups know of it: the pipeline and the heads.

            Places are worked out in each layer anew: kept through all of them, they would take
            more registers than there are.
            """
            again = lax.optimization_barrier
            pipeline = Pipeline(
                again(cluster), again(rank), programs // CLUSTER, scratch, interpret
            )
            index = again(given["index"][0])
            rings = (given[n].at[layer] for n in ("memory", "recent_k", "recent_v", "log_weight"))
            heads = Heads(
                pipeline,
                parts,
                BlockedRing(*rings),
                projected=projected,
                mixed=mixed,
                index=index,
                log_factor=given["log_factor"].at[layer, index - 1],
                gate_bias=given["gate_bias"].at[layer] if has_gates else None,
                turns=given["turns"].at[index] if has_turns else None,
                epsilon=epsilon,
            )
            return pipeline, heads

        def swiglu(_, gate, up):
            return layer_heads.silu(gate) * up

        def add(pipeline, product, result, slot, residual, after=None):
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

        def square(target, product):
            """Each row's squares over the columns of a tile."""

            def after(value, row, column):
                sums = scratch["squares"].at[pl.ds(0, product.rows)]
                sums[...] = jnp.sum(jnp.square(value.astype(f32)), axis=0)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(sums, target.at[column, pl.ds(row, product.rows)])

            return after

        def load_squares(pipeline):
            for t in range(projecting.most_tiles(programs)):

                @pl.when(t < pipeline.tiles(projecting))
                def _(t=t):
                    row, _ = pipeline.place(projecting, t)
                    source = squares.at[:, pl.ds(row, MOST_ROWS)]
                    plgpu.copy_gmem_to_smem(source, scratch["parts"].at[t], scratch["summed"].at[t])

        def project(pipeline, slot):
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
                scale = plgpu.load(scales.at[pl.ds(0, projecting.rows)], layout=COLUMN)
                return value * lax.broadcast_in_dim(scale, value.shape, [1])

            return pipeline.multiply(projecting, projected, slot, finish)

        def add_neighbours(pipeline, index, layer):
            """A few rows of a program, then as many below all programs' rows."""
            program = pipeline.cluster * CLUSTER + pipeline.rank
            what = (given[n].at[layer] for n in ("recent", "taps"))
            add_up = functools.partial(
                layer_conv.neighbours, *what, given["offsets"], index, columns, target=others
            )
            for first, each in layer_conv.blocks_of_rows(M, programs):
                begin = first + each * program
                rows = [begin + i for i in range(each)]
                pl.when(begin < M)(functools.partial(add_up, rows=rows))

        def load_weights(layer, carry):
            pipeline, heads = of_layer(layer)
            first = np.cumsum([0, *(p.pieces for p in products)])

            def load(i, carry):
                # One copy of the code for all products.
                choose = lambda values: sum(jnp.where(i == j, v, 0) for j, v in enumerate(values))
                shape = (
                    choose(int(x) for x in y)
                    for y in zip(*(p.shape for p in products), strict=True)
                )
                begin = choose(int(x) for x in first[:-1])
                carry = pipeline.load_pieces(*shape, given["pieces"].at[layer], begin, *carry)
                return heads.load(jnp.where(i == 0, heads.num_parts, 0), *carry)

            return rolled_loop(len(products), load, carry)

        def load_rows(helping, layer, _):
            pipeline, heads = of_layer(layer)
            loading = jnp.logical_not(helping)

            @pl.when(loading)
            def _():
                heads.load_tables()
                add_neighbours(pipeline, heads.index, layer)
                signal(NEIGHBOURS, layer)

                @pl.when(layer > 0)
                def _():
                    pipeline.rows_are_taken(adding)
                    wait(ADDED, layer - 1)

                pipeline.load_rows(projecting, x, functools.partial(load_squares, pipeline))
                pipeline.rows_are_taken(projecting)

            heads.prepare(helping, functools.partial(wait, PROJECTED, layer))
            pl.when(helping)(lambda: plgpu.barrier_arrive(scratch["helped"]))

            @pl.when(loading)
            def _():
                plgpu.barrier_wait(scratch["helped"])
                wait(MIXED, layer)
                pipeline.load_rows(summing, mixed)
                pipeline.rows_are_taken(summing)
                wait(NEIGHBOURS, layer)
                wait(SUMMED, layer)
                layer_conv.load_rows(
                    *(pipeline, hiding, middle, middle_squares, others),
                    *(given["taps"].at[layer], given["recent"].at[layer], heads.index, epsilon),
                )
                pipeline.rows_are_taken(hiding)
                wait(HIDDEN, layer)
                pipeline.load_rows(adding, hidden)

        def multiply(layer, slot):
            pipeline, heads = of_layer(layer)
            slot = project(pipeline, slot)
            signal(PROJECTED, layer)
            slot = heads.finish(slot)
            signal(MIXED, layer)
            slot = add(pipeline, summing, middle, slot, x, square(middle_squares, summing))
            signal(SUMMED, layer)
            slot = pipeline.multiply(hiding, hidden, slot, swiglu)
            signal(HIDDEN, layer)
            # Also for itself: another warpgroup's waiting is none of this one's.
            wait(SUMMED, layer)
            slot = add(pipeline, adding, x, slot, middle, square(squares, adding))
            signal(ADDED, layer)
            return slot

        zero = jnp.int32(0)

        @pl.when(warpgroup == _LOAD_WEIGHTS)
        def _():
            plgpu.set_max_registers(_REGISTERS[_LOAD_WEIGHTS], action="decrease")
            position, _ = lax.fori_loop(0, L, load_weights, (zero, zero))
            of_layer(0)[0].pieces_are_taken(position)

        @pl.when((warpgroup == _LOAD_ROWS) | (warpgroup == _HELP))
        def _():
            plgpu.set_max_registers(_REGISTERS[_HELP], action="increase")
            helping = warpgroup == _HELP
            lax.fori_loop(0, L, functools.partial(load_rows, helping), None)
            last, _ = of_layer(L - 1)
            pl.when(jnp.logical_not(helping))(functools.partial(last.rows_are_taken, adding))

        @pl.when(warpgroup == _MULTIPLY)
        def _():
            plgpu.set_max_registers(_REGISTERS[_MULTIPLY], action="increase")
            lax.fori_loop(0, L, multiply, zero)
            phases.leave()

    like = jax.ShapeDtypeStruct
    out_types = {
        "projected": like((M, E), bf16),
        "mixed": like((M, V), bf16),
        "middle": like((M, D), bf16),  # x after the mixer
        "middle_squares": like((D // UNIT, M + _MORE_ROWS), f32),
        "neighbours": like((M, D), bf16),
        "hidden": like((M, F), bf16),
    }
    scratch_of = scratch_types(products, programs, interpret, layer_heads.memory_types())
    scratch_of |= layer_heads.lasting_types(num_factors, has_gates)
    scratch_of |= layer_conv.scratch_types(D)
    scratch_of["squares"] = plgpu.SMEM((max(summing.rows, adding.rows),), f32)
    scratch_of["arrived"] = plgpu.Barrier()
    most = projecting.most_tiles(programs)
    scratch_of["parts"] = plgpu.SMEM((most, D // UNIT, MOST_ROWS), f32)
    scratch_of["scales"] = plgpu.SMEM((MOST_ROWS,), f32)
    scratch_of["summed"] = plgpu.Barrier(num_barriers=most)
    axes = {"grid": (programs // CLUSTER,), "grid_names": ("cluster",)}
    axes |= {"cluster": (CLUSTER,), "cluster_names": ("rank",)}
    if interpret:
        # The interpreter runs the programs of a cluster at the same time, and no others.
        axes = {"cluster": (programs,), "cluster_names": ("program",)}
        axes["interpret"] = plgpu.InterpretGPUParams()
        scratch_of["phases"] = plgpu.ClusterBarrier(
            collective_axes=("program",), num_barriers=L * PHASES
        )
    body.__name__ = "decode_layers"
    return plgpu.kernel(
        body,
        out_type=list(out_types.values()),
        scratch_types=list(scratch_of.values()),
        num_threads=4,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        **axes,
    )
