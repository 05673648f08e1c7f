"""What every benchmark command shares: its flags, the device's limits, the file of numbers."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from absl import flags

import lasad_jax
from lasad_jax.benchmarks.limits import copy_bytes_per_second
from lasad_jax.benchmarks.tables import one_line
from lasad_jax.files import whole_file

OUT = flags.DEFINE_string("out", None, "Folder for the numbers (JSON) and the plots (PNG).")
REPEATS = flags.DEFINE_integer(
    "repeats", None, "Timings of each, of which the median counts; by command if unset.", 1
)
_COPY = flags.DEFINE_integer("copy_megabytes", None, "Size of the copy; by device if unset.", 1)
_REPEATS_ON_CPU = 3
_COPY_ON = {"cpu": 64, "accelerator": 2048}


def or_skip(what: str, part: Callable, *arguments) -> None:
    """Runs a part; one that fails leaves a line, and the others go on."""
    try:
        part(*arguments)
    except Exception as error:
        print(f"\nskipped: {what}: {one_line(error)}", flush=True)


def on_cpu() -> bool:
    """Whether defaults have to be small."""
    return jax.default_backend() == "cpu"


class Results(dict):
    """All numbers of a command, as its JSON file holds them.

    It begins with the device, the versions, how timings are taken and the speed of a copy.
    """

    def __init__(self, name: str, *, repeats: int, min_seconds: float):
        """
        Args:
          name: of the command and its files.
          repeats, min_seconds: as in `timing.seconds_per_call`, unless the flag says
            otherwise; on a CPU three and none.
        """
        self._name = name
        self.how = {
            "repeats": REPEATS.value or (_REPEATS_ON_CPU if on_cpu() else repeats),
            "min_seconds": 0.0 if on_cpu() else min_seconds,
        }
        megabytes = _COPY.value or _COPY_ON["cpu" if on_cpu() else "accelerator"]
        # Its own rounds are short: a copy of gigabytes takes about a millisecond.
        copies = copy_bytes_per_second(
            megabytes * 2**20, **self.how | {"min_seconds": min(0.02, self.how["min_seconds"])}
        )
        super().__init__(
            device=jax.devices()[0].device_kind,
            versions={"jax": jax.__version__, "lasad_jax": lasad_jax.__version__},
            copy_bytes_per_second=copies,
            **self.how,
        )

    @property
    def bytes_per_second(self) -> float:
        """Of the faster copy, read and written."""
        return max(self["copy_bytes_per_second"].values())

    def header(self) -> str:
        """The device and its copy, in one line."""
        speed = f"{self.bytes_per_second / 1e12:.3f} TB/s, read and written"
        return f"{self['device']}, jax {jax.__version__}; copy: {speed}"

    def add(self, table: str, row: dict) -> None:
        """Enters a row and saves, so that a run cut short leaves what it had."""
        self.setdefault(table, []).append(row)
        self.save()

    def save(self) -> None:
        """Writes the numbers, if there is a folder for them."""
        if OUT.value:
            with whole_file(Path(OUT.value) / f"{self._name}.json") as file:
                file.write_text(json.dumps(self, indent=1))

    @contextlib.contextmanager
    def picture(self, suffix: str = "") -> Iterator[Path | None]:
        """Where to write a plot; None without a folder."""
        if not OUT.value:
            yield None
            return
        with whole_file(Path(OUT.value) / f"{self._name}{suffix}.png") as file:
            yield file
