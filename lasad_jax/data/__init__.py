"""From image files to batches of tokens: sources, crops, pixel tokens, stored codes, loaders."""

from lasad_jax.data.crops import random_crop_flip, size_before_crop, view_names, views
from lasad_jax.data.images import ImageSet, load_images
from lasad_jax.data.loader import Examples, TokenExamples, held_out_batches, train_batches
from lasad_jax.data.pixel_tokens import dequantize, images_to_tokens, quantize, tokens_to_images
from lasad_jax.data.sources import SPLITS, Example, ImageSource, UnreadableImage, open_source

__all__ = [
    "SPLITS",
    "Example",
    "Examples",
    "ImageSet",
    "ImageSource",
    "TokenExamples",
    "UnreadableImage",
    "dequantize",
    "held_out_batches",
    "images_to_tokens",
    "load_images",
    "open_source",
    "quantize",
    "random_crop_flip",
    "size_before_crop",
    "tokens_to_images",
    "train_batches",
    "view_names",
    "views",
]
