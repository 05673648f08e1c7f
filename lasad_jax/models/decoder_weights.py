"""The generator's parameters as decoding wants them: cast, fused and split by layer once."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, PyTree

from lasad_jax import ops
from lasad_jax.models.config import ModelConfig
from lasad_jax.models.decoder_forms import projection_columns, resolve_implementation
from lasad_jax.models.folding import fold
from lasad_jax.models.mixers import decay_of
from lasad_jax.models.rope import turn_table
from lasad_jax.ops.kernels.decode_tiling import PAIR, interleave
from lasad_jax.ops.kernels.layer_tiling import UNIT, pack


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
class PackedLayers:
    """All layers as "mosaic" reads them; what is not said is as in `LayerWeights`.

    Attributes:
      pieces: projection, out, gate_up and down, cut into pieces (`layer_tiling.pack`).
      gate_bias, log_factor: of heads filled up to a multiple of four.
    """

    pieces: Float[Array, "layers pieces rows columns"]
    gate_bias: Float[Array, "layers heads"] | None
    log_factor: Float[Array, "layers places heads"]
    conv: Float[Array, "layers taps D"]


@struct.dataclass
class Weights:
    """All that decoding multiplies with.

    Attributes:
      params: of `LASADGen(folded=True)`, layers stacked, matrices in the compute dtype: for the
        parallel pass over what is given. Embedding and head serve decoding too.
      turns: for each token, prefix included, what RoPE multiplies a head by and what it
        multiplies its swapped pairs by: (cos, cos) and (-sin, sin).
        For "mosaic" twice beside each other.
      layers: one after the other.
      form: that `decode` has (`decoder_forms`).
      fused: whether its products may be kernels.
    """

    params: PyTree
    turns: Float[Array, "tokens 2 Dk"] | None
    layers: tuple[LayerWeights, ...] | PackedLayers
    form: str = struct.field(pytree_node=False)
    fused: bool = struct.field(pytree_node=False)


def prepare(
    config: ModelConfig,
    params: PyTree,
    num_rows: int | None = None,
    implementation: str = "auto",
) -> Weights:
    """Weights of the decoder, for one form of it.

    Args:
      config, params: of `LASADGen`; unboxed, layers stacked.
      num_rows: that a device decodes at a time, with guidance two for each image; None for as
        many as suit.
      implementation: the form, or "auto" for the best that can run (`resolve_implementation`).

    Raises:
      ValueError: as `resolve_implementation`.
    """
    form = resolve_implementation(config, implementation, num_rows)
    exact = lambda x: jnp.asarray(x, jnp.float32)
    turns = None
    if config.rope:
        # As in the mixers; LlamaGen's table is all zeros for the prefix.
        scale = 1.0 if config.mixer == "lasad" else 0.0
        table = turn_table(config.grid, config.query_dim, prefix_scale=scale)
        turns = jnp.asarray(table, jnp.float32)
    params = fold(config, params)
    if form == "mosaic":
        layers = jax.vmap(lambda block: _packed(_layer(config, block, exact, UNIT)))(
            params["blocks"]
        )
        turns = turns if turns is None else jnp.concatenate([turns, turns], axis=-1)
    else:
        layers = tuple(
            _layer(config, jax.tree.map(lambda x, i=i: x[i], params["blocks"]), exact, PAIR)
            for i in range(config.num_layers)
        )
    return Weights(params, turns, layers, form, implementation != "xla")


def _packed(layer: LayerWeights) -> PackedLayers:
    matrices = (layer.projection, 1), (layer.out, 1), (layer.gate_up, 2), (layer.down, 1)
    # Bulk copies take 16 bytes at a time.
    fill = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % 4)])
    bias = None if layer.gate_bias is None else fill(layer.gate_bias)
    return PackedLayers(pack(*matrices), bias, fill(layer.log_factor), layer.conv)


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
