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

from lasad_jax.ops.kernels.triton_math import Instructions
from lasad_jax.ops.kernels.triton_program import product
from lasad_jax.ops.ring import NUM_RECENT, Ring

# Keys of a memory that are folded at once: what tensor cores take.
_FOLDED = 16
# Columns of a vector that tensor cores are to multiply with.
_COPIES = 8


def mix(
    ring: Ring,
    projection: Float[Array, "B columns"],
    index: Int[Array, ""],
    *,
    log_factor: Float[Array, "places H"],
    turns: Float[Array, "tokens 2 Dk"] | None,
    gate_bias: Float[Array, " H"] | None,
    epsilon: float,
    num_warps: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B H Dv"], Ring]:
    """From a token's projections to the gated output of every head, one program each.

    Args:
      ring: updated in place.
      projection: [q | k | v | out_gate] of one head after the other, then the decay gates. Rows
        beyond the ring's are not read, and as many of the result not written.
      index: number of tokens before this one, the one prefix token included.
      log_factor: log-factor of the step to each place, without the content gate.
      turns: for each token, what RoPE multiplies a head and its swapped pairs by.
      gate_bias: bias of the decay gates; None for no gate.
      epsilon: of the RMSNorm of each head, whose scale is left to the next product.
      num_warps: of a program; None for one to each 8 KiB of a memory, so that in bfloat16 no
        sum leaves its warp.

    Raises:
      ValueError: if Dk or Dv is not a power of two of at least 16.
    """
    batch, num_heads, key_dim, value_dim = ring.memory.shape
    for name, size in (("key dim", key_dim), ("value dim", value_dim)):
        if size < 16 or size & (size - 1):
            raise ValueError(f"{name}: expected a power of two of at least 16, got {size}")
    if num_warps is None:
        num_warps = max(1, key_dim * value_dim * ring.memory.dtype.itemsize // 8192)
    per_head = lambda x: pl.BlockSpec((None, None, *x.shape[2:]), _at_head(x.ndim - 2))
    whole = lambda x: pl.BlockSpec(x.shape, lambda b, h: (0,) * x.ndim)
    out = jax.ShapeDtypeStruct((len(projection), num_heads, value_dim), projection.dtype)
    tables = (log_factor, turns, gate_bias)
    dot = product(ring.recent_k.dtype, interpret)
    functions = Instructions(interpret)
    exp, rsqrt, silu, softplus = functions.exp, functions.rsqrt, functions.silu, functions.softplus

    def body(index_ref, ring_ref, projection_ref, table_refs, out_ref, new_ref):
        log_factor_ref, turns_ref, bias_ref = table_refs
        h = pl.program_id(1)
        dtype = out_ref.dtype
        row = jnp.arange(ring_ref.recent_k.shape[0])
        value = jnp.arange(value_dim)
        # Keys lie in pairs, both in one thread: RoPE then needs no other thread's.
        pair = 2 * jnp.arange(key_dim // 2)[:, None] + jnp.arange(2)[None, :]
        first = h * 2 * (key_dim + value_dim)
        rounded = lambda x: x.astype(dtype).astype(jnp.float32)

        # Loads first, the largest before all others: they are on their way together.
        memory = ring_ref.memory[:, :]
        index = index_ref[0]
        place = index - 1
        slot = 1 + lax.rem(place, NUM_RECENT)
        # Rows from `slot` on hold nothing yet.
        held = (row < slot)[:, None]
        recent_k = ring_ref.recent_k.at[:, :]
        recent_k = plgpu.load(recent_k, mask=jnp.broadcast_to(held, recent_k.shape), other=0.0)
        recent_v = ring_ref.recent_v.at[row[None, :], value[:, None]]
        recent_v = plgpu.load(recent_v, mask=jnp.broadcast_to(held.T, recent_v.shape), other=0.0)
        read = lambda part: projection_ref[first + part]
        q, k, v = read(pair), read(key_dim + pair), read(2 * key_dim + value)
        gate = read(2 * key_dim + value_dim + value)
        log_weight, log_memory = ring_ref.log_weight[:], ring_ref.log_weight[0]
        g = log_factor_ref[place, h]
        turns = [turns_ref[index, i, pair] for i in range(2)] if turns_ref is not None else None
        if bias_ref is not None:
            content = projection_ref[2 * num_heads * (key_dim + value_dim) + h]
            g -= softplus(content.astype(jnp.float32) + bias_ref[h])

        q, k, gate = (rounded(silu(x.astype(jnp.float32))) for x in (q, k, gate))
        if turns is not None:
            q, k = (rounded(x * turns[0] + _swapped(x) * turns[1]) for x in (q, k))
        q, k = (x.reshape(key_dim) for x in (rounded(q * key_dim**-0.5), k))
        # No thread reads this row.
        new_ref.recent_k[slot] = k.astype(dtype)
        new_ref.recent_v[slot] = v
        log_weight += g
        of_memory = exp(log_memory + g)

        weight = jnp.where(row == 0, 1.0, exp(log_weight))
        if dtype == jnp.float32:
            scores = jnp.sum(recent_k * q[None, :], axis=1) * weight
            x = jnp.sum(recent_v * scores[None, :], axis=1)
        else:
            # Tensor cores take q as equal columns, to be added in the end. Scores go on as their
            # rounded values in one half of them and what rounding lost in the other.
            columns = jnp.broadcast_to(q.astype(dtype)[:, None], (key_dim, _COPIES))
            scores = dot(recent_k, columns, 1, 0) * (weight * (2 / _COPIES))[:, None]
            high = rounded(scores)
            odd = (jnp.arange(_COPIES) % 2 == 1)[None, :]
            scores = jnp.where(odd, scores - high, high).astype(dtype)
            x = jnp.sum(dot(recent_v, scores, 1, 0), axis=1)
        # Last and without tensor cores, to which it would have to go through shared memory as
        # soon as it is loaded: until here it is on its way.
        x += jnp.sum(memory.astype(jnp.float32) * (of_memory * q)[:, None], axis=0)
        # What is read here says how x lies from now on: spread over all threads. In its sum
        # above, several had the same.
        v = read(2 * key_dim + value).astype(jnp.float32)
        x = rounded(x + jnp.sum(q * k, axis=0) * v)
        x *= rsqrt(jnp.sum(x * x, axis=0) / value_dim + epsilon)
        out_ref[:] = (rounded(x) * gate).astype(dtype)

        if not interpret:
            # No thread may write what another is still to read.
            plgpu.debug_barrier()
        log_weight = jnp.where(row == slot, 0.0, log_weight)
        full = slot == NUM_RECENT
        empty = jnp.where(row == 0, 0.0, -jnp.inf)
        new_ref.log_weight[:] = jnp.where(full, empty, log_weight)

        @pl.when(full)
        def _():
            # Read again and part by part: what is kept for this one token in fifteen would
            # take registers, and so programs at work, from all others.
            if not interpret:
                plgpu.debug_barrier()
            weight = jnp.where(row == 0, 0.0, exp(log_weight))[:, None]
            weighted = (weight * new_ref.recent_v[:, :].astype(jnp.float32)).astype(dtype)
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
    )(_one_index(index), ring, projection, tables)


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

        def load(ref, mask=exists):
            return plgpu.load(ref, mask=mask, other=0.0).astype(jnp.float32)

        index = index_ref[0]
        row, column = (index - 1) // columns, (index - 1) % columns
        x = load(x_ref.at[:])
        # All that is read is on its way before the norm's sum, which every thread awaits.
        own, *weights = [load(taps_ref.at[tap * width + channel]) for tap in range(len(offsets))]
        own += 1
        neighbours = []
        for down, right in offsets[1:]:
            inside = (row + down >= 0) & (column + right >= 0) & (column + right < columns)
            slot = jnp.where(inside, lax.rem(index + down * columns + right, window), 0)
            neighbours.append(load(recent_ref.at[slot], exists & inside))
        x *= lax.rsqrt(jnp.sum(x * x, axis=0) / width + epsilon)
        x = x.astype(recent_ref.dtype)
        y = x.astype(jnp.float32) * own
        for neighbour, weight in zip(neighbours, weights, strict=True):
            y += neighbour * weight
        plgpu.store(y_ref.at[:], y.astype(y_ref.dtype), mask=exists)
        if not interpret:
            # The oldest neighbour lies where the newest will.
            plgpu.debug_barrier()
        plgpu.store(new_ref.at[lax.rem(index, window)], x, mask=exists)

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
    )(_one_index(index), recent, x, taps.reshape(-1))


def _one_index(index: Int[Array, ""]) -> Int[Array, "1"]:
    """As an array; a loop's own counter is of a weak type, which kernels cannot divide."""
    return index.astype(jnp.int32)[None]


def _at_head(num_more: int):
    return lambda b, h: (b, h, *(0 for _ in range(num_more)))


def _swapped(x: Float[Array, "pairs 2"]) -> Float[Array, "pairs 2"]:
    """Each pair's two the other way round. Sums that add -0 are no instructions."""
    side = jnp.arange(2)[None, :]
    first, second = (jnp.sum(jnp.where(side == i, x, -0.0), axis=1)[:, None] for i in range(2))
    return jnp.where(side == 0, second, first)
