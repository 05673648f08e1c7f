"""Whether a run fits a machine, how many images fit at most, and what bounds its speed."""

import dataclasses
from collections.abc import Callable

from lasad_jax.planning.chips import Chip, usable_memory
from lasad_jax.planning.compiling import OutOfMemoryError, Step

BOUNDS = ("compute", "memory bandwidth", "interconnect")
# Memory counts as full from this share on, and batches as neighbours up to this difference.
_FULL, _CLOSE = 0.9, 0.1


def least_seconds(step: Step, chip: Chip) -> dict[str, float]:
    """The least time that each of `BOUNDS` takes of a step, were it all there is."""
    sent = sum(collective.sent for collective in step.collectives)
    times = (step.flops / chip.flops, (step.traffic or 0.0) / chip.bandwidth, sent / chip.link)
    return dict(zip(BOUNDS, times, strict=True))


def bottleneck(step: Step, chip: Chip) -> str:
    """The one of `BOUNDS` that takes longest; where traffic to memory is not known, perhaps two."""
    times = least_seconds(step, chip)
    longest = max(times, key=times.get)
    if step.traffic is None and longest == "compute":
        return "compute or memory bandwidth"
    return longest


def fits(step: Step, chip: Chip) -> bool:
    """Whether the memory that JAX gives to programs is enough."""
    return step.memory.total <= usable_memory(chip)


@dataclasses.dataclass(frozen=True)
class Largest:
    """The most images per device that were found to fit.

    Attributes:
      step: with them; None if not even the fewest tried fit.
      too_many: the fewest that were found not to fit; None if none.
      tries: steps that were measured to find out.
    """

    step: Step | None
    too_many: int | None
    tries: int


def find_largest(
    measure: Callable[[int], Step],
    chip: Chip,
    first: int | Step,
    *,
    most_tries: int = 4,
) -> Largest:
    """Searches the largest batch per device that fits.

    Memory grows almost in a line with the batch: where two measured steps say that it meets the
    limit comes next; between a batch that fits and one that does not, at worst the middle. The
    search ends when memory is full to 90 % or the two differ by a tenth.

    Args:
      measure: from images per device to a step; may raise `OutOfMemoryError`.
      chip: the device.
      first: images per device to begin with, or their step if it has been measured.
      most_tries: steps to measure.

    Returns:
      what was found within the tries.
    """
    limit, steps, needs, tries = usable_memory(chip), {}, {}, 0
    if isinstance(first, Step):
        steps[first.batch] = first
        needs[first.batch] = first.memory.total
    batch = None if steps else first
    while True:
        if batch is not None:
            tries += 1
            try:
                steps[batch] = measure(batch)
                needs[batch] = steps[batch].memory.total
            except OutOfMemoryError as error:
                needs[batch] = max(error.needed or 0.0, 1.01 * limit)
        low = max((b for b, need in needs.items() if need <= limit), default=0)
        high = min((b for b, need in needs.items() if need > limit), default=None)
        full = low and needs[low] >= _FULL * limit
        close = high is not None and high - low <= max(1, _CLOSE * high)
        if full or close or tries == most_tries:
            return Largest(steps.get(low), high, tries)
        batch = _next_batch(steps, needs, limit, low, high)


def _next_batch(
    steps: dict[int, Step], needs: dict[int, float], limit: float, low: int, high: int | None
) -> int:
    if len(needs) > 1:
        (b0, n0), (b1, n1) = sorted(sorted(needs.items(), key=lambda x: abs(x[1] - limit))[:2])
        slope = (n1 - n0) / (b1 - b0)
        guess = b1 + (limit - n1) / slope if slope > 0 else 2 * b1
    elif steps:
        # Temporaries alone grow with the batch.
        ((batch, step),) = steps.items()
        fixed = step.memory.total - step.memory.temporaries
        guess = batch * (limit - fixed) / step.memory.temporaries
    else:
        guess = high * limit / needs[high]
    guess = round_batch(guess)
    if high is None:
        more = guess if guess > low else max(round_batch(1.25 * low), low + 1)
        return min(more, 32 * low)
    return guess if low < guess < high else max(low + 1, (low + high) // 2)


def round_batch(batch: float) -> int:
    """Down to four binary digits: 16, 18, 20, ..., 32, 36, 40, ..."""
    batch = max(1, int(batch))
    unit = 1 << max(0, batch.bit_length() - 4)
    return batch // unit * unit
