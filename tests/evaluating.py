"""A tiny network to compare images by, and files for tests of evaluation."""

import jax.numpy as jnp
import numpy as np

from lasad_jax.evaluation.features import Extractor, Features

SHAPE = (4, 5, 3)
DIM, SPATIAL, CLASSES = 6, 8, 3


def tiny_extractor(kind="classifier", image_shape=SHAPE, seed=0, name="tiny") -> Extractor:
    """Random projections of pixels; those of Inception take any shape."""
    rng = np.random.default_rng(seed)
    size = (DIM + SPATIAL + CLASSES, int(np.prod(SHAPE)))
    params = {"w": rng.standard_normal(size).astype(np.float32)}

    def apply(params, images):
        x = images.reshape(len(images), -1).astype(jnp.float32) / 64 - 2
        out = jnp.tanh(jnp.einsum("oi,bi->bo", params["w"], x, precision="highest") / 5)
        pooled, spatial, logits = jnp.split(out, (DIM, DIM + SPATIAL), axis=1)
        return Features(pooled, spatial, 8 * logits)

    shape = None if kind == "inception" else image_shape
    return Extractor(kind, name, f"{seed:016x}", shape, params, apply)


def random_images(count, seed=0, shape=SHAPE, low=0, high=256):
    return np.random.default_rng(seed).integers(low, high, (count, *shape), np.uint8)
