"""Queries, keys and values out of a mixer's joint projection, plain and with fused kernels.

    q = rotate(silu(y_q)) * q_scale,  k = rotate(silu(y_k)),  v = y_v

where each head's columns of y are [q Dk | k Dk | v Dv | out_gate Dv | decay gate 1 | padding].
Everything between the projection and the operator is one pass over memory each way.
"""

import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lasad_jax.ops.kernels import choice
from lasad_jax.ops.numerics import wide

Heads = tuple[
    Float[Array, "B N H Dk"],
    Float[Array, "B N H Dk"],
    Float[Array, "B N H Dv"],
    Float[Array, "B N H"] | None,
]


def split_heads(
    y: Float[Array, "B N H W"],
    table: Float[Array, "N pairs 2"] | None,
    *,
    key_dim: int,
    value_dim: int,
    q_scale: float,
    gated: bool = True,
    implementation: str = "auto",
    batch_axes: str | tuple[str, ...] | None = None,
    head_axes: str | tuple[str, ...] | None = None,
) -> tuple[*Heads, Float[Array, "B N H W"]]:
    """q, k and v as the operator takes them, the content gate's raw numbers, and y itself.

    y is returned for whoever reads the output gate's columns out of it. Its gradient counts in
    these columns only: in all others anything may stand, NaN included, and is overwritten.

    Args:
      y: joint projection. W is 2 Dk + 2 Dv and, if gated, at least one more.
      table: cosine and sine by which each token's pairs (2i, 2i + 1) turn, in float32; None
        leaves them as they are. No gradient reaches it.
      key_dim, value_dim: Dk, even where there is a table, and Dv.
      q_scale: factor of the queries.
      gated: whether y has the column of the content gate.
      implementation: "plain", "triton" (for NVIDIA GPUs), or "auto": the latter where it can run.
      batch_axes, head_axes: axes of the current mesh, if there is one, over which images and
        heads are split.

    Returns:
      q, k and v in y's dtype; the raw gate in float32 (or wider, as y is), None if not gated; y.

    Raises:
      ValueError: if shapes or options do not fit, or "triton" cannot run.
    """
    _check(y, table, key_dim, value_dim, gated)
    options = {
        "key_dim": key_dim,
        "value_dim": value_dim,
        "q_scale": float(q_scale),
        "gated": gated,
    }
    if not choice.prefers_triton(y, implementation):
        ways = (functools.partial(way, **options) for way in (_forward, _backward))
        return with_gradient(y, table, *ways)
    forward, backward = kernels(**options)
    if not jax.sharding.get_abstract_mesh().empty:
        heads, all_ = PartitionSpec(batch_axes, None, head_axes), PartitionSpec()
        split = functools.partial(jax.shard_map, out_specs=heads, check_vma=False)
        forward = split(forward, in_specs=(heads, all_))
        backward = split(backward, in_specs=(heads, heads, heads, all_))
    return with_gradient(y, table, forward, backward)


def kernels(**options) -> tuple[Callable, Callable]:
    """The forward and backward kernel."""
    # Imported when first used: it needs a part of Pallas that not every installation has.
    module = importlib.import_module("lasad_jax.ops.kernels.split_heads_triton")
    return tuple(functools.partial(way, **options) for way in (module.forward, module.backward))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def with_gradient(
    y: Float[Array, "B N H W"],
    table: Float[Array, "N pairs 2"] | None,
    forward: Callable,
    backward: Callable,
) -> tuple[*Heads, Float[Array, "B N H W"]]:
    """The split by one function each way, whose contracts are in `split_heads_triton`."""
    return *forward(y, table), y


def _vjp_forward(y, table, forward, backward):
    return with_gradient(y, table, forward, backward), (y, table)


def _vjp_backward(forward, backward, residuals, cotangents):
    *d_heads, d_y = cotangents
    return backward(d_y, tuple(d_heads), *residuals), None


with_gradient.defvjp(_vjp_forward, _vjp_backward)


def _forward(y, table, *, key_dim, value_dim, q_scale, gated):
    """The same with XLA's own operations."""
    q, k = (
        _rotate(jax.nn.silu(wide(x)), table)
        for x in (y[..., :key_dim], y[..., key_dim : 2 * key_dim])
    )
    v = y[..., 2 * key_dim : 2 * key_dim + value_dim]
    gate = wide(y[..., 2 * (key_dim + value_dim)]) if gated else None
    return (q * q_scale).astype(y.dtype), k.astype(y.dtype), v, gate


def _backward(d_y, d_heads, y, table, **options):
    _, pullback = jax.vjp(lambda y: _forward(y, table, **options), y)
    (d_own,) = pullback(d_heads)
    end = 2 * (options["key_dim"] + options["value_dim"])
    column = jnp.arange(y.shape[-1])
    is_out_gate = (column >= end - options["value_dim"]) & (column < end)
    return jnp.where(is_out_gate, d_y, d_own)


def _rotate(x, table):
    if table is None:
        return x
    # (-sin, sin) meets each pair read backwards.
    turn = table[:, None].astype(x.dtype)
    cos, sin = turn[..., :1], turn[..., 1:] * jnp.array([-1, 1], x.dtype)
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    return (pairs * cos + lax.rev(pairs, (pairs.ndim - 1,)) * sin).reshape(x.shape)


def _check(y, table, key_dim, value_dim, gated):
    columns = 2 * (key_dim + value_dim)
    fits = y.ndim == 4 and (y.shape[3] > columns if gated else y.shape[3] == columns)
    if not fits:
        raise ValueError(
            f"y: expected (B, N, H, W) with W {'above' if gated else 'of'} {columns}, twice "
            f"key_dim + value_dim, with gated={gated}; got {y.shape}"
        )
    if table is None:
        return
    if key_dim % 2:
        raise ValueError(f"key_dim: {key_dim} is odd, but rotation needs pairs; pass no table")
    if table.shape != (y.shape[1], key_dim // 2, 2):
        raise ValueError(
            f"table: expected {(y.shape[1], key_dim // 2, 2)}, a cosine and a sine for each "
            f"token and pair; got {table.shape}"
        )
