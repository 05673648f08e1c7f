"""Norm and local convolution of a few rows by one warpgroup (`decode_layers`)."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lasad_jax.ops.kernels.layer_pipeline import rolled_loop

_MOST_ROWS = 8  # at once
_MOST_TAPS = 4  # at once: loads of more would take too many instructions, of fewer too long


def blocks_of_rows(num_rows: int, programs: int) -> list[tuple[int, int]]:
    """(first, each) of every turn: program p takes `each` rows from first + each * p on."""
    each = min(pl.next_power_of_2(pl.cdiv(num_rows, programs)), _MOST_ROWS)
    return [(first, each) for first in range(0, num_rows, each * programs)]


class NormConv:
    """The convolution of a token in some rows, begun with what does not wait for the token."""

    def __init__(self, recent, taps, offsets, index, columns: int, epsilon: float, rows: list):
        """Adds up the neighbours. Arguments: `decode_layers.all_layers`'s, and which rows.

        offsets: but for the token's own.
        """
        self._recent, self._rows, self._epsilon = recent, rows, epsilon
        self._slot = lax.rem(index, recent.shape[1])
        self._own = 1 + _load(taps.at[0])
        grid_row, column = lax.div(index - 1, columns), lax.rem(index - 1, columns)
        num_taps = offsets.shape[0]
        at_once = math.gcd(num_taps, _MOST_TAPS)

        def some_taps(i, sums):
            for tap in range(at_once):
                tap += i * at_once
                below, right = offsets[tap, 0], offsets[tap, 1]
                inside = (grid_row + below >= 0) & (column + right >= 0)
                inside &= column + right < columns
                slot = lax.rem(index + below * columns + right, recent.shape[1])
                slot = jnp.where(inside, slot, 0)
                weight = _load(taps.at[1 + tap]) * inside.astype(jnp.float32)
                terms = [_load(recent.at[row, slot]) * weight for row in rows]
                sums = [a + b for a, b in zip(sums, terms, strict=True)]
            return sums

        none = [self._own * 0] * len(rows)
        self._sums = rolled_loop(num_taps // at_once, some_taps, none)

    def finish(self, source: jax.Ref, target: jax.Ref) -> None:
        """From the token's rows before the norm to what the convolution makes of them."""
        # All loads before the first store, which would hold them up.
        values = [_load(source.at[row]) for row in self._rows]
        squares = [jnp.mean(jnp.square(value)) for value in values]
        for row, value, square, total in zip(self._rows, values, squares, self._sums, strict=True):
            value = (value * lax.rsqrt(square + self._epsilon)).astype(target.dtype)
            # The oldest neighbour lies where the newest will, in the same threads.
            self._recent.at[row, self._slot][...] = value
            target.at[row][...] = (value.astype(jnp.float32) * self._own + total).astype(
                target.dtype
            )


def _load(ref):
    """A row of numbers, spread over a warpgroup, in float32."""
    (width,) = ref.shape
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=math.gcd(width // 128, 8))
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)
