"""The operator's timings as a table (Markdown) and as a picture."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

COLUMNS = (
    "B x R x C x H",
    "dtype",
    "direction",
    "decay",
    "form",
    "floor",
    "ours",
    "/ floor",
    "TB/s",
)
GROWTH_COLUMNS = ("tokens", "grid", "dtype", "direction", "form", "ours", "ns/token", "/ floor")
_WIDTHS = {"direction": 16, "form": 11, "B x R x C x H": 13}


def line(cells: Iterable[str], columns: Sequence[str]) -> str:
    """One row of a Markdown table, padded to its columns."""
    widths = (max(len(name), _WIDTHS.get(name, 9)) for name in columns)
    return "| " + " | ".join(f"{c:{w}}" for c, w in zip(cells, widths, strict=True)) + " |"


def head(columns: Sequence[str]) -> str:
    """The first two lines of a table."""
    return line(columns, columns) + "\n" + "| --- " * len(columns) + "|"


def microseconds(seconds: float) -> str:
    """Three digits or more."""
    value = 1e6 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def row_line(row: dict, peers: Sequence[str]) -> str:
    """One row: times in microseconds, those of peers with the ratio ours / theirs.

    Args:
      row: from `ours.time_row`.
      peers: names of the last columns.
    """
    start = [row[name] for name in ("shape", "dtype", "direction", "decay", "form")]
    floor = microseconds(row["floor_seconds"])
    if "skipped" in row:
        cells = [*start, floor, row["skipped"], "-", "-", *["-"] * len(peers)]
        return line(cells, (*COLUMNS, *peers))
    peer_cells = [
        f"{microseconds(row['peers'][p])} ({row['ratios'][p]:.2f})" if p in row["peers"] else "-"
        for p in peers
    ]
    speed = f"{row['bytes_per_second'] / 1e12:.3g}"
    ours = [microseconds(row["seconds"]), f"{row['over_floor']:.2f}", speed]
    return line([*start, floor, *ours, *peer_cells], (*COLUMNS, *peers))


def growth_line(row: dict) -> str:
    """One row of the table of long sequences."""
    grid = "x".join(row["shape"].split("x")[1:3])
    start = [str(row["tokens"]), grid, row["dtype"], row["direction"], row["form"]]
    if "skipped" in row:
        return line([*start, row["skipped"], "-", "-"], GROWTH_COLUMNS)
    per_token = f"{1e9 * row['seconds'] / row['tokens']:.1f}"
    cells = [*start, microseconds(row["seconds"]), per_token, f"{row['over_floor']:.2f}"]
    return line(cells, GROWTH_COLUMNS)


def draw(results: dict, path: Path) -> None:
    """Times over the shapes, in one panel for each dtype and direction, above the byte floor."""
    rows = [row for row in results["rows"] if "skipped" not in row]
    panels = list(dict.fromkeys((row["dtype"], row["direction"]) for row in rows)) or [()]
    height = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(13, 4.2 * height), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(height, 2, squeeze=False).flatten()
    for axes, panel in zip(all_axes, panels, strict=False):
        chosen = [row for row in rows if (row["dtype"], row["direction"]) == panel]
        _draw_panel(axes, chosen)
        axes.set(title=", ".join(panel), xlabel=COLUMNS[0], ylabel="microseconds", yscale="log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())
        axes.grid(axis="y", which="both", alpha=0.2)
    for axes in all_axes[len(panels) :]:
        axes.axis("off")
    lines = {}
    for axes in all_axes:  # a peer may be missing in some of the panels
        lines |= {
            label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
    figure.legend(lines.values(), lines.keys(), loc="outside right upper")
    figure.suptitle(results["device"])
    figure.savefig(path, format="png", dpi=120)


def _draw_panel(axes: Axes, rows: list[dict]) -> None:
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    floors = {row["shape"]: row["floor_seconds"] for row in rows}
    ours, theirs = {}, {}
    for row in rows:
        name = row["decay"] if row["form"] == "auto" else f"{row['decay']}, {row['form']}"
        ours.setdefault(name, {})[row["shape"]] = row["seconds"]
        for peer, seconds in row["peers"].items():
            theirs.setdefault(peer, {})[row["shape"]] = seconds
    width = 0.8 / max(1, len(ours) + len(theirs))

    def bars(place: int, name: str, times: dict[str, float], **style) -> None:
        x = [shapes.index(shape) - 0.4 + (place + 0.5) * width for shape in times]
        axes.bar(x, [1e6 * t for t in times.values()], width, label=name, **style)

    for i, (name, times) in enumerate(ours.items()):
        bars(i, name, times, color=f"C{i % 10}")
    for i, (name, times) in enumerate(theirs.items()):
        grey = 0.3 + 0.55 * i / len(theirs)
        bars(len(ours) + i, name, times, color=str(grey))
    for x, shape in enumerate(shapes):
        label = "every byte moved once" if x == 0 else None
        axes.hlines(1e6 * floors[shape], x - 0.42, x + 0.42, "black", "--", label=label)
    axes.set_xticks(range(len(shapes)), shapes)
