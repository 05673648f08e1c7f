"""Rows of a large table, on a mesh whose devices split the images.

Left alone, XLA adds the table's gradient up between devices in float32, as each device does for
itself. It is the last one of a step, so nothing hides that. Here it is rounded before it is sent,
like those of all matrices; and so are parts of the table itself (`models.storage`).
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, DTypeLike, Float, Int

from lasad_jax.models.exchange import spec_in_parts, sums_are_ours
from lasad_jax.models.operator import mesh_axes, num_devices
from lasad_jax.models.storage import axis_names
from lasad_jax.ops.numerics import accumulator


def look_up(
    table: Float[Array, "V D"],
    ids: Int[Array, "*batch"],
    names: tuple[str, str],
    dtype: DTypeLike,
) -> Float[Array, "*batch D"]:
    """table[ids] in a dtype; its gradient adds up in float32 on each device.

    Args:
      table: in the dtype of parameters.
      ids: rows. The first axis is that of images.
      names: logical names of the table's axes.
      dtype: of the result, and of what devices send each other.
    """
    batch, mesh = mesh_axes("batch", ids.shape[0]), jax.sharding.get_abstract_mesh()
    whole = max(map(num_devices, names, table.shape)) == 1
    if not (whole and sums_are_ours(batch)) or mesh.are_all_axes_manual:
        return jnp.take(table, ids, axis=0).astype(dtype)
    return _look_up(table, ids, jnp.dtype(dtype), batch, spec_in_parts(names, table.shape))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _look_up(table, ids, dtype, batch, parts):
    # Held where it lies, or all of it would be sent before it is rounded.
    table = jax.lax.with_sharding_constraint(table.astype(dtype), parts)
    whole = jax.lax.with_sharding_constraint(table, PartitionSpec())
    return jnp.take(whole, ids, axis=0)


def _forward(table, ids, dtype, batch, parts):
    return _look_up(table, ids, dtype, batch, parts), (table, ids)


def _backward(dtype, batch, parts, residuals, gradient):
    table, ids = residuals
    exact = jax.ShapeDtypeStruct(table.shape, accumulator(dtype))

    def add_up(ids, gradient):
        (sums,) = jax.linear_transpose(lambda table: jnp.take(table, ids, axis=0), exact)(
            gradient.astype(exact.dtype)
        )
        sums, rest = sums.astype(dtype), axis_names(batch)
        for dimension, axes in enumerate(parts):
            if names := axis_names(axes):
                sums = jax.lax.psum_scatter(sums, names, scatter_dimension=dimension, tiled=True)
                rest = tuple(name for name in rest if name not in names)
        return jax.lax.psum(sums, rest)

    images = PartitionSpec(batch)
    add_up = jax.shard_map(add_up, in_specs=(images, images), out_specs=parts, check_vma=False)
    return add_up(ids, gradient).astype(table.dtype), None


_look_up.defvjp(_forward, _backward)
