"""Tables and curves of finished runs: python -m lasad_jax.experiments.report --out=runs/quality

Prints a table for each task in Markdown and draws to --pictures: held-out bits over the steps
of the arms, over what a layer remembers, and of several sizes over the FLOPs of training. Means
over seeds, with their standard errors.

--out=runs/quality,runs/rates: in a second folder, or more, is the same at other learning rates.
Of arms that ran at several there is one more table, and several sizes are compared at the best.
"""

import itertools
from pathlib import Path

from absl import flags

from lasad_jax.benchmarks.plots import save
from lasad_jax.benchmarks.tables import Column, head, row_line
from lasad_jax.command import run
from lasad_jax.experiments.arms import TASKS
from lasad_jax.experiments.curves import draw_curves, draw_scaling, draw_states
from lasad_jax.experiments.results import Result, at_best_rate, read_results
from lasad_jax.experiments.tables import COLUMNS, RATE_COLUMNS, rate_rows, table_rows

_OUT = flags.DEFINE_list("out", ["runs/quality"], "Folders of the queue's runs.")
_PICTURES = flags.DEFINE_string("pictures", "", "Folder for the pictures; none if unset.")


def report() -> None:
    """Prints and draws what the flags ask for."""
    results, *others = [_read(Path(folder)) for folder in _OUT.value]
    others = [*itertools.chain(*others)]
    for name, task in TASKS.items():
        _print(task.title, table_rows(_of(name, results)), COLUMNS)
        _print(
            f"{task.title}: learning rates",
            rate_rows(_of(name, results), _of(name, others)),
            RATE_COLUMNS,
        )
    if _PICTURES.value:
        figures = {
            "curves": draw_curves(results),
            "states": draw_states(results),
            "scaling": draw_scaling(at_best_rate([*results, *others])),
        }
        for name, figure in figures.items():
            save(figure, Path(_PICTURES.value) / f"quality_{name}.png")


def _read(out: Path) -> list[Result]:
    if results := read_results(out):
        return results
    raise ValueError(f"out: {out} has no finished runs; lasad_jax.experiments.queue")


def _of(task: str, results: list[Result]) -> list[Result]:
    return [result for result in results if result.task == task]


def _print(title: str, rows: list[dict], columns: tuple[Column, ...]) -> None:
    """A table, if there is anything in it."""
    if rows:
        print(f"\n{title}\n\n{head(columns)}")
        for row in rows:
            print(row_line(row, columns))


if __name__ == "__main__":
    run(report)
