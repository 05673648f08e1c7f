"""Programs with fused kernels, forward and backward, for devices that are not at hand."""

import collections
import os
import re
import warnings

import jax
import jax.numpy as jnp
import pytest
from kernel_cases import lower, on

from lasad_jax.ops import ManhattanDecay, NoDecay, RasterDecay, SequenceDecay, linear_attention
from lasad_jax.ops.kernels import choice

TYPES = (jnp.bfloat16, jnp.float32)
MOSAIC_GPU, TRITON, TPU = "mosaic_gpu_v2", "__gpu$xla.gpu.triton", "tpu_custom_call"


@pytest.fixture(autouse=True)
def silent():
    """Some of Pallas's own code is deprecated in some versions of JAX."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def programs(family, gated, dtype, *, num_tokens=256, num_prefix=1, heads=4, widths=(64, 64)):
    """The operator, the same with all gradients, and the shapes of their arguments."""
    side = int((num_tokens - 1) ** 0.5) + 1
    shape = jax.ShapeDtypeStruct
    q, v = (shape((2, num_tokens, heads, width), dtype) for width in widths)
    rate = shape((heads,), jnp.float32)
    rates = {NoDecay: (), SequenceDecay: (rate,)}.get(family, (rate, rate))
    gate = shape(q.shape[:3], jnp.float32) if gated else None

    def forward(q, k, v, decay, gate, d_out):
        options = {"grid": (side, side), "num_prefix": num_prefix, "log_gate": gate}
        return linear_attention(q, k, v, decay, **options)

    def both_ways(*args):
        out, pullback = jax.vjp(lambda *inputs: forward(*inputs, None), *args[:-1])
        return out, pullback(args[-1])

    return forward, both_ways, (q, q, v, family(*rates), gate, v)


def launches(text):
    kinds = "|".join(map(re.escape, (MOSAIC_GPU, TRITON, TPU)))
    return dict(collections.Counter(re.findall(rf"custom_call @({kinds})\b", text)))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("device", ["H200", "A100", "v5e"])
@pytest.mark.parametrize(
    ("family", "gated", "num_prefix"),
    [
        (NoDecay, False, 0),
        (SequenceDecay, False, 3),
        (RasterDecay, True, 1),
        (ManhattanDecay, False, 1),
    ],
)
def test_one_launch_each_way(family, gated, num_prefix, device, dtype):
    hopper = device == "H200" and dtype == jnp.bfloat16 and num_prefix <= 1
    hopper &= family is not ManhattanDecay
    if hopper and jax.__version_info__ < (0, 11):
        pytest.skip("Mosaic GPU kernels need jax 0.11")
    _, function, shapes = programs(family, gated, dtype, num_prefix=num_prefix)
    kernel = TPU if device == "v5e" else MOSAIC_GPU if hopper else TRITON
    assert launches(lower(device, function, *shapes)) == {kernel: 2}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("num_tokens", "widths"), [(5, (16, 32)), (325, (128, 128))])
@pytest.mark.parametrize(("device", "kernel"), [("A100", TRITON), ("v5e", TPU)])
def test_other_lengths_and_widths(device, kernel, num_tokens, widths, dtype):
    for family in (RasterDecay, ManhattanDecay):
        sizes = {"num_tokens": num_tokens, "heads": 3, "widths": widths}
        _, function, shapes = programs(family, False, dtype, **sizes)
        assert launches(lower(device, function, *shapes)) == {kernel: 2}


def test_segments_are_launches_of_their_own():
    """Few heads of a long sequence: sums of the segments come before either pass."""
    _, function, shapes = programs(RasterDecay, False, jnp.float32, num_tokens=1025)
    assert launches(lower("A100", function, *shapes)) == {TRITON: 4}


def test_no_states_are_kept_without_gradients():
    forward, both_ways, shapes = programs(RasterDecay, False, jnp.float32)
    states = "tensor<2x4x4x64x64xf32>"  # B, H, chunks, Dk, Dv
    assert states in lower("A100", both_ways, *shapes)
    text = lower("A100", forward, *shapes)
    assert states not in text
    assert launches(text) == {TRITON: 1}


@pytest.mark.parametrize(("family", "num_tokens"), [(RasterDecay, 1025), (ManhattanDecay, 257)])
def test_triton_multiplies_float32_as_three_products(family, num_tokens):
    """One product of TF32 would lose three of seven digits."""
    _, function, shapes = programs(family, False, jnp.float32, num_tokens=num_tokens)
    with on("H200"):
        text = str(jax.make_jaxpr(function)(*shapes))
    products = text.count("dot_general[")
    assert products == text.count("precision=TF32_TF32_F32_X3")
    assert products >= 8


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
@pytest.mark.parametrize(("topology", "kind"), [("v5e:2x2", "TPU v5e"), ("v6e:2x2", "TPU v6e")])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("family", [RasterDecay, ManhattanDecay])
@pytest.mark.parametrize(
    ("num_tokens", "heads", "widths"),
    [(1025, 12, (64, 64)), (256, 8, (128, 128)), (100, 12, (16, 32))],
)
def test_compiles_for_tpus(num_tokens, heads, widths, family, dtype, topology, kind, monkeypatch):
    """With TPU's own compiler, which needs no TPU."""
    pytest.importorskip("libtpu", reason="libtpu, TPU's compiler, is not installed")
    from jax.experimental import topologies

    # Tests in other processes load it too; there is no chip to share.
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", os.environ.get("TPU_SKIP_MDS_QUERY", "1"))
    monkeypatch.setattr(choice, "device", lambda: choice.Device("tpu", kind))
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    _, function, shapes = programs(
        family, False, dtype, num_tokens=num_tokens, heads=heads, widths=widths
    )
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    lowered = jax.jit(function).lower(*placed)
    assert launches(lowered.as_text()) == {TPU: 2}
    lowered.compile()
