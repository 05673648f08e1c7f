"""The linear forms of the exact 2D decay: one matrix of memory per column of the grid.

With a = exp(-row_rate), b = exp(-column_rate) and Z[c] the decayed sum over the tokens of
column c, a token at column c reads sum over c' of b^|c - c'| Z[c']: its row scanned from
both sides. From one row to the next Z is multiplied by a.

Tokens are first laid on whole rows, wherever in a row they start; cells that hold no
token have zero keys and so leave no trace.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lasad_jax.ops.decays import ManhattanDecay
from lasad_jax.ops.numerics import accumulator, combine, einsum
from lasad_jax.ops.quadratic import quadratic

# (rows, tokens) that a block has at least. The backward pass keeps C * Dk * Dv numbers for
# every block, so blocks must not be thin; fused kernels make even long blocks cheap.
_SMALLEST_BLOCK = {"written out": (8, 64), "fused": (8, 4096)}

Rows = Float[Array, "B R C H D"]
ColumnMemory = Float[Array, "B H C Dk Dv"]


def lay_on_rows(x: Float[Array, "B N H D"], column: Int[Array, ""] | int, columns: int) -> Rows:
    """Whole rows that hold the tokens of x, the first of them at `column`."""
    offset = columns - 1 if isinstance(column, jax.Array) else column
    rows = -(-(x.shape[1] + offset) // columns)
    cells = jnp.zeros((x.shape[0], rows * columns, *x.shape[2:]), x.dtype)
    cells = jax.lax.dynamic_update_slice_in_dim(cells, x, column, axis=1)
    return cells.reshape(x.shape[0], rows, columns, *x.shape[2:])


def take_from_rows(rows: Rows, column: Int[Array, ""] | int, num_tokens: int) -> Array:
    """The inverse of `lay_on_rows`."""
    cells = rows.reshape(rows.shape[0], -1, *rows.shape[3:])
    return jax.lax.dynamic_slice_in_dim(cells, column, num_tokens, axis=1)


def _column_decay(decay: ManhattanDecay, columns: int) -> Float[Array, "H C C"]:
    c = jnp.arange(columns)
    return jnp.exp(-decay.column_rate[:, None, None] * jnp.abs(c[:, None] - c[None, :]))


def _row_decay(decay: ManhattanDecay, rows: Int[Array, "*n"]) -> Float[Array, "*n H"]:
    return jnp.exp(-decay.row_rate * rows[..., None])


def memory_at_row(
    memory: ColumnMemory, decay: ManhattanDecay, column: Int[Array, ""] | int
) -> ColumnMemory:
    """All columns as of the row of the next token, which stands at `column`."""
    passed = (jnp.arange(memory.shape[2]) >= column).astype(jnp.int32)
    return memory * _row_decay(decay, passed).T[:, :, None, None]


def final_memory(
    k: Rows,
    v: Rows,
    memory: ColumnMemory,
    decay: ManhattanDecay,
    column: Int[Array, ""] | int,
    num_tokens: int,
) -> ColumnMemory:
    """Each column as of its own last token, from the state before these rows."""
    rows, columns = k.shape[1:3]
    c = jnp.arange(columns)
    last_row = (column + num_tokens - 1 - c) // columns
    distance = last_row - jnp.arange(rows)[:, None]
    weight = _row_decay(decay, jnp.maximum(distance, 0)).astype(memory.dtype)
    decayed_k = (k * weight[..., None]).astype(v.dtype)
    added = einsum("brchd,brche->bhcde", decayed_k, v)
    passed = last_row + (c >= column)
    return _row_decay(decay, passed).T[:, :, None, None] * memory + added


def chunked(
    q: Rows,
    k: Rows,
    v: Rows,
    decay: ManhattanDecay,
    memory: ColumnMemory,
    *,
    fused: Callable | None = None,
) -> Rows:
    """Matrix products within blocks of whole rows, column states carried between them.

    Args:
      q, k, v: tokens laid on rows.
      memory: all columns as of the first row (`memory_at_row`).
      fused: (q, k, v, decay) to the outputs of an image of its own, for (B, N, H, D) tokens;
        instead of writing out the weights within a block.

    Returns:
      the outputs, laid on rows.
    """
    num_rows, columns, dtype = q.shape[1], q.shape[2], v.dtype
    least_rows, least_tokens = _SMALLEST_BLOCK["fused" if fused else "written out"]
    num_blocks = -(-num_rows // max(least_rows, least_tokens // columns))
    rows_per_block = -(-num_rows // num_blocks)
    padding = [(0, 0), (0, -num_rows % rows_per_block)] + [(0, 0)] * 3
    blocks = [
        jnp.moveaxis(
            jnp.pad(x, padding).reshape(x.shape[0], -1, rows_per_block, *x.shape[2:]), 1, 0
        )
        for x in (q, k, v)
    ]
    r = jnp.arange(rows_per_block)
    within = fused or functools.partial(_written_out, grid=(rows_per_block, columns))
    # States and what makes them are not rounded to bf16, on top of the outputs and of what is
    # within blocks: together they would exceed what a fused kernel loses. What TF32 or three
    # passes lose is small beside bf16's own rounding.
    wide = lambda x: x.astype(accumulator(dtype))
    precision = jax.lax.Precision.HIGH if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    product = functools.partial(jnp.einsum, precision=precision)
    mix = _column_decay(decay, columns).astype(memory.dtype)
    down_to = _row_decay(decay, r)[None, :, None, :, None]
    down_from = _row_decay(decay, rows_per_block - r)[None, :, None, :, None]
    down_all = _row_decay(decay, jnp.asarray(rows_per_block))[:, None, None, None]

    @jax.checkpoint
    def one_block(memory, block):
        q, k, v = block
        own = within(*(x.reshape(x.shape[0], -1, *x.shape[3:]) for x in block), decay)
        mixed = product("hxc,bhcde->bhxde", mix, memory)
        carried = down_to * product("brchd,bhcde->brche", wide(q), mixed)
        added = product("brchd,brche->bhcde", down_from * wide(k), wide(v))
        return down_all * memory + added, (carried + own.reshape(carried.shape)).astype(dtype)

    _, out = jax.lax.scan(one_block, memory, blocks)
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :num_rows]


def _written_out(q, k, v, decay, *, grid):
    return quadratic(q, k, v, decay, grid=grid, num_prefix=0, log_gate=None)


def scan(q: Rows, k: Rows, v: Rows, decay: ManhattanDecay, memory: ColumnMemory) -> Rows:
    """`associative_scan` along each row from both sides, column states carried downwards."""
    dtype, acc = v.dtype, accumulator(q.dtype)
    row_factor = _row_decay(decay, jnp.asarray(1))[:, None, None, None]
    column_factor = jnp.exp(-decay.column_rate)[None, :, None, None, None]
    column_factor = jnp.repeat(column_factor, q.shape[2], axis=2)

    def sweep(states, reverse=False):
        return jax.lax.associative_scan(combine, (column_factor, states), reverse=reverse, axis=2)[
            1
        ]

    @jax.checkpoint
    def one_row(memory, row):
        q, k, v = row
        own = jnp.einsum("bchd,bche->bhcde", k, v, precision=jax.lax.Precision.HIGHEST)
        # Own row from the left only; rows above from both sides, their own column once.
        seen = sweep(own + memory) + sweep(memory, reverse=True) - memory
        return row_factor * (memory + own), einsum("bchd,bhcde->bche", q, seen)

    rows = [jnp.moveaxis(x.astype(acc), 1, 0) for x in (q, k, v)]
    _, out = jax.lax.scan(one_row, memory, rows)
    return jnp.moveaxis(out, 0, 1).astype(dtype)
