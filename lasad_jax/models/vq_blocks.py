"""The layers that a tokenizer's encoder and decoder are built from (VQGAN, arXiv 2012.09841).

Activations are (B, rows, columns, channels) in `config.dtype`. A module's name is the one
in LlamaGen's files with "_" for ".", so that `lasad_jax.interop` finds one from the other.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from lasad_jax.models.tokenizer_config import NORM_GROUPS, TokenizerConfig


def precision(config: TokenizerConfig) -> jax.lax.Precision | None:
    """Of products in `config.dtype`: float32 stays float32, where a GPU would take TF32."""
    return jax.lax.Precision.HIGHEST if config.dtype == "float32" else None


class Conv(nn.Module):
    """A square convolution with bias, initialised as PyTorch's: both uniform within
    +-1/sqrt(fan_in).

    Attributes:
      config: the tokenizer.
      features: channels of the output.
      size: rows and columns of the kernel, 1 or 3.
      stride: 1, or 2 for half the rows and columns; that one pads the last row and column
        only, as LlamaGen's does.
    """

    config: TokenizerConfig
    features: int
    size: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "B R C D"]) -> Float[Array, "B R2 C2 E"]:
        shape = (self.size, self.size, x.shape[-1], self.features)
        bound = 1 / math.sqrt(math.prod(shape[:3]))
        init = lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        kernel = self.param("kernel", init, shape)
        bias = self.param("bias", init, (self.features,))
        dtype = self.config.compute_dtype
        y = jax.lax.conv_general_dilated(
            x.astype(dtype),
            kernel.astype(dtype),
            (self.stride, self.stride),
            "SAME" if self.stride == 1 else [(0, 1), (0, 1)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=precision(self.config),
        )
        return y + bias.astype(dtype)


def group_norm(name: str) -> nn.GroupNorm:
    """Group norm as LlamaGen's, computed and returned in float32."""
    return nn.GroupNorm(
        NORM_GROUPS, epsilon=1e-6, dtype=jnp.float32, use_fast_variance=False, name=name
    )


class ResnetBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), x itself through a 1x1 convolution where
    the number of channels changes.

    Attributes:
      config: the tokenizer.
      features: channels of the output.
    """

    config: TokenizerConfig
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B R C D"]) -> Float[Array, "B R C E"]:
        h = Conv(self.config, self.features, name="conv1")(nn.swish(group_norm("norm1")(x)))
        h = Conv(self.config, self.features, name="conv2")(nn.swish(group_norm("norm2")(h)))
        if x.shape[-1] != self.features:
            x = Conv(self.config, self.features, size=1, name="nin_shortcut")(x)
        return x + h


class AttnBlock(nn.Module):
    """x + softmax attention of one head over all places.

    Attributes:
      config: the tokenizer.
    """

    config: TokenizerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B R C D"]) -> Float[Array, "B R C D"]:
        B, R, C, D = x.shape
        h = group_norm("norm")(x)
        q, k, v = (
            Conv(self.config, D, size=1, name=name)(h).reshape(B, R * C, D) for name in "qkv"
        )
        exact = precision(self.config)
        scores = jnp.einsum(
            "bqd,bkd->bqk", q, k, precision=exact, preferred_element_type=jnp.float32
        )
        weights = nn.softmax(scores / math.sqrt(D)).astype(v.dtype)
        h = jnp.einsum("bqk,bkd->bqd", weights, v, precision=exact).reshape(x.shape)
        return x + Conv(self.config, D, size=1, name="proj_out")(h)


class Downsample(nn.Module):
    """Half the rows and columns, by a convolution of stride 2."""

    config: TokenizerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B R C D"]:
        return Conv(self.config, x.shape[-1], stride=2, name="conv")(x)


class Upsample(nn.Module):
    """Twice the rows and columns: every pixel repeated, then a convolution."""

    config: TokenizerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B R C D"]) -> Float[Array, "B h w D"]:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return Conv(self.config, x.shape[-1], name="conv")(x)
