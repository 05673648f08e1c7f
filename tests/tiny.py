"""A run of a few seconds; also a config file (--config=tests/tiny.py) for subprocesses."""

import dataclasses
import os
import sys
from pathlib import Path

import jax
import ml_collections
from flax import linen as nn

from lasad_jax.config import Config, build_config, default_config
from lasad_jax.data import TokenExamples, images_to_tokens, load_images, train_batches
from lasad_jax.models import ModelConfig
from lasad_jax.models.generator import init_parameters
from lasad_jax.training import sharding
from lasad_jax.training.state import init_state
from lasad_jax.training.step import jit_step, make_train_step

ROOT = Path(__file__).parents[1]


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.update(steps=8, batch_size=16, log_every=1, eval_every=0, sample_every=0, save_every=4)
    config.num_samples = 10
    config.data.levels = 8
    config.model.update(
        vocab_size=8,
        num_classes=10,
        grid=(8, 8),
        num_layers=2,
        width=16,
        num_heads=2,
        dtype="float32",
    )
    config.optimizer.update(learning_rate=1e-3, ema_decay=0.9)
    return config


def tiny_config(**overrides) -> Config:
    """Overrides are fields, or dicts of a section's fields."""
    config = get_config()
    config.update(overrides)
    return build_config(config)


_init = jax.jit(lambda *args: nn.unbox(init_parameters(*args)), static_argnums=0)
_SHAPELESS = {"dropout": 0.0, "remat": "none", "unroll": 1, "dtype": "float32"}


def initial_parameters(config: ModelConfig, seed: int):
    """Without boxes; configurations that differ in nothing that shapes them share a program."""
    return _init(dataclasses.replace(config, **_SHAPELESS), jax.random.key(seed))


def tokens_and_labels(config: Config, split: str = "train"):
    images = load_images(config.data, split)
    return images_to_tokens(images.images, config.data.levels), images.labels


def train_steps(config: Config, mesh, steps: int, see=lambda state: None):
    """The state after some steps, and the loss of each; `see` is shown every state."""
    batches = train_batches(
        TokenExamples(*tokens_and_labels(config)),
        batch_size=config.batch_size,
        seed=config.seed,
        rows=sharding.local_rows(config.batch_size, mesh),
    )
    losses = []
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        state = init_state(config, mesh)
        step = jit_step(make_train_step(config), state)
        see(state)
        for _ in range(steps):
            state, metrics = step(state, sharding.put_batch(next(batches), mesh))
            losses.append(float(metrics["loss"]))
            see(state)
    return state, losses


def one_device_mesh(config: Config):
    return sharding.make_mesh(config.mesh, jax.devices()[:1])


def command(*flags: str) -> list[str]:
    """The training command; a later --config wins."""
    return [sys.executable, "-m", "lasad_jax.train", "--config=tests/tiny.py", *flags]


def environment(devices: int) -> dict[str, str]:
    """For a subprocess in ROOT; its compilation cache lies with the tests' own."""
    xla_flags = os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={devices}"
    return os.environ | {"HOME": str(ROOT / ".cache"), "XLA_FLAGS": xla_flags}
