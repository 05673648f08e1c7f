"""Drawing images on several devices: its time, and whether the codes are those of one device."""

import dataclasses
import functools
import time
from collections.abc import Callable, Hashable, Mapping

import jax
import numpy as np
from jaxtyping import Int, PyTree

from lasad_jax.benchmarks.compiling import Compilation, compiled
from lasad_jax.benchmarks.decoding import GUIDANCE
from lasad_jax.benchmarks.generators import GeneratorCase
from lasad_jax.benchmarks.tables import one_line
from lasad_jax.config import MeshConfig, SamplingConfig
from lasad_jax.models import ModelConfig
from lasad_jax.models.generator import init_parameters
from lasad_jax.sampling.decode import balanced_labels, lower_programs, sample_tokens
from lasad_jax.training import sharding
from lasad_jax.training.state import unbox

_SEED = 0


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Images that devices draw.

    Attributes:
      case: the generator; its batch is that of one device.
      images: to draw.
      devices: their number.
      dtype: of activations.
      temperature: 0 for the likeliest code each time.
    """

    case: GeneratorCase
    images: int
    devices: int
    dtype: str = "bfloat16"
    temperature: float = 1.0

    @property
    def alone(self) -> "Drawing":
        """The same images on one device, as many at a time on each: what this is compared with."""
        return dataclasses.replace(self, devices=1)

    @property
    def label(self) -> dict:
        """Fields of its row that say what it is."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"case": str(self.case)}

    @property
    def model(self) -> ModelConfig:
        """The generator."""
        return self.case.model("lasad", dtype=self.dtype)

    @property
    def how(self) -> dict:
        """What `sample_tokens` and `lower_programs` are told."""
        return {
            "sampling": SamplingConfig(guidance=GUIDANCE, temperature=self.temperature),
            "mesh": sharding.make_mesh(MeshConfig(), jax.devices()[: self.devices]),
            "batch_size": self.case.batch * self.devices,
        }

    @property
    def lowers(self) -> dict[Hashable, Callable[[], jax.stages.Lowered]]:
        """What traces its programs, under their names; nothing is allocated."""
        traced = functools.cache(self._lower)
        return {(what, self): lambda i=i: traced()[i] for i, what in enumerate(("prepare", "draw"))}

    def _lower(self) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
        return lower_programs(self.model, jax.eval_shape(self.parameters), **self.how)

    def parameters(self) -> PyTree:
        """Random ones, for any dtype of activations the same."""
        return _parameters(self.case.model("lasad"))


@functools.partial(jax.jit, static_argnums=0)
def _parameters(config: ModelConfig) -> PyTree:
    """The head's are random too: it begins at zero, and all codes would be alike."""
    params = unbox(init_parameters(config, jax.random.key(_SEED)))
    head = params["head"]["kernel"]
    drawn = jax.random.normal(jax.random.key(_SEED + 1), head.shape, head.dtype)
    return params | {"head": {"kernel": drawn / config.width**0.5}}


def draw_row(
    drawing: Drawing,
    programs: Compilation,
    seen: Mapping[Drawing, Int[np.ndarray, "num N"]],
) -> tuple[dict, Int[np.ndarray, "num N"] | None]:
    """One row of the table, and the codes drawn; or why there are none, and None.

    Args:
      drawing: what to time.
      programs: with its own, of `lowers`.
      seen: codes of drawings before; with those of `drawing.alone` the row says how many
        images and codes are the same.
    """
    row = drawing.label
    try:
        for name in drawing.lowers:
            compiled(programs.result(name))
        how = drawing.how
        # Where they have to be: what is timed begins with it.
        params = jax.device_put(drawing.parameters(), sharding.replicated(how["mesh"]))
        draw = functools.partial(sample_tokens, drawing.model, params, seed=_SEED, **how)
        labels = balanced_labels(drawing.images, drawing.model.num_classes)
        draw(labels[: how["batch_size"]])
        start = time.perf_counter()
        tokens = draw(labels)
        passed = time.perf_counter() - start
    except Exception as error:  # what does not fit says so; the others go on
        return row | {"skipped": one_line(error)}, None
    rate = drawing.images / passed
    row |= {
        "seconds": passed,
        "images_per_second": rate,
        "per_device": rate / drawing.devices,
        "compiling": programs.unfinished,
    }
    if drawing.devices > 1 and drawing.alone in seen:
        same = tokens == seen[drawing.alone]
        row["same_images"], row["same_codes"] = float(same.all(axis=1).mean()), float(same.mean())
    return row, tokens
