"""The generator's parameters as decoding wants them: cast, fused and split by layer once."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, PyTree

from lasad_jax import ops
from lasad_jax.models.config import ModelConfig
from lasad_jax.models.decoder_forms import projection_columns, resolve_implementation
from lasad_jax.models.decoder_products import project
from lasad_jax.models.folding import fold
from lasad_jax.models.mixers import decay_of
from lasad_jax.models.rope import turn_table
from lasad_jax.ops.kernels.between_tiling import UNIT
from lasad_jax.ops.kernels.decode_tiling import PAIR, interleave


@struct.dataclass
class LayerWeights:
    """One layer. Matrices are in the compute dtype, all else in float32. The scale of each norm
    is in the rows of the matrix that follows it.

    Attributes:
      projection: to [q | k | v | out_gate] of one head after the other, then the decay
        gates of all heads, then columns of zeros; for softmax to [q | k | v] of each head.
      gate_bias: bias of the decay gates.
      decay: LASAD's rates.
      log_factor: the log-factor of the step to each place, where the decay is a recurrence.
      out: output projection.
      conv: taps of the local convolution, in the compute dtype.
      gate_up, down: gate and up, columns of both by turns
        (`interleave`), and down, of the feed-forward.
    """

    projection: Float[Array, "D columns"]
    gate_bias: Float[Array, " H"] | None
    decay: ops.Decay | None
    log_factor: Float[Array, "places H"] | None
    out: Float[Array, "values D"]
    conv: Float[Array, "taps D"] | None
    gate_up: Float[Array, "D both"]
    down: Float[Array, "F D"]


@struct.dataclass
class Weights:
    """All that decoding multiplies with.

    Attributes:
      params: of `LASADGen(folded=True)`, layers stacked, matrices in the compute dtype: for the
        parallel pass over what is given. Embedding and head serve decoding too.
      turns: for each token, prefix included, what RoPE multiplies a head by and what it
        multiplies its swapped pairs by: (cos, cos) and (-sin, sin).
      layers: one after the other.
      first: of every code what the first layer's `projection` makes of it: no product of its own.
      pair: columns of gate, then of up, at a time in `gate_up`.
    """

    params: PyTree
    turns: Float[Array, "tokens 2 Dk"] | None
    layers: tuple[LayerWeights, ...]
    first: Float[Array, "V columns"]
    pair: int = struct.field(pytree_node=False, default=PAIR)


def prepare(config: ModelConfig, params: PyTree, implementation: str = "auto") -> Weights:
    """Weights of the decoder.

    Every form of `decode` takes those of any other, but "mosaic" needs its own.

    Args:
      config, params: of `LASADGen`; unboxed, layers stacked.
      implementation: the form of `decode` to prepare for; "auto" is that for this device.
    """
    if implementation == "auto":
        implementation = resolve_implementation(config)
    pair = UNIT if implementation == "mosaic" else PAIR
    exact = lambda x: jnp.asarray(x, jnp.float32)
    turns = None
    if config.rope:
        # As in the mixers; LlamaGen's table is all zeros for the prefix.
        scale = 1.0 if config.mixer == "lasad" else 0.0
        table = turn_table(config.grid, config.query_dim, prefix_scale=scale)
        turns = jnp.asarray(table, jnp.float32)
    params = fold(config, params)
    layers = tuple(
        _layer(config, jax.tree.map(lambda x, i=i: x[i], params["blocks"]), exact, pair)
        for i in range(config.num_layers)
    )
    codes = params["token_embedding"]["embedding"]
    return Weights(params, turns, layers, project(False, codes, layers[0].projection), pair)


def _layer(config: ModelConfig, params: PyTree, exact, pair: int) -> LayerWeights:
    mixer, conv, ffn = params["mixer"], params.get("conv"), params["ffn"]
    lasad = config.mixer == "lasad"
    names = ("q", "k", "v", "out_gate") if lasad else ("q", "k", "v")
    per_head = jnp.concatenate([mixer[name]["kernel"] for name in names], axis=2)
    columns = [per_head.reshape(config.width, -1)]
    gate = mixer.get("decay_gate")
    if gate is not None:
        columns.append(gate["kernel"])
        missing = projection_columns(config) - sum(x.shape[1] for x in columns)
        columns.append(jnp.zeros((config.width, missing), config.compute_dtype))

    decay = log_factor = None
    if lasad:
        decay = decay_of(config, lambda name: exact(mixer[name]))
        if config.decay != "manhattan":
            places = jnp.arange(config.num_tokens)
            log_factor = decay.step_log_factor(places, config.grid)
            log_factor = jnp.broadcast_to(log_factor, (len(places), config.num_heads))
    return LayerWeights(
        projection=jnp.concatenate(columns, axis=1),
        gate_bias=None if gate is None else exact(gate["bias"]),
        decay=decay,
        log_factor=log_factor,
        out=mixer["out"]["kernel"].reshape(-1, config.width),
        conv=conv and conv["kernel"].astype(config.compute_dtype),
        gate_up=interleave(ffn["gate"]["kernel"], ffn["up"]["kernel"], pair),
        down=ffn["down"]["kernel"],
    )
