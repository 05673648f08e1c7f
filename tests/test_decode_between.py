"""A layer from one mixer to the next in one launch, against float64, interpreted on the CPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import lower, on, quick_jit
from test_models import tiny_model

from lasad_jax.models import LASADGen, ModelConfig, decoder
from lasad_jax.ops.kernels import decode_triton
from lasad_jax.ops.kernels.between_tiling import (
    COUNTERS,
    UNIT,
    best_product,
    rows_in_flight,
    weight_slots,
)
from lasad_jax.ops.kernels.decode_tiling import interleave
from lasad_jax.ops.passes.local_conv import TAPS, next_token, num_recent

if jax.__version_info__ >= (0, 11):
    from lasad_jax.ops.kernels.decode_between import between

NEEDS_JAX_11 = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11"
)
RNG = np.random.default_rng()
EPSILON = 1e-2


def normal(*shape, scale=1.0):
    return jnp.asarray(RNG.normal(size=shape) * scale, jnp.bfloat16)


def exact(x):
    return np.asarray(x, np.float64)


def normalised(x):
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPSILON)


def random_weights(V, D, F, E):
    return {
        "out": normal(V, D, scale=V**-0.5),
        "taps": normal(len(TAPS), D, scale=0.3),
        "gate_up": interleave(*(normal(D, F, scale=D**-0.5) for _ in range(2)), UNIT),
        "down": normal(F, D, scale=F**-0.5),
        "projection": None if E is None else normal(D, E, scale=D**-0.5),
    }


def oracle(mixed, x, recent, index, weights, columns):
    """x, the projection and the ring in float64."""
    w = {name: None if value is None else exact(value) for name, value in weights.items()}
    x = exact(x) + exact(mixed) @ w["out"]
    with jax.enable_x64(True):
        arrays = (jnp.asarray(exact(y)) for y in (normalised(x), recent, w["taps"]))
        z, recent, taps = arrays
        y, recent = next_token(z, recent, jnp.int32(index), taps, columns=columns)
        y, recent = exact(y), exact(recent)
    pairs = (y @ w["gate_up"]).reshape(len(x), -1, 2, UNIT)
    gate, up = (pairs[:, :, i].reshape(len(x), -1) for i in range(2))
    x = x + (gate / (1 + np.exp(-gate)) * up) @ w["down"]
    return x, None if w["projection"] is None else normalised(x) @ w["projection"], recent


def assert_near(got, want):
    assert got.shape == want.shape
    assert np.abs(exact(got) - want).max() < 1e-2 * np.abs(want).max()


@NEEDS_JAX_11
@pytest.mark.parametrize(
    ("rows", "sizes", "columns", "programs"),
    [
        (72, (128, 128, 64, 192), 3, 3),  # rows are no multiple of a tile, and taken in rounds
        (64, (64, 256, 192, 128), 5, 40),  # most programs have nothing to do
        (136, (192, 128, 128, None), 1, 6),  # the last layer
    ],
)
def test_token_by_token(rows, sizes, columns, programs):
    """Through the ring of recent inputs and around its end."""
    weights = random_weights(*sizes)
    V, D = weights["out"].shape
    window = num_recent(columns)
    recent, counters = normal(rows, window, D), jnp.zeros(COUNTERS, jnp.int32)
    run = functools.partial(
        between,
        **weights,
        offsets=TAPS,
        columns=columns,
        epsilon=EPSILON,
        programs=programs,
        interpret=True,
    )
    for index in (1, window - 1, window, 2 * window + 1):
        mixed, x = normal(rows, V), normal(rows, D)
        want = oracle(mixed, x, recent, index, weights, columns)
        *got, counters = run(mixed, x, recent, jnp.int32(index), counters)
        recent = got[2]
        for one, other in zip(got, want, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert_near(one, other)
    assert not counters.any()


def decoded(config, variables, tokens, labels, implementation):
    model, rest = LASADGen(config), jnp.asarray(tokens[:, :-1].T)

    def run(variables, labels, rest):
        weights = decoder.prepare(config, variables["params"], implementation)
        _, cache = model.apply(variables, labels, tokens[:, :0], method="prefill")

        def step(cache, token):
            decode = functools.partial(decoder.decode, implementation=implementation)
            logits, cache = decode(config, weights, token, cache)
            return cache, logits

        return jax.lax.scan(step, decoder.start(config, cache), rest)[1]

    return quick_jit(run)(variables, labels, rest)
