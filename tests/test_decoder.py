"""The decoder: the logits of `decode_step`, its kernels those of its plain form, and no copies."""

import dataclasses
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from kernel_cases import lower, on, quick_jit
from test_models import tiny_model

from lasad_jax.config import MeshConfig, SamplingConfig
from lasad_jax.models import LASADGen, ModelConfig, decoder
from lasad_jax.models.generator import abstract_parameters
from lasad_jax.models.layers import NORM_EPSILON
from lasad_jax.models.local_conv import TAPS
from lasad_jax.ops import State
from lasad_jax.ops.kernels import decode_triton
from lasad_jax.ops.ring import NUM_RECENT, ROWS, Ring, ring_step, start_ring
from lasad_jax.sampling.decode import balanced_labels, generate, sample_tokens
from lasad_jax.training.sharding import RULES, make_mesh

NEEDS_JAX_11 = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11"
)
# Every pair of choices stands together in one of them.
FAMILIES = [
    {"decay": decay, "selective": selective, "local_conv": conv, "rope": rope}
    for decay, selective, conv, rope in (
        ("none", True, True, False),
        ("none", False, False, True),
        ("sequence", True, False, False),
        ("sequence", False, True, True),
        ("raster", True, True, True),
        ("raster", False, False, False),
        ("manhattan", False, True, False),
        ("manhattan", False, False, True),
    )
]
GRIDS = itertools.cycle([(3, 5), (1, 7), (6, 6)])
GIVEN = itertools.cycle([0, 4])
VARIANTS = [family | {"grid": next(GRIDS)} for family in FAMILIES] + [
    {"grid": (6, 6), "key_dim": 4},
    {"grid": (17, 1), "key_dim": 16},
    {"mixer": "softmax", "grid": (3, 5)},
    {"mixer": "softmax", "grid": (6, 6), "rope": False},
]


def decoded(config, variables, tokens, labels, num_given, *, plain_only=False):
    """Logits of every code after number `num_given`, by the plain path and the decoder."""
    model, rest = LASADGen(config), jnp.asarray(tokens[:, num_given:-1].T)

    def run(variables, labels, given, rest):
        _, cache = model.apply(variables, labels, given, method="prefill")
        weights = decoder.prepare(config, variables["params"])

        def plain(cache, token):
            logits, cache = model.apply(variables, token, cache, method="decode_step")
            return cache, logits

        def fast(cache, token):
            logits, cache = decoder.decode(config, weights, token, cache)
            return cache, logits

        logits = jax.lax.scan(plain, cache, rest)[1]
        if plain_only:
            return logits
        return logits, jax.lax.scan(fast, decoder.start(config, cache), rest)[1]

    return quick_jit(run)(variables, labels, tokens[:, :num_given], rest)


@pytest.mark.parametrize(
    ("changes", "num_given"), [(variant, next(GIVEN)) for variant in VARIANTS], ids=str
)
def test_logits_are_those_of_the_plain_path(changes, num_given):
    config, variables, tokens, labels = tiny_model(seed=1, **changes)
    plain, fast = decoded(config, variables, tokens, labels, num_given)
    assert np.abs(plain).max() > 0.5
    np.testing.assert_allclose(fast, plain, atol=1e-4)


@pytest.mark.parametrize("num_given", [0, 20])
def test_bf16_is_as_near_to_float32_as_the_plain_path(num_given):
    config, variables, tokens, labels = tiny_model(dtype="bfloat16", grid=(6, 6), width=64)
    exact = dataclasses.replace(config, dtype="float32")
    truth = decoded(exact, variables, tokens, labels, num_given, plain_only=True)
    plain, fast = decoded(config, variables, tokens, labels, num_given)
    plain, fast = (np.linalg.norm(x - truth) / np.linalg.norm(truth) for x in (plain, fast))
    assert plain > 1e-4
    assert fast < 1.25 * plain


# The ring


def tokens_of(dtype, steps, widths=(16, 32)):
    """A batch of 2 images with 3 heads of queries, keys, values and log-factors."""
    rng = np.random.default_rng(3)
    q, k = rng.standard_normal((2, steps, 2, 3, widths[0]))
    v = rng.standard_normal((steps, 2, 3, widths[1]))
    g = -rng.exponential(0.1, (steps, 2, 3))
    g[rng.random(g.shape) < 0.05] = -300
    return *(np.asarray(jnp.asarray(x, dtype), np.float64) for x in (q, k, v)), np.float32(g)


def ring_errors(dtype, memory_per_token):
    """Relative errors of outputs and of the final memory against float64, after 95 tokens.

    With `memory_per_token` of a memory in that dtype which every token writes.
    """
    q, k, v, g = tokens_of(dtype, 95)
    memory, outs = np.zeros((2, 3, 16, 32)), []
    for t in range(1, len(q)):
        memory = np.exp(np.float64(g[t]))[..., None, None] * memory
        memory += k[t][..., :, None] * v[t][..., None, :]
        out = np.einsum("bhd,bhde->bhe", q[t], memory)
        outs.append(out + np.einsum("bhd,bhd,bhe->bhe", q[t], k[0], v[0]))

    prefix_k, prefix_v = (jnp.asarray(x[0][:, None], dtype) for x in (k, v))
    state = State(prefix_k, prefix_v, jnp.zeros(memory.shape, jnp.float32), jnp.int32(1))

    def by_ring(ring, token):
        out, ring = ring_step(ring, *token)
        return ring, out

    def by_token(memory, token):
        q, k, v, g, _ = (x.astype(jnp.float32) for x in token)
        memory = jnp.exp(g)[..., None, None] * memory + k[..., :, None] * v[..., None, :]
        memory = memory.astype(memory_per_token)
        out = jnp.einsum("bhd,bhde->bhe", q, memory.astype(jnp.float32), precision="highest")
        seen = jnp.einsum("bhd,bhd->bh", q, prefix_k[:, 0].astype(jnp.float32))
        out += seen[..., None] * prefix_v[:, 0].astype(jnp.float32)
        return memory, out.astype(dtype)

    tokens = (*(jnp.asarray(x[1:], dtype) for x in (q, k, v)), g[1:], jnp.arange(len(q) - 1))
    if memory_per_token is None:
        ring, got = quick_jit(lambda x: jax.lax.scan(by_ring, start_ring(state), x))(tokens)
        weight = np.exp(np.float64(ring.log_weight))
        final = weight[..., 0, None, None] * np.float64(ring.memory)
        rows = (np.float64(x[:, :, 1:]) for x in (ring.recent_k, ring.recent_v))
        final += np.einsum("bhr,bhrd,bhre->bhde", weight[..., 1:], *rows)
    else:
        empty = state.memory.astype(memory_per_token)
        final, got = quick_jit(lambda x: jax.lax.scan(by_token, empty, x))(tokens)
    relative = lambda x, y: np.linalg.norm(np.float64(x) - y) / np.linalg.norm(y)
    return relative(got, np.stack(outs)), relative(final, memory)


def test_a_ring_is_the_recurrence():
    assert max(ring_errors(jnp.float32, None)) < 1e-6


def test_a_bf16_ring_loses_little_to_a_float32_memory():
    """Outputs are rounded to bf16 either way. A bf16 memory that every token writes is worse."""
    out, memory = ring_errors(jnp.bfloat16, None)
    exact_out, _ = ring_errors(jnp.bfloat16, jnp.float32)
    _, rounded_memory = ring_errors(jnp.bfloat16, jnp.bfloat16)
    assert out < 2 * exact_out
    assert memory < rounded_memory / 1.5


def test_a_ring_refuses_more_prefix_tokens():
    state = State(jnp.zeros((1, 2, 1, 4)), jnp.zeros((1, 2, 1, 4)), jnp.zeros((1, 1, 4, 4)), 2)
    with pytest.raises(ValueError, match="num_prefix: a ring holds one prefix token, not 2"):
        start_ring(state)


# The kernels

CASES = [
    {"width": 64, "grid": (6, 6)},
    {"width": 64, "key_dim": 16, "grid": (3, 5), "selective": False, "decay": "sequence"},
    {"width": 48, "num_heads": 3, "key_dim": 32, "grid": (1, 37), "rope": False, "decay": "none"},
]


def float64(tree):
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]


def one_layer(changes, dtype):
    config, variables, _, _ = tiny_model(seed=2, **{"num_layers": 1, "dtype": dtype} | changes)
    weights = decoder.prepare(config, variables["params"])
    rng = np.random.default_rng(4)
    random = lambda *shape: jnp.asarray(rng.standard_normal(shape), config.compute_dtype)
    return config, weights, weights.layers[0], random


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_mix_kernel_is_the_plain_form(changes, dtype):
    """Over two rounds of the ring, the first begun in its middle."""
    config, weights, layer, random = one_layer(changes, dtype)
    lead, key_dim, value_dim = (3, config.num_heads), config.query_dim, config.value_dim
    rows = lambda size: random(*lead, ROWS, size)
    empty = jnp.where(jnp.arange(ROWS) == 0, -0.3, -jnp.inf)
    log_weight = jnp.broadcast_to(empty, (*lead, ROWS))
    ring = Ring(random(*lead, key_dim, value_dim), rows(key_dim), rows(value_dim), log_weight)
    plain = quick_jit(lambda p, ring, i: decoder.mix(config, layer, p, weights.turns, ring, i))
    kernel = quick_jit(
        lambda p, ring, i: decode_triton.mix(
            ring,
            p,
            i,
            log_factor=layer.log_factor,
            turns=weights.turns,
            gate_bias=layer.gate_bias,
            epsilon=NORM_EPSILON,
            interpret=True,
        )
    )
    # The plain form rounds within silu too: several roundings of 2^-9 apart.
    allowed = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    for index in range(5, min(5 + 2 * NUM_RECENT, config.num_tokens)):
        projection = random(lead[0], layer.projection.shape[1])
        (want, after), (got, ring) = (
            run(projection, ring, jnp.int32(index)) for run in (plain, kernel)
        )
        assert got.dtype == want.dtype
        dtypes = lambda ring: [x.dtype for x in jax.tree.leaves(ring)]
        assert dtypes(after) == dtypes(ring)
        # Rows that are in the memory weigh nothing; what they hold does not matter.
        weigh = lambda ring: (ring.memory, jnp.exp(ring.log_weight), *held(ring))
        for x, y in zip(float64((got, weigh(ring))), float64((want, weigh(after))), strict=True):
            assert np.linalg.norm(x - y) <= allowed * np.linalg.norm(y)


def held(ring):
    """Keys and values that count."""
    weighs = (jnp.exp(ring.log_weight) > 0) | (jnp.arange(ROWS) == 0)
    return tuple(jnp.where(weighs[..., None], x, 0) for x in (ring.recent_k, ring.recent_v))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("grid", [(6, 6), (1, 7), (5, 1)])
def test_norm_conv_kernel_is_the_plain_form(grid, dtype):
    config, _, layer, random = one_layer({"width": 48, "grid": grid}, dtype)
    recent = random(3, grid[1] + 1, config.width)
    plain = quick_jit(lambda *args: decoder._norm_conv("xla", config, layer, *args))
    kernel = quick_jit(
        lambda *args: decode_triton.norm_conv(
            *args,
            taps=layer.conv,
            offsets=TAPS,
            columns=grid[1],
            epsilon=NORM_EPSILON,
            interpret=True,
        )
    )
    allowed = {"float32": 1e-6, "bfloat16": 5e-3}[dtype]
    for index in range(1, config.num_tokens):
        args = random(3, config.width), recent, jnp.int32(index)
        want, (got, recent) = plain(*args), kernel(*args)
        for x, y in zip(float64((got, recent)), float64(want), strict=True):
            assert np.linalg.norm(x - y) <= allowed * np.linalg.norm(y)


def test_the_index_may_be_a_loops_counter():
    """Which is of a weak type."""
    config, weights, layer, random = one_layer({"width": 64, "grid": (6, 6)}, "bfloat16")
    lead, size = (3, config.num_heads), config.query_dim
    rows, log_weight = random(*lead, ROWS, size), jnp.zeros((*lead, ROWS))
    ring = Ring(random(*lead, size, size), rows, rows, log_weight)
    projection = random(lead[0], layer.projection.shape[1])
    recent, x = random(3, config.grid[1] + 1, config.width), random(3, config.width)

    def run(ring, recent, x):
        def step(i, carry):
            ring, recent, x = carry
            _, ring = decode_triton.mix(
                ring,
                projection,
                1 + i,
                log_factor=layer.log_factor,
                turns=weights.turns,
                gate_bias=layer.gate_bias,
                epsilon=NORM_EPSILON,
            )
            x, recent = decode_triton.norm_conv(
                x,
                recent,
                1 + i,
                taps=layer.conv,
                offsets=TAPS,
                columns=config.grid[1],
                epsilon=NORM_EPSILON,
            )
            return ring, recent, x

        return jax.lax.fori_loop(0, 5, step, (ring, recent, x))

    text = lower("A100", run, ring, recent, x)
    assert text.count('name = "decode_mix"') == text.count('name = "decode_norm_conv"') == 1


def test_what_kernels_cannot_decode_is_refused():
    config = ModelConfig(num_layers=1)
    resolve = decoder.resolve_implementation
    with pytest.raises(ValueError, match=r"'triton' cannot decode here: it needs a GPU.*use 'xla'"):
        resolve(config, "triton")
    with pytest.raises(ValueError, match="'cuda' is not one of"):
        resolve(config, "cuda")
    assert resolve(config) == "xla"
    with on("A100"):
        assert resolve(config) == "triton"
        for changes in ({"mixer": "softmax"}, {"key_dim": 48}, {"dtype": "float16"}):
            assert resolve(dataclasses.replace(config, **changes)) == "xla"
        manhattan = dataclasses.replace(config, decay="manhattan", selective=False)
        assert resolve(manhattan) == "xla"
        with pytest.raises(ValueError, match="single recurrences, not 'manhattan'"):
            resolve(manhattan, "triton")


# Whole images


def generation_program(config, device, batch):
    """The text of `generate` for a device."""
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    params = jax.tree.map(shape, nn.unbox(abstract_parameters(config)))
    weights = jax.eval_shape(lambda params: decoder.prepare(config, params), params)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    integers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)

    def run(*args):
        return generate(config, *args, SamplingConfig())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lower(device, run, params, weights, integers(batch), keys, integers(batch, 0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("local_conv", [True, False])
def test_generation_on_a_gpu_calls_the_kernels(local_conv, dtype):
    """For each layer once: the loop over tokens holds the only decoding there is."""
    config = ModelConfig(num_layers=3, width=192, num_heads=3, dtype=dtype, local_conv=local_conv)
    text = generation_program(config, "A100", 2)
    assert text.count('name = "decode_mix"') == 3
    assert text.count('name = "decode_norm_conv"') == (3 if local_conv else 0)
    assert "decode_product" not in text


@NEEDS_JAX_11
@pytest.mark.parametrize(
    ("changes", "batch", "count"),
    [
        ({}, 32, 2 * 4),
        ({"mixer": "softmax"}, 36, 2 * 4),
        ({"dtype": "float32"}, 32, 0),
        ({}, 33, 0),
        ({}, 16, 0),
    ],
    ids=str,
)
def test_products_on_hopper_are_kernels(changes, batch, count):
    """Four of each layer: none is left to XLA, none is there twice.

    Guidance makes two rows of each image: too few, or no multiple of 8, are left to XLA.
    """
    config = ModelConfig(num_layers=2, width=192, num_heads=3, **({"dtype": "bfloat16"} | changes))
    assert generation_program(config, "H200", batch).count("call @_launch") == count


def test_images_are_the_same_on_any_mesh():
    """Under the mesh and the axis names that commands set, from codes given and from none."""
    config, variables, tokens, _ = tiny_model(grid=(3, 6), num_layers=1)
    run = lambda mesh, given: sample_tokens(
        config,
        variables["params"],
        balanced_labels(10, 3),
        sampling=SamplingConfig(top_k=7),
        seed=5,
        mesh=mesh,
        given=given,
    )
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    many = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    for given in (None, np.resize(tokens[:, :4], (10, 4))):
        reference = run(one, given)
        with jax.set_mesh(many), nn.logical_axis_rules(RULES):
            np.testing.assert_array_equal(run(many, given), reference)


def test_nothing_is_compiled_twice():
    """Neither the batches of a call nor another call with another seed."""
    config, variables, _, _ = tiny_model(grid=(2, 3), num_layers=1)
    run = lambda seed: sample_tokens(
        config,
        variables["params"],
        balanced_labels(5, 3),
        sampling=SamplingConfig(),
        seed=seed,
        mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
        batch_size=2,
    )
    run(0)
    with jax.log_compiles(), warnings.catch_warnings():
        counts = []
        jax.monitoring.register_event_duration_secs_listener(
            lambda event, *_, **__: counts.append(event) if "backend_compile" in event else None
        )
        run(1)
    assert not counts
