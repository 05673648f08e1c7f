"""Whole runs: what every training shares, and what a generator and a tokenizer add."""

import dataclasses
from typing import Any

from lasad_jax.config.sections import (
    AugmentConfig,
    DataConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    SamplingConfig,
    at_least,
)
from lasad_jax.models.config import ModelConfig
from lasad_jax.models.tokenizer_config import TokenizerConfig

# Fields of the model that may change between two runs of the same parameters.
_FREE_MODEL_FIELDS = ("dropout", "class_dropout", "remat", "unroll", "dtype", "implementation")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every training run is told.

    Attributes:
      seed: of everything random: initialisation, data order, dropout, samples.
      steps: optimizer steps to train for.
      batch_size: images per step over all devices.
      log_every, eval_every, sample_every, save_every: steps between each; 0 for never.
      async_save: train on while a checkpoint is being written. Else a kill at any moment loses no
        more than the steps of one `save_every`; with it, up to those since the checkpoint before.
      keep_last: newest checkpoints to keep, beside the one with the best held-out loss.
      num_samples: images in a picture made during training.
      watchdog: seconds without progress after which a line says which process is where; 0 for
        never.
      data, optimizer, mesh: sections of their own.
      model: the architecture; each kind of run has its own.
    """

    seed: int = 0
    steps: int = 1000
    batch_size: int = 256
    log_every: int = 50
    eval_every: int = 500
    sample_every: int = 500
    save_every: int = 500
    async_save: bool = True
    keep_last: int = 2
    num_samples: int = 40
    watchdog: int = 600
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    model: ModelConfig | TokenizerConfig = dataclasses.field(default_factory=ModelConfig)

    def __post_init__(self):
        at_least("config", self, 1, "steps", "batch_size", "log_every", "save_every")
        at_least("config", self, 1, "keep_last", "num_samples")
        at_least("config", self, 0, "seed", "eval_every", "sample_every", "watchdog")
        if self.batch_size % self.optimizer.accumulate:
            raise ValueError(
                f"optimizer.accumulate: {self.optimizer.accumulate} does not divide "
                f"batch_size={self.batch_size}"
            )
        if self.optimizer.schedule == "cosine" and self.optimizer.warmup_steps >= self.steps:
            raise ValueError(
                f"optimizer.warmup_steps: {self.optimizer.warmup_steps} must be below "
                f"steps={self.steps}"
            )

    def architecture(self) -> dict[str, Any]:
        """The fields that a stored state depends on, by name: they cannot change in a run."""
        return {
            f"model.{name}": value
            for name, value in dataclasses.asdict(self.model).items()
            if name not in _FREE_MODEL_FIELDS
        }

    def switches(self) -> dict[str, float]:
        """Fields of which the state depends only on whether they are 0, by name."""
        return {"optimizer.ema_decay": self.optimizer.ema_decay}


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Training a generator.

    Attributes:
      model: its architecture.
      sampling: how it draws, in training's sample grids and by default later.
      metrics_every: steps between measurements of drawn images against the training images, by
        a classifier of these or by Inception; 0 for never.
      metrics_num: images to draw for one, balanced over the classes.
      metrics: some of "fid", "sfid", "inception_score", "precision_recall", "kid",
        "class_agreement"; () for all that can be had.
      inception: file of Inception's weights; "" for the classifier.
      reference: an .npz to compare with, of training images, such as ADM's; "" for the run's
        own training images.
      init_from: a run directory whose parameters this run begins with, where their names and
        shapes agree; "" initialises all. Nothing to a run that has a checkpoint of its own.
    """

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    metrics_every: int = 0
    metrics_num: int = 1000
    metrics: tuple[str, ...] = ()
    inception: str = ""
    reference: str = ""
    init_from: str = ""

    def __post_init__(self):
        super().__post_init__()
        at_least("config", self, 0, "metrics_every")
        at_least("config", self, 1, "metrics_num")


@dataclasses.dataclass(frozen=True)
class TokenizerRunConfig(RunConfig):
    """Training a tokenizer; the defaults are LlamaGen's.

    Attributes:
      model: its architecture.
      augment: how training images vary.
      losses: what it is trained to minimise.
    """

    batch_size: int = 128
    optimizer: OptimizerConfig = dataclasses.field(
        # The discriminator's entry raises the gradient for good: no spike to leave out.
        default_factory=lambda: OptimizerConfig(weight_decay=0.0, spike_factor=0.0)
    )
    model: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    losses: LossConfig = dataclasses.field(default_factory=LossConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.data.source == "codes":
            raise ValueError("data.source: 'codes' are a tokenizer's output; name its images")
        if self.optimizer.accumulate != 1:
            raise ValueError(
                f"optimizer.accumulate: {self.optimizer.accumulate} must be 1 for a tokenizer"
            )
        if self.data.image_size != (0, 0):
            self.model.grid(self.data.image_size)

    def architecture(self) -> dict[str, Any]:
        """As above; with a discriminator, its size too."""
        sizes = ("discriminator_width", "discriminator_layers")
        names = sizes if self.losses.adversarial_weight else ()
        return super().architecture() | {
            f"losses.{name}": getattr(self.losses, name) for name in names
        }

    def switches(self) -> dict[str, float]:
        """As above, and whether there is a discriminator."""
        return super().switches() | {"losses.adversarial_weight": self.losses.adversarial_weight}
