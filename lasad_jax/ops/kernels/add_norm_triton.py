"""Residual sum, dropout and norm as Pallas-Triton kernels: one launch each way.

A program takes a few tokens and holds all of their channels in registers, as tiles whose
widths are powers of two that add up to D.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, UInt32

from lasad_jax.ops.passes.dropout import kept

_SMALLEST_TILE = 16


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Tokens of a program, a power of two, and its warps."""

    tokens: int = 4
    num_warps: int = 4


def forward(
    x: Float[Array, "B N D"],
    branch: Float[Array, "B N D"],
    seeds: UInt32[Array, "B N"] | None,
    *,
    rate: float,
    epsilon: float,
    tiling: Tiling = Tiling(),
    interpret: bool = False,
) -> tuple[Float[Array, "B N D"], Float[Array, "B N D"], Float[Array, "B N"]]:
    """x + dropout(branch), the same normalised, and what it was multiplied by (float32)."""

    def kernel(x_ref, branch_ref, seeds_ref, sum_ref, y_ref, factor_ref):
        rows = _Rows.this(x.shape, tiling)
        tiles = [
            # Rounded first: the norm is of what the stream holds.
            (rows.load(x_ref, tile) + rows.drop(rows.load(branch_ref, tile), seeds_ref, tile, rate))
            .astype(x.dtype)
            .astype(jnp.float32)
            for tile in rows.tiles
        ]
        mean_square = rows.mean([tile * tile for tile in tiles])
        factor = lax.rsqrt(mean_square + epsilon)
        rows.store_numbers(factor_ref, factor)
        for where, tile in zip(rows.tiles, tiles, strict=True):
            rows.store(sum_ref, where, tile)
            rows.store(y_ref, where, tile * factor[:, None])

    return _launch("add_norm_forward", kernel, (x, branch, seeds), "xxf", tiling, interpret)


def backward(
    d_x: Float[Array, "B N D"],
    d_y: Float[Array, "B N D"],
    y: Float[Array, "B N D"],
    factor: Float[Array, "B N"],
    seeds: UInt32[Array, "B N"] | None,
    *,
    rate: float,
    tiling: Tiling = Tiling(),
    interpret: bool = False,
) -> tuple[Float[Array, "B N D"], Float[Array, "B N D"]]:
    """Gradients with respect to x and to branch, from those of the two outputs."""

    def kernel(dx_ref, dy_ref, y_ref, factor_ref, seeds_ref, new_ref, branch_ref=None):
        rows = _Rows.this(y.shape, tiling)
        ys = [rows.load(y_ref, tile) for tile in rows.tiles]
        d_ys = [rows.load(dy_ref, tile) for tile in rows.tiles]
        along = rows.mean([a * b for a, b in zip(ys, d_ys, strict=True)])[:, None]
        factor = rows.load_numbers(factor_ref)[:, None]
        for where, y_tile, d_tile in zip(rows.tiles, ys, d_ys, strict=True):
            new = rows.load(dx_ref, where) + factor * (d_tile - y_tile * along)
            rows.store(new_ref, where, new)
            if branch_ref is not None:
                new = new.astype(y.dtype).astype(jnp.float32)
                rows.store(branch_ref, where, rows.drop(new, seeds_ref, where, rate))

    outputs = "x" if seeds is None else "xx"
    operands = (d_x, d_y, y, factor, seeds)
    d_x, *rest = _launch("add_norm_backward", kernel, operands, outputs, tiling, interpret)
    return d_x, rest[0] if rest else d_x


def _launch(name, kernel, operands, outputs: str, tiling: Tiling, interpret: bool):
    """One launch over all tokens; outputs are "x" for tokens and "f" for a number of each."""
    tokens = operands[0]
    batch, num_tokens, width = tokens.shape
    flat = lambda a: None if a is None else a.reshape(batch * num_tokens, *a.shape[2:])
    shapes = {
        "x": jax.ShapeDtypeStruct((batch * num_tokens, width), tokens.dtype),
        "f": jax.ShapeDtypeStruct((batch * num_tokens,), jnp.float32),
    }
    spec = pl.no_block_spec
    out = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(batch * num_tokens, tiling.tokens),),
        in_specs=[None if a is None else spec for a in operands],
        out_specs=[spec] * len(outputs),
        out_shape=[shapes[kind] for kind in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=tiling.num_warps, num_stages=1),
        interpret=interpret,
        name=name,
    )(*map(flat, operands))
    return tuple(x.reshape(batch, num_tokens, *x.shape[1:]) for x in out)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The tokens of one program.

    Attributes:
      tokens: their numbers.
      exist: which of them there are; None for all.
      width: D.
      tiles: (first channel, size) of each.
    """

    tokens: Array
    exist: Array | None
    width: int
    tiles: tuple[tuple[int, int], ...]

    @classmethod
    def this(cls, shape, tiling: Tiling) -> "_Rows":
        batch, num_tokens, width = shape
        tokens = pl.program_id(0) * tiling.tokens + jnp.arange(tiling.tokens)
        exist = None if batch * num_tokens % tiling.tokens == 0 else tokens < batch * num_tokens
        return cls(tokens, exist, width, _column_tiles(width))

    def load(self, ref, tile) -> Float[Array, "T W"]:
        mask = self._mask(tile)
        other = None if mask is None else 0.0
        return plgpu.load(self._window(ref, tile), mask=mask, other=other).astype(jnp.float32)

    def store(self, ref, tile, x: Float[Array, "T W"]) -> None:
        plgpu.store(self._window(ref, tile), x.astype(ref.dtype), mask=self._mask(tile))

    def load_numbers(self, ref) -> Array:
        other = None if self.exist is None else jnp.zeros((), ref.dtype)
        return plgpu.load(ref.at[self.tokens], mask=self.exist, other=other)

    def store_numbers(self, ref, x: Array) -> None:
        plgpu.store(ref.at[self.tokens], x, mask=self.exist)

    def drop(self, x: Float[Array, "T W"], seeds_ref, tile, rate: float) -> Float[Array, "T W"]:
        if seeds_ref is None:
            return x
        seeds = self.load_numbers(seeds_ref)[:, None]
        return jnp.where(kept(seeds, self._channels(tile)[None], rate), x / (1 - rate), 0.0)

    def mean(self, tiles) -> Float[Array, " T"]:
        total = jnp.sum(tiles[0], axis=1)
        for tile in tiles[1:]:
            total += jnp.sum(tile, axis=1)
        return total / self.width

    def _window(self, ref, tile):
        return ref.at[self.tokens[:, None], self._channels(tile)[None]]

    def _channels(self, tile):
        first, size = tile
        return first + jnp.arange(size)

    def _mask(self, tile):
        shape = (self.tokens.shape[0], tile[1])
        mask = None if self.exist is None else jnp.broadcast_to(self.exist[:, None], shape)
        if tile[0] + tile[1] > self.width:
            inside = jnp.broadcast_to((self._channels(tile) < self.width)[None], shape)
            mask = inside if mask is None else mask & inside
        return mask


def _column_tiles(width: int) -> tuple[tuple[int, int], ...]:
    """768 is 512 and 256; what is left over from 16 is filled up."""
    tiles, first = [], 0
    while first < width:
        left = width - first
        size = max(_SMALLEST_TILE, 1 << (left.bit_length() - 1))
        tiles.append((first, size))
        first += size
    return tuple(tiles)
