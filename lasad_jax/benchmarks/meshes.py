"""Which training steps are timed on several devices: generator, mesh, number of devices, flags."""

import dataclasses

from lasad_jax.benchmarks.generators import GeneratorCase
from lasad_jax.benchmarks.tables import check_known
from lasad_jax.benchmarks.train_rows import run_config
from lasad_jax.config import Config, MeshConfig

MESHES = {
    "data": MeshConfig(),
    "fsdp": MeshConfig(data=1, fsdp=-1),
    "data2-fsdp": MeshConfig(data=2, fsdp=-1),
    "tensor2": MeshConfig(tensor=2),
}
# On fewer devices these meshes are others of the same table.
_LEAST_DEVICES = {"data": 1, "fsdp": 1, "data2-fsdp": 4, "tensor2": 2}
# These are timed on each number of devices, mixed ones on the most alone.
_PURE = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class Run:
    """A training step on several devices.

    Attributes:
      case: the generator; its batch is that of one device.
      mesh: of `MESHES`.
      devices: their number.
      flags: name of the compiler's flags; "" for none.
    """

    case: GeneratorCase
    mesh: str
    devices: int
    flags: str = ""

    @property
    def config(self) -> Config:
        """As `lasad_jax.train` would be given it."""
        batch = self.case.batch * self.devices
        config = run_config(dataclasses.replace(self.case, batch=batch), "lasad")
        return dataclasses.replace(config, mesh=MESHES[self.mesh])

    @property
    def label(self) -> dict:
        """Fields of its row that say what it is."""
        return {
            "run": f"{self.case}/{self.mesh}",
            "devices": self.devices,
            "flags": self.flags,
        }

    @property
    def alone(self) -> "Run":
        """The same batch on one device: what this run is measured by."""
        return Run(self.case, "data", 1)


def parse_runs(texts: list[str], counts: list[int], flags: list[str]) -> list[Run]:
    """Every run once, one device before several.

    Args:
      texts: SIZE:BxRxC/MESH each, with B images on a device.
      counts: numbers of devices, rising.
      flags: names of compiler flags, with each of which data and fsdp meshes of all devices are
        run once more, after all others.

    Raises:
      ValueError: for what cannot be read.
    """
    runs, again = [], []
    for text in texts:
        words, _, mesh = text.partition("/")
        case = GeneratorCase.parse(words, "runs")
        check_known("runs", [mesh], tuple(MESHES))
        chosen = counts if mesh in _PURE else counts[-1:]
        runs.append(Run(case, "data", 1))
        for devices in chosen:
            if devices > 1 and devices >= _LEAST_DEVICES[mesh]:
                runs.append(Run(case, mesh, devices))
        if counts[-1] > 1 and mesh in _PURE:
            again += [Run(case, mesh, counts[-1], name) for name in flags]
    return list(dict.fromkeys([*runs, *again]))


def parse_flags(texts: list[str]) -> dict[str, dict[str, bool | int | str]]:
    """XLA's flags by the names that they are given.

    Args:
      texts: NAME:FLAG=VALUE,FLAG=VALUE each.

    Raises:
      ValueError: for what cannot be read.
    """
    found = {}
    for text in texts:
        name, _, words = text.partition(":")
        pairs = [word.removeprefix("--").partition("=") for word in words.split(",")]
        if not name or not all(flag and value for flag, _, value in pairs):
            raise ValueError(f"xla: expected NAME:FLAG=VALUE,FLAG=VALUE, got {text!r}")
        found[name] = {flag: _value(value) for flag, _, value in pairs}
    return found


def _value(text: str) -> bool | int | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if text.isdigit() else text
