"""How tokens exchange information: LASAD, and the softmax attention it is measured against.

A mixer takes a sequence from its start (`cache` None or fresh) or, with a cache, the one
token that comes next; it returns its output and the cache after it.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int

from lasad_jax import ops
from lasad_jax.models.config import ModelConfig
from lasad_jax.models.layers import Linear, RMSNorm
from lasad_jax.models.local_conv import NUM_PREFIX, LocalConv
from lasad_jax.models.operator import linear_attention
from lasad_jax.models.rope import rotate

_HEADS = ("embed", "heads", "head_dim")
FAMILIES = {
    "none": ops.NoDecay,
    "sequence": ops.SequenceDecay,
    "raster": ops.RasterDecay,
    "manhattan": ops.ManhattanDecay,
}
# softplus(-5) is a half-life of about 100 steps: the gate starts nearly open.
_GATE_BIAS = -5.0


@struct.dataclass
class LASADCache:
    """The operator's state and, with `local_conv`, the newest inputs of the convolution."""

    state: ops.State
    recent: Float[Array, "*layers B W D"] | None


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


class LASADMixer(nn.Module):
    """Gated linear attention with a decay over true grid positions."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], cache: LASADCache | None = None
    ) -> tuple[Float[Array, "B N D"], LASADCache | None]:
        config, num_heads = self.config, self.config.num_heads
        one_step = cache is not None and x.shape[1] == 1
        index = cache.state.index if one_step else 0
        recent = cache.recent if cache is not None else None
        if config.local_conv:
            x, recent = LocalConv(config, name="conv")(x, recent, index)

        keys, values = (num_heads, config.query_dim), (num_heads, config.value_dim)
        q = nn.silu(Linear(config, keys, _HEADS, name="q")(x))
        k = nn.silu(Linear(config, keys, _HEADS, name="k")(x))
        v = Linear(config, values, _HEADS, name="v")(x)
        out_gate = nn.silu(Linear(config, values, _HEADS, name="out_gate")(x))
        if config.rope:
            q = rotate(q, config.grid, index, prefix_scale=1.0)
            k = rotate(k, config.grid, index, prefix_scale=1.0)
        q *= config.query_dim**-0.5
        log_gate = self._log_gate(x) if config.selective else None

        decay, state = self._decay(), None
        if one_step:
            gate = None if log_gate is None else log_gate[:, 0]
            out, state = ops.step(
                cache.state, q[:, 0], k[:, 0], v[:, 0], decay, grid=config.grid, log_gate=gate
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
        out = RMSNorm(config, ("heads", "head_dim"), name="norm")(out) * out_gate
        out = Linear(config, (config.width,), ("heads", "head_dim", "embed"), name="out")(out)
        return out, None if cache is None else LASADCache(state, recent)

    def _log_gate(self, x: Float[Array, "B N D"]) -> Float[Array, "B N H"]:
        gate = Linear(
            self.config,
            (self.config.num_heads,),
            ("embed", "heads"),
            use_bias=True,
            bias_init=nn.initializers.constant(_GATE_BIAS),
            name="decay_gate",
        )(x)
        return -jax.nn.softplus(gate.astype(jnp.float32))

    def _decay(self) -> ops.Decay:
        rows, columns = self.config.grid
        longest = {
            "none": {},
            "sequence": {"rate": rows * columns},
            "raster": {"row_rate": rows, "column_rate": rows * columns},
            "manhattan": {"row_rate": rows, "column_rate": columns},
        }[self.config.decay]
        rates = {
            name: jax.nn.softplus(
                self.param(name, _half_life_init(steps), (self.config.num_heads,), jnp.float32)
            )
            for name, steps in longest.items()
        }
        return FAMILIES[self.config.decay](**rates)


def init_lasad_cache(config: ModelConfig, batch: int) -> LASADCache:
    """The cache before any token."""
    state = ops.init_state(
        FAMILIES[config.decay],
        batch=batch,
        num_heads=config.num_heads,
        key_dim=config.query_dim,
        value_dim=config.value_dim,
        grid=config.grid,
        num_prefix=NUM_PREFIX,
        dtype=config.compute_dtype,
    )
    ring = (batch, config.grid[1] + 1, config.width)
    recent = jnp.zeros(ring, config.compute_dtype) if config.local_conv else None
    return LASADCache(state, recent)


class SoftmaxMixer(nn.Module):
    """Causal softmax attention with 2D rotary embedding, as in LlamaGen."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], cache: SoftmaxCache | None = None
    ) -> tuple[Float[Array, "B N D"], SoftmaxCache | None]:
        config = self.config
        heads = (config.num_heads, config.value_dim)
        q, k, v = (Linear(config, heads, _HEADS, name=name)(x) for name in ("q", "k", "v"))
        index = 0 if cache is None else cache.index
        if config.rope:
            q = rotate(q, config.grid, index, prefix_scale=0.0)
            k = rotate(k, config.grid, index, prefix_scale=0.0)
        if cache is None:
            out = jax.nn.dot_product_attention(
                q, k, v, is_causal=True, implementation=_softmax_implementation(q)
            )
        else:
            update = jax.lax.dynamic_update_slice_in_dim
            k = update(cache.k, k, index, axis=1)
            v = update(cache.v, v, index, axis=1)
            cache = SoftmaxCache(k, v, index + x.shape[1])
            seen = index + jnp.arange(x.shape[1])[:, None] >= jnp.arange(k.shape[1])
            out = jax.nn.dot_product_attention(q, k, v, mask=seen[None, None])
        out = Linear(config, (config.width,), ("heads", "head_dim", "embed"), name="out")(out)
        return out, cache


def _softmax_implementation(q: Array) -> str | None:
    """cuDNN's flash attention where it applies: the baseline gets the best there is."""
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return "cudnn" if half and jax.default_backend() == "gpu" else None


def init_softmax_cache(config: ModelConfig, batch: int) -> SoftmaxCache:
    """The cache before any token, with room for a whole image."""
    room = (batch, NUM_PREFIX + config.num_tokens, config.num_heads, config.value_dim)
    empty = jnp.zeros(room, config.compute_dtype)
    return SoftmaxCache(empty, empty, jnp.zeros((), jnp.int32))


MIXERS = {"lasad": LASADMixer, "softmax": SoftmaxMixer}
INIT_CACHES = {"lasad": init_lasad_cache, "softmax": init_softmax_cache}
