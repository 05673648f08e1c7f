"""A mixer's heads from joint projection to gated output on Hopper: Mosaic GPU, backward.

One walk from the last chunk to the first: through gate and norm, the recurrence and what is done
to queries and keys. Two warpgroups share a head: one takes gate, norm and values, the other
queries, keys and the state. A program has two heads. How the kernel is built else:
`mixed_heads_mosaic`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32

from lasad_jax.ops.kernels import mixed_heads_decays as md
from lasad_jax.ops.kernels import mixed_heads_tiles as mh
from lasad_jax.ops.kernels import mosaic_tiles as mg
from lasad_jax.ops.kernels.mosaic_columns import Arrivals, store, tiles

_HEADS = 2  # of a program
_STAGES = 2
_GROUPS = 2  # of chunks whose decays are held at once
# Tiles that come together, by the barriers' name.
_COPIES = {"gated": 3, "values": 1, "keys": 2}
_REGISTERS = {"values": 120, "keys": 136}  # of a thread


def backward(
    y: BFloat16[Array, "B N H W"],
    steps: Float32[Array, "H M 64"],
    bias: Float32[Array, " H"] | None,
    table: Float32[Array, "M*64 32"] | None,
    o: BFloat16[Array, "B N H 64"],
    states: BFloat16[Array, "B H boundaries 64 32"],
    d_h: BFloat16[Array, "B N H 64"],
    *,
    q_scale: float,
    epsilon: float,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """(d_y, h, d_steps): the gradient with respect to y, 0 in the padding; the gated heads again;
    and what each image adds to the gradient of steps and, with a bias, as if there were one for
    each token, of bias: (B, H, 1 or 2, M, 64) in float32.

    Args:
      o, states: from `forward`.
      d_h: the gradient with respect to h.

    The other arguments are `forward`'s.
    """
    batch, num_tokens, heads, _ = y.shape
    total = batch * heads
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    shape = (batch, heads, 1 if bias is None else 2, *steps.shape[1:])
    d_steps = jax.ShapeDtypeStruct(shape, jnp.float32)
    out_type = {"d_y": like(y), "h": like(d_h), "d_steps": d_steps}

    def kernel(inputs, outputs, scratch):
        arrivals = {name: Arrivals(scratch[name], interpret) for name in _COPIES}
        for name, copies in _COPIES.items():
            arrivals[name].start(copies)
        warpgroup = lax.axis_index("wg")
        own = lax.div(warpgroup, 2)
        number = _HEADS * lax.axis_index("b") + own
        program = _Program(
            inputs=inputs,
            outputs=outputs,
            scratch=scratch,
            arrivals=arrivals,
            own=own,
            image=lax.div(number, heads),
            head=lax.rem(number, heads),
            is_last=number + 1 == total,
            q_scale=q_scale,
            epsilon=epsilon,
            interpret=interpret,
        )
        is_keys = lax.rem(warpgroup, 2) == 1

        @pl.when(warpgroup == 0)
        def _():
            mg.fill_mask(scratch["mask"], 1)
            plgpu.barrier_arrive(scratch["masked"])

        plgpu.barrier_wait(scratch["masked"])
        pl.when((number < total) & ~is_keys)(lambda: _values(program))
        pl.when((number < total) & is_keys)(lambda: _keys(program))

    inputs = {"y": y, "o": o, "states": states, "d_h": d_h}
    inputs |= {"steps": steps, "bias": bias, "table": table}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    narrow = functools.partial(tiles, _HEADS, width=mh.KEY_DIM)
    broad = functools.partial(tiles, _HEADS, width=mh.VALUE_DIM)
    scratch = {name: narrow(_STAGES) for name in ("q", "k", "state")}
    scratch |= {"v": broad(_STAGES)}
    scratch |= {name: broad() for name in ("out_gate", "o", "d_h", "d_o", "d_scores")}
    scratch |= {name: narrow() for name in ("q_slope", "k_slope", "d_state", "decayed", "prefix")}
    scratch |= {"mask": tiles(width=mh.VALUE_DIM), "masked": plgpu.Barrier()}
    scratch |= {"b": plgpu.SMEM((_HEADS, _GROUPS, *md.SHAPE), jnp.float32)}
    scratch |= {name: plgpu.SMEM((_HEADS, *md.SHAPE), jnp.float32) for name in ("change", "through")}
    scratch |= {
        "gated": Arrivals.scratch(_COPIES["gated"], _HEADS, interpret),
        "values": Arrivals.scratch(_COPIES["values"], _HEADS * _STAGES, interpret),
        "keys": Arrivals.scratch(_COPIES["keys"], _HEADS * _STAGES, interpret),
        "states": plgpu.Barrier(num_barriers=_HEADS * _STAGES),
    }
    scratch |= {name: plgpu.Barrier(num_barriers=_HEADS) for name in _SIGNALS}
    grid = (pl.cdiv(total, _HEADS),)
    out = mg.launch(
        kernel,
        inputs,
        out_type,
        scratch,
        grid,
        interpret,
        name="mixed_heads_backward",
        warpgroups=2 * _HEADS,
    )
    return out["d_y"], out["h"], out["d_steps"]


# What one warpgroup of a head tells the other, once for each chunk: d_o is there, it has read
# queries, keys and d_state; queries, keys and d_state are there, it has read d_o and values.
_SIGNALS = ("gave_d_o", "read_keys", "gave_keys", "read_d_o", "left", "summed")


@dataclasses.dataclass(frozen=True)
class _Program:
    """What a warpgroup sees of the kernel: its own head's.

    Attributes:
      inputs, outputs, scratch, arrivals: by name, the last two of all heads of the program.
      own: which of these this one is.
      image, head: which it is of the inputs.
      is_last: whether no head comes after it.
      q_scale, epsilon, interpret: `backward`'s.
    """

    inputs: dict
    outputs: dict
    scratch: dict
    arrivals: dict
    own: jax.Array
    image: jax.Array
    head: jax.Array
    is_last: jax.Array
    q_scale: float
    epsilon: float
    interpret: bool

    def __getitem__(self, name):
        """This head's part of scratch memory, or its barriers."""
        return self.scratch[name].at[self.own]

    @property
    def chunks(self):
        return pl.cdiv(self.inputs["y"].shape[1], mg.CHUNK)

    @property
    def scale(self):
        return math.log2(self.q_scale)

    def load(self, tile):
        return mh.load(tile, self.interpret)

    def multiply(self, *sums, work=lambda: None):
        return mg.multiply(*sums, work=work, interpret=self.interpret)

    def turns(self, c):
        rows = pl.ds(c * mg.CHUNK, mg.CHUNK)
        return mh.Turns.load(self.inputs.get("table"), rows, self.interpret)

    def decays(self, c):
        group = lax.rem(lax.div(c, md.CHUNKS), _GROUPS)
        return mg.Decays.load(self["b"].at[group, lax.rem(c, md.CHUNKS)], base=2)

    def fetch(self, name, source, c, column, tile, stage=0):
        """Begins to load a chunk's rows; `arrivals[name]` tells when they are there."""
        row, stages = c * mg.CHUNK, 1 if name == "gated" else _STAGES
        stage = self.own * stages + stage
        source = self.inputs[source]
        self.arrivals[name].fetch(source, self.image, row, self.head, column, tile, stage)

    def leave(self, tile, c, column):
        """Begins to write a chunk's rows of d_y."""
        row, out = c * mg.CHUNK, self.outputs["d_y"]
        store(tile, out, self.image, row, self.head, column, self.interpret)


def _values(p: _Program):
    """Through gate and norm; gradients of gates and values."""
    plgpu.set_max_registers(_REGISTERS["values"], action="decrease")
    chunks, t = p.chunks, mg.transposed
    chunk_of = lambda i: chunks - 1 - i

    def fetch_gated(i):
        c = chunk_of(i)
        p.fetch("gated", "y", c, mh.OUT_GATE, p["out_gate"])
        for name in ("o", "d_h"):
            p.fetch("gated", name, c, 0, p[name])

    def fetch_values(i):
        slot = lax.rem(i, _STAGES)
        p.fetch("values", "y", chunk_of(i), mh.V, p["v"].at[slot], slot)

    def through_gate():
        """d_o to its tile, h and the gate's gradient to those that o and gate came in."""
        o = p.load(p["o"])
        factor = mh.root_mean_square(o, p.epsilon)
        normal = o * factor
        silu, slope = mh.silu_and_slope(p.load(p["out_gate"]))
        d_h = p.load(p["d_h"])
        p["o"][...] = mh.narrow(normal * silu)
        p["out_gate"][...] = mh.narrow(d_h * normal * slope)
        d_normal = d_h * silu
        d_o = factor * (d_normal - normal * mh.mean(normal * d_normal))
        p["d_o"][...] = mh.narrow(d_o)

    def step(i, _):
        c, slot = chunk_of(i), lax.rem(i, _STAGES)
        q_tile, k_tile, v_tile = (p[name].at[slot] for name in ("q", "k", "v"))
        p.arrivals["gated"].wait(p.own, i)
        through_gate()
        plgpu.commit_smem()
        plgpu.barrier_arrive(p["gave_d_o"])
        rows = pl.ds(c * mg.CHUNK, mg.CHUNK)
        plgpu.copy_smem_to_gmem(p["o"], p.outputs["h"].at[p.image, rows, p.head])
        p.leave(p["out_gate"], c, mh.OUT_GATE)

        plgpu.barrier_wait(p["gave_keys"])
        decays = p.decays(c)
        keys = mg.without_prefix(decays.row, mg.ROW, c, 1)
        (scores, dv), weights = p.multiply(
            [(k_tile, t(q_tile))],
            [(k_tile, t(p["d_state"]))],
            work=lambda: _weights(decays, keys, p.scale),
        )
        scores = mg.masked(scores, weights, p.scratch["mask"])

        def meanwhile():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(i + 1 < chunks)
            def _():
                fetch_gated(i + 1)
                pl.when(i > 0)(lambda: fetch_values(i + 1))

        to_end = jnp.exp2(decays.whole - keys)
        (dv,), _ = p.multiply([dv * mg.by_row(to_end), (scores, p["d_o"])], work=meanwhile)
        plgpu.barrier_arrive(p["read_keys"])
        plgpu.barrier_wait(p["read_d_o"])
        v_tile[...] = mh.narrow(dv)
        plgpu.commit_smem()
        p.leave(v_tile, c, mh.V)

    fetch_gated(jnp.int32(0))
    for i in range(min(_STAGES, chunks)):
        fetch_values(jnp.int32(i))
    lax.fori_loop(0, chunks, step, None)
    plgpu.wait_smem_to_gmem(0)
    plgpu.barrier_arrive(p["left"])


def _weights(decays, keys, scale):
    """Of pairs by (key, query): queries are not scaled, but what they meet."""
    return jnp.exp2(mg.by_column(decays.column + scale) - mg.by_row(keys))


def _keys(p: _Program):
    """Gradients of queries, keys, decays and the prefix token."""
    plgpu.set_max_registers(_REGISTERS["keys"], action="increase")
    chunks, t, inputs, place = p.chunks, mg.transposed, p.inputs, (p.image, p.head)
    chunk_of = lambda i: chunks - 1 - i

    def load_decays(c):
        group = lax.rem(lax.div(c, md.CHUNKS), _GROUPS)
        p["b"].at[group][...] = md.log_decays(inputs, *place, c, p.interpret)
        plgpu.commit_smem()

    def put_decays(c):
        """The gradients of a group whose chunks are done."""
        sums = md.load(p["change"]), md.load(p["through"])
        d_g, d_gate = md.gradients(*sums, inputs, *place, c, p.interpret)
        out = p.outputs["d_steps"].at[place]
        out[0, pl.ds(c, md.CHUNKS)] = d_g
        if d_gate is not None:
            out[1, pl.ds(c, md.CHUNKS)] = d_gate
            md.put_gates(p.outputs["d_y"], d_gate, p.image, c, p.head, p.interpret)

    def fetch(i):
        c, slot = chunk_of(i), lax.rem(i, _STAGES)
        for name, column in (("q", mh.Q), ("k", mh.K)):
            p.fetch("keys", "y", c, column, p[name].at[slot], slot)
        state_tile, arrived = p["state"].at[slot], state_barrier(slot)

        @pl.when(c > 0)
        def _():
            plgpu.copy_gmem_to_smem(inputs["states"].at[*place, c - 1], state_tile, arrived)

        @pl.when(c == 0)
        def _():
            state_tile[...] = jnp.zeros(state_tile.shape, jnp.bfloat16)
            plgpu.barrier_arrive(arrived)

    def state_barrier(slot):
        return p.scratch["states"].at[p.own * _STAGES + slot]

    def activate(tile, slope_tile, turn):
        x, slope = mh.silu_and_slope(p.load(tile))
        slope_tile[...] = mh.narrow(slope)
        x = turn(x)
        tile[...] = mh.narrow(x)
        return x

    def d_active(d_x, slope_tile, turn):
        slope_tile[...] = mh.narrow(turn(d_x, back=True) * p.load(slope_tile))

    def step(i, carry):
        d_state, d_prefix = carry
        c, slot = chunk_of(i), lax.rem(i, _STAGES)
        in_group = lax.rem(c, md.CHUNKS)
        stage, turn_of_stage = p.own * _STAGES + slot, lax.div(i, _STAGES)
        q_tile, k_tile, v_tile, state_tile = (p[x].at[slot] for x in ("q", "k", "v", "state"))
        if chunks > md.CHUNKS:
            new = (i > 0) & (in_group == md.CHUNKS - 1)
            pl.when(new)(lambda: load_decays(c - (md.CHUNKS - 1)))
        turn = p.turns(c)
        decays = p.decays(c)
        from_start = jnp.exp2(decays.row + p.scale)
        p.arrivals["keys"].wait(stage, turn_of_stage)
        # The gradients of queries and keys of the step before left from the slopes' tiles.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        q = activate(q_tile, p["q_slope"], turn)
        p["decayed"][...] = mh.narrow(q * mg.by_row(from_start, mh.KEY_DIM))
        activate(k_tile, p["k_slope"], turn)
        pl.when(i > 0)(lambda: plgpu.barrier_wait(p["read_keys"]))
        p["d_state"][...] = mh.narrow(d_state)
        plgpu.commit_smem()
        plgpu.barrier_arrive(p["gave_keys"])
        pl.when((i > 0) & (i + 1 < chunks))(lambda: fetch(i + 1))

        keys = mg.without_prefix(decays.row, mg.ROW, c, 1)
        p.arrivals["values"].wait(stage, turn_of_stage)
        plgpu.barrier_wait(p["gave_d_o"])
        (d_scores,), weights = p.multiply(
            [(v_tile, t(p["d_o"]))], work=lambda: _weights(decays, keys, p.scale)
        )
        d_scores = mg.masked(d_scores, weights, p.scratch["mask"])
        p["d_scores"][...] = d_scores
        plgpu.barrier_wait(state_barrier(slot))
        (dk, dq, dq_prefix, d_state, d_prefix), _ = p.multiply(
            [(v_tile, p["d_state"])],
            [(p["d_o"], state_tile)],
            [(p["d_o"], p["prefix"])],
            [d_state * jnp.exp2(decays.whole), (t(p["d_o"]), p["decayed"])],
            [d_prefix, (t(p["d_o"]), q_tile)],
        )
        plgpu.commit_smem()
        plgpu.barrier_arrive(p["read_d_o"])

        def last():
            # Again: the registers that would keep it are short.
            return jnp.sum(p.load(state_tile) * d_state, axis=1), p.turns(c)

        to_end = jnp.exp2(decays.whole - keys)
        (dk, dq), (through, turn) = p.multiply(
            [dk * mg.by_row(to_end, mh.KEY_DIM), (d_scores, q_tile)],
            [dq * mg.by_row(from_start, mh.KEY_DIM), (t(p["d_scores"]), k_tile)],
            work=last,
        )
        change = p.load(k_tile) * dk - p.load(q_tile) * dq
        p["change"].at[in_group][...] = jnp.sum(change, axis=1)
        p["through"].at[in_group][...] = through
        d_active(dq + dq_prefix, p["q_slope"], turn)
        d_active(dk, p["k_slope"], turn)
        plgpu.commit_smem()
        p.leave(p["q_slope"], c, mh.Q)
        p.leave(p["k_slope"], c, mh.K)
        if chunks > md.CHUNKS:
            pl.when((c > 0) & (in_group == 0))(lambda: put_decays(c))
        return d_state, d_prefix

    for i in range(min(_STAGES, chunks)):
        fetch(jnp.int32(i))
    load_decays((chunks - 1) // md.CHUNKS * md.CHUNKS)
    prefix = lambda: mh.Prefix.load(inputs["y"], inputs.get("table"), *place, p.interpret)
    p["prefix"][...] = mh.narrow(prefix().product() * p.q_scale)
    plgpu.commit_smem()
    carry = mg.zeros(mh.KEY_DIM), mg.zeros(mh.KEY_DIM)
    _, d_prefix = lax.fori_loop(0, chunks, step, carry)
    put_decays(0)
    # The prefix token's key and value: over what the first chunk wrote there.
    plgpu.barrier_wait(p["read_keys"])
    plgpu.barrier_wait(p["left"])
    plgpu.wait_smem_to_gmem(0)
    # Sums over rows go through memory that all warpgroups share.
    summed = p.scratch["summed"].at[0]
    pl.when(p.own > 0)(lambda: plgpu.barrier_wait(summed))
    d_key, d_value = prefix().gradients(d_prefix * p.q_scale, p["change"].at[0])
    pl.when((p.own == 0) & ~p.is_last)(lambda: plgpu.barrier_arrive(summed))
    for x, column in ((d_key, mh.K), (d_value, mh.V)):
        out = p.outputs["d_y"].at[p.image, 0, p.head, pl.ds(column, x.shape[0])]
        mh.put(out, mh.narrow(x))
