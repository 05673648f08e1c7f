"""LASADGen in JAX: autoregressive image generation at linear cost."""

__version__ = "0.1.0"
