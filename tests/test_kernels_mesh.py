"""Fused kernels in a model on a mesh: each device's own part, and the lowered train step."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from ops_cases import assert_close, make_decay

from lasad_jax import ops
from lasad_jax.config import Config, MeshConfig
from lasad_jax.models import SIZES, ModelConfig
from lasad_jax.models.operator import linear_attention
from lasad_jax.ops.kernels import choice
from lasad_jax.training.sharding import AXES, RULES, make_mesh
from lasad_jax.training.state import abstract_state
from lasad_jax.training.step import make_train_step

GRID = (4, 5)


@pytest.fixture
def kernels_without_a_gpu(monkeypatch):
    """Triton's kernels, interpreted, as if the mesh were of GPUs."""
    real = choice.recurrence
    monkeypatch.setattr(choice, "device", lambda: choice.Device("gpu", "NVIDIA A100"))
    monkeypatch.setattr(choice, "recurrence", functools.partial(real, interpret=True))


def tokens(batch, heads):
    rng = np.random.default_rng(0)
    shape = (batch, 1 + GRID[0] * GRID[1], heads, 16)
    q, k, v, cotangent = rng.standard_normal((4, *shape), np.float32)
    gate = -rng.exponential(0.3, shape[:3]).astype(np.float32)
    rates = np.geomspace(1e-2, 3, heads, dtype=np.float32)
    return (q, k, v, make_decay(ops.RasterDecay, rates), gate), cotangent


def results(args, cotangent, implementation, return_state):
    def operator(q, k, v, decay, log_gate):
        out = linear_attention(
            q,
            k,
            v,
            decay,
            grid=GRID,
            num_prefix=1,
            log_gate=log_gate,
            implementation=implementation,
            return_state=return_state,
        )
        return out if return_state else (out, None)

    out, pullback, state = jax.vjp(operator, *args, has_aux=True)
    return {"out": out, "gradients": pullback(cotangent), "state": state}


@pytest.mark.parametrize(
    ("batch", "heads", "parts"),
    [
        (4, 2, (1, 1)),
        (3, 2, (3, 1)),  # three images do not split over four devices: all have all
        (4, 3, (1, 3)),
    ],
)
@pytest.mark.parametrize("return_state", [False, True])
def test_each_device_computes_its_own_part(
    batch, heads, parts, return_state, kernels_without_a_gpu, monkeypatch
):
    args, cotangent = tokens(batch, heads)
    seen = []

    def watch(name, q, v, **options):
        seen.append(q.shape)
        return recurrence(name, q, v, **options)

    recurrence = choice.recurrence
    monkeypatch.setattr(choice, "recurrence", watch)
    run = jax.jit(results, static_argnums=(2, 3))
    want = run(args, cotangent, "chunked", return_state)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        got = run(args, cotangent, "auto", return_state)
    images, own_heads = parts
    assert {(shape[0], shape[2]) for shape in seen} == {(images, own_heads)}
    assert_close(got, want, 1e-5)


@pytest.mark.parametrize(
    ("kind", "platform", "decay", "call"),
    [
        pytest.param(
            "NVIDIA H200",
            "gpu",
            "raster",
            "mosaic_gpu",
            marks=pytest.mark.skipif(
                jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11"
            ),
        ),
        ("NVIDIA A100", "gpu", "raster", "gpu.triton"),
        ("NVIDIA A100", "gpu", "manhattan", "gpu.triton"),
        ("TPU v5 lite", "tpu", "raster", "tpu_custom_call"),
        ("TPU v5 lite", "tpu", "manhattan", "tpu_custom_call"),
    ],
)
@pytest.mark.parametrize("sizes", [None, (2, 2, 2)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_train_step_lowers_with_kernels(kind, platform, decay, call, sizes):
    """Layers under scan and remat; on a mesh under shard_map."""
    model = ModelConfig(decay=decay, selective=decay == "raster", unroll=1, **SIZES["B"])
    config = Config(model=model)
    state = abstract_state(config, make_mesh(config.mesh, jax.devices()[:1]))
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    batch = {
        "tokens": jax.ShapeDtypeStruct((8, 256), jnp.int32),
        "labels": jax.ShapeDtypeStruct((8,), jnp.int32),
    }
    device = AbstractDevice(device_kind=kind, platform=platform, num_cores=132)
    mesh = AbstractMesh((), (), abstract_device=device)
    if sizes is not None:
        types = (AxisType.Auto,) * len(AXES)
        mesh = AbstractMesh(sizes, AXES, axis_types=types, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), nn.logical_axis_rules(RULES):
        traced = jax.jit(make_train_step(config)).trace(state, batch)
        target = {"gpu": "cuda", "tpu": "tpu"}[platform]
        text = traced.lower(lowering_platforms=(target,)).as_text()
    calls = re.findall(rf"custom_call @[\w$.]*{re.escape(call)}(.*-> .*)", text)
    calls = [line.split("-> ")[-1] for line in calls if "local_conv" not in line]
    # Forward, forward again for what remat has not kept, backward. Only the second stores the
    # states of chunks; the 2D decay has none.
    outputs = [result.count("tensor<") for result in calls]
    assert outputs == [1, 1 if decay == "manhattan" else 2, outputs[2]]
    assert outputs[2] >= 4
    assert ("manual_computation" in text) == (sizes is not None)
