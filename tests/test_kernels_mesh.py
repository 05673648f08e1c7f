"""Fused kernels in a model on a mesh: each device's own part, and the lowered train step."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from kernel_cases import live_calls
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


# Kernels of a block, and of what comes after the last one.
BLOCK = {
    "add_norm_forward": 2,
    "local_conv_forward": 1,
    # Queries, keys and values are not kept: this pass makes them again.
    "split_heads_forward": 2,
    "gated_heads_forward": 1,
    "gated_swiglu_forward": 1,
    "gated_swiglu_backward": 1,
    "gated_heads_backward": 1,
    "split_heads_backward": 1,
    "local_conv_backward": 1,
    "add_norm_backward": 2,
}
END = {"add_norm_forward": 1, "add_norm_backward": 1, "row_losses": 1}


NEEDS_JAX_11 = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11"
)


@pytest.mark.parametrize(
    ("kind", "platform", "decay", "target", "key_dim"),
    [
        pytest.param("NVIDIA H200", "gpu", "raster", "mosaic_gpu_v2", 64, marks=NEEDS_JAX_11),
        pytest.param("NVIDIA H200", "gpu", "raster", "mosaic_gpu_v2", 32, marks=NEEDS_JAX_11),
        ("NVIDIA A100", "gpu", "raster", "__gpu$xla.gpu.triton", 32),
        ("NVIDIA A100", "gpu", "manhattan", "__gpu$xla.gpu.triton", 32),
        ("TPU v5 lite", "tpu", "raster", "tpu_custom_call", 32),
        ("TPU v5 lite", "tpu", "manhattan", "tpu_custom_call", 32),
    ],
)
@pytest.mark.parametrize(("sizes", "unroll"), [(None, 1), (None, 3), ((1, 2, 2, 2), 1)], ids=str)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_train_step_lowers_with_kernels(kind, platform, decay, target, key_dim, sizes, unroll):
    """Layers under remat, as a loop or one by one; on a mesh under shard_map."""
    model = {**SIZES["B"], "num_layers": 3, "decay": decay, "selective": decay == "raster"}
    model["key_dim"] = key_dim
    config = Config(model=ModelConfig(**model, unroll=unroll))
    state = abstract_state(config, make_mesh(config.mesh, jax.devices()[:1]))
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    batch = {
        "tokens": jax.ShapeDtypeStruct((16, 256), jnp.int32),
        "labels": jax.ShapeDtypeStruct((16,), jnp.int32),
    }
    device = AbstractDevice(device_kind=kind, platform=platform, num_cores=132)
    mesh = AbstractMesh((), (), abstract_device=device)
    if sizes is not None:
        types = (AxisType.Auto,) * len(AXES)
        mesh = AbstractMesh(sizes, AXES, axis_types=types, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), nn.logical_axis_rules(RULES):
        traced = jax.jit(make_train_step(config)).trace(state, batch)
        lowered = traced.lower(lowering_platforms=({"gpu": "cuda", "tpu": "tpu"}[platform],))
    assert ("manual_computation" in lowered.as_text()) == (sizes is not None)
    calls = list(live_calls(lowered))

    is_operator = lambda call: call[1].startswith(("recurrence_", "manhattan_", "mixed_heads_"))
    operator = [call for call in calls if is_operator(call)]
    assert {called for called, _, _ in operator} == {target}
    # Forward and backward, and not forward again: remat keeps the output and, stored at once,
    # the states of chunks; the 2D decay has none. Where one kernel takes all of a head, the head
    # before norm and gate is kept besides.
    mixed = (target, key_dim) == ("mosaic_gpu_v2", 32)
    outputs = sorted(count for _, _, count in operator)
    forward, backward = outputs[:unroll], outputs[unroll:]
    assert forward == [3 if mixed else 1 if decay == "manhattan" else 2] * unroll
    assert len(backward) == unroll
    assert min(backward) >= (3 if mixed else 4)

    passes = collections.Counter(call[1] for call in calls if not is_operator(call))
    expected = collections.Counter()
    if platform == "gpu":
        expected.update({name: unroll * count for name, count in BLOCK.items()})
        expected.update(END)
        if mixed:
            expected = collections.Counter({k: n for k, n in expected.items() if "heads" not in k})
        if sizes is not None:
            del expected["row_losses"]  # on this mesh no device has whole rows
        elif target == "mosaic_gpu_v2":
            # Of 4096 rows, which on the mesh are split: inside the products.
            name = lambda key: key.replace("gated_swiglu", "swiglu")
            expected = collections.Counter({name(key): n for key, n in expected.items()})
    assert passes == expected
