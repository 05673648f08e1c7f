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
from jaxtyping import Array, Float, Float32

from lasad_jax.ops.decays import Decay, Grid
from lasad_jax.ops.keep import keep
from lasad_jax.ops.product import product

_CHUNK = 64
Axes = str | tuple[str, ...] | None


def mixed_heads_product(
    y: Float[Array, "B N H W"],
    kernel: Float[Array, "H Dv D"],
    steps: Float32[Array, "N one_or_H"],
    bias: Float32[Array, " H"] | None,
    table: Float32[Array, "N pairs 2"] | None,
    *,
    key_dim: int,
    q_scale: float,
    epsilon: float,
    batch_axes: Axes = None,
    head_axes: Axes = None,
) -> Float[Array, "B N D"]:
    """What LASAD's heads make of their joint projection, multiplied with the output's kernel.

    Runs as Triton kernels, for NVIDIA GPUs.

    Args:
      y: joint projection, bf16 or float32, of one prefix token and the grid's. A head's columns are
        [q | k | v | out_gate] and, with a bias, one of the content gate and padding, together a
        power of two.
      kernel: in y's dtype.
      steps: log-decays of the grid (`log_factors`).
      bias: of the content gate, which adds -softplus(its column + bias) to all other steps.
      table: cosine and sine by which pairs turn; None leaves them. No gradient reaches it.
      key_dim: Dk; it and Dv are powers of two of at least 16.
      q_scale: factor of the queries.
      epsilon: of the norm of each head.
      batch_axes, head_axes: axes of the current mesh, if there is one, over which images and
        heads are split.

    Raises:
      ValueError: if shapes do not fit.
    """
    _check(y, kernel, steps, key_dim, bias is not None)
    num_tokens = y.shape[1]
    num_chunks = -(-num_tokens // _CHUNK)
    steps = jnp.broadcast_to(steps, y.shape[1:3]).T
    steps = jnp.pad(steps, [(0, 0), (0, num_chunks * _CHUNK - num_tokens)])
    steps = keep(steps.reshape(-1, num_chunks, _CHUNK))
    if table is not None:
        table = table.reshape(num_tokens, -1)
    options = {"key_dim": key_dim, "value_dim": kernel.shape[1], "q_scale": float(q_scale)}
    options |= {"epsilon": epsilon}
    ways = kernels(**options)
    forward, backward = _on_mesh(ways, batch_axes, head_axes)
    return keep(fused(y, kernel, steps, bias, table, forward, backward))


def log_factors(decay: Decay, num_tokens: int, grid: Grid) -> Float32[Array, "N one_or_H"]:
    """What a decay that is a single recurrence gives `mixed_heads_product` as steps."""
    place = jnp.arange(num_tokens) - 1
    # A step leads from one grid token to the next: none to the first, none to the prefix.
    return jnp.where((place > 0)[:, None], decay.step_log_factor(place, grid), 0.0)


def kernels(**options) -> tuple[Callable, Callable]:
    """The forward and backward kernel."""
    # Imported when first used: it needs a part of Pallas that not every installation has.
    module = importlib.import_module("lasad_jax.ops.kernels.mixed_heads_triton")
    return tuple(functools.partial(way, **options) for way in (module.forward, module.backward))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def fused(y, kernel, steps, bias, table, forward: Callable, backward: Callable):
    """h @ kernel with h from `forward`; the contracts are in `mixed_heads_triton`."""
    (h,) = forward(y, steps, bias, table, keep_states=False)
    return product(h, kernel, 2)


def _fused_forward(y, kernel, steps, bias, table, forward, backward):
    h, *states = forward(y, steps, bias, table, keep_states=True)
    return product(h, kernel, 2), (y, kernel, steps, bias, table, keep(states))


def _fused_backward(forward, backward, residuals, d_out):
    y, kernel, *decays, states = residuals
    matrix, d_out = kernel.reshape(-1, kernel.shape[-1]), d_out.reshape(-1, d_out.shape[-1])
    d_h = jax.lax.dot_general(d_out, matrix, (((1,), (1,)), ((), ())))
    d_h = d_h.reshape(*y.shape[:3], -1)
    d_y, h, d_g, *d_gate = backward(y, *decays, *states, d_h)
    d_kernel = jax.lax.dot_general(
        h.reshape(-1, matrix.shape[0]), d_out, (((0,), (0,)), ((), ()))
    ).reshape(kernel.shape)
    d_bias = jnp.sum(d_gate[0], axis=(0, 2, 3)) if d_gate else None
    return d_y, d_kernel, jnp.sum(d_g, axis=0), d_bias, None


fused.defvjp(_fused_forward, _fused_backward)


def _on_mesh(ways, batch_axes: Axes, head_axes: Axes):
    """Kernels that see their device's own images and heads: nothing is sent."""
    if jax.sharding.get_abstract_mesh().empty:
        return ways
    forward, backward = ways
    tokens, heads = PartitionSpec(batch_axes, None, head_axes), PartitionSpec(head_axes)
    states, decays = PartitionSpec(batch_axes, head_axes), (heads, heads, PartitionSpec())
    split = functools.partial(jax.shard_map, check_vma=False)

    def split_forward(*args, keep_states):
        out = (tokens, tokens, states) if keep_states else (tokens,)
        run = functools.partial(forward, keep_states=keep_states)
        return split(run, in_specs=(tokens, *decays), out_specs=out)(*args)

    def split_backward(y, steps, bias, *args):
        out = (tokens, tokens, states) if bias is None else (tokens, tokens, states, states)
        ins = (tokens, *decays, tokens, states, tokens)
        return split(backward, in_specs=ins, out_specs=out)(y, steps, bias, *args)

    return split_forward, split_backward


def _check(y, kernel, steps, key_dim: int, gated: bool):
    if kernel.shape[0] != y.shape[2] or kernel.dtype != y.dtype:
        raise ValueError(
            f"kernel: expected {y.dtype} of shape {(y.shape[2], 'Dv', 'D')}, "
            f"got {kernel.dtype}{kernel.shape}"
        )
    for name, size in (("key_dim", key_dim), ("value_dim", kernel.shape[1])):
        if size < 16 or size & (size - 1):
            raise ValueError(f"{name}: expected a power of two of at least 16, got {size}")
    rest = y.shape[3] - 2 * (key_dim + kernel.shape[1])
    if not (rest > 0 and rest & (rest - 1) == 0 if gated else rest == 0):
        raise ValueError(
            f"y: expected (B, N, H, W), W twice key_dim + value_dim and, with a content gate, a "
            f"power of two more; got {y.shape}"
        )
    if steps.shape not in (y.shape[1:3], (y.shape[1], 1)):
        raise ValueError(f"steps: expected {y.shape[1:3]}, tokens and heads; got {steps.shape}")
