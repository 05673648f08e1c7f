"""How the products of decoding are cut into programs for a Hopper GPU (`decode_product`).

M rows, K inputs, N outputs.
"""

import dataclasses
import functools
import itertools
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from lasad_jax.ops.kernels.choice import hopper_obstacle

ROWS = 64  # of a warpgroup
PAIR = 32  # columns of gate, then as many of up: `interleave`
SHARED_MEMORY = 227 * 1024
_BARRIERS = 2048  # bytes kept for barriers and alignment
_MOST_STAGES = 32

# What a choice is made by, in KB and products per microsecond; one wave at a time.
L2 = 7000.0  # of all multiprocessors
INTAKE = 90.0  # of one
PRODUCTS = 3.4e6  # of one: multiplications and additions
_START, _CLUSTER = 2.5, 0.2  # microseconds of each launch that has them
_EXCHANGE = 0.12  # for each KB of sums that a program receives from the others of its split
_SQUARES = 0.001  # for each input of 64 normalised rows
# How many multiprocessors hold whole clusters of a size.
_PLACES = {1: 132, 2: 132, 4: 128, 8: 120}


@dataclasses.dataclass(frozen=True)
class Tiling:
    """One way to cut a product.

    Attributes:
      rows, columns: of the product that one program sums up.
      stages: pieces of K on their way at once.
      cluster: programs (along M, along N) that share what they load.
      split: programs of a cluster that divide K; each finishes columns / split.
      depth: inputs in a piece.
    """

    rows: int
    columns: int
    stages: int
    cluster: tuple[int, int] = (1, 1)
    split: int = 1
    depth: int = 64

    @property
    def programs_of_cluster(self) -> int:
        return self.cluster[0] * self.cluster[1] * self.split

    def steps(self, K: int) -> int:
        """Pieces of K that one program takes."""
        return -(-K // (self.depth * self.split))

    def grid(self, M: int, N: int) -> tuple[int, int]:
        """Clusters along M and N."""
        return (
            -(-M // (self.rows * self.cluster[0])),
            -(-N // (self.columns * self.cluster[1])),
        )

    def shared_memory(self, K: int) -> int:
        """Bytes of a program."""
        stages = min(self.stages, self.steps(K))
        loads = stages * self.depth * (self.rows + self.columns) * 2
        received = self.rows * self.columns * 4 if self.split > 1 else 0
        out = self.rows * max(self.columns // self.split * 2, 128)
        return loads + received + out + _BARRIERS

    def obstacle(self, K: int, N: int, *, gated: bool = False, normed: bool = False) -> str | None:
        """Why no such programs exist; None if they do."""
        width, (m, n) = self.columns / self.split, self.cluster
        if self.rows % ROWS or not 0 < self.rows <= 256:
            return f"rows must be 64, 128, 192 or 256, not {self.rows}"
        if self.columns % 32 or not 0 < self.columns <= 256:
            return f"columns must be a multiple of 32 up to 256, not {self.columns}"
        if self.depth not in (64, 128) or self.stages < 1 or self.split < 1:
            return f"depth must be 64 or 128 and stages, split positive, not {self}"
        if min(m, n) < 1 or self.programs_of_cluster not in _PLACES:
            return f"a cluster has 1, 2, 4 or 8 programs, not {m} x {n} x {self.split}"
        if self.depth % m or (self.rows // 8) % n:
            return f"a cluster divides depth {self.depth} and rows {self.rows}, not {m} x {n}"
        if width % (2 * PAIR if gated else 16):
            return (
                f"a program finishes a multiple of {2 * PAIR if gated else 16} columns, not {width}"
            )
        if normed and self.split > 1:
            return "rows are normalised where one program sees all of K; split must be 1"
        if self.stages == 1 < self.steps(K):
            return "a single stage must hold all of K; stages must be at least 2"
        if self.depth > K or self.columns > N:
            return f"depth {self.depth} and columns {self.columns} must not exceed K {K}, N {N}"
        if self.shared_memory(K) > SHARED_MEMORY:
            return f"{self.shared_memory(K)} bytes of shared memory exceed {SHARED_MEMORY}"
        return None

    def cost(self, M: int, K: int, N: int, *, normed: bool = False) -> float:
        """Microseconds, roughly, on an H100 or H200."""
        m, n = self.cluster
        down, across = self.grid(M, N)
        programs = down * across * self.programs_of_cluster
        waves = -(-programs // _PLACES[self.programs_of_cluster])
        inputs = self.steps(K) * self.depth
        read = programs * inputs * (self.rows / n + self.columns / m) * 2e-3 / L2
        taken = waves * inputs * (self.rows + self.columns) * 2e-3 / INTAKE
        multiplied = waves * self.rows * self.columns * inputs / PRODUCTS
        extra = (m * n > 1) * _CLUSTER
        if self.split > 1:
            extra += self.rows * self.columns * 4e-3 * _EXCHANGE
        if normed:
            extra += waves * inputs * self.rows / ROWS * _SQUARES
        return _START + max(read, taken, multiplied) + extra


def pair_width(F: int, pair: int = PAIR) -> int:
    """Columns of gate, then of up, at a time in `interleave`: `pair` if that divides F."""
    return math.gcd(F, pair)


def interleave(
    gate: Float[Array, "... F"], up: Float[Array, "... F"], pair: int = PAIR
) -> Float[Array, "... 2*F"]:
    """Columns of both by turns, `pair_width` at a time: what gated products multiply by.

    Raises:
      ValueError: if shapes differ.
    """
    if gate.shape != up.shape:
        raise ValueError(f"gate, up: shapes {gate.shape} and {up.shape} must be equal")
    width = pair_width(gate.shape[-1], pair)
    blocks = [x.reshape(*x.shape[:-1], -1, 1, width) for x in (gate, up)]
    return jnp.concatenate(blocks, axis=-2).reshape(*gate.shape[:-1], -1)


def tilings(M: int, K: int, N: int, *, gated: bool = False, normed: bool = False) -> list[Tiling]:
    """Ways to cut a product, each with the stages that fit, best first by `Tiling.cost`."""
    rows = [r for r in (64, 128, 256) if r < M + ROWS]
    columns = [c for c in (32, 64, 96, 128, 192, 256) if c <= N]
    clusters = ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4))
    found = []
    for r, c, cluster, split in itertools.product(rows, columns, clusters, (1, 2)):
        if r * cluster[0] >= M + r or c * cluster[1] >= N + c:
            continue  # whole programs would have nothing to do
        if c < 64 * (split > 1):
            continue  # short rows are slow to exchange
        empty = Tiling(r, c, 1, cluster, split)
        spare = SHARED_MEMORY - empty.shared_memory(K)
        stages = 1 + spare // (empty.depth * (r + c) * 2)
        one = dataclasses.replace(empty, stages=max(1, min(stages, empty.steps(K), _MOST_STAGES)))
        if one.obstacle(K, N, gated=gated, normed=normed) is None and (
            one.stages >= min(4, one.steps(K))
        ):
            found.append(one)
    order = lambda t: (
        t.cost(M, K, N, normed=normed),
        -t.cluster[0],
        t.programs_of_cluster,
        t.rows * t.columns,
    )
    return sorted(found, key=order)


@functools.cache
def best_tiling(M: int, K: int, N: int, *, gated: bool = False, normed: bool = False) -> Tiling:
    """The best of `tilings`."""
    return tilings(M, K, N, gated=gated, normed=normed)[0]


def obstacle(x, w, residual=None, *, gated=False) -> str | None:
    """Why these arguments cannot be multiplied on this device; None if they can.

    Only shapes, dtypes and the device matter: x, w, residual may be `jax.ShapeDtypeStruct`.
    """
    if why := hopper_obstacle():
        return why
    return argument_obstacle(x, w, residual, gated)


def argument_obstacle(x, w, residual, gated) -> str | None:
    """The same on any device."""
    dtypes = [str(a.dtype) for a in (x, w, residual) if a is not None]
    if set(dtypes) != {"bfloat16"}:
        return f"it takes bfloat16, not {', '.join(dtypes)}"
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
        return f"it multiplies (M, K) by (K, N), not {x.shape} by {w.shape}"
    (M, K), N = x.shape, w.shape[1]
    multiple = 2 * PAIR if gated else 8  # TMA takes rows of whole 16 bytes
    if K % 64 or N % multiple or N < 32 or not M or not K:
        return (
            f"M must be positive, K a multiple of 64 and N of {multiple}, at least 32, not "
            f"{M}, {K} and {N}"
        )
    if residual is not None and residual.shape != (M, N):
        return f"residual must be {(M, N)}, not {residual.shape}"
    return None
