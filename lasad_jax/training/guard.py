"""A guard against loss spikes: updates with a gradient far above the usual are left out.

PaLM (arXiv 2204.02311, section 5.1) went back to a checkpoint and left out the batches around a
spike. Here the update itself is left out, on the device, before it has done harm.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree

# The running level is a mean over all updates at first, later over about the newest hundred; it
# is believed once it has seen that many.
_MEMORY = 100


@struct.dataclass
class Guard:
    """Attributes:
    level: running mean of the gradient's global norm.
    seen: finite norms that the level is made of.
    skipped: updates left out since the run began.
    in_a_row: of these, the newest without one taken since.
    """

    level: Float[Array, ""]
    seen: Int[Array, ""]
    skipped: Int[Array, ""]
    in_a_row: Int[Array, ""]


def new_guard() -> Guard:
    """Before the first step."""
    zero = jnp.zeros((), jnp.int32)
    return Guard(level=jnp.zeros(()), seen=zero, skipped=zero, in_a_row=zero)


def judge(
    guard: Guard, loss: Float[Array, ""], norm: Float[Array, ""], factor: float
) -> tuple[Bool[Array, ""], Guard]:
    """Whether to take an update, and the guard after it.

    Args:
      guard: before the update.
      loss, norm: of the update; it is left out where one of them is not finite.
      factor: it is also left out where the norm is above so many times its running level, once
        that is believed; 0 for never. Such a norm counts for the level as one at that bound, so
        that a level which stays higher is taken after a while.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    bound = jnp.inf
    if factor:
        bound = jnp.where(guard.seen >= _MEMORY, factor * guard.level, jnp.inf)
    take = finite & (norm <= bound)
    share = 1 / jnp.minimum(guard.seen + 1, _MEMORY)
    level = guard.level + share * (jnp.minimum(norm, bound) - guard.level)
    left_out = jnp.where(take, 0, 1)
    return take, Guard(
        level=jnp.where(finite, level, guard.level),
        seen=guard.seen + jnp.where(finite, 1, 0),
        skipped=guard.skipped + left_out,
        in_a_row=jnp.where(take, 0, guard.in_a_row + 1),
    )


def choose(take: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """The new state or the old one; counts go on, so that schedules stay those of the step."""

    def leaf(new, old):
        return jnp.where(take, new, old) if jnp.issubdtype(new.dtype, jnp.floating) else new

    return jax.tree.map(leaf, new, old)


def metrics(guard: Guard) -> dict[str, Array]:
    """What a step tells of its guard; `report` reads it."""
    return {
        "skipped_updates": guard.skipped,
        "skipped_in_a_row": guard.in_a_row,
        "grad_norm_level": guard.level,
    }
