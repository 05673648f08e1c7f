"""Cross-entropy of the output head, a part of the tokens at a time.

Logits of a whole batch are its largest array by far: 16384 numbers for every token. They are
made for some tokens, turned into their gradient at once, and forgotten; float32 logits exist
only inside the kernels that reduce them.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Logits that exist at a time: half a gigabyte in bfloat16.
_MAX_LOGITS = 2**28


def _parts(num_images: int, num_tokens: int, vocab_size: int) -> list[slice]:
    """Slices of the token axis: no image is moved to another device, as of the batch axis."""
    count = min(num_tokens, math.ceil(num_images * num_tokens * vocab_size / _MAX_LOGITS))
    size = math.ceil(num_tokens / count)
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def token_losses(
    x: Float[Array, "B N D"], kernel: Float[Array, "D V"], tokens: Int[Array, "B N"]
) -> Float[Array, "B N"]:
    """Cross-entropy of every token, in nats (float32).

    Args:
      x: what the head reads, in the dtype of its product.
      kernel: of the head; cast to the dtype of x.
      tokens: the codes to be predicted.
    """
    parts = _parts(*tokens.shape, kernel.shape[-1])
    losses = [_losses(x[:, part], kernel.astype(x.dtype), tokens[:, part])[0] for part in parts]
    return jnp.concatenate(losses, axis=1)


@jax.custom_vjp
def mean_loss(
    x: Float[Array, "B N D"], kernel: Float[Array, "D V"], tokens: Int[Array, "B N"]
) -> Float[Array, ""]:
    """Mean of `token_losses`. Its gradient is computed together with it."""
    return token_losses(x, kernel, tokens).mean()


def _mean_loss_forward(x, kernel, tokens):
    weights = kernel.astype(x.dtype)
    total, d_x, d_kernel = 0.0, [], jnp.zeros(kernel.shape, jnp.float32)
    for part in _parts(*tokens.shape, kernel.shape[-1]):
        rows = x[:, part]
        losses, d_logits = _losses(rows, weights, tokens[:, part])
        total += losses.sum()
        d_logits = d_logits.astype(x.dtype).reshape(-1, kernel.shape[-1])
        d_x.append((d_logits @ weights.T).reshape(rows.shape))
        d_kernel += jnp.matmul(
            rows.reshape(-1, x.shape[-1]).T, d_logits, preferred_element_type=jnp.float32
        )
    # The division waits for the gradient's consumer: in float16 it would underflow here.
    return total / tokens.size, (jnp.concatenate(d_x, axis=1), d_kernel, kernel, tokens)


def _mean_loss_backward(residuals, gradient):
    d_x, d_kernel, kernel, tokens = residuals
    scale = gradient / tokens.size
    d_x = (d_x.astype(jnp.float32) * scale).astype(d_x.dtype)
    return d_x, (d_kernel * scale).astype(kernel.dtype), None


mean_loss.defvjp(_mean_loss_forward, _mean_loss_backward)


def _losses(
    x: Float[Array, "B n D"], weights: Float[Array, "D V"], tokens: Int[Array, "B n"]
) -> tuple[Float[Array, "B n"], Float[Array, "B n V"]]:
    """Losses of some tokens and their gradients with respect to the logits, in float32."""
    logits = x.reshape(-1, x.shape[-1]) @ weights
    logits = logits.reshape(*tokens.shape, -1).astype(jnp.float32)
    right = tokens[..., None] == jnp.arange(logits.shape[-1])
    log_sum = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    losses = log_sum[..., 0] - jnp.sum(jnp.where(right, logits, 0.0), axis=-1)
    return losses, jnp.exp(logits - log_sum) - right
