"""Functions of numbers, many as a GPU's own instructions, for kernels that issue little else."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Instructions:
    """Functions whose error is a few units in the last place of float32.

    What the compiler makes of them also serves numbers near the ends of float32, at three to
    eight times the instructions; here small results are flushed to 0.

    Attributes:
      interpret: whether there is no GPU: then they are JAX's own.
    """

    interpret: bool

    def exp(self, x: Float[Array, "*S"]) -> Float[Array, "*S"]:
        return self._one("ex2", jnp.exp2, x * math.log2(math.e))

    def rsqrt(self, x: Float[Array, "*S"]) -> Float[Array, "*S"]:
        return self._one("rsqrt", lax.rsqrt, x)

    def sigmoid(self, x: Float[Array, "*S"]) -> Float[Array, "*S"]:
        return self._one("rcp", lambda x: 1 / x, 1 + self.exp(-x))

    def silu(self, x: Float[Array, "*S"]) -> Float[Array, "*S"]:
        return x * self.sigmoid(x)

    def silu_slope(self, x: Float[Array, "*S"]) -> Float[Array, "*S"]:
        s = self.sigmoid(x)
        return s + x * s * (1.0 - s)

    def softplus(self, x: Float[Array, "*S"]) -> Float[Array, "*S"]:
        """Exact to 1e-7, not relatively: for values that are added to others."""
        log2 = self._one("lg2", jnp.log2, 1 + self.exp(-jnp.abs(x)))
        return jnp.maximum(x, 0.0) + math.log(2) * log2

    def fma(self, x, y, total: Float[Array, "*S"]) -> Float[Array, "*S"]:
        """x * y + total, where the compiler would make a multiply and an add of it."""
        if self.interpret:
            return x * y + total
        (out,) = plgpu.elementwise_inline_asm(
            "fma.rn.f32 $0, $1, $2, $3;",
            args=[jnp.broadcast_to(z, total.shape) for z in (x, y, total)],
            constraints="=f,f,f,f",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(total.shape, jnp.float32)],
        )
        return out

    def _one(self, name: str, plain, x: Array) -> Array:
        if self.interpret:
            return plain(x)
        if not x.shape:
            # The compiler knows no tensor without axes.
            return jnp.sum(self._one(name, plain, x[None]))
        (out,) = plgpu.elementwise_inline_asm(
            f"{name}.approx.ftz.f32 $0, $1;",
            args=[x],
            constraints="=f,f",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
        )
        return out


def rotate(x: Float[Array, "R W"], turn, *, back: bool = False) -> Float[Array, "R W"]:
    """Each pair (2i, 2i + 1) turned by its angle, or by minus it; `turn` is `pairs` of cosines and
    sines, or None."""
    if turn is None:
        return x
    (cos, sin), (even, odd) = turn, pairs(x)
    sin = -sin if back else sin
    halves = (even * cos - odd * sin, odd * cos + even * sin)
    return lax.concatenate([half[..., None] for half in halves], 2).reshape(x.shape)


def pairs(x: Float[Array, "R W"]) -> list[Float[Array, "R P"]]:
    """Even and odd channels, which lie in the same thread's registers."""
    rows, width = x.shape
    halves = lax.split(x.reshape(rows, width // 2, 2), (1, 1), axis=2)
    return [half.reshape(rows, width // 2) for half in halves]
