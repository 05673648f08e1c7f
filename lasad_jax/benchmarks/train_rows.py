"""The training step on the device: its time, its memory, and how long it waits for codes."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from lasad_jax.benchmarks import llamagen
from lasad_jax.benchmarks.compiling import compiled
from lasad_jax.benchmarks.generators import GeneratorCase, random_batch
from lasad_jax.benchmarks.limits import AllocatorPeak, compiled_bytes
from lasad_jax.benchmarks.random_codes import write_random_codes
from lasad_jax.benchmarks.tables import one_line
from lasad_jax.benchmarks.timing import NUM_SETS, seconds_per_call
from lasad_jax.config import Config, OptimizerConfig
from lasad_jax.data.codes import CodeExamples
from lasad_jax.data.loader import train_batches
from lasad_jax.models import count_parameters, counts
from lasad_jax.training import sharding
from lasad_jax.training.state import abstract_state, init_program, init_state
from lasad_jax.training.step import Batch, jit_step, make_train_step

_EMA_DECAY = OptimizerConfig().ema_decay


def run_config(case: GeneratorCase, mixer: str, *, ema: bool = False, **model) -> Config:
    """A run with every default, but no average of the parameters unless asked for."""
    return Config(
        batch_size=case.batch,
        model=case.model(mixer, **model),
        optimizer=OptimizerConfig(ema_decay=_EMA_DECAY if ema else 0.0),
    )


def lower_step(
    config: Config, make_step: Callable = make_train_step, *, devices: int = 1
) -> jax.stages.Lowered:
    """Traces the step of a run; no state is allocated.

    Args:
      config: of the run.
      make_step: config to (state, batch) -> (state, metrics).
      devices: so many, the first ones.
    """
    mesh = _mesh(config, devices)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        state = abstract_state(config, mesh)
        return jit_step(make_step(config), state).lower(state, _random_batch(config, mesh, 0))


def lower_init(config: Config, *, devices: int = 1) -> jax.stages.Lowered:
    """Traces what makes the state before the first step, as `lower_step`."""
    mesh = _mesh(config, devices)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        return init_program(config, mesh).lower({})


class Trainer:
    """A compiled step and the state that it replaces each time.

    Attributes:
      config: of the run.
      mesh: of its devices.
    """

    def __init__(
        self,
        config: Config,
        step: jax.stages.Compiled,
        *,
        devices: int = 1,
        init: jax.stages.Compiled | None = None,
        first_step: int = 0,
    ):
        """
        Args:
          config: of the run.
          step: compiled from its `lower_step`.
          devices: as there.
          init: compiled from its `lower_init`; None to compile it here.
          first_step: what steps are counted from. Keys of dropout depend on it.
        """
        self.config, self.mesh, self._step = config, _mesh(config, devices), step
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(sharding.RULES):
            state = init({}) if init else init_state(config, self.mesh)
        count = jax.device_put(np.int32(first_step), state.step.sharding)
        self._state = state.replace(step=count)

    def __call__(self, batch: Batch) -> dict[str, Array]:
        """Takes a step and returns its metrics."""
        self._state, metrics = self._step(self._state, batch)
        return metrics

    @property
    def params(self) -> PyTree:
        """The parameters now; the next step takes their place."""
        return self._state.params

    def batch(self, seed: int) -> Batch:
        """Random codes where the step wants them, the same for any devices."""
        return _random_batch(self.config, self.mesh, seed)


def _mesh(config: Config, devices: int) -> Mesh:
    return sharding.make_mesh(config.mesh, jax.devices()[:devices])


def _random_batch(config: Config, mesh: Mesh, seed: int) -> Batch:
    batch = random_batch(config.model, config.batch_size, seed)
    return sharding.put_batch(jax.device_get(batch), mesh)


def time_row(
    case: GeneratorCase,
    mixer: str,
    step: jax.stages.Compiled | Exception,
    *,
    ema: bool,
    product_flops_per_second: float,
    how: dict,
) -> dict:
    """One row of the table: medians in seconds, or under "skipped" why there are none.

    Args:
      case, mixer: which generator.
      step: compiled from `lower_step`, or why it could not be.
      ema: whether it keeps an average of the parameters.
      product_flops_per_second: of a large matrix product.
      how: repeats and min_seconds, as in `seconds_per_call`.
    """
    config = run_config(case, mixer, ema=ema)
    tokens = case.batch * case.tokens
    row = {
        "case": str(case),
        "tokens": case.tokens,
        "mixer": mixer,
        "parameters": count_parameters(config.model),
        "product_parameters": counts.product_parameters(config.model),
        "product_flops": counts.product_flops(config.model, tokens),
        "attention_flops": counts.attention_flops(config.model, tokens),
    }
    if peer := llamagen.TRAINING.get(case.peer_key):
        row["llamagen"] = peer._asdict()
    allocator = AllocatorPeak()
    try:
        trainer = Trainer(config, compiled(step))
        batches = [(trainer.batch(seed),) for seed in range(NUM_SETS)]
        runs = seconds_per_call(trainer, batches, **how)
    except Exception as error:  # a step that does not fit says so; the others go on
        return row | {"skipped": one_line(error)}
    seconds = statistics.median(runs)
    flops_per_second = row["product_flops"] / seconds
    row |= {
        "seconds": seconds,
        "runs": runs,
        "seconds_per_token": seconds / tokens,
        "images_per_second": case.batch / seconds,
        "flops_per_second": flops_per_second,
        "of_product": flops_per_second / product_flops_per_second,
        "memory_bytes": compiled_bytes(step),
        "allocator_bytes": allocator.bytes(),
    }
    if peer:
        row["over_llamagen"] = row["images_per_second"] / peer.images_per_second
    return row


def loader_row(
    trainer: Trainer, case: GeneratorCase, *, steps: int, images: int, wait_every: int
) -> dict:
    """The training loop on stored codes: how much of its time passes in waiting for a batch.

    Args:
      trainer: of the generator.
      case: what it is.
      steps: timed, after a tenth as many (at least one) that are not.
      images: stored.
      wait_every: steps after which the host waits for the device, as a run's `log_every`.

    Returns:
      "share": of the host's time, passed in waiting for the next batch. "seconds" of a step,
      and "seconds_on_device" with the same few batches over and over, which lie on the device.
    """

    def seconds_of(batches, count: int) -> tuple[float, float]:
        waited, start = 0.0, time.perf_counter()
        for step in range(1, count + 1):
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            metrics = trainer(sharding.put_batch(batch, trainer.mesh))
            if step % wait_every == 0 or step == count:
                jax.block_until_ready(metrics)
        return waited, time.perf_counter() - start

    warm_up = max(1, steps // 10)
    with tempfile.TemporaryDirectory() as folder:
        write_random_codes(
            Path(folder),
            images=images,
            augmentations=1,
            grid=case.grid,
            vocab_size=trainer.config.model.vocab_size,
            images_per_shard=640,
        )
        batches = train_batches(CodeExamples(folder, "train"), batch_size=case.batch, seed=0)
        seconds_of(batches, warm_up)
        waited, seconds = seconds_of(batches, steps)
    on_device = itertools.cycle([trainer.batch(seed) for seed in range(NUM_SETS)])
    seconds_of(on_device, warm_up)
    _, without = seconds_of(on_device, steps)
    return {
        "case": str(case),
        "mixer": trainer.config.model.mixer,
        "steps": steps,
        "share": waited / seconds,
        "seconds": seconds / steps,
        "seconds_on_device": without / steps,
    }
