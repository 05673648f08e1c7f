"""Vector quantisation on the unit sphere: nearest codes and their vectors, as in LlamaGen."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Int32

from lasad_jax.models.tokenizer_config import TokenizerConfig

_ONE_HOT_UP_TO = 1024
_MAX_DISTANCES = 2**26  # 256 MB of float32
_EXACT = jax.lax.Precision.HIGHEST


def l2_normalize(x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """x / max(|x|, 1e-12) over the last axis, in float32; a zero vector stays zero."""
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-24))


def nearest_codes(
    z: Float[Array, "*places d"], codebook: Float[Array, "V d"]
) -> Int32[Array, "*places"]:
    """The row of `codebook` at the least squared distance; the first one of several.

    The codebook is searched part by part, each part as large as keeps the distances in
    memory few. (Not the places part by part: they may be split over devices.) No gradient.
    """
    z, codebook = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (z, codebook))
    V, d = codebook.shape
    places = z.shape[:-1]
    parts = min(V, -(-V * math.prod(places) // _MAX_DISTANCES)) or 1
    rows = -(-V // parts)
    fill = parts * rows - V
    half_square = jnp.sum(jnp.square(codebook), -1) / 2
    codebook = jnp.pad(codebook, ((0, fill), (0, 0))).reshape(parts, rows, d)
    half_square = jnp.pad(half_square, (0, fill), constant_values=jnp.inf).reshape(parts, rows)

    def search(best, part):
        least, code = best
        vectors, half_squares, first = part
        # Half the squared distance, less the part that all codes share.
        distance = half_squares - jnp.einsum("...d,vd->...v", z, vectors, precision=_EXACT)
        here = jnp.min(distance, -1)
        index = first + jnp.argmin(distance, -1).astype(jnp.int32)
        return (jnp.minimum(least, here), jnp.where(here < least, index, code)), None

    start = (jnp.full(places, jnp.inf), jnp.zeros(places, jnp.int32))
    firsts = jnp.arange(parts, dtype=jnp.int32) * rows
    (_, code), _ = jax.lax.scan(search, start, (codebook, half_square, firsts))
    return code


class VectorQuantizer(nn.Module):
    """The codebook.

    Attributes:
      config: the tokenizer.
    """

    config: TokenizerConfig

    def setup(self):
        V, d = self.config.codebook_size, self.config.codebook_dim
        init = lambda key: l2_normalize(
            jax.random.uniform(key, (V, d), minval=-1 / V, maxval=1 / V)
        )
        self.embedding = self.param("embedding", init)

    def codebook(self) -> Float[Array, "V d"]:
        """All vectors, L2-normalised, float32."""
        return l2_normalize(self.embedding)

    def nearest(self, z: Float[Array, "*places d"]) -> Int32[Array, "*places"]:
        """The code nearest to each vector of any length, compared on the unit sphere."""
        return nearest_codes(l2_normalize(z), self.codebook())

    def lookup(self, codes: Int[Array, "*places"]) -> Float[Array, "*places d"]:
        """The codes' normalised vectors, float32, with gradient to the codebook.

        In small codebooks by a matrix product with one-hot vectors: the gradient of a
        gather would add many rows to the same few addresses, one by one.
        """
        if self.config.codebook_size <= _ONE_HOT_UP_TO:
            one_hot = jax.nn.one_hot(codes, self.config.codebook_size, dtype=jnp.float32)
            return jnp.matmul(one_hot, self.codebook(), precision=_EXACT)
        return jnp.take(self.codebook(), codes, axis=0)
