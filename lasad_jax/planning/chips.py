"""What one chip can do at best, by its maker's numbers."""

import dataclasses
import os

from lasad_jax.training.goodput import peak_flops

_GIB = 2**30
# What XLA's TPU compiler says is left of a chip's memory when it refuses a program.
_V5E, _V5P, _V6E = 15.75 * _GIB, 95.73 * _GIB, 31.24 * _GIB
_TPU_DOCS = "https://docs.cloud.google.com/tpu/docs/"


@dataclasses.dataclass(frozen=True)
class Chip:
    """Attributes:
    kind: the device's name in JAX.
    platform: "tpu" or "gpu".
    flops: dense bf16 products, per second.
    bandwidth: bytes per second of its memory.
    link: bytes per second, each way, between neighbours of a collective: along one axis of a
      TPU's torus (two of its links), or over NVLink.
    memory: bytes that programs can have.
    source: of these numbers.
    """

    kind: str
    platform: str
    flops: float
    bandwidth: float
    link: float
    memory: float
    source: str


# ICI is documented as the sum of both ways over all links of a chip: 4 links on a 2D torus, 6 on
# a 3D one. An axis has two of them: a quarter, or a sixth, of the sum each way.
V5E = Chip(
    "TPU v5 lite", "tpu", peak_flops("TPU v5 lite"), 819e9, 400e9 / 4, _V5E, _TPU_DOCS + "v5e"
)
V5P = Chip(
    "TPU v5",
    "tpu",
    peak_flops("TPU v5"),
    2765e9,
    1200e9 / 6,
    _V5P,
    _TPU_DOCS + "v5p",
)
V6E = Chip(
    "TPU v6 lite", "tpu", peak_flops("TPU v6 lite"), 1638e9, 800e9 / 4, _V6E, _TPU_DOCS + "v6e"
)

# NVLink is documented as the sum of both ways. Memory: what nvidia-smi reports.
H100 = Chip(
    "NVIDIA H100 80GB HBM3",
    "gpu",
    peak_flops("NVIDIA H100"),
    3.35e12,
    900e9 / 2,
    84_942_979_072,
    "https://www.nvidia.com/en-us/data-center/h100 (SXM)",
)
H200 = Chip(
    "NVIDIA H200",
    "gpu",
    peak_flops("NVIDIA H200"),
    4.8e12,
    900e9 / 2,
    150_754_820_096,
    "https://www.nvidia.com/en-us/data-center/h200 (SXM)",
)


def usable_memory(chip: Chip) -> float:
    """Bytes that JAX gives to programs on this chip.

    On a GPU it takes three quarters of the memory, or XLA_PYTHON_CLIENT_MEM_FRACTION of it.
    """
    if chip.platform == "tpu":
        return chip.memory
    return chip.memory * float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))
