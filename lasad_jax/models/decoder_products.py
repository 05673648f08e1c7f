"""The five products of decoding with a layer's weights, together with what surrounds them.

Each takes in the norm before it and the gate or the residual after it: in bf16 on Hopper as one
kernel, elsewhere as XLA's product and passes of their own.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lasad_jax.models.layers import NORM_EPSILON
from lasad_jax.ops.kernels.decode_tiling import PAIR, Tiling, obstacle, pair_width

MATRICES = ("projection", "out", "gate_up", "down", "head")
# Measured with 256 rows on an H200: for the two that only add a residual XLA's are no slower.
_BY_DEFAULT = ("projection", "gate_up", "head")
# TMA copies whole rows of eight, a program takes 64: fewer or others would have to be padded.
_FEWEST, _MULTIPLE = 64, 8


@dataclasses.dataclass(frozen=True)
class Products:
    """Which matrices' products run as kernels where those can run, and how.

    Attributes:
      fused: of `MATRICES`.
      early: a kernel loads its matrix while the launch before it still ends. Safe where no
        launch writes that matrix: inside a loop of which it is an invariant.
      tilings: (matrix, `Tiling`) of those not to be cut as `best_tiling` says.

    Raises:
      ValueError: for names that are not of `MATRICES`.
    """

    fused: tuple[str, ...] = _BY_DEFAULT
    early: bool = False
    tilings: tuple[tuple[str, Tiling], ...] = ()

    def __post_init__(self):
        for field, names in (("fused", self.fused), ("tilings", dict(self.tilings))):
            if unknown := set(names) - set(MATRICES):
                raise ValueError(f"{field}: {sorted(unknown)} are not of {MATRICES}")

    def options(self, name: str, x: Array, w: Array, *more, **kind) -> dict | None:
        """Of the kernel; None where XLA multiplies. `more`, `kind`: as for `obstacle`."""
        if name not in self.fused or x.shape[0] < _FEWEST or x.shape[0] % _MULTIPLE:
            return None
        if obstacle(x, w, *more, **kind) is not None:
            return None
        return {"early": self.early, "tiling": dict(self.tilings).get(name)}


def project(
    products: Products,
    name: str,
    x: Float[Array, "B D"],
    w: Float[Array, "D E"],
    *,
    norm: bool = False,
    out_dtype: jnp.dtype | None = None,
) -> Float[Array, "B E"]:
    """x w, or normalise(x) w, in the dtype of x if no other is named."""
    out_dtype = out_dtype or x.dtype
    options = products.options(name, x, w, out_dtype=out_dtype)
    if options is None:
        return jnp.dot(normalise(x) if norm else x, w, preferred_element_type=out_dtype)
    from lasad_jax.ops.kernels import decode_product

    norm_eps = NORM_EPSILON if norm else None
    return decode_product.project(x, w, norm_eps=norm_eps, out_dtype=out_dtype, **options)


def project_add(
    products: Products,
    name: str,
    x: Float[Array, "B D"],
    w: Float[Array, "D E"],
    residual: Float[Array, "B E"],
) -> Float[Array, "B E"]:
    """residual + x w."""
    options = products.options(name, x, w, residual)
    if options is None:
        return residual + x @ w
    from lasad_jax.ops.kernels import decode_product

    return decode_product.project_add(x, w, residual, **options)


def swiglu(
    products: Products, name: str, x: Float[Array, "B D"], w: Float[Array, "D both"]
) -> Float[Array, "B F"]:
    """silu(gate) * up of both = normalise(x) w, where w = `interleave`(gate, up)."""
    both, width = w.shape[1], pair_width(w.shape[1] // 2)
    options = None if width != PAIR else products.options(name, x, w, gated=True)
    if options is None:
        pairs = (normalise(x) @ w).reshape(-1, both // (2 * width), 2, width)
        return (jax.nn.silu(pairs[:, :, 0]) * pairs[:, :, 1]).reshape(-1, both // 2)
    from lasad_jax.ops.kernels import decode_product

    return decode_product.swiglu(x, w, norm_eps=NORM_EPSILON, **options)


def normalise(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """To unit mean square over the last axis; the scale is in the next product."""
    x32 = x.astype(jnp.float32)
    factor = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + NORM_EPSILON)
    return (x32 * factor).astype(x.dtype)
