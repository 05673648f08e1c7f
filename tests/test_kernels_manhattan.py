"""The fused exact 2D decay against the quadratic form in float64, and its lowering for GPUs."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_cases import assert_close

from lasad_jax.ops import ManhattanDecay, linear_attention
from lasad_jax.ops.kernels import manhattan_triton
from lasad_jax.ops.kernels.manhattan import fused_manhattan
from lasad_jax.ops.kernels.manhattan_tiles import Tiling

TOLERANCES = {jnp.float32: (1e-5, 1e-5), jnp.bfloat16: (3e-3, 5e-3)}
RATES = np.array([1e-4, 0.03, 0.7, 20.0, 300.0], np.float32)
SMALL = Tiling(outer=16, inner=16, num_warps=4, num_stages=2)


def make_args(grid, num_prefix, dtype, *, num_tokens=None, widths=(16, 16), batch=1, seed=0):
    """Tokens and a cotangent of values that bf16 holds exactly, and rates of either kind."""
    rng = np.random.default_rng(seed)
    heads = len(RATES)
    num_tokens = num_tokens or num_prefix + grid[0] * grid[1]
    key_dim, value_dim = widths
    tokens = [
        jnp.asarray(rng.standard_normal((batch, num_tokens, heads, width)), jnp.bfloat16)
        for width in (key_dim, key_dim, value_dim, value_dim)
    ]
    q, k, v, cotangent = (x.astype(dtype) for x in tokens)
    return (q, k, v, ManhattanDecay(RATES, np.roll(RATES, 2))), cotangent


def fused(grid, num_prefix, tiling=SMALL, interpret=True):
    static = {"tiling": tiling, "interpret": interpret}
    return functools.partial(
        fused_manhattan,
        grid=grid,
        num_prefix=num_prefix,
        forward=functools.partial(manhattan_triton.forward, **static),
        backward=functools.partial(manhattan_triton.backward, **static),
    )


def value_and_gradients(operator, args, cotangent):
    out, pullback = jax.vjp(operator, *args)
    dq, dk, dv, d_decay = pullback(cotangent)
    return {"out": out, "q": dq, "k": dk, "v": dv, "rates": d_decay}


def exact(grid, num_prefix, args, cotangent):
    with jax.enable_x64(True):
        args, cotangent = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (args, cotangent))
        operator = functools.partial(
            linear_attention, grid=grid, num_prefix=num_prefix, implementation="quadratic"
        )
        run = jax.jit(functools.partial(value_and_gradients, operator))
        return jax.tree.map(np.asarray, run(args, cotangent))


def check(grid, num_prefix, dtype, *, tiling=SMALL, **kwargs):
    args, cotangent = make_args(grid, num_prefix, dtype, **kwargs)
    run = jax.jit(functools.partial(value_and_gradients, fused(grid, num_prefix, tiling)))
    got, want = run(args, cotangent), exact(grid, num_prefix, args, cotangent)
    assert all(got[x].dtype == dtype for x in ("out", "q", "k", "v"))
    tokens, rates = TOLERANCES[dtype]
    d_rates, want_d_rates = got.pop("rates"), want.pop("rates")
    assert_close(got, want, tokens)
    # Head by head: rates far apart have gradients far apart. Those of immense rates are 0.
    for name in ("row_rate", "column_rate"):
        a, b = (np.asarray(getattr(x, name), np.float64) for x in (d_rates, want_d_rates))
        np.testing.assert_allclose(a, b, rtol=rates, atol=rates * 1e-6 * np.abs(b).max())


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("grid", [(1, 40), (40, 1), (5, 7), (8, 8), (9, 16)], ids=str)
def test_equals_the_quadratic_form(grid, dtype):
    check(grid, 1, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_prefix", [0, 2])
def test_other_prefixes(num_prefix, dtype):
    check((5, 7), num_prefix, dtype)


@pytest.mark.parametrize("num_tokens", [2, 30, 47])
def test_partial_images(num_tokens):
    check((7, 9), 1, jnp.float32, num_tokens=num_tokens)


@pytest.mark.parametrize(("widths", "dtype"), [((32, 16), jnp.float32), ((16, 64), jnp.bfloat16)])
def test_keys_and_values_of_different_widths(widths, dtype):
    check((6, 8), 1, dtype, widths=widths, batch=2)


@pytest.mark.parametrize(
    ("grid", "outer", "inner"), [((12, 12), 32, 16), ((6, 24), 64, 32), ((8, 16), 64, 16)]
)
def test_outer_tiles_longer_than_inner_ones(grid, outer, inner):
    check(grid, 1, jnp.float32, tiling=Tiling(outer, inner, num_warps=4, num_stages=2))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_default_tilings(dtype):
    check((11, 16), 1, dtype, tiling=None)


def test_prefix_tokens_alone():
    args, cotangent = make_args((2, 2), 3, jnp.float32, num_tokens=2)
    got = value_and_gradients(fused((2, 2), 3), args, cotangent)
    want = exact((2, 2), 3, args, cotangent)
    for name in ("out", "q", "k", "v"):
        assert_close(got[name], want[name], 1e-5)


@pytest.mark.parametrize("axes", [(0, 1, 2, None), (1, None, 0, 0)])
def test_under_vmap_remat_and_scan(axes):
    """Mapped over some of the inputs, rates or not, within a rematerialised scan."""
    grid = (4, 6)
    cases = [make_args(grid, 1, jnp.float32, seed=seed)[0] for seed in range(3)]
    stack = lambda axis, *x: x[0] if axis is None else jnp.stack(x, axis)
    args = [
        jax.tree.map(functools.partial(stack, axis), *parts)
        for axis, parts in zip(axes, zip(*cases, strict=True), strict=True)
    ]

    def total(operator):
        def layers(q, k, v, decay):
            layer = jax.checkpoint(lambda v, _: (operator(q, k, v, decay) / 8, None))
            return jnp.sum(jnp.sin(jax.lax.scan(layer, v, None, length=2)[0]))

        return lambda *args: jnp.sum(jax.vmap(layers, in_axes=axes)(*args))

    quadratic = functools.partial(
        linear_attention, grid=grid, num_prefix=1, implementation="quadratic"
    )
    got, want = (
        jax.jit(jax.grad(total(operator), argnums=(0, 1, 2, 3)))(*args)
        for operator in (fused(grid, 1), quadratic)
    )
    assert_close(got, want, 1e-5)


def test_same_inputs_give_the_same_bits():
    args, cotangent = make_args((6, 10), 1, jnp.bfloat16)
    run = jax.jit(functools.partial(value_and_gradients, fused((6, 10), 1)))
    first, second = run(args, cotangent), run(args, cotangent)
    assert jax.tree.all(jax.tree.map(np.array_equal, first, second))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("grid", "width"), [((16, 16), 64), ((24, 24), 64), ((7, 9), 128)])
def test_lowers_for_gpus(grid, width, dtype):
    shape = jax.ShapeDtypeStruct((2, 1 + grid[0] * grid[1], 3, width), dtype)
    rate = jax.ShapeDtypeStruct((3,), jnp.float32)
    args = (shape, shape, shape, ManhattanDecay(rate, rate))
    run = functools.partial(value_and_gradients, fused(grid, 1, tiling=None, interpret=False))
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = jax.jit(run).trace(args, shape).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2
