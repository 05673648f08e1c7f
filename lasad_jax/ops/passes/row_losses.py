"""Cross-entropy of rows of logits together with its gradient, plain and with a fused kernel."""

import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lasad_jax.ops.kernels import choice
from lasad_jax.ops.numerics import wide


def row_losses(
    logits: Float[Array, "*rows V"],
    tokens: Int[Array, "*rows"],
    *,
    with_gradient: bool = True,
    implementation: str = "auto",
    batch_axes: str | tuple[str, ...] | None = None,
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows V"] | None]:
    """logsumexp(logits) - logits[token] of every row, and softmax(logits) - one_hot(token).

    Computed in float32, or wider as the logits are. The gradient is a result: neither has
    another by JAX's differentiation.

    Args:
      logits: rows of any leading axes.
      tokens: the code of each row; of one that is none, the loss is the logsumexp alone.
      with_gradient: otherwise the gradient is None and its time saved.
      implementation: "plain", "triton" (for NVIDIA GPUs), or "auto": the latter where it can run.
      batch_axes: axes of the current mesh, if there is one, over which the first axis is split.

    Returns:
      losses in float32 or wider; the gradient in the logits' dtype, where the kernel runs in
      their memory if nothing else reads them.

    Raises:
      ValueError: if shapes or options do not fit, or "triton" cannot run.
    """
    _check(logits, tokens)
    if not choice.prefers_triton(logits, implementation):
        return _plain(logits, tokens, with_gradient)
    run = functools.partial(_flat, kernel(with_gradient=with_gradient))
    if not jax.sharding.get_abstract_mesh().empty:
        # Rows are flattened within, so that those of one device stay there.
        split = PartitionSpec(batch_axes)
        run = jax.shard_map(run, in_specs=(split, split), out_specs=split, check_vma=False)
    return run(logits, tokens)


def kernel(**options) -> Callable:
    """The kernel, whose contract is in `row_losses_triton`."""
    # Imported when first used: it needs a part of Pallas that not every installation has.
    module = importlib.import_module("lasad_jax.ops.kernels.row_losses_triton")
    return functools.partial(module.row_losses, **options)


def _flat(kernel, logits, tokens):
    losses, d_logits = kernel(logits.reshape(-1, logits.shape[-1]), tokens.reshape(-1))
    d_logits = None if d_logits is None else d_logits.reshape(logits.shape)
    return losses.reshape(tokens.shape), d_logits


def _plain(logits, tokens, with_gradient):
    """The same with XLA's own operations."""
    x = wide(logits)
    # Of the distance to the largest one, which may be far from 0, float32 keeps enough digits.
    largest = jnp.max(x, axis=-1, keepdims=True)
    powers = jnp.exp(x - largest)
    total = jnp.sum(powers, axis=-1, keepdims=True)
    right = tokens[..., None] == jnp.arange(x.shape[-1])
    chosen = jnp.sum(jnp.where(right, x, 0.0), axis=-1)
    losses = jnp.log(total[..., 0]) + (largest[..., 0] - chosen)
    d_logits = (powers / total - right).astype(logits.dtype) if with_gradient else None
    return losses, d_logits


def _check(logits, tokens):
    if tokens.ndim < 1 or tokens.shape != logits.shape[:-1]:
        raise ValueError(
            f"tokens: expected one for each row of logits {logits.shape}, so "
            f"{logits.shape[:-1]}; got {tokens.shape}"
        )
