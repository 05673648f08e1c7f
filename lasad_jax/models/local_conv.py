"""Causal 3x3 depthwise convolution on the grid: what a token's own neighbourhood tells it."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from lasad_jax.models.config import ModelConfig
from lasad_jax.models.layers import normal_init
from lasad_jax.models.operator import mesh_axes, passes
from lasad_jax.ops.passes.local_conv import TAPS, local_conv, neighbour

NUM_PREFIX = 1


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
        factor: Float[Array, "B N"] | None = None,
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B W D"] | None]:
        """Convolves a sequence from its start, or one token after those in `recent`.

        Args:
          x: tokens from the start, or one token where `index` tokens came before.
          recent: ring of the W = C + 1 newest inputs, slot i % W for token i; None where
            nothing will follow.
          index: number of tokens before x.
          factor: scale of each token, as of a norm, float32; None is 1. `recent` holds tokens
            that have been scaled.

        Returns:
          the convolved tokens and the ring after them.
        """
        config, num_tokens = self.config, x.shape[1]
        init = nn.with_logical_partitioning(normal_init, ("taps", "embed"))
        kernel = self.param("kernel", init, (len(TAPS), x.shape[-1]), config.param_dtype)
        if num_tokens == 1 and recent is not None:
            return self._one_token(_scaled(x, factor), recent, index, kernel)

        y = local_conv(
            x,
            factor,
            kernel,
            grid=config.grid,
            num_prefix=NUM_PREFIX,
            implementation=passes(config),
            batch_axes=mesh_axes("batch", x.shape[0]),
        )
        if recent is not None:
            kept = jnp.arange(max(0, num_tokens - recent.shape[1]), num_tokens)
            x = _scaled(x[:, kept], None if factor is None else factor[:, kept])
            recent = recent.at[:, kept % recent.shape[1]].set(x)
        return y, recent

    def _one_token(self, x, recent, index, kernel):
        columns, window = self.config.grid[1], recent.shape[1]
        places = [
            neighbour(jnp.asarray(index), tap, columns, NUM_PREFIX) for tap in range(len(TAPS))
        ]
        source, exists = (jnp.stack(parts) for parts in zip(*places, strict=True))
        weights = (kernel * exists[:, None]).astype(x.dtype)
        neighbours = jnp.take(recent, source % window, axis=1)
        neighbours = neighbours.at[:, 0].set(x[:, 0])
        y = x + jnp.einsum("btd,td->bd", neighbours, weights)[:, None]
        slot = index % window
        return y, jax.lax.dynamic_update_slice_in_dim(recent, x, slot, axis=1)


def _scaled(x: Float[Array, "B N D"], factor: Float[Array, "B N"] | None) -> Float[Array, "B N D"]:
    return x if factor is None else (x * factor[..., None]).astype(x.dtype)
