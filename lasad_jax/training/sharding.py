"""Where arrays live: a mesh of slice, data, fsdp and tensor axes, and one table of rules."""

import math

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, PyTree

from lasad_jax.config import MeshConfig
from lasad_jax.models.storage import PARTS, stored_spec

# From the slowest network to the fastest.
AXES = ("slice", "data", "fsdp", "tensor")
BATCH_AXES = AXES[:3]

# Logical axis of a parameter or activation -> mesh axes it is split over. Nothing but the batch
# is split over slices: all that passes between them is the sum of gradients, once a step.
RULES = (
    ("batch", BATCH_AXES),
    (PARTS, "fsdp"),
    ("embed", None),
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

    Within a slice, neighbours on the mesh are neighbours on a TPU's network.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices, or a slice of the mesh
        would reach over several of a TPU.
    """
    devices = jax.devices() if devices is None else devices
    units = [_unit(device) for device in devices]
    num_slices, *sizes = axis_sizes(config, len(devices), len(set(units)))
    if num_slices % len(set(units)) and devices[0].platform == "tpu":
        raise ValueError(
            f"mesh.slice: {num_slices} must be a multiple of {len(set(units))}, the slices that "
            "the devices lie in; set it to -1"
        )
    in_order = [devices[i] for i in np.argsort(units, kind="stable")]
    size = len(devices) // num_slices
    slices = [
        mesh_utils.create_device_mesh(
            sizes, in_order[start : start + size], allow_split_physical_axes=True
        )
        for start in range(0, len(devices), size)
    ]
    # Explicit axes do not go together with Linen's logical axes.
    return Mesh(np.stack(slices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_sizes(
    config: MeshConfig, num_devices: int, num_slices: int, where: str = "there are"
) -> tuple[int, ...]:
    """Devices along each of `AXES`, -1 filled in.

    Args:
      config: the sizes asked for.
      num_devices: of all.
      num_slices: that they lie in.
      where: words after "the 8 devices" in the error.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices.
    """
    slices = num_slices if config.slice == -1 else config.slice
    sizes = [config.data, config.fsdp, config.tensor]
    known = slices * math.prod(size for size in sizes if size != -1)
    sizes = [num_devices // known if size == -1 else size for size in sizes]
    if slices * math.prod(sizes) != num_devices:
        raise ValueError(
            f"mesh: (data, fsdp, tensor, slice) = {(*sizes, slices)} does not multiply to "
            f"the {num_devices} devices {where}; set data, fsdp or tensor to -1"
        )
    return slices, *sizes


def _unit(device: jax.Device) -> int:
    """Which group of devices with a fast network among them a device belongs to."""
    # Hosts of GPUs have a number too, whatever the processes on each. CPUs have that of their
    # host: processes that share one stand for hosts. TPUs without a number are of one slice.
    number = None if device.platform == "cpu" else getattr(device, "slice_index", None)
    if number is None:
        return 0 if device.platform == "tpu" else device.process_index
    return number


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over all axes but tensor's."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def local_rows(batch_size: int, mesh: Mesh) -> Int[np.ndarray, " b"]:
    """Rows of a global batch that this process's devices hold, in order.

    Processes may hold the same ones, where the tensor axis reaches over several, and need not
    hold consecutive ones: a TPU's mesh follows its network.
    """
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique([np.arange(batch_size)[part] for part in parts])


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def tree_shardings(boxed: PyTree, mesh: Mesh) -> PyTree:
    """Shardings of a tree whose leaves may be boxed with logical axis names.

    An axis that its mesh axes do not divide evenly is left whole. Which one is stored in parts:
    `models.storage`.
    """
    rules, platform = dict(RULES), _platform(mesh)
    num_devices = lambda axis: 1 if axis is None else mesh.shape[axis]

    def leaf_sharding(leaf):
        if not isinstance(leaf, nn.Partitioned):
            return replicated(mesh)
        split, shape = [], leaf.value.shape
        for name, size in zip(leaf.names, shape, strict=True):
            axis = rules[name] if name is not None else None
            split.append(axis if size % num_devices(axis) == 0 else None)
        spec = stored_spec(leaf.names, shape, split, rules[PARTS], num_devices, platform)
        return NamedSharding(mesh, spec)

    return jax.tree.map(leaf_sharding, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def _platform(mesh: Mesh | AbstractMesh) -> str | None:
    """Of its devices; None for an abstract mesh of none in particular."""
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else mesh.abstract_device
    return None if device is None else device.platform


def put_batch(batch: dict, mesh: Mesh) -> dict:
    """Device arrays of the global batch from each process's `local_rows` of it."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """How many devices, or groups of them, have images of their own."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch_size(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Refuses a batch that the mesh cannot split evenly."""
    parts = batch_parts(mesh) * accumulate
    if batch_size % parts:
        raise ValueError(
            f"config.batch_size: {batch_size} must be a multiple of {parts} "
            f"(slice x data x fsdp devices x optimizer.accumulate)"
        )
