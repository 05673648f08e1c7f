"""The SwiGLU feed-forward: with the SwiGLU inside its products, or between them.

Where the products of `lasad_jax.ops.kernels.swiglu_mosaic` run, gate and up are written once, by
the product that makes them, with the h that the next one reads; backward, their gradients come
out of the product with the down projection. Else XLA multiplies, and `gated_products` has what
lies between.
"""

import functools
import importlib
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lasad_jax.ops.keep import keep
from lasad_jax.ops.kernels import choice
from lasad_jax.ops.kernels.choice import Axes
from lasad_jax.ops.passes.gated_products import swiglu_product
from lasad_jax.ops.product import d_factor, d_kernel, product

# Columns by which gate and up alternate in the matrix of the fused products.
_BLOCK = 64


def join(
    gate: Float[Array, "D F"],
    up: Float[Array, "D F"],
    tokens: tuple[int, int],
    *,
    implementation: str = "auto",
    batch_axes: Axes = None,
    hidden_axes: Axes = None,
) -> Float[Array, "D 2 F"] | Float[Array, "D 2*F"]:
    """Both kernels as `swiglu` takes them.

    Args:
      gate, up: in the dtype to compute in.
      tokens: (B, N) of those that will be multiplied.
      implementation, batch_axes, hidden_axes: as in `swiglu`.

    Returns:
      blocks of columns by turns for products that hold the SwiGLU, where these run; else both side
      by side.

    Raises:
      ValueError: if shapes or dtypes differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"up: expected {gate.dtype} of shape {gate.shape}, got {up.dtype}{up.shape}"
        )
    rows = math.prod(tokens) // choice.num_devices(batch_axes)
    hidden = gate.shape[1] // choice.num_devices(hidden_axes)
    if implementation == "auto" and choice.fuses_swiglu(rows, len(gate), hidden, gate.dtype):
        return by_turns(gate, up)
    # On an axis of their own, which leaves that of F to be split over a mesh.
    return jnp.stack((gate, up), axis=1)


def swiglu(
    x: Float[Array, "B N D"],
    gate_up: Float[Array, "D 2 F"] | Float[Array, "D 2*F"],
    down: Float[Array, "F D"],
    *,
    implementation: str = "auto",
    batch_axes: Axes = None,
    hidden_axes: Axes = None,
) -> Float[Array, "B N D"]:
    """down(silu(gate(x)) * up(x)), arXiv 2002.05202.

    Args:
      x: the tokens, in any dtype.
      gate_up: of `join`.
      down: in the dtype to compute in, too.
      implementation: of the elementwise passes: "plain", "triton" (for NVIDIA GPUs), or "auto",
        for products that hold them where these run, else for the best passes.
      batch_axes, hidden_axes: axes of the current mesh, if there is one, over which images and
        hidden channels are split.

    Returns:
      tokens in the kernels' dtype; h is computed in float32 and rounded once.

    Raises:
      ValueError: if shapes, dtypes or options do not fit, or "triton" cannot run.
    """
    _check(x, gate_up, down)
    axes = {"batch_axes": batch_axes, "hidden_axes": hidden_axes}
    if gate_up.ndim == 3:
        both = keep(product(x, gate_up, feature_axes=hidden_axes))
        return swiglu_product(both, down, implementation=implementation, **axes)
    return keep(fused(x.astype(gate_up.dtype), gate_up, down, *_on_mesh(kernels(), **axes)))


def kernels(**options) -> tuple[Callable, Callable]:
    """The products before the SwiGLU and, backward, behind it."""
    # Imported when first used: it needs a part of Pallas that not every installation has.
    module = importlib.import_module("lasad_jax.ops.kernels.swiglu_mosaic")
    return tuple(functools.partial(way, **options) for way in (module.forward, module.backward))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def fused(
    x: Float[Array, "B N D"],
    gate_up: Float[Array, "D 2*F"],
    down: Float[Array, "F D"],
    forward: Callable,
    backward: Callable,
) -> Float[Array, "B N D"]:
    """h @ down with (both, h) = forward(x, gate_up), as `swiglu_mosaic` has them;
    backward(d_out, down, both) is (d_both, h).

    Of `both` and h only the former is kept for the backward pass.
    """
    return product(forward(x, gate_up)[1], down)


def _fused_forward(x, gate_up, down, forward, backward):
    both, h = forward(x, gate_up)
    return product(h, down), (x, gate_up, down, keep(both))


def _fused_backward(forward, backward, residuals, d_out):
    x, gate_up, down, both = residuals
    d_both, h = backward(d_out, down, both)
    return d_factor(d_both, gate_up), d_kernel(x, d_both), d_kernel(h, d_out)


fused.defvjp(_fused_forward, _fused_backward)


@jax.custom_vjp
def by_turns(gate: Float[Array, "D F"], up: Float[Array, "D F"]) -> Float[Array, "D 2*F"]:
    """Blocks of columns of both by turns."""
    blocks = (x.reshape(len(x), -1, 1, _BLOCK) for x in (gate, up))
    # A choice by place is faster than joining many short pieces.
    return jnp.where(jnp.arange(2)[:, None] == 0, *blocks).reshape(len(gate), -1)


def _apart(_, gate_up: Float[Array, "D 2*F"]) -> tuple[Array, Array]:
    blocks = gate_up.reshape(len(gate_up), -1, 2, _BLOCK)
    return tuple(blocks[:, :, i].reshape(len(gate_up), -1) for i in range(2))


by_turns.defvjp(lambda *both: (by_turns(*both), None), _apart)


def _on_mesh(ways, batch_axes: Axes, hidden_axes: Axes):
    """Products that see their device's own images and hidden channels: nothing is sent."""
    forward, backward = map(_of_tokens, ways)
    if jax.sharding.get_abstract_mesh().empty:
        return forward, backward
    tokens, hidden = PartitionSpec(batch_axes), PartitionSpec(batch_axes, None, hidden_axes)
    split = functools.partial(jax.shard_map, out_specs=(hidden, hidden), check_vma=False)
    return (
        split(forward, in_specs=(tokens, PartitionSpec(None, hidden_axes))),
        split(backward, in_specs=(tokens, PartitionSpec(hidden_axes), hidden)),
    )


def _of_tokens(way: Callable) -> Callable:
    """The same for (B, N, ...) in place of rows."""

    def run(tokens, matrix, *others):
        rows = [x.reshape(-1, x.shape[2]) for x in (tokens, *others)]
        out = way(rows[0], matrix, *rows[1:])
        return tuple(x.reshape(*tokens.shape[:2], -1) for x in out)

    return run


def _check(x, gate_up, down):
    if x.ndim != 3:
        raise ValueError(f"x: expected (B, N, D), got {x.shape}")
    D, F = x.shape[2], gate_up.shape[-1] // (1 if gate_up.ndim == 3 else 2)
    if gate_up.shape not in ((D, 2, F), (D, 2 * F)):
        raise ValueError(f"gate_up: expected ({D}, 2, F) or ({D}, 2 * F), got {gate_up.shape}")
    if down.shape != (F, D) or down.dtype != gate_up.dtype:
        raise ValueError(
            f"down: expected {gate_up.dtype} of shape {(F, D)}, got {down.dtype}{down.shape}"
        )
