"""A training step by arithmetic alone, where no compiler for the devices is at hand."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jaxtyping import PyTree

from lasad_jax.config import Config, MeshConfig
from lasad_jax.models.config import ModelConfig
from lasad_jax.models.counts import attention_flops, product_flops
from lasad_jax.models.generator import LASADGen, abstract_parameters
from lasad_jax.ops.passes.mixed_heads import GATE_COLUMNS
from lasad_jax.planning.collectives import Collective, collective
from lasad_jax.planning.compiling import Memory, Step
from lasad_jax.planning.topologies import Topology
from lasad_jax.training import sharding
from lasad_jax.training.cross_entropy import MAX_LOGITS, mean_loss
from lasad_jax.training.state import abstract_state, unbox


def estimate_step(config: Config, topology: Topology) -> Step:
    """The step of a run on the run's mesh of these devices, nothing compiled.

    Parameters, optimizer, average and gradients are exact. Activations are what differentiation
    keeps of a traced step, without what XLA adds or saves, and not split over "tensor".
    Collectives are those of the axes' meaning: fsdp gathers parameters once, and keeps them, or
    twice where memory is short (model.remat), and scatters gradients, data (and slice) add up
    gradients, tensor adds up two activations a layer each way. Traffic to memory is not known.

    Raises:
      ValueError: for a mesh or batch that does not divide.
    """
    mesh = mesh_of(config.mesh, topology)
    sharding.check_batch_size(config.batch_size, config.optimizer.accumulate, mesh)
    model, images = config.model, config.batch_size // sharding.batch_parts(mesh)
    state = abstract_state(config, mesh)
    at_once = images // config.optimizer.accumulate
    logits = min(at_once * model.num_tokens * model.vocab_size, MAX_LOGITS)
    kept = at_once * _kept_per_image(model, topology.chip.kind, topology.chip.platform)
    tokens = config.batch_size * model.num_tokens
    flops = product_flops(model, tokens) + attention_flops(model, tokens)
    return Step(
        batch=images,
        memory=Memory(
            arguments=_bytes_per_device(state) + 4 * images * (model.num_tokens + 1),
            outputs=0.0,
            temporaries=kept
            + _bytes_per_device(state.params)
            + (_parameter_bytes(model, mesh) if _sends_once(model, mesh) else 0)
            + 2 * logits * _width(model),
            code=0.0,
        ),
        flops=flops / mesh.size,
        traffic=None,
        collectives=tuple(_collectives(model, mesh, images)),
        compiled=False,
    )


def mesh_of(config: MeshConfig, topology: Topology) -> AbstractMesh:
    """The run's mesh of a machine, which is one slice."""
    sizes = sharding.axis_sizes(config, topology.num_devices, 1, f"of {topology.name}")
    return AbstractMesh(
        sizes,
        sharding.AXES,
        axis_types=(AxisType.Auto,) * len(sizes),
        abstract_device=_device(topology.chip.kind, topology.chip.platform),
    )


def _device(kind: str, platform: str) -> AbstractDevice:
    return AbstractDevice(device_kind=kind, platform=platform, num_cores=1)


def _bytes_per_device(tree: PyTree) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


@functools.cache
def _kept_per_image(config: ModelConfig, kind: str, platform: str) -> int:
    """Bytes that the forward pass of one image more keeps for the backward pass."""
    device = _device(kind, platform)
    model = LASADGen(config, train=True)
    params = unbox(abstract_parameters(config))

    def pullback(params, tokens, labels, key):
        def loss(params):
            x, kernel = model.apply(
                {"params": params}, tokens, labels, rngs={"dropout": key}, method="before_head"
            )
            return mean_loss(x, kernel, tokens)

        return jax.vjp(loss, params)[1]

    def kept(images: int) -> int:
        shapes = (images, config.num_tokens), (images,)
        batch = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            residuals = jax.eval_shape(pullback, params, *batch, jax.random.key(0))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))

    return kept(2) - kept(1)


def _collectives(config: ModelConfig, mesh: AbstractMesh, images: int) -> list[Collective]:
    size, layers, found = dict(mesh.shape), config.num_layers, []
    whole = _parameter_bytes(config, mesh, in_parts=True)
    own = _parameter_bytes(config, mesh) - whole + whole / size["fsdp"]
    if size["fsdp"] > 1:
        part = whole / size["fsdp"]
        times = 1 if _sends_once(config, mesh) else 2
        found.append(collective("all-gather", size["fsdp"], times * layers, times * part))
        found.append(collective("reduce-scatter", size["fsdp"], layers, whole))
    copies = mesh.size // (size["fsdp"] * size["tensor"])
    if copies > 1:
        found.append(collective("all-reduce", copies, layers, own))
    if size["tensor"] > 1:
        stream = images * config.num_tokens * config.width * _width(config)
        found.append(collective("all-reduce", size["tensor"], 4 * layers, 4 * layers * stream))
    return sorted(found, key=lambda x: -x.sent)


def _sends_once(config: ModelConfig, mesh: AbstractMesh) -> bool:
    """Whether parameters in parts are put together once and kept (`models.exchange`)."""
    return mesh.shape["fsdp"] > 1 and config.remat in ("none", "cheap")


def _parameter_bytes(config: ModelConfig, mesh: AbstractMesh, in_parts: bool = False) -> float:
    """Of all parameters that a device needs, as they are multiplied; or of those in parts alone."""
    boxed = abstract_parameters(config)
    placed = jax.tree.leaves(sharding.tree_shardings(boxed, mesh))
    parameters = sum(
        leaf.size
        for leaf, where in zip(jax.tree.leaves(boxed), placed, strict=True)
        if not in_parts or "fsdp" in jax.tree.leaves(tuple(where.spec))
    )
    if config.mixer == "lasad" and config.selective:
        filled = GATE_COLUMNS - 1
        parameters += config.num_layers * config.width * config.num_heads * filled
    return _width(config) * parameters / mesh.shape["tensor"]


def _width(config: ModelConfig) -> int:
    return config.compute_dtype.itemsize
