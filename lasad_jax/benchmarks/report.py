"""The operator's timings: columns of its tables, and a picture."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter

from lasad_jax.benchmarks.plots import new_figure, save
from lasad_jax.benchmarks.tables import Column, column, microseconds, ratio

_SHAPE = "B x R x C x H"


def _per_token(row: dict) -> str | None:
    return f"{1e9 * row['seconds'] / row['tokens']:.1f}" if "seconds" in row else None


_START = (
    column("dtype", "dtype"),
    column("direction", "direction", width=16),
)
GROWTH_COLUMNS = (
    column("tokens", "tokens"),
    column("grid", "shape", lambda shape: "x".join(shape.split("x")[1:3])),
    *_START,
    column("form", "form", width=11),
    column("ours", "seconds", microseconds),
    Column("ns/token", _per_token),
    column("/ floor", "over_floor", ratio),
)


def columns(peers: Sequence[str]) -> tuple[Column, ...]:
    """Times in microseconds; those of peers with the ratio ours / theirs."""
    return (
        column(_SHAPE, "shape", width=13),
        *_START,
        column("decay", "decay"),
        column("form", "form", width=11),
        column("floor", "floor_seconds", microseconds),
        column("ours", "seconds", microseconds),
        column("/ floor", "over_floor", ratio),
        column("TB/s", "bytes_per_second", lambda speed: f"{speed / 1e12:.3g}"),
        *(Column(peer, functools.partial(_peer_cell, peer)) for peer in peers),
    )


def _peer_cell(peer: str, row: dict) -> str | None:
    if peer not in row.get("ratios", ()):
        return None
    return f"{microseconds(row['peers'][peer])} ({row['ratios'][peer]:.2f})"


def draw(results: dict, path: Path) -> None:
    """Times over the shapes, in one panel for each dtype and direction, above the byte floor."""
    rows = [row for row in results["rows"] if "skipped" not in row]
    panels = list(dict.fromkeys((row["dtype"], row["direction"]) for row in rows)) or [()]
    height = math.ceil(len(panels) / 2)
    figure = new_figure(13, 4.2 * height)
    all_axes = figure.subplots(height, 2, squeeze=False).flatten()
    for axes, panel in zip(all_axes, panels, strict=False):
        chosen = [row for row in rows if (row["dtype"], row["direction"]) == panel]
        _draw_panel(axes, chosen)
        axes.set(title=", ".join(panel), xlabel=_SHAPE, ylabel="microseconds", yscale="log")
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
    save(figure, path)


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
