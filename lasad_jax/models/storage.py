"""Along which axis a parameter lies in parts on devices that share it (the mesh's "fsdp" axis).

On GPUs, the first one that can: a part is then one piece of memory, and so is what devices send
each other. Along another, every sum of gradients is written once more before it is sent. On TPUs,
whose memory lies in tiles, the model's width: XLA adds gradients up while it multiplies, and then
reads less.
"""

from collections.abc import Sequence

# The logical axis that stands for parts in rules: of no parameter.
PARTS = "parts"
# A parameter has one of these, or is small.
_WIDTH = "embed"
_REQUIRED = {_WIDTH, "head_dim"}
_POSSIBLE = {_WIDTH, "mlp", "heads", "vocab"}


def stored_axis(
    names: Sequence[str | None],
    shape: Sequence[int],
    devices: Sequence[int],
    parts: int,
    platform: str,
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


def with_parts(
    axes: str | tuple[str, ...] | None, parts: str | tuple[str, ...] | None
) -> str | tuple[str, ...] | None:
    """Axes of a mesh that one of a parameter is split over for computation, then for storage."""
    names = lambda x: () if x is None else (x,) if isinstance(x, str) else tuple(x)
    joined = names(axes) + names(parts)
    return joined[0] if len(joined) == 1 else joined or None
