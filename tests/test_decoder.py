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
from lasad_jax.sampling.decode import balanced_labels, generate, sample_tokens
from lasad_jax.training.sharding import RULES, make_mesh

NEEDS_JAX_11 = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11"
)
# Every pair of choices stands together in one of them.
FAMILIES = [
    {"decay": decay, "selective": selective, "local_conv": "on" if conv else "off", "rope": rope}
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
    {"mixer": "softmax", "grid": (6, 6), "rope": False, "local_conv": "on"},
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
            features, cache = decoder.decode(config, weights, token, cache)
            return cache, decoder.logits(weights, features)

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
        return lower(device, run, weights, integers(batch), keys, integers(batch, 0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("local_conv", ["on", "off"])
def test_generation_on_a_gpu_calls_the_kernels(local_conv, dtype):
    """Once in what all layers but the last call, and once in that, which has no next projection:
    the loop over tokens holds the only decoding there is."""
    config = ModelConfig(num_layers=3, width=192, num_heads=3, dtype=dtype, local_conv=local_conv)
    text = generation_program(config, "A100", 2)
    assert text.count("call @_layer(") == 2
    assert text.count("call @_layer_") == 1
    assert text.count('name = "decode_mix"') == 2
    assert text.count('name = "decode_norm_conv"') == 2 * (local_conv == "on")
    assert "decode_product" not in text


@NEEDS_JAX_11
@pytest.mark.parametrize(
    ("changes", "batch", "count"),
    [
        ({}, 32, 7),
        ({"mixer": "softmax"}, 36, 7),
        ({"dtype": "float32"}, 32, 0),
        ({}, 33, 0),
        ({}, 16, 0),
    ],
    ids=str,
)
def test_products_on_hopper_are_kernels(changes, batch, count):
    """Four of each layer, the next one's projection among them: none is left to XLA, none is there
    twice.

    Guidance makes two rows of each image: too few, or no multiple of 8, are left to XLA.
    """
    config = ModelConfig(num_layers=2, width=192, num_heads=3, **({"dtype": "bfloat16"} | changes))
    text = generation_program(config, "H200", batch)
    assert text.count("call @_layer") == 2
    assert text.count("call @_launch") == count


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
