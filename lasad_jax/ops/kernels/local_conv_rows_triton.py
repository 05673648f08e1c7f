"""The local convolution of narrow grids as Pallas-Triton kernels, for NVIDIA GPUs.

As `local_conv_triton`, one launch each way, but a program walks an image row by row and holds the
rows that its taps reach in registers: every number is loaded and converted once, not once for
each tap. That takes registers for three rows of a grid.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float

from lasad_jax.ops.kernels.triton_math import Instructions
from lasad_jax.ops.passes.local_conv import REACH, TAPS


def forward(
    x: Float[Array, "B N D"],
    kernel: Float[Array, "taps D"],
    *,
    columns: int,
    num_prefix: int,
    num_warps: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B N D"]:
    """As `local_conv_triton.forward`, without a tiling."""
    how = (columns, num_prefix, num_warps, interpret)
    (y,) = _launch(_forward_kernel, "local_conv_forward", (x,), kernel, [x], *how)
    return y


def backward(
    d_y: Float[Array, "B N D"],
    x: Float[Array, "B N D"],
    kernel: Float[Array, "taps D"],
    *,
    columns: int,
    num_prefix: int,
    num_warps: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B N D"], Float[Array, "B 1 taps D"]]:
    """As `local_conv_triton.backward`, without a tiling."""
    how = (columns, num_prefix, num_warps, interpret)
    parts = jax.ShapeDtypeStruct((x.shape[0], 1, *kernel.shape), jnp.float32)
    return _launch(_backward_kernel, "local_conv_backward", (d_y, x), kernel, [x, parts], *how)


def _launch(kernel, name: str, tokens, weights, outputs, columns, num_prefix, num_warps, interpret):
    """Programs of all tokens of an image and two channels a thread."""
    batch, num_tokens, width = tokens[0].shape
    num_warps = num_warps or (2 if width % 128 == 0 else 1)
    size = 64 * num_warps

    def spec(x):
        if x.ndim == 3:
            return pl.BlockSpec((None, num_tokens, size), lambda j, i: (i, 0, j))
        return pl.BlockSpec((None, None, len(TAPS), size), lambda j, i: (i, 0, 0, j))

    def body(*refs):
        channels = None
        if width % size:
            channels = pl.program_id(0) * size + jnp.arange(size) < width
        kernel(_Program(num_tokens, columns, num_prefix, size, channels, interpret), *refs)

    return pl.pallas_call(
        body,
        # Programs that read the same tokens follow one another.
        grid=(pl.cdiv(width, size), batch),
        in_specs=[*map(spec, tokens), pl.BlockSpec((len(TAPS), size), lambda j, i: (0, j))],
        out_specs=[*map(spec, outputs)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name=name,
    )(*tokens, weights)


@dataclasses.dataclass(frozen=True)
class _Program:
    """The channels of an image that one program takes.

    Attributes:
      num_tokens, columns, num_prefix: N, C and P.
      size: channels.
      channels: which of them exist; None for all.
      interpret: whether it runs without a GPU.
    """

    num_tokens: int
    columns: int
    num_prefix: int
    size: int
    channels: Bool[Array, " W"] | None
    interpret: bool

    @property
    def prefix(self) -> range:
        return range(min(self.num_prefix, self.num_tokens))

    @property
    def num_rows(self) -> int:
        return max(0, pl.cdiv(self.num_tokens - self.num_prefix, self.columns))

    def tokens(self, r) -> list:
        """Numbers of those in a row, of which the last row may lack some."""
        first = self.num_prefix + r * self.columns
        return [first + c for c in range(self.columns)]

    def row(self, ref, r) -> list[Float[Array, " W"]]:
        """As they are stored, 0 for tokens that do not exist."""
        return [self._load(ref, token, self._exists(token)) for token in self.tokens(r)]

    def load(self, ref, token) -> Float[Array, " W"]:
        """In float32."""
        return self._load(ref, token, self._exists(token)).astype(jnp.float32)

    def store(self, ref, token, x: Float[Array, " W"]) -> None:
        self._store(ref, token, x, self._exists(token))

    def weights(self, ref) -> list[Float[Array, " W"]]:
        """One for each tap; that of the token itself counts the token as well."""
        load = lambda tap: self._load(ref, tap, self.channels).astype(jnp.float32)
        own, *others = map(load, range(len(TAPS)))
        return [1.0 + own, *others]

    def store_sums(self, ref, taps: list[Float[Array, " W"]]) -> None:
        for tap, total in enumerate(taps):
            self._store(ref, tap, total, self.channels)

    def zeros(self) -> Float[Array, " W"]:
        return jnp.zeros((self.size,), jnp.float32)

    def fma(self, x, y, total) -> Float[Array, " W"]:
        return Instructions(self.interpret).fma(x, y, total)

    def _exists(self, token) -> Bool[Array, " W"]:
        exists = jnp.broadcast_to(token < self.num_tokens, (self.size,))
        return exists if self.channels is None else exists & self.channels

    def _load(self, ref, row, mask):
        other = None if mask is None else 0.0
        return plgpu.load(self._window(ref, row), mask=mask, other=other)

    def _store(self, ref, row, x, mask):
        plgpu.store(self._window(ref, row), x.astype(ref.dtype), mask=mask)

    def _window(self, ref, row):
        # A masked load takes no Python number as an index.
        return ref.at[jnp.int32(row), pl.ds(0, self.size)]


def _forward_kernel(program, x_ref, kernel_ref, y_ref):
    weights, columns = program.weights(kernel_ref), range(program.columns)
    for token in program.prefix:
        program.store(y_ref, token, weights[0] * program.load(x_ref, token))

    def one_row(r, carry):
        row, above = carry
        # The next row is on its way while this one is convolved.
        rows, below = [_wide(row), *above], program.row(x_ref, r + 1)
        for c, token in zip(columns, program.tokens(r), strict=True):
            y = program.zeros()
            for weight, (down, right) in zip(weights, TAPS, strict=True):
                if c + right in columns:
                    y = program.fma(weight, rows[-down][c + right], y)
            program.store(y_ref, token, y)
        return below, rows[:REACH]

    none = [[program.zeros()] * program.columns] * REACH
    lax.fori_loop(0, program.num_rows, one_row, (program.row(x_ref, 0), none))


def _backward_kernel(program, dy_ref, x_ref, kernel_ref, dx_ref, parts_ref):
    weights, columns = program.weights(kernel_ref), range(program.columns)
    sums = [program.zeros()] * len(TAPS)
    for token in program.prefix:
        d_y = program.load(dy_ref, token)
        program.store(dx_ref, token, weights[0] * d_y)
        sums[0] = program.fma(program.load(x_ref, token), d_y, sums[0])

    def one_row(i, carry):
        below, sums = carry
        r = program.num_rows - 1 - i
        rows, sums = [_wide(program.row(dy_ref, r)), *below], list(sums)
        for c, token in zip(columns, program.tokens(r), strict=True):
            x, d_x = program.load(x_ref, token), program.zeros()
            for tap, (down, right) in enumerate(TAPS):
                # Of the tokens that read x, the one that has it at this tap.
                if c - right in columns:
                    d_y = rows[-down][c - right]
                    d_x = program.fma(weights[tap], d_y, d_x)
                    sums[tap] = program.fma(x, d_y, sums[tap])
            program.store(dx_ref, token, d_x)
        return rows[:REACH], sums

    none = [[program.zeros()] * program.columns] * REACH
    _, sums = lax.fori_loop(0, program.num_rows, one_row, (none, sums))
    program.store_sums(parts_ref, sums)


def _wide(row: list) -> list[Float[Array, " W"]]:
    return [x.astype(jnp.float32) for x in row]
