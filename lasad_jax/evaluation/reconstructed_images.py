"""Real images through a tokenizer and back, to be measured as samples are: rFID."""

import numpy as np
from jaxtyping import UInt8

from lasad_jax.evaluation.evaluator import Samples
from lasad_jax.evaluation.extract import MadeImages
from lasad_jax.evaluation.real_images import RealImages
from lasad_jax.models.codec import TokenizerCodec


def reconstruct(codec: TokenizerCodec, real: RealImages, split: str) -> Samples:
    """What a tokenizer makes of the images of a split, as they are looked at.

    Args:
      codec: the tokenizer at work.
      real: the images, of as many channels.
      split: "train" or "test".

    Raises:
      FileNotFoundError, ValueError: images that are missing or that the tokenizer does not take.
    """
    images = real.stream(split)
    grid = codec.config.grid(images.shape[:2])

    def make(first: int, last: int) -> UInt8[np.ndarray, "n h w channels"]:
        return codec.decode(codec.encode(images.read(first, last)), grid)

    described = {
        "name": f"reconstructions of {real.name}, split {split}",
        "fingerprint": codec.fingerprint,
        "num_images": len(images),
    }
    return Samples(MadeImages(len(images), images.shape, make), None, described, {})
