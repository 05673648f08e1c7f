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
from lasad_jax.ops.kernels.layer_ring import BlockedRing, to_blocks
from lasad_jax.ops.kernels.layer_tiling import COUNTERS, UNIT, whole_rows
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
      counters: what programs of "mosaic" count each other in, zeros between launches.
      form: that `decode` has (`decoder_forms`).
      fused: whether its products may be kernels.
    """

    index: Int[Array, ""]
    layers: tuple[Layer, ...]
    counters: Int[Array, "phases stride"]
    form: str = struct.field(pytree_node=False)
    fused: bool = struct.field(pytree_node=False)


def prefill(
    config: ModelConfig,
    weights: Weights,
    labels: Int[Array, " B"],
    tokens: Int[Array, "B n"],
    *,
    implementation: str = "auto",
) -> tuple[Float32[Array, "B D"], Cache]:
    """`LASADGen.prefill`: features after the label and the first n codes, and the cache.

    Arguments and errors: as of `start`.
    """
    model = LASADGen(config, folded=True)
    (features, _), cache = model.apply({"params": weights.params}, labels, tokens, method="read")
    return features.astype(jnp.float32), start(config, weights, cache, implementation=implementation)


def logits(weights: Weights, features: Float32[Array, "B D"]) -> Float32[Array, "B V"]:
    """Of the code that comes next, from what `prefill` or `decode` returned."""
    head = weights.params["head"]["kernel"]
    return jnp.dot(features.astype(head.dtype), head, preferred_element_type=jnp.float32)


def start(
    config: ModelConfig, weights: Weights, cache: PyTree, *, implementation: str = "auto"
) -> Cache:
    """The decoder's cache from the one that `LASADGen.prefill` returned.

    Args:
      config: the generator's.
      weights: from `prepare`.
      cache: of the model.
      implementation: the form of `decode` from here on, or "auto" for the best that can run,
        which is "mosaic" if the weights have been prepared for it.

    Raises:
      ValueError: as `resolve_implementation`, or for weights, or rows, that "mosaic" cannot take.
    """
    split = [jax.tree.map(lambda x, i=i: x[i], cache) for i in range(config.num_layers)]
    num_rows = len(jax.tree.leaves(split[0].mixer)[0])
    form = resolve_implementation(config, implementation, num_rows)
    if form == "mosaic" and weights.pair != UNIT:
        if implementation == "mosaic":
            raise ValueError("implementation: 'mosaic' takes weights that were prepared for it")
        form = "triton"
    if config.mixer == "softmax":
        begin = lambda cache: mixers.KeysValues(cache.k, cache.v)
    elif config.decay == "manhattan":
        begin = lambda state: state
    elif form == "mosaic":
        begin = lambda state: to_blocks(start_ring(state), whole_rows(num_rows))
    else:
        begin = start_ring
    layers = tuple(Layer(begin(layer.mixer), layer.recent) for layer in split)
    counters = jnp.zeros(COUNTERS, jnp.int32)
    return Cache(split[0].mixer.index, layers, counters, form, implementation != "xla")


def decode(
    config: ModelConfig, weights: Weights, tokens: Int[Array, " B"], cache: Cache
) -> tuple[Float32[Array, "B D"], Cache]:
    """Reads one code of each image; returns the features of the next and the new cache.

    Args:
      config: the generator's.
      weights: from `prepare`.
      tokens: codes.
      cache: from `prefill`, `start` or `decode`.

    Returns:
      the features, of unit mean square, and the cache after the codes.
    """
    x = jnp.take(weights.params["token_embedding"]["embedding"], tokens, axis=0)
    if cache.form == "mosaic":
        x, layers, counters = _layers_of_one_launch(config, weights, x, cache)
    else:
        layers, counters = [], cache.counters
        for layer, remembered in zip(weights.layers, cache.layers, strict=True):
            how = config, cache.form, cache.fused, weights.pair
            x, remembered = _layer(*how, layer, weights.turns, x, remembered, cache.index)
            layers.append(remembered)
    features = normalise(x.astype(jnp.float32))
    cache = cache.replace(index=cache.index + 1, layers=tuple(layers), counters=counters)
    return features, cache


def _layers_of_one_launch(config, weights, x, cache):
    from lasad_jax.ops.kernels.decode_layer import sums_of_squares

    num_rows = len(x)
    x = jnp.pad(x, ((0, whole_rows(num_rows) - num_rows), (0, 0)))
    layers, counters, squares = [], cache.counters, sums_of_squares(x)
    for layer, remembered in zip(weights.layers, cache.layers, strict=True):
        x, squares, remembered, counters = _whole_layer(
            config, layer, weights.head_turns, x, squares, remembered, cache.index, counters
        )
        layers.append(remembered)
    return x[:num_rows], layers, counters


# Traced and lowered once for all layers, as `_layer`.
@functools.partial(jax.jit, static_argnums=0)
def _whole_layer(config, layer, turns, x, squares, remembered, index, counters):
    from lasad_jax.ops.kernels import decode_layer

    x, squares, ring, recent, counters = decode_layer.layer(
        x,
        squares,
        remembered.mixer,
        remembered.recent,
        index,
        counters,
        projection=layer.projection,
        out=layer.out,
        taps=layer.conv,
        gate_up=layer.gate_up,
        down=layer.down,
        log_factor=layer.log_factor,
        turns=turns,
        gate_bias=layer.gate_bias,
        offsets=TAPS,
        columns=config.grid[1],
        epsilon=NORM_EPSILON,
    )
    return x, squares, Layer(ring, recent), counters


# Traced and lowered once for all layers: that is most of what starting a deep model takes.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _layer(config, form, fused, pair, layer, turns, x, remembered, index):
    """One layer of `decode`: the residual stream and what the layer remembers."""
    projection = project(fused, x, layer.projection)
    mixer = mixers.softmax if config.mixer == "softmax" else functools.partial(mixers.lasad, form)
    mixed, state = mixer(config, layer, turns, projection, remembered.mixer, index)
    x = y = project_add(fused, mixed, layer.out, x)
    recent = remembered.recent
    if recent is not None:
        y, recent = _norm_conv(form, config, layer, x, recent, index)
    hidden = swiglu(fused, y, layer.gate_up, norm=recent is None, pair=pair)
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
