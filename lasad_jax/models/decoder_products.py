"""The four products of decoding with a layer's weights, together with what surrounds them.

Each takes in the norm before it and the gate or the residual after it: in bf16 on Hopper as one
kernel, elsewhere as XLA's product and passes of their own.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lasad_jax.models.layers import NORM_EPSILON
from lasad_jax.ops.kernels.decode_tiling import PAIR, obstacle, pair_width

# TMA copies whole rows of eight, a program takes 64: fewer or others would have to be padded.
_FEWEST, _MULTIPLE = 64, 8


def _runs(fused: bool, x: Array, *more, **kind) -> bool:
    """Whether a product is the kernel's. `more`, `kind`: as for `obstacle`."""
    if not fused or x.shape[0] < _FEWEST or x.shape[0] % _MULTIPLE:
        return False
    return obstacle(x, *more, **kind) is None


def project(fused: bool, x: Float[Array, "B D"], w: Float[Array, "D E"]) -> Float[Array, "B E"]:
    """normalise(x) w; `fused` allows the kernel."""
    if not _runs(fused, x, w):
        return normalise(x) @ w
    from lasad_jax.ops.kernels import decode_product

    return decode_product.project(x, w, norm_eps=NORM_EPSILON)


def project_add(
    fused: bool,
    x: Float[Array, "B D"],
    w: Float[Array, "D E"],
    residual: Float[Array, "B E"],
) -> Float[Array, "B E"]:
    """residual + x w."""
    if not _runs(fused, x, w, residual):
        return residual + x @ w
    from lasad_jax.ops.kernels import decode_product

    return decode_product.project_add(x, w, residual)


def swiglu(
    fused: bool, x: Float[Array, "B D"], w: Float[Array, "D both"], *, norm: bool
) -> Float[Array, "B F"]:
    """silu(gate) * up of both = x w, or normalise(x) w, where w = `interleave`(gate, up)."""
    both, width = w.shape[1], pair_width(w.shape[1] // 2)
    if width != PAIR or not _runs(fused, x, w, gated=True):
        pairs = ((normalise(x) if norm else x) @ w).reshape(-1, both // (2 * width), 2, width)
        return (jax.nn.silu(pairs[:, :, 0]) * pairs[:, :, 1]).reshape(-1, both // 2)
    from lasad_jax.ops.kernels import decode_product

    return decode_product.swiglu(x, w, norm_eps=NORM_EPSILON if norm else None)


def normalise(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """To unit mean square over the last axis; the scale is in the next product."""
    x32 = x.astype(jnp.float32)
    factor = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + NORM_EPSILON)
    return (x32 * factor).astype(x.dtype)
