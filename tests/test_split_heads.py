"""Queries, keys and values against float64, plain and by the fused kernels."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from kernel_cases import lower, on, quick_jit

from lasad_jax.config import MeshConfig
from lasad_jax.models.operator import mesh_axes
from lasad_jax.models.rope import rotate, turns
from lasad_jax.ops.kernels import choice
from lasad_jax.ops.kernels.split_heads_triton import Tiling
from lasad_jax.ops.passes import split_heads as module
from lasad_jax.ops.passes.split_heads import kernels, split_heads, with_gradient
from lasad_jax.training.sharding import RULES, make_mesh

# N, H, Dk, Dv, W, whether tokens turn
CASES = [
    (5, 3, 16, 16, 72, True),
    (7, 1, 12, 20, 65, True),
    (1, 5, 24, 8, 67, True),
    (33, 2, 8, 16, 48, True),
    (6, 2, 16, 4, 48, False),
    (9, 1, 7, 3, 20, False),
]
TOLERANCES = {jnp.float32: 2e-6, jnp.bfloat16: 4e-3, jnp.float16: 6e-4}
NAMES = ("q", "k", "v", "gate", "y", "d_y")


def options(case):
    _, _, key_dim, value_dim, width, _ = case
    gated = width > 2 * (key_dim + value_dim)
    return {"key_dim": key_dim, "value_dim": value_dim, "q_scale": 0.3, "gated": gated}


def inputs(case, batch=2):
    """y, the angles and the gradients of all five results, in float64 but representable in bf16.

    The gradient of y is NaN wherever it should not be read.
    """
    num_tokens, num_heads, key_dim, value_dim, width, turns = case
    rng = np.random.default_rng([batch, *case])
    draw = lambda *shape: np.float64(rng.normal(0, 3, shape).astype(jnp.bfloat16))
    lead = (batch, num_tokens, num_heads)
    y, d_y = draw(2, *lead, width)
    own = np.ones(width, bool)
    own[2 * key_dim + value_dim : 2 * (key_dim + value_dim)] = False
    d_y[..., own] = np.nan
    d_gate = draw(*lead) if options(case)["gated"] else None
    cotangents = (draw(*lead, key_dim), draw(*lead, key_dim), draw(*lead, value_dim), d_gate, d_y)
    angles = rng.uniform(-4, 4, (num_tokens, key_dim // 2)) if turns else None
    return y, angles, cotangents


def oracle(y, angles, cotangents, *, key_dim, value_dim, q_scale, gated):
    """All results and the gradient, with pairs as complex numbers."""
    ends = np.cumsum([key_dim, key_dim, value_dim, value_dim])
    q, k, v, _, rest = np.split(y, ends, axis=-1)
    d_q, d_k, d_v, d_gate, d_y = cotangents
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    turn = lambda x, sign: x if angles is None else _turned(x, sign * angles)
    slope = lambda x: sigmoid(x) * (1 + x * (1 - sigmoid(x)))
    parts = [turn(d_q, -1) * q_scale * slope(q), turn(d_k, -1) * slope(k), d_v]
    out_gate, d_rest = d_y[..., ends[2] : ends[3]], np.zeros_like(rest)
    if gated:
        d_rest[..., 0] = d_gate
    return {
        "q": turn(q * sigmoid(q), 1) * q_scale,
        "k": turn(k * sigmoid(k), 1),
        "v": v,
        "gate": rest[..., 0] if gated else None,
        "y": y,
        "d_y": np.concatenate([*parts, out_gate, d_rest], axis=-1),
    }


def _turned(x, angles):
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def table(angles, dtype=jnp.float32):
    if angles is None:
        return None
    return jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], axis=-1), dtype)


def cast(y, angles, cotangents, dtype):
    wide = jnp.promote_types(dtype, jnp.float32)
    *heads, gate, d_y = cotangents
    gate = None if gate is None else jnp.asarray(gate, wide)
    to = lambda x: jnp.asarray(x, dtype)
    return to(y), table(angles, wide), (*map(to, heads), gate, to(d_y))


def results(function, y, table, cotangents):
    out, pullback = jax.vjp(lambda y: function(y, table), y)
    return dict(zip(NAMES, (*out, *pullback(cotangents)), strict=True))


def assert_close(got, want, tolerance):
    """In norm, head by head; NaN anywhere is far."""
    assert got.keys() == want.keys()
    for name, y in want.items():
        if y is None:
            assert got[name] is None, name
            continue
        x = np.asarray(got[name], np.float64)
        assert x.shape == y.shape, name
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y), name


@pytest.mark.parametrize("case", CASES)
def test_the_plain_form_turns_complex_numbers(case):
    args = inputs(case)
    want = oracle(*args, **options(case))
    run = quick_jit(functools.partial(results, functools.partial(split_heads, **options(case))))
    for dtype, tolerance in TOLERANCES.items():
        got = run(*cast(*args, dtype))
        assert_close(got, want, tolerance)
        assert case[4] % 8 or got["gate"] is None or got["gate"].dtype == jnp.float32
    with jax.enable_x64(True):
        assert_close(run(*cast(*args, jnp.float64)), want, 1e-14)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("tiling", [None, Tiling(4)])
@pytest.mark.parametrize("case", CASES)
def test_kernels_turn_complex_numbers(case, tiling, dtype):
    args = inputs(case)
    both = kernels(**options(case), tiling=tiling, interpret=True)
    run = quick_jit(functools.partial(results, lambda *args: with_gradient(*args, *both)))
    want = oracle(*args, **options(case))
    assert_close(run(*cast(*args, dtype)), want, TOLERANCES[dtype])


def test_tails_of_silu_are_finite():
    """Far out on both sides, where exponentials overflow."""
    case = (6, 1, 4, 4, 24, False)
    y = np.full((1, 6, 1, 24), [[[x]] for x in (-3e4, -200, -89, 89, 200, 3e4)])
    _, angles, cotangents = inputs(case, batch=1)
    with np.errstate(over="ignore"):
        want = oracle(y, angles, cotangents, **options(case))
    both = kernels(**options(case), interpret=True)
    for split in (
        functools.partial(split_heads, **options(case)),
        lambda *args: with_gradient(*args, *both),
    ):
        got = results(split, *cast(y, angles, cotangents, jnp.float32))
        assert_close(got, want, 2e-6)


def test_turns_as_rotary_embedding_does():
    """A table of its cosines and sines gives its result, the prefix's token included."""
    rng = np.random.default_rng(0)
    y = jnp.asarray(rng.standard_normal((2, 13, 2, 40)), jnp.float32)
    first = jnp.broadcast_to(jnp.tile(jnp.array([1.0, 0.0]), 4), (1, 13, 1, 8))
    turn = rotate(
        first, turns((3, 4), first.shape[-1], 0, first.shape[1], prefix_scale=1.0)
    ).reshape(13, 4, 2)
    q, k, *_ = split_heads(y, turn, key_dim=8, value_dim=8, q_scale=0.5)
    for got, x, scale in ((q, y[..., :8], 0.5), (k, y[..., 8:16], 1.0)):
        want = (
            rotate(jax.nn.silu(x), turns((3, 4), x.shape[-1], 0, x.shape[1], prefix_scale=1.0))
            * scale
        )
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_keeps_nothing_but_its_arguments():
    case = CASES[0]
    y, turn, _ = cast(*inputs(case), jnp.bfloat16)
    both = kernels(**options(case), interpret=True)
    for split in (
        functools.partial(split_heads, **options(case)),
        lambda *args: with_gradient(*args, *both),
    ):
        _, pullback = jax.vjp(lambda y, split=split: split(y, turn), y)
        kept = [x for x in jax.tree.leaves(pullback) if isinstance(x, jax.Array)]
        assert sorted(x.shape for x in kept) == sorted((y.shape, turn.shape))


def test_lowers_to_one_launch_each_way_in_place():
    shape = jax.ShapeDtypeStruct
    for dtype, key_dim, num_tokens in ((jnp.bfloat16, 64, 256), (jnp.float32, 48, 7)):
        lead, width = (2, num_tokens, 3), 2 * key_dim + 136
        split = functools.partial(split_heads, key_dim=key_dim, value_dim=64, q_scale=0.1)
        y, turn = shape((*lead, width), dtype), shape((num_tokens, key_dim // 2, 2), jnp.float32)
        heads = [shape((*lead, size), dtype) for size in (key_dim, key_dim, 64)]
        cotangents = (*heads, shape(lead, jnp.float32), y)
        run = functools.partial(results, split)
        for device, launches in (("H200", 2), ("A100", 2), ("v5e", 0)):
            text = lower(device, run, y, turn, cotangents)
            calls = re.findall(r"custom_call @__gpu\$xla\.gpu\.triton.*", text)
            assert len(calls) == launches
            names = [f"split_heads_{way}" in text for way in ("forward", "backward")]
            assert names == [launches > 0] * 2
            assert ["output_operand_alias" in call for call in calls] == [False, True][:launches]


@pytest.mark.parametrize(("batch", "own"), [(4, (1, 2)), (3, (3, 2))])
def test_each_device_splits_its_own_images_and_heads(batch, own, monkeypatch):
    case = (5, 4, 8, 8, 40, True)
    args = inputs(case, batch=batch)
    want = oracle(*args, **options(case))
    seen, make = [], module.kernels

    def interpreted(**options):
        forward, backward = make(**options, interpret=True)
        return lambda y, table: (seen.append(y.shape[::2]), forward(y, table))[1], backward

    monkeypatch.setattr(module, "kernels", interpreted)
    monkeypatch.setattr(choice, "device", lambda: choice.Device("gpu", "NVIDIA A100"))

    def split(y, turn):
        axes = {"batch_axes": mesh_axes("batch", batch), "head_axes": mesh_axes("heads", 4)}
        return split_heads(y, turn, **options(case), **axes)

    mesh = make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        spec = jax.P(mesh_axes("batch", batch), None, mesh_axes("heads", 4))
        y, turn, cotangents = cast(*args, jnp.float32)
        y, cotangents = jax.device_put((y, cotangents), jax.NamedSharding(mesh, spec))
        run = jax.jit(functools.partial(results, split)).lower(y, turn, cotangents).compile()
        got = run(y, turn, cotangents)
    assert set(seen) == {own}
    assert_close(got, want, 2e-6)
    assert not re.findall(r" (?:all-|collective-|reduce-scatter)\S*\(", run.as_text())


def test_bad_input_is_refused():
    y, turn = jnp.zeros((2, 5, 3, 40)), jnp.zeros((5, 4, 2))
    good = {"y": y, "table": turn, "key_dim": 8, "value_dim": 8, "q_scale": 1.0}
    cases = [
        ({"implementation": "fast"}, "'fast' is not one of"),
        ({"value_dim": 12}, r"y: expected \(B, N, H, W\) with W above 40"),
        ({"gated": False}, r"with W of 32, .*gated=False; got \(2, 5, 3, 40\)"),
        ({"y": y[0]}, "y: expected"),
        ({"table": turn[:4]}, r"table: expected \(5, 4, 2\)"),
        ({"key_dim": 7}, "key_dim: 7 is odd"),
        ({"implementation": "triton"}, "needs an NVIDIA GPU"),
    ]
    for changes, reason in cases:
        with pytest.raises(ValueError, match=reason):
            split_heads(**(good | changes))
    whole = {"y": y.astype(jnp.int32), "implementation": "triton"}
    with on("H200"), pytest.raises(ValueError, match="not int32"):
        split_heads(**(good | whole))
