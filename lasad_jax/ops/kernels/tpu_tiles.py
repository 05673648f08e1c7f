"""What the TPU kernels share: packed heads, exact products, masks, calls by name.

A register holds 128 lanes, so arrays (B, N, H, D) are viewed as (B, N, H * D), and heads
that fill registers together (two of 64, eight of 16) are treated as one: a pack. Products
of packs need no shifts between lanes: summing over the lanes of one head alone takes
one factor with zeros in the others' lanes, states of a pack are block-diagonal matrices.
"""

import math
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

LANES = 128
# Rows that a register packs at most (16 of bf16, 8 of float32); row blocks are multiples.
SUBLANES = 16
# More lanes for a program spare steps, of a third of a microsecond each, but cost VMEM.
_LANES_PER_PROGRAM = 512

ROWS_BY_ROWS = (((1,), (1,)), ((), ()))  # x y^T
ROWS_BY_COLUMNS = (((1,), (0,)), ((), ()))  # x y
COLUMNS_BY_COLUMNS = (((0,), (0,)), ((), ()))  # x^T y


def round_up(n: int, multiple: int = SUBLANES) -> int:
    """The smallest multiple that is at least n."""
    return -(-n // multiple) * multiple


class Packing(typing.NamedTuple):
    """How heads share registers: a program takes `heads` of them, `pack` at a time."""

    heads: int
    pack: int

    @classmethod
    def of(cls, num_heads: int, *widths: int, lanes: int = _LANES_PER_PROGRAM) -> "Packing":
        """Packs that fill registers of every width; programs of whole packs, or of all heads.

        Args:
          num_heads: H.
          widths: Dk, Dv.
          lanes: how many a program may take at most, where a pack does not take more.
        """
        pack = math.lcm(*(LANES // math.gcd(width, LANES) for width in widths))
        most = max(pack, lanes // max(widths))
        fitting = [n for n in range(pack, most + 1, pack) if num_heads % n == 0]
        return cls(max(fitting, default=num_heads), min(pack, num_heads))

    @property
    def num_packs(self) -> int:
        return -(-self.heads // self.pack)

    def for_each(self, body: Callable[["Pack"], None]) -> None:
        """Runs body(pack) for each pack of a program; the last one may be smaller."""
        whole, rest = divmod(self.heads, self.pack)
        if whole == 1:
            body(Pack(0, 0, self.pack))
        else:
            lax.fori_loop(0, whole, lambda i, _: body(Pack(i, i * self.pack, self.pack)), None)
        if rest:
            body(Pack(whole, whole * self.pack, rest))


class Pack(typing.NamedTuple):
    """Heads first..first + heads - 1 of a program, as its pack number `index`."""

    index: Int[Array, ""] | int
    first: Int[Array, ""] | int
    heads: int

    def lanes(self, width: int) -> pl.Slice:
        """The pack's lanes in a program's arrays of heads that are `width` wide."""
        start = self.first * width
        start = start if isinstance(start, int) else pl.multiple_of(start, LANES)
        return pl.ds(start, self.heads * width)

    def only(self, head: int, x: Float[Array, "n heads*d"]) -> Float[Array, "n heads*d"]:
        """x with zeros in the lanes of other heads."""
        if self.heads == 1:
            return x
        return jnp.where(self._owner(x.shape, 1) == head, x, jnp.zeros_like(x))

    def split(self, x: Float[Array, "n heads*d"]) -> list[Float[Array, "n heads*d"]]:
        """`only` of each head."""
        return [self.only(head, x) for head in range(self.heads)]

    def spread(self, columns: list[Float[Array, "n 1"]], width: int) -> Float[Array, "n lanes"]:
        """A column for each head, repeated over its lanes."""
        if self.heads == 1:
            return columns[0]
        owner = self._owner((1, self.heads * width), 1)
        out = columns[-1]
        for head in reversed(range(self.heads - 1)):
            out = jnp.where(owner == head, columns[head], out)
        return out

    def diagonal(self, x: Float[Array, "heads*d heads*e"]) -> Float[Array, "heads*d heads*e"]:
        """x with zeros where rows and columns belong to different heads."""
        if self.heads == 1:
            return x
        own = self._owner(x.shape, 0) == self._owner(x.shape, 1)
        return jnp.where(own, x, jnp.zeros_like(x))

    def compact(self, x: Float[Array, "heads*d heads*e"]) -> Float[Array, "d heads*e"]:
        """The blocks of a block-diagonal matrix side by side."""
        rows = x.shape[0] // self.heads
        return sum(x[i * rows : (i + 1) * rows] for i in range(self.heads))

    def expand(self, x: Float[Array, "d heads*e"]) -> Float[Array, "heads*d heads*e"]:
        """The inverse of `compact`."""
        return self.diagonal(jnp.concatenate([x] * self.heads))

    def _owner(self, shape, axis):
        """The head of each row (axis 0, as a column) or of each lane (axis 1, as a row)."""
        thin = (shape[0], 1) if axis == 0 else (1, shape[1])
        return lax.div(index(thin, axis), shape[axis] // self.heads)


def side_by_side(x: Float[Array, "B N H D"]) -> Float[Array, "B N H*D"]:
    """All heads on the last axis."""
    return x.reshape(*x.shape[:2], -1)


def dot(
    x: Float[Array, "..."], y: Float[Array, "..."], contract: tuple = ROWS_BY_COLUMNS
) -> Float[Array, "m n"]:
    """A product of equally typed matrices, accumulated in float32; float32 is exact."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, y, contract, precision, jnp.float32)


def index(shape: tuple[int, ...], axis: int) -> Int[Array, "..."]:
    """Each element's place along an axis."""
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def lower_triangle(n: int) -> Bool[Array, "n n"]:
    """True where the row is not before the column."""
    return index((n, n), 0) >= index((n, n), 1)


def keep_rows(x: Float[Array, "n d"], start: int, stop: int) -> Float[Array, "n d"]:
    """x with zeros outside the rows start..stop-1.

    Blocks that reach past an array's end hold garbage there, NaN perhaps: it must be
    selected away. The selection is in float32, which every TPU generation can do.
    """
    if start == 0 and stop >= x.shape[0]:
        return x
    row = index((x.shape[0], 1), 0)
    return jnp.where((row >= start) & (row < stop), x.astype(jnp.float32), 0.0).astype(x.dtype)


def call_by_name(
    kernel: Callable[[dict], None],
    grid: tuple[int, int, int],
    blocks: dict[str, pl.BlockSpec],
    given: dict[str, Array],
    wanted: dict[str, jax.ShapeDtypeStruct],
    scratch: dict[str, tuple[int, ...]],
    *,
    scalars: dict[str, Array] | None = None,
    name: str,
    interpret: object,
) -> dict[str, Array]:
    """One `pallas_call` whose kernel finds its references in a dict, optional ones absent.

    Args:
      kernel: takes the dict.
      grid: numbers of programs; two parallel axes and a sequential one.
      blocks: the block of every array given or wanted; others are ignored.
      given, wanted: inputs, and shapes of outputs.
      scratch: shapes of float32 arrays in VMEM that outlive a step of the sequential axis.
      scalars: small inputs in scalar memory; the blocks' index maps see them too.
      name, interpret: as of `pallas_call`.
    """
    scalars = scalars or {}
    names = (*scalars, *given, *wanted, *scratch)
    results = pl.pallas_call(
        lambda *refs: kernel(dict(zip(names, refs, strict=True))),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[blocks[x] for x in given],
            out_specs=[blocks[x] for x in wanted],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
        ),
        out_shape=list(wanted.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name=name,
    )(*scalars.values(), *given.values())
    return dict(zip(wanted, results, strict=True))
