"""Products of activations with weights, as products of two matrices."""

import jax
from jaxtyping import Array, Float


def product(
    x: Float[Array, "*lead_contracted"], kernel: Float[Array, "*contracted_features"], num: int = 1
) -> Float[Array, "*lead_features"]:
    """x's last `num` axes with the kernel's first, in the kernel's dtype.

    Of more than two axes XLA would transpose whole activations in memory for the kernel's
    gradient.
    """
    lead = x.shape[: x.ndim - num]
    matrix = kernel.reshape(-1, *kernel.shape[num:])
    y = jax.lax.dot_general(
        x.astype(kernel.dtype).reshape(-1, matrix.shape[0]), matrix, (((1,), (0,)), ((), ()))
    )
    return y.reshape(*lead, *kernel.shape[num:])
