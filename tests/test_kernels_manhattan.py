"""The fused exact 2D decay, interpreted on a CPU, against the quadratic form in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import padded, quick_jit
from ops_cases import assert_close

from lasad_jax.ops import ManhattanDecay, linear_attention
from lasad_jax.ops.kernels import manhattan_tpu, manhattan_triton
from lasad_jax.ops.kernels.manhattan import fused_manhattan
from lasad_jax.ops.kernels.manhattan_tiles import Tiling

TOLERANCES = {jnp.float32: (1e-5, 1e-5), jnp.bfloat16: (3e-3, 5e-3)}
RATES = np.array([1e-4, 0.03, 0.7, 20.0, 300.0], np.float32)
TRITON = {"tiling": Tiling(outer=16, inner=16, num_warps=4, num_stages=2)}
TPU = {"tile": 16}


def make_args(grid, num_prefix, dtype, *, num_tokens=None, widths=(16, 16), batch=1, heads=5):
    """Tokens and a cotangent of values that bf16 holds exactly, and rates of either kind."""
    rng = np.random.default_rng(0)
    num_tokens = num_tokens or num_prefix + grid[0] * grid[1]
    key_dim, value_dim = widths
    tokens = [
        jnp.asarray(rng.standard_normal((batch, num_tokens, heads, width)), jnp.bfloat16)
        for width in (key_dim, key_dim, value_dim, value_dim)
    ]
    q, k, v, cotangent = (x.astype(dtype) for x in tokens)
    return (q, k, v, ManhattanDecay(RATES[:heads], np.roll(RATES, 2)[:heads])), cotangent


def fused(grid, num_prefix, static=TRITON):
    """The call with a backend's kernels; `static` says whose, and how they are cut."""
    module = manhattan_tpu if "tile" in static else manhattan_triton
    forward, backward = (
        functools.partial(kernel, **static, interpret=True)
        for kernel in (module.forward, module.backward)
    )
    return functools.partial(
        fused_manhattan,
        columns=grid[1],
        num_prefix=num_prefix,
        forward=forward,
        backward=backward,
    )


def value_and_gradients(operator, args, cotangent):
    out, pullback = jax.vjp(operator, *args)
    dq, dk, dv, d_decay = pullback(cotangent)
    return {"out": out, "q": dq, "k": dk, "v": dv, "rates": d_decay}


def exact(grid, num_prefix, args, cotangent):
    """Results from the weight of every pair of tokens, in float64."""
    (*tokens, decay), num_tokens = args, cotangent.shape[1]
    q, k, v, cotangent = (padded(np.float64(x)) for x in (*tokens, cotangent))
    with jax.enable_x64(True):
        args = q, k, v, jax.tree.map(np.float64, decay)
        results = jax.tree.map(np.asarray, _exact(args, cotangent, grid[1], num_prefix))
    return {name: x if name == "rates" else x[:, :num_tokens] for name, x in results.items()}


@quick_jit
def _exact(args, cotangent, columns, num_prefix):
    def operator(q, k, v, decay):
        t = jnp.arange(q.shape[1])
        row, column = jnp.divmod(t - num_prefix, columns)
        rows, steps = (x[:, None] - x for x in (row, column))
        far = decay.row_rate * rows[..., None] + decay.column_rate * jnp.abs(steps)[..., None]
        weights = jnp.where((t < num_prefix)[:, None], 1.0, jnp.exp(-jnp.maximum(far, 0)))
        weights = jnp.where((t[:, None] >= t)[..., None], weights, 0.0)
        return jnp.einsum("bthd,bshd,tsh,bshe->bthe", q, k, weights, v)

    return value_and_gradients(operator, args, cotangent)


def check(grid, num_prefix, dtype, *, static=TRITON, **kwargs):
    args, cotangent = make_args(grid, num_prefix, dtype, **kwargs)
    run = quick_jit(functools.partial(value_and_gradients, fused(grid, num_prefix, static)))
    got, want = run(args, cotangent), exact(grid, num_prefix, args, cotangent)
    same_bits = lambda x, y: x.tobytes() == y.tobytes()
    assert jax.tree.all(jax.tree.map(same_bits, got, run(args, cotangent)))
    assert all(got[x].dtype == dtype for x in ("out", "q", "k", "v"))
    tokens, rates = TOLERANCES[dtype]
    d_rates, want_d_rates = got.pop("rates"), want.pop("rates")
    assert_close(got, want, tokens)
    # Head by head: rates far apart have gradients far apart. Those of immense rates are 0.
    for name in ("row_rate", "column_rate"):
        a, b = (np.asarray(getattr(x, name), np.float64) for x in (d_rates, want_d_rates))
        np.testing.assert_allclose(a, b, rtol=rates, atol=rates * 1e-6 * np.abs(b).max())


@pytest.mark.parametrize(
    ("grid", "num_prefix", "dtype"),
    [
        ((1, 40), 1, jnp.float32),
        ((40, 1), 1, jnp.bfloat16),
        ((5, 7), 0, jnp.float32),
        ((5, 7), 2, jnp.bfloat16),
    ],
)
def test_equals_the_quadratic_form(grid, num_prefix, dtype):
    check(grid, num_prefix, dtype)


@pytest.mark.parametrize("num_tokens", [2, 47])
def test_partial_images(num_tokens):
    check((7, 9), 1, jnp.float32, num_tokens=num_tokens)


def test_keys_and_values_of_different_widths():
    check((6, 8), 1, jnp.bfloat16, widths=(16, 64), batch=2)


def test_outer_tiles_much_longer_than_inner_ones():
    check((8, 16), 1, jnp.float32, static={"tiling": Tiling(64, 16, num_warps=4, num_stages=2)})


def test_default_tilings():
    check((7, 24), 1, jnp.float32, static={"tiling": None})


@pytest.mark.parametrize(
    ("grid", "num_prefix", "dtype", "options"),
    [
        ((7, 5), 1, jnp.bfloat16, {"widths": (16, 32), "heads": 2}),  # a last tile of four tokens
        ((28, 1), 2, jnp.float32, {"widths": (64, 64), "heads": 3}),  # packs of two heads and one
        ((1, 33), 1, jnp.bfloat16, {"widths": (128, 128)}),  # five programs
        ((5, 9), 3, jnp.float32, {"num_tokens": 45, "heads": 2}),  # a part row
        ((3, 3), 0, jnp.float32, {"heads": 2}),  # a single tile
    ],
)
def test_tpu_kernels_equal_the_quadratic_form(grid, num_prefix, dtype, options):
    check(grid, num_prefix, dtype, static=TPU, **options)


@pytest.mark.parametrize("static", [TRITON, TPU], ids=["triton", "tpu"])
def test_prefix_tokens_alone(static):
    check((2, 2), 3, jnp.float32, static=static, num_tokens=2, heads=2)


def test_tpu_tiles_are_multiples_of_a_register():
    args, _ = make_args((3, 3), 0, jnp.float32)
    with pytest.raises(ValueError, match="tile: 24"):
        fused((3, 3), 0, {"tile": 24})(*args)


def test_under_vmap_remat_and_scan():
    """Mapped over some of the inputs, rates or not, within a rematerialised scan."""
    grid, axes = (4, 6), (1, None, 0, 0)
    args, _ = make_args(grid, 1, jnp.float32, heads=2)
    stack = lambda axis, x: x if axis is None else jnp.stack([x, x / 2, x / 3], axis)
    args = [
        jax.tree.map(functools.partial(stack, axis), x) for axis, x in zip(axes, args, strict=True)
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
        quick_jit(jax.grad(total(operator), argnums=(0, 1, 2, 3)))(*args)
        for operator in (fused(grid, 1), quadratic)
    )
    assert_close(got, want, 1e-5)
