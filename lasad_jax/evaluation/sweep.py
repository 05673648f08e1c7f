"""A row of metrics for each guidance scale: a table that grows, and a picture of it."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lasad_jax.evaluation.report import Report, display_name
from lasad_jax.files import whole_file


class Sweep:
    """The files of a sweep: OUT.jsonl, which is read again, and OUT.csv, OUT.md and OUT.png.

    Each appears whole or not at all, after every row; so a sweep that was stopped goes on with
    the scales that are missing. Rows of other sweeps in OUT.jsonl are kept, but not shown.

    Args:
      out: path of the files without ending.
      identity: all that a row depends on beside its scale.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]):
        self.out, self._identity = Path(out), json.loads(json.dumps(dict(identity)))
        self._path = self._file(".jsonl")
        text = self._path.read_text("utf-8") if self._path.exists() else ""
        self._lines = [json.loads(line) for line in text.splitlines()]

    def reports(self) -> dict[float, Report]:
        """What there is of this sweep, by scale, lowest first."""
        found = {
            line["guidance"]: Report(**line["report"])
            for line in self._lines
            if line["identity"] == self._identity
        }
        return dict(sorted(found.items()))

    def add(self, guidance: float, report: Report) -> None:
        """Adds a row and writes all files."""
        line = {"guidance": guidance, "identity": self._identity, "report": report.to_json()}
        self._lines.append(line)
        with whole_file(self._path) as file:
            file.write_text("".join(json.dumps(line) + "\n" for line in self._lines), "utf-8")
        self.write()

    def rows(self) -> dict[float, Mapping[str, float]]:
        """The metrics of each scale."""
        return {guidance: report.metrics for guidance, report in self.reports().items()}

    def write(self) -> None:
        """Writes what is derived from the rows: tables and a picture."""
        rows = self.rows()
        with whole_file(self._file(".csv")) as file, file.open("w", newline="") as stream:
            names = list(next(iter(rows.values())))
            writer = csv.DictWriter(stream, ["guidance", *names])
            writer.writeheader()
            writer.writerows({"guidance": scale, **metrics} for scale, metrics in rows.items())
        with whole_file(self._file(".md")) as file:
            file.write_text(markdown(rows), "utf-8")
        if picture := draw(rows):
            with whole_file(self._file(".png")) as file:
                picture.savefig(file, format="png", dpi=120)

    def _file(self, ending: str) -> Path:
        return self.out.with_name(self.out.name + ending)


def markdown(rows: Mapping[float, Mapping[str, float]]) -> str:
    """The rows as a table."""
    names = [name for name in next(iter(rows.values())) if "_std" not in name]
    table = [["guidance", *map(display_name, names)], ["---"] * (1 + len(names))]
    for guidance, metrics in rows.items():
        table.append([f"{guidance:g}", *(f"{metrics[name]:.4f}" for name in names)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def draw(rows: Mapping[float, Mapping[str, float]]) -> Figure | None:
    """FID against the Inception Score, a point for each scale; None without either."""
    names = next(iter(rows.values()))
    pair = [
        next((name for name in names if name.startswith(f"{metric}_")), None)
        for metric in ("inception_score", "fid")
    ]
    if None in pair:
        return None
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points: Sequence[tuple[float, ...]] = [
        tuple(metrics[name] for name in pair) for metrics in rows.values()
    ]
    axes.plot(*zip(*points, strict=True), "o-")
    for guidance, point in zip(rows, points, strict=True):
        axes.annotate(f"{guidance:g}", point, xytext=(5, 5), textcoords="offset points")
    axes.set(xlabel=display_name(pair[0]), ylabel=display_name(pair[1]))
    axes.set_title("by guidance scale", fontsize=10)
    axes.grid(alpha=0.3)
    return figure
