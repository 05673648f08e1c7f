"""What stands between two branches of a residual network, in one pass over memory each way.

    x' = x + dropout(branch)        y = x' / sqrt(mean(x'^2) + epsilon)

The scale of the norm is left to the product that reads y.
"""

import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, UInt32

from lasad_jax.ops.keep import keep
from lasad_jax.ops.kernels import choice
from lasad_jax.ops.numerics import wide
from lasad_jax.ops.passes.dropout import kept

Tokens = Float[Array, "B N D"]


def add_norm(
    x: Tokens,
    branch: Tokens,
    seeds: UInt32[Array, "B N"] | None,
    *,
    rate: float,
    epsilon: float,
    implementation: str = "auto",
    batch_axes: str | tuple[str, ...] | None = None,
) -> tuple[Tokens, Tokens]:
    """The residual stream after a branch, and the same normalised.

    Args:
      x: the stream.
      branch: what is added to it, of x's dtype.
      seeds: of `dropout.token_seeds`; None adds the branch as it is.
      rate: share of the branch's elements that are dropped; the others grow by 1 / (1 - rate).
      epsilon: of the norm.
      implementation: "plain", "triton" (for NVIDIA GPUs), or "auto": the latter where it can run.
      batch_axes: axes of the current mesh, if there is one, over which images are split.

    Returns:
      x' and y in x's dtype. The backward pass reads y, and not x or branch.

    Raises:
      ValueError: if shapes do not fit, or "triton" cannot run.
    """
    if x.shape != branch.shape or x.dtype != branch.dtype:
        raise ValueError(
            f"branch: expected {x.dtype}{x.shape} as x, got {branch.dtype}{branch.shape}"
        )
    rate = 0.0 if seeds is None else rate
    seeds = None if rate == 0 else seeds
    fused = choice.prefers_triton(x, implementation)
    forward, backward = kernels(rate, epsilon) if fused else plain(rate, epsilon)
    if fused and not jax.sharding.get_abstract_mesh().empty:
        images = PartitionSpec(batch_axes)
        split = functools.partial(jax.shard_map, in_specs=images, out_specs=images, check_vma=False)
        forward, backward = split(forward), split(backward)
    return _add_norm(forward, backward, x, branch, seeds)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _add_norm(forward: Callable, backward: Callable, x, branch, seeds):
    x, y, _ = forward(x, branch, seeds)
    return x, y


def _forward_rule(forward, backward, x, branch, seeds):
    x, y, factor = forward(x, branch, seeds)
    y, factor, seeds = keep((y, factor, seeds))
    return (x, y), (y, factor, seeds)


def _backward_rule(forward, backward, residuals, cotangents):
    d_x, d_y = cotangents
    d_x, d_branch = backward(d_x, d_y, *residuals)
    return d_x, d_branch, None


_add_norm.defvjp(_forward_rule, _backward_rule)


def kernels(rate: float, epsilon: float, **options) -> tuple[Callable, Callable]:
    """The two directions as Triton kernels."""
    # Imported when first used: it needs a part of Pallas that not every installation has.
    module = importlib.import_module("lasad_jax.ops.kernels.add_norm_triton")
    return (
        functools.partial(module.forward, rate=rate, epsilon=epsilon, **options),
        functools.partial(module.backward, rate=rate, **options),
    )


def plain(rate: float, epsilon: float) -> tuple[Callable, Callable]:
    """The two directions in XLA's own operations."""
    return functools.partial(_forward, rate, epsilon), functools.partial(_backward, rate)


def _forward(rate, epsilon, x, branch, seeds):
    x = x + _drop(branch, seeds, rate)
    factor = jax.lax.rsqrt(jnp.mean(jnp.square(wide(x)), axis=-1) + epsilon)
    return x, (wide(x) * factor[..., None]).astype(x.dtype), factor


def _backward(rate, d_x, d_y, y, factor, seeds):
    wide_y, wide_dy = wide(y), wide(d_y)
    along = jnp.mean(wide_y * wide_dy, axis=-1, keepdims=True)
    d_x = (wide(d_x) + factor[..., None] * (wide_dy - wide_y * along)).astype(y.dtype)
    return d_x, _drop(d_x, seeds, rate)


def _drop(x, seeds, rate):
    if seeds is None:
        return x
    keep_it = kept(seeds[..., None], jnp.arange(x.shape[-1]), rate)
    return jnp.where(keep_it, wide(x) / (1 - rate), 0.0).astype(x.dtype)
