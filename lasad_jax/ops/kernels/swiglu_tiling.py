"""How the products of a SwiGLU are cut into programs for a Hopper GPU (`swiglu_mosaic`)."""

import dataclasses

import jax
import jax.numpy as jnp

from lasad_jax.ops.kernels.choice import device, is_hopper

SIDE = 64  # of the square tiles in which numbers come and go; gate and up alternate by as many
ROWS, COLUMNS = 128, 128  # of what a program multiplies at a time
FINISHERS = ROWS // SIDE
_FEWEST_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What a program does at the same time.

    Attributes:
      stages: steps of 64 channels that are loaded, or on their way.
      multipliers: warpgroups that share the rows of a tile, 1 or 2.
      cluster: programs below one another that share the matrix they load, 1 or 2.
      band: tiles down the rows before the next columns.
    """

    stages: int
    multipliers: int = 1
    cluster: int = 1
    band: int = 1
    profile: str = ""

    @property
    def warpgroups(self) -> int:
        return self.multipliers + FINISHERS + 1

    @property
    def registers(self) -> tuple[int, int, int]:
        """Of a thread that loads, multiplies, finishes."""
        return {1: (24, 208, 136), 2: (24, 96, 128)}[self.multipliers]


def obstacle(num_rows: int, D: int, F: int, dtype) -> str | None:
    """Why the products cannot run, or not well, on this device; None if they can.

    Args:
      num_rows, D, F: rows, channels and hidden channels of one device.
    """
    where = device()
    if jax.__version_info__ < (0, 11):
        return f"it needs jax 0.11 or later, not {jax.__version__}"
    if where.platform not in ("gpu", "cuda") or not is_hopper(where):
        return f"it needs a Hopper GPU (H100, H200), not {where.kind} ({where.platform})"
    if dtype != jnp.bfloat16:
        return f"it takes bfloat16, not {dtype}"
    if D % SIDE or F % SIDE or F < COLUMNS or not D:
        return f"it takes channels in multiples of {SIDE}, not {D} and {F}"
    if num_rows < _FEWEST_ROWS:
        return f"it takes at least {_FEWEST_ROWS} rows, not {num_rows}"
    return None
