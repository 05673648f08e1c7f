"""Cross-entropy of the output head, a part of the tokens at a time.

Logits of a whole batch are its largest array by far: 16384 numbers for every token. They are
made for some tokens, turned into their gradient at once, and forgotten; float32 logits exist
only inside the kernels that reduce them.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lasad_jax.models.exchange import sums_are_ours
from lasad_jax.models.operator import mesh_axes, num_devices
from lasad_jax.ops.numerics import accumulator
from lasad_jax.ops.passes.row_losses import row_losses

# Logits that exist on a device at a time: a quarter of a gigabyte in bfloat16.
MAX_LOGITS = 2**27


def token_losses(
    x: Float[Array, "B N D"], kernel: Float[Array, "D V"], tokens: Int[Array, "B N"]
) -> Float[Array, "B N"]:
    """Cross-entropy of every token, in nats (float32), for evaluation: `mean_loss` has a gradient.

    Args:
      x: what the head reads, in the dtype of its product.
      kernel: of the head; cast to the dtype of x.
      tokens: the codes to be predicted.
    """
    weights = kernel.astype(x.dtype)
    parts = _parts(*tokens.shape, kernel.shape[-1])
    losses = [_losses(x[:, part], weights, tokens[:, part], False)[0] for part in parts]
    return jnp.concatenate(losses, axis=1)


@jax.custom_vjp
def mean_loss(
    x: Float[Array, "B N D"], kernel: Float[Array, "D V"], tokens: Int[Array, "B N"]
) -> Float[Array, ""]:
    """Mean of `token_losses`. Its gradient is computed together with it."""
    return token_losses(x, kernel, tokens).mean()


def _mean_loss_forward(x, kernel, tokens):
    weights = kernel.astype(x.dtype)
    total, d_x, d_kernel = 0.0, [], 0.0
    for part in _parts(*tokens.shape, kernel.shape[-1]):
        losses, d_logits = _losses(x[:, part], weights, tokens[:, part], True)
        total += losses.sum()
        d_x.append((_matrix(d_logits) @ weights.T).reshape(*losses.shape, -1))
        d_kernel += _own_products(x[:, part], d_logits)
    # The division waits for the gradient's consumer: in float16 it would underflow here.
    return total / tokens.size, (jnp.concatenate(d_x, axis=1), d_kernel, kernel, tokens)


def _mean_loss_backward(residuals, gradient):
    d_x, d_kernel, kernel, tokens = residuals
    scale = gradient / tokens.size
    d_x = (d_x.astype(d_kernel.dtype) * scale).astype(d_x.dtype)
    return d_x, _added_up((d_kernel * scale).astype(kernel.dtype), tokens.shape[0]), None


mean_loss.defvjp(_mean_loss_forward, _mean_loss_backward)


# The kernel's gradient, as those of a model's other matrices, is summed up in float32 on each
# device and rounded to the kernel's dtype before it is sent (`sums_are_ours`).


def _own_products(
    x: Float[Array, "B n D"], d_logits: Float[Array, "B n V"]
) -> Float[Array, "*devices D V"]:
    """x^T d_logits; where sums are ours, over the images of each device by itself."""

    def product(x, d_logits):
        acc = accumulator(x.dtype)
        return jnp.matmul(_matrix(x).T, _matrix(d_logits), preferred_element_type=acc)

    split = _spec(len(x), d_logits.shape[-1])
    if not sums_are_ours(split[0]):
        return product(x, d_logits)
    own_product = jax.shard_map(
        lambda *factors: product(*factors)[None],
        in_specs=(PartitionSpec(split[0]), split),
        out_specs=split,
        check_vma=False,
    )
    return own_product(x, d_logits)


def _added_up(own: Float[Array, "*devices D V"], num_images: int) -> Float[Array, "D V"]:
    """The sum of what each device has, in its dtype."""
    split = _spec(num_images, own.shape[-1])
    images, _, codes = split
    if not sums_are_ours(images):
        return own
    add_up = jax.shard_map(
        lambda own: jax.lax.psum(own[0], images),
        in_specs=split,
        out_specs=PartitionSpec(None, codes),
        check_vma=False,
    )
    return add_up(own)


def _parts(num_images: int, num_tokens: int, vocab_size: int) -> list[slice]:
    """Slices of the token axis: no image is moved to another device, as of the batch axis."""
    devices = num_devices("batch", num_images) * num_devices("vocab", vocab_size)
    count = math.ceil(num_images * num_tokens * vocab_size / (devices * MAX_LOGITS))
    size = math.ceil(num_tokens / min(num_tokens, count))
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def _losses(
    x: Float[Array, "B n D"],
    weights: Float[Array, "D V"],
    tokens: Int[Array, "B n"],
    with_gradient: bool,
) -> tuple[Float[Array, "B n"], Float[Array, "B n V"] | None]:
    """Losses of some tokens and their gradients with respect to the logits."""
    logits = _split((_matrix(x) @ weights).reshape(*tokens.shape, -1))
    # The kernel takes whole rows; XLA's own operations add up over those that are split.
    split = num_devices("vocab", logits.shape[-1]) > 1
    return row_losses(
        logits,
        tokens,
        with_gradient=with_gradient,
        implementation="plain" if split else "auto",
        batch_axes=mesh_axes("batch", tokens.shape[0]),
    )


def _split(logits: Float[Array, "B n V"]) -> Float[Array, "B n V"]:
    """Rows with their images and columns with their codes: where the width is split, XLA is to
    gather the kernel, not to send logits."""
    if jax.sharding.get_abstract_mesh().empty:
        return logits
    return jax.lax.with_sharding_constraint(logits, _spec(logits.shape[0], logits.shape[2]))


def _spec(num_images: int, vocab_size: int) -> PartitionSpec:
    """Of logits (B, n, V)."""
    return PartitionSpec(mesh_axes("batch", num_images), None, mesh_axes("vocab", vocab_size))


def _matrix(x: Float[Array, "B n D"]) -> Float[Array, "M D"]:
    return x.reshape(-1, x.shape[-1])
