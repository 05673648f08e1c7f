"""The parts that every mixer shares: projections, norms, feed-forward."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from lasad_jax.models.config import ModelConfig
from lasad_jax.models.sizes import ffn_width
from lasad_jax.ops.keep import keep

NORM_EPSILON = 1e-5
_ONE_HOT_UP_TO = 1024
normal_init = nn.initializers.normal(0.02)


class Linear(nn.Module):
    """A linear map of the last axes. (`nn.DenseGeneral` cannot initialise under a mesh
    where its kernel has more than two named axes.)

    Attributes:
      config: the model.
      features: sizes of the new axes.
      axes: names of the kernel's axes for sharding, contracted ones first.
      use_bias: add a bias over the new axes.
      kernel_init, bias_init: initialisers.
    """

    config: ModelConfig
    features: tuple[int, ...]
    axes: tuple[str, ...]
    use_bias: bool = False
    kernel_init: nn.initializers.Initializer = normal_init
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(
        self, x: Float[Array, "*inputs"], scale: Float[Array, "*contracted"] | None = None
    ) -> Float[Array, "*outputs"]:
        """The map of x, or of x * scale.

        Args:
          x: its last axes are contracted.
          scale: of a norm before. It multiplies the kernel's rows instead of every token;
            its gradient then is a sum over the kernel's columns, not over all tokens.
        """
        num_contracted = len(self.axes) - len(self.features)
        init = nn.with_logical_partitioning(self.kernel_init, self.axes)
        shape = (*x.shape[-num_contracted:], *self.features)
        param_dtype, dtype = jnp.dtype(self.config.param_dtype), self.config.compute_dtype
        kernel = self.param("kernel", init, shape, param_dtype)
        if scale is not None:
            kernel = kernel * scale.reshape(*scale.shape, *(1,) * len(self.features))
        # As one product of two matrices: of more axes XLA would transpose whole activations in
        # memory for the kernel's gradient.
        lead, size = x.shape[: x.ndim - num_contracted], math.prod(shape[:num_contracted])
        y = x.astype(dtype).reshape(-1, size) @ kernel.astype(dtype).reshape(size, -1)
        y = y.reshape(*lead, *self.features)
        if self.use_bias:
            init = nn.with_logical_partitioning(self.bias_init, self.axes[num_contracted:])
            y += self.param("bias", init, self.features, param_dtype).astype(dtype)
        return keep(y)


class Embedding(nn.Module):
    """A learned vector for every integer.

    Small vocabularies are looked up by a matrix product with one-hot vectors: the
    gradient of a gather would add thousands of rows to the same few addresses, one by
    one. Large ones are gathered in the parameters' own precision, so that their
    gradient adds up in it too.

    Attributes:
      config: the model.
      rows: size of the vocabulary.
      axes: names of the table's axes for sharding.
    """

    config: ModelConfig
    rows: int
    axes: tuple[str, str]

    @nn.compact
    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
        init = nn.with_logical_partitioning(normal_init, self.axes)
        shape = (self.rows, self.config.width)
        table = self.param("embedding", init, shape, jnp.dtype(self.config.param_dtype))
        dtype = self.config.compute_dtype
        if self.rows <= _ONE_HOT_UP_TO:
            return jax.nn.one_hot(ids, self.rows, dtype=dtype) @ table.astype(dtype)
        return jnp.take(table, ids, axis=0).astype(dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, its scale left to the next product.

    Attributes:
      config: the model.
      axes: names of the scale's axes, which are the input's last ones.
    """

    config: ModelConfig
    axes: tuple[str, ...] = ("embed",)

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch D"]
    ) -> tuple[Float[Array, "*batch D"], Float[Array, "*axes"]]:
        """Returns the tokens of unit mean square, and the scale (see `Linear`)."""
        shape = x.shape[-len(self.axes) :]
        init = nn.with_logical_partitioning(nn.initializers.ones, self.axes)
        scale = self.param("scale", init, shape, jnp.dtype(self.config.param_dtype))
        return normalise(x.astype(self.config.compute_dtype)), scale


@jax.custom_vjp
def normalise(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """x / sqrt(mean(x^2) + epsilon) over the last axis, computed in float32.

    The backward pass reads the result in place of x: the products after it keep it anyway.
    """
    return _normalise_forward(x)[0]


def _normalise_forward(x):
    x32 = x.astype(jnp.float32)
    factor = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + NORM_EPSILON)
    y, factor = keep(((x32 * factor).astype(x.dtype), factor))
    return y, (y, factor)


def _normalise_backward(residuals, d_y):
    (y, factor), y32, d_y32 = residuals, residuals[0].astype(jnp.float32), d_y.astype(jnp.float32)
    along = jnp.mean(y32 * d_y32, axis=-1, keepdims=True)
    return ((factor * (d_y32 - y32 * along)).astype(y.dtype),)


normalise.defvjp(_normalise_forward, _normalise_backward)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], scale: Float[Array, " D"]
    ) -> Float[Array, "B N D"]:
        """Of tokens as an `RMSNorm` returns them."""
        hidden = ffn_width(self.config)
        gate = Linear(self.config, (hidden,), ("embed", "mlp"), name="gate")(x, scale)
        up = Linear(self.config, (hidden,), ("embed", "mlp"), name="up")(x, scale)
        down = Linear(self.config, (self.config.width,), ("mlp", "embed"), name="down")
        return down(nn.silu(gate) * up)
