"""Causal 5x5 depthwise convolution on the grid: what a token's own neighbourhood tells it."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from lasad_jax.models.config import ModelConfig
from lasad_jax.models.exchange import Named
from lasad_jax.models.layers import normal_init
from lasad_jax.models.operator import mesh_axes, passes
from lasad_jax.ops.passes.local_conv import TAPS, local_conv, next_token, num_recent

NUM_PREFIX = 1
_AXES = ("taps", "embed")


class LocalConv(nn.Module):
    """x plus a weighted sum, per channel, of the token and its twelve earlier neighbours.

    Nothing wraps around the end of a row, and the prefix is nobody's neighbour.
    """

    config: ModelConfig

    def setup(self):
        init = nn.with_logical_partitioning(normal_init, _AXES)
        shape = (len(TAPS), self.config.width)
        self.kernel = self.param("kernel", init, shape, self.config.param_dtype)

    def kernels(self) -> Named:
        """The weights of the neighbours."""
        return {"taps": (self.kernel, _AXES)}

    def __call__(
        self,
        x: Float[Array, "B N D"],
        recent: Float[Array, "B W D"] | None = None,
        index: Int[Array, ""] | int = 0,
        taps: Float[Array, "13 D"] | None = None,
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B W D"] | None]:
        """Convolves a sequence from its start, or one token after those in `recent`.

        Args:
          x: tokens from the start, or one token where `index` tokens came before.
          recent: from `init_recent`, or what was returned; None where nothing will follow.
          index: number of tokens before x.
          taps: `kernels` as `exchanged` returns them; its own if None.

        Returns:
          the convolved tokens and the ring after them.
        """
        config, num_tokens = self.config, x.shape[1]
        taps = self.kernel if taps is None else taps
        if num_tokens == 1 and recent is not None:
            y, recent = next_token(
                x[:, 0], recent, index, taps, columns=config.grid[1], num_prefix=NUM_PREFIX
            )
            return y[:, None], recent

        y = local_conv(
            x,
            taps,
            grid=config.grid,
            num_prefix=NUM_PREFIX,
            implementation=passes(config),
            batch_axes=mesh_axes("batch", x.shape[0]),
        )
        if recent is not None:
            kept = jnp.arange(max(0, num_tokens - recent.shape[1]), num_tokens)
            recent = recent.at[:, kept % recent.shape[1]].set(x[:, kept])
        return y, recent


def init_recent(config: ModelConfig, batch: int) -> Float[Array, "B W D"] | None:
    """Before any token: the ring of the W = `num_recent(C)` newest inputs, slot i % W for token i;
    None without the convolution."""
    if not config.has_local_conv:
        return None
    return jnp.zeros((batch, num_recent(config.grid[1]), config.width), config.compute_dtype)
