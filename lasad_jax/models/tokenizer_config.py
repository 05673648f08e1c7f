"""What a tokenizer is: the fields of `config.model` in its training."""

import dataclasses

import jax.numpy as jnp

from lasad_jax.models.config import DTYPES

NORM_GROUPS = 32


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Architecture of a `VQTokenizer`; the defaults are LlamaGen's VQ-16 (arXiv 2406.06525).

    Attributes:
      channels: of an image, 1 or 3.
      width: channels of the widest resolution.
      multipliers: of `width`, one for each resolution from full to lowest; each after the
        first halves rows and columns.
      encoder_blocks, decoder_blocks: residual blocks at each resolution.
      latent_channels: between the networks and the codebook's projections.
      codebook_size, codebook_dim: number of codes V and their dimension.
      dtype: of activations and convolutions.
    """

    channels: int = 3
    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    latent_channels: int = 256
    codebook_size: int = 16384
    codebook_dim: int = 8
    dtype: str = "float32"

    def __post_init__(self):
        if self.channels not in (1, 3):
            raise ValueError(f"model.channels: {self.channels} must be 1 or 3")
        if self.dtype not in DTYPES:
            raise ValueError(f"model.dtype: {self.dtype!r} is not one of {DTYPES}")
        if self.width < 1 or self.width % NORM_GROUPS:
            raise ValueError(
                f"model.width: {self.width} must be a multiple of {NORM_GROUPS}, the groups of "
                "its norms"
            )
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"model.multipliers: {self.multipliers} must be positive, one or more")
        names = ("encoder_blocks", "decoder_blocks", "latent_channels")
        for name in (*names, "codebook_size", "codebook_dim"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"model.{name}: {value} must be at least 1")

    @property
    def downsampling(self) -> int:
        """Pixels per code along each side."""
        return 2 ** (len(self.multipliers) - 1)

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns (R, C) of an image's codes.

        Raises:
          ValueError: sizes that the downsampling does not divide.
        """
        if any(size < 1 or size % self.downsampling for size in image_size):
            raise ValueError(
                f"data.image_size: {tuple(image_size)} must be positive multiples of "
                f"{self.downsampling}, the tokenizer's downsampling (data.fit='pad' pads without "
                "scaling)"
            )
        return image_size[0] // self.downsampling, image_size[1] // self.downsampling

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as JAX knows it."""
        return jnp.dtype(self.dtype)


# LlamaGen's published tokenizers, by downsampling.
VQ16 = TokenizerConfig()
VQ8 = dataclasses.replace(VQ16, multipliers=(1, 2, 2, 4))
