"""Everything a run is told: one tree of dataclasses, seen by users as a ConfigDict.

The dataclasses hold names, defaults, types and checks. `default_config` shows them as a
locked `ml_collections.ConfigDict`, which refuses unknown keys and wrong types by name,
in config files and on the command line alike; `build_config` turns one back.
"""

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from lasad_jax.models.config import ModelConfig

SCHEDULES = ("constant", "cosine")
GUIDANCE_SCHEDULES = ("constant", "linear", "power-cosine")


def _at_least(section: str, config: Any, minimum: int, *names: str) -> None:
    for name in names:
        if not (value := getattr(config, name)) >= minimum:  # true of nan as well
            raise ValueError(f"{section}.{name}: {value} must be at least {minimum}")


def _one_of(section: str, config: Any, name: str, allowed: tuple[str, ...]) -> None:
    if (value := getattr(config, name)) not in allowed:
        raise ValueError(f"{section}.{name}: {value!r} is not one of {allowed}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they become tokens.

    Attributes:
      source: "digits" (bundled with scikit-learn) or "idx" (MNIST's file format).
      directory: the folder that holds the files of `source`.
      levels: grey levels that a pixel is quantised to; the model's vocab_size.
    """

    source: str = "digits"
    directory: str = ""
    levels: int = 16


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as in LlamaGen.

    Attributes:
      learning_rate: peak rate.
      schedule: "constant", or "cosine" down to 0 at the last step.
      warmup_steps: linear warm-up from 0, in either schedule.
      b1, b2, weight_decay: AdamW; decay only for matrices, not for norms, biases or rates.
      clip_norm: largest global gradient norm.
      accumulate: micro-batches per step; the batch is split, its mean gradient is the same.
      ema_decay: decay of the parameter average, reached gradually; 0 keeps no average.
    """

    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    accumulate: int = 1
    ema_decay: float = 0.9999

    def __post_init__(self):
        _one_of("optimizer", self, "schedule", SCHEDULES)
        _at_least("optimizer", self, 0, "learning_rate", "warmup_steps", "weight_decay")
        _at_least("optimizer", self, 1, "accumulate")
        if not self.clip_norm > 0:
            raise ValueError(f"optimizer.clip_norm: {self.clip_norm} must be positive")
        for name in ("b1", "b2", "ema_decay"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"optimizer.{name}: {value} must be in [0, 1)")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis of the mesh spans; -1 (once) for all that are left.

    Attributes:
      data: copies of the model, each with its part of the batch.
      fsdp: parts that parameters are split into, each with its part of the batch too.
      tensor: parts that heads, feed-forward and vocabulary are split into.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise ValueError(
                f"mesh: (data, fsdp, tensor) = {sizes} must be positive, at most one of them -1"
            )


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How codes are drawn.

    Attributes:
      guidance: scale s of classifier-free guidance, u + s (c - u); 1 is none.
      guidance_schedule: how s grows from 1 over the tokens: "constant" (at once),
        "linear" or "power-cosine".
      guidance_power: exponent of the power-cosine schedule; larger rises later.
      temperature: divides the logits; 0 takes the likeliest code.
      top_k: draw among the k likeliest codes; 0 for all.
      top_p: draw among the fewest codes whose probability reaches p; 1 for all.
    """

    guidance: float = 2.0
    guidance_schedule: str = "constant"
    guidance_power: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        _one_of("sampling", self, "guidance_schedule", GUIDANCE_SCHEDULES)
        _at_least("sampling", self, 0, "guidance", "temperature", "top_k")
        if not self.guidance_power > 0:
            raise ValueError(f"sampling.guidance_power: {self.guidance_power} must be positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p: {self.top_p} must be in (0, 1]")


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run.

    Attributes:
      seed: of everything random: initialisation, data order, dropout, samples.
      steps: optimizer steps to train for.
      batch_size: images per step over all devices.
      log_every, eval_every, sample_every, save_every: steps between each; 0 for never.
      keep_last: newest checkpoints to keep, beside the one with the best held-out loss.
      num_samples: images, spread over the classes, in a sample grid made during training.
      data, model, optimizer, mesh, sampling: the sections above.
    """

    seed: int = 0
    steps: int = 1000
    batch_size: int = 256
    log_every: int = 50
    eval_every: int = 500
    sample_every: int = 500
    save_every: int = 500
    keep_last: int = 2
    num_samples: int = 40
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)

    def __post_init__(self):
        _at_least("config", self, 1, "steps", "batch_size", "log_every", "save_every")
        _at_least("config", self, 1, "keep_last", "num_samples")
        _at_least("config", self, 0, "seed", "eval_every", "sample_every")
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


def default_config() -> ml_collections.ConfigDict:
    """Every field at its default, as the locked ConfigDict that config files start from."""
    config = ml_collections.ConfigDict(dataclasses.asdict(Config()))
    return config.lock()


def build_config(values: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """The typed configuration.

    Args:
      values: a ConfigDict or nested mapping; what is missing takes its default.

    Raises:
      ValueError: naming the field, its value and what would do.
    """
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    return _build(Config, values, "config")


def _build(cls: type, values: Mapping[str, Any], path: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"{path}.{unknown[0]}: unknown key; {path} has {sorted(fields)}")
    types = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        where, wanted = f"{path}.{name}", types[name]
        if dataclasses.is_dataclass(wanted):
            if not isinstance(value, Mapping):
                raise ValueError(f"{where}: expected a section, got {value!r}")
            arguments[name] = _build(wanted, value, where)
            continue
        if typing.get_origin(wanted) is tuple:
            items, wanted = list(typing.get_args(wanted)), tuple
            value = tuple(value) if isinstance(value, list) else value
            if isinstance(value, tuple) and [type(item) for item in value] != items:
                names = ", ".join(item.__name__ for item in items)
                raise ValueError(f"{where}: expected ({names}), got {value!r}")
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise ValueError(f"{where}: expected {wanted.__name__}, got {value!r}")
        arguments[name] = value
    return cls(**arguments)


def config_to_json(config: Config) -> str:
    """As stored in a run directory."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def load_config(workdir: Path) -> Config:
    """The configuration that a run directory was made with.

    Raises:
      FileNotFoundError: if there is no run in `workdir`.
    """
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"workdir: no run in {workdir} ({path.name} is missing)")
    return build_config(json.loads(path.read_text()))
