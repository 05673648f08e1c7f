"""LASAD: causal linear attention with a decay over true grid positions.

    o_t = sum over s <= t of  D(t, s) * (q_t . k_s) * v_s

Tokens are P prefix tokens (no place, never decayed) followed by the cells of an
R x C grid in raster order. One legend of dimension letters for the whole package:

    B batch        N tokens            H heads      Dk key dim     Dv value dim
    P prefix       R rows              C columns    V vocabulary   D model width
    L chunk length M number of chunks

`linear_attention` computes whole sequences, `init_state` and `step` one token at a
time from a carried state, `decay_matrix` the weights D(t, s) themselves. `passes` is what a
network does around the operator.
"""

from lasad_jax.ops.attention import IMPLEMENTATIONS, linear_attention, resolve_implementation
from lasad_jax.ops.decays import (
    Decay,
    ManhattanDecay,
    NoDecay,
    RasterDecay,
    SequenceDecay,
    decay_matrix,
)
from lasad_jax.ops.kernels.choice import KERNELS
from lasad_jax.ops.state import State, init_state
from lasad_jax.ops.step import step

__all__ = [
    "IMPLEMENTATIONS",
    "KERNELS",
    "Decay",
    "ManhattanDecay",
    "NoDecay",
    "RasterDecay",
    "SequenceDecay",
    "State",
    "decay_matrix",
    "init_state",
    "linear_attention",
    "resolve_implementation",
    "step",
]
