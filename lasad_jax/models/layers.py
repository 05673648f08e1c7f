"""The parts that every mixer shares: projections, norms, feed-forward."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from lasad_jax.models.config import ModelConfig
from lasad_jax.models.sizes import ffn_width

NORM_EPSILON = 1e-5
normal_init = nn.initializers.normal(0.02)


def project(
    config: ModelConfig,
    features: int | tuple[int, ...],
    axes: tuple[str, ...],
    *,
    num_contracted: int = 1,
    use_bias: bool = False,
    kernel_init=normal_init,
    bias_init=nn.initializers.zeros,
    name: str | None = None,
) -> nn.DenseGeneral:
    """A linear map of the last `num_contracted` axes, its kernel's axes named for sharding."""
    return nn.DenseGeneral(
        features,
        axis=tuple(range(-num_contracted, 0)),
        use_bias=use_bias,
        dtype=config.compute_dtype,
        param_dtype=config.param_dtype,
        kernel_init=nn.with_logical_partitioning(kernel_init, axes),
        bias_init=nn.with_logical_partitioning(bias_init, axes[num_contracted:]),
        name=name,
    )


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in float32.

    Attributes:
      config: the model.
      axes: names of the scale's axes, which are the input's last ones.
    """

    config: ModelConfig
    axes: tuple[str, ...] = ("embed",)

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        shape = x.shape[-len(self.axes) :]
        init = nn.with_logical_partitioning(nn.initializers.ones, self.axes)
        scale = self.param("scale", init, shape, jnp.dtype(self.config.param_dtype))
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        x32 *= jax.lax.rsqrt(mean_square + NORM_EPSILON)
        return (x32 * scale).astype(self.config.compute_dtype)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        hidden = ffn_width(self.config)
        gate = project(self.config, hidden, ("embed", "mlp"), name="gate")(x)
        up = project(self.config, hidden, ("embed", "mlp"), name="up")(x)
        return project(self.config, self.config.width, ("mlp", "embed"), name="down")(
            nn.silu(gate) * up
        )
