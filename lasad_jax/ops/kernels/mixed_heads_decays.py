"""The decays of the mixed heads' kernels: four chunks at a time, one by each warp.

A group is (4, 64), chunks and tokens. A thread holds two tokens next to each other, so that a
warp adds up its chunk by shuffles.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, vector

from lasad_jax.ops.kernels import mosaic_tiles as mg
from lasad_jax.ops.kernels.mixed_heads_tiles import Columns, wide
from lasad_jax.ops.passes.mixed_heads import GATE_COLUMNS

CHUNKS = 4
SHAPE = (CHUNKS, mg.CHUNK)
LAYOUT = plgpu.Layout.WG_STRIDED(SHAPE, vec_size=2)
_REF, _NUMBER = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())
# In bf16 what is left after a factor of exp(-32) counts for nothing; a bound keeps sums exact.
_RESET = -32.0


def scratch():
    """Scratch memory for a group."""
    return plgpu.SMEM(SHAPE, jnp.float32)


def load(ref):
    return plgpu.load(ref, layout=LAYOUT, optimized=False)


def log_decays(inputs, image, head, chunk, interpret):
    """Logarithms to base 2 of the decays since each chunk's start, of the group from `chunk` on."""
    g = load(inputs["steps"].at[head, pl.ds(chunk, CHUNKS)])
    if "bias" in inputs:
        # The prefix token's step crosses nothing: with or without, it counts for nothing.
        g = g - _content(inputs, image, head, chunk, interpret)[1]
    return _running_sums(jnp.maximum(g, _RESET), interpret) * math.log2(math.e)


def gradients(change, through, inputs, image, head, chunk, interpret):
    """With respect to the group's log-decays and to the content gate's column (None without).

    The step into token u is crossed by pairs from before the chunk to after it, or into it, less
    those that end before u, and by pairs that start in the chunk before u.
    """
    d_g = _sums(through, interpret) + (_running_sums(change, interpret) - change)
    # Nobody wrote the sums of chunks past N.
    d_g = jnp.where(_token(chunk) < inputs["y"].shape[1], d_g, 0.0)
    if "bias" not in inputs:
        return d_g, None
    x, softplus = _content(inputs, image, head, chunk, interpret)
    return d_g, -d_g * jnp.exp(x - softplus)


def _content(inputs, image, head, chunk, interpret):
    """The content gate with its bias, and softplus of it."""
    columns = Columns.of(inputs["y"], inputs["steps"].shape[0], head)
    x = _gates(inputs["y"], image, chunk, columns, interpret) + inputs["bias"][head]
    return x, jnp.maximum(x, 0.0) + jnp.log(1.0 + jnp.exp(jnp.minimum(x, -x)))


def put_gates(d_y, x, image, chunk, columns, interpret):
    """Writes the content gate's column of d_y and zeros into the padding after it."""
    num_tokens, row = d_y.shape[1], chunk * mg.CHUNK
    if interpret:
        place = lax.broadcasted_iota(jnp.int32, (GATE_COLUMNS,), 0)
        x = x.reshape(-1)

        def one(j, _):
            gates = jnp.where(place == 0, x[j], 0.0).astype(d_y.dtype)
            d_y[image, row + j, columns.group, pl.ds(columns.gate, GATE_COLUMNS)] = gates

        lax.fori_loop(0, jnp.minimum(x.size, num_tokens - row), one, None)
        return

    @plgpu.inline_mgpu(arg_types=(_REF, LAYOUT, *[_NUMBER] * 4))
    def write(_, d_y, x, image, row, group, column):
        bf16 = ir.BF16Type.get()
        zeros = [mgpu.c(0.0, bf16)] * (GATE_COLUMNS - 1)
        gates = ir.VectorType.get((GATE_COLUMNS,), bf16)
        image, group, column = (_index(_value(i)) for i in (image, group, column))
        for number, token in _tokens(x, row):
            inside = arith.cmpi(arith.CmpIPredicate.slt, token, mgpu.c(num_tokens, token.type))
            with mgpu.when(inside):
                value = vector.from_elements(gates, [arith.truncf(bf16, number), *zeros])
                vector.store(value, d_y, [image, _index(token), group, column])

    write(d_y, x, *map(jnp.int32, (image, row, columns.group, columns.gate)))


def _token(chunk):
    iota = lambda dimension: plgpu.broadcasted_iota(jnp.int32, SHAPE, dimension, layout=LAYOUT)
    return (chunk + iota(0)) * mg.CHUNK + iota(1)


def _gates(y, image, chunk, columns, interpret):
    """The content gate's column; past N its last number."""
    row, last = chunk * mg.CHUNK, y.shape[1] - 1
    if interpret:
        rows = jnp.minimum(row + jnp.arange(CHUNKS * mg.CHUNK), last)
        return wide(y[image, :, columns.group, columns.gate][rows]).reshape(SHAPE)

    @plgpu.inline_mgpu(
        arg_types=(_REF, *[_NUMBER] * 4),
        return_type=plgpu.ShapeDtypeStruct(SHAPE, jnp.float32, layout=LAYOUT),
    )
    def column(_, y, image, row, group, column):
        zero = mgpu.c(0.0, ir.F32Type.get())
        chunks = mgpu.FragmentedArray.splat(zero, SHAPE, mgpu.WGStridedFragLayout(SHAPE, 2))
        image, group, column = (_index(_value(i)) for i in (image, group, column))
        numbers = []
        for _, token in _tokens(chunks, row):
            token = arith.minsi(token, mgpu.c(last, token.type))
            number = memref.load(y, [image, _index(token), group, column])
            numbers.append(arith.extf(ir.F32Type.get(), number))
        return _group(numbers)

    return column(y, *map(jnp.int32, (image, row, columns.group, columns.gate)))


def _running_sums(x, interpret):
    """Inclusive, within each chunk."""
    if interpret:
        return jnp.cumsum(x, axis=1)

    @_of_pairs
    def add_up(first, second):
        total = arith.addf(first, second)
        for distance in (1, 2, 4, 8, 16):
            total = arith.addf(total, _from_before(total, distance))
        return arith.addf(_from_before(total, 1), first), total

    return add_up(x)


def _sums(x, interpret):
    """Of each chunk, in all its places."""
    if interpret:
        return jnp.broadcast_to(jnp.sum(x, axis=1, keepdims=True), SHAPE)

    @_of_pairs
    def add_up(first, second):
        total = arith.addf(first, second)
        for distance in (1, 2, 4, 8, 16):
            total = arith.addf(total, mgpu.utils.shfl_bfly(total, distance))
        return total, total

    return add_up(x)


def _of_pairs(function):
    """From a function of a thread's two numbers to one of groups."""

    @plgpu.inline_mgpu(
        arg_types=(LAYOUT,),
        return_type=plgpu.ShapeDtypeStruct(SHAPE, jnp.float32, layout=LAYOUT),
    )
    def of_group(_, x):
        (pair,) = x.registers
        return _group(function(*(vector.extract(pair, [], [i]) for i in range(2))))

    return of_group


def _group(numbers):
    registers = np.empty((1,), object)
    pair = ir.VectorType.get((2,), ir.F32Type.get())
    registers[0] = vector.from_elements(pair, list(numbers))
    layout = mgpu.WGStridedFragLayout(SHAPE, 2)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _from_before(x, distance):
    """Of the thread so far before in its warp; 0 if there is none."""
    i32 = ir.IntegerType.get_signless(32)
    c = lambda value: mgpu.c(value, i32)
    nvvm = mgpu.utils.nvvm
    bits = arith.bitcast(i32, x)
    bits = nvvm.shfl_sync(c(0xFFFFFFFF), bits, c(distance), c(0), nvvm.ShflKind.up)
    lane = arith.remui(mgpu.utils.thread_idx(), c(32))
    there = arith.cmpi(arith.CmpIPredicate.uge, lane, c(distance))
    return arith.select(there, arith.bitcast(x.type, bits), mgpu.c(0.0, x.type))


def _tokens(x, row):
    """A thread's numbers of a group and their tokens."""
    (pair,) = x.registers
    (place,) = x.layout.linear_thread_idxs()
    first = arith.addi(_value(row), arith.index_cast(_value(row).type, place))
    for i in range(2):
        yield vector.extract(pair, [], [i]), arith.addi(first, mgpu.c(i, first.type))


def _value(number):
    return number.registers.item()


def _index(number):
    return arith.index_cast(ir.IndexType.get(), number)
