"""The image tokenizer: LlamaGen's VQGAN (arXiv 2406.06525), at any size.

Images are (B, h, w, channels) floats in [-1, 1]; h and w are multiples of the
downsampling, and the code grid (R, C) is that many times smaller.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Int32, PRNGKeyArray, PyTree

from lasad_jax.models.quantizer import VectorQuantizer, l2_normalize
from lasad_jax.models.tokenizer_config import TokenizerConfig
from lasad_jax.models.vq_blocks import (
    AttnBlock,
    Conv,
    Downsample,
    ResnetBlock,
    Upsample,
    group_norm,
)


class TokenizerOutput(NamedTuple):
    """What training a tokenizer needs, and where gradients of each part go.

    Attributes:
      images: reconstruction (B, h, w, channels), float32. To the decoder and, straight
        through the choice of codes as if it changed nothing, to the encoder; not to the
        codebook.
      z: the encoder's L2-normalised vectors (B, R, C, d), float32. To the encoder.
      quantized: the codes' normalised vectors (B, R, C, d), float32. To the codebook.
      codes: (B, R, C), int32. None.
    """

    images: Float[Array, "B h w channels"]
    z: Float[Array, "B R C d"]
    quantized: Float[Array, "B R C d"]
    codes: Int32[Array, "B R C"]


class Encoder(nn.Module):
    """From images to (B, R, C, latent_channels).

    Attributes:
      config: the tokenizer.
    """

    config: TokenizerConfig

    @nn.compact
    def __call__(self, images: Float[Array, "B h w channels"]) -> Float[Array, "B R C E"]:
        config = self.config
        lowest = len(config.multipliers) - 1
        x = Conv(config, config.width, name="conv_in")(images)
        for level, multiplier in enumerate(config.multipliers):
            name = f"conv_blocks_{level}"
            for block in range(config.encoder_blocks):
                x = ResnetBlock(config, multiplier * config.width, name=f"{name}_res_{block}")(x)
                if level == lowest:
                    x = AttnBlock(config, name=f"{name}_attn_{block}")(x)
            if level != lowest:
                x = Downsample(config, name=f"{name}_downsample")(x)
        x = _middle(config, x)
        x = nn.swish(group_norm("norm_out")(x))
        return Conv(config, config.latent_channels, name="conv_out")(x)


class Decoder(nn.Module):
    """From (B, R, C, latent_channels) to images.

    Attributes:
      config: the tokenizer.
    """

    config: TokenizerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B R C E"]) -> Float[Array, "B h w channels"]:
        config = self.config
        multipliers = config.multipliers[::-1]
        x = Conv(config, multipliers[0] * config.width, name="conv_in")(x)
        x = _middle(config, x)
        for level, multiplier in enumerate(multipliers):
            name = f"conv_blocks_{level}"
            for block in range(config.decoder_blocks):
                x = ResnetBlock(config, multiplier * config.width, name=f"{name}_res_{block}")(x)
                if level == 0:
                    x = AttnBlock(config, name=f"{name}_attn_{block}")(x)
            if level != len(multipliers) - 1:
                x = Upsample(config, name=f"{name}_upsample")(x)
        x = nn.swish(group_norm("norm_out")(x))
        return Conv(config, config.channels, name="conv_out")(x)


def _middle(config: TokenizerConfig, x: Float[Array, "B R C D"]) -> Float[Array, "B R C D"]:
    """The blocks at the lowest resolution between a network's two halves."""
    x = ResnetBlock(config, x.shape[-1], name="mid_0")(x)
    x = AttnBlock(config, name="mid_1")(x)
    return ResnetBlock(config, x.shape[-1], name="mid_2")(x)


class VQTokenizer(nn.Module):
    """Encoder, codebook and decoder.

    Attributes:
      config: its architecture.
    """

    config: TokenizerConfig

    def setup(self):
        config = self.config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(config)
        self.quant_conv = Conv(config, config.codebook_dim, size=1)
        self.post_quant_conv = Conv(config, config.latent_channels, size=1)

    def __call__(self, images: Float[Array, "B h w channels"]) -> TokenizerOutput:
        """Reconstruction and what losses need, with gradients as `TokenizerOutput` says.

        Raises:
          ValueError: as for `encode`.
        """
        encoded = self.encode(images)
        z = l2_normalize(encoded)
        codes = self.nearest(encoded)
        quantized = self.lookup(codes)
        straight_through = z + jax.lax.stop_gradient(quantized - z)
        return TokenizerOutput(self.decode(straight_through), z, quantized, codes)

    def encode(self, images: Float[Array, "B h w channels"]) -> Float[Array, "B R C d"]:
        """The encoder's vectors in float32, before normalisation.

        Raises:
          ValueError: another number of channels, or sizes that the downsampling does not
            divide.
        """
        check_images(self.config, images.shape)
        return self.quant_conv(self.encoder(images)).astype(jnp.float32)

    def nearest(self, z: Float[Array, "B R C d"]) -> Int32[Array, "B R C"]:
        """The codes nearest to vectors of `encode`, on the unit sphere."""
        return self.quantize.nearest(z)

    def lookup(self, codes: Int[Array, "B R C"]) -> Float[Array, "B R C d"]:
        """The normalised vectors of codes, float32."""
        return self.quantize.lookup(codes)

    def decode(self, vectors: Float[Array, "B R C d"]) -> Float[Array, "B h w channels"]:
        """Images in float32 from normalised vectors; not clipped to [-1, 1]."""
        return self.decoder(self.post_quant_conv(vectors)).astype(jnp.float32)


def check_images(config: TokenizerConfig, shape: tuple[int, ...]) -> None:
    """Refuses images (B, h, w, channels) of a shape that a tokenizer cannot encode.

    Raises:
      ValueError: naming the shape and what would do.
    """
    factor = config.downsampling
    if len(shape) != 4 or shape[3] != config.channels:
        raise ValueError(
            f"images: shape {tuple(shape)} must be (B, h, w, {config.channels}), the tokenizer's "
            "model.channels"
        )
    if min(shape[1:3]) < 1 or shape[1] % factor or shape[2] % factor:
        raise ValueError(
            f"images: {shape[1]} x {shape[2]} pixels must be multiples of {factor}, the "
            "tokenizer's downsampling; crop or pad them"
        )


def init_tokenizer(config: TokenizerConfig, key: PRNGKeyArray) -> PyTree[Array]:
    """Fresh parameters in float32.

    Convolutions as in PyTorch, norms the identity, the codebook uniform within +-1/V and
    then L2-normalised, as in LlamaGen.
    """
    side = config.downsampling
    images = jax.ShapeDtypeStruct((1, side, side, config.channels), jnp.float32)
    return VQTokenizer(config).lazy_init(key, images)["params"]


def abstract_tokenizer(config: TokenizerConfig) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes and types of the parameters, without computing any."""
    return jax.eval_shape(lambda: init_tokenizer(config, jax.random.key(0)))
