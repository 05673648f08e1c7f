"""Marks what a rematerialised layer keeps from its forward pass."""

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import PyTree

_KEPT, _KEPT_IF_ROOM = "kept", "kept_if_room"


def keep(x: PyTree, *, if_room: bool = False) -> PyTree:
    """The same arrays, kept for the backward pass where a policy decides.

    For what takes long to compute again: matrix products, the operator and its states, and
    what these read.

    Args:
      x: the arrays.
      if_room: they take a single pass over memory to compute again.
    """
    name = _KEPT_IF_ROOM if if_room else _KEPT
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, name), x)


# Policies of `jax.checkpoint`.
keep_policy = jax.checkpoint_policies.save_only_these_names(_KEPT, _KEPT_IF_ROOM)
lean_policy = jax.checkpoint_policies.save_only_these_names(_KEPT)
