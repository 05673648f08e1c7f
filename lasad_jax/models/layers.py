"""The parts that every mixer shares: projections, norms, feed-forward."""

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


class Kernel(nn.Module):
    """The parameters of a linear map, to be used alone or joined with others of the same input.
    (`nn.DenseGeneral` cannot initialise under a mesh where its kernel has more than two named
    axes.)

    Attributes:
      config: the model.
      shape: sizes of the contracted axes, then of the new ones.
      axes: their names for sharding.
      kernel_init: initialiser.
    """

    config: ModelConfig
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    kernel_init: nn.initializers.Initializer = normal_init

    @nn.compact
    def __call__(self, scale: Float[Array, "*contracted"] | None = None) -> Float[Array, "*shape"]:
        """The kernel in the dtype of computation.

        Args:
          scale: of an `RMSNorm` before. It multiplies the kernel's rows instead of every
            token; its gradient then is a sum over the kernel's columns, not over all tokens.
        """
        return self._kernel(scale)

    def _kernel(self, scale):
        init = nn.with_logical_partitioning(self.kernel_init, self.axes)
        kernel = self.param("kernel", init, self.shape, jnp.dtype(self.config.param_dtype))
        if scale is not None:
            kernel = kernel * scale.reshape(*scale.shape, *(1,) * (kernel.ndim - scale.ndim))
        return kernel.astype(self.config.compute_dtype)


def product(
    x: Float[Array, "*lead_contracted"], kernel: Float[Array, "*contracted_features"], num: int = 1
) -> Float[Array, "*lead_features"]:
    """x's last `num` axes with the kernel's first, as a product of two matrices: of more axes
    XLA would transpose whole activations in memory for the kernel's gradient."""
    lead = x.shape[: x.ndim - num]
    matrix = kernel.reshape(-1, *kernel.shape[num:])
    y = jax.lax.dot_general(
        x.astype(kernel.dtype).reshape(-1, matrix.shape[0]), matrix, (((1,), (0,)), ((), ()))
    )
    return keep(y.reshape(*lead, *kernel.shape[num:]))


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
        shape, axes = (self.config.width, ffn_width(self.config)), ("embed", "mlp")
        kernels = [Kernel(self.config, shape, axes, name=name)(scale) for name in ("gate", "up")]
        # Side by side on an axis of their own, which leaves that of "mlp" to be split over a mesh.
        gate_up = product(x, jnp.stack(kernels, axis=1))
        gate, up = gate_up[..., 0, :], gate_up[..., 1, :]
        down = Kernel(self.config, shape[::-1], axes[::-1], name="down")()
        return product(nn.silu(gate) * up, down)
