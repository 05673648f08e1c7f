"""Cross-entropy against float64 NumPy: rows, plain and by the kernel, and the head's losses."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from kernel_cases import lower, on, quick_jit
from scipy.special import log_softmax

from lasad_jax.config import MeshConfig
from lasad_jax.ops.kernels import choice
from lasad_jax.ops.kernels.row_losses_triton import Tiling
from lasad_jax.ops.passes import row_losses as rows_module
from lasad_jax.ops.passes.row_losses import kernel, row_losses
from lasad_jax.training import cross_entropy
from lasad_jax.training.cross_entropy import mean_loss, token_losses
from lasad_jax.training.sharding import RULES, batch_sharding, make_mesh

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
# Half a unit in the last place, and float32's own errors.
ROUNDING = {jnp.float32: 2e-6, jnp.bfloat16: 2**-8, jnp.float16: 2**-11}


# Rows of logits


def rows(vocab_size, dtype, num=3, scale=5.0, seed=0):
    rng = np.random.default_rng([seed, vocab_size])
    logits = jnp.asarray(rng.normal(0, scale, (num, vocab_size)), dtype)
    tokens = rng.integers(0, vocab_size, num)
    tokens[:2] = 0, vocab_size - 1
    return logits, jnp.asarray(tokens, jnp.int32)


def rows_oracle(logits, tokens):
    """Losses and gradients in float64."""
    logs = log_softmax(np.asarray(logits, np.float64), axis=-1)
    right = np.asarray(tokens)[..., None] == np.arange(logs.shape[-1])
    return -logs[right].reshape(tokens.shape), np.exp(logs) - right


def assert_rows_close(got, logits, tokens):
    losses, d_logits = rows_oracle(logits, tokens)
    dtype = logits.dtype.type
    assert (got[0].dtype, got[1].dtype) == (jnp.float32, dtype)
    np.testing.assert_allclose(got[0], losses, rtol=2e-6, atol=4e-6)
    # Of every number, not in norm: small probabilities count. Below: float16's subnormals, and
    # what float32's 1 - p leaves.
    floor = 2.0**-24 if dtype == jnp.float16 else 2e-7
    np.testing.assert_allclose(
        np.asarray(got[1], np.float64), d_logits, rtol=2 * ROUNDING[dtype], atol=floor
    )


WAYS = {
    "plain": functools.partial(row_losses, implementation="plain"),
    "kernel": kernel(interpret=True),
    "blocks": kernel(interpret=True, tiling=Tiling(columns=64, num_warps=1)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 7, 100, 128, 4096 + 1])
@pytest.mark.parametrize("way", WAYS)
def test_rows_are_log_softmax_and_its_gradient(way, vocab_size, dtype):
    logits, tokens = rows(vocab_size, dtype)
    assert_rows_close(quick_jit(WAYS[way])(logits, tokens), logits, tokens)
    losses, nothing = quick_jit(functools.partial(WAYS[way], with_gradient=False))(logits, tokens)
    assert nothing is None
    np.testing.assert_allclose(losses, rows_oracle(logits, tokens)[0], rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_rows_of_extreme_logits(way, dtype):
    """Large ones come first, last and in all blocks; all alike; and one token against the rest."""
    logits = np.zeros((6, 200), np.float32)
    logits[0, 0], logits[1, -1], logits[2] = 1e4, 1e4, -1e4
    logits[3], logits[4, ::2], logits[5] = 1e4, -1e4, np.linspace(-1e4, 1e4, 200)
    logits = jnp.asarray(logits, dtype)
    tokens = jnp.asarray([0, 3, 7, 199, 2, 0], jnp.int32)
    assert_rows_close(quick_jit(WAYS[way])(logits, tokens), logits, tokens)


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_no_code_lose_nothing_but_the_sum(way):
    """A token that is none changes no other row, and reads nothing beyond its own."""
    logits, tokens = rows(100, jnp.float32)
    losses, d_logits = quick_jit(WAYS[way])(logits, tokens.at[1].set(100).at[2].set(-1))
    want = -log_softmax(np.asarray(logits, np.float64), -1)
    np.testing.assert_allclose(losses[0], want[0, 0], rtol=2e-6)
    np.testing.assert_allclose(losses[1:], (want + logits)[1:, 0], rtol=2e-6)
    np.testing.assert_allclose(d_logits[1:], np.exp(-want[1:]), rtol=1e-5)


def test_bad_rows_are_refused():
    logits, tokens = rows(100, jnp.float32)
    for changes, reason in (
        ({"implementation": "fast"}, "'fast' is not one of"),
        ({"tokens": tokens[:2]}, r"so \(3,\); got \(2,\)"),
        ({"implementation": "triton"}, "needs an NVIDIA GPU"),
    ):
        with pytest.raises(ValueError, match=reason):
            row_losses(**({"logits": logits, "tokens": tokens} | changes))
    with on("H200"), pytest.raises(ValueError, match="not int32"):
        row_losses(logits.astype(jnp.int32), tokens, implementation="triton")


# Losses of the head


def head_inputs(batch, num_tokens, width, vocab_size, dtype, scale=1.0):
    rng = np.random.default_rng([batch, num_tokens, vocab_size])
    x = jnp.asarray(rng.standard_normal((batch, num_tokens, width)), dtype)
    weights = rng.normal(0, scale / width**0.5, (width, vocab_size)).astype(jnp.bfloat16)
    tokens = rng.integers(0, vocab_size, (batch, num_tokens))
    return x, jnp.asarray(weights, jnp.float32), jnp.asarray(tokens, jnp.int32)


def head_oracle(x, weights, tokens):
    """Losses and both gradients of their mean in float64."""
    x, weights = np.float64(x), np.float64(weights)
    losses, d_logits = rows_oracle(x @ weights, tokens)
    d_logits /= tokens.size
    d_weights = np.einsum("bnd,bnv->dv", x, d_logits)
    return {"losses": losses, "x": d_logits @ weights.T, "kernel": d_weights}


def head_results(x, weights, tokens, loss_scale=1.0):
    loss = lambda *args: mean_loss(*args, tokens) * loss_scale
    value, (d_x, d_kernel) = jax.value_and_grad(loss, argnums=(0, 1))(x, weights)
    return {
        "losses": token_losses(x, weights, tokens),
        "mean": value / loss_scale,
        "value": mean_loss(x, weights, tokens),
        "x": d_x,
        "kernel": d_kernel,
    }


def assert_head_close(got, args, tolerance, loss_scale=1.0):
    want = head_oracle(*args)
    want |= dict.fromkeys(("mean", "value"), want["losses"].mean())
    assert got.keys() == want.keys()
    for name, y in want.items():
        x = np.asarray(got[name], np.float64) / (loss_scale if name in ("x", "kernel") else 1)
        assert x.shape == np.shape(y), name
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y), name


TOLERANCES = {jnp.float32: 2e-6, jnp.bfloat16: 8e-3, jnp.float16: 1e-3}


@pytest.mark.parametrize("dtype", DTYPES)
# Parts of all 5 tokens; of 2, 2 and 1; of one.
@pytest.mark.parametrize(("most", "parts"), [(2**28, [5]), (2 * 3 * 37, [2, 2, 1]), (1, [1] * 5)])
def test_losses_and_gradients_of_the_head(most, parts, dtype, monkeypatch):
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", most)
    args = head_inputs(3, 5, 16, 37, dtype)
    sizes = [len(range(5)[part]) for part in cross_entropy._parts(3, 5, 37)]
    assert sizes == parts
    got = jax.jit(head_results)(*args)
    assert (got["x"].dtype, got["kernel"].dtype, got["losses"].dtype) == (
        dtype,
        jnp.float32,
        jnp.float32,
    )
    assert_head_close(got, args, TOLERANCES[dtype])


def test_the_gradient_is_that_of_jax_in_float64():
    with jax.enable_x64(True):
        x, weights, tokens = head_inputs(2, 3, 8, 11, jnp.float64)
        weights = weights.astype(jnp.float64)

        def plain(x, weights):
            logs = jax.nn.log_softmax(x @ weights)
            return -(jnp.take_along_axis(logs, tokens[..., None], -1).mean() ** 2)

        ours = lambda x, weights: -(mean_loss(x, weights, tokens) ** 2)
        want = jax.value_and_grad(plain, argnums=(0, 1))(x, weights)
        got = jax.value_and_grad(ours, argnums=(0, 1))(x, weights)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), got, want)


def test_float16_gradients_do_not_underflow():
    """Of the mean of 8192 tokens over 4096 codes, each a number below 2^-24 for most logits; a
    loss scale of 2^15 is what float16 is trained with."""
    args = head_inputs(16, 512, 8, 4096, jnp.float16)
    assert np.median(np.abs(rows_oracle(args[0] @ args[1], args[2])[1])) / args[2].size < 2.0**-24
    got = jax.jit(functools.partial(head_results, loss_scale=2.0**15))(*args)
    assert_head_close(got, args, TOLERANCES[jnp.float16], 2.0**15)


# Devices


def test_lowers_to_one_launch_for_each_part_without_float32_logits(monkeypatch):
    batch, num_tokens, width, vocab_size = 8, 24, 32, 16384
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", batch * 10 * vocab_size)
    shape = jax.ShapeDtypeStruct
    for device, launches in (("H200", 3), ("A100", 3), ("v5e", 0)):
        for dtype, name in ((jnp.bfloat16, "bf16"), (jnp.float16, "f16")):
            args = (
                shape((batch, num_tokens, width), dtype),
                shape((width, vocab_size), jnp.float32),
                shape((batch, num_tokens), jnp.int32),
            )
            for run in (jax.grad(mean_loss, argnums=(0, 1)), token_losses):
                text = lower(device, run, *args)
                assert text.count("@__gpu$xla.gpu.triton") == launches
                assert f"x{vocab_size}x{name}" in text
                arrays = set(re.findall(r"tensor<([\dx]+)x16384xf32>", text))
                assert (arrays <= {"32"}) == (launches > 0), arrays


def interpret_on_gpu(monkeypatch):
    """Kernels run as on a GPU; returns the list of the shapes they are given."""
    seen, make = [], rows_module.kernel

    def interpreted(**options):
        run = make(**options, interpret=True)
        return lambda logits, tokens: (seen.append(logits.shape), run(logits, tokens))[1]

    monkeypatch.setattr(rows_module, "kernel", interpreted)
    monkeypatch.setattr(choice, "device", lambda: choice.Device("gpu", "NVIDIA A100"))
    return seen


@pytest.mark.parametrize(
    ("sizes", "batch", "shapes"),
    [
        ((4, 2, 1), 8, {(1 * 5, 36)}),  # each device its own image
        ((2, 2, 2), 8, set()),  # the vocabulary is split: XLA's own operations
        ((4, 2, 1), 3, {(3 * 2, 36), (3 * 1, 36)}),  # images are not: all devices have all
    ],
)
def test_each_device_takes_its_own_rows(sizes, batch, shapes, monkeypatch):
    seen = interpret_on_gpu(monkeypatch)
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", 5 * 2 * 36 if batch == 8 else 3 * 2 * 36)
    args = host = head_inputs(batch, 5, 16, 36, jnp.float32)
    mesh = make_mesh(MeshConfig(*sizes))
    kernel_axes = jax.sharding.PartitionSpec("fsdp", "tensor")
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        if batch == 8:
            x, tokens = jax.device_put((args[0], args[2]), batch_sharding(mesh))
            args = (x, jax.device_put(args[1], jax.NamedSharding(mesh, kernel_axes)), tokens)
        run = jax.jit(head_results).lower(*args).compile()
        got = run(*args)
    assert set(seen) == shapes
    assert_head_close(got, host, 2e-6)
    # What travels: at most the kernel or its gradient, never logits.
    moved = re.findall(r"= .*? (?:all-|collective-|reduce-scatter)\S*\(", run.as_text())
    numbers = [
        np.prod([int(n) for n in shape.split(",") if n])
        for line in moved
        for shape in re.findall(r"f32\[([\d,]*)\]", line)
    ]
    assert all(n <= 16 * 36 for n in numbers), moved
    assert bool(numbers) == (batch == 8)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_gradients_of_the_kernel_are_rounded_before_they_are_sent(sizes):
    args = host = head_inputs(8, 5, 16, 36, jnp.bfloat16)
    mesh = make_mesh(MeshConfig(*sizes))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        x, tokens = jax.device_put((args[0], args[2]), batch_sharding(mesh))
        args = x, args[1].astype(jnp.bfloat16), tokens
        lowered = jax.jit(head_results).lower(*args)
        got = lowered.compile()(*args)
    assert_head_close(got, host, TOLERANCES[jnp.bfloat16])
    sums = re.findall(r'"stablehlo.all_reduce".*?-> tensor<(\w+)>', lowered.as_text(), re.S)
    assert sums == [f"16x{36 // sizes[2]}xbf16"]


def test_the_kernel_is_what_a_gpu_runs(monkeypatch):
    seen = interpret_on_gpu(monkeypatch)
    args = head_inputs(2, 3, 16, 100, jnp.bfloat16)
    assert_head_close(head_results(*args), args, TOLERANCES[jnp.bfloat16])
    assert set(seen) == {(6, 100)}
