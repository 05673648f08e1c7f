"""Tokens that are gated, then multiplied with a matrix: plain, and with fused kernels.

    swiglu_product:       (silu(gate) * up) @ kernel
    gated_heads_product:  (o / sqrt(mean(o^2) + epsilon) * silu(gate)) @ kernel

The gated tokens h are not kept for the backward pass. Its kernel computes them again while it
makes the gradients of what they came from, and reads nothing more for it.
"""

import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lasad_jax.ops.keep import keep
from lasad_jax.ops.kernels import choice
from lasad_jax.ops.kernels.choice import Axes
from lasad_jax.ops.numerics import wide
from lasad_jax.ops.product import d_factor, d_kernel, product


def swiglu_product(
    gate_up: Float[Array, "B N 2 F"],
    kernel: Float[Array, "F D"],
    *,
    implementation: str = "auto",
    batch_axes: Axes = None,
    hidden_axes: Axes = None,
) -> Float[Array, "B N D"]:
    """The second half of a SwiGLU feed-forward, arXiv 2002.05202.

    Args:
      gate_up: for each token the gate, then what it gates.
      kernel: in gate_up's dtype.
      implementation: "plain", "triton" (for NVIDIA GPUs), or "auto": the latter where it can run.
      batch_axes, hidden_axes: axes of the current mesh, if there is one, over which images and
        hidden channels are split.

    Returns:
      (silu(gate) * up) @ kernel; h is computed in float32 and rounded once.

    Raises:
      ValueError: if shapes, dtypes or options do not fit, or "triton" cannot run.
    """
    if gate_up.ndim != 4 or gate_up.shape[2] != 2:
        raise ValueError(f"gate_up: expected (B, N, 2, F), got {gate_up.shape}")
    _check_kernel(kernel, gate_up, gate_up.shape[3:])
    if not choice.prefers_triton(gate_up, implementation):
        return _plain_product(_swiglu(gate_up), kernel)
    two = PartitionSpec(batch_axes, None, None, hidden_axes)
    one = PartitionSpec(batch_axes, None, hidden_axes)
    return keep(fused((gate_up,), kernel, *_on_mesh(kernels("swiglu"), (two,), one)))


def gated_heads_product(
    o: Float[Array, "B N H Dv"],
    y: Float[Array, "B N H W"],
    kernel: Float[Array, "H Dv D"],
    *,
    gate_start: int,
    epsilon: float,
    partial_gradient: bool = False,
    implementation: str = "auto",
    batch_axes: Axes = None,
    head_axes: Axes = None,
) -> Float[Array, "B N D"]:
    """Heads to unit mean square, times their gates, then the output projection.

    Args:
      o: output of each head.
      y: each head's columns gate_start to gate_start + Dv are the gate, before its silu. In
        o's dtype.
      kernel: in o's dtype.
      gate_start: as said.
      epsilon: added to the mean square.
      partial_gradient: of the gradient with respect to y, only the gate's columns mean
        something: the kernels leave the others as they find the memory, NaN included. Only for
        a y that comes unchanged out of a function whose backward pass overwrites all its other
        columns and reads none of them, and that nothing else uses (gradients of several uses
        are added). By default the other columns are 0, for one more pass over y.
      implementation: "plain", "triton" (for NVIDIA GPUs), or "auto": the latter where it can run.
      batch_axes, head_axes: axes of the current mesh, if there is one, over which images and
        heads are split.

    Returns:
      (o / sqrt(mean(o^2) + epsilon) * silu(gate)) @ kernel, the mean over Dv; h is computed in
      float32 and rounded once.

    Raises:
      ValueError: if shapes, dtypes or options do not fit, or "triton" cannot run.
    """
    _check_heads(o, y, gate_start)
    _check_kernel(kernel, o, o.shape[2:])
    static = {"gate_start": gate_start, "epsilon": epsilon}
    if not choice.prefers_triton(o, implementation):
        return _plain_product(_gated_heads(o, y, **static), kernel)
    forward, backward = kernels("heads", **static)
    if not partial_gradient:
        backward = _whole_gradient(backward, gate_start)
    heads = PartitionSpec(batch_axes, None, head_axes)
    return keep(fused((o, y), kernel, *_on_mesh((forward, backward), (heads, heads), heads)))


def kernels(name: str, **options) -> tuple[Callable, Callable]:
    """The forward and backward kernel of "swiglu" or "heads"."""
    # Imported when first used: it needs a part of Pallas that not every installation has.
    module = importlib.import_module("lasad_jax.ops.kernels.gated_triton")
    ways = (getattr(module, f"{name}_{way}") for way in ("forward", "backward"))
    return tuple(functools.partial(way, **options) for way in ways)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def fused(
    inputs: tuple[Array, ...],
    kernel: Float[Array, "*contracted D"],
    forward: Callable,
    backward: Callable,
) -> Float[Array, "B N D"]:
    """h @ kernel with h = forward(*inputs); backward(*inputs, d_h) is (*d_inputs, h).

    All products are of two matrices: of more axes XLA would transpose whole activations in
    memory.
    """
    return product(forward(*inputs), kernel, kernel.ndim - 1)


def _fused_forward(inputs, kernel, forward, backward):
    return fused(inputs, kernel, forward, backward), (inputs, kernel)


def _fused_backward(forward, backward, residuals, d_out):
    inputs, kernel = residuals
    *d_inputs, h = backward(*inputs, d_factor(d_out, kernel))
    return tuple(d_inputs), d_kernel(h, d_out)


fused.defvjp(_fused_forward, _fused_backward)


def _plain_product(h, kernel):
    return keep(product(h, kernel, kernel.ndim - 1))


def _swiglu(gate_up: Float[Array, "B N 2 F"]) -> Float[Array, "B N F"]:
    """h with XLA's own operations, in float32 or wider."""
    gate_up = wide(gate_up)
    return jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]


def _gated_heads(o, y, gate_start: int, epsilon: float) -> Float[Array, "B N H Dv"]:
    """h with XLA's own operations, in float32 or wider."""
    gate, o = wide(y[..., gate_start : gate_start + o.shape[-1]]), wide(o)
    mean = jnp.mean(jnp.square(o), axis=-1, keepdims=True)
    return o * jax.lax.rsqrt(mean + epsilon) * jax.nn.silu(gate)


def _whole_gradient(backward: Callable, gate_start: int) -> Callable:
    """The same with zeros in the columns of d_y that the kernel leaves as they are."""

    def whole(o, y, d_h):
        d_o, d_y, h = backward(o, y, d_h)
        column = jnp.arange(y.shape[-1])
        in_gate = (column >= gate_start) & (column < gate_start + o.shape[-1])
        return d_o, jnp.where(in_gate, d_y, 0), h

    return whole


def _on_mesh(ways, inputs: tuple[PartitionSpec, ...], h: PartitionSpec):
    """Kernels that see their device's own part: nothing is sent."""
    if jax.sharding.get_abstract_mesh().empty:
        return ways
    split = functools.partial(jax.shard_map, check_vma=False)
    forward, backward = ways
    return (
        split(forward, in_specs=inputs, out_specs=h),
        split(lambda *args: tuple(backward(*args)), in_specs=(*inputs, h), out_specs=(*inputs, h)),
    )


def _check_heads(o, y, gate_start: int):
    if o.ndim != 4 or y.ndim != 4 or o.shape[:3] != y.shape[:3] or o.dtype != y.dtype:
        raise ValueError(
            "o, y: expected (B, N, H, Dv) and (B, N, H, W) of one dtype; "
            f"got {o.dtype}{o.shape} and {y.dtype}{y.shape}"
        )
    if not 0 <= gate_start <= y.shape[3] - o.shape[3]:
        raise ValueError(
            f"gate_start: y's {y.shape[3]} columns hold no {o.shape[3]} from {gate_start} on"
        )


def _check_kernel(kernel, x, contracted: tuple[int, ...]):
    if kernel.shape[:-1] != contracted or kernel.dtype != x.dtype:
        raise ValueError(
            f"kernel: expected {x.dtype} of shape {(*contracted, 'D')}, "
            f"got {kernel.dtype}{kernel.shape}"
        )
