"""How the products between two mixers are cut into tiles (`decode_between`).

M rows, K inputs, N outputs. A tile is 64 columns of the result, for gated products from 64 of the
gate and 64 of up, by a number of rows.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lasad_jax.ops.kernels.choice import hopper_obstacle
from lasad_jax.ops.kernels.decode_tiling import INTAKE, L2, PRODUCTS, SHARED_MEMORY

UNIT = 64  # columns of a piece of a matrix
DEPTH = 128  # inputs of a piece of a matrix or of rows
CLUSTER = 2  # programs, of rows below each other, that share pieces of matrices
# What programs count each other in: of each phase, in a line of the L2 cache of its own. Launches
# that follow each other take the one and the other by turns (`grid_barrier`).
Counters = tuple[Int[Array, "phases stride"], Int[Array, "phases stride"]]
_COUNTERS = (5, 32)
# Devices known to hold a program on each, in clusters, at once: they wait for each other.
_MULTIPROCESSORS = (132,)
_CHANNELS = 128  # threads that a row is spread over
_FEWEST_ROWS, _MULTIPLE = 16, 8  # of a tile
_MOST_IMAGES = 512  # rows beyond which products take most of the time
_PIECE_BYTES = DEPTH * UNIT * 2
# Bytes for rows on their way: the fewer rows there are, the more it is matrices that must be.
_ROWS_MEMORY, _OF_FEW, _FEW_ROWS = 96 * 1024, 64 * 1024, 128
_MOST_SLOTS = 32  # barriers of one kind
MOST_ROWS = 128  # what registers hold sums of
_BARRIERS = 8192  # bytes kept for barriers, reductions and alignment


@dataclasses.dataclass(frozen=True)
class Product:
    """A product x w cut into tiles.

    Attributes:
      M, K, N: its size; N of what it gives, not of the matrix.
      rows: of a tile.
      units: columns that a tile is made from, in units: 2 with a gate.
    """

    M: int
    K: int
    N: int
    rows: int
    units: int = 1

    @property
    def steps(self) -> int:
        """Pieces of K, the last of which may be half empty."""
        return -(-self.K // DEPTH)

    @property
    def blocks(self) -> int:
        """Tiles above each other, in clusters; the last ones may lie below all rows."""
        return -(-self.M // (self.rows * CLUSTER))

    @property
    def tiles(self) -> int:
        """Of a cluster: one for each of its programs."""
        return self.blocks * (self.N // UNIT)

    def most_tiles(self, programs: int) -> int:
        """Of one of so many programs."""
        return -(-self.tiles // (programs // CLUSTER))

    @property
    def slots(self) -> int:
        """Pieces of rows on their way at once."""
        memory = _OF_FEW if self.M <= _FEW_ROWS else _ROWS_MEMORY
        return min(memory // (self.rows * DEPTH * 2), self.steps, _MOST_SLOTS)

    def cost(self, programs: int) -> float:
        """Microseconds, roughly, on an H100 or H200."""
        rounds = self.most_tiles(programs)
        weights = self.K * UNIT * self.units * 2e-3
        loads = self.K * self.rows * 2e-3 + weights
        read = self.tiles * (CLUSTER * (loads - weights) + weights)
        products = self.K * max(self.rows, UNIT // 2) * UNIT * self.units
        return max(rounds * loads / INTAKE, read / L2, rounds * products / PRODUCTS)


def best_product(M: int, K: int, N: int, programs: int, *, gated: bool = False) -> Product:
    """The rows that cost least; of equals, the fewest, for which a program waits least."""
    units = 1 + gated
    ways = [
        Product(M, K, N, r, units)
        for r in range(_FEWEST_ROWS, MOST_ROWS // units + 1, _MULTIPLE)
        if r <= M
    ]
    return min(ways, key=lambda product: (product.cost(programs), product.rows))


def rows_in_flight(products: tuple[Product, ...]) -> int:
    """Rows of DEPTH inputs that shared memory holds."""
    return max(p.rows * p.slots for p in products)


def weight_slots(products: tuple[Product, ...], programs: int) -> int:
    """Pieces of matrices that fit beside all else."""
    rows, width = max(p.rows for p in products), products[0].N // UNIT
    # A tile on its way out and, for the last product, sums of squares of its rows.
    others = rows * UNIT * 2 + MOST_ROWS * 4 * (width * products[-1].most_tiles(programs) + 2)
    others += rows_in_flight(products) * DEPTH * 2 + _BARRIERS
    return min((SHARED_MEMORY - others) // _PIECE_BYTES, _MOST_SLOTS)


def new_counters() -> Counters:
    """Those of a first launch: int32 zeros."""
    return jnp.zeros(_COUNTERS, jnp.int32), jnp.zeros(_COUNTERS, jnp.int32)


def num_programs() -> int | None:
    """Multiprocessors of the device: as many programs are at work at the same time."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        return abstract.num_cores
    return getattr(jax.devices()[0], "core_count", None)


def whole_rows(num_images: int) -> int:
    """As many rows as images, filled up to what tiles can be made of."""
    return max(num_images + -num_images % _MULTIPLE, _FEWEST_ROWS)


def obstacle(num_images: int | None, D: int, inputs_and_outputs: tuple[int, ...]) -> str | None:
    """Why a layer of D channels cannot run, or not well, on this device in bf16; None if it can.

    Args:
      num_images: rows; None for as many as suit.
      inputs_and_outputs: other sizes that matrices of the layer have.
    """
    if why := hopper_obstacle():
        return why
    if num_programs() not in _MULTIPROCESSORS:
        return f"it takes one of {_MULTIPROCESSORS} multiprocessors, not {num_programs()}"
    if _shares_its_gpu():
        return "its programs must have the GPU to themselves, which MPS shares with others"
    if num_images is not None and num_images > _MOST_IMAGES:
        return f"it takes at most {_MOST_IMAGES} rows, not {num_images}"
    if D % _CHANNELS or any(size % UNIT or size < DEPTH for size in inputs_and_outputs):
        return (
            f"it takes a width that is a multiple of {_CHANNELS} and other multiples of {UNIT}, "
            f"at least {DEPTH}, not {D} and {inputs_and_outputs}"
        )
    return None


def _shares_its_gpu() -> bool:
    """Whether a control daemon of MPS runs where CUDA looks for it."""
    folder = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
    return os.path.exists(os.path.join(folder, "control"))
