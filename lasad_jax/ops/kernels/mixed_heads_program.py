"""What a program of `mixed_heads_triton` works on: a head of an image, in its columns."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from lasad_jax.ops.kernels.triton_math import Instructions, pairs, rotate
from lasad_jax.ops.kernels.triton_program import ChunkDecay, Rows

# In bf16 what is left after a factor of exp(-32) counts for nothing.
RESET = -32.0
NUM_PREFIX = 1


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where the parts of a head lie in y, which has `width` columns."""

    key_dim: int
    value_dim: int
    width: int

    @property
    def q(self) -> pl.Slice:
        return pl.ds(0, self.key_dim)

    @property
    def k(self) -> pl.Slice:
        return pl.ds(self.key_dim, self.key_dim)

    @property
    def v(self) -> pl.Slice:
        return pl.ds(2 * self.key_dim, self.value_dim)

    @property
    def out_gate(self) -> pl.Slice:
        return pl.ds(2 * self.key_dim + self.value_dim, self.value_dim)

    @property
    def decay_gate(self) -> int:
        return 2 * (self.key_dim + self.value_dim)

    @property
    def rest(self) -> pl.Slice:
        return pl.ds(self.decay_gate, self.width - self.decay_gate)


@dataclasses.dataclass(frozen=True)
class Head:
    """The head of one program."""

    columns: Columns
    rows: Callable[[Array], Rows]
    dot: Callable[..., Array]
    math: Instructions
    num_chunks: int
    y_ref: Array
    steps_ref: Array
    bias_ref: Array | None
    table_ref: Array | None

    @property
    def dtype(self):
        return self.y_ref.dtype

    def load(self, rows: Rows, name: str) -> Float[Array, "L W"]:
        return rows.load(self.y_ref, getattr(self.columns, name)).astype(jnp.float32)

    def turn(self, rows: Rows):
        """What `rotate` takes."""
        return None if self.table_ref is None else pairs(rows.load(self.table_ref))

    def active(self, x: Float[Array, "R Dk"], turn) -> Float[Array, "R Dk"]:
        """Queries or keys out of their columns."""
        return rotate(self.math.silu(x), turn)

    def d_active(self, d_x, x, turn) -> Float[Array, "R Dk"]:
        """The gradient with respect to the columns x, from that of `active`."""
        return rotate(d_x, turn, back=True) * self.math.silu_slope(x)

    def prefix(self):
        """Of the first token: what `rotate` takes, the columns of its key, key and value."""
        row = lambda ref, columns: ref[pl.ds(0, 1), columns].astype(jnp.float32)
        turn = None
        if self.table_ref is not None:
            turn = pairs(row(self.table_ref, slice(None)))
        x, v = row(self.y_ref, self.columns.k), row(self.y_ref, self.columns.v)
        return turn, x, self.active(x, turn).astype(self.dtype).astype(jnp.float32), v

    def decay(self, c, rows: Rows) -> tuple[ChunkDecay, Array, Array | None]:
        """Of chunk c: the decay, each token's log-factor, and the slope of the content gate."""
        g, slope = self.steps_ref[c], None
        if self.bias_ref is not None:
            tokens = rows.tokens()
            decays = tokens > rows.num_prefix
            decays = decays if rows.stop is None else decays & (tokens < rows.stop)
            column = jnp.full_like(tokens, self.columns.decay_gate)
            raw = plgpu.load(self.y_ref.at[tokens, column], mask=decays, other=0.0)
            raw = raw.astype(jnp.float32) + self.bias_ref[0]
            g -= jnp.where(decays, self.math.softplus(raw), 0.0)
            slope = jnp.where(decays & (g > RESET), -self.math.sigmoid(raw), 0.0)
        g = jnp.maximum(g, RESET)
        return ChunkDecay([jnp.cumsum(g)], [jnp.sum(g)], rows.on_grid()), g, slope

    def normalise(self, o: Float[Array, "L Dv"], epsilon: float):
        """o of unit mean square, and the factor that makes it so."""
        factor = lax.rsqrt(self.mean(o * o) + epsilon)
        return o * factor, factor

    def mean(self, x: Float[Array, "L Dv"]) -> Float[Array, "L 1"]:
        return jnp.sum(x, axis=1)[:, None] * (1.0 / x.shape[1])

    def zeros(self) -> Float[Array, "Dv Dk"]:
        return jnp.zeros((self.columns.value_dim, self.columns.key_dim), jnp.float32)
