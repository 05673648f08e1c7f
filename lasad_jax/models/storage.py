"""Along which axis a parameter lies in parts on devices that share it (the mesh's "fsdp" axis).

On GPUs, the first one that can: a part is then one piece of memory, and so is what devices send
each other. Along another, every sum of gradients is written once more before it is sent. On TPUs,
whose memory lies in tiles, the model's width: XLA adds gradients up while it multiplies, and then
reads less.
"""

from collections.abc import Callable, Sequence

from jax.sharding import PartitionSpec

Axes = str | tuple[str, ...] | None

# The logical axis that stands for parts in rules: of no parameter.
PARTS = "parts"
# A parameter has one of these, or is small.
_WIDTH = "embed"
_REQUIRED = {_WIDTH, "head_dim"}
_POSSIBLE = {_WIDTH, "mlp", "heads", "vocab"}


def stored_spec(
    names: Sequence[str | None],
    shape: Sequence[int],
    split: Sequence[Axes],
    parts: Axes,
    num_devices: Callable[[Axes], int],
    platform: str | None,
) -> PartitionSpec:
    """How a parameter is stored on a mesh.

    Args:
      names: of its axes.
      shape: their sizes.
      split: axes of the mesh that each is split over for computation.
      parts: those whose devices share parameters.
      num_devices: along axes of the mesh.
      platform: of the devices.
    """
    spec, devices = list(split), [num_devices(axes) for axes in split]
    axis = stored_axis(names, shape, devices, num_devices(parts), platform)
    if axis is not None:
        spec[axis] = with_parts(spec[axis], parts)
    return PartitionSpec(*spec)


def stored_axis(
    names: Sequence[str | None],
    shape: Sequence[int],
    devices: Sequence[int],
    parts: int,
    platform: str | None,
) -> int | None:
    """Which axis of a parameter is stored in so many parts; None if it is stored whole.

    Args:
      names: of its axes.
      shape: their sizes.
      devices: over how many each is split for computation.
      parts: how many are wanted.
      platform: of the devices.
    """
    if _REQUIRED.isdisjoint(names):
        return None
    possible = {_WIDTH} if platform == "tpu" else _POSSIBLE
    axes = enumerate(zip(names, shape, devices, strict=True))
    can = (i for i, (name, n, d) in axes if name in possible and n % (d * parts) == 0)
    return next(can, None)


def with_parts(axes: Axes, parts: Axes) -> Axes:
    """Axes of a mesh that one of a parameter is split over for computation, then for storage."""
    joined = axis_names(axes) + axis_names(parts)
    return joined[0] if len(joined) == 1 else joined or None


def axis_names(axes: Axes) -> tuple[str, ...]:
    """However many they are."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
