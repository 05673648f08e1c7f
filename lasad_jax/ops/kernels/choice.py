"""Which fused kernels there are, what each can run, and which suits a device best."""

import dataclasses
import functools
import importlib
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lasad_jax.ops.decays import Decay, ManhattanDecay
from lasad_jax.ops.kernels.manhattan import fused_manhattan
from lasad_jax.ops.kernels.recurrence import Backend

KERNELS = ("mosaic_gpu", "triton", "mosaic_tpu")

# Grid tokens up to which `manhattan`'s kernels, quadratic in N, take the whole sequence;
# beyond, they take blocks of the linear form.
LONGEST_MANHATTAN = 4096
# Of the current mesh, over which an array's axis is split.
Axes = str | tuple[str, ...] | None
# Implementations of elementwise passes.
PASSES = ("auto", "plain", "triton")
_HOPPER = re.compile(r"\bG?H\d+")
_WIDTHS = (16, 32, 64, 128)
# Two programs on each multiprocessor of a Hopper GPU, and the shortest segment worth a pass
# of its own over keys and values.
_PROGRAMS = 264
# Rows from which a product of our own keeps all multiprocessors of a Hopper GPU busy.
_FEWEST_ROWS = 4096
_CHUNKS_PER_SEGMENT = 8


@dataclasses.dataclass(frozen=True)
class Device:
    """What a kernel is compiled for."""

    platform: str
    kind: str

    @property
    def is_gpu(self) -> bool:
        """Under either name that JAX has for it."""
        return self.platform in ("gpu", "cuda")


def device() -> Device:
    """The device of the current mesh if one is set, which need not be at hand; else the default."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        return Device(abstract.platform or jax.default_backend(), abstract.device_kind)
    return Device(jax.default_backend(), jax.devices()[0].device_kind)


def num_devices(axes: Axes) -> int:
    """Of the current mesh, along these axes; 1 for none."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in names)


def hopper_obstacle() -> str | None:
    """Why Mosaic GPU kernels for Hopper cannot run on this device; None if they can."""
    where = device()
    if jax.__version_info__ < (0, 11):
        return f"it needs jax 0.11 or later, not {jax.__version__}"
    if not (where.is_gpu and _HOPPER.search(where.kind)):
        return f"it needs a Hopper GPU (H100, H200), not {where.kind} ({where.platform})"
    return None


def choose(q: Array, v: Array, decay: Decay, num_prefix: int) -> str | None:
    """The best kernels for these arguments on this device; None if none can run."""
    able = (name for name in KERNELS if obstacle(name, q, v, decay, num_prefix) is None)
    return next(able, None)


def obstacle(
    name: str,
    q: Array | jax.ShapeDtypeStruct,
    v: Array | jax.ShapeDtypeStruct,
    decay: Decay | type[Decay],
    num_prefix: int,
) -> str | None:
    """Why the kernels `name` cannot take these arguments on this device; None if they can.

    Of the arrays only shapes and dtypes count, of the decay only the family.
    """
    family = decay if isinstance(decay, type) else type(decay)
    where, exact = device(), family is ManhattanDecay
    key_dim, value_dim = q.shape[3], v.shape[3]
    needed = "tpu" if name == "mosaic_tpu" else "gpu"
    if not (where.is_gpu if needed == "gpu" else where.platform == "tpu"):
        return f"it needs a {needed.upper()}, not {where.kind} ({where.platform})"
    if needed == "gpu" and "NVIDIA" not in where.kind:
        return f"it needs an NVIDIA GPU, not {where.kind}"
    if q.dtype != v.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 or float32, the same for all, not {q.dtype} and {v.dtype}"
    if key_dim not in _WIDTHS or value_dim not in _WIDTHS:
        return f"it takes Dk and Dv of {_WIDTHS}, not {key_dim} and {value_dim}"
    if name != "mosaic_gpu":
        return None
    return _obstacle_on_hopper(q, v, exact, num_prefix)


def _obstacle_on_hopper(
    q: Array | jax.ShapeDtypeStruct,
    v: Array | jax.ShapeDtypeStruct,
    exact: bool,
    num_prefix: int,
) -> str | None:
    if exact:
        return "it has no 2D decay; use 'triton'"
    if why := hopper_obstacle():
        return why
    if q.dtype != jnp.bfloat16 or (q.shape[3], v.shape[3]) != (64, 64):
        return f"it takes bfloat16 of Dk = Dv = 64, not {q.dtype} of {q.shape[3]}, {v.shape[3]}"
    if num_prefix > 1:
        return f"it takes one prefix token, not {num_prefix}; use 'triton'"
    if q.shape[1] % 8 or q.shape[1] < 64:
        return f"it takes a multiple of 8 tokens, at least 64, not {q.shape[1]}"
    return None


def triton_obstacle(x: Array) -> str | None:
    """Why elementwise Triton kernels cannot take x on this device; None if they can."""
    where = device()
    if not where.is_gpu or "NVIDIA" not in where.kind:
        return f"it needs an NVIDIA GPU, not {where.kind} ({where.platform})"
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it takes bfloat16, float16 or float32, not {x.dtype}"
    return None


def prefers_triton(x: Array, implementation: str) -> bool:
    """Whether an elementwise pass over x runs as Triton kernels.

    Args:
      x: what is read.
      implementation: of `PASSES`: "plain", "triton", or "auto", which is the latter where it
        can run.

    Raises:
      ValueError: for an unknown implementation, or saying why "triton" cannot run.
    """
    if implementation not in PASSES:
        raise ValueError(f"implementation: {implementation!r} is not one of {PASSES}")
    obstacle = triton_obstacle(x)
    if implementation == "triton" and obstacle:
        raise ValueError(f"implementation: 'triton' cannot run here: {obstacle}; use 'auto'")
    return implementation != "plain" and obstacle is None


def mixes_heads(
    y: Array | jax.ShapeDtypeStruct, widths: tuple[int, int], decay: Decay, devices: int = 1
) -> bool:
    """Whether the kernels of `passes.mixed_heads` can run and suit a mixer.

    They are of a single recurrence whose segments are one.

    Args:
      y: joint projection (B, N, H, W) of all devices; only its shape and dtype count.
      widths: Dk and Dv.
      decay: only its family counts.
      devices: that images and heads are split over.
    """
    batch, num_tokens, heads, _ = y.shape
    if hopper_obstacle() or isinstance(decay, ManhattanDecay):
        return False
    fits = y.dtype == jnp.bfloat16 and widths == (32, 64)
    fits = fits and num_tokens % 8 == 0 and num_tokens >= 64
    return fits and _segments(batch * heads // devices, -(-num_tokens // 64)) == 1


def fuses_swiglu(rows: int, D: int, F: int, dtype: jnp.dtype) -> bool:
    """Whether the products of `passes.feed_forward` that hold the SwiGLU can run and suit it.

    Args:
      rows, D, F: tokens, channels and hidden channels of one device.
      dtype: of the matrices.
    """
    able = hopper_obstacle() is None
    fits = dtype == jnp.bfloat16 and D % 64 == F % 64 == 0 and min(D, F) >= 128
    return able and fits and rows >= _FEWEST_ROWS and rows % 8 == 0


def recurrence(name: str, q: Array, v: Array, *, interpret: bool = False) -> Backend:
    """The kernels of the single recurrence for tokens like q and v.

    With `interpret` they run on any device, slowly.
    """
    module = importlib.import_module(f"lasad_jax.ops.kernels.{_MODULES[name][0]}")
    names = ("forward", "backward", "segment_states", "segment_gradients")
    kernels = {kernel: getattr(module, kernel, None) for kernel in names}
    if interpret:
        kernels = {
            kernel: function and functools.partial(function, interpret=True)
            for kernel, function in kernels.items()
        }
    if name == "mosaic_tpu":
        return Backend(chunk=128, **kernels)
    # Longer chunks of wide float32 heads do not fit into shared memory.
    wide = q.dtype == jnp.float32 and q.shape[3] * v.shape[3] > 64 * 64
    return Backend(chunk=32 if wide else 64, segments=_segments, **kernels)


def manhattan(name: str, columns: int, num_prefix: int) -> Callable:
    """The exact 2D decay as (q, k, v, decay) to o, for whole images."""
    module = importlib.import_module(f"lasad_jax.ops.kernels.{_MODULES[name][1]}")
    static = {"columns": columns, "num_prefix": num_prefix}
    return functools.partial(
        fused_manhattan, forward=module.forward, backward=module.backward, **static
    )


# Imported when first used: each needs a part of Pallas that not every installation has.
_MODULES = {
    "mosaic_gpu": ("recurrence_mosaic", None),
    "triton": ("recurrence_triton", "manhattan_triton"),
    "mosaic_tpu": ("recurrence_tpu", "manhattan_tpu"),
}


def _segments(programs: int, chunks: int) -> int:
    """Enough segments that few heads of a long sequence fill the card."""
    segments = 1
    while programs * 2 * segments <= _PROGRAMS and chunks >= 2 * segments * _CHUNKS_PER_SEGMENT:
        segments *= 2
    return segments
