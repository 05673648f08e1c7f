"""Gated products against float64 formulas, plain and by their kernels."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import lower, on, quick_jit

from lasad_jax.config import MeshConfig
from lasad_jax.ops.keep import keep_policy
from lasad_jax.ops.kernels import choice
from lasad_jax.ops.kernels.gated_triton import Tiling
from lasad_jax.ops.passes import gated_products as module
from lasad_jax.ops.passes.gated_products import fused, gated_heads_product, kernels, swiglu_product
from lasad_jax.training.sharding import BATCH_AXES, batch_sharding, make_mesh

# B, N, F, D
SWIGLU_CASES = [(1, 1, 16, 8), (2, 7, 48, 16), (3, 5, 320, 24), (2, 16, 256, 8), (2, 9, 50, 12)]
# B, N, H, Dv, W, gate_start, D
HEADS_CASES = [
    (2, 16, 3, 64, 264, 192, 16),
    (1, 1, 1, 16, 16, 0, 8),
    (2, 5, 3, 12, 33, 17, 20),
    (3, 7, 2, 32, 80, 48, 8),
]
TOLERANCES = {jnp.float32: 2e-6, jnp.bfloat16: 6e-3, jnp.float16: 8e-4}
EPSILON = 1e-2


def draw(*shapes, seed=0):
    """Float64 arrays of numbers that bf16 holds."""
    rng = np.random.default_rng([seed, *map(len, shapes), *(n for shape in shapes for n in shape)])
    return [np.float64(rng.standard_normal(shape).astype(jnp.bfloat16)) for shape in shapes]


def swiglu_inputs(batch, num_tokens, hidden, width):
    gate_up, kernel, d_out = draw(
        (batch, num_tokens, 2, hidden), (hidden, width), (batch, num_tokens, width)
    )
    return (gate_up * 2, kernel), d_out


def heads_inputs(batch, num_tokens, num_heads, value_dim, joint, _, width):
    lead = (batch, num_tokens, num_heads)
    o, y, kernel, d_out = draw(
        (*lead, value_dim), (*lead, joint), (num_heads, value_dim, width), (*lead[:2], width)
    )
    # A head whose mean square is small beside epsilon.
    o[0, 0, 0] /= 64
    return (o, y * 2, kernel), d_out


def silu(x):
    """silu and its derivative."""
    share = 1 / (1 + np.exp(-x))
    return x * share, share * (1 + x * (1 - share))


def swiglu_oracle(gate_up, kernel, d_out):
    (gate, slope), up, d_h = silu(gate_up[:, :, 0]), gate_up[:, :, 1], d_out @ kernel.T
    return {
        "out": (gate * up) @ kernel,
        "gate_up": np.stack([d_h * up * slope, d_h * gate], axis=2),
        "kernel": np.einsum("bnf,bnd->fd", gate * up, d_out),
    }


def heads_oracle(o, y, kernel, d_out, gate_start):
    """With the whole Jacobian of the norm."""
    value_dim, d_y = o.shape[-1], np.zeros_like(y)
    gate, slope = silu(y[..., gate_start : gate_start + value_dim])
    scale = np.mean(o**2, axis=-1, keepdims=True) + EPSILON
    normal = o / np.sqrt(scale)
    outer = o[..., :, None] * o[..., None, :]
    jacobian = (np.eye(value_dim) - outer / (value_dim * scale[..., None])) / scale[
        ..., None
    ] ** 0.5
    d_h = np.einsum("bnd,hvd->bnhv", d_out, kernel)
    d_y[..., gate_start : gate_start + value_dim] = d_h * normal * slope
    return {
        "out": np.einsum("bnhv,hvd->bnd", normal * gate, kernel),
        "o": np.einsum("bnhvw,bnhw->bnhv", jacobian, d_h * gate),
        "y": d_y,
        "kernel": np.einsum("bnhv,bnd->hvd", normal * gate, d_out),
    }


def results(function, names, args, d_out):
    out, pullback = jax.vjp(function, *args)
    return {"out": out, **dict(zip(names, pullback(d_out), strict=True))}


swiglu_results = functools.partial(results, names=("gate_up", "kernel"))
heads_results = functools.partial(results, names=("o", "y", "kernel"))


def assert_close(got, want, tolerance):
    """In norm; NaN anywhere is far."""
    assert got.keys() == want.keys()
    for name, y in want.items():
        x = np.asarray(got[name], np.float64)
        assert x.shape == y.shape, name
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y), name


def cast(args, d_out, dtype):
    return tuple(jnp.asarray(x, dtype) for x in args), jnp.asarray(d_out, dtype)


def swiglu_kernels(tiling=None):
    both = kernels("swiglu", interpret=True, tiling=tiling)
    return lambda gate_up, kernel: fused((gate_up,), kernel, *both)


@pytest.mark.parametrize("shape", SWIGLU_CASES)
def test_plain_swiglu_is_its_formula(shape):
    args, d_out = swiglu_inputs(*shape)
    want = swiglu_oracle(*args, d_out)
    run = quick_jit(lambda *args: swiglu_results(swiglu_product, args=args[:-1], d_out=args[-1]))
    for dtype, tolerance in TOLERANCES.items():
        few, d_few = cast(args, d_out, dtype)
        assert_close(run(*few, d_few), want, tolerance)
    with jax.enable_x64(True):
        exact, d_exact = cast(args, d_out, jnp.float64)
        assert_close(run(*exact, d_exact), want, 1e-14)


@pytest.mark.parametrize("shape", HEADS_CASES)
def test_plain_heads_are_their_formula(shape):
    args, d_out = heads_inputs(*shape)
    want = heads_oracle(*args, d_out, shape[5])
    function = functools.partial(gated_heads_product, gate_start=shape[5], epsilon=EPSILON)
    run = quick_jit(lambda *args: heads_results(function, args=args[:-1], d_out=args[-1]))
    for dtype, tolerance in TOLERANCES.items():
        few, d_few = cast(args, d_out, dtype)
        assert_close(run(*few, d_few), want, tolerance)
    with jax.enable_x64(True):
        exact, d_exact = cast(args, d_out, jnp.float64)
        assert_close(run(*exact, d_exact), want, 1e-13)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("tiling", [None, Tiling(4, 32)])
@pytest.mark.parametrize("shape", SWIGLU_CASES)
def test_swiglu_kernels_are_the_formula(shape, tiling, dtype):
    args, d_out = swiglu_inputs(*shape)
    want = swiglu_oracle(*args, d_out)
    run = quick_jit(
        lambda *args: swiglu_results(swiglu_kernels(tiling), args=args[:-1], d_out=args[-1])
    )
    args, d_out = cast(args, d_out, dtype)
    assert_close(run(*args, d_out), want, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("shape", HEADS_CASES)
def test_heads_kernels_are_the_formula(shape, rows, dtype):
    """They leave the other columns of d_y as they are: NaN, where kernels are interpreted."""
    args, d_out = heads_inputs(*shape)
    start, value_dim = shape[5], shape[3]
    want = heads_oracle(*args, d_out, start)
    tiling = rows and Tiling(rows, 1 << (value_dim - 1).bit_length())
    both = kernels("heads", gate_start=start, epsilon=EPSILON, interpret=True, tiling=tiling)
    function = lambda o, y, kernel: fused((o, y), kernel, *both)
    run = quick_jit(lambda *args: heads_results(function, args=args[:-1], d_out=args[-1]))
    args, d_out = cast(args, d_out, dtype)
    got = {name: np.asarray(x, np.float64) for name, x in run(*args, d_out).items()}
    gate = np.arange(got["y"].shape[-1])
    gate = (gate >= start) & (gate < start + value_dim)
    assert np.isnan(got["y"][..., ~gate]).all()
    got["y"] = np.where(gate, got["y"], 0.0)
    assert_close(got, want, TOLERANCES[dtype])


def as_on_a_gpu(monkeypatch, seen=None):
    """The public functions take their kernels, interpreted; `seen` gets shapes of the gradients."""
    make = module.kernels

    def interpreted(name, **options):
        forward, backward = make(name, **options, interpret=True)

        def backward_seen(*args):
            if seen is not None:
                seen.append(args[0].shape)
            return backward(*args)

        return forward, backward_seen

    monkeypatch.setattr(module, "kernels", interpreted)
    monkeypatch.setattr(choice, "device", lambda: choice.Device("gpu", "NVIDIA A100"))


@pytest.mark.parametrize("partial", [False, True])
def test_other_columns_of_the_gradient_are_zero_unless_left(partial, monkeypatch):
    """And those left are for a function that overwrites them."""
    as_on_a_gpu(monkeypatch)
    shape = (2, 5, 3, 16, 40, 20, 8)
    args, d_out = heads_inputs(*shape)
    want = heads_oracle(*args, d_out, 20)
    args, d_out = cast(args, d_out, jnp.float32)

    @jax.custom_vjp
    def source(y):
        return y

    def overwrite(_, d_y):
        return (jnp.zeros_like(d_y).at[..., 20:36].set(d_y[..., 20:36]),)

    source.defvjp(lambda y: (y, None), overwrite)

    def function(o, y, kernel):
        y = source(y) if partial else y
        options = {"gate_start": 20, "epsilon": EPSILON, "partial_gradient": partial}
        return gated_heads_product(o, y, kernel, **options)

    assert_close(heads_results(function, args=args, d_out=d_out), want, 2e-6)


@pytest.mark.parametrize(("batch", "own"), [(8, 2), (3, 3)])
def test_each_device_has_its_own_images_and_channels(batch, own, monkeypatch):
    """The kernels send nothing; the sums that the products need are XLA's."""
    seen = []
    as_on_a_gpu(monkeypatch, seen)
    swiglu_args = swiglu_inputs(batch, 5, 32, 16)
    heads_args = heads_inputs(batch, 5, 4, 16, 40, 24, 16)
    wants = (
        swiglu_oracle(*swiglu_args[0], swiglu_args[1]),
        heads_oracle(*heads_args[0], heads_args[1], 24),
    )
    swiglu_args, heads_args = (cast(*args, jnp.float32) for args in (swiglu_args, heads_args))
    axes = {"batch_axes": BATCH_AXES if own < batch else None}
    feed = functools.partial(swiglu_product, hidden_axes="tensor", **axes)
    heads = functools.partial(
        gated_heads_product, gate_start=24, epsilon=EPSILON, head_axes="tensor", **axes
    )
    mesh = make_mesh(MeshConfig(2, 2, 2))

    def run(swiglu_args, heads_args):
        return (
            swiglu_results(feed, args=swiglu_args[0], d_out=swiglu_args[1]),
            heads_results(heads, args=heads_args[0], d_out=heads_args[1]),
        )

    with jax.set_mesh(mesh):
        if own < batch:
            put = lambda x: jax.device_put(x, batch_sharding(mesh)) if len(x) == batch else x
            swiglu_args, heads_args = jax.tree.map(put, (swiglu_args, heads_args))
        compiled = jax.jit(run).lower(swiglu_args, heads_args).compile()
        got = compiled(swiglu_args, heads_args)
    assert seen == [(own, 5, 2, 16), (own, 5, 2, 16)]
    for one, want in zip(got, wants, strict=True):
        assert_close(one, want, 2e-6)
    # No token is sent but as the sum over hidden channels or heads that a product is.
    tokens = re.findall(
        r"= f32\[([\d,]+)\]\{.* (?:all-gather|all-to-all|collective\S*)\(", compiled.as_text()
    )
    assert not [shape for shape in tokens if shape.startswith(f"{batch},")]


def test_lowers_to_one_launch_each_way():
    shape = jax.ShapeDtypeStruct
    heads = functools.partial(
        gated_heads_product, gate_start=192, epsilon=1e-5, partial_gradient=True
    )
    for dtype, width, hidden in (
        (jnp.bfloat16, 768, 1792),
        (jnp.float16, 80, 200),
        (jnp.float32, 1280, 3136),
    ):
        num_heads, d_out = width // 64 or 1, shape((2, 256, width), dtype)
        lead = (2, 256, num_heads)
        swiglu_args = shape((2, 256, 2, hidden), dtype), shape((hidden, width), dtype)
        heads_args = shape((*lead, 64), dtype), shape((*lead, 264), dtype)
        heads_args += (shape((num_heads, 64, width), dtype),)
        for name, function, args in (
            (
                "swiglu",
                lambda args, d_out: swiglu_results(swiglu_product, args=args, d_out=d_out),
                swiglu_args,
            ),
            ("heads", lambda args, d_out: heads_results(heads, args=args, d_out=d_out), heads_args),
        ):
            for device, launches in (("H200", 2), ("A100", 2), ("v5e", 0)):
                text = lower(device, function, args, d_out)
                assert len(re.findall(r"custom_call @__gpu\$xla\.gpu\.triton", text)) == launches
                assert (f"gated_{name}_backward" in text) == (launches > 0)


def test_a_rematerialised_layer_runs_the_backward_kernel_alone(monkeypatch):
    """Its residuals are what came in, and the forward kernel does not run again."""
    as_on_a_gpu(monkeypatch)
    (gate_up, kernel), d_out = cast(*swiglu_inputs(2, 7, 48, 16), jnp.float32)
    layer = jax.checkpoint(swiglu_product, policy=keep_policy)
    text = jax.jit(lambda args, d_out: jax.vjp(layer, *args)[1](d_out)).trace(
        (gate_up, kernel), d_out
    )
    text = str(text.jaxpr)
    assert text.count("name=gated_swiglu_backward") == 1
    _, pullback = jax.vjp(layer, gate_up, kernel)
    held = sum(x.size for x in jax.tree.leaves(pullback))
    assert held == gate_up.size + kernel.size


def test_bad_input_is_refused():
    gate_up, kernel = jnp.zeros((2, 7, 2, 16)), jnp.zeros((16, 8))
    cases = [
        ({"implementation": "fast"}, "'fast' is not one of"),
        ({"gate_up": gate_up[:, :, 0]}, r"gate_up: expected \(B, N, 2, F\)"),
        ({"kernel": kernel[:4]}, r"kernel: expected float32 of shape \(16, 'D'\)"),
        ({"kernel": kernel.astype(jnp.bfloat16)}, "got bfloat16"),
        ({"implementation": "triton"}, "needs an NVIDIA GPU"),
    ]
    for changes, reason in cases:
        with pytest.raises(ValueError, match=reason):
            swiglu_product(**({"gate_up": gate_up, "kernel": kernel} | changes))
    o, y, kernel = jnp.zeros((2, 7, 3, 16)), jnp.zeros((2, 7, 3, 40)), jnp.zeros((3, 16, 8))
    good = {"o": o, "y": y, "kernel": kernel, "gate_start": 24, "epsilon": EPSILON}
    cases = [
        ({"gate_start": 25}, "40 columns hold no 16 from 25 on"),
        ({"gate_start": -1}, "gate_start"),
        ({"y": y[:, :6]}, "o, y: expected"),
        ({"y": y.astype(jnp.bfloat16)}, "of one dtype"),
        ({"kernel": kernel[:2]}, r"kernel: expected float32 of shape \(3, 16, 'D'\)"),
    ]
    for changes, reason in cases:
        with pytest.raises(ValueError, match=reason):
            gated_heads_product(**(good | changes))
    with on("H200"), pytest.raises(ValueError, match="not int32"):
        whole = gate_up.astype(jnp.int32), jnp.zeros((16, 8), jnp.int32)
        swiglu_product(*whole, implementation="triton")
