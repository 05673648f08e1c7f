"""From a mixer's joint projection to its output projection, heads in one kernel each way.

    q, k, v, out_gate, gate = split(y)      as in `split_heads`
    o = linear_attention(q, k, v)           of a decay that is a single recurrence
    (o / sqrt(mean(o^2) + epsilon) * silu(out_gate)) @ kernel       as in `gated_products`

The three passes one after another write queries, keys, values and all their gradients to memory
and read them again.
"""

import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, BFloat16, Float32

from lasad_jax.ops.decays import Decay, Grid
from lasad_jax.ops.keep import keep
from lasad_jax.ops.numerics import running_sum
from lasad_jax.ops.product import product

_CHUNK = 64
# In bf16 what is left after a factor of exp(-32) counts for nothing; a bound keeps sums exact.
_RESET = -32.0
Axes = str | tuple[str, ...] | None


def mixed_heads_product(
    y: BFloat16[Array, "B N H W"],
    kernel: BFloat16[Array, "H Dv D"],
    steps: Float32[Array, "N one_or_H"],
    bias: Float32[Array, " H"] | None,
    table: Float32[Array, "N pairs 2"] | None,
    *,
    q_scale: float,
    epsilon: float,
    batch_axes: Axes = None,
    head_axes: Axes = None,
) -> BFloat16[Array, "B N D"]:
    """What LASAD's heads make of their joint projection, multiplied with the output's kernel.

    Runs as Mosaic GPU kernels, for Hopper GPUs: `choice.mixes_heads` says when they can.

    Args:
      y: joint projection of one prefix token and the grid's. A head's columns are [q 32 | k 32 |
        v 64 | out_gate 64] and, with a bias, [content gate 1 | padding 7].
      kernel: of the output, Dv = 64.
      steps: log-decays of the grid (`log_factors`).
      bias: of the content gate, which adds -softplus(its column + bias) to all other steps.
      table: cosine and sine by which pairs turn; None leaves them. No gradient reaches it.
      q_scale: factor of the queries.
      epsilon: of the norm of each head.
      batch_axes, head_axes: axes of the current mesh, if there is one, over which images and
        heads are split.

    Raises:
      ValueError: if shapes do not fit.
    """
    _check(y, kernel, steps, bias is not None)
    num_tokens = y.shape[1]
    if table is not None:
        table = table.reshape(num_tokens, -1)
        table = jnp.pad(table, [(0, -num_tokens % _CHUNK), (0, 0)])
    ways = _on_mesh(kernels(q_scale=float(q_scale), epsilon=epsilon), batch_axes, head_axes)
    return keep(fused(y, kernel, steps, bias, table, *ways))


def log_factors(decay: Decay, num_tokens: int, grid: Grid) -> Float32[Array, "N one_or_H"]:
    """What a decay that is a single recurrence gives `mixed_heads_product` as steps."""
    place = jnp.arange(num_tokens) - 1
    # A step leads from one grid token to the next: none to the first, none to the prefix.
    return jnp.where((place > 0)[:, None], decay.step_log_factor(place, grid), 0.0)


def kernels(**options) -> tuple[Callable, Callable]:
    """The forward and backward kernel."""
    # Imported when first used: it needs a part of Pallas that not every installation has.
    module = importlib.import_module("lasad_jax.ops.kernels.mixed_heads_mosaic")
    return tuple(functools.partial(way, **options) for way in (module.forward, module.backward))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def fused(y, kernel, steps, bias, table, forward: Callable, backward: Callable):
    """h @ kernel with h from `forward`; the contracts are in `mixed_heads_mosaic`."""
    (h,) = forward(y, _running_sums(y, steps, bias), table, keep_states=False)
    return product(h, kernel, 2)


def _fused_forward(y, kernel, steps, bias, table, forward, backward):
    b = keep(_running_sums(y, steps, bias))
    h, *rest = forward(y, b, table, keep_states=True)
    return product(h, kernel, 2), (y, kernel, steps, bias, table, b, keep(rest))


def _fused_backward(forward, backward, residuals, d_out):
    y, kernel, steps, bias, table, b, rest = residuals
    matrix, d_out = kernel.reshape(-1, kernel.shape[-1]), d_out.reshape(-1, d_out.shape[-1])
    d_h = jax.lax.dot_general(d_out, matrix, (((1,), (1,)), ((), ())))
    d_y, h, d_g = backward(y, b, table, *rest, d_h.reshape(*y.shape[:3], -1))
    d_kernel = jax.lax.dot_general(
        h.reshape(-1, matrix.shape[0]), d_out, (((0,), (0,)), ((), ()))
    ).reshape(kernel.shape)
    raw, start = _content_gate(y, bias)
    _, pullback = jax.vjp(_log_decays, raw, steps, bias)
    d_raw, d_steps, d_bias = pullback(d_g)
    if raw is not None:
        rest = jnp.pad(d_raw[..., None], [(0, 0)] * 3 + [(0, y.shape[3] - start - 1)])
        d_y = jax.lax.dynamic_update_slice_in_dim(d_y, rest.astype(d_y.dtype), start, axis=3)
    return d_y, d_kernel, d_steps, d_bias, None


fused.defvjp(_fused_forward, _fused_backward)


def _running_sums(y, steps, bias) -> Float32[Array, "one_or_B H M 64"]:
    """Of log-decays, within each chunk."""
    raw, _ = _content_gate(y, bias)
    return running_sum(jnp.maximum(_log_decays(raw, steps, bias), _RESET))


def _content_gate(y, bias):
    """Its column and where that stands."""
    start = y.shape[3] - 8
    return (None, start) if bias is None else (y[..., start].astype(jnp.float32), start)


def _log_decays(raw, steps, bias) -> Float32[Array, "one_or_B H M 64"]:
    """Of each token, in chunks."""
    if raw is None:
        g = jnp.broadcast_to(steps, steps.shape)[None]
    else:
        on_grid = jnp.arange(steps.shape[0])[:, None] > 0
        g = steps - jnp.where(on_grid, jax.nn.softplus(raw + bias), 0.0)
    g = jnp.pad(g, [(0, 0), (0, -g.shape[1] % _CHUNK), (0, 0)])
    return jnp.moveaxis(g, 2, 1).reshape(g.shape[0], g.shape[2], -1, _CHUNK)


def _on_mesh(ways, batch_axes: Axes, head_axes: Axes):
    """Kernels that see their device's own images and heads: nothing is sent."""
    if jax.sharding.get_abstract_mesh().empty:
        return ways
    forward, backward = ways
    tokens, all_ = PartitionSpec(batch_axes, None, head_axes), PartitionSpec()
    states, shared = PartitionSpec(batch_axes, head_axes), PartitionSpec(None, head_axes)
    split = functools.partial(jax.shard_map, check_vma=False)
    of = lambda b: shared if b.shape[0] == 1 else states

    def split_forward(y, b, *args, keep_states):
        out = (tokens, tokens, states) if keep_states else (tokens,)
        run = functools.partial(forward, keep_states=keep_states)
        return split(run, in_specs=(tokens, of(b), all_), out_specs=out)(y, b, *args)

    def split_backward(y, b, *args):
        ins = (tokens, of(b), all_, tokens, states, tokens)

        def run(*args):
            d_y, h, d_g = backward(*args)
            return d_y, h, d_g if b.shape[0] > 1 else jax.lax.psum(d_g, batch_axes or ())

        return split(run, in_specs=ins, out_specs=(tokens, tokens, of(b)))(y, b, *args)

    return split_forward, split_backward


def _check(y, kernel, steps, gated: bool):
    if kernel.shape[:2] != (y.shape[2], 64) or kernel.dtype != y.dtype:
        raise ValueError(
            f"kernel: expected {y.dtype} of shape {(y.shape[2], 64, 'D')}, "
            f"got {kernel.dtype}{kernel.shape}"
        )
    width = 200 if gated else 192
    if y.shape[3] != width or y.dtype != jnp.bfloat16 or y.shape[1] % 8:
        raise ValueError(
            f"y: expected bfloat16 (B, N, H, {width}), N a multiple of 8, got {y.dtype}{y.shape}"
        )
    if steps.shape not in (y.shape[1:3], (y.shape[1], 1)):
        raise ValueError(f"steps: expected {y.shape[1:3]}, tokens and heads; got {steps.shape}")
