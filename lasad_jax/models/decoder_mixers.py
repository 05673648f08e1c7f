"""What decoding does between a token's joint projection and the output projection: the mixers."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from lasad_jax import ops
from lasad_jax.models.config import ModelConfig
from lasad_jax.models.decoder_products import normalise
from lasad_jax.models.decoder_weights import LayerWeights
from lasad_jax.models.layers import NORM_EPSILON
from lasad_jax.models.local_conv import NUM_PREFIX
from lasad_jax.models.rope import turn
from lasad_jax.ops.ring import Ring, ring_step


@struct.dataclass
class KeysValues:
    """What a softmax mixer remembers."""

    k: Float[Array, "B N H Dk"]
    v: Float[Array, "B N H Dv"]


def lasad(
    form: str,
    config: ModelConfig,
    layer: LayerWeights,
    turns: Float[Array, "tokens 2 Dk"] | None,
    projection: Float[Array, "B columns"],
    state: Ring | ops.State,
    index: Int[Array, ""],
) -> tuple[Float[Array, "B values"], Ring | ops.State]:
    """The gated output of all heads of a token after `index` others, and the state after it.

    Args:
      form: "triton" for the kernel; else `mix`.
    """
    if form == "triton":
        from lasad_jax.ops.kernels import decode_triton

        out, state = decode_triton.mix(
            state,
            projection,
            index,
            log_factor=layer.log_factor,
            turns=turns,
            gate_bias=layer.gate_bias,
            epsilon=NORM_EPSILON,
        )
    else:
        out, state = mix(config, layer, projection, turns, state, index)
    return out.reshape(out.shape[0], -1), state


def mix(
    config: ModelConfig,
    layer: LayerWeights,
    projection: Float[Array, "B columns"],
    turns: Float[Array, "tokens 2 Dk"] | None,
    state: Ring | ops.State,
    index: Int[Array, ""],
) -> tuple[Float[Array, "B H Dv"], Ring | ops.State]:
    """From a token's projections to the gated output of every head, and the state after it."""
    q, k, v, out_gate = _split_heads(config, projection, 4)
    q, k, out_gate = jax.nn.silu(q), jax.nn.silu(k), jax.nn.silu(out_gate)
    if config.rope:
        q, k = turn(q, turns[index]), turn(k, turns[index])
    q *= config.query_dim**-0.5
    if isinstance(state, Ring):
        place = index - NUM_PREFIX
        g = layer.log_factor[place]
        if config.selective:
            first = config.num_heads * 2 * (config.query_dim + config.value_dim)
            gate = projection[:, first : first + config.num_heads].astype(jnp.float32)
            g -= jax.nn.softplus(gate + layer.gate_bias)
        out, state = ring_step(state, q, k, v, g, place)
    else:
        out, state = ops.step(state, q, k, v, layer.decay, grid=config.grid)
    return normalise(out) * out_gate, state


def softmax(
    config: ModelConfig,
    layer: LayerWeights,
    turns: Float[Array, "tokens 2 Dk"] | None,
    projection: Float[Array, "B columns"],
    cache: KeysValues,
    index: Int[Array, ""],
) -> tuple[Float[Array, "B values"], KeysValues]:
    """The same of attention over all keys so far."""
    q, k, v = _split_heads(config, projection, 3)
    if config.rope:
        q, k = turn(q, turns[index]), turn(k, turns[index])
    update = jax.lax.dynamic_update_slice_in_dim
    k = update(cache.k, k[:, None], index, axis=1)
    v = update(cache.v, v[:, None], index, axis=1)
    seen = index >= jnp.arange(k.shape[1])
    out = jax.nn.dot_product_attention(q[:, None], k, v, mask=seen[None, None, None])
    return out.reshape(out.shape[0], -1), KeysValues(k, v)


def _split_heads(config, projection, num_parts):
    """[q | k | v | out_gate] of all heads, or as many of them as there are."""
    sizes = (config.query_dim, config.query_dim, config.value_dim, config.value_dim)[:num_parts]
    lead, width = projection.shape[:-1], sum(sizes)
    heads = projection[..., : config.num_heads * width].reshape(*lead, config.num_heads, width)
    ends = [sum(sizes[: i + 1]) for i in range(num_parts - 1)]
    return jnp.split(heads, ends, axis=-1)
