"""A layer from one mixer to the next in one launch, against float64, interpreted on the CPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from kernel_cases import lower, quick_jit
from test_decode_product import NEEDS_JAX_11, exact, normal
from test_models import tiny_model

from lasad_jax.models import LASADGen, ModelConfig, decoder, decoder_forms
from lasad_jax.models.generator import abstract_parameters
from lasad_jax.ops.kernels import between_tiling, decode_triton
from lasad_jax.ops.kernels.between_tiling import (
    CLUSTER,
    DEPTH,
    UNIT,
    best_product,
    new_counters,
    rows_in_flight,
    weight_slots,
    whole_rows,
)
from lasad_jax.ops.kernels.decode_tiling import interleave
from lasad_jax.ops.passes.local_conv import TAPS, next_token, num_recent

if jax.__version_info__ >= (0, 11):
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from lasad_jax.ops.kernels.decode_between import between

RNG = np.random.default_rng()
EPSILON = 1e-2


def normalised(x):
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPSILON)


def random_weights(V, D, F, E):
    return {
        "out": normal(V, D, scale=V**-0.5),
        "taps": normal(len(TAPS), D, scale=0.3),
        "gate_up": interleave(*(normal(D, F, scale=D**-0.5) for _ in range(2)), UNIT),
        "down": normal(F, D, scale=F**-0.5),
        "projection": None if E is None else normal(D, E, scale=D**-0.5),
    }


def oracle(mixed, x, recent, index, weights, columns):
    """x, the projection and the ring in float64."""
    w = {name: None if value is None else exact(value) for name, value in weights.items()}
    x = exact(x) + exact(mixed) @ w["out"]
    with jax.enable_x64(True):
        arrays = (jnp.asarray(exact(y)) for y in (normalised(x), recent, w["taps"]))
        z, recent, taps = arrays
        y, recent = next_token(z, recent, jnp.int32(index), taps, columns=columns)
        y, recent = exact(y), exact(recent)
    pairs = (y @ w["gate_up"]).reshape(len(x), -1, 2, UNIT)
    gate, up = (pairs[:, :, i].reshape(len(x), -1) for i in range(2))
    x = x + (gate / (1 + np.exp(-gate)) * up) @ w["down"]
    return x, None if w["projection"] is None else normalised(x) @ w["projection"], recent


def assert_near(got, want):
    assert got.shape == want.shape
    assert np.abs(exact(got) - want).max() < 1e-2 * np.abs(want).max()


@NEEDS_JAX_11
@pytest.mark.parametrize(
    ("images", "sizes", "columns", "programs"),
    [
        (2, (128, 128, 128, 192), 4, 2),  # fewer than a tile
        (3, (128, 128, 2560, 192), 4, 4),  # more inputs than shared memory holds at once
        (67, (128, 128, 128, 192), 3, 3),  # rows are no multiple of a tile; tiles taken by turns
        (64, (192, 128, 192, 128), 5, 7),  # most programs have nothing to do
        (5, (128, 384, 64, 128), 3, 4),  # who takes part in down has no part of gate and up
        (136, (192, 128, 128, None), 1, 6),  # the last layer
    ],
)
def test_token_by_token(images, sizes, columns, programs):
    """Through the ring of recent inputs and around its end. Nothing is read too early or late."""
    weights = random_weights(*sizes)
    V, D = weights["out"].shape
    window = num_recent(columns)
    recent, counters = normal(images, window, D), new_counters()
    rows = whole_rows(images)
    run = functools.partial(
        between,
        **weights,
        offsets=TAPS,
        columns=columns,
        epsilon=EPSILON,
        programs=programs,
        interpret=True,
    )
    for index in (1, window, 2 * window + 1):
        mixed, x = normal(rows, V), normal(rows, D)
        want = oracle(mixed[:images], x[:images], recent, index, weights, columns)
        # Beyond the end of an array bulk copies read zeros.
        how = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="zero")
        with plgpu.force_gpu_interpret_mode(how):
            *got, counters = jax.block_until_ready(
                run(mixed, x, recent, jnp.int32(index), counters)
            )
        assert not get_races().races_found
        recent = got[2]
        for one, other in zip(got, want, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert_near(one[:images], other)
    assert not any(counted.any() for counted in counters)


def decoded(config, variables, tokens, labels, implementation, packing=None):
    model, rest = LASADGen(config), jnp.asarray(tokens[:, :-1].T)

    def run(variables, labels, rest):
        weights = decoder.prepare(config, variables["params"], packing or implementation)
        _, cache = model.apply(variables, labels, tokens[:, :0], method="prefill")

        def step(cache, token):
            decode = functools.partial(decoder.decode, implementation=implementation)
            features, cache = decode(config, weights, token, cache)
            return cache, decoder.logits(weights, features)

        return jax.lax.scan(step, decoder.start(config, cache), rest)[1]

    return quick_jit(run)(variables, labels, rest)


@NEEDS_JAX_11
def test_whole_steps_are_as_near_to_float32_as_the_plain_form(monkeypatch):
    from lasad_jax.ops.kernels import decode_between

    sizes = {"width": 128, "num_heads": 2, "key_dim": 16, "ffn_width": 128}
    config, variables, _, _ = tiny_model(dtype="bfloat16", grid=(2, 2), **sizes)
    # Images that fill no tile.
    tokens = RNG.integers(0, config.vocab_size, (61, config.num_tokens))
    labels = RNG.integers(0, config.num_classes, 61)
    args = variables, tokens, labels
    truth = decoded(dataclasses.replace(config, dtype="float32"), *args, "xla")
    plain = decoded(config, *args, "xla")
    # Other forms take the same weights.
    np.testing.assert_allclose(decoded(config, *args, "xla", "mosaic"), plain, atol=1e-5)

    interpreted = functools.partial(between, programs=2, interpret=True)
    monkeypatch.setattr(decode_between, "between", interpreted)
    mix = functools.partial(decode_triton.mix, interpret=True)
    monkeypatch.setattr(decode_triton, "mix", mix)
    monkeypatch.setattr(decoder_forms, "_obstacle", lambda config: None)
    monkeypatch.setattr(between_tiling, "obstacle", lambda *sizes: None)
    fused = decoded(config, *args, "mosaic")
    plain, fused = (np.linalg.norm(x - truth) / np.linalg.norm(truth) for x in (plain, fused))
    assert plain > 1e-4
    assert fused < 1.25 * plain


@NEEDS_JAX_11
def test_a_layer_on_hopper_is_two_launches():
    config = ModelConfig(num_layers=3, width=256, num_heads=4, ffn_width=512, dtype="bfloat16")
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    params = jax.tree.map(shape, nn.unbox(abstract_parameters(config)))
    prepare = functools.partial(decoder.prepare, config, implementation="mosaic")
    weights = jax.eval_shape(prepare, params)
    integers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    _, cache = jax.eval_shape(
        functools.partial(decoder.prefill, config), weights, integers(64), integers(64, 0)
    )
    decode = functools.partial(decoder.decode, config, implementation="mosaic")
    text = lower("H200", decode, weights, integers(64), cache)
    # The same for all layers but the last, of which nothing follows.
    assert text.count("call @_heads_and_rest") == 3
    assert text.count('name = "decode_mix"') == text.count("@mosaic_gpu_v2") == 2


@pytest.mark.parametrize(
    "size", [(256, 768, 768), (128, 1280, 3008), (64, 128, 64), (1000, 640, 128)]
)
@pytest.mark.parametrize("gated", [False, True])
def test_products_fit_and_cover(size, gated):
    product = best_product(*size, 132, gated=gated)
    rows = product.rows * CLUSTER
    assert product.blocks * rows >= size[0] > (product.blocks - 1) * rows
    assert product.tiles * UNIT == product.blocks * size[2]
    assert product.rows * product.units <= 128
    assert 1 <= product.slots <= product.steps
    assert rows_in_flight((product, product)) * DEPTH * 2 <= 96 * 1024
    assert weight_slots((product, product), 132) >= 2 * product.units
