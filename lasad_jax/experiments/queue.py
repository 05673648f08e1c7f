"""Trains what is to be compared, several runs beside each other on one device.

    python -m lasad_jax.experiments.queue --out=runs/quality --tasks=fashion,han --seeds=0,1,2

Run again it goes on where it was: finished runs stay, others go on from their checkpoints. It ends
on SIGTERM, or after --minutes, with what was running saved. Each run is a folder of
`lasad_jax.train`, OUT/TASK/ARM/seedN, with an empty file `trained` when it is.
--arms names mixers by what they have, such as raster+gate+conv+rope or softmax+rope; --arms=best
are those of the tables, --arms=all everything. `lasad_jax.experiments.report` reads the folder.
"""

import collections
import dataclasses
import itertools
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from tqdm import tqdm

from lasad_jax.command import run
from lasad_jax.experiments.arms import ARMS, BEST, TASKS, Trial, trials
from lasad_jax.training.preemption import EXIT_STATUS

_OUT = flags.DEFINE_string("out", "runs/quality", "Folder of all runs.")
_TASKS = flags.DEFINE_list("tasks", list(TASKS), "Some of fashion, han, clipart.")
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


@dataclasses.dataclass(frozen=True)
class Job:
    """A command that is given again until it has ended well.

    Attributes:
      command: its words; it goes on where it was stopped.
      log: file of what it says.
      done: an empty file that is there once it has ended well.
    """

    command: Sequence[str]
    log: Path
    done: Path


def queue() -> None:
    """Runs what the flags ask for.

    Raises:
      ValueError: for a task or an arm that there is not; at the end, if runs failed.
    """
    arms = [a for arm in _ARMS.value for a in {"best": BEST, "all": ARMS}.get(arm, (arm,))]
    chosen = trials(_TASKS.value, arms, [int(seed) for seed in _SEEDS.value])
    out = Path(_OUT.value)
    end = time.monotonic() + (60 * _MINUTES.value or math.inf)
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    is_over = lambda: told.is_set() or time.monotonic() > end
    training = {trial: train_job(out, trial) for trial in chosen}
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


def train_job(out: Path, trial: Trial) -> Job:
    """The training of a run."""
    folder = out / trial.name
    command = [sys.executable, "-m", "lasad_jax.train", f"--workdir={folder}", *trial.flags()]
    return Job(
        command + of_task(trial.task, _TRAIN.value), folder / "train.log", folder / "trained"
    )


def measure_job(out: Path, trial: Trial, num: int) -> Job:
    """The measurement of `num` images of its last step, by the classifier of its task."""
    folder = out / trial.name
    cache = out / trial.task / "evaluation"
    command = [sys.executable, "-m", "lasad_jax.evaluate", f"--workdir={folder}", f"--num={num}"]
    command += [f"--cache={cache}", f"--out={folder / 'measured'}", "--nokeep_samples"]
    return Job(command, folder / "measure.log", folder / "measured")


def work_off(lanes: Sequence[collections.deque[Job]], is_over: Callable[[], bool]) -> int:
    """Runs jobs beside each other until it is over; then those that run are told to end.

    Args:
      lanes: what each lane takes its jobs from; several may share one.
      is_over: asked again and again.

    Returns:
      How many failed.
    """
    share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / max(1, len(lanes)):.2f}"}
    running: dict[int, tuple[Job, subprocess.Popen]] = {}
    waiting = {id(jobs): jobs for jobs in lanes}.values()
    failed = 0
    with tqdm(total=sum(map(len, waiting)), unit="run", dynamic_ncols=True) as bar:
        while running or any(waiting):
            if is_over():
                for jobs in waiting:
                    jobs.clear()
                for _, process in running.values():
                    process.terminate()
            for lane, jobs in enumerate(lanes):
                while lane not in running and jobs:
                    job = jobs.popleft()
                    if job.done.exists():
                        bar.update()
                        continue
                    running[lane] = job, _start(job, share)
            time.sleep(0.2)
            for lane, (job, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[lane]
                if process.returncode == 0:
                    job.done.touch()
                    bar.update()
                elif process.returncode not in (EXIT_STATUS, -signal.SIGTERM):
                    failed += 1
                    last = job.log.read_text().strip().splitlines()[-1:]
                    tqdm.write(f"{job.log}: status {process.returncode}: {''.join(last)}")
    return failed


def _start(job: Job, more: dict[str, str]) -> subprocess.Popen:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("a") as log:
        return subprocess.Popen(job.command, stdout=log, stderr=log, env=more | os.environ)


def of_task(task: str, given: Sequence[str]) -> list[str]:
    """Flags for the runs of a task: those that name it, without its name, and those of all."""
    found = []
    for flag in given:
        named, _, rest = flag.partition(":")
        if named == task:
            found.append(rest)
        elif named not in TASKS:
            found.append(flag)
    return found


if __name__ == "__main__":
    run(queue)
