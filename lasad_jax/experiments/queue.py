"""Trains what is to be compared, several runs beside each other on one device.

    python -m lasad_jax.experiments.queue --out=runs/quality --tasks=fashion,han --seeds=0,1,2

Run again it goes on where it was: finished runs stay, others go on from their checkpoints. It ends
on SIGTERM, or after --minutes, with what was running saved. Each run is a folder of
`lasad_jax.train`, OUT/TASK/ARM/seedN, with an empty file `trained` when it is.
--arms names mixers by what they have, such as raster+gate+conv+rope or softmax+rope; --arms=best
are those of the tables, --arms=all everything. `lasad_jax.experiments.report` reads the folder.
"""

import collections
import itertools
import math
import signal
import sys
import threading
import time
from pathlib import Path

from absl import flags

from lasad_jax.command import run
from lasad_jax.experiments.arms import ARMS, BEST, SCALING, TASKS, trials
from lasad_jax.experiments.jobs import measure_job, train_job, work_off
from lasad_jax.training.preemption import EXIT_STATUS

_OUT = flags.DEFINE_string("out", "runs/quality", "Folder of all runs.")
_TASKS = flags.DEFINE_list(
    "tasks", [name for name in TASKS if name not in SCALING], f"Some of {', '.join(TASKS)}."
)
_ARMS = flags.DEFINE_list("arms", ["best"], "Mixers, by what they have; best or all.")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "A run of each arm with each.")
_LANES = flags.DEFINE_integer("lanes", 1, "Runs beside each other on the device.", 1)
_MINUTES = flags.DEFINE_float("minutes", 0, "After these it ends, with all saved; 0 for never.", 0)
_MEASURE = flags.DEFINE_integer(
    "measure", 0, "Images of each run to draw and measure by its task's classifier.", 0
)
_TRAIN = flags.DEFINE_multi_string(
    "train",
    [],
    "Another flag of every run, such as --train=--config.steps=100, "
    "or of one task's: --train=han:--config.data.directory=/data/han.",
)


def queue() -> None:
    """Runs what the flags ask for.

    Raises:
      ValueError: for a task or an arm that there is not; at the end, if runs failed.
    """
    arms = [a for arm in _ARMS.value for a in {"best": BEST, "all": ARMS}.get(arm, (arm,))]
    if not all(seed.isdigit() for seed in _SEEDS.value):
        raise ValueError(f"seeds: {','.join(_SEEDS.value)!r} must be numbers such as 0,1,2")
    chosen = trials(_TASKS.value, arms, [int(seed) for seed in _SEEDS.value])
    out = Path(_OUT.value)
    end = time.monotonic() + (60 * _MINUTES.value or math.inf)
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    is_over = lambda: told.is_set() or time.monotonic() > end
    training = {trial: train_job(out, trial, _TRAIN.value) for trial in chosen}
    shared = collections.deque(training.values())
    failed = work_off([shared] * _LANES.value, is_over)
    jobs = [*training.values()]
    if _MEASURE.value:
        # One after the other for each task: the first makes the classifier of all.
        measuring = {task: collections.deque() for task in _TASKS.value}
        for trial, job in training.items():
            if job.done.exists():
                measuring[trial.task].append(measure_job(out, trial, _MEASURE.value))
        jobs += itertools.chain(*measuring.values())
        failed += work_off([*measuring.values()], is_over)
    left = sum(not job.done.exists() for job in jobs)
    print(f"{len(jobs) - left} of {len(jobs)} done in {out}")
    if failed:
        raise ValueError(f"queue: {failed} failed; the logs in {out} say why")
    if left:
        sys.exit(EXIT_STATUS)


if __name__ == "__main__":
    run(queue)
