"""From a mixer's joint projection to its output projection, heads in one kernel each way.

    q, k, v, out_gate, gate = split(y)      as in `split_heads`
    o = linear_attention(q, k, v)           of a decay that is a single recurrence
    (o / sqrt(mean(o^2) + epsilon) * silu(out_gate)) @ kernel       as in `gated_products`

The three passes one after another write queries, keys, values and all their gradients to memory
and read them again.
"""

import functools
import importlib
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, BFloat16, Float, Float32

from lasad_jax.ops.decays import Decay, Grid
from lasad_jax.ops.keep import keep
from lasad_jax.ops.kernels.choice import Axes
from lasad_jax.ops.product import d_factor, d_kernel, product

# Tokens of a chunk, and of the chunks whose decays the kernels take at once.
_CHUNK, _GROUP = 64, 256
_MOST_HEADS = 8  # whose columns lie together
# Columns that the content gate's one is filled up to: rows of 16 bytes, as tensor cores read.
GATE_COLUMNS = 8


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
        v 64 | out_gate 64] and, with a bias, [content gate 1 | padding 7], which are then joined in
        groups of `group_size(heads of a device)`.
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
        table = keep(jnp.pad(table, [(0, -num_tokens % _CHUNK), (0, 0)]))
    ways = _on_mesh(kernels(q_scale=float(q_scale), epsilon=epsilon), batch_axes, head_axes)
    steps = keep(_in_chunks(steps, y.shape[2]))
    return keep(fused(y, kernel, steps, bias, table, *ways))


def group_size(heads: int) -> int:
    """How many of a device's heads lie together in a joint projection (`join`)."""
    return math.gcd(heads, _MOST_HEADS)


def join(
    own: Float[Array, "*lead H W"], gates: Float[Array, "*lead H 8"], size: int = 1
) -> Float[Array, "*lead H W+8"]:
    """The columns of a joint projection, or of its kernel, in groups of `size` heads.

    In a group those of `own` come first, one head after the other, and then the content gates with
    their padding. Memory is read in lines of 128 bytes: heads of 384 bytes begin at lines, those of
    400 anywhere.
    """
    *lead, heads, _ = own.shape
    own, gates = (x.reshape(*lead, heads // size, -1) for x in (own, gates))
    room = lambda before, after: [(0, 0)] * (own.ndim - 1) + [(before, after)]
    # A sum, since XLA joins the kernels of all layers in one pass then, and those of a
    # concatenation of so few parts one by one.
    joined = jnp.pad(own, room(0, gates.shape[-1])) + jnp.pad(gates, room(own.shape[-1], 0))
    return joined.reshape(*lead, heads, -1)


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
    (h,) = forward(y, steps, bias, table, keep_states=False)
    return product(h, kernel, 2)


def _fused_forward(y, kernel, steps, bias, table, forward, backward):
    h, *rest = forward(y, steps, bias, table, keep_states=True)
    return product(h, kernel, 2), (y, kernel, steps, bias, table, keep(rest))


def _fused_backward(forward, backward, residuals, d_out):
    y, kernel, steps, bias, table, rest = residuals
    d_y, h, d_steps = backward(y, steps, bias, table, *rest, d_factor(d_out, kernel))
    d_steps, *d_bias = jnp.moveaxis(jnp.sum(d_steps, axis=0), 1, 0)
    d_bias = jnp.sum(d_bias[0], axis=(1, 2)) if d_bias else None
    return d_y, d_kernel(h, d_out), d_steps, d_bias, None


fused.defvjp(_fused_forward, _fused_backward)


def _in_chunks(steps, heads: int) -> Float32[Array, "H M 64"]:
    """Of each head, with zeros after the last token to fill groups of chunks."""
    steps = jnp.broadcast_to(steps.T, (heads, steps.shape[0]))
    return jnp.pad(steps, [(0, 0), (0, -steps.shape[1] % _GROUP)]).reshape(heads, -1, _CHUNK)


def _on_mesh(ways, batch_axes: Axes, head_axes: Axes):
    """Kernels that see their device's own images and heads: nothing is sent."""
    if jax.sharding.get_abstract_mesh().empty:
        return ways
    forward, backward = ways
    tokens, all_ = PartitionSpec(batch_axes, None, head_axes), PartitionSpec()
    states, of_head = PartitionSpec(batch_axes, head_axes), PartitionSpec(head_axes)
    ins = (tokens, of_head, of_head, all_)
    split = functools.partial(jax.shard_map, check_vma=False)

    def split_forward(*args, keep_states):
        out = (tokens, tokens, states) if keep_states else (tokens,)
        run = functools.partial(forward, keep_states=keep_states)
        return split(run, in_specs=ins, out_specs=out)(*args)

    out = (tokens, tokens, states)
    return split_forward, split(backward, in_specs=(*ins, tokens, states, tokens), out_specs=out)


def _check(y, kernel, steps, gated: bool):
    if kernel.shape[:2] != (y.shape[2], 64) or kernel.dtype != y.dtype:
        raise ValueError(
            f"kernel: expected {y.dtype} of shape {(y.shape[2], 64, 'D')}, "
            f"got {kernel.dtype}{kernel.shape}"
        )
    width = 192 + GATE_COLUMNS * gated
    if y.shape[3] != width or y.dtype != jnp.bfloat16 or y.shape[1] % 8:
        raise ValueError(
            f"y: expected bfloat16 (B, N, H, {width}), N a multiple of 8, got {y.dtype}{y.shape}"
        )
    if steps.shape not in (y.shape[1:3], (y.shape[1], 1)):
        raise ValueError(f"steps: expected {y.shape[1:3]}, tokens and heads; got {steps.shape}")
