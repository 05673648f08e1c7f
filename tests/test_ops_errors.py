"""What the operator refuses: the message names the argument, its value and what would fit."""

import dataclasses

import jax.numpy as jnp
import pytest

from lasad_jax.ops import (
    ManhattanDecay,
    NoDecay,
    RasterDecay,
    SequenceDecay,
    init_state,
    linear_attention,
    step,
)

RATES = jnp.ones(2)
SIZES = {"batch": 1, "num_heads": 2, "key_dim": 3, "value_dim": 4, "grid": (2, 3)}


def zeros(*shape):
    return jnp.zeros(shape)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"k": zeros(1, 7, 2, 4)},
            r"q, k: expected equal shapes \(B, N, H, Dk\), got \(1, 7, 2, 3\) and \(1, 7, 2, 4\)",
        ),
        (
            {"q": zeros(7, 2, 3), "k": zeros(7, 2, 3)},
            r"q, k: expected .*\(B, N, H, Dk\), got \(7, 2, 3\)",
        ),
        ({"v": zeros(1, 6, 2, 4)}, r"v: expected \(1, 7, 2, 'Dv'\) .*got \(1, 6, 2, 4\)"),
        ({"v": zeros(1, 7, 2)}, r"v: expected \(1, 7, 2, 'Dv'\) .*got \(1, 7, 2\)"),
        (
            {"implementation": "fast"},
            r"implementation: 'fast' is not one of .*'quadratic', 'scan', 'chunked'",
        ),
        (
            {"num_prefix": 0},
            r"q: 7 tokens do not fit grid \(2, 3\) after num_prefix=0 .*pass 1 to 6 tokens",
        ),
        (
            {"q": zeros(1, 0, 2, 3), "k": zeros(1, 0, 2, 3), "v": zeros(1, 0, 2, 4)},
            r"q: 0 tokens do not fit grid \(2, 3\).*pass 1 to 7 tokens",
        ),
        ({"decay": "none"}, r"decay: 'none' is none of \['NoDecay', .*'ManhattanDecay'\]"),
        ({"decay": NoDecay}, r"decay: <class .*NoDecay'> is none of"),
        (
            {"decay": SequenceDecay(jnp.ones(3))},
            r"decay\.rate: expected one rate for each of 2 heads, got \(3,\)",
        ),
        (
            {"decay": RasterDecay(RATES, jnp.ones(1))},
            r"decay\.column_rate: expected one rate for each of 2 heads, got \(1,\)",
        ),
        (
            {"decay": ManhattanDecay(RATES, RATES), "log_gate": zeros(1, 7, 2)},
            r"log_gate: ManhattanDecay takes no content gate; pass log_gate=None",
        ),
        ({"log_gate": zeros(1, 7)}, r"log_gate: expected \(1, 7, 2\), got \(1, 7\)"),
        (
            {"initial_state": init_state(NoDecay, num_prefix=3, **SIZES)},
            r"num_prefix: 1, but initial_state was made for 3 prefix tokens",
        ),
        (
            {"implementation": "quadratic", "return_state": True},
            r"implementation='quadratic' carries no state; use 'chunked' or 'scan'",
        ),
        (
            {"implementation": "quadratic", "initial_state": init_state(NoDecay, **SIZES)},
            r"implementation='quadratic' carries no state; use 'chunked' or 'scan'",
        ),
    ],
)
def test_linear_attention_refuses(changes, message):
    q, v = zeros(1, 7, 2, 3), zeros(1, 7, 2, 4)
    args = {"q": q, "k": q, "v": v, "decay": NoDecay(), "grid": (2, 3)}
    assert linear_attention(**args).shape == v.shape
    with pytest.raises(ValueError, match=message):
        linear_attention(**args | changes)


def test_step_refuses_a_gate_for_manhattan():
    decay = ManhattanDecay(RATES, RATES)
    state, q, v = init_state(decay, **SIZES), zeros(1, 2, 3), zeros(1, 2, 4)
    with pytest.raises(ValueError, match=r"log_gate: ManhattanDecay takes no .*log_gate=None"):
        step(state, q, q, v, decay, grid=(2, 3), log_gate=zeros(1, 2))


def test_decays_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SequenceDecay(RATES).rate = RATES
