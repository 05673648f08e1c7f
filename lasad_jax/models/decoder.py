"""One token at a time, as fast as it goes: `LASADGen.decode_step` over prepared weights.

    weights = prepare(config, params)
    features, cache = prefill(config, weights, labels, tokens)
    tokens = choose(logits(weights, features))                  # as often as there are codes
    features, cache = decode(config, weights, tokens, cache)

Logits are apart because guidance may come before them: they are linear in the features.

Layers are a tuple, not a stacked array, and their loop is unrolled: inside a scan over
tokens every cache is then updated in place, and no weight is cast, sliced or copied. Only
"mosaic", one kernel for all layers, takes them stacked.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Float32, Int, PyTree

from lasad_jax import ops
from lasad_jax.models import decoder_mixers as mixers
from lasad_jax.models.config import ModelConfig
from lasad_jax.models.decoder_forms import (
    IMPLEMENTATIONS,
    projection_columns,
    resolve_implementation,
)
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
from lasad_jax.models.sizes import ffn_width
from lasad_jax.ops.kernels.layer_ring import BlockedRing, to_blocks
from lasad_jax.ops.kernels.layer_tiling import counters, whole_rows
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
      mixer: for `manhattan` the operator's own state; in blocks for "mosaic".
      recent: newest inputs of the local convolution (`local_conv.init_recent`).
    """

    mixer: Ring | BlockedRing | ops.State | mixers.KeysValues
    recent: Float[Array, "B W D"] | None


@struct.dataclass
class Cache:
    """What the decoder remembers: the number of tokens seen, and each layer's own.

    Attributes:
      layers: one after the other; for "mosaic" stacked.
      counters: what programs of "mosaic" count each other in, zeros between launches.
    """

    index: Int[Array, ""]
    layers: tuple[Layer, ...] | Layer
    counters: Int[Array, "counters stride"] | None


def prefill(
    config: ModelConfig, weights: Weights, labels: Int[Array, " B"], tokens: Int[Array, "B n"]
) -> tuple[Float32[Array, "B D"], Cache]:
    """`LASADGen.prefill`: features after the label and the first n codes, and the cache.

    Raises:
      ValueError: as `start`.
    """
    model = LASADGen(config, folded=True)
    (features, _), cache = model.apply({"params": weights.params}, labels, tokens, method="read")
    return features.astype(jnp.float32), start(config, weights, cache)


def logits(weights: Weights, features: Float32[Array, "B D"]) -> Float32[Array, "B V"]:
    """Of the code that comes next, from what `prefill` or `decode` returned."""
    head = weights.params["head"]["kernel"]
    return jnp.dot(features.astype(head.dtype), head, preferred_element_type=jnp.float32)


def start(config: ModelConfig, weights: Weights, cache: PyTree) -> Cache:
    """The decoder's cache from the one that `LASADGen.prefill` returned.

    Raises:
      ValueError: for more images than the form that the weights are for can take.
    """
    index = cache.mixer.index[0]
    if weights.form == "mosaic":
        num_rows = cache.recent.shape[1]
        resolve_implementation(config, "mosaic", num_rows)
        begin = lambda state: to_blocks(start_ring(state), whole_rows(num_rows))
        layers = Layer(jax.vmap(begin)(cache.mixer), cache.recent)
        return Cache(index, layers, counters(config.num_layers))
    if config.mixer == "softmax":
        begin = lambda cache: mixers.KeysValues(cache.k, cache.v)
    else:
        begin = (lambda state: state) if config.decay == "manhattan" else start_ring
    split = [jax.tree.map(lambda x, i=i: x[i], cache) for i in range(config.num_layers)]
    return Cache(index, tuple(Layer(begin(one.mixer), one.recent) for one in split), None)


def decode(
    config: ModelConfig, weights: Weights, tokens: Int[Array, " B"], cache: Cache
) -> tuple[Float32[Array, "B D"], Cache]:
    """Reads one code of each image; returns the features of the next and the new cache.

    Args:
      config: the generator's.
      weights: from `prepare`, which says how it is done.
      tokens: codes.
      cache: from `prefill`, `start` or `decode`.

    Returns:
      the features, of unit mean square, and the cache after the codes.
    """
    x = jnp.take(weights.params["token_embedding"]["embedding"], tokens, axis=0)
    if weights.form == "mosaic":
        x, cache = _all_layers(config, weights, x, cache)
    else:
        layers = []
        for layer, remembered in zip(weights.layers, cache.layers, strict=True):
            how = config, weights.form, weights.fused
            x, remembered = _layer(*how, layer, weights.turns, x, remembered, cache.index)
            layers.append(remembered)
        cache = cache.replace(layers=tuple(layers))
    return normalise(x.astype(jnp.float32)), cache.replace(index=cache.index + 1)


def _all_layers(config, weights, x, cache):
    """The residual stream after all layers, and the cache but for its index."""
    from lasad_jax.ops.kernels import decode_layers

    num_rows, layers = len(x), weights.layers
    x, ring, recent, state = decode_layers.all_layers(
        jnp.pad(x, ((0, whole_rows(num_rows) - num_rows), (0, 0))),
        cache.layers.mixer,
        cache.layers.recent,
        cache.index,
        cache.counters,
        pieces=layers.pieces,
        sizes=(projection_columns(config), ffn_width(config)),
        taps=layers.conv,
        log_factor=layers.log_factor,
        turns=weights.turns,
        gate_bias=layers.gate_bias,
        offsets=TAPS,
        columns=config.grid[1],
        epsilon=NORM_EPSILON,
    )
    return x[:num_rows], cache.replace(layers=Layer(ring, recent), counters=state)


# Traced and lowered once for all layers: that is most of what starting a deep model takes.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _layer(config, form, fused, layer, turns, x, remembered, index):
    """One layer of `decode`: the residual stream and what the layer remembers."""
    projection = project(fused, x, layer.projection)
    mixer = mixers.softmax if config.mixer == "softmax" else functools.partial(mixers.lasad, form)
    mixed, state = mixer(config, layer, turns, projection, remembered.mixer, index)
    x = y = project_add(fused, mixed, layer.out, x)
    recent = remembered.recent
    if recent is not None:
        y, recent = _norm_conv(form, config, layer, x, recent, index)
    hidden = swiglu(fused, y, layer.gate_up, norm=recent is None)
    return project_add(fused, hidden, layer.down, x), Layer(state, recent)


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
