"""The training loop: batches in, checkpoints, numbers and pictures out."""

import contextlib
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import PyTree
from tqdm import tqdm

from lasad_jax.config import Config, RunConfig, TokenizerRunConfig
from lasad_jax.sampling.pictures import write_png
from lasad_jax.training import sharding
from lasad_jax.training.checkpoints import (
    Checkpoints,
    check_config,
    mark_unfinished,
    store_config,
    unfinished_step,
)
from lasad_jax.training.generator_task import GeneratorTask
from lasad_jax.training.goodput import Goodput, flop_utilization
from lasad_jax.training.integrity import set_aside_damaged
from lasad_jax.training.metrics import Metrics, plot_losses, progress_bar
from lasad_jax.training.peers import Peers
from lasad_jax.training.preemption import NeverPreempted
from lasad_jax.training.profile import Profile
from lasad_jax.training.summary import check_skips, summary
from lasad_jax.training.task import Task
from lasad_jax.training.tokenizer_task import TokenizerTask
from lasad_jax.training.watchdog import Watchdog

TASKS = {Config: GeneratorTask, TokenizerRunConfig: TokenizerTask}

# What processes that wait for each other in the beginning or at the end may differ by.
_PATIENCE = 600  # seconds


def train(
    config: RunConfig,
    workdir: Path,
    *,
    preemption: NeverPreempted | None = None,
    profile: Profile | None = None,
) -> None:
    """Trains, or goes on training, the run in `workdir`.

    Running it again after a kill at any moment goes on from the newest good checkpoint and
    arrives at the same parameters.

    Args:
      config: of a generator or of a tokenizer.
      workdir: folder of the run; made if missing.
      preemption: an entered `Preemption`, which saves and ends the process; None for none.
      profile: steps to write a trace of, by the first process; None for none.

    Raises:
      ValueError: for a configuration that does not fit the data, the devices or the run
        already in `workdir`; before any device time is spent. Or for a checkpoint that cannot
        be read.
      FloatingPointError: after too many updates left out in a row, see `OptimizerConfig`. The
        last good checkpoint stays.
      OSError: a disk that is full, or not to be written to. The checkpoints there stay.
    """
    workdir, goodput, peers = Path(workdir), Goodput(), Peers()
    with contextlib.ExitStack() as stack:
        stack.callback(goodput.close)
        with goodput.spent("start"):
            # ---- Mesh, data and state
            mesh = sharding.make_mesh(config.mesh)
            sharding.check_batch_size(config.batch_size, config.optimizer.accumulate, mesh)
            check_config(config, workdir)
            task = TASKS[type(config)](config, mesh)
            task.check(workdir)
            first = peers.index == 0
            meet = _meetings(peers)
            set_aside_damaged(workdir, rename=first, meet=meet)
            if first:
                store_config(config, workdir)
                task.store(workdir)
            task.prepare(workdir)
            # Closed however the loop ends: a checkpoint may still be on its way to disk.
            checkpoints = Checkpoints(workdir, keep_last=config.keep_last)
            stack.enter_context(contextlib.closing(checkpoints))
            stack.enter_context(jax.set_mesh(mesh))
            stack.enter_context(nn.logical_axis_rules(sharding.RULES))
            start = checkpoints.latest_step()
            if start is None:
                state, start = task.init_state(), 0
            else:
                state = checkpoints.restore(start, task.abstract_state())
            metrics = Metrics(workdir, start) if first else None
            if metrics:
                stack.enter_context(metrics)
        preemption = preemption or NeverPreempted()
        run = _Run(config, workdir, task, checkpoints, metrics, goodput, preemption, state, start)
        del state  # the run alone holds it: the first step takes its buffers
        with Watchdog(peers, lambda: (run.step, goodput.part), config.watchdog):
            run.loop(mesh, (profile if first else None) or Profile())
        checkpoints.wait()

    if first:
        plot_losses(workdir / "metrics.jsonl", workdir / "loss.png", task.curves, task.unit)
        print(f"time: {goodput.summary()}")


def _meetings(peers: Peers) -> Callable[[], None]:
    """Waits for all processes, as often as it is called."""
    numbers = iter(range(1_000_000))
    return lambda: peers.meet(f"start/{next(numbers)}", _PATIENCE)


class _Run:
    """A run on its way.

    Attributes:
      step: the newest that has been dispatched.
      state: after it.
    """

    def __init__(
        self,
        config: RunConfig,
        workdir: Path,
        task: Task,
        checkpoints: Checkpoints,
        metrics: Metrics | None,
        goodput: Goodput,
        preemption: NeverPreempted,
        state: PyTree,
        start: int,
    ):
        self._config, self._workdir, self._task = config, workdir, task
        self._checkpoints, self._metrics = checkpoints, metrics
        self._goodput, self._preemption = goodput, preemption
        self._pending, self._since = [], time.monotonic()
        # Of the newest step: its numbers while they are not written, and whether all that is
        # due has been done. Held by who writes.
        self._row, self._reporting, self._lock = {}, False, threading.Lock()
        self.state, self.step = state, start
        self._start = start

    def loop(self, mesh: Mesh, profile: Profile) -> None:
        """Takes the steps that are left."""
        start, steps = self._start, self._config.steps
        if start and unfinished_step(self._workdir) == start:
            with self._preemption.at_rest(start, self._leave):
                self._make_up()
        batches = self._task.train_batches(start)
        bar = progress_bar(start, steps, visible=self._metrics is not None)
        self._since = time.monotonic()
        for step in range(start + 1, steps + 1):
            with self._preemption.at_rest(step - 1, self._leave):
                batch = self._goodput.wait_for(lambda: sharding.put_batch(next(batches), mesh))
                if step == start + 1:
                    with self._goodput.spent("compilation"):
                        self._task.compile(self.state, batch)
            profile.before(step, self._workdir / "profile")
            self.state, values = self._task.train_step(self.state, batch)
            self.step = step
            self._goodput.dispatched(values["loss"])
            profile.after(step, values["loss"])
            self._pending.append(values)
            bar.update()
            if any(map(self._due, (self._config.log_every, *self._intervals()))):
                with self._preemption.at_rest(step, self._leave):
                    self._after_step(bar)
        bar.close()

    def _intervals(self) -> tuple[int, int, int, int]:
        """Steps between evaluations, measurements, pictures and checkpoints."""
        config = self._config
        return config.eval_every, self._task.measure_every, config.sample_every, config.save_every

    def _due(self, every: int) -> bool:
        return bool(every) and (self.step % every == 0 or self.step == self._config.steps)

    def _after_step(self, bar: tqdm) -> None:
        """What is due after some steps: numbers, pictures, a checkpoint."""
        with self._lock:
            self._row = self._drain()
        bar.set_postfix_str(
            f"loss {self._row.get('loss', math.nan):.4f}, "
            f"{self._row['images_per_second']:.0f} images/s",
            refresh=False,
        )
        evaluated = self._report()
        if self._due(self._config.save_every):
            with self._lock, self._goodput.spent("saving"):
                self._checkpoints.save(self.state, self.step, evaluated)
                if not self._config.async_save:
                    self._checkpoints.wait()

    def _drain(self) -> dict[str, float]:
        """The row of the steps since the last; a bad step ends the run here.

        Here alone the host waits for the device: a bad step is known before a checkpoint is
        made, and no step is timed with what follows.
        """
        values = jax.device_get(self._pending)
        check_skips(values, self.step, self._config.optimizer.max_skips)
        images = len(values) * self._config.batch_size
        rate = images / (time.monotonic() - self._since)
        self._pending, self._since = [], time.monotonic()
        row = summary(values) | {"images_per_second": rate}
        if self._task.tokens_per_image:
            row["tokens_per_second"] = rate * self._task.tokens_per_image
        if (utilization := flop_utilization(self._task, rate)) is not None:
            row["model_flop_utilization"] = utilization
        shares = self._goodput.shares()
        return row | {f"goodput/{part}": share for part, share in shares.items()}

    def _report(self) -> float | None:
        """Writes the row with all that is due at this step; the held-out figure if it is."""
        evaluating, measuring, sampling, _ = map(self._due, self._intervals())
        self._reporting, evaluated = evaluating or measuring or sampling, None
        with self._goodput.spent("evaluation"):
            measured = {}
            if evaluating:
                measured |= self._task.evaluate(self.state)
                evaluated = measured[self._task.objective]
            if measuring:
                measured |= self._task.measure(self.state)
            with self._lock:
                self._tell(measured)
            if sampling:
                picture = self._task.picture(self.state)
                with self._lock:
                    if self._metrics:
                        name = f"step_{self.step:07d}.png"
                        self._metrics.picture(self.step, "samples", picture)
                        write_png(self._workdir / "samples" / name, picture)
        if self._reporting:
            self._since = time.monotonic()
        self._reporting = False
        return evaluated

    def _tell(self, measured: dict[str, float]) -> None:
        if self._metrics and (row := self._row | measured):
            self._metrics.scalars(self.step, row)
        self._row = {}

    def _make_up(self) -> None:
        """Evaluates and draws what was broken off at this step."""
        evaluated = self._report()
        if evaluated is not None:
            self._checkpoints.measured(self.step, evaluated)
        if self._metrics:
            mark_unfinished(self._workdir, None)

    def _leave(self) -> None:
        """Saves all there is before the process ends; called by another thread, at rest.

        What is due at this step and not done is left to the next start.
        """
        self._lock.acquire()  # and never released: the loop is to write nothing more
        if self.step == self._start:
            return
        if self._pending:
            self._row = self._drain()
        if self._metrics:
            self._tell({})
            self._metrics.close()
            if self._reporting:
                mark_unfinished(self._workdir, self.step)
        self._checkpoints.save(self.state, self.step, None)
        self._checkpoints.wait()
