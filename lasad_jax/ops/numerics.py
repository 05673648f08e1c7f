"""Precision rules shared by every form: float32 accumulation, exact log-decay differences."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Step log-factors below this are indistinguishable from a full reset in float32
# (exp(-104) is 0); bounding them keeps the coarse part of `cumulative_log_decay` exact.
_RESET = -256.0
_QUANTUM = 2.0**-6


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """float32 for bf16, f16 and float32 inputs, float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def wide(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """x in the dtype that sums of its elements are in."""
    return x.astype(accumulator(x.dtype))


def einsum(subscripts: str, *operands: Array) -> Array:
    """Matrix product of equally typed operands, accumulated in float32 or better.

    float32 operands multiply in full float32: the default on GPU (TF32) and TPU (bf16)
    would lose three of its seven digits.
    """
    dtype = operands[0].dtype
    multiply = functools.partial(
        jnp.einsum,
        subscripts,
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=accumulator(dtype),
    )
    if dtype.itemsize >= 4:
        return multiply(*operands)
    # XLA has no such product of bf16 for CPUs inside a loop; that of float32 is the same.
    return jax.lax.platform_dependent(
        *operands, cpu=lambda *xs: multiply(*map(wide, xs)), default=multiply
    )


def cumulative_log_decay(
    g: Float[Array, "*lead"], axis: int
) -> tuple[Float[Array, "*lead"], Float[Array, "*lead"]]:
    """Running sum of log-factors as (coarse, fine), so that differences are exact.

    Neighbours far down a float32 running sum would differ by rounding: after 64 steps of
    -20 their difference is wrong by 1e-4.

    Args:
      g: non-positive log-factors.
      axis: the axis to sum along.

    Returns:
      coarse, fine: inclusive sums; coarse + fine is the running sum of g. Take
      differences of each before adding them.
    """
    coarse, fine = exact_parts(g)
    return jnp.cumsum(coarse, axis=axis), jnp.cumsum(fine, axis=axis)


def exact_parts(g: Float[Array, "*any"]) -> tuple[Float[Array, "*any"], Float[Array, "*any"]]:
    """g, bounded, as coarse + fine: multiples of 1/64, which float32 adds without error up to
    2^18, and small rests. All of the gradient goes to the fine part."""
    g = jnp.maximum(g, _RESET)
    coarse = jax.lax.stop_gradient(jnp.round(g / _QUANTUM) * _QUANTUM)
    return coarse, g - coarse


def running_sum(x: Float[Array, "*lead n"]) -> Float[Array, "*lead n"]:
    """Inclusive sums along the last axis, which is short.

    As one windowed sum, which XLA makes part of the kernels around it. Of `jnp.cumsum` it
    makes a dozen GPU kernels, which cost more than a fused call's few log-decays are worth.
    """
    window = (1,) * (x.ndim - 1) + (x.shape[-1],)
    padding = [(0, 0)] * (x.ndim - 1) + [(x.shape[-1] - 1, 0)]
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1,) * x.ndim, padding)


def combine(earlier: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
    """The associative operator of every scan: (a, S) then (b, T) -> (a b, b S + T)."""
    a, s = earlier
    b, t = later
    return a * b, b * s + t
