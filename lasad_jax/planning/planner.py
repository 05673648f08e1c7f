"""A run on a machine: measured by its compiler where there is one, else by arithmetic."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator

from lasad_jax.config import Config, RunConfig
from lasad_jax.models import count_parameters
from lasad_jax.planning.arithmetic import estimate_step, mesh_of
from lasad_jax.planning.chips import usable_memory
from lasad_jax.planning.compiling import OutOfMemoryError, Step, compile_step
from lasad_jax.planning.plans import Largest, bottleneck, find_largest, fits, least_seconds
from lasad_jax.planning.topologies import Topology, can_compile
from lasad_jax.training.sharding import batch_parts


@dataclasses.dataclass(frozen=True)
class Plan:
    """Attributes:
    config: of the run.
    topology: the machine.
    mesh: sizes of its axes.
    step: what a step takes; None if the compiler refused it for memory.
    needed: bytes that it then says were needed, if it does.
    largest: the most images per device that fit; None if not asked for.
    """

    config: Config
    topology: Topology
    mesh: dict[str, int]
    step: Step | None
    needed: float | None
    largest: Largest | None

    @property
    def batch(self) -> int:
        """Images per device, or group of devices that share them."""
        return self.config.batch_size // batch_parts(mesh_of(self.config.mesh, self.topology))

    @property
    def fits(self) -> bool:
        return self.step is not None and fits(self.step, self.topology.chip)

    def row(self) -> dict:
        """All numbers, to be stored as JSON."""
        chip = self.topology.chip
        row = {
            "topology": self.topology.name,
            "chip": dataclasses.asdict(chip),
            "devices": self.topology.num_devices,
            "mesh": self.mesh,
            "parameters": count_parameters(self.config.model),
            "batch_size": self.config.batch_size,
            "usable_memory": usable_memory(chip),
            "fits": self.fits,
            "batch": self.batch,
            "needed": self.needed,
            "step": self._numbers(self.step),
        }
        if self.largest is not None:
            row["largest"] = {
                "step": self._numbers(self.largest.step),
                "too_many": self.largest.too_many,
                "tries": self.largest.tries,
            }
        return row

    def _numbers(self, step: Step | None) -> dict | None:
        if step is None:
            return None
        chip = self.topology.chip
        times = least_seconds(step, chip)
        parts = self.config.batch_size // self.batch
        return dataclasses.asdict(step) | {
            "bytes": step.memory.total,
            "least_seconds": times,
            "bottleneck": bottleneck(step, chip),
            "most_images_per_second": step.batch * parts / max(times.values()),
        }


def make_plan(
    config: RunConfig,
    topology: Topology,
    *,
    compiled: bool | None = None,
    search: bool = True,
    most_tries: int = 4,
) -> Plan:
    """Plans a run.

    Args:
      config: of a generator.
      topology: the machine.
      compiled: whether to compile; by default where the compiler is installed.
      search: for the largest batch, too.
      most_tries: batches to try for it.

    Raises:
      ValueError: for another run than a generator's, a mesh or batch that does not divide, or a
        step that does not compile.
      ImportError: if it is to be compiled and the compiler is not installed.
    """
    if not isinstance(config, Config):
        raise ValueError("config: a tokenizer's; plans are made for generators")
    mesh = mesh_of(config.mesh, topology)
    parts, chip = batch_parts(mesh), topology.chip
    if can_compile(topology) if compiled is None else compiled:
        devices = topology.devices()
        step_of = lambda config: compile_step(config, devices)
    else:
        step_of = lambda config: estimate_step(config, topology)

    def measure(batch: int) -> Step:
        with _said(f"{topology.name}: {batch} images per device"):
            return step_of(dataclasses.replace(config, batch_size=batch * parts))

    step, needed, largest, first = None, None, None, config.batch_size // parts
    try:
        with _said(f"{topology.name}: {first} images per device"):
            step = step_of(config)
    except OutOfMemoryError as error:
        needed = error.needed
    if search and config.optimizer.accumulate == 1:
        begin = step or max(1, first // 2)
        largest = find_largest(measure, chip, begin, most_tries=most_tries)
    return Plan(config, topology, dict(mesh.shape), step, needed, largest)


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    """Says on the error stream what takes so long, and how long it took."""
    start = time.monotonic()
    print(f"{what} ...", end=" ", file=sys.stderr, flush=True)
    try:
        yield
    except OutOfMemoryError:
        print("do not fit,", end=" ", file=sys.stderr)
        raise
    finally:
        print(f"{time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
