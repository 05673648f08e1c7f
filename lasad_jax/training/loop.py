"""The training loop: data in, checkpoints, numbers and pictures out."""

import contextlib
import math
import time
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn

from lasad_jax.config import Config
from lasad_jax.data.images import ImageSet, load_images
from lasad_jax.data.loader import TokenExamples, held_out_batches, train_batches
from lasad_jax.data.pixel_tokens import images_to_tokens, tokens_to_images
from lasad_jax.sampling.decode import balanced_labels, sample_tokens
from lasad_jax.sampling.pictures import image_grid, write_png
from lasad_jax.training import sharding
from lasad_jax.training.checkpoints import Checkpoints, store_config
from lasad_jax.training.metrics import Metrics, plot_losses, progress_bar
from lasad_jax.training.state import abstract_state, init_state
from lasad_jax.training.step import make_eval_step, make_train_step


def train(config: Config, workdir: Path) -> None:
    """Trains, or goes on training, the run in `workdir`.

    Running it again after a kill at any moment goes on from the newest checkpoint and
    arrives at the same parameters.

    Raises:
      ValueError: for a configuration that does not fit the data, the devices or the run
        already in `workdir`; before any device time is spent.
      FloatingPointError: at the step whose loss or gradient is not finite. The last good
        checkpoint stays.
    """
    workdir = Path(workdir)

    # ---- Data
    training, held_out = (
        load_images(config.data.source, split, directory=config.data.directory)
        for split in ("train", "test")
    )
    check_data(config, training)
    train_tokens, held_out_tokens = (
        images_to_tokens(images.images, config.data.levels) for images in (training, held_out)
    )

    # ---- Mesh and state
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(config.batch_size, config.optimizer.accumulate, mesh)
    first = jax.process_index() == 0
    store_config(config, workdir, write=first)
    checkpoints = Checkpoints(workdir, keep_last=config.keep_last)
    start = checkpoints.latest_step()
    # Closed however the loop ends: a checkpoint may still be on its way to disk.
    with (
        contextlib.closing(checkpoints),
        jax.set_mesh(mesh),
        nn.logical_axis_rules(sharding.RULES),
    ):
        if start is None:
            state, start = init_state(config, mesh), 0
        else:
            state = checkpoints.restore(start, abstract_state(config, mesh))
        train_step = jax.jit(make_train_step(config), donate_argnums=0)
        eval_step = jax.jit(make_eval_step(config.model))

        def held_out_loss(params) -> float:
            batches = held_out_batches(
                TokenExamples(held_out_tokens, held_out.labels),
                batch_size=config.batch_size,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
            sums = [eval_step(params, sharding.put_batch(batch, mesh)) for batch in batches]
            total, count = np.sum(jax.device_get(sums), axis=0)
            return float(total / count)

        def sample_grid(params):
            labels = balanced_labels(config.num_samples, config.model.num_classes)
            tokens = sample_tokens(
                config.model, params, labels, sampling=config.sampling, seed=config.seed, mesh=mesh
            )
            images = tokens_to_images(tokens, config.model.grid, config.data.levels)
            return image_grid(images, labels)

        # ---- Loop
        batches = train_batches(
            TokenExamples(train_tokens, training.labels),
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        metrics = Metrics(workdir, start) if first else None
        bar = progress_bar(start, config.steps, visible=first)
        pending, since = [], time.monotonic()
        for step in range(start + 1, config.steps + 1):
            state, step_metrics = train_step(state, sharding.put_batch(next(batches), mesh))
            pending.append(step_metrics)
            bar.update()
            last = step == config.steps
            due = lambda every, step=step, last=last: every and (step % every == 0 or last)

            saving, sampling = due(config.save_every), due(config.sample_every)
            evaluating = due(config.eval_every)
            if due(config.log_every) or saving or evaluating or sampling:
                # Here alone the host waits for the device: a bad step is known before its
                # parameters can reach a checkpoint, and no step is timed with what follows.
                values = jax.device_get(pending)
                check_finite(values, step)
                elapsed = time.monotonic() - since
                rate = len(values) * config.batch_size / elapsed
                loss = float(np.mean([value["loss"] for value in values]))
                bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s", refresh=False)
                if metrics:
                    metrics.scalars(
                        step,
                        {
                            "loss": loss,
                            "grad_norm": float(values[-1]["grad_norm"]),
                            "learning_rate": float(values[-1]["learning_rate"]),
                            "images_per_second": rate,
                        },
                    )
                pending, since = [], time.monotonic()

            evaluated = None
            if evaluating:
                evaluated = held_out_loss(state.best_params)
                if metrics:
                    metrics.scalars(
                        step,
                        {
                            "held_out_nats_per_token": evaluated,
                            "held_out_bits_per_token": evaluated / math.log(2),
                        },
                    )
            if saving:
                checkpoints.save(state, step, evaluated)
            if sampling:
                picture = sample_grid(state.best_params)
                if metrics:
                    metrics.picture(step, "samples", picture)
                    write_png(workdir / "samples" / f"step_{step:07d}.png", picture)
            if evaluating or sampling:
                since = time.monotonic()
        bar.close()

    if metrics:
        metrics.close()
        plot_losses(workdir / "metrics.jsonl", workdir / "loss.png")


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


def check_data(config: Config, images: ImageSet) -> None:
    """Refuses a model that does not fit the images."""
    model, shape = config.model, images.images.shape
    for name, value, wanted in (
        ("grid", tuple(model.grid), tuple(shape[1:3])),
        ("num_classes", model.num_classes, images.num_classes),
        ("vocab_size", model.vocab_size, config.data.levels),
    ):
        if value != wanted:
            raise ValueError(
                f"config.model.{name}: {value} does not fit data.source={config.data.source!r} "
                f"with data.levels={config.data.levels}; set it to {wanted}"
            )
    if config.batch_size > shape[0]:
        raise ValueError(
            f"config.batch_size: {config.batch_size} is more than the {shape[0]} training "
            "images; lower it"
        )
