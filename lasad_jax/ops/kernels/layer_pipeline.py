"""Products one after the other through the same shared memory (`decode_layers`).

One warpgroup loads pieces of the matrices of all products, one loads rows and one multiplies.
Slots of matrices are refilled in turn from the first product to the last; slots of rows begin
anew with each, since its rows depend on the product before.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from lasad_jax.ops.kernels.layer_tiling import (
    CLUSTER,
    DEPTH,
    UNIT,
    Product,
    rows_in_flight,
    weight_slots,
)
from lasad_jax.ops.kernels.mosaic_tiles import TILE, transposed

TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED
TRANSFORMS = (plgpu.TilingTransform((8, UNIT)), plgpu.SwizzleTransform(128))


def scratch_types(
    products: tuple[Product, ...], programs: int, interpret: bool, others: dict
) -> dict:
    """Shared memory and barriers of a program. Interpreted, each loads for itself.

    Args:
      others: what takes the place of rows while no product is at work.
    """
    num_slots, most_slots = weight_slots(products, programs), max(p.slots for p in products)
    tiles = lambda *shape: plgpu.SMEM(shape, jnp.bfloat16, transforms=TRANSFORMS)
    barrier = plgpu.Barrier(num_barriers=num_slots)
    clusters = plgpu.ClusterBarrier(collective_axes=("rank",), num_barriers=num_slots)
    return {
        "rows": plgpu.RefUnion(tiles(rows_in_flight(products), DEPTH), others),
        "rows_full": plgpu.Barrier(num_barriers=most_slots),
        "rows_empty": plgpu.Barrier(num_barriers=most_slots),
        "w": tiles(num_slots, DEPTH, UNIT),
        "w_full": barrier,
        "w_empty": barrier if interpret else clusters,
        "out": tiles(max(p.rows for p in products), UNIT),
    }


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """What the warpgroups of a program know.

    Attributes:
      cluster, rank: of this program.
      clusters: how many there are.
      scratch: of `scratch_types`.
      interpret: whether the interpreter runs.
    """

    cluster: jax.Array
    rank: jax.Array
    clusters: int
    scratch: dict
    interpret: bool

    def tiles(self, product: Product) -> jax.Array:
        """How many of a product are this program's."""
        return lax.div(product.tiles - self.cluster + self.clusters - 1, self.clusters)

    def place(self, product: Product, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where the i-th of them lies: its first row, and its column in units."""
        tile = self.cluster + i * self.clusters
        block = lax.rem(tile, product.blocks) * CLUSTER + self.rank
        return block * product.rows, lax.div(tile, product.blocks)

    def load_pieces(self, blocks, tiles, of_tile, packed: jax.Ref, first, position, slot):
        """All pieces of this program's tiles, of a matrix that begins with piece `first`.

        Args:
          blocks, tiles, of_tile: `Product.shape`.
          position, slot: how many pieces have been loaded, and where the next goes.

        Returns:
          both for what comes next.
        """
        num = lax.div(tiles - self.cluster + self.clusters - 1, self.clusters)

        def tile(t, carry):
            column = lax.div(self.cluster + t * self.clusters, blocks)
            load = lambda k, carry: self.load_piece(packed.at[first + column * of_tile + k], *carry)
            return rolled_loop(of_tile, load, carry)

        return rolled_loop(num, tile, (position, slot))

    def load_piece(self, piece: jax.Ref, position, slot, *, shared: bool = True):
        """One of DEPTH by UNIT numbers, for all programs of a cluster if `shared`."""
        w, full, empty = (self.scratch[name] for name in ("w", "w_full", "w_empty"))

        @pl.when(position >= w.shape[0])
        def _():
            plgpu.barrier_wait(empty.at[slot])

        axes = {"collective_axes": "rank"} if shared and not self.interpret else {}
        plgpu.copy_gmem_to_smem(piece, w.at[slot], full.at[slot], **axes)
        return position + 1, next_slot(slot, w.shape[0])

    def pieces_are_taken(self, position: jax.Array) -> None:
        """Waits until none of so many pieces is in use."""
        _drain(self.scratch["w_empty"], position, self.scratch["w"].shape[0])

    def load_rows(self, product: Product, source: jax.Ref, then=None) -> None:
        """`then` is called when those of the first tile are on their way."""
        full, empty = self.scratch["rows_full"], self.scratch["rows_empty"]

        def tile(t, carry):
            row, _ = self.place(product, t)

            def step(k, carry):
                i, slot = carry

                @pl.when(i >= product.slots)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                piece = source.at[pl.ds(row, product.rows), pl.ds(k * DEPTH, DEPTH)]
                plgpu.copy_gmem_to_smem(piece, self.rows(product, slot), full.at[slot])
                return i + 1, next_slot(slot, product.slots)

            carry = rolled_loop(product.steps, step, carry)
            if then is not None:
                pl.when(t == 0)(then)
            return carry

        rolled_loop(self.tiles(product), tile, (jnp.int32(0), jnp.int32(0)))

    def rows_are_taken(self, product: Product) -> None:
        """Waits until none of a product's rows is in use."""
        num = self.tiles(product) * product.steps
        _drain(self.scratch["rows_empty"], num, product.slots)

    def multiply(self, product, result, slot, finish, begin=None, after=None):
        """All tiles of a product, and their columns of the result.

        Args:
          product, result: which, and where it goes.
          slot: of its first piece of the matrix.
          finish: (t, *sums) of this program's tile t, each (UNIT, rows) with a row for each
            column, to what is rounded.
          begin, after: of a tile, called with its first row and its column in units; `after`
            with what was rounded before these.

        Returns:
          the slot after it. The result has been written.
        """

        def tile(t, slots):
            row, column = self.place(product, t)
            # What the tile before has left in shared memory has been read.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if begin is not None:
                begin(row, column)
            sums, slots = self._sums(product, slots)
            value = finish(t, *sums).astype(jnp.bfloat16)
            target = self.out(product)
            transposed(target)[...] = plgpu.layout_cast(value, TRANSPOSED)
            plgpu.commit_smem()
            place = result.at[pl.ds(row, product.rows), pl.ds(column * UNIT, UNIT)]
            plgpu.copy_smem_to_gmem(target, place)
            if after is not None:
                after(value, row, column)
            return slots

        _, slot = rolled_loop(self.tiles(product), tile, (jnp.int32(0), slot))
        plgpu.wait_smem_to_gmem(0)
        return slot

    def out(self, product: Product) -> jax.Ref:
        """A tile on its way out."""
        return self.scratch["out"].at[pl.ds(0, product.rows)]

    def rows(self, product: Product, slot: jax.Array) -> jax.Ref:
        """A piece of rows."""
        return self.scratch["rows"].at[pl.ds(slot * product.rows, product.rows)]

    def _sums(self, product, slots):
        """Of the next tile, whose first pieces of rows and of the matrix lie in `slots`."""
        x_full, x_empty, w, w_full, w_empty = (
            self.scratch[name] for name in ("rows_full", "rows_empty", "w", "w_full", "w_empty")
        )

        def release(x_slot, w_slots):
            plgpu.barrier_arrive(x_empty.at[x_slot])
            for slot in w_slots:
                plgpu.barrier_arrive(w_empty.at[slot])

        def run(*sums):
            def step(k, carry):
                (x_slot, slot), before = carry
                plgpu.barrier_wait(x_full.at[x_slot])
                rows = transposed(self.rows(product, x_slot))
                w_slots = []
                for total in sums:
                    plgpu.barrier_wait(w_full.at[slot])
                    if not self.interpret:
                        _order_registers()
                    plgpu.wgmma(total, transposed(w.at[slot]), rows)
                    w_slots.append(slot)
                    slot = next_slot(slot, w.shape[0])
                plgpu.wgmma_wait(product.units)

                @pl.when(k > 0)
                def _():
                    # The products before these have now read their pieces.
                    release(*before)

                return (next_slot(x_slot, product.slots), slot), (x_slot, w_slots)

            none = jnp.int32(0), [jnp.int32(0)] * product.units
            slots_and_last = rolled_loop(product.steps, step, (slots, none))
            return [total[...] for total in sums], slots_and_last

        accumulators = [plgpu.ACC((UNIT, product.rows), jnp.float32)] * product.units
        sums, (slots, last) = pl.run_scoped(run, *accumulators)
        release(*last)
        return sums, slots


def rolled_loop(num, step, carry):
    """`lax.fori_loop` from 0 to num, of which the compiler does not repeat the body.

    A layer's code must fit in the cache of instructions.
    """

    def body(state):
        i, carry = state
        # Who cannot know the next i cannot unroll.
        return lax.optimization_barrier(i + 1), step(i, carry)

    return lax.while_loop(lambda state: state[0] < num, body, (jnp.int32(0), carry))[1]


@plgpu.inline_mgpu()
def _order_registers(_):
    """Where ptxas has to add this by itself, it may make every product wait for its end.

    Between this and the product there must be no branch, such as the wait for a barrier.
    """
    mgpu.utils.inline_ptx("wgmma.fence.sync.aligned;", has_side_effects=True)


def load_across(ref: jax.Ref) -> jax.Array:
    """A (rows, 64) piece as the tile of its columns, 64 of them, by rows."""
    return plgpu.layout_cast(plgpu.load(transposed(ref), layout=TRANSPOSED), TILE)


def put_across(ref: jax.Ref, value: jax.Array) -> None:
    """The other way round; each thread writes the numbers that it would load."""
    transposed(ref)[...] = plgpu.layout_cast(value.astype(jnp.bfloat16), TRANSPOSED)


def next_slot(slot, slots):
    """Without a division, which would take as long as the products of a step."""
    return jnp.where(slot == slots - 1, 0, slot + 1)


def _drain(empty, position, slots):
    """Waits for the last uses of slots, for which no refill has waited."""

    first = jnp.maximum(position - slots, 0)

    def step(i, slot):
        plgpu.barrier_wait(empty.at[slot])
        return next_slot(slot, slots)

    rolled_loop(position - first, step, lax.rem(first, slots))
