"""Mosaic TPU kernels of the exact 2D decay, as masked products of tiles of tokens:

    o_t = sum over s <= t of exp(-row_rate (r_t - r_s) - column_rate |c_t - c_s|) (q_t . k_s) v_s

with weight 1 where s is a prefix token. Like flash attention without its softmax: scores
exist for one pair of tiles at a time, with weights made from the tokens' places. Tiles
start at token 0, prefix included. A last tile of few tokens is computed at its own length.

The pairs of tiles are the sequential axis of the grid. The backward pass takes all query
tiles for one key tile after another: dk and dv are sums over neighbouring steps, dq waits
in VMEM as a whole, so that scores and weights are computed once for all gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lasad_jax.ops.kernels.manhattan_tpu_pair import Sizes, backward_kernel, forward_kernel
from lasad_jax.ops.kernels.tpu_tiles import call_by_name, side_by_side

_TILE = 128


def forward(
    q: Float[Array, "B N H Dk"],
    k: Float[Array, "B N H Dk"],
    v: Float[Array, "B N H Dv"],
    row_rate: Float[Array, " H"],
    column_rate: Float[Array, " H"],
    *,
    columns: int,
    num_prefix: int,
    tile: int = _TILE,
    interpret: object = False,
) -> Float[Array, "B N H Dv"]:
    """Outputs of all tokens.

    Args:
      q, k, v: bf16 or float32, all of one type; grid token j, which is token P + j, stands
        at row j // C and column j % C.
      row_rate, column_rate: float32, not negative.
      columns: C.
      num_prefix: P, the number of tokens that never decay.
      tile: tokens of a tile, a multiple of 16.
      interpret: as of `pallas_call`; True or `InterpretParams()` run on any device.

    Returns:
      o in v's dtype.
    """
    sizes = Sizes.of(q, v, columns, num_prefix, tile)
    order = [(t, s) for t in range(sizes.num_tiles) for s in range(t + 1)]
    given = {name: side_by_side(x) for name, x in {"q": q, "k": k, "v": v}.items()}
    out = call_by_name(
        functools.partial(forward_kernel, sizes),
        sizes.grid(q, order),
        sizes.blocks(),
        given,
        {"o": jax.ShapeDtypeStruct(given["v"].shape, v.dtype)},
        {"o_sum": (tile, sizes.packing.heads * sizes.value_dim)},
        scalars=_scalars(order, row_rate, column_rate),
        name="manhattan_forward",
        interpret=interpret,
    )
    return out["o"].reshape(v.shape)


def backward(
    q: Float[Array, "B N H Dk"],
    k: Float[Array, "B N H Dk"],
    v: Float[Array, "B N H Dv"],
    row_rate: Float[Array, " H"],
    column_rate: Float[Array, " H"],
    d_o: Float[Array, "B N H Dv"],
    *,
    columns: int,
    num_prefix: int,
    tile: int = _TILE,
    interpret: object = False,
) -> tuple[Array, Array, Array, Float[Array, "B H"], Float[Array, "B H"]]:
    """All gradients.

    Args:
      q, k, v, row_rate, column_rate, columns, num_prefix, tile, interpret: as of `forward`.
      d_o: gradient of o, in v's dtype.

    Returns:
      dq, dk, dv in their inputs' dtypes; float32 d_row_rate and d_column_rate of each
      sample.
    """
    sizes = Sizes.of(q, v, columns, num_prefix, tile)
    order = [(t, s) for s in range(sizes.num_tiles) for t in range(s, sizes.num_tiles)]
    given = {"q": q, "k": k, "v": v, "d_o": d_o}
    given = {name: side_by_side(x) for name, x in given.items()}
    wanted = {f"d{x}": jax.ShapeDtypeStruct(given[x].shape, given[x].dtype) for x in "qkv"}
    wanted["d_rates"] = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], 2, tile), jnp.float32)
    key_lanes, value_lanes = (
        sizes.packing.heads * width for width in (sizes.key_dim, sizes.value_dim)
    )
    out = call_by_name(
        functools.partial(backward_kernel, sizes),
        sizes.grid(q, order),
        sizes.blocks(),
        given,
        wanted,
        {
            "dq_sum": (sizes.num_tiles, tile, key_lanes),
            "dk_sum": (tile, key_lanes),
            "dv_sum": (tile, value_lanes),
        },
        scalars=_scalars(order, row_rate, column_rate),
        name="manhattan_backward",
        interpret=interpret,
    )
    dq, dk, dv = out["dq"].reshape(q.shape), out["dk"].reshape(k.shape), out["dv"].reshape(v.shape)
    d_rates = -jnp.sum(out["d_rates"], -1)
    return dq, dk, dv, d_rates[..., 0], d_rates[..., 1]


def _scalars(order, row_rate, column_rate):
    return {
        "pairs": jnp.asarray(np.array(order, np.int32).T),
        "row_rate": row_rate.astype(jnp.float32),
        "column_rate": column_rate.astype(jnp.float32),
    }
