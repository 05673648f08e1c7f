"""The local convolution as Pallas-Triton kernels, for NVIDIA GPUs: one launch each way.

A program takes a block of channels of one image, or of a part of its tokens, tile by tile.
Each tile loads its tokens' neighbours anew: they lie in the same image, so that memory is read
once and the rest comes from the caches. The weights stay in registers, and in the backward
kernel so do the sums for their gradient.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from lasad_jax.ops.kernels.triton_math import Instructions
from lasad_jax.ops.passes.local_conv import TAPS, neighbour


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the work is cut.

    Attributes:
      tokens, channels: of a tile, powers of two.
      segments: parts of an image's tokens with programs of their own.
      num_warps: of a program.
    """

    tokens: int
    channels: int
    segments: int = 1
    num_warps: int = 4


def forward(
    x: Float[Array, "B N D"],
    kernel: Float[Array, "taps D"],
    *,
    columns: int,
    num_prefix: int,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> Float[Array, "B N D"]:
    """The convolved tokens.

    Args:
      x: bf16, float16 or float32.
      kernel: float32.
      columns: C.
      num_prefix: P.
      tiling: instead of the one that suits the arguments.
      interpret: run on any platform, slowly.

    Returns:
      y in x's dtype.
    """
    # 16 bytes of a token for each thread.
    tiling = tiling or _tiling(x, 16 // x.dtype.itemsize)
    image, taps, _ = _specs(x, tiling)
    this = functools.partial(_Program.this, x, columns, num_prefix, tiling, interpret)
    return pl.pallas_call(
        functools.partial(_forward_kernel, this=this),
        grid=_programs(x, tiling),
        in_specs=[image, taps],
        out_specs=image,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=_compiler_params(tiling),
        interpret=interpret,
        name="local_conv_forward",
    )(x, kernel)


def backward(
    d_y: Float[Array, "B N D"],
    x: Float[Array, "B N D"],
    kernel: Float[Array, "taps D"],
    *,
    columns: int,
    num_prefix: int,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B N D"], Float[Array, "B Z taps D"]]:
    """Gradients with respect to x, and to the kernel from each part of each image.

    Args:
      d_y: the gradient with respect to y, in x's dtype.

    The other arguments are `forward`'s.

    Returns:
      d_x in x's dtype; in float32 the parts of the kernel's gradient, for the caller to add.
    """
    # A thread has the sums of all taps in registers, of no more than four channels.
    tiling = tiling or _tiling(x, 4)
    image, taps, part = _specs(x, tiling)
    this = functools.partial(_Program.this, x, columns, num_prefix, tiling, interpret)
    parts = (x.shape[0], tiling.segments, *kernel.shape)
    return pl.pallas_call(
        functools.partial(_backward_kernel, this=this),
        grid=_programs(x, tiling),
        in_specs=[image, image, taps],
        out_specs=[image, part],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(parts, jnp.float32),
        ],
        compiler_params=_compiler_params(tiling),
        interpret=interpret,
        name="local_conv_backward",
    )(d_y, x, kernel)


def _tiling(x: Float[Array, "B N D"], per_thread: int) -> Tiling:
    """With so many channels of a token for each thread."""
    channels = 64
    while channels > 16 and x.shape[-1] % channels:
        channels //= 2
    if x.shape[-1] % channels:
        channels = min(64, pl.next_power_of_2(x.shape[-1]))
    num_warps = 4
    return Tiling(num_warps * 32 * per_thread // channels, channels, num_warps=num_warps)


def _programs(x, tiling: Tiling) -> tuple[int, int, int]:
    """Programs that read the same tokens follow one another."""
    return pl.cdiv(x.shape[2], tiling.channels), tiling.segments, x.shape[0]


def _specs(x, tiling: Tiling):
    """What a program sees of tokens, of weights, and of their sums."""
    num_tokens, channels = x.shape[1], tiling.channels
    return (
        pl.BlockSpec((None, num_tokens, channels), lambda j, z, i: (i, 0, j)),
        pl.BlockSpec((len(TAPS), channels), lambda j, z, i: (0, j)),
        pl.BlockSpec((None, None, len(TAPS), channels), lambda j, z, i: (i, z, 0, j)),
    )


def _compiler_params(tiling: Tiling) -> plgpu.CompilerParams:
    return plgpu.CompilerParams(num_warps=tiling.num_warps, num_stages=1)


@dataclasses.dataclass(frozen=True)
class _Program:
    """The tiles of one program.

    Attributes:
      tiling: how the work is cut.
      num_tokens, columns, num_prefix: N, C and P.
      num_tiles: of this program, some of which may have no tokens.
      start: its first token.
      channels: which of its channels exist; None for all.
      interpret: whether it runs without a GPU.
    """

    tiling: Tiling
    num_tokens: int
    columns: int
    num_prefix: int
    num_tiles: int
    start: Int[Array, ""]
    channels: Bool[Array, "1 W"] | None
    interpret: bool

    @classmethod
    def this(cls, x, columns: int, num_prefix: int, tiling: Tiling, interpret: bool):
        _, num_tokens, width = x.shape
        num_tiles = pl.cdiv(pl.cdiv(num_tokens, tiling.tokens), tiling.segments)
        start = pl.program_id(1) * num_tiles * tiling.tokens
        channels = None
        if width % tiling.channels:
            channels = pl.program_id(0) * tiling.channels + jnp.arange(tiling.channels)
            channels = (channels < width)[None]
        return cls(tiling, num_tokens, columns, num_prefix, num_tiles, start, channels, interpret)

    def tokens(self, tile) -> Int[Array, " T"]:
        return self.start + tile * self.tiling.tokens + jnp.arange(self.tiling.tokens)

    def neighbours(self, tokens, tap: int, *, later: bool = False):
        """As `neighbour`, within the sequence."""
        source, exists = neighbour(tokens, tap, self.columns, self.num_prefix, later=later)
        return source, exists & (source < self.num_tokens)

    def load(self, ref, tokens, exists) -> Float[Array, "T W"]:
        """In float32, 0 for tokens that do not exist."""
        window = ref.at[tokens[:, None], jnp.arange(self.tiling.channels)[None]]
        return plgpu.load(window, mask=self._mask(exists), other=0.0).astype(jnp.float32)

    def store(self, ref, tile, x: Float[Array, "T W"]) -> None:
        window = ref.at[pl.ds(self.start + tile * self.tiling.tokens, self.tiling.tokens), :]
        exists = self.tokens(tile) < self.num_tokens
        plgpu.store(window, x.astype(ref.dtype), mask=self._mask(exists))

    def weights(self, ref) -> list[Float[Array, "1 W"]]:
        """One for each tap; that of the token itself counts the token as well."""
        other = None if self.channels is None else 0.0
        own, *others = (
            plgpu.load(ref.at[pl.ds(tap, 1), :], mask=self.channels, other=other)
            for tap in range(len(TAPS))
        )
        return [1.0 + own, *others]

    def zeros(self) -> Float[Array, "T W"]:
        return jnp.zeros((self.tiling.tokens, self.tiling.channels), jnp.float32)

    def fma(self, x, y, total) -> Float[Array, "T W"]:
        return Instructions(self.interpret).fma(x, y, total)

    def store_sums(self, ref, taps: list[Float[Array, "T W"]]) -> None:
        for tap, x in enumerate(taps):
            total = jnp.sum(x, axis=0)[None]
            plgpu.store(ref.at[pl.ds(tap, 1), :], total, mask=self.channels)

    def _mask(self, exists: Bool[Array, " T"]) -> Bool[Array, "T W"]:
        mask = exists[:, None] if self.channels is None else exists[:, None] & self.channels
        return jnp.broadcast_to(mask, (self.tiling.tokens, self.tiling.channels))


def _forward_kernel(x_ref, kernel_ref, y_ref, *, this):
    program = this()
    weights, zeros = program.weights(kernel_ref), program.zeros()

    def one_tile(tile, _):
        tokens = program.tokens(tile)
        y = zeros
        for tap, weight in enumerate(weights):
            x = program.load(x_ref, *program.neighbours(tokens, tap))
            y = program.fma(weight, x, y)
        program.store(y_ref, tile, y)

    lax.fori_loop(0, program.num_tiles, one_tile, None)


def _backward_kernel(dy_ref, x_ref, kernel_ref, dx_ref, parts_ref, *, this):
    program = this()
    weights, zeros = program.weights(kernel_ref), program.zeros()

    def one_tile(tile, sums):
        tokens = program.tokens(tile)
        x = program.load(x_ref, tokens, tokens < program.num_tokens)
        d_x, new_sums = zeros, []
        for tap, (weight, total) in enumerate(zip(weights, sums, strict=True)):
            # Of the tokens that read x: one load serves both gradients.
            d_y = program.load(dy_ref, *program.neighbours(tokens, tap, later=True))
            d_x = program.fma(weight, d_y, d_x)
            new_sums.append(program.fma(x, d_y, total))
        program.store(dx_ref, tile, d_x)
        return new_sums

    sums = lax.fori_loop(0, program.num_tiles, one_tile, [zeros] * len(TAPS))
    program.store_sums(parts_ref, sums)
