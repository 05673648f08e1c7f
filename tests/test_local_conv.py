"""The local convolution against a loop over neighbours in float64, plain and by its kernels."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from kernel_cases import lower, on, quick_jit

from lasad_jax.config import MeshConfig
from lasad_jax.models import ModelConfig
from lasad_jax.models.local_conv import LocalConv
from lasad_jax.ops.kernels import choice
from lasad_jax.ops.kernels.local_conv_triton import Tiling
from lasad_jax.ops.passes import local_conv as module
from lasad_jax.ops.passes.local_conv import fused, kernels, local_conv
from lasad_jax.training.sharding import RULES, batch_sharding, make_mesh

# grid, P, N, D
CASES = [
    ((1, 7), 1, 8, 16),
    ((5, 1), 1, 6, 32),
    ((3, 5), 1, 13, 80),
    ((6, 6), 1, 37, 48),
    ((4, 9), 0, 36, 24),
    ((3, 4), 3, 15, 16),
    ((3, 4), 3, 2, 16),
    ((1, 1), 1, 1, 20),
]
TOLERANCES = {jnp.float32: 2e-6, jnp.bfloat16: 4e-3, jnp.float16: 6e-4}


def inputs(grid, num_prefix, num_tokens, width, batch=2, seed=0):
    """x, kernel and a cotangent in float64; tokens are representable in bf16."""
    rng = np.random.default_rng([seed, *grid, num_prefix, num_tokens, width])
    x, d_y = np.float64(rng.standard_normal((2, batch, num_tokens, width)).astype(jnp.bfloat16))
    kernel = np.float64(rng.standard_normal((13, width)).astype(np.float32))
    return (x, kernel), d_y


def oracle(x, kernel, d_y, grid, num_prefix):
    """y and all gradients, one pair of neighbours at a time."""
    y, d_x, d_kernel = x * (1 + kernel[0]), d_y * (1 + kernel[0]), np.zeros_like(kernel)
    d_kernel[0] = (d_y * x).sum((0, 1))
    for n in range(num_prefix, x.shape[1]):
        row, column = divmod(n - num_prefix, grid[1])
        left = [(row, column - 1), (row, column - 2)]
        above = [(row - up, column + right) for up in (1, 2) for right in range(-2, 3)]
        for tap, (r, c) in enumerate(left + above, 1):
            if r >= 0 and 0 <= c < grid[1]:
                m = num_prefix + r * grid[1] + c
                y[:, n] += kernel[tap] * x[:, m]
                d_x[:, m] += kernel[tap] * d_y[:, n]
                d_kernel[tap] += (d_y[:, n] * x[:, m]).sum(0)
    return {"y": y, "x": d_x, "kernel": d_kernel}


def results(function, args, d_y):
    y, pullback = jax.vjp(function, *args)
    return {"y": y, **dict(zip(("x", "kernel"), pullback(d_y), strict=True))}


def assert_close(got, want, tolerance):
    """In norm; NaN anywhere is far."""
    assert got.keys() == want.keys()
    for name, y in want.items():
        x = np.asarray(got[name], np.float64)
        assert x.shape == y.shape, name
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y), name


def cast(args, d_y, dtype):
    (x, *others), wide = args, jnp.promote_types(dtype, jnp.float32)
    return (jnp.asarray(x, dtype), *(jnp.asarray(z, wide) for z in others)), jnp.asarray(d_y, dtype)


@pytest.mark.parametrize(("grid", "num_prefix", "num_tokens", "width"), CASES)
def test_the_plain_form_is_a_loop_over_neighbours(grid, num_prefix, num_tokens, width):
    args, d_y = inputs(grid, num_prefix, num_tokens, width)
    want = oracle(*args, d_y, grid, num_prefix)
    convolve = functools.partial(local_conv, grid=grid, num_prefix=num_prefix)
    run = quick_jit(functools.partial(results, convolve))
    for dtype, tolerance in TOLERANCES.items():
        assert_close(run(*cast(args, d_y, dtype)), want, tolerance)
    with jax.enable_x64(True):
        assert_close(run(*cast(args, d_y, jnp.float64)), want, 1e-14)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("how", ["rows", "tiles", Tiling(4, 32, segments=3)], ids=str)
@pytest.mark.parametrize(("grid", "num_prefix", "num_tokens", "width"), CASES)
def test_kernels_are_a_loop_over_neighbours(
    grid, num_prefix, num_tokens, width, how, dtype, monkeypatch
):
    args, d_y = inputs(grid, num_prefix, num_tokens, width)
    monkeypatch.setattr(module, "_NARROW", 99 if how == "rows" else 0)
    tiling = {} if isinstance(how, str) else {"tiling": how}
    both = kernels(columns=grid[1], num_prefix=num_prefix, **tiling, interpret=True)
    run = quick_jit(functools.partial(results, lambda *args: fused(*args, *both)))
    want = oracle(*args, d_y, grid, num_prefix)
    args, d_y = cast(args, d_y, dtype)
    assert_close(run(args, d_y), want, TOLERANCES[dtype])


def test_lowers_to_one_launch_each_way():
    shape = jax.ShapeDtypeStruct
    for dtype, width in ((jnp.bfloat16, 768), (jnp.float16, 80), (jnp.float32, 1280)):
        x = shape((2, 256, width), dtype)
        args = (x, shape((13, width), jnp.float32))
        convolve = functools.partial(local_conv, grid=(16, 16))
        run = functools.partial(results, convolve)
        for device, launches in (("H200", 2), ("A100", 2), ("v5e", 0)):
            text = lower(device, run, args, x)
            assert len(re.findall(r"custom_call @__gpu\$xla\.gpu\.triton", text)) == launches
            names = [f"local_conv_{way}" in text for way in ("forward", "backward")]
            assert names == [launches > 0] * 2


@pytest.mark.parametrize(("batch", "own"), [(8, 2), (3, 3)])
def test_each_device_convolves_its_own_images(batch, own, monkeypatch):
    """And d_kernel adds up over devices; the width of the model is split over some, too."""
    args, d_y = inputs((3, 5), 1, 16, 16, batch=batch)
    want = oracle(*args, d_y, (3, 5), 1)
    args, d_y = cast(args, d_y, jnp.float32)
    seen, make = [], module.kernels

    def interpreted(**options):
        forward, backward = make(**options, interpret=True)
        return lambda x, *rest: (seen.append(x.shape[0]), forward(x, *rest))[1], backward

    monkeypatch.setattr(module, "kernels", interpreted)
    monkeypatch.setattr(choice, "device", lambda: choice.Device("gpu", "NVIDIA A100"))
    conv = LocalConv(ModelConfig(grid=(3, 5), width=16, num_heads=1, dtype="float32"))

    def convolve(x, kernel):
        return conv.apply({"params": {"kernel": kernel}}, x)[0]

    mesh = make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        if own < batch:
            x, kernel = args
            x, d_y = jax.device_put((x, d_y), batch_sharding(mesh))
            args = (x, kernel)
        run = jax.jit(functools.partial(results, convolve)).lower(args, d_y).compile()
        got = run(args, d_y)
    assert set(seen) == {own}
    assert_close(got, want, 2e-6)
    sent = re.findall(r"= (\S+?)\{.* (?:all-|collective-|reduce-scatter)\S*\(", run.as_text())
    assert sent == (["f32[13,16]"] if own < batch else [])


def test_bad_input_is_refused():
    x, kernel = (jnp.zeros(shape) for shape in ((2, 7, 16), (13, 16)))
    cases = [
        ({"implementation": "fast"}, "'fast' is not one of"),
        ({"grid": (1, 5)}, "N up to 6"),
        ({"kernel": kernel[:4]}, r"kernel: expected \(13, 16\)"),
        ({"implementation": "triton"}, "needs an NVIDIA GPU"),
    ]
    good = {"x": x, "kernel": kernel, "grid": (2, 3)}
    for changes, reason in cases:
        with pytest.raises(ValueError, match=reason):
            local_conv(**(good | changes))
    with on("H200"), pytest.raises(ValueError, match="not int32"):
        local_conv(x.astype(jnp.int32), kernel, grid=(2, 3), implementation="triton")


def test_one_token_at_a_time_is_the_sequence():
    """From the start and after a part of the sequence."""
    (x, kernel), _ = cast(*inputs((3, 5), 1, 16, 16), jnp.float32)
    conv = LocalConv(ModelConfig(grid=(3, 5), width=16, num_heads=1, dtype="float32"))
    apply = functools.partial(jax.jit(conv.apply), {"params": {"kernel": kernel}})
    want, nothing = apply(x)
    assert nothing is None
    for start in (1, 9):
        ring = jnp.full((2, 12, 16), 7.0)
        first, ring = apply(x[:, :start], ring)
        parts = [first]
        for n in range(start, 16):
            part, ring = apply(x[:, n : n + 1], ring, jnp.int32(n))
            parts.append(part)
        np.testing.assert_allclose(jnp.concatenate(parts, 1), want, atol=1e-5)
