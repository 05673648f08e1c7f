"""Training a tokenizer on images: what the loop asks, answered."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import PyTree
from PIL import Image

from lasad_jax.config import DataConfig, MeshConfig, TokenizerRunConfig, load_config
from lasad_jax.data.image_examples import ImageExamples
from lasad_jax.data.loader import held_out_batches, train_batches
from lasad_jax.evaluation.reconstruction import codebook_usage
from lasad_jax.interop.tokenizer_files import load_tokenizer
from lasad_jax.models.codec import TokenizerCodec
from lasad_jax.models.discriminator import check_discriminator
from lasad_jax.models.lpips import check_perceptual, load_lpips
from lasad_jax.models.tokenizer_config import TokenizerConfig
from lasad_jax.sampling.pictures import image_grid
from lasad_jax.training import sharding
from lasad_jax.training.checkpoints import Checkpoints
from lasad_jax.training.state import abstract, create
from lasad_jax.training.task import Batch, Metrics
from lasad_jax.training.tokenizer_step import (
    TokenizerState,
    make_tokenizer_eval_step,
    make_tokenizer_step,
    new_state,
)


class TokenizerTask:
    """A `Task`."""

    objective = "held_out_reconstruction"
    curves = {"reconstruction": "training", "held_out_reconstruction": "held out"}  # noqa: RUF012
    unit = "reconstruction loss"
    measure_every = 0  # `evaluate` measures all that there is
    tokens_per_image = 0
    flops_per_image = None

    def __init__(self, config: TokenizerRunConfig, mesh: Mesh):
        self.config, self._mesh = config, mesh
        self._vgg = jax.device_put(_load_perceptual(config), sharding.replicated(mesh))
        first = jax.process_index() == 0
        channels = config.model.channels
        self._training = ImageExamples(
            config.data, "train", channels=channels, augment=config.augment, progress=first
        )
        self._held_out = ImageExamples(config.data, "test", channels=channels, progress=first)
        self._check()
        self._train_step = jax.jit(make_tokenizer_step(config), donate_argnums=0)
        self._eval_step = jax.jit(make_tokenizer_eval_step(config.model, config.losses))

    def _check(self) -> None:
        config, size = self.config, self._training.size
        config.model.grid(size)
        if self._vgg is not None:
            check_perceptual(size)
        if config.losses.adversarial_weight:
            check_discriminator(config.losses, size)
        if config.batch_size > len(self._training):
            raise ValueError(
                f"config.batch_size: {config.batch_size} is more than the "
                f"{len(self._training)} training images; lower it"
            )

    def check(self, workdir: Path) -> None:
        """A tokenizer may go on with other images."""

    def store(self, workdir: Path) -> None:
        """Nothing: config.json and the checkpoints are all that it needs."""

    def prepare(self, workdir: Path) -> None:
        """Nothing."""

    def abstract_state(self) -> TokenizerState:
        """Shapes, dtypes and shardings of the state."""
        return abstract(lambda: new_state(self.config), self._mesh)

    def init_state(self) -> TokenizerState:
        """The state before the first step."""
        return create(lambda: new_state(self.config), self._mesh)

    def compile(self, state: TokenizerState, batch: PyTree) -> None:
        """Compiles `train_step`, whose own call then finds it done."""
        self._train_step.lower(state, batch, self._vgg).compile()

    def train_step(self, state: TokenizerState, batch: PyTree) -> tuple[TokenizerState, Metrics]:
        """Takes one step of tokenizer and discriminator; the old state is donated."""
        return self._train_step(state, batch, self._vgg)

    def train_batches(self, start_step: int) -> Iterator[Batch]:
        """This process's part of every batch from `start_step` on."""
        return train_batches(
            self._training,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            start_step=start_step,
            rows=sharding.local_rows(self.config.batch_size, self._mesh),
            num_threads=self._training.num_threads,
        )

    def evaluate(self, state: TokenizerState) -> dict[str, float]:
        """Reconstruction of the held-out images, and how they use the codebook."""
        batches = held_out_batches(
            self._held_out,
            batch_size=self.config.batch_size,
            rows=sharding.local_rows(self.config.batch_size, self._mesh),
        )
        parts = [
            self._eval_step(state.best_params, sharding.put_batch(batch, self._mesh), self._vgg)
            for batch in batches
        ]
        sums = jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *jax.device_get(parts))
        usage, perplexity = codebook_usage(sums["codes"])
        return {
            "held_out_reconstruction": float(sums["reconstruction"] / sums["images"]),
            "held_out_psnr": float(sums["psnr"] / sums["images"]),
            "held_out_ssim": float(sums["ssim"] / sums["images"]),
            "held_out_codebook_usage": float(usage),
            "held_out_codebook_perplexity": float(perplexity),
        }

    def measure(self, state: TokenizerState) -> dict[str, float]:
        """Nothing."""
        return {}

    def picture(self, state: TokenizerState) -> Image.Image:
        """Held-out images, each beside its reconstruction."""
        count = min(self.config.num_samples, len(self._held_out))
        rows = np.linspace(0, len(self._held_out) - 1, count).astype(np.int64)
        images = self._held_out.batch(rows)["images"]
        # Whole on every device first: a process sees no parts that others hold.
        params = jax.device_put(state.best_params, sharding.replicated(self._mesh))
        codec = TokenizerCodec(self.config.model, jax.device_get(params))
        grid = self.config.model.grid(self._held_out.size)
        pairs = np.stack([images, codec.decode(codec.encode(images), grid)], axis=1)
        return image_grid(pairs.reshape(-1, *images.shape[1:]), columns=10)


def load_trained_tokenizer(workdir: Path) -> tuple[TokenizerRunConfig, PyTree, int]:
    """A run's configuration, its parameters with the best held-out reconstruction (their
    average where there is one), on the host, and their step.

    Raises:
      FileNotFoundError: no run in `workdir`, or none with a checkpoint.
      ValueError: a run of another kind.
    """
    config = load_config(workdir, TokenizerRunConfig)
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.best_step()
    if step is None:
        raise FileNotFoundError(f"workdir: the run in {workdir} has no checkpoint yet")
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    state = checkpoints.restore(step, abstract(lambda: new_state(config), mesh))
    return config, jax.device_get(state.best_params), step


def load_any_tokenizer(path: Path) -> tuple[TokenizerConfig, PyTree, DataConfig]:
    """A tokenizer in float32 and the images to take by default, from a run or a file.

    Raises:
      FileNotFoundError, ValueError: as `load_trained_tokenizer` and `load_tokenizer`.
    """
    if path.is_dir():
        run_config, params, _ = load_trained_tokenizer(path)
        model, data = run_config.model, run_config.data
    else:
        (model, params), data = load_tokenizer(path), DataConfig(source="folder")
    return dataclasses.replace(model, dtype="float32"), params, data


def _load_perceptual(config: TokenizerRunConfig) -> PyTree | None:
    """LPIPS's parameters, or a word that it is off."""
    if not config.losses.perceptual_weight:
        return None
    if not config.losses.vgg16:
        logging.warning(
            "losses.vgg16: not given, so that LPIPS is left out; it takes torchvision's "
            "vgg16-397923af.pth (losses.perceptual_weight=0 silences this)"
        )
        return None
    return load_lpips(config.losses.vgg16, config.losses.lpips)
