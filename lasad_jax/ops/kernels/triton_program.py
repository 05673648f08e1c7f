"""What the Triton kernels are built of: the launch, its programs, their tiles and products."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

_SMALLEST_TILE = 16


@dataclasses.dataclass(frozen=True)
class Rows:
    """The L rows of a chunk in token arrays; those from `stop` on do not exist."""

    first: Array
    length: int
    stop: int | None
    num_prefix: int

    def load(self, ref, columns: pl.Slice | None = None) -> Float[Array, "L D"]:
        """The rows, zeros where they do not exist; of some columns only, if given."""
        window, width = self._window(ref, columns)
        mask = None if self.stop is None else self._wide(self.tokens() < self.stop, width)
        return plgpu.load(window, mask=mask, other=None if mask is None else 0.0)

    def store(
        self,
        ref,
        x: Float[Array, "L D"],
        columns: pl.Slice | None = None,
        *,
        prefix: bool = True,
    ) -> None:
        """Writes the rows that exist; without `prefix`, of the grid only."""
        keep = None if self.stop is None else self.tokens() < self.stop
        if not prefix and self.num_prefix:
            on_grid = self.on_grid()
            keep = on_grid if keep is None else keep & on_grid
        window, width = self._window(ref, columns)
        mask = None if keep is None else self._wide(keep, width)
        plgpu.store(window, x.astype(ref.dtype), mask=mask)

    def tokens(self) -> Int[Array, " L"]:
        return self.first + jnp.arange(self.length)

    def on_grid(self) -> Bool[Array, " L"]:
        return self.tokens() >= self.num_prefix

    def seen(self, scores: Float[Array, "L p"]) -> Float[Array, "L p"]:
        """Scores with prefix tokens, 0 where token t comes before prefix token p."""
        if self.num_prefix < 2:
            return scores
        p = jnp.arange(scores.shape[1])
        return jnp.where(self.tokens()[:, None] >= p[None, :], scores, 0.0)

    def _window(self, ref, columns):
        columns = columns or pl.ds(0, ref.shape[1])
        return ref.at[pl.ds(self.first, self.length), columns], columns.size

    def _wide(self, mask, width: int):
        return jnp.broadcast_to(mask[:, None], (self.length, width))


@dataclasses.dataclass(frozen=True)
class ChunkDecay:
    """Decay factors within a chunk, from differences of b taken addend by addend.

    Prefix rows leave no trace in the recurrence: their factors as a key are 0.
    """

    addends: list[Float[Array, " L"]]
    last: list[Float[Array, ""]]
    keys: Bool[Array, " L"] | None

    @classmethod
    def load(cls, b_ref, c, rows: Rows) -> "ChunkDecay":
        _, num_addends, length = b_ref.shape
        return cls(
            [b_ref[c, j] for j in range(num_addends)],
            [b_ref[c, j, length - 1] for j in range(num_addends)],
            rows.on_grid() if rows.num_prefix else None,
        )

    def between(self, *, transposed: bool = False) -> Float[Array, "L L"]:
        """From token s to t: 0 where s > t. Rows are t, or s if transposed."""
        i = jnp.arange(self.addends[0].shape[0])
        t, s = (lambda x: x[:, None]), (lambda x: x[None, :])
        if transposed:
            t, s = s, t
        difference = _add(t(x) - s(x) for x in self.addends)
        reads = t(i) >= s(i)
        if self.keys is not None:
            reads &= s(self.keys)
        return _exp(jnp.where(reads, difference, -jnp.inf))

    def from_start(self) -> Float[Array, "L 1"]:
        return _exp(_add(self.addends))[:, None]

    def to_end(self) -> Float[Array, "L 1"]:
        difference = _add(z - x for x, z in zip(self.addends, self.last, strict=True))
        if self.keys is not None:
            difference = jnp.where(self.keys, difference, -jnp.inf)
        return _exp(difference)[:, None]

    def whole(self) -> Float[Array, ""]:
        return _exp(_add(self.last))


def _exp(x: Array) -> Array:
    # exp itself becomes three times as many instructions, a third of the forward kernel.
    return jnp.exp2(x * math.log2(math.e))


def _add(terms) -> Array:
    # Unlike `sum`, without adding 0, which floating-point rules keep in the kernel.
    return functools.reduce(jnp.add, terms)


def prefix_rows(num_prefix: int) -> int:
    """The rows of a `prefix_tile`."""
    return max(_SMALLEST_TILE, pl.next_power_of_2(num_prefix))


def prefix_tile(ref, num_prefix: int, columns: pl.Slice | None = None) -> Array:
    """The prefix rows of a token array, and zeros below, up to a size that can be multiplied."""
    columns = columns or pl.ds(0, ref.shape[1])
    row = jnp.arange(prefix_rows(num_prefix))[:, None]
    tile = jnp.zeros((row.shape[0], columns.size), ref.dtype)
    for p in range(num_prefix):
        tile = jnp.where(row == p, ref[p, columns][None, :], tile)
    return tile


def store_prefix(
    ref, tile: Float[Array, "p D"], program: "Program", columns: pl.Slice | None = None
) -> None:
    """Writes the prefix rows of a token array, in the segment that they belong to."""
    row = jnp.arange(tile.shape[0])
    here = (row < program.num_prefix) & (row < ref.shape[0]) & program.first_segment
    # Not from a plain 0: JAX refuses constant windows that are longer than few tokens.
    columns = columns or pl.ds(0, ref.shape[1])
    window = ref.at[pl.ds(program.rows(0).first, tile.shape[0]), columns]
    plgpu.store(window, tile.astype(ref.dtype), mask=jnp.broadcast_to(here[:, None], tile.shape))


@dataclasses.dataclass(frozen=True)
class Program:
    """What a kernel knows besides its refs.

    Attributes:
      num_prefix: P.
      first_segment: whether this program's segment holds the prefix.
      rows: the rows of chunk c of this program's segment.
      dot: the float32 product of two matrices over the given axis of each.
    """

    num_prefix: int
    first_segment: Bool[Array, ""]
    rows: Callable[[Array], Rows]
    dot: Callable[[Array, Array, int, int], Float[Array, "a b"]]


def launch(
    kernel: Callable,
    tokens: tuple,
    others: tuple,
    out_tokens: tuple,
    out_others: tuple,
    *,
    num_prefix: int,
    segments: int,
    interpret: bool,
    leave_out: str | None = None,
) -> tuple[tuple, tuple]:
    """One launch of (B, H, Z) programs.

    Args:
      kernel: takes a `Program` and the four groups as refs: of each token array what belongs
        to its head, of each other array what belongs to its segment. None stays None.
      tokens: arrays (B, N, H, D), the first of key dim, the last of value dim.
      others: b and further arrays (B, H, Z or M, ...).
      out_tokens, out_others: arrays or structs with the outputs' shapes and dtypes.
      num_prefix, segments, interpret: as in `recurrence_triton.forward`.
      leave_out: "first" or "last" segment, to which then no output belongs either.

    Returns:
      the outputs, grouped as given.

    Raises:
      ValueError: if Dk, Dv or L is not a power of two of at least 16.
    """
    batch, num_tokens, num_heads, key_dim = tokens[0].shape
    value_dim, dtype, b = tokens[-1].shape[3], tokens[0].dtype, others[0]
    num_chunks, length = b.shape[2], b.shape[4]
    for name, size in (("key dim", key_dim), ("value dim", value_dim), ("chunk length", length)):
        if size < _SMALLEST_TILE or size & (size - 1):
            raise ValueError(
                f"{name}: expected a power of two of at least {_SMALLEST_TILE}, got {size}"
            )
    skipped, programs = int(leave_out == "first"), segments - (leave_out is not None)
    stop = num_tokens if num_chunks * length != num_tokens else None
    dot = product(dtype, interpret)

    def body(*refs):
        z = pl.program_id(2)
        first = (z + skipped) * (num_chunks // segments * length)
        rows = lambda c: Rows(first + c * length, length, stop, num_prefix)
        kernel(Program(num_prefix, z + skipped == 0, rows, dot), *refs)

    def token_spec(array):
        return pl.BlockSpec((None, num_tokens, None, array.shape[3]), lambda i, h, z: (i, 0, h, 0))

    def segment_spec(array, segments, skipped):
        size, _, parts, *rest = array.shape
        index = lambda i, h, z: (0 if size == 1 else i, h, z + skipped, *(0 for _ in rest))
        return pl.BlockSpec((None, None, parts // segments, *rest), index)

    def specs(tokens, others, *where):
        of_segment = lambda array: segment_spec(array, *where)
        return jax.tree.map(token_spec, tokens), jax.tree.map(of_segment, others)

    return pl.pallas_call(
        body,
        grid=(batch, num_heads, programs),
        in_specs=specs(tokens, others, segments, skipped),
        out_specs=specs(out_tokens, out_others, programs, 0),
        out_shape=jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (out_tokens, out_others)
        ),
        compiler_params=_compiler_params(key_dim, value_dim, dtype),
        interpret=interpret,
        name=f"recurrence{kernel.__name__}".removesuffix("_kernel"),
    )(tokens, others)


def _compiler_params(key_dim: int, value_dim: int, dtype: jnp.dtype) -> plgpu.CompilerParams:
    """The states of wide heads need the registers of more threads; float32 at 128 x 128 fills
    shared memory without tiles loaded ahead."""
    return plgpu.CompilerParams(
        num_warps=4 if key_dim * value_dim <= 64 * 64 else 8,
        num_stages=1 if dtype == jnp.float32 else 2,
    )


def product(dtype: jnp.dtype, interpret: bool) -> Callable[[Array, Array, int, int], Array]:
    """(x, y, axis of x, axis of y) to their product in float32, exact for float32 too."""
    precision = None
    if dtype == jnp.float32:
        # Exact to about 1e-6 on tensor cores; the CPU's interpreter knows no such algorithm.
        exact = lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        precision = lax.Precision.HIGHEST if interpret else exact
    return lambda x, y, x_axis, y_axis: lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
