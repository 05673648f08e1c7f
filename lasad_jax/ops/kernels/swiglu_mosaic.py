"""SwiGLU inside the matrix products of training, on Hopper.

Mosaic GPU kernels for bf16. The product before a SwiGLU writes gate, up and h at once; the one
behind it gives, backward, d_h, which never leaves the registers: gate and up come in, and their
gradients and h go out. So the elementwise work costs no pass over memory of its own.

Each multiprocessor has one program that walks over tiles of the result. One of its warpgroups
loads, as far ahead over the tiles as shared memory holds; two multiply. These either take
halves of the same tile (`Tiling.in_turn` false) or tiles in turn, and while one writes its
results, the other has the tensor cores.

M rows, D channels, F hidden channels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16

SIDE = 64  # of the square pieces in which results leave, and the depth of a product's step
_WARPGROUPS = 2  # that multiply
_REGISTERS = {"load": 24, "multiply": 240}  # of a thread
_LOG2_E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a product is cut.

    Attributes:
      columns: of the result, in a tile of 128 rows (forward: of gate and up together).
      stages: of 64 channels of both operands, on their way at once.
      slots: pieces on their way out of a warpgroup at once (backward: of h; the gradients leave
        from where gate and up came in).
      pieces_in: of gate and of up, on their way into a warpgroup at once (backward).
      in_turn: the warpgroups take tiles in turn.
      cluster: programs that share the weights that they load, 1 or 2.
      band: tiles down the rows that are taken before the next ones along the columns.
    """

    columns: int
    stages: int
    slots: int
    pieces_in: int = 0
    in_turn: bool = False
    cluster: int = 1
    band: int = 1
    by_channel: bool = False
    ahead: bool = False
    profile: str = ""

    @property
    def rows(self) -> int:
        """Of what a warpgroup takes."""
        return 128 if self.in_turn else 64


def forward(
    x: BFloat16[Array, "M D"],
    gate_up: BFloat16[Array, "2 F D"],
    *,
    tiling: Tiling | None = None,
    programs: int = 132,
    interpret: bool = False,
) -> tuple[BFloat16[Array, "M 2 F"], BFloat16[Array, "M F"]]:
    """Gate and up of each row, and h = silu(gate) * up of the rounded ones.

    Args:
      x: the rows.
      gate_up: both matrices, transposed.
      tiling: instead of the one chosen.
      programs: multiprocessors.
      interpret: run on any platform, slowly.
    """
    t = tiling or Tiling(256, 3, 5)
    (M, _), F = x.shape, gate_up.shape[2 if t.by_channel else 1]
    hidden = t.columns // 2

    def finish(sums, row, column, _, out, emit):
        for r in range(0, t.rows, SIDE):
            for c in range(0, hidden, SIDE):
                gate, up = (_rounded(sums, r, start) for start in (c, hidden + c))
                silu, _ = _silu(gate.astype(jnp.float32))
                place = (pl.ds(row + r, SIDE), pl.ds(column + c, SIDE))
                emit(gate, out[0].at[place[0], 0, place[1]])
                emit(up, out[0].at[place[0], 1, place[1]])
                emit((silu * up.astype(jnp.float32)).astype(jnp.bfloat16), out[1].at[place])

    out = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((M, 2, F), (M, F))]
    weights = gate_up.reshape(-1, 2 * F) if t.by_channel else gate_up.reshape(2 * F, -1)
    starts = lambda column: (column, F + column)
    return _launch(
        "swiglu_forward", finish, x, weights, (), out, F, hidden, starts, t, programs, interpret
    )


def backward(
    d_out: BFloat16[Array, "M D"],
    down: BFloat16[Array, "F D"],
    gate_up: BFloat16[Array, "M 2 F"],
    *,
    tiling: Tiling | None = None,
    programs: int = 132,
    interpret: bool = False,
) -> tuple[BFloat16[Array, "M 2 F"], BFloat16[Array, "M F"]]:
    """The gradient with respect to gate and up of d_h = d_out @ down.T, and h again.

    d_h is rounded to bf16, as if it had been written. Options: `forward`'s.
    """
    t = tiling or Tiling(128, 3, 2, pieces_in=3, in_turn=True)
    (M, _, F), hidden = gate_up.shape, t.columns

    def finish(sums, row, column, load, out, emit):
        pieces = [(r, c) for r in range(0, t.rows, SIDE) for c in range(0, hidden, SIDE)]
        for i, (r, c) in enumerate(pieces):
            gate_tile, up_tile = load(i)
            gate, up = (x[...].astype(jnp.float32) for x in (gate_tile, up_tile))
            d_h = _rounded(sums, r, c).astype(jnp.float32)
            silu, slope = _silu(gate)
            gate_tile[...] = (d_h * up * slope).astype(jnp.bfloat16)
            up_tile[...] = (d_h * silu).astype(jnp.bfloat16)
            place = (pl.ds(row + r, SIDE), pl.ds(column + c, SIDE))
            emit(
                (silu * up).astype(jnp.bfloat16),
                out[1].at[place],
                (gate_tile, out[0].at[place[0], 0, place[1]]),
                (up_tile, out[0].at[place[0], 1, place[1]]),
            )

    out = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((M, 2, F), (M, F))]
    starts = lambda column: (column,)
    return _launch(
        "swiglu_backward", finish, d_out, down, (gate_up,), out, F, hidden, starts, t, programs,
        interpret,
    )  # fmt: skip


def product(x, w, *, tiling, programs=132, interpret=False):
    """x @ w.T."""
    t = tiling
    M, N = x.shape[0], w.shape[0]

    def finish(sums, row, column, load, out, emit):
        for r in range(0, t.rows, SIDE):
            for c in range(0, t.columns, SIDE):
                emit(
                    sums[r : r + SIDE, c : c + SIDE].astype(jnp.bfloat16),
                    out[0].at[pl.ds(row + r, SIDE), pl.ds(column + c, SIDE)],
                )

    return _launch(
        "product", finish, x, w, (), [jax.ShapeDtypeStruct((M, N), jnp.bfloat16)], N, t.columns,
        lambda column: (column,), t, programs, interpret,
    )  # fmt: skip


def _rounded(sums, row, column):
    """A piece of the sums in bf16."""
    piece = sums[row : row + SIDE, column : column + SIDE].astype(jnp.bfloat16)
    # Two numbers at a time: left to itself, the compiler rounds one by one those that are
    # widened again, four times as slowly as it divides.
    return lax.optimization_barrier(piece)


def _silu(x):
    """silu and its derivative. 1 / y costs many instructions; 1 / sqrt(y) is one of them."""
    root = lax.rsqrt(1.0 + jnp.exp2(x * -_LOG2_E))
    share = root * root
    y = x * share
    return y, share + y * (1.0 - share)


def _launch(name, finish, x, w, inputs, out, N, hidden, starts, t: Tiling, programs, interpret):
    """x @ w.T, whose sums `finish` takes.

    Args:
      finish: called with a warpgroup's sums, the first of their rows and hidden channels,
        `load(i)`, which gives the tiles where piece i of gate and up has come in, the results
        in memory, and `emit(piece, where, *others)`, which sends a piece there, and tiles of
        shared memory with it.
      hidden: of the N hidden channels, those in a tile.
      starts: the rows of w that belong to a tile, as starts of equal blocks.
    """
    (M, D), bf16 = x.shape, jnp.bfloat16
    steps, stages = D // SIDE, t.stages
    tile_rows = 128
    blocks = t.columns // hidden  # of w
    tiles_m, tiles_n = pl.cdiv(M, tile_rows * t.cluster), pl.cdiv(N, hidden)
    tiles = tiles_m * tiles_n
    programs //= t.cluster
    pieces = t.rows // SIDE * (hidden // SIDE)
    pieces_in = min(t.pieces_in, pieces)

    def body(*refs):
        refs = iter(refs)
        x_ref, w_ref = next(refs), next(refs)
        in_refs = [next(refs) for _ in inputs]
        out_refs = [next(refs) for _ in out]
        scratch = dict(zip(scratch_types, refs, strict=True))
        x_tiles, w_tiles = scratch["x"], scratch["w"]
        full, empty = scratch["full"], scratch["empty"]
        warpgroup, program = lax.axis_index("wg"), lax.axis_index("program")
        rank = lax.axis_index("rank") if t.cluster > 1 else 0
        count = lax.div(tiles - 1 - program, programs) + 1  # tiles of this program

        def place(i):
            """First row and hidden channel of the program's i-th tile."""
            tile = program + i * programs
            band = t.band * tiles_n
            first = lax.div(tile, band) * t.band
            height = jnp.minimum(t.band, tiles_m - first)
            inside = lax.rem(tile, band)
            row = first + lax.rem(inside, height)
            return (row * t.cluster + rank) * tile_rows, lax.div(inside, height) * hidden

        def ready(i, slot):
            """Each warpgroup has barriers of its own, which it waits for every time."""
            return full.at[lax.rem(i, _WARPGROUPS) * stages + slot if t.in_turn else slot]

        loop = lambda low, high, step: lax.fori_loop(low, high, lambda i, _: step(i), None)

        @pl.when(warpgroup == _WARPGROUPS)
        def _load():
            plgpu.set_max_registers(_REGISTERS["load"], action="decrease")

            def load_tile(i):
                row, column = place(i)
                if t.ahead:
                    # Into the L2, by the programs of a row of tiles together.
                    next_row, next_column = place(i + 1)
                    part = lax.div(next_column, hidden)

                    @pl.when((i + 1 < count) & (part < steps))
                    def _():
                        plgpu.async_prefetch(
                            x_ref.at[pl.ds(next_row, tile_rows), pl.ds(part * SIDE, SIDE)]
                        )

                    if inputs:
                        @pl.when(i + 1 < count)
                        def _():
                            for part in range(2):
                                plgpu.async_prefetch(
                                    in_refs[0].at[pl.ds(next_row, tile_rows), part, pl.ds(next_column, hidden)]
                                )

                def load_step(k):
                    number = i * steps + k
                    slot = lax.rem(number, stages)

                    @pl.when(number >= stages)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    channels = pl.ds(k * SIDE, SIDE)
                    plgpu.copy_gmem_to_smem(
                        x_ref.at[pl.ds(row, tile_rows), channels], x_tiles.at[slot], ready(i, slot)
                    )
                    for j, start in enumerate(starts(column)):
                        source, target = (pl.ds(start, hidden), channels), (slot, pl.ds(j * hidden, hidden))
                        if t.by_channel:
                            source, target = source[::-1], (slot, j)
                        plgpu.copy_gmem_to_smem(
                            w_ref.at[source],
                            w_tiles.at[target],
                            ready(i, slot),
                            **({"collective_axes": "rank"} if t.cluster > 1 else {}),
                        )

                loop(0, steps, load_step)

            loop(0, count, load_tile)
            # Programs of a cluster signal to one another: none leaves before that is over.
            total = count * steps
            last = lambda number: plgpu.barrier_wait(empty.at[lax.rem(number, stages)])
            loop(jnp.maximum(total - stages, 0), total, last)

        @pl.when(warpgroup < _WARPGROUPS)
        def _multiply():
            plgpu.set_max_registers(_REGISTERS["multiply"], action="increase")

            def take_tile(i):
                row, column = place(i)
                if not t.in_turn:
                    row += warpgroup * t.rows
                fetch, load = _incoming(in_refs, scratch, warpgroup, row, column, hidden)
                if inputs:
                    with jax.named_scope("ask"):
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    for piece in range(pieces_in):
                        fetch(piece)

                def run(sums):
                    def step(k):
                        slot = lax.rem(i * steps + k, stages)
                        plgpu.barrier_wait(ready(i, slot))
                        rows = () if t.in_turn else (pl.ds(warpgroup * t.rows, t.rows),)
                        if t.by_channel:
                            for j in range(blocks):
                                plgpu.wgmma(sums.at[:, j * hidden : (j + 1) * hidden], x_tiles.at[(slot, *rows)], w_tiles.at[slot, j])
                        else:
                            w_tile = w_tiles.at[slot].transpose((1, 0))
                            plgpu.wgmma(sums, x_tiles.at[(slot, *rows)], w_tile)
                        plgpu.wgmma_wait(blocks if t.by_channel else 1)

                        # The step before this one has now read its stage.
                        @pl.when(k > 0)
                        def _():
                            plgpu.barrier_arrive(empty.at[lax.rem(i * steps + k - 1, stages)])

                    with jax.named_scope("multiply"):
                        loop(0, steps, step)
                    value = sums[...]
                    plgpu.barrier_arrive(empty.at[lax.rem(i * steps + steps - 1, stages)])
                    return value

                sums = pl.run_scoped(run, plgpu.ACC((t.rows, t.columns), jnp.float32))
                emit = _outgoing(scratch["out"], warpgroup, t.slots, pieces, pieces_in, fetch)
                with jax.named_scope("finish"):
                    finish(sums, row, column, load, out_refs, emit)

            if t.in_turn:
                own = lax.div(count - warpgroup + 1, 2)
                loop(0, own, lambda j: take_tile(2 * j + warpgroup))
            else:
                loop(0, count, take_tile)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    swizzled = (plgpu.TilingTransform((8, SIDE)), plgpu.SwizzleTransform(128))
    readers = 1 if t.in_turn else _WARPGROUPS
    kind = plgpu.Barrier
    if t.cluster > 1:
        kind = functools.partial(plgpu.ClusterBarrier, collective_axes=("rank",))
    scratch_types = {
        "x": plgpu.SMEM((stages, tile_rows, SIDE), bf16, transforms=swizzled),
        "w": plgpu.SMEM((stages, blocks, SIDE, hidden) if t.by_channel else (stages, t.columns, SIDE), bf16, transforms=swizzled),
        "full": plgpu.Barrier(
            num_arrivals=1 + blocks, num_barriers=stages * (_WARPGROUPS if t.in_turn else 1)
        ),
        "empty": kind(num_arrivals=readers, num_barriers=stages),
        "out": plgpu.SMEM((_WARPGROUPS * t.slots, SIDE, SIDE), bf16, transforms=swizzled),
    }
    if inputs:
        scratch_types["in"] = plgpu.SMEM(
            (_WARPGROUPS * pieces_in, 2, SIDE, SIDE), bf16, transforms=swizzled
        )
        scratch_types["arrived"] = plgpu.Barrier(
            num_arrivals=2, num_barriers=_WARPGROUPS * pieces_in
        )
    body.__name__ = name
    clusters = {"cluster": (t.cluster,), "cluster_names": ("rank",)} if t.cluster > 1 else {}
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=list(scratch_types.values()),
        grid=(programs,),
        grid_names=("program",),
        **clusters,
        num_threads=_WARPGROUPS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, **({'profile_dir': t.profile, 'profile_space': 56, 'profile_bounds_check': True} if t.profile else {})),
        **({"interpret": plgpu.InterpretGPUParams()} if interpret else {}),
    )(x, w, *inputs)


def _incoming(refs, scratch, warpgroup, row, column, hidden):
    """Ways to ask for a piece of gate and up, and to wait for it."""
    if not refs:
        return None, None
    gate_up, tiles, arrived = refs[0], scratch["in"], scratch["arrived"]
    pieces_in = tiles.shape[0] // _WARPGROUPS
    across = hidden // SIDE
    index = lambda piece: warpgroup * pieces_in + piece % pieces_in

    def fetch(piece):
        rows = pl.ds(row + piece // across * SIDE, SIDE)
        columns = pl.ds(column + piece % across * SIDE, SIDE)
        for part in range(2):
            plgpu.copy_gmem_to_smem(
                gate_up.at[rows, part, columns],
                tiles.at[index(piece), part],
                arrived.at[index(piece)],
            )

    def load(piece):
        with jax.named_scope("arrive"):
            plgpu.barrier_wait(arrived.at[index(piece)])
        return tiles.at[index(piece), 0], tiles.at[index(piece), 1]

    return fetch, load


def _outgoing(tiles, warpgroup, slots, pieces, pieces_in, fetch):
    """A way to send a piece, for the pieces of one tile after the other."""
    number = 0

    def emit(piece, where, *others):
        nonlocal number
        if number == 0 or number >= slots:
            # All that left before: of the last tile, or of the piece whose slot is taken.
            with jax.named_scope("slot"):
                plgpu.wait_smem_to_gmem(0 if number == 0 else slots - 1, wait_read_only=True)
        if fetch is not None and number >= slots and number - slots + pieces_in < pieces:
            fetch(number - slots + pieces_in)
        slot = tiles.at[warpgroup * slots + number % slots]
        slot[...] = piece
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(slot, where, commit_group=False)
        for source, target in others:
            plgpu.copy_smem_to_gmem(source, target, commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        number += 1

    return emit
