"""All of a mixer's heads in one kernel each way, against the passes that it joins."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from kernel_cases import lower, quick_jit

from lasad_jax.config import MeshConfig
from lasad_jax.models.operator import mesh_axes
from lasad_jax.models.rope import turns
from lasad_jax.ops import NoDecay, RasterDecay, SequenceDecay, linear_attention
from lasad_jax.ops.passes import mixed_heads as module
from lasad_jax.ops.passes.gated_products import gated_heads_product
from lasad_jax.ops.passes.mixed_heads import log_factors, mixed_heads_product
from lasad_jax.ops.passes.split_heads import split_heads
from lasad_jax.training.sharding import RULES, make_mesh

# Decay, N, grid, H, Dk, Dv, whether there is a content gate, whether tokens turn
CASES = [
    (RasterDecay, 101, (10, 10), 2, 16, 16, True, True),
    (SequenceDecay, 70, (10, 10), 3, 16, 32, False, True),
    (NoDecay, 64, (8, 8), 1, 32, 16, True, False),
    (RasterDecay, 1, (2, 2), 2, 16, 16, True, True),
]
NAMES = ("out", "y", "kernel", "bias", "rates")
TOLERANCES = {jnp.float32: 2e-5, jnp.bfloat16: 1e-2}
EPSILON, Q_SCALE, D = 1e-3, 0.25, 24


def inputs(case, dtype, batch=2):
    """(y, kernel, bias, rates) and the gradient of the output; numbers that bf16 holds."""
    family, num_tokens, _, heads, key_dim, value_dim, gated, _ = case
    rng = np.random.default_rng([batch, num_tokens, heads, key_dim])
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16).astype(dtype)
    y = draw(batch, num_tokens, heads, 2 * (key_dim + value_dim) + 8 * gated)
    bias = draw(heads).astype(jnp.float32) - 2 if gated else None
    num_rates = {NoDecay: 0, SequenceDecay: 1, RasterDecay: 2}[family]
    rates = [jnp.abs(draw(heads)).astype(jnp.float32) for _ in range(num_rates)]
    kernel, d_out = draw(heads, value_dim, D) / 8, draw(batch, num_tokens, D)
    return (y, kernel, bias, rates), d_out


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels, without a GPU."""
    monkeypatch.setattr(module, "kernels", functools.partial(module.kernels, interpret=True))


def table_of(case):
    _, num_tokens, grid, _, key_dim, *_, rope = case
    return turns(grid, key_dim, 0, num_tokens, prefix_scale=1.0) if rope else None


def joined(case, y, kernel, bias, rates, **axes):
    family, num_tokens, grid, _, key_dim, *_ = case
    steps = log_factors(family(*rates), num_tokens, grid)
    options = {"key_dim": key_dim, "q_scale": Q_SCALE, "epsilon": EPSILON}
    return mixed_heads_product(y, kernel, steps, bias, table_of(case), **options, **axes)


def one_by_one(case, y, kernel, bias, rates):
    family, _, grid, _, key_dim, value_dim, gated, _ = case
    q, k, v, gate, y = split_heads(
        y, table_of(case), key_dim=key_dim, value_dim=value_dim, q_scale=Q_SCALE, gated=gated
    )
    gate = -jax.nn.softplus(gate + bias) if gated else None
    out = linear_attention(
        q, k, v, family(*rates), grid=grid, log_gate=gate, implementation="quadratic"
    )
    return gated_heads_product(out, y, kernel, gate_start=2 * key_dim + value_dim, epsilon=EPSILON)


def results(function, args, d_out):
    out, pullback = jax.vjp(function, *args)
    return out, *pullback(d_out)


def assert_close(got, want, tolerance):
    """Root mean square of the difference over that of what is wanted."""
    for name, x, y in zip(NAMES, got, want, strict=True):
        for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
            assert a.shape == b.shape, name
            a, b = np.float64(a), np.float64(b)
            assert np.square(a - b).mean() <= tolerance**2 * (np.square(b).mean() + 1e-6), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_passes_one_by_one(case, interpreted):
    for dtype, tolerance in TOLERANCES.items():
        args, d_out = inputs(case, dtype)
        got = quick_jit(functools.partial(results, functools.partial(joined, case)))(args, d_out)
        assert got[0].dtype == got[1].dtype == got[2].dtype == dtype
        # In float32 in any case: what bf16 rounds is the kernels' own.
        wide = lambda x: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), x)
        plain = functools.partial(results, functools.partial(one_by_one, case))
        assert_close(got, quick_jit(plain)(wide(args), wide(d_out)), tolerance)


def test_padding_has_no_gradient(interpreted):
    case = CASES[0]
    args, d_out = inputs(case, jnp.bfloat16)
    _, d_y, *_ = quick_jit(functools.partial(results, functools.partial(joined, case)))(args, d_out)
    assert np.abs(np.float32(d_y[..., 64])).max() > 0
    assert not np.any(np.float32(d_y[..., 65:]))


def test_lowers_to_one_launch_each_way():
    shape = jax.ShapeDtypeStruct
    y, kernel = shape((2, 256, 3, 200), jnp.bfloat16), shape((3, 64, D), jnp.bfloat16)
    steps, bias = shape((256, 3), jnp.float32), shape((3,), jnp.float32)
    table = shape((256, 16, 2), jnp.float32)
    options = {"key_dim": 32, "q_scale": 0.1, "epsilon": 1e-5}

    def both(y, kernel, steps, bias, table, d_out):
        run = lambda *args: mixed_heads_product(*args, table, **options)
        out, pullback = jax.vjp(run, y, kernel, steps, bias)
        return out, pullback(d_out)

    for device in ("H200", "A100"):
        text = lower(device, both, y, kernel, steps, bias, table, shape((2, 256, D), y.dtype))
        assert len(re.findall(r"custom_call @__gpu\$xla\.gpu\.triton", text)) == 2


@pytest.mark.parametrize(("batch", "own"), [(4, (1, 2)), (3, (3, 2))])
def test_each_device_takes_its_own_images_and_heads(batch, own, interpreted, monkeypatch):
    case = (RasterDecay, 20, (5, 5), 4, 16, 16, True, True)
    args, d_out = inputs(case, jnp.float32, batch=batch)
    want = jax.jit(functools.partial(results, functools.partial(one_by_one, case)))(args, d_out)
    seen, make = [], module.kernels

    def watched(**options):
        forward, backward = make(**options)
        watch = lambda y, *rest, **more: (seen.append(y.shape[::2]), forward(y, *rest, **more))[1]
        return watch, backward

    monkeypatch.setattr(module, "kernels", watched)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        axes = {"batch_axes": mesh_axes("batch", batch), "head_axes": mesh_axes("heads", 4)}
        run = functools.partial(joined, case, **axes)
        got = jax.jit(functools.partial(results, run))(args, d_out)
    assert set(seen) == {own}
    assert_close(got, want, 2e-5)


def test_bad_input_is_refused():
    shape = jnp.zeros
    good = {"y": shape((2, 5, 3, 72)), "kernel": shape((3, 16, 8)), "steps": shape((5, 3))}
    good |= {"bias": shape(3), "table": None, "key_dim": 16, "q_scale": 1.0, "epsilon": 1e-5}
    cases = [
        ({"key_dim": 24}, "key_dim: expected a power of two of at least 16, got 24"),
        ({"kernel": shape((2, 16, 8))}, r"kernel: expected float32 of shape \(3, 'Dv', 'D'\)"),
        ({"bias": None}, r"y: expected \(B, N, H, W\)"),
        ({"y": shape((2, 5, 3, 70))}, "a power of two more"),
        ({"steps": shape((4, 3))}, r"steps: expected \(5, 3\), tokens and heads; got \(4, 3\)"),
    ]
    for changes, reason in cases:
        with pytest.raises(ValueError, match=reason):
            mixed_heads_product(**(good | changes))
