"""The heads of one token inside `decode_layers`: what LASAD's mixer does between its projections.

A part is one head of eight images. Tensor cores want 64 rows of the left operand, so one image's
query cannot be the right one by itself: queries of eight images are the diagonal blocks of a
matrix, and one product with the memories below each other gives the eight outputs,

    out[:, b] = [S_0^T ... S_7^T] diag(q_0 ... q_7)[:, b]        (64 x 256) (256 x 8)

with zeros off the diagonal. Scores of the newest keys are the diagonal of all keys times all
queries, and the weighted scores again a matrix of diagonal blocks for the newest values.

One warpgroup turns projections into such operands (`prepare`), one multiplies and folds
(`finish`), and that of the matrices loads memories and values into its slots (`load`).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from lasad_jax.ops.kernels.layer_pipeline import (
    TRANSFORMS,
    Pipeline,
    load_across,
    next_slot,
    put_across,
    rolled_loop,
)
from lasad_jax.ops.kernels.layer_ring import BLOCK, HALF, BlockedRing
from lasad_jax.ops.kernels.layer_tiling import DEPTH, HEAD, UNIT, Product
from lasad_jax.ops.kernels.mosaic_tiles import (
    COLUMN,
    ROW,
    TILE,
    by_column,
    by_row,
    iota,
    multiply,
    transposed,
)
from lasad_jax.ops.ring import NUM_RECENT, ROWS

KEY, _ = HEAD
SLOTS = 3  # parts on their way at once
_WIDE = 2 * BLOCK  # images of a block twice beside each other
# Rows of 64 numbers that a part takes.
_PIECES = {"keys": UNIT, "queries": 2 * _WIDE, "scores": _WIDE}
_PIECES |= {"gates": BLOCK, "values": BLOCK, "out_gates": BLOCK}


def memory_types() -> dict:
    """Shared memory that nobody else needs while heads are at work."""
    tiles = lambda rows: plgpu.SMEM((rows, UNIT), jnp.bfloat16, transforms=TRANSFORMS)
    turned = (plgpu.TilingTransform((8, KEY)), plgpu.SwizzleTransform(2 * KEY))
    logs = plgpu.SMEM((SLOTS, BLOCK * ROWS), jnp.float32)
    return {name: tiles(SLOTS * rows) for name, rows in _PIECES.items()} | {
        "qk": plgpu.SMEM((SLOTS * _WIDE, UNIT), jnp.bfloat16, transforms=turned),
        "logs_before": logs,
        "logs": logs,
        "logs_after": logs,
        "dense": tiles(2 * _WIDE),
        "halves": tiles(2 * UNIT),
    }


def lasting_types(num_heads: int, has_gates: bool) -> dict:
    """Barriers, and shared memory that is its own."""
    barrier = lambda arrivals: plgpu.Barrier(num_arrivals=arrivals, num_barriers=SLOTS)
    table = plgpu.SMEM((num_heads,), jnp.float32)
    return {
        "factors": table,
        "biases": table,
        "tables_full": plgpu.Barrier(num_arrivals=1 + has_gates),
        "keys_full": barrier(2),
        "qk_full": barrier(5),
        "values_full": barrier(2),
        "prepared": barrier(1),
        "finished": barrier(1),
        "helped": plgpu.Barrier(),
    }


@dataclasses.dataclass(frozen=True)
class Heads:
    """What the warpgroups of a program know of them.

    Attributes:
      pipeline: of the program.
      parts: a product of as many tiles as there are parts, 8 rows by a head each.
      ring: of the layer, updated in place.
      projected: [q | k | v | out_gate] of one head after the other, then the content gates.
      mixed: where gated outputs go.
      index: number of tokens before this one.
      log_factor: of this step, of each head.
      turns: what RoPE multiplies a token of two keys beside each other by, and their swapped
        pairs; None for no RoPE.
      gate_bias: of the content gates; None for none.
      epsilon: of the heads' norm.
    """

    pipeline: Pipeline
    parts: Product
    ring: BlockedRing
    projected: jax.Ref
    mixed: jax.Ref
    index: jax.Array
    log_factor: jax.Ref
    turns: jax.Ref | None
    gate_bias: jax.Ref | None
    epsilon: float

    @property
    def num_parts(self) -> jax.Array:
        """Of this program."""
        return self.pipeline.tiles(self.parts)

    @property
    def _slot(self):
        """The row of the ring for this token."""
        return 1 + lax.rem(self.index - 1, NUM_RECENT)

    def load_tables(self) -> None:
        """Before `prepare`, which waits for them."""
        scratch = self.pipeline.scratch
        plgpu.copy_gmem_to_smem(self.log_factor, scratch["factors"], scratch["tables_full"])
        if self.gate_bias is not None:
            plgpu.copy_gmem_to_smem(self.gate_bias, scratch["biases"], scratch["tables_full"])

    def load(self, num, position, slot):
        """Memories and newest values of the first parts, as `Pipeline.load_pieces`."""

        def step(t, carry):
            row, head = self.pipeline.place(self.parts, t)
            load = functools.partial(self.pipeline.load_piece, shared=False)

            def memory(i, carry):
                rows = pl.ds(row * KEY + i * DEPTH, DEPTH)
                return load(self.ring.memory.at[head, rows], *carry)

            carry = rolled_loop(2, memory, carry)
            return load(self.ring.recent_v.at[head, pl.ds(row * ROWS, DEPTH)], *carry)

        return rolled_loop(num, step, (position, slot))

    def prepare(self, helping, wait) -> None:
        """Operands of all parts, by two warpgroups at once: of those in slots 0 and 2, and 1.

        Args:
          helping: whether this warpgroup is the second.
          wait: called to wait until projections are there, and nobody uses rows any more.
        """
        scratch, first = self.pipeline.scratch, helping.astype(jnp.int32)
        finished, turns = scratch["finished"], self._turns()
        plgpu.barrier_wait(scratch["tables_full"])

        def some_parts(i, _):
            num = self._num_own(i, first)

            def load_keys(j, _):
                slot = first + 2 * j
                # What was written in these places, and what is still read there.
                pl.when(i > 0)(lambda: plgpu.barrier_wait(finished.at[slot]))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.commit_smem()
                self._load_keys(i * SLOTS + slot, slot)

            def load_projections(j, _):
                self._load_projections(i * SLOTS + first + 2 * j, first + 2 * j)

            def prepare(j, _):
                self._prepare(i * SLOTS + first + 2 * j, first + 2 * j, first, turns)

            # Only the first knows before that rows are not used.
            pl.when((i == 0) & helping)(wait)
            rolled_loop(num, load_keys, None)
            pl.when((i == 0) & jnp.logical_not(helping))(wait)
            rolled_loop(num, load_projections, None)
            rolled_loop(num, prepare, None)

        rolled_loop(lax.div(self.num_parts + SLOTS - 1, SLOTS), some_parts, None)
        done = lambda j, _: plgpu.barrier_wait(finished.at[first + 2 * j])
        rolled_loop(self._num_own(0, first), done, None)
        plgpu.wait_smem_to_gmem(0)
        # What was written here before rows of products come.
        plgpu.commit_smem()

    def _num_own(self, i, first):
        """Parts of round i in slot `first` and, for 0, two further."""
        left = self.num_parts - i * SLOTS
        return jnp.minimum(lax.div(left + 1 - first, 2), 2 - first)

    def finish(self, slot):
        """Gated outputs of all parts, from the slot of the first memory on; the slot after it."""

        def step(t, carry):
            part, slot = carry
            slot = self._finish(t, part, slot)
            return next_slot(part, SLOTS), slot

        _, slot = rolled_loop(self.num_parts, step, (jnp.int32(0), slot))
        plgpu.wait_smem_to_gmem(0)
        return slot

    def _turns(self):
        if self.turns is None:
            return None
        load = functools.partial(plgpu.load, layout=ROW, optimized=False)
        return [load(self.turns.at[i]) for i in range(2)]

    def _load_keys(self, t, slot):
        row, head = self.pipeline.place(self.parts, t)
        scratch = self.pipeline.scratch
        full = scratch["keys_full"].at[slot]
        keys = self.ring.recent_k.at[head, pl.ds(row * HALF, UNIT)]
        plgpu.copy_gmem_to_smem(keys, self._piece("keys", slot), full)
        logs = self.ring.log_weight.at[head, pl.ds(row * ROWS, BLOCK * ROWS)]
        plgpu.copy_gmem_to_smem(logs, scratch["logs_before"].at[slot], full)

    def _load_projections(self, t, slot):
        row, head = self.pipeline.place(self.parts, t)
        scratch = self.pipeline.scratch
        rows, first = pl.ds(row, BLOCK), head * 2 * (KEY + UNIT)

        def load(column, width, target, full):
            source = self.projected.at[rows, pl.ds(column, width)]
            plgpu.copy_gmem_to_smem(source, target, full.at[slot])

        full = scratch["qk_full"]
        for right in (0, KEY):
            load(first, KEY, self._qk(slot, 0, right), full)
            load(first + KEY, KEY, self._qk(slot, BLOCK, right), full)
        gates = 0  # nothing that is used, if there are none
        if self.gate_bias is not None:
            gates = self.parts.N // UNIT * 2 * (KEY + UNIT) + lax.div(head, UNIT) * UNIT
        load(gates, UNIT, self._piece("gates", slot), full)
        full = scratch["values_full"]
        load(first + 2 * KEY, UNIT, self._piece("values", slot), full)
        load(first + 2 * KEY + UNIT, UNIT, self._piece("out_gates", slot), full)

    def _prepare(self, t, part, who, turns):
        """Queries and weighted scores as operands; the new key and log-weights."""
        scratch, interpret = self.pipeline.scratch, self.pipeline.interpret
        row, head = self.pipeline.place(self.parts, t)
        half, r = self._slot // HALF, lax.rem(self._slot, HALF)
        places, columns = _iota(0, _WIDE), _iota(1, _WIDE)
        left = columns < BLOCK

        def activated(x):
            x = _rounded(silu(x))
            if turns is not None:
                cos, sin = (by_row(turn, x.shape[1]) for turn in turns)
                x = _rounded(x * cos + _swapped(x, interpret) * sin)
            return x

        plgpu.barrier_wait(scratch["keys_full"].at[part])
        plgpu.barrier_wait(scratch["qk_full"].at[part])
        q, k = (
            activated(load_across(self._qk_rows(part, first)).astype(jnp.float32))
            for first in (0, BLOCK)
        )
        q = _twice(_rounded(q * KEY**-0.5))

        keys = self._piece("keys", part)
        own = keys.at[pl.ds(r * BLOCK, BLOCK)]
        mine = lax.div(_iota(0, BLOCK), KEY) == half
        put_across(own, jnp.where(mine, k, load_across(own).astype(jnp.float32)))
        dense = scratch["dense"].at[pl.ds(who * _WIDE, _WIDE)]
        put_across(dense, jnp.where(lax.div(places, KEY) == lax.div(columns, BLOCK), q, 0.0))
        for pair in range(2):
            # Two images of a chunk, two chunks beside each other.
            image = 4 * pair + jnp.where(left, 0, 2) + jnp.where(places < KEY, 0, 1)
            blocks = jnp.where(lax.rem(columns, BLOCK) == image, q, 0.0)
            put_across(self._queries(part, pair), blocks)
        plgpu.commit_smem()
        new = self.ring.recent_k.at[head, pl.ds(row * HALF + r * BLOCK, BLOCK)]
        plgpu.copy_smem_to_gmem(own, new)

        # No sum over rows, for which all warpgroups have one scratch memory: this one's gates are
        # chosen by a product.
        chosen = jnp.where(_iota(1) == lax.rem(head, UNIT), 1.0, 0.0).astype(jnp.bfloat16)
        gates = transposed(self._piece("gates", part))
        (content, scores), (first, second) = multiply(
            [(chosen, gates)],
            [(keys, transposed(dense))],
            work=lambda: [self._logs("logs_before", part, i) for i in range(2)],
            interpret=interpret,
        )
        g = scratch["factors"][head]
        if self.gate_bias is not None:
            g -= _twice(_softplus(content + scratch["biases"][head]))
        logs = jnp.where(left, by_row(first, _WIDE), by_row(second, _WIDE)) + g
        is_new = (lax.div(places, BLOCK) == r) & (lax.div(columns, BLOCK) == half)
        logs = jnp.where(is_new, 0.0, logs)
        images = lax.rem(places, BLOCK) == lax.rem(columns, BLOCK)
        # The prefix token keeps its weight.
        weights = jnp.where((places < BLOCK) & left, 1.0, jnp.exp(logs))
        scores = jnp.where(images, scores * weights, 0.0)
        put_across(self._piece("scores", part), scores)
        empty = plgpu.broadcasted_iota(jnp.int32, (UNIT,), 0, layout=ROW) < BLOCK
        for i, side in enumerate((images & left, images & (columns >= BLOCK))):
            place = pl.ds(i * UNIT, UNIT)
            value = jnp.sum(jnp.where(side, logs, 0.0), axis=1)
            scratch["logs"].at[part, place][...] = value
            cleared = jnp.where(empty, 0.0, -jnp.inf) if i == 0 else jnp.full_like(value, -jnp.inf)
            folded = jnp.broadcast_to(self._slot, value.shape) == NUM_RECENT
            scratch["logs_after"].at[part, place][...] = jnp.where(folded, cleared, value)
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch["prepared"].at[part])
        after = self.ring.log_weight.at[head, pl.ds(row * ROWS, BLOCK * ROWS)]
        plgpu.copy_smem_to_gmem(scratch["logs_after"].at[part], after)

    def _finish(self, t, part, slot):
        scratch, interpret = self.pipeline.scratch, self.pipeline.interpret
        row, head = self.pipeline.place(self.parts, t)
        w, w_full, w_empty = (scratch[name] for name in ("w", "w_full", "w_empty"))
        slots = [slot]
        for _ in range(3):
            slots.append(next_slot(slots[-1], w.shape[0]))
        *slots, following = slots
        values, v = w.at[slots[2]], self._piece("values", part)
        plgpu.barrier_wait(scratch["values_full"].at[part])
        plgpu.barrier_wait(w_full.at[slots[2]])
        put_across(values.at[pl.ds(self._slot * BLOCK, BLOCK)], load_across(v))
        plgpu.commit_smem()
        new = self.ring.recent_v.at[head, pl.ds(row * ROWS + self._slot * BLOCK, BLOCK)]
        plgpu.copy_smem_to_gmem(v, new)
        for slot in slots[:2]:
            plgpu.barrier_wait(w_full.at[slot])
        plgpu.barrier_wait(scratch["prepared"].at[part])

        def chunk(piece, i):
            return transposed(piece.at[pl.ds(i * UNIT, UNIT)])

        def operand(pieces, i):
            return transposed(pieces.at[pl.ds(i * BLOCK, BLOCK)])

        of_memory = [
            (chunk(w.at[slots[i]], j), operand(self._queries(part, i), j))
            for i in range(2)
            for j in range(2)
        ]
        scores = self._piece("scores", part)
        of_recent = [(chunk(values, i), operand(scores, i)) for i in range(2)]
        logs = scratch["logs"].at[part]

        def others():
            gate = _rounded(silu(load_across(self._piece("out_gates", part)).astype(jnp.float32)))
            decay = jnp.exp(plgpu.load(logs.at[pl.ds(0, BLOCK)], layout=COLUMN, optimized=False))
            return gate, by_column(decay)

        (x, recent), (gate, decay) = multiply(
            of_memory, of_recent, work=others, interpret=interpret
        )
        x = _rounded(x * decay + recent)
        scale = lax.rsqrt(jnp.sum(x * x, axis=0) / UNIT + self.epsilon)
        x = _rounded(x * by_column(scale)) * gate
        out = scratch["out"].at[pl.ds(0, BLOCK)]
        # What the part before has left there has been read.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        put_across(out, x)
        plgpu.commit_smem()
        place = pl.ds(row, BLOCK), pl.ds(head * UNIT, UNIT)
        plgpu.copy_smem_to_gmem(out, self.mixed.at[*place])
        full = self._slot == NUM_RECENT
        rolled_loop(
            jnp.where(full, BLOCK // 2, 0), functools.partial(self._fold, part, slots), None
        )

        @pl.when(full)
        def _():
            for i in range(2):
                place = pl.ds(row * KEY + i * DEPTH, DEPTH)
                plgpu.copy_smem_to_gmem(w.at[slots[i]], self.ring.memory.at[head, place])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        for taken in slots:
            plgpu.barrier_arrive(w_empty.at[taken])
        plgpu.barrier_arrive(scratch["finished"].at[part])
        return following

    def _fold(self, part, slots, pair, _) -> None:
        """All rows of the ring into the memories of two images."""
        scratch, b = self.pipeline.scratch, 2 * pair
        w, logs = scratch["w"], scratch["logs"].at[part]
        values, keys = w.at[slots[2]], self._piece("keys", part)[...]
        rows, columns = _iota(0), _iota(1)
        # One image's keys, then the other's.
        image = b + jnp.where(columns < KEY, 0, 1)
        halves = [scratch["halves"].at[pl.ds(i * UNIT, UNIT)] for i in range(2)]
        for i, half in enumerate(halves):
            weights = by_row(jnp.exp(self._logs("logs", part, i)))
            if i == 0:  # the prefix token is never folded
                weights = jnp.where(rows < BLOCK, 0.0, weights)
            weights = jnp.where(lax.rem(rows, BLOCK) == image, weights, 0.0)
            both = _twice(keys[:, i * KEY : (i + 1) * KEY])
            half[...] = (both.astype(jnp.float32) * weights).astype(jnp.bfloat16)
        plgpu.commit_smem()
        chunk = lambda i: transposed(values.at[pl.ds(i * UNIT, UNIT)])
        (recent,), _ = multiply(
            [(chunk(i), halves[i]) for i in range(2)], interpret=self.pipeline.interpret
        )
        memory = w.at[jnp.where(b < BLOCK // 2, slots[0], slots[1])]
        memory = memory.at[pl.ds(lax.rem(b, BLOCK // 2) * KEY, UNIT)]
        decay = jnp.where(columns < KEY, jnp.exp(logs[b]), jnp.exp(logs[b + 1]))
        put_across(memory, decay * load_across(memory).astype(jnp.float32) + recent)
        # All warps are done with the halves.
        plgpu.commit_smem()

    def _piece(self, name, part):
        rows = _PIECES[name]
        return self.pipeline.scratch[name].at[pl.ds(part * rows, rows)]

    def _queries(self, part, pair):
        return self._piece("queries", part).at[pl.ds(pair * _WIDE, _WIDE)]

    def _qk(self, slot, below, column):
        rows = pl.ds(slot * _WIDE + below, BLOCK)
        return self.pipeline.scratch["qk"].at[rows, pl.ds(column, KEY)]

    def _qk_rows(self, slot, first):
        return self.pipeline.scratch["qk"].at[pl.ds(slot * _WIDE + first, BLOCK)]

    def _logs(self, name, part, i):
        logs = self.pipeline.scratch[name].at[part, pl.ds(i * UNIT, UNIT)]
        return plgpu.load(logs, layout=ROW)


def _iota(dimension, width=UNIT):
    """Made anew wherever it is used: kept through all loops, it would take too many registers."""
    return lax.optimization_barrier(iota(dimension, width))


def _twice(x):
    return jnp.concatenate([x, x], axis=1)


def _rounded(x):
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def silu(x):
    # A division takes ten instructions.
    root = lax.rsqrt(1 + jnp.exp(-x))
    return x * root * root


def _softplus(x):
    return jnp.maximum(x, 0.0) + jnp.log(1 + jnp.exp(-jnp.abs(x)))


def _swapped(x, interpret):
    """Each pair of rows the other way round."""
    if interpret:
        return x.reshape(UNIT // 2, 2, -1)[:, ::-1].reshape(x.shape)
    like = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=TILE)

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=like)
    def swap(_, x):
        registers = np.empty_like(x.registers)
        for place, register in np.ndenumerate(x.registers):
            # A row is four lanes.
            registers[place] = mgpu.utils.shfl_bfly(register, 4)
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=x.is_signed)

    return swap(x)
