"""The training loop: batches in, checkpoints, numbers and pictures out."""

import contextlib
import time
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn

from lasad_jax.config import Config, RunConfig, TokenizerRunConfig
from lasad_jax.sampling.pictures import write_png
from lasad_jax.training import sharding
from lasad_jax.training.checkpoints import Checkpoints, check_config, store_config
from lasad_jax.training.generator_task import GeneratorTask
from lasad_jax.training.metrics import Metrics, plot_losses, progress_bar
from lasad_jax.training.tokenizer_task import TokenizerTask

TASKS = {Config: GeneratorTask, TokenizerRunConfig: TokenizerTask}


def train(config: RunConfig, workdir: Path) -> None:
    """Trains, or goes on training, the run in `workdir`.

    Running it again after a kill at any moment goes on from the newest checkpoint and
    arrives at the same parameters.

    Args:
      config: of a generator or of a tokenizer.
      workdir: folder of the run; made if missing.

    Raises:
      ValueError: for a configuration that does not fit the data, the devices or the run
        already in `workdir`; before any device time is spent.
      FloatingPointError: at the step whose loss or gradient is not finite. The last good
        checkpoint stays.
    """
    workdir = Path(workdir)

    # ---- Mesh, data and state
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(config.batch_size, config.optimizer.accumulate, mesh)
    check_config(config, workdir)
    task = TASKS[type(config)](config, mesh)
    task.check(workdir)
    first = jax.process_index() == 0
    if first:
        store_config(config, workdir)
        task.store(workdir)
    task.prepare(workdir)
    checkpoints = Checkpoints(workdir, keep_last=config.keep_last)
    start = checkpoints.latest_step()
    # Closed however the loop ends: a checkpoint may still be on its way to disk.
    with (
        contextlib.closing(checkpoints),
        jax.set_mesh(mesh),
        nn.logical_axis_rules(sharding.RULES),
    ):
        if start is None:
            state, start = task.init_state(), 0
        else:
            state = checkpoints.restore(start, task.abstract_state())

        # ---- Loop
        batches = task.train_batches(start)
        metrics = Metrics(workdir, start) if first else None
        bar = progress_bar(start, config.steps, visible=first)
        pending, since = [], time.monotonic()
        for step in range(start + 1, config.steps + 1):
            state, step_metrics = task.train_step(state, sharding.put_batch(next(batches), mesh))
            pending.append(step_metrics)
            bar.update()
            last = step == config.steps
            due = lambda every, step=step, last=last: every and (step % every == 0 or last)

            saving, sampling = due(config.save_every), due(config.sample_every)
            evaluating, measuring = due(config.eval_every), due(task.measure_every)
            row = {}
            if due(config.log_every) or saving or evaluating or sampling or measuring:
                # Here alone the host waits for the device: a bad step is known before its
                # parameters can reach a checkpoint, and no step is timed with what follows.
                values = jax.device_get(pending)
                check_finite(values, step)
                rate = len(values) * config.batch_size / (time.monotonic() - since)
                row = _summary(values) | {"images_per_second": rate}
                bar.set_postfix_str(f"loss {row['loss']:.4f}, {rate:.0f} images/s", refresh=False)
                pending, since = [], time.monotonic()

            evaluated = None
            if evaluating:
                row |= task.evaluate(state)
                evaluated = row[task.objective]
            if measuring:
                row |= task.measure(state)
            if row and metrics:
                metrics.scalars(step, row)
            if saving:
                checkpoints.save(state, step, evaluated)
            if sampling:
                picture = task.picture(state)
                if metrics:
                    metrics.picture(step, "samples", picture)
                    write_png(workdir / "samples" / f"step_{step:07d}.png", picture)
            if evaluating or sampling or measuring:
                since = time.monotonic()
        bar.close()

    if metrics:
        metrics.close()
        plot_losses(workdir / "metrics.jsonl", workdir / "loss.png", task.curves, task.unit)


def _summary(values: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Means over the steps; of the learning rate, which is no measurement, the newest."""
    means = {name: float(np.mean([value[name] for value in values])) for name in values[-1]}
    return means | {"learning_rate": float(values[-1]["learning_rate"])}


def check_finite(values: list[dict[str, np.ndarray]], step: int) -> None:
    """Refuses to go on from a loss or gradient that is not finite.

    Args:
      values: metrics of the newest steps, up to `step`.
    """
    for i, value in enumerate(values):
        if not (np.isfinite(value["loss"]) and np.isfinite(value["grad_norm"])):
            raise FloatingPointError(
                f"step {step - len(values) + 1 + i}: loss {value['loss']}, gradient norm "
                f"{value['grad_norm']}. The last checkpoint is from before this step; lower "
                "optimizer.learning_rate or optimizer.clip_norm and run the same command again"
            )
