"""The tables of the benchmark of several devices, as they grow."""

import json
from pathlib import Path

import jax

from lasad_jax.benchmarks import plots, results
from lasad_jax.benchmarks.tables import (
    column,
    digits,
    gigabytes,
    head,
    milliseconds,
    percent,
    row_line,
)
from lasad_jax.files import whole_file

TABLES = {
    "training": (
        column("run", "run", width=22),
        column("devices", "devices"),
        column("flags", "flags"),
        column("ms", "seconds", milliseconds),
        column("images/s", "images_per_second", digits()),
        column("per device", "per_device", digits()),
        column("efficiency", "efficiency", percent),
        column("MFU", "utilization", percent),
        column("GB", "memory_bytes", gigabytes),
        column("compute", "compute_seconds", milliseconds),
        column("collectives", "collectives", percent),
        column("exposed", "exposed", percent),
    ),
    "losses": (
        column("run", "run", width=22),
        column("devices", "devices"),
        column("steps", "steps"),
        column("first", "first", "{:.4f}".format),
        column("last", "last", "{:.4f}".format),
        column("largest difference", "largest", "{:.2e}".format),
        column("other dropout", "noise", "{:.2e}".format),
    ),
    "drawing": (
        column("case", "case", width=12),
        column("dtype", "dtype"),
        column("temperature", "temperature", digits()),
        column("devices", "devices"),
        column("images", "images"),
        column("s", "seconds", digits()),
        column("images/s", "images_per_second", digits()),
        column("efficiency", "efficiency", percent),
        column("same images", "same_images", percent),
        column("same codes", "same_codes", percent),
    ),
}


class Rows(dict):
    """The rows of each table, printed, written and drawn as they come."""

    def __init__(self):
        super().__init__({table: [] for table in TABLES})
        self._last, self._folder = None, results.OUT.value and Path(results.OUT.value)
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / "rows.jsonl").unlink(missing_ok=True)

    def write(self, table: str, row: dict) -> None:
        """Adds a line to the file, if there is a folder for it."""
        if self._folder:
            with open(self._folder / "rows.jsonl", "a") as file:
                file.write(json.dumps({"table": table} | row) + "\n")

    def add(self, table: str, row: dict) -> None:
        """Enters a row; the head of its table is printed where it begins."""
        if table != self._last:
            print("\n" + head(TABLES[table]))
        self._last = table
        print(row_line(row, TABLES[table]), flush=True)
        self[table].append(row)
        self.write(table, row)
        if self._folder:
            with whole_file(self._folder / "scaling.png") as file:
                device = jax.devices()[0].device_kind
                plots.draw_efficiency(self["training"], self["drawing"], device, file)
