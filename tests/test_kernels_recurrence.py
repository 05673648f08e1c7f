"""The fused single recurrence of every backend, interpreted on a CPU, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import ops_cases
import pytest
from jax.experimental import pallas as pl
from kernel_cases import (
    Case,
    assert_close,
    cast,
    inputs,
    interpreted,
    quick_jit,
    run,
    run_arrays,
    with_gradients,
)

from lasad_jax.ops.kernels.recurrence import fused_recurrence

GATES = ("mixed", "resets", 0.0, -1e-4, -50.0, -256.0)
HOPPER = pytest.param(
    "mosaic_gpu",
    jnp.bfloat16,
    marks=pytest.mark.skipif(
        jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11"
    ),
)
BACKENDS = [
    ("triton", jnp.float32),
    ("triton", jnp.bfloat16),
    ("mosaic_tpu", jnp.float32),
    ("mosaic_tpu", jnp.bfloat16),
    HOPPER,
]
ONE_EACH = [BACKENDS[0], BACKENDS[3], HOPPER]


def small(name, **options):
    """A case of two chunks that the backend can run, the last chunk part empty."""
    own = {"widths": (64, 64), "heads": 1} if name == "mosaic_gpu" else {}
    return Case(**{"num_tokens": 72, "memory": True, "end": True} | own | options)


def backend_for(name, dtype, case, **options):
    if name == "mosaic_tpu":  # chunks of 128 by default
        options.setdefault("chunk", 64)
    return interpreted(name, dtype, case.widths, **options)


# Values


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("name", "dtype"), BACKENDS)
def test_every_gate(name, dtype, gate):
    case = small(name, gate=gate)
    assert_close(run(case, backend_for(name, dtype, case), dtype), case, dtype)


THREE_HEADS = Case(65, 1, heads=3, widths=(16, 64), shared=True, memory=True)
LENGTHS = [
    ("triton", jnp.float32, Case(1, 1, memory=True, end=True), {}),
    ("mosaic_tpu", jnp.bfloat16, Case(2, 3, end=True), {}),  # a prefix cut short
    ("triton", jnp.bfloat16, Case(63, 0, widths=(32, 16)), {}),
    ("mosaic_tpu", jnp.float32, Case(64, 3, end=True), {"chunk": 64}),
    ("triton", jnp.float32, THREE_HEADS, {}),
    ("mosaic_tpu", jnp.bfloat16, THREE_HEADS, {"chunk": 64}),
    ("triton", jnp.bfloat16, Case(255, 3), {"chunk": 32}),
    ("mosaic_tpu", jnp.float32, Case(255, 0, shared=True), {}),
]
SEGMENTS = [
    (Case(576, 1), {"segments": 3}),
    # Five chunks in segments of two: one is half empty, one empty.
    (Case(70, 3, shared=True, memory=True, end=True), {"segments": 4, "chunk": 16}),
]


@pytest.mark.parametrize(("name", "dtype", "case", "options"), LENGTHS)
def test_lengths_prefixes_widths_and_states(name, dtype, case, options):
    assert_close(run(case, interpreted(name, dtype, case.widths, **options), dtype), case, dtype)


@pytest.mark.parametrize(("case", "options"), SEGMENTS)
def test_segments_of_triton(case, options):
    dtype = jnp.float32 if case.memory else jnp.bfloat16
    assert_close(run(case, interpreted("triton", dtype, **options), dtype), case, dtype)


@pytest.mark.parametrize(("name", "dtype"), [HOPPER])
def test_segments_of_hopper(name, dtype):
    """Four chunks in segments of two: one is half empty, one empty."""
    case = Case(200, 1, widths=(64, 64), heads=1, shared=True, memory=True, end=True)
    backend = interpreted(name, dtype, case.widths, segments=3)
    assert_close(run(case, backend, dtype), case, dtype)


def test_tpu_programs_of_several_heads():
    """A program takes at most 512 lanes of whole heads: here each head is a program."""
    case = Case(20, 1, batch=1, heads=5, widths=(128, 128))
    backend = interpreted("mosaic_tpu", jnp.float32, case.widths, chunk=32)
    assert_close(run(case, backend, jnp.float32), case, jnp.float32)


@pytest.mark.parametrize("gate", ["mixed", 0.0])
def test_error_does_not_grow_with_length(gate):
    """One running sum over all tokens, for dg, would miss by percents, or wholly if mixed."""
    case = Case(4096, 1, batch=1, heads=1, gate=gate)
    backend = interpreted("triton", jnp.bfloat16)
    assert_close(run(case, backend, jnp.bfloat16), case, jnp.bfloat16)


# What is not a token


def test_interpreters_poison_what_nobody_wrote():
    """Comparisons find rows that a kernel forgot, or read past the end: they are NaN."""
    shape = jax.ShapeDtypeStruct((3, 2), jnp.float32)
    block = pl.BlockSpec((2, 2), lambda i: (i, 0))

    def forgets_a_row(x_ref, o_ref, sums_ref):
        o_ref[0] = x_ref[0]
        sums_ref[...] = jnp.full((2, 2), jnp.sum(x_ref[...]))

    call = pl.pallas_call(
        forgets_a_row, grid=(2,), in_specs=[block], out_specs=[block] * 2,
        out_shape=[shape] * 2, interpret=True,
    )  # fmt: skip
    out, sums = call(jnp.ones((3, 2)))
    np.testing.assert_array_equal(jnp.isnan(out[:, 0]), [False, True, False])
    np.testing.assert_array_equal(jnp.isnan(sums[:, 0]), [False, False, True])


@pytest.mark.parametrize(("name", "dtype"), ONE_EACH)
def test_images_do_not_touch(name, dtype):
    """NaN in one image, which ends within a chunk, leaves the other's bits as they were."""
    case = small(name)
    args, cotangents = cast(*inputs(case), dtype)
    poisoned = jax.tree.map(lambda x: x.at[1].set(jnp.nan), (args, cotangents))
    options = {"num_prefix": 1, "return_memory": True, "backend": backend_for(name, dtype, case)}
    clean, dirty = run_arrays(args, cotangents, **options), run_arrays(*poisoned, **options)
    for key, x in clean.items():
        np.testing.assert_array_equal(x[0], dirty[key][0], err_msg=key)
        assert jnp.all(jnp.any(jnp.isnan(dirty[key][1]), axis=-1)), key


@pytest.mark.parametrize(("name", "dtype"), BACKENDS)
def test_same_inputs_give_the_same_bits(name, dtype):
    case = small(name)
    backend = backend_for(name, dtype, case)
    first, second = (run(case, backend, dtype) for _ in range(2))
    assert jax.tree.all(jax.tree.map(lambda x, y: x.tobytes() == y.tobytes(), first, second))


# Transformations


@pytest.mark.parametrize(("segments", "mapped"), [(2, "qkv"), (1, "qkvgm")])
def test_vmap_is_a_loop(segments, mapped):
    """What is not mapped is shared, and g by all images besides."""
    case = small("triton", shared=True)
    backend = interpreted("triton", jnp.float32, segments=segments)
    args, cotangents = cast(*inputs(case), jnp.float32)
    axes = tuple(0 if letter in mapped else None for letter in "qkvgm")
    scale = lambda x, axis, i: x if axis is None else x * (1 + i)
    each = [tuple(map(functools.partial(scale, i=i), args, axes)) for i in range(3)]
    stack = lambda axis, *x: x[0] if axis is None else jnp.stack(x)
    stacked = tuple(map(stack, axes, *each))
    options = {"num_prefix": 1, "return_memory": True, "backend": backend}
    call = functools.partial(with_gradients, cotangents=cotangents, **options)
    got = quick_jit(jax.vmap(call, in_axes=(axes,)))(stacked)
    for i, args in enumerate(each):
        want = run_arrays(args, cotangents, **options)
        ops_cases.assert_close(jax.tree.map(lambda x, i=i: x[i], got), want, 1e-6)


def test_remat_and_scan_over_layers_change_nothing():
    (q, k, v, g, memory), (d_out, _) = cast(*inputs(small("triton")), jnp.float32)
    backend = interpreted("triton", jnp.float32)
    recurrence = functools.partial(fused_recurrence, num_prefix=1, backend=backend)
    layer = lambda v, scale: recurrence(q * scale, k, v, g, memory)[0] / 8

    def in_a_scan(v, scales):
        layers = jax.checkpoint(lambda v, scale: (layer(v, scale), None))
        return jax.lax.scan(layers, v, scales)[0]

    def one_by_one(v, scales):
        return layer(layer(v, scales[0]), scales[1])

    def run(function):
        out, pullback = jax.vjp(function, v, jnp.asarray([1, 0.5]))
        return out, pullback(d_out)

    got, want = (quick_jit(run, static_argnums=0)(f) for f in (in_a_scan, one_by_one))
    ops_cases.assert_close(got, want, 1e-6)
