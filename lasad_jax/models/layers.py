"""The parts that every mixer shares: projections, norms, feed-forward."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from lasad_jax.models.config import ModelConfig
from lasad_jax.models.exchange import Kernels, Named
from lasad_jax.models.folding import scaled
from lasad_jax.models.lookup import look_up
from lasad_jax.models.operator import mesh_axes, passes
from lasad_jax.models.sizes import ffn_width
from lasad_jax.ops.keep import keep
from lasad_jax.ops.passes.add_norm import add_norm
from lasad_jax.ops.passes.dropout import token_seeds
from lasad_jax.ops.passes.feed_forward import join, swiglu

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
          scale: of the norm before, for its rows.
        """
        init = nn.with_logical_partitioning(self.kernel_init, self.axes)
        kernel = self.param("kernel", init, self.shape, jnp.dtype(self.config.param_dtype))
        return scaled(kernel, scale).astype(self.config.compute_dtype)


class Embedding(nn.Module):
    """A learned vector for every integer.

    Small vocabularies are looked up by a matrix product with one-hot vectors: the
    gradient of a gather would add thousands of rows to the same few addresses, one by
    one. Of large ones rows are gathered (`models.lookup`).

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
        return look_up(table, ids, self.axes, dtype)


class Scale(nn.Module):
    """The scale of a norm over its last axis, which multiplies the rows of the next kernel.

    Attributes:
      config: the model.
      shape, axes: sizes and names of the scale's axes.
    """

    config: ModelConfig
    shape: tuple[int, ...]
    axes: tuple[str, ...]

    @nn.compact
    def __call__(self) -> Float[Array, "*shape"]:
        return _scale(self, self.shape, self.axes)


class AddNorm(nn.Module):
    """Adds a branch, under dropout, to the residual stream, and normalises the stream. The norm's
    `scale` (D,) is for the rows of the next kernel.

    Attributes:
      config: the model.
      train: dropout is on (it draws from the "dropout" key).
    """

    config: ModelConfig
    train: bool

    def setup(self):
        self.scale = _scale(self, (self.config.width,), ("embed",))

    def __call__(
        self, x: Float[Array, "B N D"], branch: Float[Array, "B N D"]
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B N D"]]:
        """Returns the stream, and its tokens of unit mean square."""
        config, seeds = self.config, None
        if self.train and config.dropout:
            seeds = token_seeds(self.make_rng("dropout"), x.shape[:2])
        return add_norm(
            x,
            branch,
            seeds,
            rate=config.dropout,
            epsilon=NORM_EPSILON,
            implementation=passes(config),
            batch_axes=mesh_axes("batch", x.shape[0]),
        )


def _scale(module: Scale | AddNorm, shape: tuple[int, ...], axes: tuple[str, ...]) -> Array:
    """A norm's parameter."""
    init = nn.with_logical_partitioning(nn.initializers.ones, axes)
    return module.param("scale", init, shape, jnp.dtype(module.config.param_dtype))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: ModelConfig

    def setup(self):
        shape, axes = (self.config.width, ffn_width(self.config)), ("embed", "mlp")
        self.gate, self.up = (Kernel(self.config, shape, axes) for _ in range(2))
        self.down = Kernel(self.config, shape[::-1], axes[::-1])

    def kernels(self, x: Float[Array, "B N D"]) -> Named:
        """Gate and up, joined as they are multiplied with so many tokens, and down."""
        gate_up = keep(join(self.gate(), self.up(), x.shape[:2], **self._options(x)))
        between = (None,) * (gate_up.ndim - 2)
        return {
            "gate_up": (gate_up, ("embed", *between, "mlp")),
            "down": (self.down(), ("mlp", "embed")),
        }

    def __call__(self, x: Float[Array, "B N D"], kernels: Kernels) -> Float[Array, "B N D"]:
        return swiglu(x, kernels["gate_up"], kernels["down"], **self._options(x))

    def _options(self, x):
        return {
            "implementation": passes(self.config),
            "batch_axes": mesh_axes("batch", x.shape[0]),
            "hidden_axes": mesh_axes("mlp", ffn_width(self.config)),
        }
