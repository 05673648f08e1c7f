"""What the device can do at best, measured in the same run: copies, matrix products, memory."""

import concurrent.futures

import jax
import jax.numpy as jnp

from lasad_jax.benchmarks.timing import seconds_per_call


def copy_bytes_per_second(
    num_bytes: int, *, repeats: int, min_seconds: float = 0.0
) -> dict[str, float]:
    """Bytes read plus bytes written per second, best of the repeats, for two ways to copy.

    Args:
      num_bytes: size of the array; far larger than any cache.
      repeats, min_seconds: as in `seconds_per_call`.
    """
    array = jax.random.bits(jax.random.key(0), (num_bytes // 4,), jnp.uint32)
    ways = {"copy": jnp.copy, "kernel": lambda x: x + 1}
    rates = {}
    for name, way in ways.items():
        runs = seconds_per_call(jax.jit(way), [(array,)], repeats=repeats, min_seconds=min_seconds)
        rates[name] = 2 * array.nbytes / min(runs)
    return rates


def product_flops_per_second(size: int, *, repeats: int, min_seconds: float = 0.0) -> float:
    """FLOPs per second of a product of two (size, size) matrices in bf16, best of the repeats."""
    keys = jax.random.split(jax.random.key(0))
    x, y = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    runs = seconds_per_call(jax.jit(jnp.matmul), [(x, y)], repeats=repeats, min_seconds=min_seconds)
    return 2 * size**3 / min(runs)


def product_flops_of_each(size: int, *, repeats: int, min_seconds: float = 0.0) -> list[float]:
    """`product_flops_per_second` of every device, all at work at once."""

    def of(device: jax.Device) -> float:
        with jax.default_device(device):
            return product_flops_per_second(size, repeats=repeats, min_seconds=min_seconds)

    with concurrent.futures.ThreadPoolExecutor(len(jax.devices())) as pool:
        return list(pool.map(of, jax.devices()))


def compiled_bytes(compiled: jax.stages.Compiled) -> int:
    """Most memory that a program holds: arguments, temporaries, outputs in no argument's place."""
    sizes = compiled.memory_analysis()
    return (
        sizes.argument_size_in_bytes
        + sizes.temp_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
    )


class AllocatorPeak:
    """The allocator's peak since this was made, on the first device.

    The allocator keeps one peak for the life of the process: it tells something about what
    came last only where that raised it.
    """

    def __init__(self):
        self._before = _peak()

    def bytes(self) -> int | None:
        """None where the device does not say, or was fuller before."""
        peak = _peak()
        return peak if peak is not None and peak > self._before else None


def _peak() -> int | None:
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
