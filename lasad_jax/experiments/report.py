"""Tables and curves of finished runs: python -m lasad_jax.experiments.report --out=runs/quality

Prints a table for each task in Markdown and draws to --pictures: held-out bits over the steps
of the arms, over what a layer remembers, and of several sizes over the FLOPs of training. Means
over seeds, with their standard errors.
"""

from pathlib import Path

from absl import flags

from lasad_jax.benchmarks.plots import save
from lasad_jax.benchmarks.tables import head, row_line
from lasad_jax.command import run
from lasad_jax.experiments.arms import TASKS
from lasad_jax.experiments.curves import draw_curves, draw_scaling, draw_states
from lasad_jax.experiments.results import read_results
from lasad_jax.experiments.tables import COLUMNS, table_rows

_OUT = flags.DEFINE_string("out", "runs/quality", "Folder of the queue's runs.")
_PICTURES = flags.DEFINE_string("pictures", "", "Folder for the pictures; none if unset.")


def report() -> None:
    """Prints and draws what the flags ask for."""
    results = read_results(Path(_OUT.value))
    if not results:
        raise ValueError(f"out: {_OUT.value} has no finished runs; lasad_jax.experiments.queue")
    for task, title in ((name, task.title) for name, task in TASKS.items()):
        mine = [result for result in results if result.task == task]
        if mine:
            print(f"\n{title}\n\n{head(COLUMNS)}")
            for row in table_rows(mine):
                print(row_line(row, COLUMNS))
    if _PICTURES.value:
        figures = {"curves": draw_curves, "states": draw_states, "scaling": draw_scaling}
        for name, draw in figures.items():
            save(draw(results), Path(_PICTURES.value) / f"quality_{name}.png")


if __name__ == "__main__":
    run(report)
