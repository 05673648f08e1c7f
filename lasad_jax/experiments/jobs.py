"""Commands that are run beside each other, and again until each has ended well."""

import collections
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from lasad_jax.experiments.arms import TASKS, Trial
from lasad_jax.training.preemption import EXIT_STATUS


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


def train_job(out: Path, trial: Trial, more: Sequence[str] = ()) -> Job:
    """The training of a run, with more flags, as `of_task` reads them."""
    folder = out / trial.name
    command = [sys.executable, "-m", "lasad_jax.train", f"--workdir={folder}", *trial.flags()]
    return Job(command + of_task(trial.task, more), folder / "train.log", folder / "trained")


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
    failed, over = 0, False
    with tqdm(total=sum(map(len, waiting)), unit="run", dynamic_ncols=True) as bar:
        while running or any(waiting):
            if not over and is_over():
                over = True
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
