"""Norms' scales in the kernels that read the normalised tokens.

A scale multiplies the rows of a kernel instead of every token, and its gradient is a sum over
the kernel instead of over all tokens. All layers are folded and cast at once, before the loop
over them: what that loop slices, gathers from other devices and stores is in the dtype of
computation.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, PyTree

from lasad_jax.models.config import ModelConfig

_MIXER = ("q", "k", "v", "out_gate", "decay_gate")


def fold_norms(config: ModelConfig, blocks: PyTree) -> PyTree:
    """The parameters of all blocks with each scale in the kernels after it.

    Args:
      config: the generator's.
      blocks: parameters under "blocks", layers stacked.

    Returns:
      the same tree, with matrices in the compute dtype. Its scales mean nothing any more.
    """
    blocks = nn.meta.unbox(blocks)
    mixer, ffn = dict(blocks["mixer"]), dict(blocks["ffn"])

    def fold_into(part: dict, name: str, scale: Float[Array, "*layers_contracted"] | None = None):
        kernel = scaled(part[name]["kernel"], scale)
        part[name] = {**part[name], "kernel": kernel.astype(config.compute_dtype)}

    for name in _MIXER:
        if name in mixer:
            fold_into(mixer, name, blocks["mixer_norm"]["scale"])
    fold_into(mixer, "out", mixer["norm"]["scale"] if "norm" in mixer else None)
    for name in ("gate", "up"):
        fold_into(ffn, name, blocks["ffn_norm"]["scale"])
    fold_into(ffn, "down")
    return {**blocks, "mixer": mixer, "ffn": ffn}


def fold(config: ModelConfig, params: PyTree) -> PyTree:
    """All parameters as `LASADGen(folded=True)` takes them: half the memory in bf16.

    Args:
      config: the generator's.
      params: of `LASADGen`, unboxed.

    Returns:
      `fold_norms` of the blocks; embeddings and head in the compute dtype, the last norm's scale
      in the head's rows.
    """
    cast = lambda x: x.astype(config.compute_dtype)
    norm = params["final_norm"]
    return {
        "token_embedding": jax.tree.map(cast, params["token_embedding"]),
        "class_embedding": jax.tree.map(cast, params["class_embedding"]),
        "blocks": fold_norms(config, params["blocks"]),
        "final_norm": jax.tree.map(jnp.ones_like, norm),
        "head": {"kernel": cast(scaled(params["head"]["kernel"], norm["scale"]))},
    }


def scaled(
    kernel: Float[Array, "*contracted_features"], scale: Float[Array, "*contracted"] | None
) -> Float[Array, "*contracted_features"]:
    """A kernel whose rows are multiplied by a scale, if there is one."""
    if scale is None:
        return kernel
    return kernel * scale.reshape(*scale.shape, *(1,) * (kernel.ndim - scale.ndim))


def map_folded(blocks: type[nn.Module], config: ModelConfig, initialising: bool):
    """The module `blocks` whose parameters are `fold_norms` of those stored."""

    def stored_to_folded(variables):
        # While they are made, parameters are as they will be stored.
        if initialising:
            return variables
        return {"params": fold_norms(config, variables["params"])}

    return nn.map_variables(
        blocks, "params", stored_to_folded, init=initialising, mutable=initialising
    )
