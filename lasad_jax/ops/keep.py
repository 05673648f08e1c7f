"""Marks what a rematerialised layer keeps from its forward pass."""

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import PyTree

_KEPT = "kept"


def keep(x: PyTree) -> PyTree:
    """The same arrays, kept for the backward pass where `keep_policy` decides.

    For what takes long to compute again: matrix products, the operator and its states, and
    what these read.
    """
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, _KEPT), x)


# A policy of `jax.checkpoint`.
keep_policy = jax.checkpoint_policies.save_only_these_names(_KEPT)
