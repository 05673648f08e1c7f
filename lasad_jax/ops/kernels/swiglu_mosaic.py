"""SwiGLU inside the matrix products of training, on Hopper.

Mosaic GPU kernels for bf16. The product before a SwiGLU writes gate, up and h at once; the one
behind it gives, backward, d_h, which never reaches memory: gate and up come in, and their
gradients and h go out. So the elementwise work costs no pass over memory of its own.

Each multiprocessor has one program that walks over tiles of the result. One of its warpgroups
loads, as many steps ahead as shared memory holds; others multiply, round the sums of a tile and
leave them in shared memory; two finish a tile while the next one is multiplied, half of its rows
each. Gate and up lie side by side in blocks of 64 columns (`interleave` of `decode_tiling`), in
memory and in the matrix.

M rows, D channels, F hidden channels.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16

from lasad_jax.ops.kernels.between_tiling import num_programs
from lasad_jax.ops.kernels.swiglu_tiling import COLUMNS, FINISHERS, ROWS, SIDE, Tiling

_ACROSS = COLUMNS // SIDE
_LOG2_E = 1.4426950408889634


def forward(
    x: BFloat16[Array, "M D"],
    gate_up: BFloat16[Array, "D 2F"],
    *,
    tiling: Tiling | None = None,
    programs: int | None = None,
    interpret: bool = False,
) -> tuple[BFloat16[Array, "M 2F"], BFloat16[Array, "M F"]]:
    """both = x @ gate_up, and h = silu(gate) * up of the rounded gate and up.

    Args:
      x: the rows.
      gate_up: both matrices, interleaved.
      tiling: instead of the usual one.
      programs: at most as many as there are multiprocessors; None for that many.
      interpret: run on any platform, slowly.
    """
    M, N = x.shape[0], gate_up.shape[1]

    def finisher(walk, sums, own, both_ref, h_ref, h_tiles):
        def finish(i):
            row, across = walk.place(i, own)
            gate_tile, up_tile, h_tile = sums.at[0], sums.at[1], h_tiles.at[own]
            _send(gate_tile, both_ref, row, across * COLUMNS)
            _send(up_tile, both_ref, row, across * COLUMNS + SIDE)
            h_tile[...] = _narrow(_silu(_wide(gate_tile))[0] * _wide(up_tile))
            plgpu.commit_smem()
            _send(h_tile, h_ref, row, across * SIDE)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        return finish

    return _launch(
        "swiglu_forward",
        finisher,
        (x, gate_up),
        [(M, N), (M, N // 2)],
        [_tiles(FINISHERS, SIDE, SIDE)],
        tiling or Tiling(stages=5),
        programs,
        interpret,
    )


def backward(
    d_out: BFloat16[Array, "M D"],
    down: BFloat16[Array, "F D"],
    both: BFloat16[Array, "M 2F"],
    *,
    tiling: Tiling | None = None,
    programs: int | None = None,
    interpret: bool = False,
) -> tuple[BFloat16[Array, "M 2F"], BFloat16[Array, "M F"]]:
    """The gradient with respect to `both` of d_h = d_out @ down.T, and h again.

    d_h is rounded to bf16, as if it had been written. Options: `forward`'s.
    """
    M, F = both.shape[0], both.shape[1] // 2

    def finisher(walk, sums, own, both_ref, d_ref, h_ref, tiles, arrived):
        def fetch(i, c):
            row, across = walk.place(i, own)
            unit = own * _ACROSS + c
            for part in range(2):
                window = _window(row, across * 2 * COLUMNS + (2 * c + part) * SIDE)
                plgpu.copy_gmem_to_smem(
                    both_ref.at[window], tiles.at[unit, part], arrived.at[unit]
                )

        def finish(i):
            row, across = walk.place(i, own)
            # Of the next tile, as soon as what lies in its place is on its way.
            fetch_next = lambda c: pl.when(i + 1 < walk.count)(lambda: fetch(i + 1, c))
            for c in range(_ACROSS):
                unit = own * _ACROSS + c
                gate_tile, up_tile, h_tile = tiles.at[unit, 0], tiles.at[unit, 1], sums.at[c]
                with jax.named_scope("arrive"):
                    plgpu.barrier_wait(arrived.at[unit])
                gate, up, d_h = map(_wide, (gate_tile, up_tile, h_tile))
                silu, slope = _silu(gate)
                gate_tile[...] = _narrow(d_h * up * slope)
                up_tile[...] = _narrow(d_h * silu)
                h_tile[...] = _narrow(silu * up)
                plgpu.commit_smem()
                _send(gate_tile, d_ref, row, across * 2 * COLUMNS + 2 * c * SIDE)
                _send(up_tile, d_ref, row, across * 2 * COLUMNS + (2 * c + 1) * SIDE)
                _send(h_tile, h_ref, row, across * COLUMNS + c * SIDE)
                if c > 0:
                    with jax.named_scope("sent"):
                        plgpu.wait_smem_to_gmem(3, wait_read_only=True)
                    fetch_next(c - 1)
            with jax.named_scope("sent"):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            fetch_next(_ACROSS - 1)

        for c in range(_ACROSS):
            fetch(0, c)
        return finish

    units = FINISHERS * _ACROSS
    return _launch(
        "swiglu_backward",
        finisher,
        (d_out, down, both),
        [(M, 2 * F), (M, F)],
        [_tiles(units, 2, SIDE, SIDE), plgpu.Barrier(num_arrivals=2, num_barriers=units)],
        tiling or Tiling(stages=4),
        programs,
        interpret,
    )


class _Walk:
    """The tiles of one program, in their order."""

    def __init__(self, M: int, N: int, t: Tiling, programs: int):
        self._t, self._programs = t, programs
        self._down, self._across = pl.cdiv(M, ROWS * t.cluster), pl.cdiv(N, COLUMNS)
        self._first = lax.axis_index("program")
        self.count = lax.div(self._down * self._across - 1 - self._first, programs) + 1

    def place(self, i, half=0):
        """Of tile i: the first row, of a half, and which tile across it is."""
        t, tile = self._t, self._first + i * self._programs
        first = lax.div(tile, t.band * self._across) * t.band
        inside = lax.rem(tile, t.band * self._across)
        height = jnp.minimum(t.band, self._down - first)
        row = first + lax.rem(inside, height)
        if t.cluster > 1:
            row = row * t.cluster + lax.axis_index("rank")
        return row * ROWS + half * SIDE, lax.div(inside, height)

    def tiles(self, step):
        _loop(0, self.count, step)


def _launch(name, finisher, inputs, out_shapes, scratch, t: Tiling, programs, interpret):
    """x @ w, or x @ w.T where x and w have the same width, for (x, w, ...) = inputs.

    Args:
      finisher: called with the walk, the rounded sums of a warpgroup's half of a tile, which
        half it is, the other inputs, results and `scratch`; gives what is to be done with tile i,
        after which the sums may be overwritten.
    """
    (M, D), w = inputs[0].shape, inputs[1]
    transposed = name == "swiglu_backward"
    N = w.shape[0 if transposed else 1]
    steps, stages = D // SIDE, t.stages
    programs = (programs or num_programs()) // t.cluster
    height = ROWS // t.multipliers

    def body(x_ref, w_ref, *refs):
        own_refs, shared = refs[: len(refs) - 7], refs[len(refs) - 7 :]
        x_tiles, w_tiles, full, empty, sums_tiles, ready, done = shared
        warpgroup, walk = lax.axis_index("wg"), _Walk(M, N, t, programs)

        @pl.when(warpgroup == t.warpgroups - 1)
        def _load():
            plgpu.set_max_registers(t.registers[0], action="decrease")

            def load(i):
                row, across = walk.place(i)

                def load_step(k):
                    number = i * steps + k
                    slot, channels = lax.rem(number, stages), pl.ds(k * SIDE, SIDE)
                    columns = pl.ds(across * COLUMNS, COLUMNS)
                    pl.when(number >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                    plgpu.copy_gmem_to_smem(
                        x_ref.at[pl.ds(row, ROWS), channels], x_tiles.at[slot], full.at[slot]
                    )
                    plgpu.copy_gmem_to_smem(
                        w_ref.at[(columns, channels) if transposed else (channels, columns)],
                        w_tiles.at[slot],
                        full.at[slot],
                        **({"collective_axes": "rank"} if t.cluster > 1 else {}),
                    )

                _loop(0, steps, load_step)

            walk.tiles(load)
            # Programs of a cluster signal to one another: none leaves before that is over.
            total = walk.count * steps
            last = lambda number: plgpu.barrier_wait(empty.at[lax.rem(number, stages)])
            _loop(jnp.maximum(total - stages, 0), total, last)

        @pl.when(warpgroup < t.multipliers)
        def _multiply():
            more = t.registers[1] > 65536 // (128 * t.warpgroups)
            plgpu.set_max_registers(t.registers[1], action="increase" if more else "decrease")

            def multiply(i):
                def run(sums):
                    def step(k):
                        slot = lax.rem(i * steps + k, stages)
                        plgpu.barrier_wait(full.at[slot])
                        w_tile = w_tiles.at[slot]
                        plgpu.wgmma(
                            sums,
                            x_tiles.at[slot, pl.ds(warpgroup * height, height)],
                            w_tile.transpose((1, 0)) if transposed else w_tile,
                        )
                        plgpu.wgmma_wait(1)
                        # The step before this one has now read its stage.
                        before = lax.rem(i * steps + k - 1, stages)
                        pl.when(k > 0)(lambda: plgpu.barrier_arrive(empty.at[before]))

                    with jax.named_scope("multiply"):
                        _loop(0, steps, step)
                    value = _narrow(sums[...])
                    plgpu.barrier_arrive(empty.at[lax.rem(i * steps + steps - 1, stages)])
                    return value

                value = pl.run_scoped(run, plgpu.ACC((height, COLUMNS), jnp.float32))
                with jax.named_scope("done"):
                    pl.when(i > 0)(lambda: plgpu.barrier_wait(done))
                for r in range(height // SIDE):
                    for c in range(_ACROSS):
                        half = warpgroup * (height // SIDE) + r
                        sums_tiles[half, c] = value[_window_of(r, c)]
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready)

            walk.tiles(multiply)
            plgpu.barrier_wait(done)

        @pl.when((warpgroup >= t.multipliers) & (warpgroup < t.warpgroups - 1))
        def _finish():
            plgpu.set_max_registers(t.registers[2], action="increase")
            own = warpgroup - t.multipliers
            finish = finisher(walk, sums_tiles.at[own], own, *own_refs)

            def finish_tile(i):
                with jax.named_scope("ready"):
                    plgpu.barrier_wait(ready)
                finish(i)
                plgpu.barrier_arrive(done)

            walk.tiles(finish_tile)

    empty = plgpu.Barrier
    if t.cluster > 1:
        empty = functools.partial(plgpu.ClusterBarrier, collective_axes=("rank",))
    shared = [
        _tiles(stages, ROWS, SIDE),
        _tiles(stages, *((COLUMNS, SIDE) if transposed else (SIDE, COLUMNS))),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        empty(num_arrivals=t.multipliers, num_barriers=stages),
        _tiles(FINISHERS, _ACROSS, SIDE, SIDE),
        plgpu.Barrier(num_arrivals=t.multipliers),
        plgpu.Barrier(num_arrivals=FINISHERS),
    ]
    body.__name__ = name
    cluster = {"cluster": (t.cluster,), "cluster_names": ("rank",)} if t.cluster > 1 else {}
    profile = {"profile_dir": t.profile, "profile_space": 40, "profile_bounds_check": True}
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in out_shapes],
        scratch_types=[*scratch, *shared],
        grid=(programs,),
        grid_names=("program",),
        **cluster,
        num_threads=t.warpgroups,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, **(profile if t.profile else {})
        ),
        **({"interpret": plgpu.InterpretGPUParams()} if interpret else {}),
    )(*inputs)


def _loop(low, high, step):
    lax.fori_loop(low, high, lambda i, _: step(i), None)


def _tiles(*shape):
    """Tiles in shared memory, swizzled as wgmma and TMA take them."""
    transforms = plgpu.TilingTransform((8, SIDE)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def _window(row, column):
    return pl.ds(row, SIDE), pl.ds(column, SIDE)


def _window_of(r, c):
    return slice(r * SIDE, (r + 1) * SIDE), slice(c * SIDE, (c + 1) * SIDE)


def _send(tile, target, row, column):
    plgpu.copy_smem_to_gmem(tile, target.at[_window(row, column)])


def _wide(tile):
    return tile[...].astype(jnp.float32)


def _narrow(x):
    return x.astype(jnp.bfloat16)


def _silu(x):
    """silu and its derivative. 1 / y costs many instructions; 1 / sqrt(y) is one of them."""
    root = lax.rsqrt(1.0 + jnp.exp2(x * -_LOG2_E))
    share = root * root
    y = x * share
    return y, share + y * (1.0 - share)
