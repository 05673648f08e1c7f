"""What both Mosaic GPU kernels of the mixed heads are built of, beside `mosaic_tiles`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector
from jax.extend.mlir.dialects import math as math_ops

from lasad_jax.ops.kernels import mosaic_tiles as mg
from lasad_jax.ops.passes.mixed_heads import GATE_COLUMNS, group_size

KEY_DIM, VALUE_DIM = 32, 64
# Of a head's columns of y.
Q, K, V, OUT_GATE, END = 0, KEY_DIM, 2 * KEY_DIM, 2 * KEY_DIM + VALUE_DIM, 2 * (KEY_DIM + VALUE_DIM)


def wide(x):
    return x.astype(jnp.float32)


def load(tile, interpret):
    """A bf16 tile in float32."""
    if interpret:
        return wide(tile[...])
    pairs = tile[...]

    # What conversion makes of the second of two numbers takes two instructions.
    @plgpu.inline_mgpu(
        arg_types=(mg.TILE,),
        return_type=plgpu.ShapeDtypeStruct(pairs.shape, jnp.float32, layout=mg.TILE),
    )
    def widened(_, x):
        return _wide_registers(x)

    return widened(pairs)


def narrow(x):
    return x.astype(jnp.bfloat16)


def in_groups(y):
    """(B, N, H, W) to (B, N, groups, columns of all heads of one)."""
    batch, num_tokens, heads, width = y.shape
    size = group_size(heads) if width > END else 1
    return y.reshape(batch, num_tokens, heads // size, size * width)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where the columns of a head are in y (B, N, groups, W).

    Attributes:
      group: of heads.
      first: of the head's own.
      gate: of its content gate, with the padding.
    """

    group: jax.Array
    first: jax.Array
    gate: jax.Array

    @classmethod
    def of(cls, y, heads, head):
        size = heads // y.shape[2]
        number = lax.rem(head, size)
        return cls(lax.div(head, size), number * END, size * END + number * GATE_COLUMNS)


def fresh(number, step, interpret):
    """The number, as far as the compiler can tell another one at each step (below 2^30).

    It would otherwise make what follows from a tile's place, the descriptors of its products above
    all, before the loop over steps, and keep them, for want of registers, in memory.
    """
    if interpret:
        return number
    splat = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(
        arg_types=(splat, splat),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=splat),
    )
    def unknown(_, number, step):
        number, step = (x.registers.item() for x in (number, step))
        shift = mgpu.utils.inline_ptx(
            "shr.u32 $0, $1, 30;", step, result_types=step.type, has_side_effects=True
        )
        return mgpu.FragmentedArray.splat(arith.addi(number, shift), (), is_signed=True)

    return unknown(jnp.int32(number), step)


def silu(x):
    """x sigmoid(x). Of the ways to a sigmoid, tanh takes the fewest instructions."""
    half = 0.5 * x
    return half + half * jnp.tanh(half)


def silu_and_slope(x):
    gate = 0.5 + 0.5 * jnp.tanh(0.5 * x)
    out = x * gate
    return out, (out + gate) - out * gate


def mean(x):
    """Of each row, to a whole tile."""
    width = x.shape[1]
    return mg.by_row(jnp.sum(x, axis=1) * (1 / width), width)


def root_mean_square(x, epsilon):
    """1 over it, for each row, to a whole tile."""
    width = x.shape[1]
    return mg.by_row(lax.rsqrt(jnp.sum(x * x, axis=1) * (1 / width) + epsilon), width)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turns:
    """By which pairs of columns (2i, 2i + 1) turn: cosine and sine of the pair's angle stand in
    the columns' own places, or None stands for no turn."""

    value: jax.Array | None
    layout: plgpu.Layout = dataclasses.field(metadata={"static": True})
    interpret: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def load(cls, table, rows, interpret):
        """Of these rows of (N, 32) in global memory; of one row if `rows` is a number."""
        layout = mg.COLUMN if isinstance(rows, int) else mg.TILE
        if table is None:
            return cls(None, layout, interpret)
        return cls(plgpu.load(table.at[rows], layout=layout, optimized=False), layout, interpret)

    def __call__(self, x, *, back=False):
        """x in float32, turned, or turned back."""
        if self.value is None:
            return x
        if self.interpret:  # JAX's interpreter knows no code of one's own
            return _turned(x, self.value, back)

        # A thread holds both columns of a pair.
        @plgpu.inline_mgpu(
            arg_types=(self.layout, self.layout),
            return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=self.layout),
        )
        def turned(_, x, turns):
            return _turned_registers(x, turns, back)

        return turned(x, self.value)


def _turned(x, turns, back):
    pairs, turns = (a.reshape(*a.shape[:-1], -1, 2) for a in (x, turns))
    (a, b), (cos, sin) = (jnp.moveaxis(pairs, -1, 0), jnp.moveaxis(turns, -1, 0))
    sin = -sin if back else sin
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)


def _turned_registers(x, turns, back):
    out = np.empty_like(x.registers)
    for i in np.ndindex(out.shape):
        (a, b), (cos, sin) = (
            [vector.extract(source.registers[i], [], [j]) for j in range(2)]
            for source in (x, turns)
        )
        minus = arith.negf(sin)
        ahead, behind = (sin, minus) if back else (minus, sin)
        first = math_ops.fma(b, ahead, arith.mulf(a, cos))
        second = math_ops.fma(a, behind, arith.mulf(b, cos))
        out[i] = vector.from_elements(x.registers[i].type, [first, second])
    return mgpu.FragmentedArray(_registers=out, _layout=x.layout, _is_signed=None)


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The first token of a head.

    Attributes:
      columns: of its key in y, by column of a (Dv, Dk) tile.
      turn: of the key.
      value: by row of that tile.
    """

    columns: jax.Array
    turn: Turns
    value: jax.Array

    @classmethod
    def load(cls, y, table, image, columns, interpret):
        load = functools.partial(plgpu.load, optimized=False)
        row = y.at[image, 0, columns.group]
        value = load(row.at[pl.ds(columns.first + V, VALUE_DIM)], layout=mg.ROW)
        columns = load(row.at[pl.ds(columns.first + K, KEY_DIM)], layout=mg.COLUMN)
        return cls(wide(columns), Turns.load(table, 0, interpret), wide(value))

    def product(self):
        """v k^T."""
        return mg.by_row(self.value, KEY_DIM) * mg.by_column(self._key())

    def gradients(self, d_product, turned):
        """With respect to the key's and the value's columns, each by column, from that of v k^T;
        `turned` is a vector in shared memory to turn in."""
        turned[...] = jnp.sum(d_product * mg.by_column(self._key()), axis=1)
        d_key = jnp.sum(d_product * mg.by_row(self.value, KEY_DIM), axis=0)
        plgpu.commit_smem()
        _, slope = silu_and_slope(self.columns)
        d_columns = self.turn(d_key, back=True) * slope
        return d_columns, plgpu.load(turned, layout=mg.COLUMN, optimized=False)

    def _key(self):
        return wide(narrow(self.turn(silu(self.columns))))


def _wide_registers(x):
    """bf16 is the upper half of float32."""
    number, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    constant = lambda value: arith.constant(number, ir.IntegerAttr.get(number, value))
    vector_type = ir.VectorType.get((2,), f32)
    out = np.empty_like(x.registers)
    for i in np.ndindex(out.shape):
        pair = vector.bitcast(ir.VectorType.get((1,), number), x.registers[i])
        pair = vector.extract(pair, [], [0])
        halves = arith.shli(pair, constant(16)), arith.andi(pair, constant(-65536))
        out[i] = vector.from_elements(vector_type, [arith.bitcast(f32, half) for half in halves])
    return mgpu.FragmentedArray(_registers=out, _layout=x.layout, _is_signed=None)
