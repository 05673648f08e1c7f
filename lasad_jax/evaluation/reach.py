"""How far a trained generator sees: what its decays say, and what its predictions depend on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, PyTree

from lasad_jax.models.config import ModelConfig
from lasad_jax.models.generator import LASADGen
from lasad_jax.models.mixers import decay_of

# Images whose gradients are computed at once, which bounds memory.
_BATCH = 16


def half_lives(config: ModelConfig, params: PyTree) -> dict[str, Float[np.ndarray, "layers H"]]:
    """The steps after which each head's static decay has halved a weight.

    A content gate makes them shorter, for each token in its own way.

    Args:
      config, params: of a `LASADGen`, unboxed.

    Returns:
      for each of the decay's rates, by name: in rows for "row_rate"; in tokens (`raster`: of a
      row; `manhattan`: in columns) for the others. Nothing for softmax, nor for `none`.
    """
    if config.mixer == "softmax":
        return {}
    mixer = params["blocks"]["mixer"]
    decay = decay_of(config, lambda name: jnp.asarray(mixer[name], jnp.float32))
    rates = {field.name: getattr(decay, field.name) for field in dataclasses.fields(decay)}
    return {name: np.log(2) / np.asarray(rate) for name, rate in rates.items()}


def receptive_field(
    config: ModelConfig,
    params: PyTree,
    tokens: Int[np.ndarray, "B N"],
    labels: Int[np.ndarray, " B"],
    place: tuple[int, int],
) -> Float[np.ndarray, "R C"]:
    """What the prediction of one token depends on, in float32.

    For each earlier token the absolute gradient of the predicted one's log-probability with
    respect to the earlier one's embedding, its mean over channels and images.

    Args:
      config, params: of a `LASADGen`, unboxed.
      tokens: codes of the images.
      labels: their classes.
      place: row and column of the predicted token.

    Returns:
      each token's share of the sum over all, which makes models comparable; 0 for the
      predicted token and all after it.

    Raises:
      ValueError: a place off the grid, or the first, which no token is before.
    """
    (row, column), (rows, columns) = place, config.grid
    if not (0 <= row < rows and 0 <= column < columns) or (row, column) == (0, 0):
        raise ValueError(f"place: {place} must be on the grid {config.grid}, and not its first")
    num_earlier = row * columns + column
    seen = tokens[:, : num_earlier + 1]
    total = sum(
        np.asarray(_gradients(config, params, seen[i : i + _BATCH], labels[i : i + _BATCH]))
        for i in range(0, len(tokens), _BATCH)
    )
    field = np.zeros(config.num_tokens)
    field[:num_earlier] = total / total.sum()
    return field.reshape(config.grid)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(
    config: ModelConfig, params: PyTree, tokens: Int[Array, "B n"], labels: Int[Array, " B"]
) -> Float[Array, " n-1"]:
    """Summed over channels and images, those of the last token's log-probability."""
    model = LASADGen(dataclasses.replace(config, dtype="float32", remat="none"))

    def log_probability(change):
        def changed(call, args, kwargs, context):
            out = call(*args, **kwargs)
            return out + change if context.module.name == "token_embedding" else out

        with nn.intercept_methods(changed):
            logits = model.apply({"params": params}, tokens, labels)[:, -1]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, -1:], axis=1).sum()

    zeros = jnp.zeros((*tokens[:, :-1].shape, config.width))
    return jnp.abs(jax.grad(log_probability)(zeros)).sum((0, 2))
