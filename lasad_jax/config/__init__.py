"""Everything a run is told: one tree of dataclasses, seen by users as a ConfigDict."""

from lasad_jax.config.files import (
    build_config,
    config_to_json,
    default_config,
    default_tokenizer_config,
    load_config,
)
from lasad_jax.config.runs import Config, RunConfig, TokenizerRunConfig
from lasad_jax.config.sections import (
    GUIDANCE_SCHEDULES,
    SCHEDULES,
    SOURCES,
    AugmentConfig,
    DataConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    SamplingConfig,
)

__all__ = [
    "GUIDANCE_SCHEDULES",
    "SCHEDULES",
    "SOURCES",
    "AugmentConfig",
    "Config",
    "DataConfig",
    "LossConfig",
    "MeshConfig",
    "OptimizerConfig",
    "RunConfig",
    "SamplingConfig",
    "TokenizerRunConfig",
    "build_config",
    "config_to_json",
    "default_config",
    "default_tokenizer_config",
    "load_config",
]
