"""Products of few rows with a weight matrix, as decoding needs them, on Hopper.

Mosaic GPU kernels for bf16. Decoding multiplies a few hundred rows by each matrix once per
token: what bounds it is how fast tiles reach the multiprocessors from the L2 cache, and how
few of them do. So one wave of programs keeps as much of K in flight as shared memory holds;
programs of a cluster share what they load (TMA multicast), and may split K, adding their parts
up through each other's shared memory.

M rows, K inputs, N outputs, F = N / 2 for gated products.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16

from lasad_jax.ops.kernels import mosaic_tiles as mg
from lasad_jax.ops.kernels.decode_tiling import (
    PAIR,
    ROWS,
    Tiling,
    argument_obstacle,
    best_tiling,
    interleave,
    obstacle,
)

__all__ = ["interleave", "obstacle", "project", "project_add", "swiglu"]


def project(
    x: BFloat16[Array, "M K"],
    w: BFloat16[Array, "K N"],
    *,
    norm_eps: float | None = None,
    **options,
) -> BFloat16[Array, "M N"]:
    """x @ w, summed in float32.

    Args:
      x: the rows.
      w: the matrix; K a multiple of 64, N of 8 (of 64 if gated).
      norm_eps: if given, rows of x are divided by their root mean square, of this epsilon.
        RMSNorm's scale is to be multiplied into the rows of w beforehand.
      **options: `tiling` in place of the one chosen; `interpret`.

    Raises:
      ValueError: for what `obstacle` names.
    """
    return _product(x, w, None, norm_eps=norm_eps, **options)


def project_add(
    x: BFloat16[Array, "M K"],
    w: BFloat16[Array, "K N"],
    residual: BFloat16[Array, "M N"],
    **options,
) -> BFloat16[Array, "M N"]:
    """residual + x @ w, rounded once. Options and errors: `project`."""
    return _product(x, w, residual, **options)


def swiglu(
    x: BFloat16[Array, "M K"],
    w: BFloat16[Array, "K 2F"],
    *,
    norm_eps: float | None = None,
    **options,
) -> BFloat16[Array, "M F"]:
    """silu(x @ gate) * (x @ up) for `w = interleave(gate, up)`. The rest: `project`."""
    return _product(x, w, None, norm_eps=norm_eps, gated=True, **options)


def _product(
    x,
    w,
    residual,
    *,
    norm_eps=None,
    gated=False,
    tiling: Tiling | None = None,
    interpret: bool = False,
):
    if why := argument_obstacle(x, w, residual, gated):
        raise ValueError(f"decode product: {why}")
    (M, K), N, normed = x.shape, w.shape[1], norm_eps is not None
    t = tiling or best_tiling(M, K, N, gated=gated, normed=normed)
    if why := t.obstacle(K, N, gated=gated, normed=normed):
        raise ValueError(f"tiling: {t}: {why}")
    # TMA clips at the end of an array, but a tile may not be larger than all of it, and an
    # array is whole rows of eight.
    padded = max(M + -M % 8, t.rows) - M
    if padded:
        x = jnp.pad(x, ((0, padded), (0, 0)))
        residual = None if residual is None else jnp.pad(residual, ((0, padded), (0, 0)))
    out = _launch(x, w, residual, t, norm_eps=norm_eps, gated=gated, interpret=interpret)
    return out[:M] if padded else out


# Products alike are traced and compiled once, however many layers call for them.
@functools.partial(jax.jit, static_argnames=("t", "norm_eps", "gated", "interpret"))
def _launch(x, w, residual, t: Tiling, *, norm_eps, gated, interpret):
    (M, K), N = x.shape, w.shape[1]
    warpgroups = t.rows // ROWS
    steps = t.steps(K)
    stages = min(t.stages, steps)
    width = t.columns // t.split  # of what a program finishes
    out_width = width // 2 if gated else width
    shape = (M, N // 2 if gated else N)
    part, part_transforms = _swizzled(PAIR if gated else out_width, 2)
    parts = out_width // part
    slots = min(parts, 2) if residual is None else parts
    bf16 = jnp.bfloat16

    def body(*refs):
        refs = iter(refs)
        x_ref, w_ref = next(refs), next(refs)
        residual_ref = next(refs) if residual is not None else None
        out_ref, scratch = next(refs), dict(zip(scratch_types, refs, strict=True))
        x_tiles, w_tiles, full, out_tiles = (scratch[name] for name in ("x", "w", "full", "out"))
        empty = scratch.get("empty")
        warpgroup = lax.axis_index("wg")
        index = lambda name: (
            lax.axis_index(f"grid_{name}") * t.cluster["mn".index(name)] + lax.axis_index(name)
        )
        row, column = index("m") * t.rows, index("n") * t.columns
        rank = lax.axis_index("k")
        first = rank * steps
        own_column = (index("n") * t.split + rank) * out_width

        def fetch_x(i, slot):
            source = x_ref.at[pl.ds(row, t.rows), pl.ds((first + i) * t.depth, t.depth)]
            shared = {"collective_axes": "n"} if t.cluster[1] > 1 else {}
            plgpu.copy_gmem_to_smem(source, x_tiles.at[slot], full.at[slot], **shared)

        def fetch_w(i, slot):
            source = w_ref.at[pl.ds((first + i) * t.depth, t.depth), pl.ds(column, t.columns)]
            shared = {"collective_axes": "m"} if t.cluster[0] > 1 else {}
            plgpu.copy_gmem_to_smem(source, w_tiles.at[slot], full.at[slot], **shared)

        @pl.when(warpgroup == warpgroups)
        def _load():
            loop = lambda low, high, step: lax.fori_loop(low, high, lambda i, _: step(i), None)
            loop(0, stages, lambda i: fetch_w(i, i))
            loop(0, stages, lambda i: fetch_x(i, i))
            if residual is not None:
                for j in range(parts):
                    place = (pl.ds(row, t.rows), pl.ds(own_column + j * part, part))
                    plgpu.copy_gmem_to_smem(
                        residual_ref.at[place], out_tiles.at[j], scratch["added"]
                    )

            def refill(i):
                slot = lax.rem(i, stages)
                plgpu.barrier_wait(empty.at[slot])
                fetch_w(i, slot)
                fetch_x(i, slot)

            if steps > stages:
                loop(stages, steps, refill)

        @pl.when(warpgroup < warpgroups)
        def _multiply():
            rows = pl.ds(warpgroup * ROWS, ROWS)

            def run(sums):
                def step(i, squares):
                    slot = lax.rem(i, stages)
                    plgpu.barrier_wait(full.at[slot])
                    tile = x_tiles.at[slot, rows]
                    if norm_eps is not None:
                        # Before the product: others may fill the tile once that is done.
                        value = tile[...].astype(jnp.float32)
                        squares += value * value
                    plgpu.wgmma(sums, tile, w_tiles.at[slot])
                    plgpu.wgmma_wait(1)
                    if steps > stages:
                        # The product before this one has now read its tiles.
                        @pl.when((i > 0) & (i - 1 + stages < steps))
                        def _():
                            plgpu.barrier_arrive(empty.at[lax.rem(i - 1 + stages, stages)])

                    return squares

                squares = None
                if norm_eps is not None:
                    squares = jnp.zeros((ROWS, t.depth), jnp.float32)
                    squares = plgpu.layout_cast(squares, mg.TILE)
                squares = lax.fori_loop(0, steps, step, squares)
                return sums[...], squares

            value, squares = pl.run_scoped(run, plgpu.ACC((ROWS, t.columns), jnp.float32))
            if norm_eps is not None:
                scale = lax.rsqrt(jnp.sum(squares, axis=1) / K + norm_eps)
                value *= lax.broadcast_in_dim(scale, value.shape, [0])
            if t.split > 1:
                value = _reduce(value, t.split, scratch, warpgroup)
            if residual is not None:
                plgpu.barrier_wait(scratch["added"])
            for j in range(parts):
                piece = _piece(value, j * part, part, gated)
                target = out_tiles.at[j % slots, rows]
                if residual is not None:
                    piece += target[...].astype(jnp.float32)
                elif j >= slots:
                    plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
                    plgpu.commit_smem()
                target[...] = piece.astype(bf16)
                plgpu.commit_smem()
                place = (
                    pl.ds(row + warpgroup * ROWS, ROWS),
                    pl.ds(own_column + j * part, part),
                )
                plgpu.copy_smem_to_gmem(target, out_ref.at[place])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    # wgmma takes both operands swizzled alike.
    transforms = _swizzled(math.gcd(t.depth, t.columns), 2)[1]
    scratch_types = {
        "x": plgpu.SMEM((stages, t.rows, t.depth), bf16, transforms=transforms),
        "w": plgpu.SMEM((stages, t.depth, t.columns), bf16, transforms=transforms),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "out": plgpu.SMEM((slots, t.rows, part), bf16, transforms=part_transforms),
    }
    if steps > stages:
        axes = [name for name, size in zip("mn", t.cluster, strict=True) if size > 1]
        kind = functools.partial(plgpu.ClusterBarrier, collective_axes=tuple(axes))
        kind = kind if axes else plgpu.Barrier
        scratch_types["empty"] = kind(num_arrivals=warpgroups, num_barriers=stages)
    if residual is not None:
        scratch_types["added"] = plgpu.Barrier(num_arrivals=parts)
    if t.split > 1:
        scratch_types["received"] = plgpu.SMEM(
            (t.split, warpgroups, ROWS, width),
            jnp.float32,
            transforms=_swizzled(width, 4)[1],
        )
        scratch_types["arrived"] = plgpu.Barrier(num_arrivals=t.split, num_barriers=warpgroups)
    inputs = (x, w) if residual is None else (x, w, residual)
    body.__name__ = "decode_product"
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, bf16),
        scratch_types=list(scratch_types.values()),
        grid=t.grid(M, N),
        grid_names=("grid_m", "grid_n"),
        cluster=(*t.cluster, t.split),
        cluster_names=("m", "n", "k"),
        num_threads=warpgroups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        **({"interpret": plgpu.InterpretGPUParams()} if interpret else {}),
    )(*inputs)


def _swizzled(width, itemsize):
    """Elements in a row of the widest swizzle that divides rows of this width, and transforms."""
    swizzle = next(s for s in (128, 64, 32) if width * itemsize % s == 0)
    columns = swizzle // itemsize
    return columns, (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle))


def _piece(value, start, width, gated):
    """Columns of the result: of the sums themselves, or of gates and ups by turns."""
    if not gated:
        return value[:, start : start + width]
    gate = value[:, 2 * start : 2 * start + PAIR]
    up = value[:, 2 * start + PAIR : 2 * start + 2 * PAIR]
    return gate / (1 + jnp.exp(-gate)) * up


def _reduce(value, split, scratch, warpgroup):
    """A rank's share of the columns, added up over the ranks of a cluster, in their order."""
    received, arrived = scratch["received"], scratch["arrived"].at[warpgroup]
    width = value.shape[1] // split
    for peer in range(split):
        plgpu.async_store_smem(
            value[:, peer * width : (peer + 1) * width],
            received.at[lax.axis_index("k"), warpgroup],
            arrived,
            cluster_idx=jnp.int32(peer),
            cluster_dim="k",
        )
    plgpu.barrier_wait(arrived)
    return functools.reduce(jnp.add, [received[i, warpgroup] for i in range(split)])
