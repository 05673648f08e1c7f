"""The SwiGLU feed-forward: plain, with elementwise passes, and with these inside its products.

Where the products of `lasad_jax.ops.kernels.swiglu_mosaic` can run, gate and up are written
once, by the product that makes them, with the h that the next one reads; backward, their
gradients come out of the product with the down projection. Else XLA multiplies, and
`gated_products` has what lies between.
"""

import functools
import importlib
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lasad_jax.ops.keep import keep
from lasad_jax.ops.kernels import swiglu_tiling
from lasad_jax.ops.passes.gated_products import Axes, swiglu_product
from lasad_jax.ops.product import product


def swiglu(
    x: Float[Array, "B N D"],
    gate_up: Float[Array, "D 2 F"],
    down: Float[Array, "F D"],
    *,
    implementation: str = "auto",
    batch_axes: Axes = None,
    hidden_axes: Axes = None,
) -> Float[Array, "B N D"]:
    """down(silu(gate(x)) * up(x)), arXiv 2002.05202.

    Args:
      x: the tokens.
      gate_up: the kernels of gate and up, side by side.
      down: the kernel behind them, in the same dtype.
      implementation: "plain", "triton" (passes for NVIDIA GPUs), or "auto": products that hold
        the passes where they can run, else the best passes.
      batch_axes, hidden_axes: axes of the current mesh, if there is one, over which images and
        hidden channels are split.

    Raises:
      ValueError: if shapes, dtypes or options do not fit, or "triton" cannot run.
    """
    if gate_up.ndim != 3 or gate_up.shape[:2] != (x.shape[-1], 2):
        raise ValueError(f"gate_up: expected ({x.shape[-1]}, 2, F), got {gate_up.shape}")
    if implementation != "auto" or obstacle(x, gate_up, down, batch_axes, hidden_axes):
        options = {"batch_axes": batch_axes, "hidden_axes": hidden_axes}
        both = keep(product(x, gate_up))
        return swiglu_product(both, down, implementation=implementation, **options)
    ways = _on_mesh(kernels(), batch_axes, hidden_axes)
    return keep(fused(x.astype(gate_up.dtype), gate_up, down, *ways))


def obstacle(x, gate_up, down, batch_axes: Axes, hidden_axes: Axes) -> str | None:
    """Why the products with SwiGLU inside cannot take these; None if they can."""
    if down.shape != (gate_up.shape[2], x.shape[2]) or gate_up.dtype != down.dtype:
        return f"gate_up and down do not fit: {gate_up.shape}, {down.shape}"
    num_rows = x.shape[0] * x.shape[1] // _num_devices(batch_axes)
    hidden = gate_up.shape[2] // _num_devices(hidden_axes)
    return swiglu_tiling.obstacle(num_rows, x.shape[2], hidden, gate_up.dtype)


def kernels() -> tuple[Callable, Callable]:
    """The forward and backward products."""
    # Imported when first used: it needs a part of Pallas that not every installation has.
    module = importlib.import_module("lasad_jax.ops.kernels.swiglu_mosaic")
    return module.forward, module.backward


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def fused(
    x: Float[Array, "B N D"],
    gate_up: Float[Array, "D 2 F"],
    down: Float[Array, "F D"],
    forward: Callable,
    backward: Callable,
) -> Float[Array, "B N D"]:
    """h @ down with (both, h) = forward(x, gate_up); backward(d_out, down, both) is (d_both, h).

    `both`, gate and up of each token, is kept for the backward pass, and h is not.
    """
    return product(forward(x, gate_up)[1], down)


def _fused_forward(x, gate_up, down, forward, backward):
    both, h = forward(x, gate_up)
    return product(h, down), (x, gate_up, down, keep(both))


def _fused_backward(forward, backward, residuals, d_out):
    x, gate_up, down, both = residuals
    d_both, h = backward(d_out, down, both)
    x, d_out, h, d_both = (a.reshape(-1, *a.shape[2:]) for a in (x, d_out, h, d_both))
    # In the kernels' dtype, as of other products: half the bytes to add up over devices.
    d_down = jax.lax.dot_general(h, d_out, (((0,), (0,)), ((), ())))
    d_gate_up = jax.lax.dot_general(x, d_both, (((0,), (0,)), ((), ())))
    d_x = jax.lax.dot_general(d_both, gate_up, (((1, 2), (1, 2)), ((), ())))
    return d_x.reshape(*both.shape[:2], -1), d_gate_up, d_down


fused.defvjp(_fused_forward, _fused_backward)


def _on_mesh(ways, batch_axes: Axes, hidden_axes: Axes):
    """Products that see their device's own images and hidden channels: nothing is sent."""
    if jax.sharding.get_abstract_mesh().empty:
        return ways
    forward, backward = ways
    token = PartitionSpec(batch_axes)
    both, h = PartitionSpec(batch_axes, None, None, hidden_axes), (batch_axes, None, hidden_axes)
    out = both, PartitionSpec(*h)
    split = functools.partial(jax.shard_map, out_specs=out, check_vma=False)
    return (
        split(forward, in_specs=(token, PartitionSpec(None, None, hidden_axes))),
        split(backward, in_specs=(token, PartitionSpec(hidden_axes), both)),
    )


def _num_devices(axes: Axes) -> int:
    sizes = jax.sharding.get_abstract_mesh().shape
    names = (axes,) if isinstance(axes, str) else axes or ()
    return functools.reduce(lambda n, name: n * sizes[name], names, 1)
