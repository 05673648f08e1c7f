"""Where arrays live: a mesh of data, fsdp and tensor axes, and one table of rules."""

import math

import jax
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from lasad_jax.config import MeshConfig

AXES = ("data", "fsdp", "tensor")

# Logical axis of a parameter or activation -> mesh axes it is split over.
RULES = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("head_dim", None),
    ("classes", None),
    ("layers", None),
    ("taps", None),
    ("tokens", None),
    ("activation", None),
)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices with the sizes of `config`, -1 filled in.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh: (data, fsdp, tensor) = {tuple(sizes)} does not multiply to the "
            f"{len(devices)} devices there are; set one of them to -1"
        )
    # Explicit axes, make_mesh's default, do not go together with Linen's logical axes.
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def tree_shardings(boxed: PyTree, mesh: Mesh) -> PyTree:
    """Shardings of a tree whose leaves may be boxed with logical axis names.

    An axis that its mesh axes do not divide evenly is left whole.
    """
    rules = dict(RULES)

    def leaf_sharding(leaf):
        if not isinstance(leaf, nn.Partitioned):
            return replicated(mesh)
        spec = []
        for name, size in zip(leaf.names, leaf.value.shape, strict=True):
            axis = rules[name] if name is not None else None
            divides = axis is not None and size % mesh.shape[axis] == 0
            spec.append(axis if divides else None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(leaf_sharding, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def put_batch(batch: dict, mesh: Mesh) -> dict:
    """Device arrays of the global batch from each process's own rows."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }


def check_batch_size(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Refuses a batch that the mesh cannot split evenly."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * accumulate
    if batch_size % parts:
        raise ValueError(
            f"config.batch_size: {batch_size} must be a multiple of {parts} "
            f"(data x fsdp devices x optimizer.accumulate)"
        )
