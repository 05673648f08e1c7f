"""From image files to batches of tokens: sources, pixel tokens, loaders."""

from lasad_jax.data.images import SOURCES, SPLITS, ImageSet, load_images
from lasad_jax.data.loader import Examples, TokenExamples, held_out_batches, train_batches
from lasad_jax.data.pixel_tokens import dequantize, images_to_tokens, quantize, tokens_to_images

__all__ = [
    "SOURCES",
    "SPLITS",
    "Examples",
    "ImageSet",
    "TokenExamples",
    "dequantize",
    "held_out_batches",
    "images_to_tokens",
    "load_images",
    "quantize",
    "tokens_to_images",
    "train_batches",
]
