"""What a device's time goes to, from a trace of its kernels: collectives, each kernel, nothing."""

import collections
import dataclasses
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
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
# XLA numbers what it makes: fusions that differ in this alone do alike.
_NUMBER = re.compile(r"(_\d+)+$")
# After a pause a card is faster than in a long run, for which it lowers its clock.
_TRACED_SECONDS, _FEWEST_CALLS = 1.0, 3

Spans = Float[np.ndarray, "n 2"]


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What ran on one device.

    Attributes:
      names: of the kernels.
      spans: start and end of each, in nanoseconds.
    """

    names: list[str]
    spans: Spans

    @property
    def whole(self) -> float:
        """Nanoseconds from the first kernel to the end of the last."""
        return float(self.spans[:, 1].max() - self.spans[:, 0].min())


@dataclasses.dataclass(frozen=True)
class Shares:
    """Of the time from a device's first kernel to the end of its last, means over devices.

    Attributes:
      seconds: that time.
      compute: share in which anything but a collective runs.
      collectives: share in which a collective runs.
      exposed: share in which collectives run and nothing else does.
    """

    seconds: float
    compute: float
    collectives: float
    exposed: float


def trace_calls(function: Callable, input_sets: Sequence[tuple]) -> tuple[list[Kernels], int]:
    """Traces calls for about a second, sent off one after another with inputs that take turns.

    Args:
      function: called as function(*input_set); compiled and called before.
      input_sets: arguments that differ in their values only.

    Returns:
      What ran on each device, as `trace_kernels`, and the number of calls: none where the
      profiler would tell nothing.
    """
    if jax.default_backend() != "gpu":
        return [], 0
    start = time.perf_counter()
    jax.block_until_ready(function(*input_sets[0]))
    seconds = time.perf_counter() - start
    count = max(_FEWEST_CALLS, math.ceil(_TRACED_SECONDS / seconds))

    def calls():
        jax.block_until_ready([function(*input_sets[i % len(input_sets)]) for i in range(count)])

    return trace_kernels(calls), count


def trace_kernels(run: Callable[[], None]) -> list[Kernels]:
    """Runs something, which must wait for its devices, under the profiler.

    Returns:
      What ran on each GPU; nothing where the profiler tells nothing of kernels, as on a CPU.
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
        return read_kernels(jax.profiler.ProfileData.from_file(str(files[0]))) if files else []


def read_kernels(trace: jax.profiler.ProfileData) -> list[Kernels]:
    """The kernels of each GPU of a trace that has any."""
    found = []
    for plane in trace.planes:
        if not _PLANE.match(plane.name):
            continue
        events = [e for line in plane.lines if _LINE.match(line.name) for e in line.events]
        if events:
            spans = np.array([(event.start_ns, event.end_ns) for event in events], np.float64)
            found.append(Kernels([event.name for event in events], spans))
    return found


def shares(devices: Sequence[Kernels]) -> Shares:
    """What part of the time passes in collectives and in all else."""
    means = map(statistics.fmean, zip(*map(_device_shares, devices), strict=True))
    return Shares(*means)


def _device_shares(kernels: Kernels) -> tuple[float, ...]:
    spans, whole = kernels.spans, kernels.whole
    is_collective = np.array([bool(_COLLECTIVE.search(name)) for name in kernels.names])
    busy, other = covered(spans), covered(spans[~is_collective])
    collectives = covered(spans[is_collective])
    return whole / 1e9, other / whole, collectives / whole, (busy - other) / whole


def by_name(kernels: Kernels, calls: int) -> list[dict]:
    """What each kernel takes of a device's time, the longest first.

    Args:
      kernels: that ran on it.
      calls: in which they did.

    Returns:
      "kernel", its "launches" and "seconds" for one call, and its "share" of all the time; then
      the same of the time in which no kernel runs, whose "kernel" is "none". Kernels that run
      at the same time count each.
    """
    seconds, launches = collections.Counter(), collections.Counter()
    for name, (start, end) in zip(kernels.names, kernels.spans, strict=True):
        name = _NUMBER.sub("", name)
        seconds[name] += float(end - start) / 1e9
        launches[name] += 1
    whole = kernels.whole / 1e9
    rows = [(name, launches[name], taken) for name, taken in seconds.most_common()]
    rows.append(("none", 0, whole - covered(kernels.spans) / 1e9))
    return [
        {"kernel": name, "launches": n / calls, "seconds": taken / calls, "share": taken / whole}
        for name, n, taken in rows
    ]


def covered(spans: Spans) -> float:
    """Length of the union of spans (start, end)."""
    if not len(spans):
        return 0.0
    spans = spans[np.argsort(spans[:, 0])]
    # A span adds what reaches beyond all before it.
    reached = np.maximum.accumulate(spans[:, 1])
    before = np.concatenate([spans[:1, 0], reached[:-1]])
    return float(np.maximum(0, spans[:, 1] - np.maximum(spans[:, 0], before)).sum())
