"""All layers of a token in one launch, against float64, interpreted on the CPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from kernel_cases import lower, on, quick_jit
from test_decode_product import NEEDS_JAX_11, exact, normal
from test_models import tiny_model

from lasad_jax.models import LASADGen, ModelConfig, decoder, decoder_forms
from lasad_jax.models.generator import abstract_parameters
from lasad_jax.ops.kernels import layer_tiling
from lasad_jax.ops.kernels.decode_tiling import interleave
from lasad_jax.ops.kernels.layer_ring import to_blocks
from lasad_jax.ops.kernels.layer_tiling import (
    CLUSTER,
    DEPTH,
    UNIT,
    best_product,
    counters,
    pack,
    rows_in_flight,
    weight_slots,
    whole_rows,
)
from lasad_jax.ops.passes.local_conv import TAPS, next_token, num_recent
from lasad_jax.ops.ring import ROWS, Ring, empty_log_weight, ring_step

if jax.__version_info__ >= (0, 11):
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from lasad_jax.ops.kernels.decode_layers import all_layers

RNG = np.random.default_rng()
EPSILON = 1e-2
KEY, VALUE = 32, 64


def normalised(x, axis=1):
    return x / np.sqrt((x**2).mean(axis=axis, keepdims=True) + EPSILON)


def silu(x):
    return x / (1 + np.exp(-x))


def random_weights(D, H, F, grid, *, rope=True, selective=True):
    """Of a layer, and the turns of its RoPE for one head."""
    V, places = H * VALUE, grid[0] * grid[1]
    missing = -H % UNIT if selective else 0
    E = H * 2 * (KEY + VALUE) + (H + missing if selective else 0)
    angles = RNG.uniform(0, 7, (places + 1, KEY // 2))
    turns = np.stack([np.repeat(f(angles), 2, axis=1) for f in (np.cos, np.sin)], axis=1)
    turns[:, 1, ::2] *= -1
    return {
        "projection": normal(D, E, scale=D**-0.5),
        "out": normal(V, D, scale=V**-0.5),
        "taps": normal(len(TAPS), D, scale=0.3),
        "gate_up": interleave(*(normal(D, F, scale=D**-0.5) for _ in range(2)), UNIT),
        "down": normal(F, D, scale=F**-0.5),
        "log_factor": jnp.asarray(-RNG.uniform(0, 0.3, (places, H)), jnp.float32),
        "gate_bias": jnp.asarray(RNG.normal(-2, 1, H), jnp.float32) if selective else None,
        "turns": jnp.asarray(np.tile(turns, 2), jnp.float32) if rope else None,
    }


def random_ring(images, H):
    """As if one round had been folded; nothing is in it but the prefix token."""
    ring = Ring(
        memory=normal(images, H, KEY, VALUE),
        recent_k=normal(images, H, 1, KEY),
        recent_v=normal(images, H, 1, VALUE),
        log_weight=jnp.broadcast_to(empty_log_weight(), (images, H, ROWS)),
    )
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, ROWS - 1), (0, 0)))
    return dataclasses.replace(ring, recent_k=pad(ring.recent_k), recent_v=pad(ring.recent_v))


def oracle(x, ring, recent, index, weights, columns):
    """x and both rings in float64."""
    w = {name: None if value is None else exact(value) for name, value in weights.items()}
    H = w["log_factor"].shape[1]
    x, place = exact(x), index - 1
    projection = normalised(x) @ w["projection"]
    heads = projection[:, : H * 2 * (KEY + VALUE)].reshape(len(x), H, -1)
    q, k, v, gate = np.split(heads, [KEY, 2 * KEY, 2 * KEY + VALUE], axis=2)
    q, k = silu(q), silu(k)
    if w["turns"] is not None:
        cos, sin = w["turns"][index, :, :KEY]
        swap = lambda y: y.reshape(len(x), H, -1, 2)[..., ::-1].reshape(y.shape)
        q, k = (y * cos + swap(y) * sin for y in (q, k))
    g = np.broadcast_to(w["log_factor"][place], (len(x), H))
    if w["gate_bias"] is not None:
        content = projection[:, H * 2 * (KEY + VALUE) :][:, :H]
        g = g - np.logaddexp(0, content + w["gate_bias"])
    with jax.enable_x64(True):
        arrays = (jnp.asarray(y) for y in (q * KEY**-0.5, k, v, g))
        ring = jax.tree.map(lambda y: jnp.asarray(exact(y)), ring)
        mixed, ring = ring_step(ring, *arrays, jnp.int32(place))
        mixed, ring = exact(mixed), jax.tree.map(exact, ring)
    x = x + (normalised(mixed, 2) * silu(gate)).reshape(len(x), -1) @ w["out"]
    with jax.enable_x64(True):
        arrays = (jnp.asarray(exact(y)) for y in (normalised(x), recent, w["taps"]))
        z, recent, taps = arrays
        y, recent = next_token(z, recent, jnp.int32(index), taps, columns=columns)
        y, recent = exact(y), exact(recent)
    pairs = (y @ w["gate_up"]).reshape(len(x), -1, 2, UNIT)
    gate, up = (pairs[:, :, i].reshape(len(x), -1) for i in range(2))
    return x + (silu(gate) * up) @ w["down"], ring, recent


def assert_near(got, want, tolerance=2e-2):
    assert got.shape == want.shape
    got, finite = exact(got), np.isfinite(want)
    np.testing.assert_array_equal(np.isfinite(got), finite)
    assert np.abs(got[finite] - want[finite]).max() <= tolerance * np.abs(want[finite]).max()


LAYERS = 2


def stacked(trees):
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)


@NEEDS_JAX_11
@pytest.mark.parametrize(
    ("images", "sizes", "grid", "programs"),
    [
        (2, (128, 2, 128), (8, 4), 2),  # fewer than a tile
        (21, (128, 3, 1280), (3, 4), 2),  # more inputs than shared memory holds at once
        (67, (128, 2, 128), (3, 3), 3),  # rows are no multiple of a tile; tiles taken by turns
        (64, (128, 3, 192), (7, 5), 2),  # most programs have nothing to do
        (136, (128, 2, 64), (9, 1), 2),  # more parts of heads than lie in memory at once
    ],
)
def test_token_by_token(images, sizes, grid, programs):
    """Through the rings and around their ends. Nothing is read too early or late."""
    bare = images == 64
    weights = [
        random_weights(*sizes, grid, rope=not bare, selective=not bare) for _ in range(LAYERS)
    ]
    turns = weights[0]["turns"]
    D, H, _ = sizes
    columns = grid[1]
    window, last, rows = num_recent(columns), grid[0] * columns, whole_rows(images)
    recent = normal(LAYERS, images, window, D)
    rings = [random_ring(images, H) for _ in range(LAYERS)]
    blocked, state = stacked([to_blocks(ring, rows) for ring in rings]), counters(LAYERS)
    fill = lambda x: None if x is None else jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -H % 4)])
    tables = [{name: fill(w[name]) for name in ("log_factor", "gate_bias")} for w in weights]
    matrices = (("projection", 1), ("out", 1), ("gate_up", 2), ("down", 1))
    pieces = [pack(*((w[name], units) for name, units in matrices)) for w in weights]
    run = functools.partial(
        all_layers,
        pieces=jnp.stack(pieces),
        sizes=(weights[0]["projection"].shape[1], sizes[2]),
        taps=jnp.stack([w["taps"] for w in weights]),
        **stacked(tables),
        turns=turns,
        offsets=TAPS,
        columns=columns,
        epsilon=EPSILON,
        programs=programs,
        interpret=True,
    )
    for index in sorted({1, 2, 9, min(15, last), min(16, last), last}):
        x = normal(rows, D)
        want, want_recent = exact(x[:images]), []
        for i, layer in enumerate(weights):
            layer = layer | {"turns": turns}
            want, ring, its_recent = oracle(want, rings[i], recent[i], index, layer, columns)
            rings[i] = jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), ring, rings[i])
            want_recent.append(its_recent)
        # Beyond the end of an array bulk copies read zeros.
        how = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="zero")
        with plgpu.force_gpu_interpret_mode(how):
            x, blocked, recent, state = jax.block_until_ready(
                run(x, blocked, recent, jnp.int32(index), state)
            )
        assert not get_races().races_found
        assert_near(x[:images], want)
        assert_near(recent, np.stack(want_recent))
        here = [to_blocks(jax.tree.map(jnp.ones_like, ring), rows) for ring in rings]
        wanted = stacked([to_blocks(ring, rows) for ring in rings])
        trees = (jax.tree.leaves(tree) for tree in (blocked, wanted, stacked(here)))
        for got, want, mask in zip(*trees, strict=True):
            # Both have rounded the ring once or twice.
            assert_near(got[mask > 0], exact(want)[mask > 0])
    assert not state.any()


def decoded(config, variables, tokens, labels, form):
    model, rest = LASADGen(config), jnp.asarray(tokens[:, :-1].T)

    def run(variables, labels, rest):
        weights = decoder.prepare(config, variables["params"], len(labels), form)
        _, cache = model.apply(variables, labels, tokens[:, :0], method="prefill")

        def step(cache, token):
            features, cache = decoder.decode(config, weights, token, cache)
            return cache, decoder.logits(weights, features)

        return jax.lax.scan(step, decoder.start(config, weights, cache), rest)[1]

    return quick_jit(run)(variables, labels, rest)


@NEEDS_JAX_11
def test_whole_steps_are_as_near_to_float32_as_the_plain_form(monkeypatch):
    from lasad_jax.ops.kernels import decode_layers

    # Heads that are no multiple of four, images that fill no tile.
    sizes = {"width": 128, "num_heads": 2, "ffn_width": 128}
    config, variables, _, _ = tiny_model(dtype="bfloat16", grid=(2, 2), **sizes)
    tokens = RNG.integers(0, config.vocab_size, (61, config.num_tokens))
    labels = RNG.integers(0, config.num_classes, 61)
    args = variables, tokens, labels
    truth = decoded(dataclasses.replace(config, dtype="float32"), *args, "xla")
    plain = decoded(config, *args, "xla")
    interpreted = functools.partial(all_layers, programs=2, interpret=True)
    monkeypatch.setattr(decode_layers, "all_layers", interpreted)
    monkeypatch.setattr(decoder_forms, "_obstacle", lambda config: None)
    monkeypatch.setattr(layer_tiling, "obstacle", lambda *sizes: None)
    fused = decoded(config, *args, "mosaic")
    plain, fused = (np.linalg.norm(x - truth) / np.linalg.norm(truth) for x in (plain, fused))
    assert plain > 1e-4
    assert fused < 1.25 * plain


@NEEDS_JAX_11
def test_a_token_on_hopper_is_one_launch():
    config = ModelConfig(num_layers=3, width=256, num_heads=4, ffn_width=512, dtype="bfloat16")
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    params = jax.tree.map(shape, nn.unbox(abstract_parameters(config)))
    integers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    with on("H200"):
        prepare = functools.partial(decoder.prepare, config, num_rows=64)
        weights = jax.eval_shape(prepare, params)
        assert weights.form == "mosaic"
        _, cache = jax.eval_shape(
            functools.partial(decoder.prefill, config), weights, integers(64), integers(64, 0)
        )
    text = lower("H200", functools.partial(decoder.decode, config), weights, integers(64), cache)
    assert text.count("@mosaic_gpu_v2") == 1
    assert "decode_mix" not in text


@pytest.mark.parametrize(
    "size", [(256, 768, 768), (128, 1280, 3008), (64, 128, 64), (1000, 640, 128)]
)
@pytest.mark.parametrize("gated", [False, True])
def test_products_fit_and_cover(size, gated):
    product = best_product(*size, 132, gated=gated, staged=2 * gated)
    rows = product.rows * CLUSTER
    assert product.blocks * rows >= size[0] > (product.blocks - 1) * rows
    assert product.tiles * UNIT == product.blocks * size[2]
    assert product.rows * product.units <= 128
    assert 1 <= product.slots <= product.steps
    assert rows_in_flight((product, product)) * DEPTH * 2 <= 96 * 1024
    # A part of the heads has three pieces, with a gate a step has two.
    assert weight_slots((product, product), 132) >= 3


@pytest.mark.parametrize(("K", "N", "units"), [(128, 64, 1), (320, 192, 1), (200, 256, 2)])
def test_pieces_are_those_of_tiles_by_turns(K, N, units):
    w, other = normal(K, N), normal(128, 64)
    pieces = exact(pack((other, 1), (w, units)))[1:]
    wide = np.pad(exact(w), ((0, -K % DEPTH), (0, 0)))
    i = 0
    for column in range(N // (UNIT * units)):
        for k in range(len(wide) // DEPTH):
            for unit in range(units):
                first = (column * units + unit) * UNIT
                want = wide[k * DEPTH : (k + 1) * DEPTH, first : first + UNIT]
                np.testing.assert_array_equal(pieces[i], want)
                i += 1
    assert i == len(pieces)
