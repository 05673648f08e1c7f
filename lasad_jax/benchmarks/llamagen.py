"""LlamaGen's speed: its own code under torch.compile in bf16, measured on one H200.

Only figures that were measured are here, so many cases have none. A ratio to them means
something on an H200 alone.
"""

from typing import NamedTuple

SOURCE = "LlamaGen's own code under torch.compile, bf16, one H200"


class Figure(NamedTuple):
    """Images a second, and most memory in bytes."""

    images_per_second: float
    memory_bytes: float


# (size, tokens of an image, batch). Training: a step of AdamW with clipping. Sampling: whole
# images with a guidance scale of 2.
TRAINING = {
    ("B", 256, 128): Figure(2294, 17.6e9),
    ("XL", 256, 64): Figure(355, 40.3e9),
}
SAMPLING = {
    ("B", 256, 128): Figure(299, 4.7e9),
    ("XL", 256, 64): Figure(58, 16.0e9),
    ("L", 1024, 64): Figure(13.8, 17.0e9),
}
