"""Products of few rows against float64, interpreted on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import lower

from lasad_jax.ops.kernels.decode_tiling import (
    SHARED_MEMORY,
    Tiling,
    best_tiling,
    tilings,
)

if jax.__version_info__ >= (0, 11):
    from lasad_jax.ops.kernels import decode_product as dp

NEEDS_JAX_11 = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11"
)
RNG = np.random.default_rng()
SIZES = [(256, 768, 3072), (256, 1792, 768), (128, 1280, 6016), (2, 768, 768)]


def normal(*shape, scale=1.0):
    return jnp.asarray(RNG.normal(size=shape) * scale, jnp.bfloat16)


def exact(x):
    return np.asarray(x, np.float64)


def normalised(x, eps):
    x = exact(x)
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + eps)


def assert_near(got, want):
    assert np.abs(exact(got) - want).max() < 6e-3 * np.abs(want).max()


@NEEDS_JAX_11
@pytest.mark.parametrize(
    ("M", "K", "N", "tiling"),
    [
        (2, 128, 64, Tiling(64, 64, 2)),
        (100, 320, 72, Tiling(64, 32, 3)),  # M, N no multiples of a tile; pieces take turns
        (130, 192, 96, Tiling(128, 96, 2)),  # a warpgroup without rows
        (100, 320, 200, Tiling(64, 64, 2, (2, 2))),  # a cluster shares what it loads
    ],
)
@pytest.mark.parametrize("eps", [None, 1e-1])
def test_project(M, K, N, tiling, eps):
    x, w = normal(M, K), normal(K, N, scale=K**-0.5)
    rows = exact(x) if eps is None else normalised(x, eps)
    out = dp.project(x, w, norm_eps=eps, tiling=tiling, interpret=True)
    assert out.shape == (M, N)
    assert_near(out, rows @ exact(w))


@NEEDS_JAX_11
@pytest.mark.parametrize("M", [2, 100])
@pytest.mark.parametrize("tiling", [None, Tiling(64, 128, 2)])
def test_project_add(M, tiling):
    x, w, residual = normal(M, 192), normal(192, 136, scale=0.1), normal(M, 136)
    if tiling is None:  # the interpreter cannot split K
        ways = tilings(M, 192, 136)
        tiling = next(t for t in ways if t.split == 1 and t.columns > 32)
    out = dp.project_add(x, w, residual, tiling=tiling, interpret=True)
    assert_near(out, exact(x) @ exact(w) + exact(residual))


@NEEDS_JAX_11
@pytest.mark.parametrize(("F", "tiling"), [(32, Tiling(64, 64, 2)), (160, Tiling(128, 128, 2))])
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_swiglu(F, tiling, eps):
    x, gate, up = normal(70, 192), normal(192, F, scale=0.1), normal(192, F, scale=0.1)
    rows = exact(x) if eps is None else normalised(x, eps)
    both = dp.interleave(gate, up)
    out = dp.swiglu(x, both, norm_eps=eps, tiling=tiling, interpret=True)
    g, u = rows @ exact(gate), rows @ exact(up)
    assert out.shape == (70, F)
    assert_near(out, g / (1 + np.exp(-g)) * u)


@NEEDS_JAX_11
@pytest.mark.parametrize("M", [2, 100, 203])
def test_any_number_of_rows_is_taken_on_hopper(M):
    """Arrays that TMA reads are whole rows of eight: others are padded."""
    rows = jax.ShapeDtypeStruct((M, 192), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((192, 192), jnp.bfloat16)
    tiling = Tiling(64, 64, 2)
    text = lower("H200", lambda x, w: dp.project_add(x, w, x, tiling=tiling), rows, w)
    assert "@mosaic_gpu_v2" in text
    assert f"-> tensor<{max(M + -M % 8, 64)}x192xbf16>" in text


@NEEDS_JAX_11
def test_errors():
    x, w = normal(4, 128), normal(128, 64)
    with pytest.raises(ValueError, match="it takes bfloat16, not bfloat16, float32"):
        dp.project(x, w.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"\(M, K\) by \(K, N\), not \(4, 128\) by \(64, 128\)"):
        dp.project(x, w.T)
    with pytest.raises(ValueError, match=r"K a multiple of 64 .*4, 100 and 64"):
        dp.project(x[:, :100], w[:100])
    with pytest.raises(ValueError, match="N of 8, at least 32, not 4, 128 and 36"):
        dp.project(x, w[:, :36])
    with pytest.raises(ValueError, match=r"residual must be \(4, 64\), not \(4, 32\)"):
        dp.project_add(x, w, normal(4, 32))
    with pytest.raises(ValueError, match="split must be 1"):
        dp.project(x, w, norm_eps=1e-5, tiling=Tiling(64, 64, 2, split=2))
    with pytest.raises(ValueError, match=r"shapes \(3, 48\) and \(3, 32\) must be equal"):
        dp.interleave(jnp.ones((3, 48)), jnp.ones((3, 32)))
    with pytest.raises(TypeError, match="unexpected keyword argument 'tile'"):
        dp.project(x, w, tile=None)


@NEEDS_JAX_11
def test_obstacle_names_the_device():
    if jax.devices()[0].platform == "cpu":
        assert "needs a Hopper GPU" in dp.obstacle(normal(4, 128), normal(128, 64))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [{}, {"normed": True}, {"gated": True, "normed": True}])
def test_tilings_fit_and_cover(size, options):
    M, K, N = size
    ways = tilings(M, K, N, **options)
    assert best_tiling(M, K, N, **options) == ways[0]
    for t in ways:
        assert t.obstacle(K, N, **options) is None
        assert t.shared_memory(K) <= SHARED_MEMORY
        down, across = t.grid(M, N)
        assert M <= down * t.rows * t.cluster[0] < M + t.rows * t.cluster[0]
        assert N <= across * t.columns * t.cluster[1] < N + t.columns * t.cluster[1]
        assert t.stages <= t.steps(K)
        assert t.steps(K) * t.split * t.depth >= K
        assert not (options and t.split > 1)
    costs = [t.cost(M, K, N, normed=options.get("normed", False)) for t in ways]
    assert costs == sorted(costs)


def test_cost_follows_bytes_and_waves():
    alone, shared = Tiling(64, 64, 8), Tiling(64, 64, 8, (2, 2))
    assert shared.cost(256, 768, 3072) < alone.cost(256, 768, 3072)
    # One cluster more than fits at once costs a second wave.
    full, more = (shared.cost(128, 768, 128 * n) for n in (32, 33))
    assert more > full + 1


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rows": 96}, "rows must be 64, 128, 192 or 256, not 96"),
        ({"columns": 48}, "columns must be a multiple of 32 up to 256, not 48"),
        ({"depth": 32}, "depth must be 64 or 128"),
        ({"stages": 1}, "stages must be at least 2"),
        ({"split": 3}, "a cluster has 1, 2, 4 or 8 programs, not 1 x 1 x 3"),
        ({"split": 8}, "a multiple of 16 columns, not 8"),
        ({"columns": 256}, "must not exceed K 2048, N 128"),
        ({"stages": 16}, "bytes of shared memory exceed"),
    ],
)
def test_tiling_obstacles(changes, why):
    fields = {"rows": 64, "columns": 64, "stages": 4} | changes
    assert why in Tiling(**fields).obstacle(2048, 128)
