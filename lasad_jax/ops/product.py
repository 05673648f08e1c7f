"""Products of activations with weights, as products of two matrices."""

import math

import jax
from jaxtyping import Array, Float

from lasad_jax.ops.kernels import choice
from lasad_jax.ops.kernels.choice import Axes


def product(
    x: Float[Array, "*lead_contracted"],
    kernel: Float[Array, "*contracted_features"],
    num: int = 1,
    feature_axes: Axes = None,
) -> Float[Array, "*lead_features"]:
    """x's last `num` axes with the kernel's first, in the kernel's dtype.

    As a product of two matrices: of more axes XLA would transpose whole activations in memory for
    the kernel's gradient. On GPUs that is one too, or XLA would write it transposed; but where a
    feature's axis is split over devices, XLA would then gather activations, and a TPU would lay
    them out anew.

    Args:
      x, kernel: the factors.
      num: how many axes are contracted.
      feature_axes: axes of the current mesh, if there is one, over which one of the kernel's other
        axes is split.
    """
    features, num_inputs = kernel.shape[num:], math.prod(kernel.shape[:num])
    rows = x.astype(kernel.dtype).reshape(-1, num_inputs)
    if choice.num_devices(feature_axes) == 1 and choice.device().platform != "tpu":
        y = _multiply(rows, kernel.reshape(num_inputs, -1))
    else:
        y = jax.lax.dot_general(
            rows, kernel.reshape(num_inputs, *features), (((1,), (0,)), ((), ()))
        )
    return y.reshape(*x.shape[: x.ndim - num], *features)


@jax.custom_vjp
def _multiply(x: Float[Array, "M K"], matrix: Float[Array, "K N"]) -> Float[Array, "M N"]:
    return jax.lax.dot_general(x, matrix, (((1,), (0,)), ((), ())))


_multiply.defvjp(
    lambda x, matrix: (_multiply(x, matrix), (x, matrix)),
    lambda factors, d_out: (d_factor(d_out, factors[1]), d_kernel(factors[0], d_out)),
)


def d_factor(
    d_out: Float[Array, "*lead D"], kernel: Float[Array, "*contracted D"]
) -> Float[Array, "*lead_contracted"]:
    """The gradient with respect to h of `product(h, kernel, kernel.ndim - 1)`."""
    d_h = jax.lax.dot_general(
        d_out.reshape(-1, kernel.shape[-1]),
        kernel.reshape(-1, kernel.shape[-1]),
        (((1,), (1,)), ((), ())),
    )
    return d_h.reshape(*d_out.shape[:-1], *kernel.shape[:-1])


def d_kernel(
    h: Float[Array, "*lead_contracted"], d_out: Float[Array, "*lead D"]
) -> Float[Array, "*contracted D"]:
    """The gradient with respect to the kernel, in its own dtype: half the bytes of float32 to add
    up over devices."""
    contracted, features = h.shape[d_out.ndim - 1 :], d_out.shape[-1]
    d_out = d_out.reshape(-1, features)
    matrix = jax.lax.dot_general(h.reshape(len(d_out), -1), d_out, (((0,), (0,)), ((), ())))
    return matrix.reshape(*contracted, features)
