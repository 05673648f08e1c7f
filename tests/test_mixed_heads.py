"""All of a mixer's heads in one kernel each way, against the passes that it joins."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from kernel_cases import lower, quick_jit

from lasad_jax.config import MeshConfig
from lasad_jax.models.config import ModelConfig
from lasad_jax.models.mixers import LASADMixer
from lasad_jax.models.operator import mesh_axes
from lasad_jax.models.rope import turns
from lasad_jax.ops import NoDecay, RasterDecay, SequenceDecay, linear_attention
from lasad_jax.ops.kernels import choice
from lasad_jax.ops.passes import mixed_heads as module
from lasad_jax.ops.passes.gated_products import gated_heads_product
from lasad_jax.ops.passes.mixed_heads import (
    fused,
    group_size,
    join,
    log_factors,
    mixed_heads_product,
)
from lasad_jax.ops.passes.split_heads import split_heads
from lasad_jax.training.sharding import RULES, make_mesh

if jax.__version_info__ >= (0, 11):
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
    from jax.experimental.pallas import mosaic_gpu as plgpu

NEEDS_JAX_11 = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11"
)
# Decay, N, grid, H, whether there is a content gate, whether tokens turn
CASES = [
    (RasterDecay, 136, (9, 15), 2, True, True),
    (SequenceDecay, 72, (1, 71), 2, False, True),
    (NoDecay, 64, (7, 9), 1, True, False),
    (RasterDecay, 72, (1, 71), 1, True, True),
    (RasterDecay, 264, (1, 263), 1, True, False),  # chunks of two groups
]
COLUMNS = {"q": (0, 32), "k": (32, 64), "v": (64, 128), "out_gate": (128, 192), "gate": (192, 193)}
EPSILON, Q_SCALE, D = 1e-3, 0.2, 24


def inputs(case, batch=2):
    """(y, kernel, bias, rates) and the gradient of the output."""
    family, num_tokens, _, heads, gated, _ = case
    rng = np.random.default_rng([batch, num_tokens, heads])
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    y = draw(batch, num_tokens, heads, 200 if gated else 192)
    bias = draw(heads).astype(jnp.float32) - 2 if gated else None
    num_rates = {NoDecay: 0, SequenceDecay: 1, RasterDecay: 2}[family]
    rates = [jnp.abs(draw(heads)).astype(jnp.float32) / 4 for _ in range(num_rates)]
    return (y, draw(heads, 64, D) / 8, bias, rates), draw(batch, num_tokens, D)


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels, without a GPU."""
    monkeypatch.setattr(module, "kernels", functools.partial(module.kernels, interpret=True))


def table_of(case):
    _, num_tokens, grid, *_, rope = case
    return turns(grid, 32, 0, num_tokens, prefix_scale=1.0) if rope else None


def joined(case, y, kernel, bias, rates, *, of_device=None, **axes):
    family, num_tokens, grid, heads, *_ = case
    if y.shape[3] > 192:
        y = join(y[..., :192], y[..., 192:], group_size(of_device or heads))
    steps = log_factors(family(*rates), num_tokens, grid)
    options = {"q_scale": Q_SCALE, "epsilon": EPSILON, **axes}
    return mixed_heads_product(y, kernel, steps, bias, table_of(case), **options)


def one_by_one(case, y, kernel, bias, rates):
    family, _, grid, _, gated, _ = case
    widths = {"key_dim": 32, "value_dim": 64}
    q, k, v, gate, y = split_heads(y, table_of(case), q_scale=Q_SCALE, gated=gated, **widths)
    gate = -jax.nn.softplus(gate + bias) if gated else None
    out = linear_attention(
        q, k, v, family(*rates), grid=grid, log_gate=gate, implementation="quadratic"
    )
    return gated_heads_product(out, y, kernel, gate_start=128, epsilon=EPSILON)


def results(function, case, args, d_out):
    """The output and all gradients, that of y by its columns."""
    out, pullback = jax.vjp(functools.partial(function, case), *args)
    d_y, d_kernel, d_bias, d_rates = pullback(d_out)
    parts = {name: d_y[..., i:j] for name, (i, j) in COLUMNS.items() if i < d_y.shape[3]}
    return {"out": out, "kernel": d_kernel, "bias": d_bias, "rates": d_rates, **parts}


run = quick_jit(results, static_argnums=(0, 1))


def wanted(case, args, d_out):
    """In float32: what bf16 rounds is the kernels' own."""
    wide = lambda x: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), x)
    return run(one_by_one, case, wide(args), wide(d_out))


def assert_close(got, want):
    """Root mean square of the difference over that of what is wanted. The operator's bf16 shows
    in the gradients of queries, keys and decays, which are differences of larger numbers."""
    tolerances = dict.fromkeys(("q", "k", "gate"), 1.5e-2) | dict.fromkeys(("bias", "rates"), 3e-2)
    for name, x in want.items():
        for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(x), strict=True):
            assert a.shape == b.shape, name
            a, b = np.float64(a), np.float64(b)
            difference = np.sqrt(np.square(a - b).mean() / (np.square(b).mean() + 1e-6))
            assert difference <= tolerances.get(name, 5e-3), (name, difference)


@NEEDS_JAX_11
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_passes_one_by_one(case, interpreted):
    args, d_out = inputs(case)
    got = run(joined, case, args, d_out)
    assert {got[name].dtype for name in ("out", "q", "kernel")} == {jnp.dtype(jnp.bfloat16)}
    assert_close(got, wanted(case, args, d_out))


@NEEDS_JAX_11
def test_the_prefix_token_has_gradients(interpreted):
    """Its own rows are few among all."""
    args, d_out = inputs(CASES[0])
    got, want = run(joined, CASES[0], args, d_out), wanted(CASES[0], args, d_out)
    first = lambda x: {name: x[name][:, 0] for name in ("k", "v")}
    assert_close(first(got), first(want))


@NEEDS_JAX_11
@pytest.mark.parametrize("selective", [True, False])
def test_a_mixer_joins_its_projection_as_the_kernels_read_it(selective, interpreted, monkeypatch):
    """Six heads, in groups of two; the same parameters with and without the kernels."""
    model = {"num_heads": 6, "width": 384, "num_layers": 1, "grid": (7, 9)}
    mixer = LASADMixer(ModelConfig(**model, selective=selective))
    x = jax.random.normal(jax.random.key(0), (2, 64, 384), jnp.bfloat16)

    def mix(module, x):
        kernels = {name: kernel for name, (kernel, _) in module.kernels(x, None).items()}
        return module(x, kernels)[0]

    params = nn.meta.unbox(nn.init(mix, mixer)(jax.random.key(1), x)["params"])
    cast = lambda path, x: x if "rate" in jax.tree_util.keystr(path) else x.astype(jnp.bfloat16)
    params = jax.tree_util.tree_map_with_path(cast, params)
    d_out = jax.random.normal(jax.random.key(2), x.shape, x.dtype)

    def both(params, x):
        out, pullback = jax.vjp(
            lambda *args: nn.apply(mix, mixer)({"params": args[0]}, args[1]), params, x
        )
        return {"out": out, "gradients": pullback(d_out)}

    want = jax.jit(both)(params, x)
    monkeypatch.setattr(choice, "mixes_heads", lambda *_: True)
    joined_for = []
    monkeypatch.setattr(
        module, "fused", lambda y, *args: joined_for.append(y.shape) or fused(y, *args)
    )
    got = jax.jit(lambda *args: both(*args))(params, x)
    assert joined_for == [(2, 64, 6, 200 if selective else 192)]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.float64(a), np.float64(b)
        assert np.square(a - b).mean() <= 4e-4 * np.square(b).mean() + 1e-12


def test_heads_lie_together_in_groups():
    own, gates = np.arange(2 * 12 * 3).reshape(2, 12, 3), 1000 + np.arange(2 * 12).reshape(2, 12, 1)
    rows = np.asarray(join(own, gates, 4)).reshape(2, 3, 16)
    for group in range(3):
        of_group = slice(4 * group, 4 * group + 4)
        np.testing.assert_array_equal(rows[:, group, :12], own[:, of_group].reshape(2, 12))
        np.testing.assert_array_equal(rows[:, group, 12:], gates[:, of_group, 0])
    assert [group_size(heads) for heads in (1, 6, 12, 16, 20, 24)] == [1, 2, 4, 8, 4, 8]


def test_groups_are_of_the_heads_of_a_device(monkeypatch):
    monkeypatch.setattr(choice, "mixes_heads", lambda *_: True)
    mixer = LASADMixer(ModelConfig(num_heads=12, width=768, num_layers=1))
    x = jnp.zeros((4, 257, 768), jnp.bfloat16)
    read = lambda module, x: module.kernels(x, None)["heads"][0]
    params = nn.meta.unbox(nn.init(read, mixer)(jax.random.key(0), x)["params"])
    run = jax.jit(lambda: nn.apply(read, mixer)({"params": params}, x))
    kernel = lambda name: params[name]["kernel"].astype(jnp.bfloat16)
    own = jnp.concatenate([kernel(name) for name in ("q", "k", "v", "out_gate")], axis=-1)
    gates = jnp.pad(kernel("decay_gate")[..., None], ((0, 0), (0, 0), (0, 7)))
    np.testing.assert_array_equal(run(), join(own, gates, 4))
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))), nn.logical_axis_rules(RULES):
        np.testing.assert_array_equal(run(), join(own, gates, 2))  # of six heads


@NEEDS_JAX_11
@pytest.mark.parametrize(("case", "batch"), [(CASES[0], 2), (CASES[3], 3), (CASES[4], 2)], ids=str)
def test_no_warp_reads_what_another_may_be_writing(case, batch, interpreted):
    args, d_out = inputs(case, batch=batch)
    # Beyond the end of an array bulk copies read zeros.
    how = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="zero")
    with plgpu.force_gpu_interpret_mode(how):
        got = jax.block_until_ready(results(joined, case, args, d_out))
    assert not get_races().races_found
    assert_close(got, wanted(case, args, d_out))


@NEEDS_JAX_11
def test_padding_is_not_read_and_has_no_gradient(interpreted):
    (y, *rest), d_out = inputs(CASES[3])
    whole = quick_jit(lambda *args: jax.vjp(functools.partial(joined, CASES[3]), *args)[1](d_out))
    clean, dirty = whole(y, *rest), whole(y.at[..., 193:].set(jnp.nan), *rest)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert np.abs(np.float32(clean[0][..., 192])).max() > 0
    assert not np.any(np.float32(clean[0][..., 193:]))


@NEEDS_JAX_11
def test_lowers_to_one_launch_each_way():
    shape = jax.ShapeDtypeStruct
    y, kernel = shape((2, 256, 3, 200), jnp.bfloat16), shape((3, 64, D), jnp.bfloat16)
    steps, bias = shape((256, 3), jnp.float32), shape((3,), jnp.float32)
    table = shape((256, 16, 2), jnp.float32)

    def both(y, kernel, steps, bias, table, d_out):
        run = lambda *args: mixed_heads_product(*args, table, q_scale=0.1, epsilon=1e-5)
        out, pullback = jax.vjp(run, y, kernel, steps, bias)
        return out, pullback(d_out)

    text = lower("H200", both, y, kernel, steps, bias, table, shape((2, 256, D), y.dtype))
    assert text.count("@mosaic_gpu_v2") == 2


@NEEDS_JAX_11
def test_each_device_takes_its_own_images_and_heads(monkeypatch):
    """With a kernel of XLA's own operations: a mesh of interpreters takes long."""
    places = (CASES[0], 4, (1, 1)), (CASES[1], 4, (1, 1)), (CASES[1], 3, (3, 1))
    for case, batch, own in places:
        args, d_out = inputs(case, batch=batch)
        seen = []

        def forward(y, steps, bias, table, *, keep_states, seen=seen):
            seen.append((y.shape[::2], steps.shape[0]))
            factor = jnp.exp(steps[:, 0, :6].sum(1) + (0 if bias is None else bias))
            o = y[..., 64:128] * factor[:, None].astype(y.dtype)
            states = jnp.zeros((y.shape[0], y.shape[2], 1))
            return (o, o, states) if keep_states else (o,)

        def backward(y, steps, bias, table, o, states, d_h):
            kinds = 1 if bias is None else 2
            shape = (y.shape[0], steps.shape[0], kinds, *steps.shape[1:])
            d_steps = jnp.ones(shape) * d_h.sum((1, 3))[..., None, None, None]
            return jnp.zeros_like(y).at[..., 64:128].set(d_h), o, d_steps

        monkeypatch.setattr(module, "kernels", lambda ways=(forward, backward), **_: ways)
        alone = functools.partial(joined, of_device=1)
        want = jax.jit(functools.partial(results, alone, case))(args, d_out)
        mesh = make_mesh(MeshConfig(2, 2, 2))
        seen.clear()
        with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
            axes = {"batch_axes": mesh_axes("batch", batch), "head_axes": mesh_axes("heads", 2)}
            function = functools.partial(alone, **axes)
            got = jax.jit(functools.partial(results, function, case))(args, d_out)
        assert set(seen) == {(own, own[1])}
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-2, atol=1e-2)


def test_bad_input_is_refused():
    bf16 = functools.partial(jnp.zeros, dtype=jnp.bfloat16)
    good = {"y": bf16((2, 64, 3, 200)), "kernel": bf16((3, 64, 8)), "steps": jnp.zeros((64, 3))}
    good |= {"bias": jnp.zeros(3), "table": None, "q_scale": 1.0, "epsilon": 1e-5}
    cases = [
        ({"kernel": bf16((2, 64, 8))}, r"kernel: expected bfloat16 of shape \(3, 64, 'D'\)"),
        ({"bias": None}, r"y: expected bfloat16 \(B, N, H, 192\)"),
        ({"y": bf16((2, 60, 3, 200))}, "N a multiple of 8"),
        ({"y": jnp.zeros((2, 64, 3, 200)), "kernel": jnp.zeros((3, 64, 8))}, "expected bfloat16"),
        (
            {"steps": jnp.zeros((4, 3))},
            r"steps: expected \(64, 3\), tokens and heads; got \(4, 3\)",
        ),
    ]
    for changes, reason in cases:
        with pytest.raises(ValueError, match=reason):
            mixed_heads_product(**(good | changes))
