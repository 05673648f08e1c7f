"""Training a generator on tokens: what the loop asks, answered."""

import functools
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, PyTree
from PIL import Image

from lasad_jax.config import Config
from lasad_jax.data.loader import held_out_batches, train_batches
from lasad_jax.data.tokens import Codec, TokenData, check_run_tokens, load_tokens, store_run_tokens
from lasad_jax.evaluation.in_training import TrainingMetrics
from lasad_jax.models import counts
from lasad_jax.sampling.decode import balanced_labels, sample_tokens
from lasad_jax.sampling.pictures import image_grid
from lasad_jax.training import sharding
from lasad_jax.training.checkpoints import has_checkpoint
from lasad_jax.training.init_from import open_source
from lasad_jax.training.state import TrainState, abstract_state, init_state
from lasad_jax.training.step import jit_step, make_eval_step, make_train_step
from lasad_jax.training.task import Batch, Metrics


class GeneratorTask:
    """A `Task`."""

    objective = "held_out_nats_per_token"
    curves = {"loss": "training", "held_out_nats_per_token": "held out"}  # noqa: RUF012
    unit = "loss (nats per token)"

    def __init__(self, config: Config, mesh: Mesh):
        self.config, self._mesh = config, mesh
        self.measure_every, self._measure = config.metrics_every, None
        self.data = load_tokens(config.data)
        check_model(config, self.data)
        self._train_step = jit_step(make_train_step(config), self.abstract_state())
        self._eval_step = jax.jit(make_eval_step(config.model))

    @property
    def tokens_per_image(self) -> int:
        return self.config.model.num_tokens

    @functools.cached_property
    def flops_per_image(self) -> int:
        return counts.step_flops(self.config.model, self.config.model.num_tokens)

    @functools.cached_property
    def _codec(self) -> Codec:
        return self.data.load_codec()

    def check(self, workdir: Path) -> None:
        """Refuses tokens of another tokenizer than the run's, and a run to begin with that
        cannot be.
        """
        check_run_tokens(self.data, workdir)
        if self.config.init_from and not has_checkpoint(workdir):
            open_source(self.config)

    def store(self, workdir: Path) -> None:
        """The names of the classes and, for codes, the tokenizer."""
        store_run_tokens(self.data, workdir)

    def prepare(self, workdir: Path) -> None:
        """A network to measure samples by, and the real images as it sees them."""
        if self.measure_every:
            self._measure = TrainingMetrics(self.config, workdir, self._codec)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        return abstract_state(self.config, self._mesh)

    def init_state(self) -> TrainState:
        """The state before the first step; says which parameters another run has given."""
        if not self.config.init_from:
            return init_state(self.config, self._mesh)
        source = open_source(self.config)
        if jax.process_index() == 0:
            print(source.report())
        return init_state(self.config, self._mesh, source.load(self._mesh))

    def compile(self, state: TrainState, batch: PyTree) -> None:
        """Compiles `train_step`, whose own call then finds it done."""
        self._train_step.lower(state, batch).compile()

    def train_step(self, state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        """Takes one optimizer step; the old state is donated."""
        return self._train_step(state, batch)

    def train_batches(self, start_step: int) -> Iterator[Batch]:
        """This process's part of every batch from `start_step` on."""
        return train_batches(
            self.data.training,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            start_step=start_step,
            rows=sharding.local_rows(self.config.batch_size, self._mesh),
        )

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """The loss over all held-out images."""
        batches = held_out_batches(
            self.data.held_out,
            batch_size=self.config.batch_size,
            rows=sharding.local_rows(self.config.batch_size, self._mesh),
        )
        params = state.best_params
        sums = [self._eval_step(params, sharding.put_batch(batch, self._mesh)) for batch in batches]
        total, count = np.sum(jax.device_get(sums), axis=0)
        nats = float(total / count)
        return {"held_out_nats_per_token": nats, "held_out_bits_per_token": nats / math.log(2)}

    def measure(self, state: TrainState) -> dict[str, float]:
        """Metrics of samples of every class, by the names of `lasad_jax.evaluate`'s reports."""
        labels = balanced_labels(self.config.metrics_num, self.config.model.num_classes)
        return self._measure(self._draw(state, labels), labels)

    def picture(self, state: TrainState) -> Image.Image:
        """Samples of every class, or of as many as there are samples."""
        labels = balanced_labels(self.config.num_samples, self.config.model.num_classes)
        images = self._codec.decode(self._draw(state, labels), self.config.model.grid)
        return image_grid(images, labels, class_names=self.data.class_names)

    def _draw(self, state: TrainState, labels: Int[np.ndarray, " num"]) -> Int[np.ndarray, "num N"]:
        return sample_tokens(
            self.config.model,
            state.best_params,
            labels,
            sampling=self.config.sampling,
            seed=self.config.seed,
            mesh=self._mesh,
        )


def check_model(config: Config, data: TokenData) -> None:
    """Refuses a model that does not fit the tokens."""
    model = config.model
    for name, value, wanted in (
        ("grid", tuple(model.grid), data.grid),
        ("num_classes", model.num_classes, len(data.class_names)),
        ("vocab_size", model.vocab_size, data.vocab_size),
    ):
        if value != wanted:
            raise ValueError(
                f"config.model.{name}: {value} does not fit the tokens of "
                f"data.source={config.data.source!r}; set it to {wanted}"
            )
    if config.batch_size > len(data.training):
        raise ValueError(
            f"config.batch_size: {config.batch_size} is more than the {len(data.training)} "
            "training images; lower it"
        )
