"""What is timed: shapes, decays, random inputs, and the fewest bytes that must move."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lasad_jax import ops

# Arrays of (B, N, H, D) that any implementation has to read or write: q, k, v and o, and
# then again q, k, v with d_o for dq, dk, dv.
TENSORS = {"forward": 4, "forward+backward": 11}
DTYPES = ("bfloat16", "float32")
DECAYS = ("raster", "selective", "manhattan", "none", "sequence")
_RATES = (0.005, 0.7)

Tokens = Float[Array, "B N H D"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of q, k, v and o. `str` and `parse` write it BxRxCxH."""

    batch: int
    rows: int
    columns: int
    heads: int
    dim: int

    @classmethod
    def parse(cls, text: str, dim: int) -> "Shape":
        """From BxRxCxH."""
        numbers = text.split("x")
        if len(numbers) != 4 or not all(n.isdigit() and int(n) for n in numbers):
            raise ValueError(f"shapes: expected BxRxCxH such as 64x16x16x12, got {text!r}")
        return cls(*map(int, numbers), dim)

    def __str__(self) -> str:
        return f"{self.batch}x{self.rows}x{self.columns}x{self.heads}"

    @property
    def tokens(self) -> int:
        """N, all of them on the grid."""
        return self.rows * self.columns

    @property
    def array(self) -> tuple[int, int, int, int]:
        """(B, N, H, D)."""
        return self.batch, self.tokens, self.heads, self.dim


class Case(NamedTuple):
    """One thing to time, by ours and by every peer."""

    shape: Shape
    dtype: str
    direction: str

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype} {self.direction}"

    @property
    def floor_bytes(self) -> int:
        """Bytes that have to be read or written, each once."""
        size = math.prod(self.shape.array) * jnp.dtype(self.dtype).itemsize
        return TENSORS[self.direction] * size


def all_cases(shapes: Sequence[Shape], dtypes: Sequence[str]) -> list[Case]:
    """Every shape in every dtype, forward and forward + backward."""
    return [Case(s, dtype, d) for dtype in dtypes for s in shapes for d in TENSORS]


def make_decay(name: str, heads: int) -> ops.Decay:
    """A decay whose half-lives are spread over the heads; "selective" is a gated "raster"."""
    rate = jnp.geomspace(*_RATES, heads)
    return {
        "none": lambda: ops.NoDecay(),
        "sequence": lambda: ops.SequenceDecay(rate),
        "raster": lambda: ops.RasterDecay(rate, rate),
        "selective": lambda: ops.RasterDecay(rate, rate),
        "manhattan": lambda: ops.ManhattanDecay(rate, rate),
    }[name]()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw(shape, dtype, seed):
    keys = jax.random.split(jax.random.key(seed), 4)
    q, k, v, d_o = (jax.random.normal(key, shape, dtype) for key in keys)
    return q * shape[-1] ** -0.5, k, v, d_o


def random_tokens(case: Case, count: int) -> list[tuple[Tokens, Tokens, Tokens, Tokens]]:
    """`count` different sets of q, k, v and d_o."""
    return [_draw(case.shape.array, case.dtype, seed) for seed in range(count)]


def with_learned(
    token_sets: list[tuple], decay: str, case: Case
) -> list[tuple[Tokens, Tokens, Tokens, Tokens, dict]]:
    """The same sets, each with what else a layer learns: the rates and, if selective, a gate."""
    sets = []
    for seed, tokens in enumerate(token_sets):
        learned = {"decay": make_decay(decay, case.shape.heads)}
        if decay == "selective":
            noise = jax.random.normal(jax.random.key(1000 + seed), case.shape.array[:3])
            learned["log_gate"] = -jax.nn.softplus(noise - 4)
        sets.append((*tokens, learned))
    return sets


def call(attention: Callable, direction: str) -> Callable:
    """What is timed, as a function of (q, k, v, d_o, *learned).

    Args:
      attention: (q, k, v, *learned) to o.
      direction: "forward" returns o; "forward+backward" also the gradients of all
        arguments, so that nothing is left out as unused.
    """
    if direction == "forward":
        return jax.jit(lambda q, k, v, d_o, *learned: attention(q, k, v, *learned))

    def forward_and_backward(q, k, v, d_o, *learned):
        o, pull_back = jax.vjp(attention, q, k, v, *learned)
        return o, pull_back(d_o)

    return jax.jit(forward_and_backward)
