"""Machines by the names that they are rented under, as devices that programs compile for."""

import contextlib
import dataclasses
import importlib.util
import os
import re
import warnings
from collections.abc import Iterator

import jax

from lasad_jax.planning.chips import H100, H200, V5E, V5P, V6E, Chip

# Shapes of a slice in chips. Google names v5e and v6e by chips and v5p by cores, two a chip.
_FLAT = {
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
_CUBES = {
    8: "2x2x1",
    16: "2x2x2",
    32: "2x2x4",
    64: "2x4x4",
    128: "4x4x4",
    256: "4x4x8",
    512: "4x8x8",
    1024: "8x8x8",
    2048: "8x8x16",
    4096: "8x16x16",
    8192: "16x16x16",
    12288: "16x16x24",
}
_TPUS = {"v5e": (V5E, _FLAT), "v5p": (V5P, _CUBES), "v6e": (V6E, _FLAT)}
_GPUS = {"80GB": H100, "141GB": H200}
_GPU_COUNTS = (1, 2, 4, 8)
# TPU's compiler looks for the chip it runs beside unless it is told what this machine is.
_LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Attributes:
    name: as given.
    chip: what each device is.
    shape: chips along each axis of a TPU's torus; of GPUs, their number alone.
    """

    name: str
    chip: Chip
    shape: str

    @property
    def num_devices(self) -> int:
        """JAX's devices: chips."""
        count = 1
        for size in self.shape.split("x"):
            count *= int(size)
        return count

    def devices(self) -> list[jax.Device]:
        """Devices to compile for, none of which need be at hand.

        Raises:
          ImportError: if the compiler for them is not installed, saying which package has it.
        """
        from jax.experimental import topologies

        if self.chip.platform == "gpu":
            return _gpu_devices(self)
        if importlib.util.find_spec("libtpu") is None:
            raise ImportError(
                f"topology: {self.name} is compiled for by libtpu, which is not installed; "
                f"pip install {_wanted('libtpu')}"
            )
        generation = self.name.split("-")[0]
        with _environment(_LIBTPU):
            return list(
                topologies.get_topology_desc(
                    platform="tpu", topology_name=f"{generation}:{self.shape}"
                ).devices
            )


def find_topology(name: str) -> Topology:
    """The machine of that name.

    Args:
      name: "v5e-N", "v6e-N" (N chips), "v5p-N" (N cores, N / 2 chips) or "gpu:NxMGB" (N H100 or
        H200 of one host, of M GB each).

    Raises:
      ValueError: for an unknown name, listing those that are known.
    """
    if match := re.fullmatch(r"gpu:(\d+)x(\d+GB)", name):
        count, size = match.groups()
        if int(count) in _GPU_COUNTS and size in _GPUS:
            return Topology(name, _GPUS[size], count)
    generation, _, count = name.partition("-")
    if generation in _TPUS and count.isdecimal():
        chip, shapes = _TPUS[generation]
        if int(count) in shapes:
            return Topology(name, chip, shapes[int(count)])
    raise ValueError(f"topology: {name!r} is not one of {', '.join(known_topologies())}")


def known_topologies() -> list[str]:
    """Every name."""
    tpus = [f"{kind}-{count}" for kind, (_, shapes) in _TPUS.items() for count in shapes]
    return tpus + [f"gpu:{count}x{size}" for size in _GPUS for count in _GPU_COUNTS]


def can_compile(topology: Topology) -> bool:
    """Whether the compiler for its devices is installed."""
    if topology.chip.platform == "tpu":
        return importlib.util.find_spec("libtpu") is not None
    return _cuda_plugin() is not None


def _cuda_plugin() -> str | None:
    names = (f"jax_plugins.xla_cuda{version}" for version in (13, 12))
    with contextlib.suppress(ModuleNotFoundError):
        return next((name for name in names if importlib.util.find_spec(name)), None)
    return None


def _gpu_devices(topology: Topology) -> list[jax.Device]:
    from jax.experimental import topologies

    if _cuda_plugin() is None:
        raise ImportError(
            f"topology: {topology.name} is compiled for by JAX's CUDA plugin, which is not "
            'installed; pip install "jax[cuda13]"'
        )
    return list(
        topologies.get_topology_desc(
            topology.name,
            "cuda",
            target_config=_hopper(topology.chip),
            topology=f"1x1x{topology.shape}",
        ).devices
    )


def _hopper(chip: Chip) -> str:
    """XLA's description of a Hopper GPU, as it prints it on one."""
    return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
      shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
      fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
      block_dim_limit_z: 65535 memory_bandwidth: {int(chip.bandwidth)} l2_cache_size: 52428800
      clock_rate_ghz: 1.98 device_memory_size: {int(chip.memory)}
      shared_memory_per_block_optin: 232448
      cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 }}
    runtime_version {{ major: 13 minor: 0 }}
    device_description_str: "{chip.kind}"
    """


def _wanted(package: str) -> str:
    """The version of a package that this version of JAX asks for."""
    from importlib.metadata import requires

    found = re.search(rf"'{package}(==[\w.*]+)?", str(requires("jax")))
    return f"'{package}{found.group(1) or ''}'" if found else package


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets those that are not set, for a while."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name in added:
            del os.environ[name]
