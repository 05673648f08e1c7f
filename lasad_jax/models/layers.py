"""The parts that every mixer shares: projections, norms, feed-forward."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from lasad_jax.models.config import ModelConfig
from lasad_jax.models.operator import mesh_axes, passes
from lasad_jax.models.sizes import ffn_width
from lasad_jax.ops.keep import keep
from lasad_jax.ops.passes.add_norm import add_norm
from lasad_jax.ops.passes.dropout import token_seeds
from lasad_jax.ops.passes.gated_products import swiglu_product

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
          scale: of an `AddNorm` before. It multiplies the kernel's rows instead of every
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


class Scale(nn.Module):
    """The scale of a norm over its last axis, for the kernel of the next product.

    Attributes:
      config: the model.
      shape, axes: sizes and names of the scale's axes.
    """

    config: ModelConfig
    shape: tuple[int, ...]
    axes: tuple[str, ...]

    @nn.compact
    def __call__(self) -> Float[Array, "*shape"]:
        init = nn.with_logical_partitioning(nn.initializers.ones, self.axes)
        return self.param("scale", init, self.shape, jnp.dtype(self.config.param_dtype))


class AddNorm(nn.Module):
    """Adds a branch, under dropout, to the residual stream, and normalises the stream.

    Attributes:
      config: the model.
      train: dropout is on (it draws from the "dropout" key).
    """

    config: ModelConfig
    train: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], branch: Float[Array, "B N D"]
    ) -> tuple[Float[Array, "B N D"], tuple[Float[Array, "B N D"], Float[Array, " D"]]]:
        """Returns the stream, and its tokens of unit mean square with the norm's scale."""
        config, seeds = self.config, None
        if self.train and config.dropout:
            seeds = token_seeds(self.make_rng("dropout"), x.shape[:2])
        x, y = add_norm(
            x,
            branch,
            seeds,
            rate=config.dropout,
            epsilon=NORM_EPSILON,
            implementation=passes(config),
            batch_axes=mesh_axes("batch", x.shape[0]),
        )
        scale = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
        scale = self.param("scale", scale, (config.width,), jnp.dtype(config.param_dtype))
        return x, (y, scale)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], scale: Float[Array, " D"]
    ) -> Float[Array, "B N D"]:
        """Of tokens as `AddNorm` returns them."""
        shape, axes = (self.config.width, ffn_width(self.config)), ("embed", "mlp")
        kernels = [Kernel(self.config, shape, axes, name=name)(scale) for name in ("gate", "up")]
        # Side by side on an axis of their own, which leaves that of "mlp" to be split over a mesh.
        gate_up = product(x, jnp.stack(kernels, axis=1))
        return swiglu_product(
            gate_up,
            Kernel(self.config, shape[::-1], axes[::-1], name="down")(),
            implementation=passes(self.config),
            batch_axes=mesh_axes("batch", x.shape[0]),
            hidden_axes=mesh_axes("mlp", shape[1]),
        )
