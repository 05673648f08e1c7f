"""The operator inside a model on a mesh: a fused kernel sees its device's own images and heads.

XLA splits its own operations over a mesh, but not a kernel: it would first gather the whole
batch on every device. No token of one image or head depends on another, so `shard_map` over
both needs no communication.
"""

import functools

import jax
from flax import linen as nn
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lasad_jax import ops
from lasad_jax.models.config import ModelConfig
from lasad_jax.ops.kernels import choice


def linear_attention(
    q: Float[Array, "B N H Dk"],
    k: Float[Array, "B N H Dk"],
    v: Float[Array, "B N H Dv"],
    decay: ops.Decay,
    *,
    grid: tuple[int, int],
    num_prefix: int,
    log_gate: Float[Array, "B N H"] | None,
    implementation: str,
    return_state: bool,
) -> Float[Array, "B N H Dv"] | tuple[Float[Array, "B N H Dv"], ops.State]:
    """`ops.linear_attention` of whole sequences under the current mesh and axis rules."""
    implementation = ops.resolve_implementation(
        implementation, q, v, decay, num_prefix=num_prefix, stateful=return_state
    )
    run = functools.partial(
        ops.linear_attention,
        grid=grid,
        num_prefix=num_prefix,
        implementation=implementation,
        return_state=return_state,
    )
    mesh = jax.sharding.get_abstract_mesh()
    if implementation not in ops.KERNELS or mesh.empty or mesh.are_all_axes_manual:
        return run(q, k, v, decay, log_gate=log_gate)

    images, heads = mesh_axes("batch", q.shape[0]), mesh_axes("heads", q.shape[2])
    tokens = PartitionSpec(images, None, heads)
    rates = jax.tree.map(lambda _: PartitionSpec(heads), decay)
    gates = None if log_gate is None else tokens
    state = ops.State(tokens, tokens, PartitionSpec(images, heads), PartitionSpec())
    return jax.shard_map(
        lambda q, k, v, decay, log_gate: run(q, k, v, decay, log_gate=log_gate),
        in_specs=(tokens, tokens, tokens, rates, gates),
        out_specs=(tokens, state) if return_state else tokens,
        check_vma=False,
    )(q, k, v, decay, log_gate)


def mesh_axes(name: str, size: int) -> str | tuple[str, ...] | None:
    """Axes of the current mesh over which a logical axis of this size is split.

    None without a mesh, and where the axes do not divide the size: then all have all of it.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return None
    (axes,) = nn.logical_to_mesh_axes((name,))
    return axes if size % choice.num_devices(axes) == 0 else None


def num_devices(name: str, size: int) -> int:
    """How many devices of the current mesh a logical axis of this size is split over."""
    return choice.num_devices(mesh_axes(name, size))


def passes(config: ModelConfig) -> str:
    """The implementation of elementwise passes that goes with the operator's."""
    return "auto" if config.implementation in ("auto", *ops.KERNELS) else "plain"
