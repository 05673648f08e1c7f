"""PatchGAN: tells real patches of an image from reconstructed ones (pix2pix, arXiv 1611.07004)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from lasad_jax.config.sections import LossConfig

NORM_EPSILON = 1e-5
_SLOPE = 0.2
_MAX_WIDENING = 8
_normal_init = nn.initializers.normal(0.02)


class PatchDiscriminator(nn.Module):
    """A logit for every patch: positive for real, negative for made.

    4x4 convolutions with padding 1 and leaky ReLU between them: `layers` of stride 2 and
    two of stride 1. Images of h x w give (h // 2^layers - 2) x (w // 2^layers - 2) logits.

    Attributes:
      width: channels of the first layer; each further one has twice as many, up to 8 times.
      layers: convolutions of stride 2.
      dtype: of the convolutions; norms are computed and logits returned in float32.
    """

    width: int = 64
    layers: int = 3
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B h w channels"]) -> Float[Array, "B r c"]:
        x = self._conv(0, self.width, stride=2, use_bias=True)(images)
        x = nn.leaky_relu(x, _SLOPE)
        for layer in range(1, self.layers + 1):
            features = self.width * min(2**layer, _MAX_WIDENING)
            stride = 2 if layer < self.layers else 1
            # The norm would take a bias away again.
            x = self._conv(layer, features, stride, use_bias=False)(x)
            x = nn.leaky_relu(BatchNorm(name=f"norm_{layer}")(x), _SLOPE)
        logits = self._conv(self.layers + 1, 1, stride=1, use_bias=True)(x)
        return logits[..., 0].astype(jnp.float32)

    def _conv(self, index: int, features: int, stride: int, use_bias: bool) -> nn.Conv:
        return nn.Conv(
            features,
            (4, 4),
            stride,
            padding=1,
            use_bias=use_bias,
            dtype=self.dtype,
            # float32 stays float32, where a GPU would take TF32.
            precision=jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None,
            kernel_init=_normal_init,
            name=f"conv_{index}",
        )


class BatchNorm(nn.Module):
    """Each channel at mean 0 and variance 1 over the batch, then scaled and shifted.

    In float32 and always with the batch's own statistics: a discriminator is used in
    training only, so that a running average would never be read. Under jit the batch is the
    global one, whatever devices it is split over.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "B R C D"]) -> Float[Array, "B R C D"]:
        init = lambda key, shape: 1 + _normal_init(key, shape)
        scale = self.param("scale", init, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        x = x.astype(jnp.float32)
        x -= jnp.mean(x, axis=(0, 1, 2))
        variance = jnp.mean(jnp.square(x), axis=(0, 1, 2))
        return x * (jax.lax.rsqrt(variance + NORM_EPSILON) * scale) + bias


def check_discriminator(config: LossConfig, image_size: tuple[int, int]) -> None:
    """Refuses images (rows, columns) too small to leave one patch.

    Raises:
      ValueError: names losses.discriminator_layers and what to do.
    """
    smallest = min(image_size)
    if smallest >= _smallest_side(config.discriminator_layers):
        return
    fitting = [n for n in range(1, config.discriminator_layers) if smallest >= _smallest_side(n)]
    remedy = f"set it to at most {fitting[-1]}" if fitting else "set losses.adversarial_weight=0"
    raise ValueError(
        f"losses.discriminator_layers: {config.discriminator_layers} needs images of at least "
        f"{_smallest_side(config.discriminator_layers)} pixels a side, but these are "
        f"{image_size[0]} x {image_size[1]}; {remedy}"
    )


def _smallest_side(layers: int) -> int:
    # Each stride-2 convolution halves a side and rounds down; the two others take one each.
    return 3 * 2**layers
