"""The runs of the README's table: LlamaGen's sizes on three machines."""

from collections.abc import Iterator

from lasad_jax.config import Config, MeshConfig
from lasad_jax.models import SIZES, ModelConfig

TABLE_SIZES = ("B", "L", "XL", "XXL", "3B")
# Images per device, the "fsdp" axis, and the smallest size that is split over it: below, every
# device holds the whole model.
MACHINES = {"v5e-256": (4, 16, "L"), "v5p-64": (16, 32, "XL"), "gpu:8x80GB": (32, 8, "XL")}


def table_runs(machine: str, num_devices: int) -> Iterator[tuple[str, Config]]:
    """Size and run, for each size on a machine of `MACHINES`.

    Args:
      machine: its name.
      num_devices: that it has.
    """
    batch, fsdp, smallest = MACHINES[machine]
    for size in TABLE_SIZES:
        split = TABLE_SIZES.index(size) >= TABLE_SIZES.index(smallest)
        yield (
            size,
            Config(
                batch_size=batch * num_devices,
                model=ModelConfig(**SIZES[size]),
                mesh=MeshConfig(fsdp=fsdp if split else 1),
            ),
        )
