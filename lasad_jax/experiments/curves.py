"""Pictures of finished runs: what they reach, over steps and over what they remember."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lasad_jax.benchmarks.plots import new_figure
from lasad_jax.experiments.arms import BEST, DEFAULT, SCALING, SOFTMAX, SOFTMAX_CONV, TASKS
from lasad_jax.experiments.results import Result, by_arm
from lasad_jax.experiments.tables import table_rows
from lasad_jax.models.counts import step_flops
from lasad_jax.models.generator import count_parameters


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


def draw_scaling(results: Sequence[Result]) -> Figure:
    """Held-out bits over the FLOPs of training, a line for each size and arm of one task."""
    figure = new_figure(6.5, 4.6)
    axes = figure.subplots()
    sizes = ("han", *SCALING)
    for run in results:
        if run.task not in sizes or run.seed or run.arm not in (DEFAULT, SOFTMAX, SOFTMAX_CONV):
            continue
        config = run.config
        flops = step_flops(config.model, config.batch_size * config.model.num_tokens)
        steps = sorted(run.held_out)[1:]
        bits = [run.held_out[step] for step in steps]
        wide = 0.8 + 0.8 * sizes.index(run.task)
        axes.plot(
            [flops * step for step in steps], bits, marker="o", markersize=3, linewidth=wide,
            linestyle="-" if run.arm == DEFAULT else "--", color=_colour(run.arm),
        )  # fmt: skip
        parameters = count_parameters(config.model) / 1e6
        axes.annotate(f"{parameters:.0f}M", (flops * steps[-1], bits[-1]), fontsize=7)
    lines = [Line2D([], [], color=_colour(arm)) for arm in (DEFAULT, SOFTMAX, SOFTMAX_CONV)]
    axes.legend(lines, (DEFAULT, SOFTMAX, SOFTMAX_CONV))
    axes.set(title="Han characters, three sizes", xscale="log", xlabel="FLOPs of training")
    axes.set(ylabel="held-out bits per token")
    axes.grid(alpha=0.3)
    return figure


def _panels(
    results: Sequence[Result], height: float
) -> tuple[Figure, list[tuple[Axes, dict[str, list[Result]]]]]:
    """A figure with a panel for each task, with its runs by arm, above a legend of the arms."""
    with_runs = {result.task for result in results} - set(SCALING)
    tasks = [task for task in TASKS if task in with_runs]
    figure = new_figure(4.6 * len(tasks), height)
    found = []
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        axes.set_title(TASKS[task].title)
        axes.grid(alpha=0.3)
        found.append((axes, by_arm([result for result in results if result.task == task])))
    lines = [Line2D([], [], marker="o", color=_colour(arm)) for arm in BEST]
    figure.legend(lines, BEST, loc="outside lower center", ncols=4, fontsize="small")
    return figure, found


def _colour(arm: str) -> str:
    return f"C{BEST.index(arm)}"
