"""Tables and curves of finished runs: python -m lasad_jax.experiments.report --out=runs/quality

Prints a table for each task in Markdown and draws to --pictures: held-out bits over the steps
of the arms, and over what a layer remembers. Means over seeds, with their standard errors.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lasad_jax.benchmarks.plots import new_figure, save
from lasad_jax.benchmarks.tables import Column, head, row_line
from lasad_jax.command import run
from lasad_jax.experiments.arms import BEST, SOFTMAX, TASKS
from lasad_jax.experiments.results import Result, decode_state, mean_and_error, read_results

_OUT = flags.DEFINE_string("out", "runs/quality", "Folder of the queue's runs.")
_PICTURES = flags.DEFINE_string("pictures", "", "Folder for the pictures; none if unset.")

Number = Callable[[Result], float | None]


def report() -> None:
    """Prints and draws what the flags ask for."""
    results = read_results(Path(_OUT.value))
    if not results:
        raise ValueError(f"out: {_OUT.value} has no finished runs; lasad_jax.experiments.queue")
    for task, title in ((name, task.title) for name, task in TASKS.items()):
        mine = [result for result in results if result.task == task]
        if mine:
            print(f"\n{title}\n\n{head(_COLUMNS)}")
            for row in table_rows(mine):
                print(row_line(row, _COLUMNS))
    if _PICTURES.value:
        for name, figure in (("curves", draw_curves(results)), ("states", draw_states(results))):
            save(figure, Path(_PICTURES.value) / f"quality_{name}.png")


def table_rows(results: Sequence[Result]) -> list[dict]:
    """A row for each arm of one task, best first.

    "bits", "train_bits", "fid_classifier", "class_agreement" and "bits_at_equal_loss" (held out,
    where training bits are those of the softmax baseline at its end) are a mean and its standard
    error; "state_256" and "state_1024" numbers that a layer remembers for each channel.
    """
    arms = _by_arm(results)
    ends = [result.train_bits for result in arms.get(SOFTMAX, ())]
    numbers: dict[str, Number] = {
        "bits": lambda result: result.bits,
        "train_bits": lambda result: result.train_bits,
        "bits_at_equal_loss": lambda result: result.held_out_at(np.mean(ends)) if ends else None,
        "fid_classifier": lambda result: result.measured.get("fid_classifier"),
        "class_agreement": lambda result: result.measured.get("class_agreement"),
    }
    rows = []
    for arm, runs in arms.items():
        row = {"arm": arm, "seeds": len(runs)}
        for name, number in numbers.items():
            values = [value for result in runs if (value := number(result)) is not None]
            if values:
                row[name] = mean_and_error(values)
        model = runs[0].config.model
        for tokens in (256, 1024):
            row[f"state_{tokens}"] = decode_state(model, tokens) / model.width
        rows.append(row)
    return sorted(rows, key=lambda row: row["bits"][0])


def draw_curves(results: Sequence[Result]) -> Figure:
    """Held-out bits over the steps, a panel for each task; the seeds' range is shaded."""
    figure, panels = _panels(results, height=4.4)
    for axes, arms in panels:
        highest = 0.0
        for arm in [arm for arm in BEST if arm in arms]:
            steps = sorted(set.intersection(*(set(run.held_out) for run in arms[arm])))
            bits = np.array([[run.held_out[step] for step in steps] for run in arms[arm]])
            kind = "--" if arm.startswith("softmax") else "-"
            axes.plot(steps, bits.mean(0), kind, color=_colour(arm))
            axes.fill_between(steps, bits.min(0), bits.max(0), color=_colour(arm), alpha=0.2)
            # The first evaluation of the average is far above the rest.
            highest = max(highest, bits[:, 1:].max(initial=0))
        axes.set(xlabel="step", ylabel="held-out bits per token")
        axes.set_ylim(top=highest)
    return figure


def draw_states(results: Sequence[Result]) -> Figure:
    """Held-out bits over what a layer remembers at 256 tokens, a panel for each task."""
    figure, panels = _panels(results, height=4)
    for axes, arms in panels:
        for row in table_rows([*itertools.chain(*arms.values())]):
            if row["arm"] in BEST:
                mean, error = row["bits"]
                error = 0 if math.isnan(error) else 2 * error
                style = {"fmt": "o", "capsize": 3, "color": _colour(row["arm"])}
                axes.errorbar(row["state_256"], mean, error, **style)
        axes.set_xscale("log", base=2)
        axes.set_xlim(50, 1024)
        axes.set(xlabel="numbers per channel at 256 tokens", ylabel="held-out bits per token")
    return figure


def _panels(
    results: Sequence[Result], height: float
) -> tuple[Figure, list[tuple[Axes, dict[str, list[Result]]]]]:
    """A figure with a panel for each task, with its runs by arm, above a legend of the arms."""
    tasks = [task for task in TASKS if any(result.task == task for result in results)]
    figure = new_figure(4.6 * len(tasks), height)
    found = []
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        axes.set_title(TASKS[task].title)
        axes.grid(alpha=0.3)
        found.append((axes, _by_arm([result for result in results if result.task == task])))
    lines = [Line2D([], [], marker="o", color=_colour(arm)) for arm in BEST]
    figure.legend(lines, BEST, loc="outside lower center", ncols=4, fontsize="small")
    return figure, found


def _colour(arm: str) -> str:
    return f"C{BEST.index(arm)}"


def _by_arm(results: Sequence[Result]) -> dict[str, list[Result]]:
    found = {}
    for result in results:
        found.setdefault(result.arm, []).append(result)
    return found


def _measured(name: str, key: str, digits: int) -> Column:
    def cell(row):
        if key not in row:
            return None
        mean, error = row[key]
        return f"{mean:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")

    return Column(name, cell)


_COLUMNS = (
    Column("arm", lambda row: f"`{row['arm']}`"),
    Column("seeds", lambda row: str(row["seeds"])),
    _measured("held-out bits", "bits", 4),
    _measured("training bits", "train_bits", 3),
    _measured("held-out bits at equal training loss", "bits_at_equal_loss", 3),
    _measured("FID (classifier)", "fid_classifier", 3),
    _measured("class agreement", "class_agreement", 3),
    Column("state, 256", lambda row: f"{row['state_256']:.0f}"),
    Column("state, 1024", lambda row: f"{row['state_1024']:.0f}"),
)


if __name__ == "__main__":
    run(report)
