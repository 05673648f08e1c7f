"""Where the wall time of a run goes, and how much of the devices' arithmetic it uses."""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
from jaxtyping import Array

from lasad_jax.training.task import Task

PARTS = ("steps", "start", "compilation", "data", "saving", "evaluation")

# Dense bf16 FLOPs per second of a device, by the vendors' data sheets.
_PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}

Result = TypeVar("Result")


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOPs per second of `jax.Device.device_kind`; None for one that is not known."""
    names = [name for name in _PEAK_FLOPS if device_kind.startswith(name)]
    return _PEAK_FLOPS[max(names, key=len)] if names else None


class Goodput:
    """Shares of the wall time: what is in no other part was spent in steps.

    - "start": reading data, restoring or initialising, before the first step;
    - "compilation": the first step's, and what of it was not yet in the cache;
    - "data": the devices had no step left to do, and the next batch was not there yet;
    - "saving": the loop waited for a checkpoint, not the writing in the background;
    - "evaluation": held-out figures, measurements of samples, and pictures.

    Attributes:
      part: what the loop is in.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self.part = "steps"
        self._since, self._begun = dict.fromkeys(PARTS, 0.0), now()
        self._before, self._all_begun = dict.fromkeys(PARTS, 0.0), self._begun
        self._pool, self._done = ThreadPoolExecutor(1, "goodput"), None

    @contextlib.contextmanager
    def spent(self, part: str) -> Iterator[None]:
        """Counts what happens inside as `part`."""
        begun, before, self.part = self._now(), self.part, part
        try:
            yield
        finally:
            self._since[part] += self._now() - begun
            self.part = before

    def dispatched(self, output: Array) -> None:
        """Notes when the device will have computed `output`, of the newest step."""

        def wait() -> float:
            output.block_until_ready()
            return self._now()

        self._done = self._pool.submit(wait)

    def wait_for(self, fetch: Callable[[], Result]) -> Result:
        """fetch(), a batch. As long as the device has a step to do, waiting costs nothing."""
        begun, before, self.part = self._now(), self.part, "data"
        batch = fetch()
        end, self.part = self._now(), before
        if self._done is None:
            self._since["data"] += end - begun
        elif self._done.done() and self._done.exception() is None:
            self._since["data"] += max(0.0, end - max(begun, self._done.result()))
        return batch

    def shares(self) -> dict[str, float]:
        """By part, since the last call; they add up to 1."""
        end = self._now()
        shares = _shares(self._since, end - self._begun)
        for part, seconds in self._since.items():
            self._before[part] += seconds
        self._since, self._begun = dict.fromkeys(PARTS, 0.0), end
        return shares

    def summary(self) -> str:
        """One line on the whole of it."""
        seconds = self._now() - self._all_begun
        total = {part: self._before[part] + self._since[part] for part in PARTS}
        words = [f"{part} {share:.1%}" for part, share in _shares(total, seconds).items()]
        return f"{seconds:.0f} s: " + ", ".join(words)

    def close(self) -> None:
        """Ends the thread that waits for steps."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _shares(spent: dict[str, float], seconds: float) -> dict[str, float]:
    seconds = max(seconds, 1e-9)
    shares = {part: spent[part] / seconds for part in PARTS}
    return shares | {"steps": max(0.0, 1 - sum(shares.values()))}


def flop_utilization(task: Task, images_per_second: float) -> float | None:
    """Share of the devices' peak that the model's own FLOPs take, as PaLM's MFU.

    Args:
      task: whose FLOPs for an image are counted, or not.
      images_per_second: over all devices.

    Returns:
      None where the FLOPs or the devices' peak are not known.
    """
    peak = peak_flops(jax.devices()[0].device_kind)
    if peak is None or task.flops_per_image is None:
        return None
    return task.flops_per_image * images_per_second / (peak * jax.device_count())
