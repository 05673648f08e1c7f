"""Mosaic TPU kernels of the single recurrence: S_t = exp(g_t) S_(t-1) + k_t v_t^T, o_t = q_t S_t.

A TPU core runs its programs one after another, so the chunks of a sequence are the last,
sequential axis of the grid, and the state stays in VMEM from one chunk to the next. The
backward pass is a second call that walks the chunks from the last to the first.

A last chunk of few tokens costs little, it is computed at its own length. Contract of the
arguments: `recurrence.Backend`, always with one segment.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from lasad_jax.ops.kernels.recurrence_tpu_chunk import Sizes, backward_kernel, forward_kernel
from lasad_jax.ops.kernels.tpu_tiles import call_by_name, round_up, side_by_side


def forward(
    q: Float[Array, "B N H Dk"],
    k: Float[Array, "B N H Dk"],
    v: Float[Array, "B N H Dv"],
    b: Float[Array, "one_or_B H M K L"],
    starts: Float[Array, "B H 1 Dk Dv"] | None,
    *,
    num_prefix: int,
    segments: int = 1,
    keep_states: bool,
    return_ends: bool,
    interpret: object = False,
) -> tuple[Array, Array | None, Array | None]:
    """Outputs of all tokens.

    Args:
      q, k, v: bf16 or float32, all of one type.
      b: float32, inclusive cumulative log-decay within each chunk, as K parts to be summed
        (differences are taken part by part). Rows < P and rows >= N have g = 0. L is a
        multiple of 16, M = ceil(N / L).
      starts: float32 state before the first token; None for zeros.
      num_prefix: P, the number of tokens that never decay, at most L.
      segments: 1; a core has no use for more.
      keep_states: also return what `backward` needs.
      return_ends: also return the state after the last token.
      interpret: as of `pallas_call`; True or `InterpretParams()` run on any device.

    Returns:
      o (B, N, H, Dv) in v's dtype; the states before each chunk in q's dtype with heads
      side by side, (B, M, Dk, H * Dv), or None; the float32 end state (B, H, 1, Dk, Dv),
      or None.

    Raises:
      ValueError: where `b`, `num_prefix` or `segments` do not fit.
    """
    sizes = Sizes.of(q, v, b, num_prefix, segments)
    given = {name: side_by_side(x) for name, x in _tokens(q, k, v, num_prefix).items()} | {"b": b}
    if starts is not None:
        given["starts"] = starts
    wanted = {"o": jax.ShapeDtypeStruct(given["v"].shape, v.dtype)}
    if keep_states:
        shape = (q.shape[0], sizes.num_chunks, sizes.key_dim, given["v"].shape[2])
        wanted["states"] = jax.ShapeDtypeStruct(shape, q.dtype)
    if return_ends:
        wanted["ends"] = _all_states(sizes, q)
    out = call_by_name(
        functools.partial(forward_kernel, sizes),
        _grid(sizes, q),
        _blocks(sizes, b, order=lambda i: i),
        given,
        wanted,
        {"state": sizes.packed_state},
        name="recurrence_forward",
        interpret=interpret,
    )
    return out["o"].reshape(v.shape), out.get("states"), out.get("ends")


def backward(
    q: Float[Array, "B N H Dk"],
    k: Float[Array, "B N H Dk"],
    v: Float[Array, "B N H Dv"],
    b: Float[Array, "one_or_B H M K L"],
    states: Float[Array, "B M Dk H*Dv"],
    d_o: Float[Array, "B N H Dv"],
    d_ends: Float[Array, "B H 1 Dk Dv"] | None,
    d_prefix: None,
    *,
    num_prefix: int,
    segments: int = 1,
    return_d_starts: bool,
    interpret: object = False,
) -> tuple[Array, Array, Array, Array, Array | None]:
    """All gradients in one pass over the chunks, from the last to the first.

    Args:
      q, k, v, b, num_prefix, segments, interpret: as given to `forward`.
      states: from `forward`.
      d_o: gradient of o, in v's dtype.
      d_ends: float32 gradient of the end state; None for zeros.
      d_prefix: None, there being no later segment.
      return_d_starts: also return the gradient of the start state.

    Returns:
      dq, dk, dv in their inputs' dtypes; dg (B, H, M, L) in float32, the gradient of the
      log-factors, whose rows < P and >= N hold anything; the float32 gradient of the start
      state (B, H, 1, Dk, Dv), or None.

    Raises:
      ValueError: where `b`, `num_prefix` or `segments` do not fit.
    """
    del d_prefix
    sizes = Sizes.of(q, v, b, num_prefix, segments)
    given = _tokens(q, k, v, num_prefix) | {"d_o": d_o}
    given = {name: side_by_side(x) for name, x in given.items()} | {"b": b, "states": states}
    if d_ends is not None:
        given["d_ends"] = d_ends
    wanted = {f"d{x}": jax.ShapeDtypeStruct(given[x].shape, given[x].dtype) for x in "qkv"}
    shape = (q.shape[0], q.shape[2], sizes.num_chunks, 1, sizes.chunk)
    wanted["dg"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    if return_d_starts:
        wanted["d_starts"] = _all_states(sizes, q)
    scratch = {"d_state": sizes.packed_state}
    if num_prefix:
        for name, width in (("d_prefix_k", sizes.key_dim), ("d_prefix_v", sizes.value_dim)):
            scratch[name] = (round_up(num_prefix), sizes.packing.heads * width)
    out = call_by_name(
        functools.partial(backward_kernel, sizes),
        _grid(sizes, q),
        _blocks(sizes, b, order=lambda i: sizes.num_chunks - 1 - i),
        given,
        wanted,
        scratch,
        name="recurrence_backward",
        interpret=interpret,
    )
    dq, dk, dv = out["dq"].reshape(q.shape), out["dk"].reshape(k.shape), out["dv"].reshape(v.shape)
    return dq, dk, dv, out["dg"][..., 0, :], out.get("d_starts")


def _tokens(q, k, v, num_prefix):
    """Prefix keys and values are further views of k and v: every chunk needs them."""
    prefix = {"prefix_k": k, "prefix_v": v} if num_prefix else {}
    return {"q": q, "k": k, "v": v, **prefix}


def _all_states(sizes, q):
    shape = (q.shape[0], sizes.num_heads, 1, sizes.key_dim, sizes.value_dim)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _grid(sizes, q):
    return q.shape[0], sizes.num_heads // sizes.packing.heads, sizes.num_chunks


def _blocks(sizes, b, order):
    """The block of every array at step i of the grid's last axis, which is chunk order(i)."""
    key_dim, value_dim = sizes.key_dim, sizes.value_dim
    heads, chunk = sizes.packing.heads, sizes.chunk
    sample = (lambda n: 0) if b.shape[0] == 1 else (lambda n: n)

    def rows(width):
        return pl.BlockSpec((None, chunk, heads * width), lambda n, h, i: (n, order(i), h))

    def prefix(width):
        shape = (None, round_up(sizes.num_prefix), heads * width)
        return pl.BlockSpec(shape, lambda n, h, i: (n, 0, h))

    def steps(parts, sample):
        shape = (None, heads, None, parts, chunk)
        return pl.BlockSpec(shape, lambda n, h, i: (sample(n), h, order(i), 0, 0))

    state = pl.BlockSpec((None, heads, None, key_dim, value_dim), lambda n, h, i: (n, h, 0, 0, 0))
    states = pl.BlockSpec(
        (None, None, key_dim, heads * value_dim), lambda n, h, i: (n, order(i), 0, h)
    )
    return {
        **dict.fromkeys(("q", "k", "dq", "dk"), rows(key_dim)),
        **dict.fromkeys(("v", "o", "d_o", "dv"), rows(value_dim)),
        **dict.fromkeys(("starts", "ends", "d_starts", "d_ends"), state),
        "prefix_k": prefix(key_dim),
        "prefix_v": prefix(value_dim),
        "b": steps(b.shape[3], sample),
        "dg": steps(1, lambda n: n),
        "states": states,
    }
