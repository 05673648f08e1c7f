"""What is gated before a product, as Pallas-Triton kernels for NVIDIA GPUs.

Each kernel is one pass: a program takes a block of rows, reads every number that it needs
once, computes in float32 and rounds each result once. The backward kernels give the gated
tokens again, which nothing keeps: the gradient of the product's weights reads them.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What a program takes.

    Attributes:
      rows, columns: of a tile, powers of two; a head's columns are never cut.
      num_warps: of a program.
    """

    rows: int
    columns: int
    num_warps: int = 4


def swiglu_forward(
    gate_up: Float[Array, "B N 2 F"], *, tiling: Tiling | None = None, interpret: bool = False
) -> Float[Array, "B N F"]:
    """silu(gate) * up.

    Args:
      gate_up: bf16, float16 or float32.
      tiling: instead of the one that suits the arguments.
      interpret: run on any platform, slowly.

    Returns:
      h in gate_up's dtype.
    """
    (h,) = _swiglu(_swiglu_forward_kernel, tiling, interpret, gate_up)
    return h


def swiglu_backward(
    gate_up: Float[Array, "B N 2 F"],
    d_h: Float[Array, "B N F"],
    *,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B N 2 F"], Float[Array, "B N F"]]:
    """Gradient with respect to gate_up, and h again.

    Args:
      d_h: the gradient with respect to h, in gate_up's dtype.

    The other arguments are `swiglu_forward`'s.
    """
    return _swiglu(_swiglu_backward_kernel, tiling, interpret, gate_up, d_h)


def heads_forward(
    o: Float[Array, "B N H Dv"],
    y: Float[Array, "B N H W"],
    *,
    gate_start: int,
    epsilon: float,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> Float[Array, "B N H Dv"]:
    """o / sqrt(mean(o^2) + epsilon) * silu(gate), the mean over Dv.

    Args:
      o: bf16, float16 or float32.
      y: the gate is its columns gate_start to gate_start + Dv; in o's dtype.
      gate_start, epsilon: as said.
      tiling: instead of the one that suits the arguments.
      interpret: run on any platform, slowly.

    Returns:
      h in o's dtype.
    """
    (h,) = _heads(_heads_forward_kernel, gate_start, epsilon, tiling, interpret, o, y)
    return h


def heads_backward(
    o: Float[Array, "B N H Dv"],
    y: Float[Array, "B N H W"],
    d_h: Float[Array, "B N H Dv"],
    *,
    gate_start: int,
    epsilon: float,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H Dv"], Float[Array, "B N H W"], Float[Array, "B N H Dv"]]:
    """Gradients with respect to o and y, and h again.

    Args:
      d_h: the gradient with respect to h, in o's dtype.

    The other arguments are `heads_forward`'s.

    Returns:
      d_o; d_y, of which only the gate's columns are written: the others hold anything, NaN
      included; h.
    """
    return _heads(_heads_backward_kernel, gate_start, epsilon, tiling, interpret, o, y, d_h)


def _swiglu(kernel, tiling: Tiling | None, interpret: bool, *args):
    """A kernel over rows of tokens and blocks of hidden channels: gate_up and, backward, d_h."""
    *lead, _, width = args[0].shape
    tiling = tiling or _tiling(_dividing(width), args[0].dtype)
    blocks = pl.cdiv(width, tiling.columns)
    # Programs that read the same rows follow one another.
    row, column = lambda i: i // blocks, lambda i: i % blocks
    one = pl.BlockSpec((tiling.rows, tiling.columns), lambda i: (row(i), column(i)))
    two = pl.BlockSpec((tiling.rows, 2, tiling.columns), lambda i: (row(i), 0, column(i)))
    num_rows = math.prod(lead)
    shapes = [(num_rows, 2, width), (num_rows, width)]

    def body(*refs):
        i = pl.program_id(0)
        kernel(*refs, mask=_mask(tiling, row(i), num_rows, column(i), width))

    grid = (pl.cdiv(num_rows, tiling.rows) * blocks,)
    results = _launch(body, kernel, grid, [two, one], shapes, tiling, interpret, args)
    return [x.reshape(*lead, *x.shape[1:]) for x in results]


def _heads(kernel, gate_start, epsilon, tiling: Tiling | None, interpret: bool, *args):
    """A kernel over rows, each a head of a token: o, y and, backward, d_h."""
    (*lead, width), joint = args[0].shape, args[1].shape[-1]
    tiling = tiling or _tiling(pl.next_power_of_2(width), args[0].dtype)
    head = pl.BlockSpec((tiling.rows, tiling.columns), lambda i: (i, 0))
    # From the start of each row, so that the gate need not lie at a multiple of its width.
    gated = pl.BlockSpec((tiling.rows, gate_start + tiling.columns), lambda i: (i, 0))
    num_rows = math.prod(lead)
    shapes = [(num_rows, width), (num_rows, joint), (num_rows, width)]

    def body(*refs):
        mask = _mask(tiling, pl.program_id(0), num_rows, 0, width)
        gate = pl.ds(gate_start, tiling.columns)
        kernel(*refs, gate=gate, width=width, epsilon=epsilon, mask=mask)

    grid = (pl.cdiv(num_rows, tiling.rows),)
    results = _launch(body, kernel, grid, [head, gated, head], shapes, tiling, interpret, args)
    return [x.reshape(*lead, x.shape[-1]) for x in results]


def _launch(body, kernel, grid, specs, shapes, tiling: Tiling, interpret: bool, args):
    """Backward, there is a result like each argument; forward, one like the last, d_h."""
    results = slice(None) if len(args) == len(specs) else slice(-1, None)
    dtype = args[0].dtype
    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=specs[: len(args)],
        out_specs=specs[results],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape in shapes[results]],
        compiler_params=plgpu.CompilerParams(num_warps=tiling.num_warps, num_stages=1),
        interpret=interpret,
        name=f"gated_{kernel.__name__.strip('_').removesuffix('_kernel')}",
    )(*(x.reshape(shape) for x, shape in zip(args, shapes, strict=False)))


def _tiling(columns: int, dtype) -> Tiling:
    """16 bytes of each array for each thread."""
    num_warps, per_thread = 4, 16 // dtype.itemsize
    return Tiling(max(1, num_warps * 32 * per_thread // columns), columns, num_warps)


def _dividing(width: int) -> int:
    """Columns of a tile that leave none of its own empty, if 32 or more of them can."""
    columns = next((size for size in (256, 128, 64, 32) if width % size == 0), 256)
    return min(columns, pl.next_power_of_2(width))


def _mask(tiling: Tiling, row, num_rows: int, column, num_columns: int):
    """Which of a tile's numbers exist; None for all."""
    mask = None
    for block, size, total, axis in (
        (row, tiling.rows, num_rows, 0),
        (column, tiling.columns, num_columns, 1),
    ):
        if total % size:
            exists = block * size + jnp.arange(size) < total
            exists = lax.broadcast_in_dim(exists, (tiling.rows, tiling.columns), (axis,))
            mask = exists if mask is None else mask & exists
    return mask


def _load(window, mask) -> Float[Array, "T W"]:
    x = plgpu.load(window, mask=mask, other=None if mask is None else 0.0)
    return x.astype(jnp.float32)


def _store(window, x: Float[Array, "T W"], mask) -> None:
    plgpu.store(window, x.astype(window.dtype), mask=mask)


def _part(ref, part: int):
    """The gate, or what it gates. (A masked load takes no Python number as an index.)"""
    return ref.at[:, jnp.int32(part), :]


def _silu(x: Float[Array, "T W"]) -> tuple[Float[Array, "T W"], Float[Array, "T W"]]:
    """silu and its derivative."""
    share = jax.nn.sigmoid(x)
    y = x * share
    return y, share + y * (1.0 - share)


def _swiglu_forward_kernel(gate_up_ref, h_ref, *, mask):
    gate, up = (_load(_part(gate_up_ref, part), mask) for part in range(2))
    _store(h_ref.at[:, :], _silu(gate)[0] * up, mask)


def _swiglu_backward_kernel(gate_up_ref, dh_ref, d_gate_up_ref, h_ref, *, mask):
    gate, up = (_load(_part(gate_up_ref, part), mask) for part in range(2))
    d_h = _load(dh_ref.at[:, :], mask)
    silu, slope = _silu(gate)
    _store(_part(d_gate_up_ref, 0), d_h * up * slope, mask)
    _store(_part(d_gate_up_ref, 1), d_h * silu, mask)
    _store(h_ref.at[:, :], silu * up, mask)


def _normalise(o_ref, width: int, epsilon: float, mask):
    """o of unit mean square, and the factor that makes it so; columns that do not exist are 0."""
    o = _load(o_ref.at[:, :], mask)
    factor = lax.rsqrt(_row_mean(o * o, width) + epsilon)
    return o * factor, factor


def _row_mean(x: Float[Array, "T W"], width: int) -> Float[Array, "T 1"]:
    return jnp.sum(x, axis=1)[:, None] * (1.0 / width)


def _heads_forward_kernel(o_ref, y_ref, h_ref, *, gate, width, epsilon, mask):
    normal, _ = _normalise(o_ref, width, epsilon, mask)
    silu, _ = _silu(_load(y_ref.at[:, gate], mask))
    _store(h_ref.at[:, :], normal * silu, mask)


def _heads_backward_kernel(
    o_ref, y_ref, dh_ref, d_o_ref, d_y_ref, h_ref, *, gate, width, epsilon, mask
):
    normal, factor = _normalise(o_ref, width, epsilon, mask)
    silu, slope = _silu(_load(y_ref.at[:, gate], mask))
    d_h = _load(dh_ref.at[:, :], mask)
    d_normal = d_h * silu
    along = _row_mean(normal * d_normal, width)
    _store(d_o_ref.at[:, :], factor * (d_normal - normal * along), mask)
    _store(d_y_ref.at[:, gate], d_h * normal * slope, mask)
    _store(h_ref.at[:, :], normal * silu, mask)
