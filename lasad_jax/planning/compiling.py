"""A run's own training step, compiled for devices that need not be at hand."""

import dataclasses
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from lasad_jax.config import Config
from lasad_jax.models.counts import attention_flops
from lasad_jax.planning import costs
from lasad_jax.planning.collectives import Collective, count_collectives
from lasad_jax.planning.hlo import Program
from lasad_jax.training import sharding
from lasad_jax.training.state import abstract_state
from lasad_jax.training.step import jit_step, make_train_step

_PLATFORMS = {"gpu": "cuda"}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      arguments: parameters, optimizer, average, and the batch.
      outputs: the new ones that do not take the place of an argument.
      temporaries: everything in between at its largest.
      code: the program.
    """

    arguments: float
    outputs: float
    temporaries: float
    code: float

    @property
    def total(self) -> float:
        return self.arguments + self.outputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step of training takes on one device.

    Attributes:
      batch: images on the device, or on each group of devices that shares them.
      memory: by kind.
      flops: of matrix products, with what is computed again, and of the operator by its formula.
      traffic: bytes to and from the device's memory; None if not known.
      collectives: what is sent between devices.
      compiled: by the compiler; else by arithmetic.
    """

    batch: int
    memory: Memory
    flops: float
    traffic: float | None
    collectives: tuple[Collective, ...]
    compiled: bool


class OutOfMemoryError(Exception):
    """The compiler found no way to fit a program.

    Attributes:
      needed: bytes; None if the compiler does not say.
    """

    def __init__(self, needed: float | None):
        super().__init__(needed)
        self.needed = needed


def compile_step(config: Config, devices: Sequence[jax.Device]) -> Step:
    """Compiles the step of a run on these devices, on the run's mesh.

    Args:
      config: of the run.
      devices: at hand or described by a topology.

    Raises:
      ValueError: for a mesh or batch that does not divide, and for a step that the compiler
        fails on.
      OutOfMemoryError: if the compiler refuses a program that does not fit.
    """
    mesh = sharding.make_mesh(config.mesh, list(devices))
    sharding.check_batch_size(config.batch_size, config.optimizer.accumulate, mesh)
    compiled = _compile(config, mesh)
    program = Program(compiled.as_text())
    sizes = compiled.memory_analysis()
    flops = float(costs.product_flops(program))
    if costs.custom_calls(program) & {"tpu_custom_call", "mosaic_gpu_v2", "__gpu$xla.gpu.triton"}:
        tokens = config.batch_size * config.model.num_tokens
        flops += attention_flops(config.model, tokens) / mesh.size
    return Step(
        batch=config.batch_size // sharding.batch_parts(mesh),
        memory=Memory(
            arguments=sizes.argument_size_in_bytes,
            outputs=max(0, sizes.output_size_in_bytes - sizes.alias_size_in_bytes),
            temporaries=sizes.temp_size_in_bytes,
            code=sizes.generated_code_size_in_bytes,
        ),
        flops=flops,
        traffic=float(costs.memory_traffic(program)),
        collectives=tuple(count_collectives(program)),
        compiled=True,
    )


def _compile(config: Config, mesh: Mesh) -> jax.stages.Compiled:
    platform = mesh.devices.flat[0].platform
    placed = sharding.batch_sharding(mesh)
    tokens = (config.batch_size, config.model.num_tokens)
    batch = {
        "tokens": jax.ShapeDtypeStruct(tokens, jnp.int32, sharding=placed),
        "labels": jax.ShapeDtypeStruct(tokens[:1], jnp.int32, sharding=placed),
    }
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        state = abstract_state(config, mesh)
        traced = jit_step(make_train_step(config), state).trace(state, batch)
        lowered = traced.lower(lowering_platforms=(_PLATFORMS.get(platform, platform),))
        try:
            return lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise OutOfMemoryError(needed_memory(str(error))) from error
            first = str(error).strip().splitlines()[0][:300]
            raise ValueError(f"config: its training step does not compile: {first}") from error


def needed_memory(message: str) -> float | None:
    """Bytes that a program would have taken, of the message of TPU's compiler; None of another."""
    for words in (r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", r"\(([\d.]+)([KMGT]?)\) exceeds"):
        if match := re.search(words, message):
            return float(match.group(1)) * _UNITS[match.group(2)]
    return None
