"""The exact 2D decay on GPUs: (N, N) weights that never leave the chip (Pallas, Triton).

As in flash attention, but without a softmax: a program owns a tile of tokens and goes
through the keys before it for o and dq, through the queries after it for dk and dv.
`manhattan_tiles` says how the weights are made.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from lasad_jax.ops.kernels import triton_program
from lasad_jax.ops.kernels.manhattan_tiles import Cut, Tiling, causal

# (forward, backward) by bytes of a number and whether heads are wider than 64. Longer tiles
# than these spill registers in the backward kernel, and in the forward one in float32.
_TILINGS = {
    (2, False): (Tiling(64, 64, num_warps=4, num_stages=3), Tiling(64, 32, 4, 3)),
    (2, True): (Tiling(64, 32, num_warps=4, num_stages=2), Tiling(64, 32, 8, 2)),
    (4, False): (Tiling(64, 32, num_warps=4, num_stages=2), Tiling(32, 16, 4, 1)),
    (4, True): (Tiling(32, 16, num_warps=4, num_stages=1), Tiling(32, 16, 8, 1)),
}


def forward(
    q: Float[Array, "B N H Dk"],
    k: Float[Array, "B N H Dk"],
    v: Float[Array, "B N H Dv"],
    row_rate: Float[Array, " H"],
    column_rate: Float[Array, " H"],
    *,
    columns: int,
    num_prefix: int,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> Float[Array, "B N H Dv"]:
    """Outputs of all tokens.

    Args:
      q, k, v: all bf16 or all float32; Dk and Dv powers of two, at least 16.
      row_rate, column_rate: positive, float32.
      columns: C.
      num_prefix: P.
      tiling: instead of the one chosen by dtype and widths.
      interpret: run on any platform, slowly.

    Returns:
      o in v's dtype.
    """
    if q.shape[1] <= num_prefix:
        return _prefix_outputs(q, k, v).astype(v.dtype)
    tiling = tiling or _tilings(q, v)[0]
    cut = Cut.of(q.shape[1] - num_prefix, num_prefix, columns, tiling)
    out = pl.pallas_call(
        functools.partial(_forward_kernel, cut=cut, product=_product(q, interpret)),
        grid=(cut.num_tiles, q.shape[2], q.shape[0]),
        in_specs=[_whole(q), _whole(k), _whole(v), _RATE, _RATE],
        out_specs=_whole(v),
        out_shape=jax.ShapeDtypeStruct(v.shape, v.dtype),
        compiler_params=_compiler_params(tiling),
        interpret=interpret,
        name="manhattan_forward",
    )(q, k, v, row_rate, column_rate)
    return _set_first(out, _prefix_outputs(*(x[:, :num_prefix] for x in (q, k, v))))


def backward(
    q: Float[Array, "B N H Dk"],
    k: Float[Array, "B N H Dk"],
    v: Float[Array, "B N H Dv"],
    row_rate: Float[Array, " H"],
    column_rate: Float[Array, " H"],
    d_o: Float[Array, "B N H Dv"],
    *,
    columns: int,
    num_prefix: int,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> tuple[
    Float[Array, "B N H Dk"],
    Float[Array, "B N H Dk"],
    Float[Array, "B N H Dv"],
    Float[Array, "B H"],
    Float[Array, "B H"],
]:
    """All gradients; arguments as in `forward`.

    Returns:
      dq, dk, dv in the inputs' dtypes, and in float32 the gradients of both rates, example
      by example.
    """
    own = _prefix_gradients(q, k, v, d_o, num_prefix)
    if q.shape[1] <= num_prefix:
        nothing = jnp.zeros((q.shape[0], q.shape[2]), jnp.float32)
        return *(x.astype(q.dtype) for x in own), nothing, nothing
    tiling = tiling or _tilings(q, v)[1]
    cut = Cut.of(q.shape[1] - num_prefix, num_prefix, columns, tiling)
    # Each program writes its own part of a sum: no atomics, the same bits every time.
    parts = [(), ()]
    if num_prefix:
        parts += [(num_prefix, q.shape[-1]), (num_prefix, v.shape[-1])]
    sums = (q.shape[0], q.shape[2], cut.num_tiles)
    dq, dk, dv, *sums = pl.pallas_call(
        functools.partial(_backward_kernel, cut=cut, product=_product(q, interpret)),
        grid=(cut.num_tiles, q.shape[2], q.shape[0]),
        in_specs=[_whole(q), _whole(k), _whole(v), _RATE, _RATE, _whole(d_o)],
        out_specs=[_whole(q), _whole(k), _whole(v), *map(_part, parts)],
        out_shape=[
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)),
            *(jax.ShapeDtypeStruct((*sums, *part), jnp.float32) for part in parts),
        ],
        compiler_params=_compiler_params(tiling),
        interpret=interpret,
        name="manhattan_backward",
    )(q, k, v, row_rate, column_rate, d_o)
    d_row_rate, d_column_rate, *d_prefix = (jnp.sum(x, axis=2) for x in sums)
    if num_prefix:
        later = (0, *(jnp.swapaxes(x, 1, 2) for x in d_prefix))
        dq, dk, dv = map(_set_first, (dq, dk, dv), map(jnp.add, own, later))
    return dq, dk, dv, d_row_rate, d_column_rate


def _prefix_outputs(q, k, v):
    """Outputs of tokens that never decay, float32. Written for fusion: P is 1 or little more."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    scores = jnp.sum(q[:, :, None] * k[:, None, :], axis=-1)
    causal = jnp.tril(jnp.ones(scores.shape[1:3], bool))[:, :, None]
    return jnp.sum(jnp.where(causal, scores, 0.0)[..., None] * v[:, None, :], axis=2)


def _prefix_gradients(q, k, v, d_o, num_prefix):
    """What the outputs of the prefix tokens contribute to their own gradients, float32."""
    *tokens, d_first = (x[:, :num_prefix].astype(jnp.float32) for x in (q, k, v, d_o))
    return jax.vjp(_prefix_outputs, *tokens)[1](d_first)


def _set_first(tokens, first):
    if not first.shape[1]:
        return tokens
    return lax.dynamic_update_slice_in_dim(tokens, first.astype(tokens.dtype), 0, axis=1)


def _forward_kernel(q_ref, k_ref, v_ref, row_rate_ref, column_rate_ref, o_ref, *, cut, product):
    # The last tile has most to do, so it starts first.
    start = (cut.num_tiles - 1 - pl.program_id(0)) * cut.outer
    weight = _weight(row_rate_ref, column_rate_ref)
    q = cut.load(q_ref, start, cut.outer)
    out = jnp.zeros((cut.outer, v_ref.shape[-1]), jnp.float32)
    for p in range(cut.num_prefix):
        score = _read(q, k_ref, p)
        out += score[:, None] * v_ref[p, :].astype(jnp.float32)[None, :]

    def add(keys, weights, out):
        k, v = (cut.load(ref, keys, cut.inner) for ref in (k_ref, v_ref))
        scores = product(q, k, transposed=True) * weights
        return out + product(scores.astype(v.dtype), v)

    cut.store(o_ref, start, _over_keys(start, weight, cut, add, out))


def _backward_kernel(
    q_ref, k_ref, v_ref, row_rate_ref, column_rate_ref, d_o_ref,
    dq_ref, dk_ref, dv_ref, d_row_rate_ref, d_column_rate_ref, *d_prefix_refs,
    cut, product,
):  # fmt: skip
    # Both halves in one program, so that all programs have about the same to do.
    start = pl.program_id(0) * cut.outer
    weight = _weight(row_rate_ref, column_rate_ref)
    tokens = (q_ref, k_ref, v_ref, d_o_ref)
    dk, dv, rows, columns = _from_queries(*tokens, start, weight, cut, product)
    cut.store(dk_ref, start, dk)
    cut.store(dv_ref, start, dv)
    d_row_rate_ref[...] = -jnp.sum(rows)
    d_column_rate_ref[...] = -jnp.sum(columns)
    dq = _from_keys(*tokens, start, weight, cut, product, d_prefix_refs)
    cut.store(dq_ref, start, dq)


def _from_queries(q_ref, k_ref, v_ref, d_o_ref, start, weight, cut, product):
    """dk, dv of a tile of keys, and for each key the sums of D q.k dD times both distances.

    Scores have keys along their first axis: they come from the matrix unit as they are
    needed there again, and are never transposed.
    """
    k, v = (cut.load(ref, start, cut.outer) for ref in (k_ref, v_ref))

    def add(queries, weights, dk, dv):
        q, d_o = (cut.load(ref, queries, cut.inner) for ref in (q_ref, d_o_ref))
        scores = product(k, q, transposed=True) * weights
        d_scores = product(v, d_o, transposed=True)
        dv += product(scores.astype(d_o.dtype), d_o)
        dk += product((d_scores * weights).astype(q.dtype), q)
        return dk, dv, scores * d_scores

    def own(queries, carry):
        dk, dv, rows, columns = carry
        distances = cut.own_distances(start, queries)
        mask = causal(queries, cut.inner, start, cut.outer, keys_first=True)
        dk, dv, pairs = add(queries, weight(*distances, mask=mask), dk, dv)
        along_rows, along_columns = (jnp.sum(pairs * x, axis=1) for x in distances)
        return dk, dv, rows + along_rows, columns + along_columns

    def far(first, last, each, carry):
        table = weight(*cut.far_distances(start, first, keys="outer"))

        def step(queries, carry):
            dk, dv, rows, total = carry
            gap = cut.gap(start, cut.outer, queries)
            dk, dv, pairs = add(queries, table * weight(gap), dk, dv)
            return dk, dv, rows + gap * jnp.sum(pairs, axis=1), total + pairs

        dk, dv, rows, columns = carry
        total = jnp.zeros((cut.outer, cut.inner), jnp.float32)
        dk, dv, rows, total = each(step, (dk, dv, rows, total))
        # The same distances as the table's, but made anew from another tile of this phase:
        # the compiler would keep them in registers that the loop needs.
        distances = cut.far_distances(start, last, keys="outer")
        along_rows, along_columns = (jnp.sum(total * x, axis=1) for x in distances)
        return dk, dv, rows + along_rows, columns + along_columns

    zeros = (jnp.zeros(x.shape, jnp.float32) for x in (k, v, k[:, 0], k[:, 0]))
    carry = cut.own(start, own, tuple(zeros))
    return cut.far(start + cut.outer, cut.end, far, carry)


def _from_keys(q_ref, k_ref, v_ref, d_o_ref, start, weight, cut, product, d_prefix_refs):
    """dq of a tile of queries; writes what they add to the gradients of prefix tokens."""
    q, d_o = (cut.load(ref, start, cut.outer) for ref in (q_ref, d_o_ref))
    dq = jnp.zeros(q.shape, jnp.float32)
    for p in range(cut.num_prefix):
        score, d_score = _read(q, k_ref, p), _read(d_o, v_ref, p)
        dq += d_score[:, None] * k_ref[p, :].astype(jnp.float32)[None, :]
        for ref, of_token, tokens in zip(d_prefix_refs, (d_score, score), (q, d_o), strict=True):
            ref[p, :] = jnp.sum(of_token[:, None] * tokens.astype(jnp.float32), axis=0)

    def add(keys, weights, dq):
        k, v = (cut.load(ref, keys, cut.inner) for ref in (k_ref, v_ref))
        d_scores = product(d_o, v, transposed=True) * weights
        return dq + product(d_scores.astype(k.dtype), k)

    return _over_keys(start, weight, cut, add, dq)


def _over_keys(start, weight, cut, add, total):
    """`add(keys, weights, total)` for the tiles of keys that a tile of queries reads."""

    def far(first, last, each, total):
        table = weight(*cut.far_distances(start, first, keys="inner"))
        step = lambda keys, total: add(keys, table * weight(cut.gap(keys, cut.inner, start)), total)
        return each(step, total)

    def own(keys, total):
        mask = causal(start, cut.outer, keys, cut.inner, keys_first=False)
        return add(keys, weight(*cut.own_distances(start, keys), mask=mask), total)

    return cut.own(start, own, cut.far(0, start, far, total))


def _weight(row_rate_ref, column_rate_ref):
    """The function exp(-row_rate rows - column_rate columns), 0 where masked."""
    row_rate, column_rate = (
        ref[...] * math.log2(math.e) for ref in (row_rate_ref, column_rate_ref)
    )

    def weight(rows, columns=0.0, mask=None):
        exponent = row_rate * rows + column_rate * columns
        return jnp.exp2(-(exponent if mask is None else jnp.where(mask, exponent, jnp.inf)))

    return weight


def _read(tokens, ref, p):
    """tokens . prefix token p."""
    return jnp.sum(tokens.astype(jnp.float32) * ref[p, :].astype(jnp.float32)[None, :], axis=1)


def _product(q, interpret):
    dot = triton_program.product(q.dtype, interpret)
    return lambda x, y, transposed=False: dot(x, y, 1, 1 if transposed else 0)


def _tilings(q, v):
    return _TILINGS[q.dtype.itemsize, max(q.shape[-1], v.shape[-1]) > 64]


def _compiler_params(tiling):
    return plgpu.CompilerParams(num_warps=tiling.num_warps, num_stages=tiling.num_stages)


# Blocks of one head of one example. The launch grid is (tiles, H, B), tiles changing fastest,
# so that programs that share keys run together.
_RATE = pl.BlockSpec((None,), lambda i, h, b: (h,))


def _whole(x):
    return pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda i, h, b: (b, 0, h, 0))


def _part(shape):
    return pl.BlockSpec((None, None, None, *shape), lambda i, h, b: (b, h, i, *(0 for _ in shape)))
