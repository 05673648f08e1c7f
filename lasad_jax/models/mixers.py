"""How tokens exchange information: LASAD, and the softmax attention it is measured against.

A mixer takes a sequence from its start (`cache` None or fresh) or, with a cache, the one
token that comes next, as `AddNorm` returns them, and its `kernels()` after their `exchange`; it
returns its output and the cache after it. LASAD's cache is the operator's state.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int

from lasad_jax import ops
from lasad_jax.models.config import ModelConfig
from lasad_jax.models.exchange import Kernels, Named
from lasad_jax.models.layers import NORM_EPSILON, Kernel, Scale
from lasad_jax.models.local_conv import NUM_PREFIX
from lasad_jax.models.operator import linear_attention, mesh_axes, num_devices, passes
from lasad_jax.models.rope import rotate, turns
from lasad_jax.ops.keep import keep
from lasad_jax.ops.kernels import choice
from lasad_jax.ops.passes.gated_products import gated_heads_product
from lasad_jax.ops.passes.mixed_heads import (
    GATE_COLUMNS,
    group_size,
    join,
    log_factors,
    mixed_heads_product,
)
from lasad_jax.ops.passes.split_heads import split_heads
from lasad_jax.ops.product import product

_HEADS = ("embed", "heads", "head_dim")
_OUT = ("heads", "head_dim", "embed")
FAMILIES = {
    "none": ops.NoDecay,
    "sequence": ops.SequenceDecay,
    "raster": ops.RasterDecay,
    "manhattan": ops.ManhattanDecay,
}
# softplus(-5) is a half-life of about 100 steps: the gate starts nearly open.
_GATE_BIAS = -5.0


@struct.dataclass
class SoftmaxCache:
    """Keys and values of every token so far."""

    k: Float[Array, "*layers B N H Dk"]
    v: Float[Array, "*layers B N H Dv"]
    index: Int[Array, "*layers"]


def _half_life_init(longest: int):
    """Rates (as inputs to softplus) whose half-lives run geometrically from 1 to `longest`."""

    def init(_, shape, dtype):
        half_lives = jnp.geomspace(1.0, max(longest, 2), shape[0])
        return jnp.log(jnp.expm1(jnp.log(2.0) / half_lives)).astype(dtype)

    return nn.with_logical_partitioning(init, ("heads",))


class DecayGate(Kernel):
    """The parameters of the content gate, one number for each token and head: the kernel, and a
    `bias`."""

    def setup(self):
        init = nn.with_logical_partitioning(nn.initializers.constant(_GATE_BIAS), self.axes[1:])
        self.bias = self.param("bias", init, self.shape[1:], jnp.dtype(self.config.param_dtype))


class LASADMixer(nn.Module):
    """Gated linear attention with a decay over true grid positions."""

    config: ModelConfig

    def setup(self):
        config = self.config
        kernel = lambda size: Kernel(config, (config.width, config.num_heads, size), _HEADS)
        self.q, self.k = kernel(config.query_dim), kernel(config.query_dim)
        self.v, self.out_gate = kernel(config.value_dim), kernel(config.value_dim)
        if config.selective:
            self.decay_gate = DecayGate(config, (config.width, config.num_heads), _HEADS[:2])
        self.norm = Scale(config, (config.num_heads, config.value_dim), _HEADS[1:])
        self.out = Kernel(config, _out_shape(config), _OUT)
        self.rates = {
            name: self.param(name, _half_life_init(longest), (config.num_heads,), jnp.float32)
            for name, longest in _longest_half_lives(config).items()
        }

    def kernels(self, x: Float[Array, "B N D"], cache: ops.State | None) -> Named:
        """Each head's [q | k | v | output's gate | content gate | padding] as one kernel, joined as
        these tokens are mixed, and the output's."""
        # Joined within heads, so that they can still be split over a mesh.
        heads = jnp.concatenate([self.q(), self.k(), self.v(), self.out_gate()], axis=-1)
        if self.config.selective:
            gate = self.decay_gate()[..., None]
            gates = jnp.pad(gate, ((0, 0), (0, 0), (0, GATE_COLUMNS - 1)))
            of_device = self.config.num_heads // num_devices("heads", self.config.num_heads)
            mixes = self._mixes_heads(x, cache, heads.dtype)
            heads = join(heads, gates, group_size(of_device) if mixes else 1)
        self.norm()  # in the rows of the output's (`fold_norms`)
        return {"heads": (keep(heads), _HEADS), "out": (self.out(), _OUT)}

    def __call__(
        self, x: Float[Array, "B N D"], kernels: Kernels, cache: ops.State | None = None
    ) -> tuple[Float[Array, "B N D"], ops.State | None]:
        config = self.config
        one_step = cache is not None and x.shape[1] == 1
        index = cache.index if one_step else 0
        heads = mesh_axes("heads", config.num_heads)
        y = keep(product(x, kernels["heads"], feature_axes=heads))
        bias = self.decay_gate.bias.astype(jnp.float32) if config.selective else None
        table = None
        if config.rope:
            table = turns(config.grid, config.query_dim, index, x.shape[1], prefix_scale=1.0)
        decay, state = decay_of(config, self.rates.get), None
        q_scale = config.query_dim**-0.5
        over = {"batch_axes": mesh_axes("batch", x.shape[0]), "head_axes": heads}
        if self._mixes_heads(x, cache, y.dtype):
            steps = log_factors(decay, x.shape[1], config.grid)
            options = {"q_scale": q_scale, "epsilon": NORM_EPSILON, **over}
            return mixed_heads_product(y, kernels["out"], steps, bias, table, **options), None
        over["implementation"] = passes(config)
        q, k, v, log_gate, y = split_heads(
            y,
            table,
            key_dim=config.query_dim,
            value_dim=config.value_dim,
            q_scale=q_scale,
            gated=config.selective,
            **over,
        )
        if config.selective:
            log_gate = -jax.nn.softplus(log_gate + bias)
        if one_step:
            gate = None if log_gate is None else log_gate[:, 0]
            out, state = ops.step(
                cache, q[:, 0], k[:, 0], v[:, 0], decay, grid=config.grid, log_gate=gate
            )
            out = out[:, None]
        else:
            out = linear_attention(
                q,
                k,
                v,
                decay,
                grid=config.grid,
                num_prefix=NUM_PREFIX,
                log_gate=log_gate,
                implementation=config.implementation,
                return_state=cache is not None,
            )
            if cache is not None:
                out, state = out
            out = keep(out)
        out = gated_heads_product(
            out,
            y,
            kernels["out"],
            gate_start=2 * config.query_dim + config.value_dim,
            epsilon=NORM_EPSILON,
            partial_gradient=True,
            **over,
        )
        return out, state

    def _mixes_heads(
        self, x: Float[Array, "B N D"], cache: ops.State | None, dtype: jnp.dtype
    ) -> bool:
        """Whether all that lies between the projections runs as one kernel each way."""
        config = self.config
        if cache is not None or config.implementation != "auto":
            return False
        y = jax.ShapeDtypeStruct((*x.shape[:2], config.num_heads, 1), dtype)
        devices = num_devices("batch", x.shape[0]) * num_devices("heads", config.num_heads)
        widths = config.query_dim, config.value_dim
        return choice.mixes_heads(y, widths, decay_of(config, self.rates.get), devices)


def _longest_half_lives(config: ModelConfig) -> dict[str, int]:
    """In steps, for each rate of the decay."""
    rows, columns = config.grid
    tokens = rows * columns
    longest = {"rate": tokens, "row_rate": rows, "column_rate": tokens}
    if config.decay == "manhattan":
        longest["column_rate"] = columns
    return {field.name: longest[field.name] for field in dataclasses.fields(FAMILIES[config.decay])}


def decay_of(
    config: ModelConfig, parameter: Callable[[str], Float[Array, "*layers H"]]
) -> ops.Decay:
    """The decay with the rates whose parameters `parameter` finds by name."""
    family = FAMILIES[config.decay]
    names = (field.name for field in dataclasses.fields(family))
    return family(**{name: jax.nn.softplus(parameter(name)) for name in names})


def init_lasad_cache(config: ModelConfig, batch: int) -> ops.State:
    """The state before any token."""
    return ops.init_state(
        FAMILIES[config.decay],
        batch=batch,
        num_heads=config.num_heads,
        key_dim=config.query_dim,
        value_dim=config.value_dim,
        grid=config.grid,
        num_prefix=NUM_PREFIX,
        dtype=config.compute_dtype,
    )


class SoftmaxMixer(nn.Module):
    """Causal softmax attention with 2D rotary embedding, as in LlamaGen."""

    config: ModelConfig

    def setup(self):
        config = self.config
        shape = (config.width, config.num_heads, config.value_dim)
        self.q, self.k, self.v = (Kernel(config, shape, _HEADS) for _ in range(3))
        self.out = Kernel(config, _out_shape(config), _OUT)

    def kernels(self, x: Float[Array, "B N D"], cache: SoftmaxCache | None) -> Named:
        """Of queries, keys, values and the output."""
        inputs = {"q": self.q, "k": self.k, "v": self.v}
        named = {name: (kernel(), _HEADS) for name, kernel in inputs.items()}
        return named | {"out": (self.out(), _OUT)}

    def __call__(
        self, x: Float[Array, "B N D"], kernels: Kernels, cache: SoftmaxCache | None = None
    ) -> tuple[Float[Array, "B N D"], SoftmaxCache | None]:
        config = self.config
        heads = mesh_axes("heads", config.num_heads)
        q, k, v = (keep(product(x, kernels[name], feature_axes=heads)) for name in ("q", "k", "v"))
        index = 0 if cache is None else cache.index
        if config.rope:
            table = turns(config.grid, config.query_dim, index, x.shape[1], prefix_scale=0.0)
            q, k = rotate(q, table), rotate(k, table)
        if cache is None:
            out = jax.nn.dot_product_attention(
                q, k, v, is_causal=True, implementation=_softmax_implementation(q)
            )
            out = keep(out)
        else:
            update = jax.lax.dynamic_update_slice_in_dim
            k = update(cache.k, k, index, axis=1)
            v = update(cache.v, v, index, axis=1)
            cache = SoftmaxCache(k, v, index + x.shape[1])
            seen = index + jnp.arange(x.shape[1])[:, None] >= jnp.arange(k.shape[1])
            out = jax.nn.dot_product_attention(q, k, v, mask=seen[None, None])
        return keep(product(out, kernels["out"], 2)), cache


def _softmax_implementation(q: Array) -> str | None:
    """cuDNN's flash attention where it applies: the baseline gets the best there is."""
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return "cudnn" if half and jax.default_backend() == "gpu" else None


def init_softmax_cache(config: ModelConfig, batch: int) -> SoftmaxCache:
    """The cache before any token, with room for a whole image."""
    room = (batch, NUM_PREFIX + config.num_tokens, config.num_heads, config.value_dim)
    empty = jnp.zeros(room, config.compute_dtype)
    return SoftmaxCache(empty, empty, jnp.zeros((), jnp.int32))


def _out_shape(config: ModelConfig) -> tuple[int, int, int]:
    return config.num_heads, config.value_dim, config.width


MIXERS = {"lasad": LASADMixer, "softmax": SoftmaxMixer}
INIT_CACHES = {"lasad": init_lasad_cache, "softmax": init_softmax_cache}
