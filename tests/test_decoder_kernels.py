"""Decoding's kernels, interpreted: their plain forms token by token, in any place and dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import lower, quick_jit
from test_models import tiny_model

from lasad_jax.models import decoder, decoder_mixers
from lasad_jax.models.layers import NORM_EPSILON
from lasad_jax.ops.kernels import decode_triton
from lasad_jax.ops.passes.local_conv import TAPS, num_recent
from lasad_jax.ops.ring import NUM_RECENT, ROWS, Ring

CASES = [
    {"width": 64, "grid": (6, 6)},
    {"width": 64, "key_dim": 16, "grid": (3, 5), "selective": False, "decay": "sequence"},
    {"width": 48, "num_heads": 3, "key_dim": 32, "grid": (1, 37), "rope": False, "decay": "none"},
]


def float64(tree):
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]


def one_layer(changes, dtype):
    config, variables, _, _ = tiny_model(seed=2, **{"num_layers": 1, "dtype": dtype} | changes)
    weights = decoder.prepare(config, variables["params"])
    rng = np.random.default_rng(4)
    random = lambda *shape: jnp.asarray(rng.standard_normal(shape), config.compute_dtype)
    return config, weights, weights.layers[0], random


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_mix_kernel_is_the_plain_form(changes, dtype):
    """Over two rounds of the ring, the first begun in its middle."""
    config, weights, layer, random = one_layer(changes, dtype)
    lead, key_dim, value_dim = (3, config.num_heads), config.query_dim, config.value_dim
    rows = lambda size: random(*lead, ROWS, size)
    empty = jnp.where(jnp.arange(ROWS) == 0, -0.3, -jnp.inf)
    log_weight = jnp.broadcast_to(empty, (*lead, ROWS))
    ring = Ring(random(*lead, key_dim, value_dim), rows(key_dim), rows(value_dim), log_weight)
    plain = quick_jit(
        lambda p, ring, i: decoder_mixers.mix(config, layer, p, weights.turns, ring, i)
    )
    kernel = quick_jit(
        lambda p, ring, i: decode_triton.mix(
            ring,
            p,
            i,
            log_factor=layer.log_factor,
            turns=weights.turns,
            gate_bias=layer.gate_bias,
            epsilon=NORM_EPSILON,
            interpret=True,
        )
    )
    # The plain form rounds within silu too: several roundings of 2^-9 apart.
    allowed = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    for index in range(5, min(5 + 2 * NUM_RECENT, config.num_tokens)):
        projection = random(lead[0], layer.projection.shape[1])
        (want, after), (got, ring) = (
            run(projection, ring, jnp.int32(index)) for run in (plain, kernel)
        )
        assert got.dtype == want.dtype
        dtypes = lambda ring: [x.dtype for x in jax.tree.leaves(ring)]
        assert dtypes(after) == dtypes(ring)
        # Rows that are in the memory weigh nothing; what they hold does not matter.
        weigh = lambda ring: (ring.memory, jnp.exp(ring.log_weight), *held(ring))
        for x, y in zip(float64((got, weigh(ring))), float64((want, weigh(after))), strict=True):
            assert np.linalg.norm(x - y) <= allowed * np.linalg.norm(y)


def held(ring):
    """Keys and values that count."""
    weighs = (jnp.exp(ring.log_weight) > 0) | (jnp.arange(ROWS) == 0)
    return tuple(jnp.where(weighs[..., None], x, 0) for x in (ring.recent_k, ring.recent_v))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("grid", [(6, 6), (1, 7), (5, 1)])
def test_norm_conv_kernel_is_the_plain_form(grid, dtype):
    config, _, layer, random = one_layer({"width": 48, "grid": grid}, dtype)
    recent = random(3, num_recent(grid[1]), config.width)
    plain = quick_jit(lambda *args: decoder._norm_conv("xla", config, layer, *args))
    kernel = quick_jit(
        lambda *args: decode_triton.norm_conv(
            *args,
            taps=layer.conv,
            offsets=TAPS,
            columns=grid[1],
            epsilon=NORM_EPSILON,
            interpret=True,
        )
    )
    allowed = {"float32": 1e-6, "bfloat16": 5e-3}[dtype]
    for index in range(1, config.num_tokens):
        args = random(3, config.width), recent, jnp.int32(index)
        want, (got, recent) = plain(*args), kernel(*args)
        for x, y in zip(float64((got, recent)), float64(want), strict=True):
            assert np.linalg.norm(x - y) <= allowed * np.linalg.norm(y)


def test_the_index_may_be_a_loops_counter():
    """Which is of a weak type."""
    config, weights, layer, random = one_layer({"width": 64, "grid": (6, 6)}, "bfloat16")
    lead, size = (3, config.num_heads), config.query_dim
    rows, log_weight = random(*lead, ROWS, size), jnp.zeros((*lead, ROWS))
    values = random(*lead, ROWS, config.value_dim)
    ring = Ring(random(*lead, size, config.value_dim), rows, values, log_weight)
    projection = random(lead[0], layer.projection.shape[1])
    recent, x = random(3, num_recent(config.grid[1]), config.width), random(3, config.width)

    def run(ring, recent, x):
        def step(i, carry):
            ring, recent, x = carry
            _, ring = decode_triton.mix(
                ring,
                projection,
                1 + i,
                log_factor=layer.log_factor,
                turns=weights.turns,
                gate_bias=layer.gate_bias,
                epsilon=NORM_EPSILON,
            )
            x, recent = decode_triton.norm_conv(
                x,
                recent,
                1 + i,
                taps=layer.conv,
                offsets=TAPS,
                columns=config.grid[1],
                epsilon=NORM_EPSILON,
            )
            return ring, recent, x

        return jax.lax.fori_loop(0, 5, step, (ring, recent, x))

    text = lower("A100", run, ring, recent, x)
    assert text.count('name = "decode_mix"') == text.count('name = "decode_norm_conv"') == 1
