"""One token at a time, as fast as it goes: `LASADGen.decode_step` over prepared weights.

    weights = prepare(config, params)
    features, cache = prefill(config, weights, labels, tokens)
    tokens = choose(logits(weights, features))                  # as often as there are codes
    features, cache = decode(config, weights, tokens, cache)

Logits are apart because guidance may come before them: they are linear in the features.

Layers are a tuple, not a stacked array, and their loop is unrolled: inside a scan over
tokens every cache is then updated in place, and no weight is cast, sliced or copied.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Float32, Int, PyTree

from lasad_jax import ops
from lasad_jax.models import decoder_mixers as mixers
from lasad_jax.models.config import ModelConfig
from lasad_jax.models.decoder_forms import IMPLEMENTATIONS, resolve_implementation
from lasad_jax.models.decoder_products import (
    normalise,
    project,
    project_add,
    swiglu,
)
from lasad_jax.models.decoder_weights import Weights, prepare
from lasad_jax.models.generator import LASADGen
from lasad_jax.models.layers import NORM_EPSILON
from lasad_jax.models.local_conv import NUM_PREFIX
from lasad_jax.ops.kernels import between_tiling
from lasad_jax.ops.kernels.between_tiling import Counters, new_counters
from lasad_jax.ops.passes.local_conv import TAPS, next_token
from lasad_jax.ops.ring import Ring, start_ring

__all__ = [
    "IMPLEMENTATIONS",
    "Cache",
    "decode",
    "logits",
    "prefill",
    "prepare",
    "resolve_implementation",
    "start",
]


@struct.dataclass
class Layer:
    """What a layer remembers.

    Attributes:
      mixer: for `manhattan` the operator's own state.
      recent: newest inputs of the local convolution (`local_conv.init_recent`).
    """

    mixer: Ring | ops.State | mixers.KeysValues
    recent: Float[Array, "B W D"] | None


@struct.dataclass
class Cache:
    """What the decoder remembers: the number of tokens seen, and each layer's own.

    Attributes:
      counters: what programs of "mosaic" count each other in.
    """

    index: Int[Array, ""]
    layers: tuple[Layer, ...]
    counters: Counters


def prefill(
    config: ModelConfig, weights: Weights, labels: Int[Array, " B"], tokens: Int[Array, "B n"]
) -> tuple[Float32[Array, "B D"], Cache]:
    """`LASADGen.prefill`: features after the label and the first n codes, and the cache."""
    model = LASADGen(config, folded=True)
    (features, _), cache = model.apply({"params": weights.params}, labels, tokens, method="read")
    return features.astype(jnp.float32), start(config, cache)


def logits(weights: Weights, features: Float32[Array, "B D"]) -> Float32[Array, "B V"]:
    """Of the code that comes next, from what `prefill` or `decode` returned."""
    head = weights.params["head"]["kernel"]
    return jnp.dot(features.astype(head.dtype), head, preferred_element_type=jnp.float32)


def start(config: ModelConfig, cache: PyTree) -> Cache:
    """The decoder's cache from the one that `LASADGen.prefill` returned."""
    split = [jax.tree.map(lambda x, i=i: x[i], cache) for i in range(config.num_layers)]
    if config.mixer == "softmax":
        begin = lambda cache: mixers.KeysValues(cache.k, cache.v)
    else:
        begin = (lambda state: state) if config.decay == "manhattan" else start_ring
    layers = tuple(Layer(begin(layer.mixer), layer.recent) for layer in split)
    return Cache(split[0].mixer.index, layers, new_counters())


def decode(
    config: ModelConfig,
    weights: Weights,
    tokens: Int[Array, " B"],
    cache: Cache,
    *,
    implementation: str = "auto",
) -> tuple[Float32[Array, "B D"], Cache]:
    """Reads one code of each image; returns the features of the next and the new cache.

    Args:
      config: the generator's.
      weights: from `prepare`.
      tokens: codes.
      cache: from `start` or `decode`.
      implementation: a form (`decoder_forms`), or "auto" for the best that can run, which is
        "mosaic" if the weights have been prepared for it.

    Returns:
      the features, of unit mean square, and the cache after the codes.

    Raises:
      ValueError: as `resolve_implementation`, or for weights, or rows, that "mosaic" cannot take.
    """
    fused = implementation != "xla"
    form = resolve_implementation(config, implementation, len(tokens))
    if form == "mosaic" and weights.pair != between_tiling.UNIT:
        if implementation == "mosaic":
            raise ValueError("implementation: 'mosaic' takes weights that were prepared for it")
        form = "triton"
    tables = weights.params["token_embedding"]["embedding"], weights.first
    x, projection = (jnp.take(table, tokens, axis=0) for table in tables)
    following = [layer.projection for layer in weights.layers[1:]] + [None]
    layers, counters = [], cache.counters
    if form == "mosaic":
        missing = between_tiling.whole_rows(len(tokens)) - len(tokens)
        x, projection = (jnp.pad(a, ((0, missing), (0, 0))) for a in (x, projection))
    for layer, after, remembered in zip(weights.layers, following, cache.layers, strict=True):
        given = layer, after, weights.turns, x, projection, remembered, cache.index
        if form == "mosaic":
            x, projection, remembered, counters = _heads_and_rest(config, *given, counters)
        else:
            x, projection, remembered = _layer(config, form, fused, weights.pair, *given)
        layers.append(remembered)
    x = x[: len(tokens)]
    features = normalise(x.astype(jnp.float32))
    return features, Cache(cache.index + 1, tuple(layers), counters)


# All layers but the last are traced and lowered once: that is most of what starting a deep model
# takes. Each begins with its own projection and ends with the next one's.


@functools.partial(jax.jit, static_argnums=0)
def _heads_and_rest(
    config, layer, next_projection, turns, x, projection, remembered, index, counters
):
    """Two launches: the heads of a layer, then all from there to the next layer's heads."""
    from lasad_jax.ops.kernels import decode_between

    mixed, state = mixers.lasad("triton", config, layer, turns, projection, remembered.mixer, index)
    x, projection, recent, counters = decode_between.between(
        mixed,
        x,
        remembered.recent,
        index,
        counters,
        out=layer.out,
        taps=layer.conv,
        gate_up=layer.gate_up,
        down=layer.down,
        projection=next_projection,
        offsets=TAPS,
        columns=config.grid[1],
        epsilon=NORM_EPSILON,
    )
    return x, projection, Layer(state, recent), counters


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _layer(
    config, form, fused, pair, layer, next_projection, turns, x, projection, remembered, index
):
    """The residual stream, the next layer's projection and what the layer remembers."""
    mixer = mixers.softmax if config.mixer == "softmax" else functools.partial(mixers.lasad, form)
    mixed, state = mixer(config, layer, turns, projection, remembered.mixer, index)
    x = y = project_add(fused, mixed, layer.out, x)
    recent = remembered.recent
    if recent is not None:
        y, recent = _norm_conv(form, config, layer, x, recent, index)
    hidden = swiglu(fused, y, layer.gate_up, norm=recent is None, pair=pair)
    x = project_add(fused, hidden, layer.down, x)
    projection = None if next_projection is None else project(fused, x, next_projection)
    return x, projection, Layer(state, recent)


def _norm_conv(form, config, layer, x, recent, index):
    """RMSNorm, then the local convolution of one token, and the ring of its newest inputs."""
    if form == "triton":
        from lasad_jax.ops.kernels import decode_triton

        return decode_triton.norm_conv(
            x,
            recent,
            index,
            taps=layer.conv,
            offsets=TAPS,
            columns=config.grid[1],
            epsilon=NORM_EPSILON,
        )
    return next_token(
        normalise(x), recent, index, layer.conv, columns=config.grid[1], num_prefix=NUM_PREFIX
    )
