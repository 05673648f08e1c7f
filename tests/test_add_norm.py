"""Residual sum, dropout and norm against float64, plain and as kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from kernel_cases import lower

from lasad_jax.ops.kernels.add_norm_triton import Tiling, _column_tiles
from lasad_jax.ops.passes.add_norm import _add_norm, add_norm, kernels, plain
from lasad_jax.ops.passes.dropout import kept, token_seeds

EPSILON = 1e-5


def drawn(shape, dtype, seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    x, branch, d_x, d_y = (jax.random.normal(key, shape, dtype) for key in keys[:4])
    return (x, branch, token_seeds(keys[4], shape[:2])), (d_x, d_y)


def oracle(x, branch, mask, rate):
    """In float64, from the definition."""
    x = x + branch * mask / (1 - rate)
    return x, x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + EPSILON)


def expected(inputs, cotangents, rate):
    x, branch, seeds = inputs
    mask = np.ones(x.shape)
    if rate:
        mask = np.asarray(kept(seeds[..., None], jnp.arange(x.shape[-1]), rate), np.float64)
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(lambda a: np.asarray(a, np.float64), tree)
        out, pull = jax.vjp(lambda x, b: oracle(x, b, mask, rate), *wide((x, branch)))
        return jax.tree.map(np.asarray, (*out, *pull(wide(cotangents))))


def relative(got, want):
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("form", ["plain", "kernel"])
@pytest.mark.parametrize("shape", [(2, 7, 48), (1, 5, 20), (3, 1, 768)], ids=str)
def test_values_and_gradients(shape, form, rate, dtype):
    inputs, cotangents = drawn(shape, dtype, seed=shape[1])
    if rate == 0:
        inputs = (*inputs[:2], None)
    ways = plain(rate, EPSILON) if form == "plain" else kernels(rate, EPSILON, interpret=True)

    @jax.jit
    def run(inputs, cotangents):
        function = lambda x, branch: _add_norm(*ways, x, branch, inputs[2])
        out, pull = jax.vjp(function, *inputs[:2])
        return (*out, *pull(cotangents))

    limit = 1e-6 if dtype == "float32" else 5e-3
    for got, want in zip(run(inputs, cotangents), expected(inputs, cotangents, rate), strict=True):
        assert got.dtype == dtype
        assert relative(got, want) < limit


@pytest.mark.parametrize("tiling", [Tiling(1, 1), Tiling(16, 8)], ids=str)
def test_any_tiling(tiling):
    inputs, cotangents = drawn((2, 5, 80), "float32")
    forward, backward = kernels(0.1, EPSILON, interpret=True, tiling=tiling)
    x, y, factor = forward(*inputs)
    want = expected(inputs, cotangents, 0.1)
    got = (x, y, *backward(*cotangents, y, factor, inputs[2]))
    assert max(map(relative, got, want)) < 1e-6


@pytest.mark.parametrize("width", [1, 16, 20, 768, 1280, 1536, 3200])
def test_tiles_cover_every_channel_once(width):
    tiles = _column_tiles(width)
    covered = np.concatenate([first + np.arange(size) for first, size in tiles])
    assert all(size & (size - 1) == 0 for _, size in tiles)
    np.testing.assert_array_equal(covered[:width], np.arange(width))


def test_dropout_rate_and_independence():
    """Kept shares per call, token and channel lie where independent draws would."""
    seeds = token_seeds(jax.random.key(3), (1000,))
    mask = np.asarray(kept(seeds[:, None], jnp.arange(512), 0.1), float)
    deviation = np.sqrt(0.09)
    assert abs(mask.mean() - 0.9) < 4 * deviation / np.sqrt(mask.size)
    assert np.abs(mask.mean(0) - 0.9).max() < 5 * deviation / np.sqrt(1000)
    assert np.abs(mask.mean(1) - 0.9).max() < 5 * deviation / np.sqrt(512)
    centred = (mask - 0.9) / deviation
    channels = centred.T @ centred / 1000 - np.diag((centred**2).mean(0))
    tokens = centred @ centred.T / 512 - np.diag((centred**2).mean(1))
    # The largest of n correlations of independent draws.
    assert np.abs(channels).max() < 6 / np.sqrt(1000)
    assert np.abs(tokens).max() < 6.5 / np.sqrt(512)


def test_other_keys_and_rates():
    key = jax.random.key(0)
    mask = lambda key, rate: np.asarray(
        kept(token_seeds(key, (64,))[:, None], jnp.arange(64), rate)
    )
    assert (mask(key, 0.1) == mask(key, 0.1)).all()
    assert (mask(key, 0.5) != mask(jax.random.key(1), 0.5)).mean() == pytest.approx(0.5, abs=0.05)
    assert not (mask(key, 0.1) < mask(key, 0.4)).any()  # a higher rate drops more of the same


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_one_launch_each_way(rate):
    inputs, cotangents = drawn((2, 16, 64), "bfloat16")
    if rate == 0:
        inputs = (*inputs[:2], None)

    def run(inputs, cotangents):
        ways = kernels(rate, EPSILON)
        out, pull = jax.vjp(lambda x, b: _add_norm(*ways, x, b, inputs[2]), *inputs[:2])
        return out, pull(cotangents)

    text = lower("H200", run, inputs, cotangents)
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 2


def test_on_a_mesh_each_device_has_its_own_images():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    inputs, cotangents = drawn((4, 6, 32), "float32")
    forward, backward = kernels(0.2, EPSILON, interpret=True)
    images = PartitionSpec("data")
    split = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=images, out_specs=images, check_vma=False
    )

    @jax.jit
    def run(inputs, cotangents):
        function = lambda x, b: _add_norm(split(forward), split(backward), x, b, inputs[2])
        out, pull = jax.vjp(function, *inputs[:2])
        return (*out, *pull(cotangents))

    got = run(inputs, cotangents)
    assert max(map(relative, got, expected(inputs, cotangents, 0.2))) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implementation": "fast"}, "implementation: 'fast' is not one of"),
        ({"implementation": "triton"}, "'triton' cannot run here: it needs an NVIDIA GPU"),
        ({"branch": jnp.zeros((1, 2, 16))}, "branch: expected .*got"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    arguments = {"x": jnp.zeros((1, 2, 8)), "branch": jnp.zeros((1, 2, 8)), "seeds": None}
    with pytest.raises(ValueError, match=message):
        add_norm(**{**arguments, "rate": 0.1, "epsilon": EPSILON, **options})
