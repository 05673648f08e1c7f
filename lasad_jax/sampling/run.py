"""A trained generator at work: its run directory, or what was exported from it, opened once, any
number of jobs drawn from it."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Int, PyTree

from lasad_jax.config import Config, SamplingConfig, load_config
from lasad_jax.data.pixel_tokens import PixelCodec
from lasad_jax.data.tokens import Codec, load_class_names, load_run_codec
from lasad_jax.interop.export_folder import read_export
from lasad_jax.models.codec import TokenizerCodec
from lasad_jax.sampling.decode import sample_batches
from lasad_jax.sampling.job import Job, digest, draw_parts, fingerprint
from lasad_jax.sampling.pictures import image_grid
from lasad_jax.training import sharding
from lasad_jax.training.checkpoints import find_step, restore_parameters


@dataclasses.dataclass(frozen=True, eq=False)
class GeneratorRun:
    """What drawing from a run takes.

    Attributes:
      config: of the run.
      mesh: all devices, which have `params`.
      step: of the parameters' checkpoint.
      raw: they are the parameters themselves, not their average.
      codec: from codes to images and back.
      class_names: one for each class, if the run has stored them.
      read: gives the parameters.
    """

    config: Config
    mesh: Mesh
    step: int
    raw: bool
    codec: Codec
    class_names: tuple[str, ...] | None
    read: Callable[[], PyTree]

    @classmethod
    def open(cls, workdir: Path, *, step: int | None = None, raw: bool = False) -> "GeneratorRun":
        """Opens the run in `workdir` at a checkpoint; by default the best by held-out loss.

        Raises:
          FileNotFoundError: no run there.
          ValueError: a run of a tokenizer, or no such checkpoint.
        """
        workdir = Path(workdir)
        config = load_config(workdir)
        codec, class_names = load_run_codec(config.data, workdir), load_class_names(workdir)
        mesh, step = sharding.make_mesh(config.mesh), find_step(workdir, step)
        read = functools.partial(restore_parameters, config, workdir, mesh, step, raw=raw)
        return cls(config, mesh, step, raw, codec, class_names, read)

    @classmethod
    def open_export(cls, folder: Path) -> "GeneratorRun":
        """Opens what `python -m lasad_jax.export` wrote, as the run at step 0 that it can become.

        Raises:
          FileNotFoundError, ValueError: as `read_export`.
        """
        config, params, tokenizer, class_names = read_export(folder)
        if jax.default_backend() == "cpu":
            # No slower there than bf16, and images do not depend on the batch size.
            model = dataclasses.replace(config.model, dtype="float32")
            config = dataclasses.replace(config, model=model)
        codec = TokenizerCodec(*tokenizer) if tokenizer else PixelCodec(config.data.levels)
        mesh = sharding.make_mesh(config.mesh)
        return cls(config, mesh, 0, False, codec, class_names, lambda: params)

    @functools.cached_property
    def params(self) -> PyTree:
        """Of the generator; read when first asked for, so that bad requests are refused before."""
        with _on(self.mesh):
            return self.read()

    @functools.cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """Rows, columns and channels of the images it draws."""
        tokens = np.zeros((1, self.config.model.num_tokens), np.int32)
        return self.codec.decode(tokens, self.config.model.grid).shape[1:]

    @functools.cached_property
    def parameters(self) -> str:
        """Which parameters they are, and their fingerprint."""
        return f"{'raw' if self.raw else 'average'} {fingerprint(self.params)}"

    def job(
        self,
        out: Path,
        labels: Int[np.ndarray, " num"],
        *,
        sampling: SamplingConfig,
        seed: int,
        batch_size: int,
        given: Int[np.ndarray, "num n"] | None = None,
    ) -> Job:
        """The job of drawing these images.

        Args:
          out: path of the results without ending.
          labels, sampling, seed, batch_size, given: see `sample_batches`.
        """
        identity = {
            "step": self.step,
            "parameters": self.parameters,
            "seed": seed,
            "num": len(labels),
            "labels": digest(labels),
            "given": "none" if given is None else f"{given.shape[1]} codes {digest(given)}",
            "batch_size": batch_size,
        }
        return Job(out, labels, batch_size, identity | dataclasses.asdict(sampling))

    def draw(self, job: Job, given: Int[np.ndarray, "num n"] | None = None) -> None:
        """Draws what is missing of a job of `job`, and joins its parts; all processes together.

        Raises:
          ValueError: parts of another job, labels or given codes out of range.
        """
        if job.is_finished():
            return
        names = [field.name for field in dataclasses.fields(SamplingConfig)]
        draw = functools.partial(
            sample_batches,
            self.config.model,
            self.params,
            job.labels,
            sampling=SamplingConfig(**{name: job.identity[name] for name in names}),
            seed=job.identity["seed"],
            mesh=self.mesh,
            batch_size=job.batch_size,
            given=given,
        )
        with _on(self.mesh):
            draw_parts(job, draw, lambda tokens: self.codec.decode(tokens, self.config.model.grid))
        if jax.process_index() == 0:
            shown = _shown(job.labels)
            images, labels = job.read_images(shown), job.labels[shown]
            job.finish(image_grid(images, labels, class_names=self.class_names))
        # Whoever reads the results next finds them there.
        multihost_utils.sync_global_devices("drawn")


def _shown(labels: Int[np.ndarray, " num"], most: int = 200) -> Int[np.ndarray, " shown"]:
    """Indices of the images for the picture: the first of every class, as many as fit."""
    classes, counts = np.unique(labels, return_counts=True)
    each = min(counts.max(), max(1, most // len(classes)))
    return np.concatenate([np.flatnonzero(labels == c)[:each] for c in classes])[:most]


@contextlib.contextmanager
def _on(mesh: Mesh) -> Iterator[None]:
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        yield
