"""Splitting a joint projection as Pallas-Triton kernels, for NVIDIA GPUs: one launch each way.

Tokens and heads are one axis of rows, and a program takes a block of them: every number is
read once and written once, in pieces of 16 bytes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from lasad_jax.ops.kernels.triton_math import Instructions, pairs, rotate
from lasad_jax.ops.passes.split_heads import Heads


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the work is cut.

    Attributes:
      rows: of a program, a power of two.
      num_warps: of a program.
    """

    rows: int
    num_warps: int = 4


def forward(
    y: Float[Array, "B N H W"],
    table: Float[Array, "N pairs 2"] | None,
    *,
    key_dim: int,
    value_dim: int,
    q_scale: float,
    gated: bool,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> Heads:
    """q, k, v and the raw gate.

    Args:
      y: bf16, float16 or float32; each head's columns are [q | k | v | out_gate | gate | padding].
      table: cosines and sines in float32; None does not rotate.
      key_dim, value_dim: Dk and Dv.
      q_scale: factor of the queries.
      gated: whether y has the gate's column.
      tiling: instead of the one that suits the arguments.
      interpret: run on any platform, slowly.

    Returns:
      q, k and v in y's dtype, the raw gate in float32 or None.
    """
    this = _Program.of(y, key_dim, value_dim, q_scale, gated, tiling, interpret)
    lead = y.shape[:3]
    out = pl.pallas_call(
        functools.partial(_forward_kernel, program=this),
        grid=this.grid,
        in_specs=[this.block(y.shape[3]), this.table_block(table)],
        out_specs=this.heads_blocks(),
        out_shape=(
            *(jax.ShapeDtypeStruct((this.num_rows, width), y.dtype) for width in this.widths),
            jax.ShapeDtypeStruct((this.num_rows,), jnp.float32) if gated else None,
        ),
        compiler_params=this.compiler_params,
        interpret=interpret,
        name="split_heads_forward",
    )(this.flat(y), _flat_table(table))
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), out)


def backward(
    d_y: Float[Array, "B N H W"],
    d_heads: Heads,
    y: Float[Array, "B N H W"],
    table: Float[Array, "N pairs 2"] | None,
    *,
    key_dim: int,
    value_dim: int,
    q_scale: float,
    gated: bool,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> Float[Array, "B N H W"]:
    """The gradient with respect to y, in d_y's place.

    Args:
      d_y: that of the output gate's columns; what stands in the others is not read.
      d_heads: gradients of what `forward` returns, in its dtypes.

    The other arguments are `forward`'s.

    Returns:
      d_y with all its columns, zeros in the padding.
    """
    this = _Program.of(y, key_dim, value_dim, q_scale, gated, tiling, interpret)
    return pl.pallas_call(
        functools.partial(_backward_kernel, program=this),
        grid=this.grid,
        in_specs=[
            this.block(y.shape[3]),
            this.heads_blocks(),
            this.block(y.shape[3]),
            this.table_block(table),
        ],
        out_specs=this.block(y.shape[3]),
        out_shape=jax.ShapeDtypeStruct((this.num_rows, y.shape[3]), y.dtype),
        input_output_aliases={0: 0},
        compiler_params=this.compiler_params,
        interpret=interpret,
        name="split_heads_backward",
    )(this.flat(d_y), jax.tree.map(this.flat, d_heads), this.flat(y), _flat_table(table)).reshape(
        y.shape
    )


def _flat_table(table):
    """Cosines and sines as they meet the channels."""
    return None if table is None else table.reshape(table.shape[0], -1)


@dataclasses.dataclass(frozen=True)
class _Program:
    """The rows of one program, which are (token, head) in this order.

    Attributes:
      num_rows: B N H.
      num_tokens, num_heads: N and H.
      width: W.
      key_dim, value_dim: Dk and Dv.
      q_scale: factor of the queries.
      gated: whether there is a gate's column.
      tiling: how the work is cut.
      interpret: whether it runs without a GPU.
    """

    num_rows: int
    num_tokens: int
    num_heads: int
    width: int
    key_dim: int
    value_dim: int
    q_scale: float
    gated: bool
    tiling: Tiling
    interpret: bool

    @classmethod
    def of(cls, y, key_dim, value_dim, q_scale, gated, tiling, interpret):
        batch, num_tokens, num_heads, width = y.shape
        if tiling is None:
            # 16 bytes of a row for each thread.
            num_warps, per_thread = 4, 16 // y.dtype.itemsize
            widest = pl.next_power_of_2(max(key_dim, value_dim))
            tiling = Tiling(max(1, num_warps * 32 * per_thread // widest), num_warps)
        num_rows = batch * num_tokens * num_heads
        sizes = (num_rows, num_tokens, num_heads, width)
        return cls(*sizes, key_dim, value_dim, q_scale, gated, tiling, interpret)

    # Outside of the kernel.

    @property
    def grid(self) -> tuple[int]:
        return (pl.cdiv(self.num_rows, self.tiling.rows),)

    @property
    def widths(self) -> tuple[int, int, int]:
        return self.key_dim, self.key_dim, self.value_dim

    @property
    def compiler_params(self) -> plgpu.CompilerParams:
        return plgpu.CompilerParams(num_warps=self.tiling.num_warps, num_stages=1)

    def flat(self, x: Array) -> Array:
        return x.reshape(self.num_rows, *x.shape[3:])

    def block(self, width: int) -> pl.BlockSpec:
        return pl.BlockSpec((self.tiling.rows, width), lambda i: (i, 0))

    def heads_blocks(self) -> tuple[pl.BlockSpec | None, ...]:
        gate = pl.BlockSpec((self.tiling.rows,), lambda i: (i,)) if self.gated else None
        return *map(self.block, self.widths), gate

    def table_block(self, table) -> pl.BlockSpec | None:
        whole = (self.num_tokens, self.key_dim)
        return None if table is None else pl.BlockSpec(whole, lambda _: (0, 0))

    # Inside of it.

    def rows(self) -> Int[Array, " R"]:
        return pl.program_id(0) * self.tiling.rows + jnp.arange(self.tiling.rows)

    def exists(self) -> Bool[Array, " R"] | None:
        """Which rows do; None for all."""
        return self.rows() < self.num_rows if self.num_rows % self.tiling.rows else None

    def load(self, ref, start: int, width: int) -> Float[Array, "R W"]:
        """Columns in float32, with zeros up to a power of two."""
        window, mask = self._columns(ref, start, width)
        other = None if mask is None else 0.0
        return plgpu.load(window, mask=mask, other=other).astype(jnp.float32)

    def store(self, ref, start: int, width: int, x: Float[Array, "R W"]) -> None:
        window, mask = self._columns(ref, start, width)
        plgpu.store(window, x.astype(ref.dtype), mask=mask)

    def _columns(self, ref, start, width):
        size = pl.next_power_of_2(width)
        window = ref.at[jnp.arange(self.tiling.rows)[:, None], start + jnp.arange(size)[None]]
        mask, rows = None, self.exists()
        if rows is not None or size != width:
            mask = jnp.broadcast_to(jnp.arange(size) < width, (self.tiling.rows, size))
            mask = mask if rows is None else mask & rows[:, None]
        return window, mask

    def turn(self, ref) -> list[Float[Array, "R P"]] | None:
        """Each row's cosines and sines."""
        if ref is None:
            return None
        tokens = self.rows() // self.num_heads % self.num_tokens
        channels = jnp.arange(pl.next_power_of_2(self.key_dim))
        mask, other = None, None
        if channels.size != self.key_dim:
            mask = jnp.broadcast_to(channels < self.key_dim, (self.tiling.rows, channels.size))
            other = 0.0
        return pairs(plgpu.load(ref.at[tokens[:, None], channels[None]], mask=mask, other=other))

    def gate_column(self, ref, width: int) -> Float[Array, "R W"]:
        """A number for each row, in the first of `width` columns of zeros."""
        row = jnp.arange(self.tiling.rows)[:, None]
        column = jnp.arange(pl.next_power_of_2(width))[None]
        row, column, exists = row + 0 * column, column + 0 * row, self.exists()
        mask = column == 0
        mask = mask if exists is None else mask & exists[:, None]
        return plgpu.load(ref.at[row], mask=mask, other=0.0)

    def silu(self, x: Float[Array, "R W"]) -> Float[Array, "R W"]:
        return Instructions(self.interpret).silu(x)

    def silu_slope(self, x: Float[Array, "R W"]) -> Float[Array, "R W"]:
        return Instructions(self.interpret).silu_slope(x)


# All loads come first: they wait for memory together.


def _forward_kernel(y_ref, table_ref, q_ref, k_ref, v_ref, gate_ref, *, program):
    key_dim, value_dim, exists = program.key_dim, program.value_dim, program.exists()
    if program.gated:
        row = jnp.arange(program.tiling.rows)
        gate = plgpu.load(y_ref.at[row, jnp.full_like(row, 2 * (key_dim + value_dim))], mask=exists)
    q, k = (program.load(y_ref, start, key_dim) for start in (0, key_dim))
    v = program.load(y_ref, 2 * key_dim, value_dim)
    turn = program.turn(table_ref)
    program.store(q_ref, 0, key_dim, rotate(program.silu(q) * program.q_scale, turn))
    program.store(k_ref, 0, key_dim, rotate(program.silu(k), turn))
    program.store(v_ref, 0, value_dim, v)
    if program.gated:
        plgpu.store(gate_ref.at[:], gate.astype(jnp.float32), mask=exists)


def _backward_kernel(_, d_heads_refs, y_ref, table_ref, dy_ref, *, program):
    key_dim, value_dim = program.key_dim, program.value_dim
    dq_ref, dk_ref, dv_ref, dgate_ref = d_heads_refs
    start_of_rest = 2 * (key_dim + value_dim)
    width_of_rest = program.width - start_of_rest
    d_rest = program.gate_column(dgate_ref, width_of_rest) if program.gated else None
    q, k = (program.load(y_ref, start, key_dim) for start in (0, key_dim))
    d_q, d_k = (program.load(ref, 0, key_dim) for ref in (dq_ref, dk_ref))
    d_v = program.load(dv_ref, 0, value_dim)
    turn = program.turn(table_ref)
    d_q = rotate(d_q * program.q_scale, turn, back=True) * program.silu_slope(q)
    d_k = rotate(d_k, turn, back=True) * program.silu_slope(k)
    program.store(dy_ref, 0, key_dim, d_q)
    program.store(dy_ref, key_dim, key_dim, d_k)
    program.store(dy_ref, 2 * key_dim, value_dim, d_v)
    if program.gated:
        program.store(dy_ref, start_of_rest, width_of_rest, d_rest)
