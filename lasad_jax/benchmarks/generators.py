"""Which generators are timed: size, batch, grid and mixer, and the random codes they read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from absl import flags
from jaxtyping import Array, Int

from lasad_jax.benchmarks.mixer_names import model_fields
from lasad_jax.benchmarks.tables import check_known
from lasad_jax.models import SIZES, ModelConfig

# The baseline first: LASAD's row then has something to be compared with.
MIXERS = ("softmax", "lasad")

CASES = flags.DEFINE_list(
    "cases", None, "SIZE:BxRxC each, such as B:128x16x16; by device if unset."
)
_MIXERS = flags.DEFINE_list(
    "mixers", list(MIXERS), "Rows of each case; also with parts, such as raster+conv+rope."
)
_VOCAB = flags.DEFINE_integer("vocab", 16384, "Codes V.", 2)


@dataclasses.dataclass(frozen=True)
class GeneratorCase:
    """A size of `SIZES` with so many images at a time. `str` and `parse` write it SIZE:BxRxC."""

    size: str
    batch: int
    grid: tuple[int, int]

    @classmethod
    def parse(cls, text: str, flag: str = "cases") -> "GeneratorCase":
        """From SIZE:BxRxC; a ValueError names `flag`."""
        size, _, numbers = text.partition(":")
        check_known(flag, [size], tuple(SIZES))
        parts = numbers.split("x")
        if len(parts) != 3 or not all(n.isdigit() and int(n) for n in parts):
            raise ValueError(f"{flag}: expected SIZE:BxRxC such as B:128x16x16, got {text!r}")
        batch, rows, columns = map(int, parts)
        return cls(size, batch, (rows, columns))

    def __str__(self) -> str:
        return f"{self.size}:{self.batch}x{self.grid[0]}x{self.grid[1]}"

    @property
    def tokens(self) -> int:
        """N of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def peer_key(self) -> tuple[str, int, int]:
        """As the tables of `llamagen` are keyed."""
        return self.size, self.tokens, self.batch

    def shrunk(self, part: int, parts: int) -> "GeneratorCase":
        """The same with both sides of the grid `part` / `parts` as long."""
        rows, columns = (max(1, side * part // parts) for side in self.grid)
        return dataclasses.replace(self, grid=(rows, columns))

    def model(self, mixer: str, **overrides) -> ModelConfig:
        """The generator: `ModelConfig`'s defaults where nothing else is said."""
        fields = {"mixer": mixer} if mixer in MIXERS else model_fields(mixer)
        fields |= {"vocab_size": _VOCAB.value, **SIZES[self.size], **overrides}
        return ModelConfig(grid=self.grid, **fields)


def mixers() -> list[str]:
    """Those of the flag, the baseline first."""
    given = dict.fromkeys(_MIXERS.value)
    for mixer in given:
        if mixer not in MIXERS:
            model_fields(mixer, "mixers")
    return [*(m for m in MIXERS if m in given), *(m for m in given if m not in MIXERS)]


def over_softmax(row: dict, baseline: dict) -> dict[str, float]:
    """The rate of a row over that of the baseline's, as a field, if both have one."""
    name = "images_per_second"
    if name not in row or name not in baseline:
        return {}
    return {"over_softmax": row[name] / baseline[name]}


@functools.partial(jax.jit, static_argnums=(0, 1))
def random_batch(config: ModelConfig, batch: int, seed: int) -> dict[str, Int[Array, "B ..."]]:
    """Codes and labels on the device, different for each seed, that a model can learn a bit of.

    Low codes are far more frequent than high ones, and every other code repeats the one before
    it: a loss that falls, for curves that are to be compared.
    """
    code_key, label_key = jax.random.split(jax.random.key(seed))
    drawn = jax.random.uniform(code_key, (batch, -(-config.num_tokens // 2)))
    # float32 may round up to V itself.
    codes = jnp.minimum((config.vocab_size * drawn**4).astype(jnp.int32), config.vocab_size - 1)
    labels = jax.random.randint(label_key, (batch,), 0, config.num_classes)
    return {"tokens": jnp.repeat(codes, 2, axis=1)[:, : config.num_tokens], "labels": labels}
