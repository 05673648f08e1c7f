"""The SwiGLU inside its products, against float64 formulas and the products around it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from kernel_cases import lower, on, quick_jit

from lasad_jax.config import MeshConfig
from lasad_jax.models.operator import mesh_axes
from lasad_jax.ops.keep import keep_policy
from lasad_jax.ops.kernels import choice
from lasad_jax.ops.passes import feed_forward as module
from lasad_jax.ops.passes.feed_forward import by_turns, fused, join, kernels, swiglu
from lasad_jax.training.sharding import RULES, make_mesh

NEEDS_JAX_11 = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11"
)
# B, N, D, F, programs: rows and hidden channels that are no whole tiles; fewer tiles than programs
CASES = [(2, 100, 128, 192, 3), (1, 8, 64, 128, 5), (3, 129, 320, 128, 2), (1, 256, 128, 320, 1)]
NAMES = ("x", "gate", "up", "down")


def inputs(batch, num_tokens, width, hidden):
    """Kernels and tokens that bf16 holds, in float64, and the gradient of the output."""
    rng = np.random.default_rng([batch, num_tokens, width, hidden])
    draw = lambda *shape: np.float64(rng.standard_normal(shape).astype(jnp.bfloat16))
    x, d_out = draw(batch, num_tokens, width), draw(batch, num_tokens, width)
    return (x, draw(width, hidden) / 8, draw(width, hidden) / 8, draw(hidden, width) / 8), d_out


def oracle(x, gate, up, down, d_out):
    """Nothing is rounded."""
    (g, u), d_h = (x @ gate, x @ up), d_out @ down.T
    share = 1 / (1 + np.exp(-g))
    silu, slope = g * share, share * (1 + g * (1 - share))
    d_g, d_u = d_h * u * slope, d_h * silu
    over_tokens = lambda a, b: np.einsum("bni,bnj->ij", a, b)
    return {
        "out": (silu * u) @ down,
        "x": d_g @ gate.T + d_u @ up.T,
        "gate": over_tokens(x, d_g),
        "up": over_tokens(x, d_u),
        "down": over_tokens(silu * u, d_out),
    }


def results(function, args, d_out):
    out, pullback = jax.vjp(function, *args)
    return {"out": out, **dict(zip(NAMES, pullback(d_out), strict=True))}


def feed_forward(x, gate, up, down, **options):
    """Joined as models do it."""
    return swiglu(x, join(gate, up, x.shape[:2], **options), down, **options)


def cast(args, d_out, dtype=jnp.bfloat16):
    return tuple(jnp.asarray(x, dtype) for x in args), jnp.asarray(d_out, dtype)


def assert_close(got, want, tolerance):
    """In norm; NaN anywhere is far."""
    assert got.keys() == want.keys()
    for name, y in want.items():
        x = np.float64(got[name])
        assert x.shape == y.shape, name
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y), name


def interpreted(**options):
    return kernels(interpret=True, **options)


def of_tokens(ways):
    """As `swiglu` gives them to `fused`."""
    return tuple(map(module._of_tokens, ways))


@NEEDS_JAX_11
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_the_formula(case):
    *shape, programs = case
    args, d_out = inputs(*shape)
    ways = of_tokens(interpreted(programs=programs))
    layer = lambda x, gate, up, down: fused(x, by_turns(gate, up), down, *ways)
    run = quick_jit(lambda *args: results(layer, args[:-1], args[-1]))
    got = run(*cast(args, d_out)[0], cast(args, d_out)[1])
    assert {x.dtype for x in got.values()} == {jnp.dtype(jnp.bfloat16)}
    assert_close(got, oracle(*args, d_out), 8e-3)


@NEEDS_JAX_11
def test_rows_are_rounded_once_and_h_is_the_same_both_ways():
    """gate and up as XLA's product has them, h of the rounded ones, and backward the same bits."""
    (x, gate, up, down), d_out = cast(*inputs(2, 100, 128, 192))
    forward, backward = interpreted(programs=2)
    gate_up = by_turns(gate, up)
    both, h = quick_jit(forward)(x.reshape(200, 128), gate_up)
    _, again = quick_jit(backward)(d_out.reshape(200, 128), down, both)
    assert np.asarray(h).tobytes() == np.asarray(again).tobytes()
    turns = np.float64(both).reshape(200, 3, 2, 64)
    g, u = (turns[:, :, i].reshape(200, 192) for i in range(2))
    for got, kernel in ((g, gate), (u, up)):
        want = np.float64(x.reshape(200, 128)) @ np.float64(kernel)
        np.testing.assert_allclose(got, want, rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(np.float64(h), g / (1 + np.exp(-g)) * u, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_around_it_are_the_formula(dtype):
    args, d_out = inputs(2, 9, 64, 48)
    few, d_few = cast(args, d_out, dtype)
    run = jax.jit(functools.partial(results, feed_forward))
    assert_close(run(few, d_few), oracle(*args, d_out), 1e-5 if dtype == jnp.float32 else 8e-3)


def fake_kernels():
    """The same in XLA's own operations: a mesh of interpreters takes long."""

    def split(both):
        turns = both.reshape(len(both), -1, 2, 64).astype(jnp.float32)
        return (turns[:, :, i].reshape(len(both), -1) for i in range(2))

    def forward(x, gate_up):
        both = x @ gate_up
        gate, up = split(both)
        return both, (jax.nn.silu(gate) * up).astype(x.dtype)

    def backward(d_out, down, both):
        (gate, up), d_h = split(both), (d_out @ down.T).astype(jnp.float32)
        h, pullback = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
        d_both = by_turns(*pullback(d_h))
        return d_both.astype(both.dtype), h.astype(both.dtype)

    return forward, backward


@pytest.fixture
def as_on_hopper(monkeypatch):
    """`swiglu` takes kernels in XLA's own operations; gives what they see."""
    seen = []

    def watched(way):
        def run(*args):
            seen.append(tuple(x.shape for x in args))
            return way(*args)

        return run

    monkeypatch.setattr(module, "kernels", lambda: tuple(map(watched, fake_kernels())))
    monkeypatch.setattr(choice, "device", lambda: choice.Device("gpu", "NVIDIA H200"))
    monkeypatch.setattr(choice, "hopper_obstacle", lambda: None)
    monkeypatch.setattr(choice, "_FEWEST_ROWS", 8)
    return seen


@pytest.mark.parametrize(("batch", "rows"), [(8, 2 * 12), (3, 3 * 8)])
def test_each_device_takes_its_own_images_and_channels(batch, rows, as_on_hopper):
    args, d_out = inputs(batch, rows // (2 if batch == 8 else 3), 128, 256)
    want = oracle(*args, d_out)
    few, d_few = cast(args, d_out)
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))), nn.logical_axis_rules(RULES):
        axes = {"batch_axes": mesh_axes("batch", batch), "hidden_axes": mesh_axes("mlp", 256)}
        function = functools.partial(feed_forward, **axes)
        got = jax.jit(functools.partial(results, function))(few, d_few)
    assert set(as_on_hopper) == {
        ((rows, 128), (128, 256)),
        ((rows, 128), (128, 128), (rows, 256)),
    }
    assert_close(got, want, 8e-3)


def test_a_rematerialised_layer_makes_gate_and_up_once(as_on_hopper):
    """And keeps no h: rows of 2 F, of D and the kernels."""
    args, d_out = cast(*inputs(2, 12, 128, 256))
    layer = jax.checkpoint(feed_forward, policy=keep_policy)
    text = str(
        jax.jit(lambda args, d_out: jax.vjp(layer, *args)[1](d_out)).trace(args, d_out).jaxpr
    )
    products = text.count("dot_general")
    # forward's two, backward's d_h, and gradients of x, of gate with up, and of down
    assert products == 6
    _, pullback = jax.vjp(layer, *args)
    held = sorted(x.shape for x in jax.tree.leaves(pullback) if x.ndim == 3)
    assert held == [(2, 12, 128), (2, 12, 512)]


def shapes(batch, num_tokens, width, hidden, dtype=jnp.bfloat16):
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, dtype)
    kernel = shape(width, hidden)
    args = shape(batch, num_tokens, width), kernel, kernel, shape(hidden, width)
    return args, shape(batch, num_tokens, width)


@NEEDS_JAX_11
def test_lowers_to_one_launch_each_way_on_hopper():
    run = lambda args, d_out: results(feed_forward, args, d_out)
    few = shapes(2, 256, 768, 2048)
    many = shapes(16, 256, 768, 2048)
    for device, case, own, passes in (
        ("H200", many, 2, 0),
        ("H200", few, 0, 2),
        ("A100", many, 0, 2),
        ("v5e", many, 0, 0),
    ):
        text = lower(device, run, *case)
        assert text.count("@mosaic_gpu_v2") == own, device
        assert text.count("custom_call @__gpu$xla.gpu.triton") == passes, device


def test_when_the_products_hold_it():
    able = jax.__version_info__ >= (0, 11)
    good = {"rows": 4096, "D": 768, "F": 2048, "dtype": jnp.bfloat16}
    with on("H200"):
        assert choice.fuses_swiglu(**good) == able
        for changes in (
            {"rows": 4088},
            {"rows": 4100},
            {"D": 800},
            {"F": 2080},
            {"F": 64},
            {"dtype": jnp.float32},
        ):
            assert not choice.fuses_swiglu(**(good | changes)), changes
    for other in ("A100", "v5e"):
        with on(other):
            assert not choice.fuses_swiglu(**good)


def test_bad_input_is_refused():
    x, gate, up, down = cast(*inputs(2, 7, 16, 24), jnp.float32)[0]
    for other in (up[:8], up.astype(jnp.bfloat16)):
        got = rf"got {other.dtype}\({len(other)}, 24\)"
        with pytest.raises(ValueError, match=r"up: expected float32 of shape \(16, 24\), " + got):
            join(gate, other, x.shape[:2])
    with pytest.raises(ValueError, match=r"up: expected float32 of shape \(8, 24\), got"):
        join(gate[:8], up, x.shape[:2])
    good = {"x": x, "gate_up": join(gate, up, x.shape[:2]), "down": down}
    joined = r"gate_up: expected \(16, 2, F\) or \(16, 2 \* F\), got "
    cases = [
        ({"x": good["x"][0]}, r"x: expected \(B, N, D\), got \(7, 16\)"),
        ({"gate_up": good["gate_up"][:8]}, joined + r"\(8, 2, 24\)"),
        ({"gate_up": gate[:, None]}, joined + r"\(16, 1, 24\)"),
        ({"down": good["down"].T}, r"down: expected float32 of shape \(24, 16\)"),
        ({"down": good["down"].astype(jnp.bfloat16)}, "got bfloat16"),
        ({"implementation": "fast"}, "'fast' is not one of"),
        ({"implementation": "triton"}, "needs an NVIDIA GPU"),
    ]
    for changes, reason in cases:
        with pytest.raises(ValueError, match=reason):
            swiglu(**(good | changes))
