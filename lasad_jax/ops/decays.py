"""The four decay families: how fast a token's weight falls with distance on the grid.

A grid token is named by its raster index j >= 0, at row j // C and column j % C.
Three families are products of per-step factors, so that a single recurrence
S_t = exp(g_t) S_(t-1) + k_t v_t^T carries them: they offer `step_log_factor`, the g_t.
`ManhattanDecay`, the exact distance in both directions, is no such product.
All offer `pair_log_decay`, log D(t, s), from exact integer distances.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Grid = tuple[int, int]


def _register(cls):
    cls = dataclasses.dataclass(frozen=True)(cls)
    return jax.tree_util.register_dataclass(cls)


@_register
class NoDecay:
    """D(t, s) = 1: plain causal linear attention."""

    def step_log_factor(self, j: Int[Array, " n"], grid: Grid) -> Float[Array, "n 1"]:
        """g_t for the grid tokens j; always 0."""
        return jnp.zeros((j.shape[0], 1), jnp.float32)

    def pair_log_decay(
        self, t: Int[Array, " n"], s: Int[Array, " m"], grid: Grid
    ) -> Float[Array, "1 n m"]:
        """log D(t, s); always 0."""
        return jnp.zeros((1, t.shape[0], s.shape[0]), jnp.float32)


@_register
class SequenceDecay:
    """D(t, s) = exp(-rate (t - s)): the 1D decay of RetNet and lightning attention.

    Attributes:
      rate: positive decay per token.
    """

    rate: Float[Array, " H"]

    def step_log_factor(self, j: Int[Array, " n"], grid: Grid) -> Float[Array, "n H"]:
        """g_t = -rate at every token."""
        return jnp.broadcast_to(-self.rate, (j.shape[0], self.rate.shape[0]))

    def pair_log_decay(
        self, t: Int[Array, " n"], s: Int[Array, " m"], grid: Grid
    ) -> Float[Array, "H n m"]:
        """log D(t, s) = -rate (t - s)."""
        return -self.rate[:, None, None] * (t[:, None] - s[None, :])


@_register
class RasterDecay:
    """D(t, s) = exp(-row_rate (r_t - r_s) - column_rate n), n the steps within rows.

    Attributes:
      row_rate: positive decay where a row begins.
      column_rate: positive decay per step inside a row.
    """

    row_rate: Float[Array, " H"]
    column_rate: Float[Array, " H"]

    def step_log_factor(self, j: Int[Array, " n"], grid: Grid) -> Float[Array, "n H"]:
        """g_t = -row_rate where a row begins, -column_rate elsewhere."""
        return jnp.where((j % grid[1] == 0)[:, None], -self.row_rate, -self.column_rate)

    def pair_log_decay(
        self, t: Int[Array, " n"], s: Int[Array, " m"], grid: Grid
    ) -> Float[Array, "H n m"]:
        """log D(t, s) from the number of row starts and of steps within rows."""
        rows = t[:, None] // grid[1] - s[None, :] // grid[1]
        steps = t[:, None] - s[None, :] - rows
        return -self.row_rate[:, None, None] * rows - self.column_rate[:, None, None] * steps


@_register
class ManhattanDecay:
    """D(t, s) = exp(-row_rate (r_t - r_s) - column_rate |c_t - c_s|).

    Attributes:
      row_rate: positive decay per row.
      column_rate: positive decay per column, to either side.
    """

    row_rate: Float[Array, " H"]
    column_rate: Float[Array, " H"]

    def pair_log_decay(
        self, t: Int[Array, " n"], s: Int[Array, " m"], grid: Grid
    ) -> Float[Array, "H n m"]:
        """log D(t, s) from the distances in rows and in columns."""
        rows = t[:, None] // grid[1] - s[None, :] // grid[1]
        columns = jnp.abs(t[:, None] % grid[1] - s[None, :] % grid[1])
        return -self.row_rate[:, None, None] * rows - self.column_rate[:, None, None] * columns


Decay = NoDecay | SequenceDecay | RasterDecay | ManhattanDecay


def log_decay_matrix(
    decay: Decay, *, num_tokens: int, grid: Grid, num_prefix: int
) -> Float[Array, "H N N"]:
    """log D(t, s) for the first `num_tokens` tokens, prefix included; -inf where s > t."""
    t = jnp.arange(num_tokens)
    place = jnp.maximum(t - num_prefix, 0)
    log_decay = decay.pair_log_decay(place, place, grid)
    log_decay = jnp.where(t[None, :] < num_prefix, 0.0, log_decay)
    return jnp.where(t[:, None] >= t[None, :], log_decay, -jnp.inf)


def decay_matrix(decay: Decay, *, grid: Grid, num_prefix: int = 1) -> Float[Array, "H N N"]:
    """The weights D(t, s) of a whole image, N = num_prefix + R * C tokens.

    Args:
      decay: one of the four families; H is the number of its rates (1 for `NoDecay`).
      grid: (R, C).
      num_prefix: tokens before the grid; their columns are 1 wherever t >= s.

    Returns:
      D with D[h, t, s] in [0, 1], and 0 where s > t.
    """
    num_tokens = num_prefix + grid[0] * grid[1]
    return jnp.exp(log_decay_matrix(decay, num_tokens=num_tokens, grid=grid, num_prefix=num_prefix))
