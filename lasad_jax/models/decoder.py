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
from lasad_jax.models.mixers import FAMILIES
from lasad_jax.ops.kernels import between_tiling, choice
from lasad_jax.ops.kernels.between_tiling import COUNTERS
from lasad_jax.ops.passes.local_conv import TAPS, next_token
from lasad_jax.ops.ring import Ring, start_ring

__all__ = ["IMPLEMENTATIONS", "Cache", "decode", "logits", "prefill", "prepare", "start"]

IMPLEMENTATIONS = ("auto", "xla", "triton", "mosaic")


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
      counters: what programs of "mosaic" count each other in, zeros between launches.
    """

    index: Int[Array, ""]
    layers: tuple[Layer, ...]
    counters: Int[Array, "phases stride"]


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
    return Cache(split[0].mixer.index, layers, jnp.zeros(COUNTERS, jnp.int32))


def resolve_implementation(config: ModelConfig, implementation: str = "auto") -> str:
    """The form that "auto" stands for on this device; any other, if it can run.

    Raises:
      ValueError: for an unknown form, or saying why the named one cannot run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: {implementation!r} is not one of {IMPLEMENTATIONS}")
    if implementation == "xla":
        return implementation
    obstacle = _obstacle(config)
    if implementation == "auto":
        return "triton" if obstacle is None else "xla"
    if obstacle:
        raise ValueError(
            f"implementation: {implementation!r} cannot decode here: {obstacle}; use 'xla'"
        )
    return implementation


def _obstacle(config: ModelConfig) -> str | None:
    if config.mixer != "lasad" or config.decay == "manhattan":
        name = "softmax" if config.mixer == "softmax" else config.decay
        return f"it decodes single recurrences, not {name!r}"
    q, v = (
        jax.ShapeDtypeStruct((1, 1, config.num_heads, size), config.compute_dtype)
        for size in (config.query_dim, config.value_dim)
    )
    return choice.obstacle("triton", q, v, FAMILIES[config.decay], NUM_PREFIX)


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
      implementation: "xla" runs anywhere; "triton" is two kernels of the mixers for NVIDIA GPUs,
        "auto" these where they can run. With both, matrix products are kernels where they can be.
        "mosaic", for Hopper GPUs, bf16 and a local convolution, is a layer in two launches.

    Returns:
      the features, of unit mean square, and the cache after the codes.

    Raises:
      ValueError: as `resolve_implementation`, or for weights, or rows, that "mosaic" cannot take.
    """
    fused = implementation != "xla"
    form = resolve_implementation(config, implementation)
    x = jnp.take(weights.params["token_embedding"]["embedding"], tokens, axis=0)
    if form == "mosaic":
        x, layers, counters = _layers_in_pairs_of_launches(config, weights, x, cache)
    else:
        layers, counters = [], cache.counters
        for layer, remembered in zip(weights.layers, cache.layers, strict=True):
            x, remembered = _layer(
                config, form, fused, weights.pair, layer, weights.turns, x, remembered, cache.index
            )
            layers.append(remembered)
    features = normalise(x.astype(jnp.float32))
    return features, Cache(cache.index + 1, tuple(layers), counters)


def _layers_in_pairs_of_launches(config, weights, x, cache):
    """The heads of a layer, then all from there to the next layer's heads."""
    if obstacle := _mosaic_obstacle(config, weights, x):
        raise ValueError(f"implementation: 'mosaic' cannot decode here: {obstacle}; use 'triton'")
    following = [layer.projection for layer in weights.layers[1:]] + [None]
    projection = project(True, x, weights.layers[0].projection)
    layers, counters = [], cache.counters
    for layer, after, remembered in zip(weights.layers, following, cache.layers, strict=True):
        x, projection, remembered, counters = _heads_and_rest(
            config, layer, after, weights.turns, x, projection, remembered, cache.index, counters
        )
        layers.append(remembered)
    return x, layers, counters


def _mosaic_obstacle(config, weights, x):
    if x.dtype != jnp.bfloat16 or not config.has_local_conv:
        return f"it takes bfloat16 and a local convolution, not {x.dtype}, {config.local_conv!r}"
    if weights.pair != between_tiling.UNIT:
        return "its weights are from prepare(..., implementation='mosaic')"
    layer = weights.layers[0]
    others = (layer.out.shape[0], layer.down.shape[0], layer.projection.shape[1])
    return between_tiling.obstacle(x.shape[0], x.shape[1], others)


@functools.partial(jax.jit, static_argnums=0)
def _heads_and_rest(
    config, layer, next_projection, turns, x, projection, remembered, index, counters
):
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
