"""A mixer's heads from joint projection to gated output on Hopper: Mosaic GPU, backward.

One walk from the last chunk to the first: through gate and norm, the recurrence and what is done
to queries and keys. Two warpgroups share a head: one takes gate, norm and values, the other
queries, keys and the state. A program has two heads. How the kernel is built else:
`mixed_heads_mosaic`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32

from lasad_jax.ops.kernels import mixed_heads_decays as md
from lasad_jax.ops.kernels import mixed_heads_tiles as mh
from lasad_jax.ops.kernels import mosaic_tiles as mg
from lasad_jax.ops.kernels.mixed_heads_keys import keys
from lasad_jax.ops.kernels.mixed_heads_program import (
    COPIES,
    GROUPS,
    HEADS,
    SIGNALS,
    STAGES,
    Program,
)
from lasad_jax.ops.kernels.mixed_heads_values import values
from lasad_jax.ops.kernels.mosaic_columns import Arrivals, tiles


def backward(
    y: BFloat16[Array, "B N H W"],
    steps: Float32[Array, "H M 64"],
    bias: Float32[Array, " H"] | None,
    table: Float32[Array, "M*64 32"] | None,
    o: BFloat16[Array, "B N H 64"],
    states: BFloat16[Array, "B H boundaries 64 32"],
    d_h: BFloat16[Array, "B N H 64"],
    *,
    q_scale: float,
    epsilon: float,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """(d_y, h, d_steps): the gradient with respect to y, 0 in the padding; the gated heads again;
    and what each image adds to the gradient of steps and, with a bias, as if there were one for
    each token, of bias: (B, H, 1 or 2, M, 64) in float32.

    Args:
      o, states: from `forward`.
      d_h: the gradient with respect to h.

    The other arguments are `forward`'s.
    """
    batch, _, heads, _ = y.shape
    total = batch * heads
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    shape = (batch, heads, 1 if bias is None else 2, *steps.shape[1:])
    d_steps = jax.ShapeDtypeStruct(shape, jnp.float32)
    out_type = {"d_y": like(y), "h": like(d_h), "d_steps": d_steps}

    def kernel(inputs, outputs, scratch):
        arrivals = {name: Arrivals(scratch[name], interpret) for name in COPIES}
        for name, copies in COPIES.items():
            arrivals[name].start(copies)
        warpgroup = lax.axis_index("wg")
        own = lax.div(warpgroup, 2)
        number = HEADS * lax.axis_index("b") + own
        program = Program(
            inputs=inputs,
            outputs=outputs,
            scratch=scratch,
            arrivals=arrivals,
            own=own,
            image=lax.div(number, heads),
            head=lax.rem(number, heads),
            is_last=number + 1 == total,
            q_scale=q_scale,
            epsilon=epsilon,
            interpret=interpret,
        )
        is_keys = lax.rem(warpgroup, 2) == 1

        @pl.when(warpgroup == 0)
        def _():
            mg.fill_mask(scratch["mask"], 1)
            plgpu.barrier_arrive(scratch["masked"])

        plgpu.barrier_wait(scratch["masked"])
        pl.when((number < total) & ~is_keys)(lambda: values(program))
        pl.when((number < total) & is_keys)(lambda: keys(program))

    inputs = {"y": y, "o": o, "states": states, "d_h": d_h}
    inputs |= {"steps": steps, "bias": bias, "table": table}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    narrow = functools.partial(tiles, HEADS, width=mh.KEY_DIM)
    broad = functools.partial(tiles, HEADS, width=mh.VALUE_DIM)
    scratch = {name: narrow(STAGES) for name in ("q", "k", "state")}
    scratch |= {"v": broad(STAGES)}
    scratch |= {name: broad() for name in ("out_gate", "o", "d_h", "d_o", "d_scores")}
    scratch |= {name: narrow() for name in ("q_slope", "k_slope", "d_state", "decayed", "prefix")}
    scratch |= {"mask": tiles(width=mh.VALUE_DIM), "masked": plgpu.Barrier()}
    scratch |= {"b": plgpu.SMEM((HEADS, GROUPS, *md.SHAPE), jnp.float32)}
    scratch |= {name: plgpu.SMEM((HEADS, *md.SHAPE), jnp.float32) for name in ("change", "through")}
    scratch |= {
        "gated": Arrivals.scratch(COPIES["gated"], HEADS, interpret),
        "values": Arrivals.scratch(COPIES["values"], HEADS * STAGES, interpret),
        "keys": Arrivals.scratch(COPIES["keys"], HEADS * STAGES, interpret),
        "states": plgpu.Barrier(num_barriers=HEADS * STAGES),
    }
    scratch |= {name: plgpu.Barrier(num_barriers=HEADS) for name in SIGNALS}
    grid = (pl.cdiv(total, HEADS),)
    out = mg.launch(
        kernel,
        inputs,
        out_type,
        scratch,
        grid,
        interpret,
        name="mixed_heads_backward",
        warpgroups=2 * HEADS,
    )
    return out["d_y"], out["h"], out["d_steps"]
