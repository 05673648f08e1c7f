"""Time of one call among many."""

import math
import time
from collections.abc import Callable, Sequence

import jax

# So many different inputs take turns that no cache holds the next one.
NUM_SETS = 3
# A timing goes on for about as long, so that the wait at its end does not count. Not on a
# CPU, where calls need not end in the order they were made.
MIN_SECONDS = 0.02


def seconds_per_call(
    function: Callable,
    input_sets: Sequence[tuple],
    *,
    repeats: int,
    min_seconds: float = 0.0,
    wait: Callable = jax.block_until_ready,
) -> list[float]:
    """Seconds of one call, once for each repeat.

    All input sets are sent off one after another and waited for once, as a training step
    keeps a device busy; the first round compiles and warms up and is not timed.

    Args:
      function: called as function(*input_set).
      input_sets: arguments that differ in their values only.
      repeats: how many times to measure.
      min_seconds: rounds over the sets go on for about as long before the wait. A device
        that runs its calls in order is done when the last round is.
      wait: returns when everything in a list of results is there.
    """

    def rounds(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            results = [function(*inputs) for inputs in input_sets]
        wait(results)
        return time.perf_counter() - start

    rounds(1)
    count = max(1, math.ceil(min_seconds / rounds(1)))
    return [rounds(count) / (count * len(input_sets)) for _ in range(repeats)]


def seconds_in_one_program(
    function: Callable, input_sets: Sequence[tuple], *, repeats: int, min_seconds: float = 0.0
) -> list[float]:
    """Like `seconds_per_call`, with a round over the input sets compiled as one program.

    The host then sends off a whole round at once, as a CUDA graph does, and as a training step
    holds many calls. Sent one by one, fused calls of 40 microseconds wait for the host.
    """
    together = jax.jit(lambda *sets: [function(*inputs) for inputs in sets])
    runs = seconds_per_call(together, [tuple(input_sets)], repeats=repeats, min_seconds=min_seconds)
    return [run / len(input_sets) for run in runs]
