"""The exact 2D decay as one differentiable call over a backend's fused kernels."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lasad_jax.ops.decays import ManhattanDecay


def fused_manhattan(
    q: Float[Array, "B N H Dk"],
    k: Float[Array, "B N H Dk"],
    v: Float[Array, "B N H Dv"],
    decay: ManhattanDecay,
    *,
    columns: int,
    num_prefix: int,
    forward: Callable,
    backward: Callable,
) -> Float[Array, "B N H Dv"]:
    """o_t = sum over s <= t of D(t, s) (q_t . k_s) v_s, differentiable once in all arrays.

    Args:
      q, k, v: tokens in raster order after the prefix, bf16 or float32.
      decay: rates in float32.
      columns: C.
      num_prefix: P.
      forward, backward: a backend's functions, as in `manhattan_triton`.

    Returns:
      o in v's dtype.
    """
    static = {"columns": columns, "num_prefix": num_prefix}
    kernels = tuple(functools.partial(kernel, **static) for kernel in (forward, backward))
    return _fused(*kernels, q, k, v, decay.row_rate, decay.column_rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(forward, backward, *args):
    return forward(*args)


def _forward_rule(forward, backward, *args):
    return forward(*args), args


def _backward_rule(forward, backward, args, d_o):
    *grads, d_row_rate, d_column_rate = backward(*args, d_o)
    return *grads, jnp.sum(d_row_rate, axis=0), jnp.sum(d_column_rate, axis=0)


_fused.defvjp(_forward_rule, _backward_rule)
