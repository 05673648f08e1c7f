"""Decoding as Pallas-Triton kernels, for NVIDIA GPUs: all of a mixer between its two projections.

Each function is one launch, and writes only what a token changes: caches are updated in
place. What depends on the token comes in as its number, so that one program serves all.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from lasad_jax.ops.kernels.triton_program import product
from lasad_jax.ops.ring import NUM_RECENT, Ring

# Keys of a memory that are folded at once: what tensor cores take.
_FOLDED = 16


def mix(
    ring: Ring,
    projection: Float[Array, "B columns"],
    index: Int[Array, ""],
    *,
    log_factor: Float[Array, "places H"],
    turns: Float[Array, "tokens 2 Dk"] | None,
    gate_bias: Float[Array, " H"] | None,
    epsilon: float,
    num_warps: int = 2,
    interpret: bool = False,
) -> tuple[Float[Array, "B H Dv"], Ring]:
    """From a token's projections to the gated output of every head, one program each.

    Args:
      ring: updated in place.
      projection: [q | k | v | out_gate] of one head after the other, then the decay gates.
      index: number of tokens before this one, the one prefix token included.
      log_factor: log-factor of the step to each place, without the content gate.
      turns: for each token, what RoPE multiplies a head and its swapped pairs by.
      gate_bias: bias of the decay gates; None for no gate.
      epsilon: of the RMSNorm of each head, whose scale is left to the next product.
      num_warps: of a program.

    Raises:
      ValueError: if Dk or Dv is not a power of two of at least 16.
    """
    batch, num_heads, key_dim, value_dim = ring.memory.shape
    for name, size in (("key dim", key_dim), ("value dim", value_dim)):
        if size < 16 or size & (size - 1):
            raise ValueError(f"{name}: expected a power of two of at least 16, got {size}")
    per_head = lambda x: pl.BlockSpec((None, None, *x.shape[2:]), _at_head(x.ndim - 2))
    whole = lambda x: pl.BlockSpec(x.shape, lambda b, h: (0,) * x.ndim)
    out = jax.ShapeDtypeStruct((batch, num_heads, value_dim), projection.dtype)
    tables = (log_factor, turns, gate_bias)
    dot = product(ring.recent_k.dtype, interpret)

    def body(index_ref, ring_ref, projection_ref, table_refs, out_ref, new_ref):
        log_factor_ref, turns_ref, bias_ref = table_refs
        h = pl.program_id(1)
        dtype = out_ref.dtype
        row = jnp.arange(ring_ref.recent_k.shape[0])
        value, column = jnp.arange(value_dim), jnp.arange(key_dim)
        first = h * 2 * (key_dim + value_dim)
        rounded = lambda x: x.astype(dtype).astype(jnp.float32)

        # Loads first, the largest before all others: they are on their way together.
        memory = ring_ref.memory[:, :]
        index = index_ref[0]
        read = lambda *parts: [projection_ref[first + part] for part in parts]
        q, k, v, gate = read(
            column, key_dim + column, 2 * key_dim + value, 2 * key_dim + value_dim + value
        )
        partners = read(column ^ 1, key_dim + (column ^ 1)) if turns_ref is not None else None
        log_weight, of_memory = ring_ref.log_weight[:], ring_ref.log_weight[0]
        if bias_ref is not None:
            content = projection_ref[2 * num_heads * (key_dim + value_dim) + h]
            bias = bias_ref[h]
        place = index - 1
        slot = 1 + place % NUM_RECENT
        # Rows from `slot` on hold nothing yet.
        held = (row < slot)[:, None]
        rows = [
            plgpu.load(ref.at[:, :], mask=jnp.broadcast_to(held, ref.shape), other=0.0)
            for ref in (ring_ref.recent_k, ring_ref.recent_v)
        ]
        g = log_factor_ref[place, h]
        turns = [turns_ref[index, i] for i in range(2)] if turns_ref is not None else None

        if bias_ref is not None:
            g -= _softplus(content.astype(jnp.float32) + bias)
        activated = lambda x: rounded(_silu(x.astype(jnp.float32)))
        q, k, gate, v = activated(q), activated(k), activated(gate), v.astype(jnp.float32)
        if turns_ref is not None:
            q, k = (
                rounded(x * turns[0] + activated(partner) * turns[1])
                for x, partner in zip((q, k), partners, strict=True)
            )
        q = rounded(q * key_dim**-0.5)
        new = (row == slot)[:, None]
        recent_k, recent_v = (
            jnp.where(new, x[None, :], before.astype(jnp.float32))
            for x, before in zip((k, v), rows, strict=True)
        )
        log_weight = jnp.where(row == slot, 0.0, log_weight + g)
        of_memory = jnp.exp(of_memory + g)
        weight = jnp.where(row == 0, 0.0, jnp.exp(log_weight))

        scores = jnp.sum(q[None, :] * recent_k, axis=1) * jnp.where(row == 0, 1.0, weight)
        # One sum over threads: of the memory's share as it lies, then of the rows'.
        x = of_memory * jnp.sum(q[:, None] * memory.astype(jnp.float32), axis=0)
        x += jnp.sum(scores[:, None] * recent_v, axis=0)
        x = rounded(x)
        x *= lax.rsqrt(jnp.sum(x * x, axis=0) / value_dim + epsilon)
        out_ref[:] = (rounded(x) * gate).astype(dtype)

        if not interpret:
            # No thread may write what another is still to read.
            plgpu.debug_barrier()
        new_ref.recent_k[slot] = k.astype(dtype)
        new_ref.recent_v[slot] = v.astype(dtype)
        full = slot == NUM_RECENT
        empty = jnp.where(row == 0, 0.0, -jnp.inf)
        new_ref.log_weight[:] = jnp.where(full, empty, log_weight)

        @pl.when(full)
        def _():
            # Read again and part by part: what is kept for this one token in fifteen would
            # take registers, and so programs at work, from all others.
            if not interpret:
                plgpu.debug_barrier()
            weighted = (weight[:, None] * recent_v).astype(dtype)
            for part in range(0, key_dim, _FOLDED):
                keys = pl.ds(part, _FOLDED)
                folded = of_memory * new_ref.memory[keys, :].astype(jnp.float32)
                folded += dot(new_ref.recent_k[:, keys], weighted, 0, 0)
                new_ref.memory[keys, :] = folded.astype(new_ref.memory.dtype)

    ring_specs = jax.tree.map(per_head, ring)
    num_parts = len(jax.tree.leaves(ring))
    return pl.pallas_call(
        body,
        grid=(batch, num_heads),
        in_specs=(
            pl.BlockSpec((1,), lambda b, h: (0,)),
            ring_specs,
            pl.BlockSpec((None, projection.shape[1]), lambda b, h: (b, 0)),
            jax.tree.map(whole, tables),
        ),
        out_specs=(pl.BlockSpec((None, None, value_dim), lambda b, h: (b, h, 0)), ring_specs),
        out_shape=(out, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), ring)),
        input_output_aliases={1 + i: 1 + i for i in range(num_parts)},
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name="decode_mix",
    )(index[None], ring, projection, tables)


def norm_conv(
    x: Float[Array, "B D"],
    recent: Float[Array, "B W D"],
    index: Int[Array, ""],
    *,
    taps: Float[Array, "taps D"],
    offsets: tuple[tuple[int, int], ...],
    columns: int,
    epsilon: float,
    num_warps: int = 4,
    interpret: bool = False,
) -> tuple[Float[Array, "B D"], Float[Array, "B W D"]]:
    """RMSNorm, then the local convolution of one token; a program for each image.

    Args:
      x: a token after `index` others, the one prefix token included.
      recent: ring of the newest inputs of the convolution, slot i % W for token i; updated
        in place.
      taps: a weight per channel for each of `offsets`, (rows down, columns right) of the
        neighbour, of which the first is the token itself.
      columns: C.
      epsilon: of the norm, whose scale is left to the next product.
      num_warps: of a program.
    """
    batch, width = x.shape
    window = recent.shape[1]
    padded = pl.next_power_of_2(width)

    def body(index_ref, recent_ref, x_ref, taps_ref, y_ref, new_ref):
        channel = jnp.arange(padded)
        exists = channel < width
        load = lambda ref: plgpu.load(ref, mask=exists, other=0.0).astype(jnp.float32)
        index = index_ref[0]
        row, column = (index - 1) // columns, (index - 1) % columns
        x = load(x_ref.at[:])
        # All that is read is on its way before the norm's sum, which every thread awaits.
        weights = [load(taps_ref.at[tap * width + channel]) for tap in range(len(offsets))]
        neighbours = []
        for down, right in offsets[1:]:
            inside = (row + down >= 0) & (column + right >= 0) & (column + right < columns)
            slot = (index + window + down * columns + right) % window
            neighbours.append(jnp.where(inside, load(recent_ref.at[slot]), 0.0))
        x *= lax.rsqrt(jnp.sum(x * x, axis=0) / width + epsilon)
        x = x.astype(recent_ref.dtype)
        y = x.astype(jnp.float32)
        y += y * weights[0]
        for neighbour, weight in zip(neighbours, weights[1:], strict=True):
            y += neighbour * weight
        plgpu.store(y_ref.at[:], y.astype(y_ref.dtype), mask=exists)
        if not interpret:
            # The oldest neighbour lies where the newest will.
            plgpu.debug_barrier()
        plgpu.store(new_ref.at[index % window], x, mask=exists)

    one = pl.BlockSpec((None, padded), lambda b: (b, 0))
    ring = pl.BlockSpec((None, window, padded), lambda b: (b, 0, 0))
    return pl.pallas_call(
        body,
        grid=(batch,),
        in_specs=(
            pl.BlockSpec((1,), lambda b: (0,)),
            ring,
            one,
            pl.BlockSpec((taps.size,), lambda b: (0,)),
        ),
        out_specs=(one, ring),
        out_shape=(
            jax.ShapeDtypeStruct(x.shape, recent.dtype),
            jax.ShapeDtypeStruct(recent.shape, recent.dtype),
        ),
        input_output_aliases={1: 1},
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name="decode_norm_conv",
    )(index[None], recent, x, taps.reshape(-1))


def _at_head(num_more: int):
    return lambda b, h: (b, h, *(0 for _ in range(num_more)))


def _silu(x: Array) -> Array:
    return x / (1 + jnp.exp(-x))


def _softplus(x: Array) -> Array:
    return jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))
