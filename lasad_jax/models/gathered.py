"""Parameters that lie in parts (the mesh's "fsdp" axis), whole where they are used.

Left alone, XLA decides for each use of one how its parts come together: the head's kernel, say,
once for each part of the logits, and those of all layers before the first layer begins. Here a
layer's are sent together, once, while the branch before is computed, and kept for the backward pass
like other things that take a single pass to make again (`ops.keep`).
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PyTree

from lasad_jax.models.operator import mesh_axes, num_devices
from lasad_jax.ops.keep import keep
from lasad_jax.ops.kernels import choice

# The logical axis of parameters that no activation is split along.
_STORED = "embed"
# A zero that is there when something else is.
Moment = Float[Array, ""]


def in_parts(width: int) -> bool:
    """Whether several devices share parameters of this width."""
    return num_devices(_STORED, width) > 1


def moment(x: Float[Array, "B N D"]) -> tuple[Float[Array, "B N D"], Moment]:
    """The same x, to go on with, and the moment when it is there."""
    return jax.lax.optimization_barrier((x, jnp.zeros(())))


def gathered(params: PyTree, axes: PyTree, after: Moment, before: Moment) -> PyTree:
    """Parameters with all of their "embed" axis on every device.

    Args:
      params: in the dtype to be sent. Vectors stay as they are.
      axes: for each a tuple of its axes' logical names.
      after: when they are sent.
      before: when they are used; what the device does in between hides their way. (Nothing is made
        of them earlier: XLA likes to do the same for several layers at once.)
    """

    def whole(x, names):
        parts = [mesh_axes(*axis) for axis in zip(names, x.shape, strict=True)]
        stored = names.index(_STORED) if _STORED in names else None
        if x.ndim == 1 or stored is None or choice.num_devices(parts[stored]) == 1:
            return x
        together = [*parts[:stored], None, *parts[stored + 1 :]]
        sent = _send(x, after, before, PartitionSpec(*together), PartitionSpec(*parts))
        return keep(sent, if_room=True)

    return jax.tree.map(whole, params, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _send(
    x: Array, after: Moment, before: Moment, together: PartitionSpec, parts: PartitionSpec
) -> Array:
    # Held where it lies first, or what made it would be done on all of it everywhere.
    x = jax.lax.with_sharding_constraint(x, parts)
    # Each parameter by itself: of more than two, XLA forgets those whose values nobody takes.
    x, _ = jax.lax.optimization_barrier((x, after))
    x = jax.lax.with_sharding_constraint(x, together)
    x, _ = jax.lax.optimization_barrier((x, before))
    return x


def _send_back(together, parts, _, gradient):
    # Added up where the parameter lies.
    return jax.lax.with_sharding_constraint(gradient, parts), None, None


_send.defvjp(lambda *args: (_send(*args), None), _send_back)
