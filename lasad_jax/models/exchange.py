"""What devices that share parameters send each other of a layer's kernels, and when: their parts,
forward, and sums of gradients, backward.

Left alone, XLA decides for each use of a kernel in parts (the mesh's "fsdp" axis) how these come
together: the head's, say, once for each part of the logits, and those of all layers before the
first layer begins; and it adds gradients up behind the whole backward pass, to where it holds all
of them. Here a layer's kernels are sent together, once, while the branch before is computed, and
kept for the backward pass like other things that take a single pass to make again (`ops.keep`).
Backward, a layer's gradients are added up while the branch before takes its own.
"""

import functools

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lasad_jax.models.operator import mesh_axes
from lasad_jax.models.storage import PARTS, stored_spec
from lasad_jax.ops.keep import keep
from lasad_jax.ops.kernels import choice

# Arrays as they are multiplied, and the logical names of their axes.
Named = dict[str, tuple[Array, tuple[str | None, ...]]]
Kernels = dict[str, Array]
_Specs = tuple[tuple[str, PartitionSpec], ...]


def exchanged(
    x: Float[Array, "B N D"], branch: Float[Array, "B N D"], kernels: Named
) -> tuple[Float[Array, "B N D"], Float[Array, "B N D"], Kernels]:
    """The same tokens to go on with, and kernels, all parts of them on every device.

    Args:
      x: tokens that are there a while before the branch, and needed a while after it. Once x is
        there, the kernels are sent; backward, x waits for the sums of their gradients.
      branch: tokens that are used together with the kernels, which no one makes anything of before.
        (XLA likes to do the same for several layers at once.)
      kernels: what is read next, in the dtype to be sent, which is the branch's but for small ones:
        nobody waits for their sums, which would be an exchange of their own.
    """
    arrays = {name: kernel for name, (kernel, _) in kernels.items()}
    if choice.num_devices(_parts()) == 1:
        return x, branch, arrays
    parts, together = _specs(kernels, in_parts=True), _specs(kernels, in_parts=False)
    awaited = tuple(name for name, kernel in arrays.items() if kernel.dtype == branch.dtype)
    # Held where they lie, or what made them would be done on all of them everywhere.
    x, arrays = _once_there(x, _hold(arrays, parts), awaited)
    branch, arrays = _wait(branch, _gather(arrays, together, parts))
    return x, branch, keep(arrays, if_room=True)


def sums_are_ours(images: choice.Axes) -> bool:
    """Whether gradients of tables that XLA would add up in float32, the embedding's and the head's,
    are rounded first and added up by ourselves.

    Not on TPUs whose tables lie in parts of their width: XLA adds these up while it multiplies, and
    looks up a part of every image's rows, instead of all parts of some.

    Args:
      images: axes of the mesh that they are split over.
    """
    in_parts = choice.num_devices(_parts()) > 1
    left_to_xla = in_parts and choice.device().platform == "tpu"
    return choice.num_devices(images) > 1 and not left_to_xla


def _specs(kernels: Named, in_parts: bool) -> _Specs:
    """How kernels lie on the mesh."""

    spec = spec_in_parts if in_parts else lambda *axes: PartitionSpec(*_split(*axes))
    return tuple((name, spec(axes, kernel.shape)) for name, (kernel, axes) in kernels.items())


def spec_in_parts(names: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """How a parameter with these names and sizes of axes is stored on the current mesh."""
    platform = choice.device().platform
    return stored_spec(names, shape, _split(names, shape), _parts(), choice.num_devices, platform)


def _split(names, shape):
    """What each axis is split over for computation."""
    return [mesh_axes(name, size) for name, size in zip(names, shape, strict=True)]


def _parts() -> choice.Axes:
    """Axes of the mesh whose devices share parameters."""
    return mesh_axes(PARTS, 0)  # Whether they divide a size is asked of each parameter.


# A barrier holds back nobody for what only it takes: XLA drops that. What waits here is all used.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _once_there(x: Array, kernels: Kernels, awaited: tuple[str, ...]) -> tuple[Array, Kernels]:
    """x, and kernels that are sent once x is there."""
    return jax.lax.optimization_barrier((x, kernels))


def _once_added(awaited, _, gradients):
    d_x, d_kernels = gradients
    waiting = {name: d_kernels[name] for name in awaited}
    d_x, waiting = jax.lax.optimization_barrier((d_x, waiting))
    return d_x, d_kernels | waiting


_once_there.defvjp(lambda *args: (_once_there(*args), None), _once_added)


def _hold(kernels: Kernels, specs: _Specs) -> Kernels:
    return {name: jax.lax.with_sharding_constraint(kernels[name], spec) for name, spec in specs}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(kernels: Kernels, together: _Specs, parts: _Specs) -> Kernels:
    """Whole kernels, whose gradients are added up where the parts lie."""
    return _hold(kernels, together)


_gather.defvjp(
    lambda kernels, together, parts: (_gather(kernels, together, parts), None),
    lambda together, parts, _, d_kernels: (_hold(d_kernels, parts),),
)


@jax.custom_vjp
def _wait(branch: Array, kernels: Kernels) -> tuple[Array, Kernels]:
    """The same; neither is used before the other is there. Their gradients do not wait."""
    return jax.lax.optimization_barrier((branch, kernels))


_wait.defvjp(lambda *args: (_wait(*args), None), lambda _, gradients: gradients)
