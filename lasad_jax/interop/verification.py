"""Whether an exported generator computes in PyTorch what it computes here."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from jaxtyping import PyTree

from lasad_jax.config import MeshConfig, SamplingConfig
from lasad_jax.interop.generator_files import load_generator
from lasad_jax.models import LASADGen, ModelConfig
from lasad_jax.sampling.decode import sample_tokens
from lasad_jax.training import sharding

TOLERANCE = 1e-4


class Verification(NamedTuple):
    """What `verify` found.

    Attributes:
      difference: largest absolute one among all logits.
      codes: how many were drawn, all of them alike.
    """

    difference: float
    codes: int


def verify(
    folder: str | Path, config: ModelConfig, params: PyTree, sampling: SamplingConfig
) -> Verification:
    """Compares an exported folder with what was exported, in both frameworks.

    The parameters read back are the same, up to rounding to the dtype stored. With these, in
    float32 on the CPU, on random codes with a class and without: the logits of a whole image,
    and the likeliest codes, one by one, under the guidance of the run.

    Args:
      folder: the export.
      config, params: of the generator, unboxed.
      sampling: of its run.

    Raises:
      ImportError: without torch.
      ValueError: if a parameter differs, logits differ by more than `TOLERANCE`, or any code
        does.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "verify: PyTorch is missing (pip install torch); --noverify goes without comparing"
        ) from error
    from lasad_jax.interop.modeling_lasadgen import LASADGen as TorchLASADGen

    _, stored = load_generator(folder)
    _check_parameters(stored, params)
    model = TorchLASADGen.from_pretrained(folder, dtype=torch.float32)
    config = dataclasses.replace(config, dtype="float32", param_dtype="float32", unroll=1)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, config.vocab_size, (2, config.num_tokens), np.int32)
    labels = np.array([rng.integers(config.num_classes), config.num_classes], np.int32)

    mesh = _cpu_mesh()
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        stored = jax.device_put(stored, sharding.replicated(mesh))
        logits = jax.jit(LASADGen(config).apply)({"params": stored}, codes, labels)
        greedy = dataclasses.replace(sampling, temperature=0.0)
        drawn = sample_tokens(config, stored, labels, sampling=greedy, seed=0, mesh=mesh)

    codes, labels = (torch.from_numpy(x).long() for x in (codes, labels))
    with torch.no_grad():
        difference = float(np.max(np.abs(np.asarray(logits) - model(codes, labels).numpy())))
    if not difference <= TOLERANCE:  # true of nan as well
        raise ValueError(
            f"verify: PyTorch's logits differ by {difference:.2g}, more than {TOLERANCE}; "
            "--noverify exports without comparing"
        )
    same = drawn == model.generate(labels, temperature=0).numpy()
    if not same.all():
        image, place = np.argwhere(~same)[0]
        raise ValueError(
            f"verify: PyTorch draws another code number {place} in image {image} "
            f"(logits differ by {difference:.2g}: two codes may be equally likely)"
        )
    return Verification(difference, drawn.size)


def _check_parameters(stored: PyTree, given: PyTree) -> None:
    given = flatten_dict(given)
    for keys, x in flatten_dict(stored).items():
        exact = np.asarray(given[keys], np.float32)
        if not (
            np.array_equal(x, exact)
            or np.array_equal(x, exact.astype(jnp.bfloat16).astype(x.dtype))
        ):
            raise ValueError(f"verify: {'/'.join(keys)} was not stored as it is")


def _cpu_mesh() -> Mesh:
    # Elsewhere float32 products are rounded to fewer digits.
    try:
        return sharding.make_mesh(MeshConfig(), jax.local_devices(backend="cpu")[:1])
    except RuntimeError as error:
        raise ValueError(
            "verify: JAX has no CPU devices here; unset JAX_PLATFORMS, or pass --noverify"
        ) from error
