"""Tiles of the exact 2D decay: how tokens are cut, and what a pair of tiles weighs.

Grid tokens are counted from the first one, token P of the arrays, so that an image fills
whole tiles. A program owns an outer tile and goes through inner tiles: its own ones, that
make up the outer tile, and far ones, all before it or all after it.

Between two different tiles the weight is a table times one number,

    D(t, s) = exp(-alpha (r_t - r_first) - beta |c_t - c_s| - alpha (r_last - r_s))
              * exp(-alpha (r_first - r_last)),

with r_first the row of the first query and r_last the row of the last key: no factor
exceeds 1. As to the inner tile, the table depends only on the column where it starts. So
far tiles are taken phase by phase, those of a phase starting at the same column, and the
innermost loop needs no exponentials. Where C divides the inner length, one phase is all.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a kernel is cut and compiled.

    Attributes:
      outer: tokens of a program, a power of two, at least 16.
      inner: tokens of a step of its loops, likewise, and not above `outer`.
      num_warps, num_stages: passed to Triton.
    """

    outer: int
    inner: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class Cut:
    """Grid tokens cut into tiles; static in a kernel.

    Attributes:
      num_tokens: on the grid.
      num_prefix: P.
      columns: C.
      outer, inner: lengths of the tiles.
    """

    num_tokens: int
    num_prefix: int
    columns: int
    outer: int
    inner: int

    @classmethod
    def of(cls, num_tokens: int, num_prefix: int, columns: int, tiling: Tiling) -> "Cut":
        outer = min(tiling.outer, max(16, pl.next_power_of_2(num_tokens)))
        return cls(num_tokens, num_prefix, columns, outer, min(tiling.inner, outer))

    @property
    def num_tiles(self):
        return pl.cdiv(self.num_tokens, self.outer)

    @property
    def end(self):
        """Where the last inner tile ends."""
        return pl.cdiv(self.num_tokens, self.inner) * self.inner

    def load(self, ref, start, size):
        """A tile of a head's tokens; those that do not exist are 0."""
        mask = self._exist(start, size)
        other = None if mask is None else 0.0
        return plgpu.load(ref.at[self._rows(start, size), :], mask=mask, other=other)

    def store(self, ref, start, tile):
        size = tile.shape[0]
        rows = ref.at[self._rows(start, size), :]
        plgpu.store(rows, tile.astype(ref.dtype), mask=self._exist(start, size))

    def _rows(self, start, size):
        return pl.ds(self.num_prefix + start, size)

    def _exist(self, start, size):
        if self.num_tokens % self.outer == 0:
            return None
        return (start + _range(size) < self.num_tokens)[:, None]

    def own(self, start, step, carry):
        """carry = step(inner_start, carry) for the inner tiles of an outer one."""
        body = lambda n, carry: step(start + n * np.int32(self.inner), carry)
        return lax.fori_loop(np.int32(0), np.int32(self.outer // self.inner), body, carry)

    def far(self, begin, end, phase, carry):
        """carry = phase(first, last, each, carry) for each set of alike tiles in [begin, end).

        Within it, `each(step, carry)` is carry = step(inner_start, carry) for every tile of
        the set; `first` is where its first tile starts, `last` where one more would.
        """
        num_phases = self.columns // math.gcd(self.columns, self.inner)
        inner, stride = np.int32(self.inner), np.int32(self.inner * num_phases)

        def one(n, carry):
            first = begin + n * inner
            count = lax.div(end - first + (stride - 1), stride)

            def each(step, carry):
                body = lambda m, carry: step(first + m * stride, carry)
                return lax.fori_loop(np.int32(0), count, body, carry)

            return phase(first, first + count * stride, each, carry)

        if num_phases == 1:
            return one(np.int32(0), carry)
        count = jnp.minimum(np.int32(num_phases), lax.div(end - begin, inner))
        return lax.fori_loop(np.int32(0), count, one, carry)

    def own_distances(self, outer_start, inner_start):
        """Rows and columns between the tokens of an outer tile and one of its inner tiles."""
        outer_row, outer_column = self._places(outer_start, self.outer)
        inner_row, inner_column = self._places(inner_start, self.inner)
        return _between(outer_row, inner_row), _between(outer_column, inner_column)

    def far_distances(self, outer_start, inner_start, *, keys):
        """Rows and columns of the table; `keys` says which tile holds them, the other queries."""
        parts = []
        for name, start, size in (
            ("outer", outer_start, self.outer),
            ("inner", inner_start, self.inner),
        ):
            row, column = self._places(start, size)
            edge = self._row(start + (size - 1) if name == keys else start).astype(jnp.float32)
            parts.append((jnp.abs(row - edge), column))
        (outer_row, outer_column), (inner_row, inner_column) = parts
        return outer_row[:, None] + inner_row[None, :], _between(outer_column, inner_column)

    def gap(self, key_start, key_size, query_start):
        """Rows from the last of a tile of keys down to the first of a tile of queries."""
        rows = self._row(query_start) - self._row(key_start + (key_size - 1))
        return rows.astype(jnp.float32)

    def _row(self, token):
        return lax.div(token, np.int32(self.columns))

    def _places(self, start, size):
        token = start + _range(size)
        column = lax.rem(token, np.int32(self.columns))
        return self._row(token).astype(jnp.float32), column.astype(jnp.float32)


def causal(query_start, num_queries, key_start, num_keys, *, keys_first: bool):
    """Which keys come at or before which queries; keys along the first axis if so asked."""
    query, key = query_start + _range(num_queries), key_start + _range(num_keys)
    return key[:, None] <= query[None, :] if keys_first else query[:, None] >= key[None, :]


def _range(size):
    return jnp.arange(size, dtype=jnp.int32)


def _between(x, y):
    return jnp.abs(x[:, None] - y[None, :])
