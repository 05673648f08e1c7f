"""Causal 3x3 depthwise convolution on the grid: what a token's own neighbourhood tells it."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from lasad_jax.models.config import ModelConfig
from lasad_jax.models.layers import normal_init

NUM_PREFIX = 1
# Rows up and columns to the right of each tap: itself, left, and the three above.
TAPS = ((0, 0), (0, -1), (-1, -1), (-1, 0), (-1, 1))


def tap_mask(place: Int[Array, " n"], grid: tuple[int, int]) -> Float[Array, "n taps"]:
    """1 where a token's neighbour exists; prefix tokens (place < 0) have only themselves."""
    row, column = jnp.divmod(place, grid[1])
    inside = [
        (row + down >= 0) & (column + right >= 0) & (column + right < grid[1]) & (place >= 0)
        for down, right in TAPS[1:]
    ]
    return jnp.stack([jnp.ones_like(inside[0]), *inside], axis=-1).astype(jnp.float32)


class LocalConv(nn.Module):
    """x plus a weighted sum, per channel, of the token and its four earlier neighbours.

    Nothing wraps around the end of a row, and the prefix is nobody's neighbour.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        recent: Float[Array, "B W D"] | None = None,
        index: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B W D"] | None]:
        """Convolves a sequence from its start, or one token after those in `recent`.

        Args:
          x: tokens from the start, or one token where `index` tokens came before.
          recent: ring of the W = C + 1 newest inputs, slot i % W for token i; None where
            nothing will follow.
          index: number of tokens before x.

        Returns:
          the convolved tokens and the ring after them.
        """
        grid, num_tokens = self.config.grid, x.shape[1]
        init = nn.with_logical_partitioning(normal_init, ("taps", "embed"))
        kernel = self.param("kernel", init, (len(TAPS), x.shape[-1]), self.config.param_dtype)
        back = jnp.array([-down * grid[1] - right for down, right in TAPS])
        inside = tap_mask(index + jnp.arange(num_tokens) - NUM_PREFIX, grid)
        weights = (kernel * inside[..., None]).astype(x.dtype)  # (N, taps, D)

        if num_tokens == 1 and recent is not None:
            window = recent.shape[1]
            neighbours = jnp.take(recent, (index - back) % window, axis=1)
            neighbours = neighbours.at[:, 0].set(x[:, 0])
            y = x + jnp.einsum("btd,td->bd", neighbours, weights[0])[:, None]
            slot = index % window
            return y, jax.lax.dynamic_update_slice_in_dim(recent, x, slot, axis=1)

        y = x
        for tap, (down, right) in enumerate(TAPS):
            offset = -down * grid[1] - right
            shifted = jnp.pad(x, [(0, 0), (offset, 0), (0, 0)])[:, :num_tokens]
            y = y + shifted * weights[:, tap]
        if recent is not None:
            kept = jnp.arange(max(0, num_tokens - recent.shape[1]), num_tokens)
            recent = recent.at[:, kept % recent.shape[1]].set(x[:, kept])
        return y, recent
