"""Plots of whole-model speed."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG."""
    figure.savefig(path, format="png", dpi=120)


def draw_scaling(rows: Sequence[dict], device: str, path: Path) -> None:
    """Cost of training per token over the tokens of an image, a line for each mixer."""
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    rows = [row for row in rows if "skipped" not in row]
    for mixer in dict.fromkeys(row["mixer"] for row in rows):
        chosen = [row for row in rows if row["mixer"] == mixer]
        times = [1e6 * row["seconds_per_token"] for row in chosen]
        axes.plot([row["tokens"] for row in chosen], times, "o-", label=mixer)
    axes.set(xlabel="tokens of an image", ylabel="training, ms per 1000 tokens", title=device)
    axes.set_xscale("log", base=2)
    lengths = sorted({row["tokens"] for row in rows})
    axes.set_xticks(lengths, lengths)
    _finish(axes)
    save(figure, path)


def draw_losses(curves: dict[str, list[float]], path: Path) -> None:
    """Loss over the steps, a line for each way, above their differences from the first."""
    figure = new_figure(8, 6)
    upper, lower = figure.subplots(2, sharex=True)
    (first, reference), *others = curves.items()
    upper.plot(reference, label=first)
    for name, losses in others:
        upper.plot(losses, "--", label=name)
        difference = [a - b for a, b in zip(losses, reference, strict=True)]
        lower.plot(difference, label=f"{name} - {first}")
    upper.set(ylabel="loss (nats per token)")
    lower.set(ylabel="difference", xlabel="step")
    for axes in (upper, lower):
        _finish(axes, from_zero=False)
    save(figure, path)


def draw_along(rows: Sequence[dict], memory: Sequence[dict], device: str, path: Path) -> None:
    """Time of each token along the sequence, and memory over its length, for each mixer."""
    figure = new_figure(12, 4.5)
    left, right = figure.subplots(1, 2)
    for row in rows:
        if "skipped" not in row:
            times = [1e6 * t for t in row["seconds_per_token"]]
            left.plot(row["positions"], times, label=row["mixer"])
    lengths: dict[str, list[tuple[int, float]]] = {}
    for row in memory:
        if "skipped" not in row:
            point = row["tokens"], row["memory_bytes"] / 1e9
            lengths.setdefault(row["mixer"], []).append(point)
    for mixer, points in lengths.items():
        right.plot(*zip(*points, strict=True), "o-", label=mixer)
    left.set(xlabel="tokens drawn before", ylabel="microseconds per token")
    right.set(xlabel="tokens of an image", ylabel="memory of drawing, GB")
    for axes in (left, right):
        _finish(axes)
    cases = dict.fromkeys(row["case"] for row in rows)
    figure.suptitle(", ".join((device, *cases)))
    save(figure, path)


def draw_efficiency(
    training: Sequence[dict], drawing: Sequence[dict], device: str, path: Path
) -> None:
    """Efficiency over the number of devices, and what share of a step communication adds to it.

    Rows with flags of the compiler are dashed, in the colour of their run.
    """
    figure = new_figure(13, 4.5)
    left, right = figure.subplots(1, 2)
    usual = lambda row: (row["dtype"], row["temperature"]) == ("bfloat16", 1)
    drawn = [row | {"run": f"drawing {row['case']}", "flags": ""} for row in drawing if usual(row)]
    rows = [*training, *drawn]
    colours = {run: f"C{i}" for i, run in enumerate(dict.fromkeys(row["run"] for row in rows))}
    for axes, field, start in ((left, "efficiency", 100.0), (right, "exposed", 0.0)):
        lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for row in rows:
            if row["devices"] > 1 and row.get(field) is not None:
                points = lines.setdefault((row["run"], row["flags"]), [(1, start)])
                points.append((row["devices"], 100 * row[field]))
        for (run, flags), points in lines.items():
            style = {"color": colours[run], "linestyle": "--" if flags else "-"}
            label = f"{run} {flags}".strip()
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label, **style)
        counts = sorted({1, *(row["devices"] for row in rows)})
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, counts)
        axes.set(xlabel="devices")
    left.set(ylabel="images/s of a device, % of one alone")
    right.set(ylabel="% of a step in collectives that nothing hides")
    _finish(left, from_zero=False, legend=False)
    _finish(right, legend=False)
    # One legend for both: all runs of the right are on the left too.
    if left.get_lines():
        figure.legend(*left.get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(device)
    save(figure, path)


def _finish(axes: Axes, *, from_zero: bool = True, legend: bool = True) -> None:
    if from_zero:
        top = max((max(line.get_ydata()) for line in axes.get_lines()), default=1.0)
        axes.set_ylim(0, 1.1 * top if math.isfinite(top) and top > 0 else 1.0)
    axes.grid(alpha=0.2)
    if legend and axes.get_lines():
        axes.legend()
