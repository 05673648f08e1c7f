"""How much of a device's time passes in collectives, and how much of that nothing hides."""

import dataclasses
import re
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

# Kernels of NCCL, and XLA's own for small arrays, which have the names of what they do.
_COLLECTIVE = re.compile(
    r"nccl|all[-_]?(reduce|gather|to[-_]?all)|reduce[-_]?scatter|collective", re.IGNORECASE
)
# A GPU's plane also has lines that group kernels by operation, by module and by source.
_PLANE, _LINE = re.compile(r"/device:GPU:\d+"), re.compile(r"Stream ")
_HOST_LEVEL = 1  # the least; what the host does is not read

Spans = Float[np.ndarray, "n 2"]


@dataclasses.dataclass(frozen=True)
class Shares:
    """Of the time from a device's first kernel to the end of its last, means over devices.

    Attributes:
      seconds: that time.
      collectives: share in which a collective runs.
      exposed: share in which collectives run and nothing else does.
    """

    seconds: float
    collectives: float
    exposed: float


def trace_shares(run: Callable[[], None]) -> Shares | None:
    """Runs something, which must wait for its devices, under the profiler.

    Returns:
      None where the profiler tells nothing of kernels, as on a CPU.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level, options.host_tracer_level = 0, _HOST_LEVEL
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            run()
        finally:
            jax.profiler.stop_trace()
        files = list(Path(folder).rglob("*.xplane.pb"))
        return read_shares(jax.profiler.ProfileData.from_file(str(files[0]))) if files else None


def read_shares(trace: jax.profiler.ProfileData) -> Shares | None:
    """Shares of a trace; None if it has no kernels of a GPU."""
    found = []
    for plane in trace.planes:
        if not _PLANE.match(plane.name):
            continue
        kernels = [
            (bool(_COLLECTIVE.search(event.name)), event.start_ns, event.end_ns)
            for line in plane.lines
            if _LINE.match(line.name)
            for event in line.events
        ]
        if kernels:
            found.append(_device_shares(kernels))
    if not found:
        return None
    means = map(statistics.fmean, zip(*map(dataclasses.astuple, found), strict=True))
    return Shares(*means)


def _device_shares(kernels: list[tuple[bool, float, float]]) -> Shares:
    spans = np.array([kernel[1:] for kernel in kernels], np.float64)
    is_collective = np.array([kernel[0] for kernel in kernels])
    whole = spans[:, 1].max() - spans[:, 0].min()
    busy, other = covered(spans), covered(spans[~is_collective])
    return Shares(whole / 1e9, covered(spans[is_collective]) / whole, (busy - other) / whole)


def covered(spans: Spans) -> float:
    """Length of the union of spans (start, end)."""
    if not len(spans):
        return 0.0
    spans = spans[np.argsort(spans[:, 0])]
    # A span adds what reaches beyond all before it.
    reached = np.maximum.accumulate(spans[:, 1])
    before = np.concatenate([spans[:1, 0], reached[:-1]])
    return float(np.maximum(0, spans[:, 1] - np.maximum(spans[:, 0], before)).sum())
