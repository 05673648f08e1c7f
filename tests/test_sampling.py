"""Decoding: guidance, and images that depend on nothing but their seed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import command
from test_models import tiny_model

from lasad_jax.config import MeshConfig, SamplingConfig
from lasad_jax.models import LASADGen
from lasad_jax.models.decoder import prepare
from lasad_jax.sampling.decode import balanced_labels, generate, sample_batches, sample_tokens
from lasad_jax.sampling.guidance import guidance_scale, guide
from lasad_jax.training.sharding import make_mesh

ONE = make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", lambda x: np.full_like(x, 3.0)),
        ("linear", lambda x: 1 + 2 * x),
        ("power-cosine", lambda x: 1 + 2 * (1 - np.cos(np.pi * x**1.5)) / 2),
    ],
)
def test_guidance_schedules(schedule, expected):
    config = SamplingConfig(guidance=3.0, guidance_schedule=schedule, guidance_power=1.5)
    scales = [float(guidance_scale(config, jnp.asarray(i), 12)) for i in range(12)]
    np.testing.assert_allclose(scales, expected(np.linspace(0, 1, 12)), rtol=1e-5)


def test_guidance_of_one_is_the_conditional():
    c, u = np.random.default_rng(0).standard_normal((2, 3, 7))
    np.testing.assert_allclose(guide(c, u, 1.0), c, rtol=1e-5)
    np.testing.assert_allclose(guide(c, u, 4.0), u + 4 * (c - u), rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"mixer": "softmax"}], ids=str)
def test_greedy_decoding_is_the_argmax_of_the_full_pass(changes):
    """Guided and unguided, from nothing and from given rows, without any cache."""
    config, variables, tokens, labels = tiny_model(**changes)
    labels, apply = labels[:2], jax.jit(LASADGen(config).apply)
    for guidance, num_given in ((1.0, 0), (2.5, 5)):
        expected = tokens[:2].copy()
        for i in range(num_given, config.num_tokens):
            c = apply(variables, expected, labels)[:, i]
            u = apply(variables, expected, np.full(2, config.num_classes))[:, i]
            expected[:, i] = np.argmax(u + guidance * (c - u), axis=-1)
        got = sample_tokens(
            config,
            variables["params"],
            labels,
            sampling=SamplingConfig(temperature=0.0, guidance=guidance),
            seed=0,
            mesh=ONE,
            given=tokens[:2, :num_given],
        )
        np.testing.assert_array_equal(got, expected)


def test_images_depend_on_seed_and_number_alone():
    """Not on the batch size, nor on the number of devices."""
    config, variables, _, _ = tiny_model(num_layers=1)
    labels = balanced_labels(10, 3)
    run = lambda seed, mesh, batch_size: sample_tokens(
        config,
        variables["params"],
        labels,
        sampling=SamplingConfig(guidance=1.5, top_p=0.9),
        seed=seed,
        mesh=mesh,
        batch_size=batch_size,
    )
    reference = run(0, ONE, 10)
    np.testing.assert_array_equal(run(0, ONE, 4), reference)
    np.testing.assert_array_equal(run(0, ONE, 3), reference)
    np.testing.assert_array_equal(run(0, make_mesh(MeshConfig()), 10), reference)
    assert not np.array_equal(run(1, ONE, 10), reference)
    assert len(np.unique(reference, axis=0)) == 10


def test_the_next_batch_is_under_way_while_one_is_taken():
    config, variables, _, _ = tiny_model(num_layers=1)
    labels, asked = balanced_labels(8, 3), []

    def batches():
        for first in range(0, 8, 3):
            asked.append(first)
            yield np.arange(first, min(first + 3, 8))

    options = {"sampling": SamplingConfig(), "seed": 0, "mesh": ONE, "batch_size": 3}
    options["params"] = variables["params"]
    taken = []
    for numbers, tokens in sample_batches(config, labels=labels, batches=batches(), **options):
        taken.append((len(asked), numbers.tolist()))
        assert tokens.shape == (len(numbers), config.num_tokens)
    assert taken == [(2, [0, 1, 2]), (3, [3, 4, 5]), (3, [6, 7])]
    assert not list(sample_batches(config, labels=labels, batches=[], **options))


def test_balanced_labels():
    np.testing.assert_array_equal(balanced_labels(7, 3), [0, 0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(balanced_labels(3, 1000), [0, 333, 666])
    assert set(np.bincount(balanced_labels(500, 17))) == {29, 30}


@pytest.mark.parametrize(
    ("labels", "given_codes", "message"),
    [
        ([], None, "labels: none given"),
        ([0, 4], None, "labels: 4 is no class"),
        ([0], np.full((1, 2), 11), "given: codes must be 0 to 10"),
        ([0], np.zeros((2, 2)), "given: expected"),
        ([0], np.zeros((1, 21)), "given: expected"),
    ],
)
def test_bad_requests_are_refused(labels, given_codes, message):
    config, variables, _, _ = tiny_model()
    with pytest.raises(ValueError, match=message):
        sample_tokens(
            config,
            variables["params"],
            np.array(labels, int),
            sampling=SamplingConfig(),
            seed=0,
            mesh=ONE,
            given=given_codes,
        )


def test_decoding_memory_does_not_grow_with_length():
    """Temporary memory per token falls as the image gets taller: the state is all there is."""
    tiny, variables, _, _ = tiny_model()
    params, keys = variables["params"], jax.random.split(jax.random.key(0), 2)

    def temporary(rows):
        config = dataclasses.replace(tiny, grid=(rows, 5))
        args = (prepare(config, params), jnp.zeros(2, int), keys)
        lowered = jax.jit(generate, static_argnums=(0, 5)).lower(
            config, *args, jnp.zeros((2, 0), jnp.int32), SamplingConfig()
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    codes_alone = 2 * 4 * 5 * (64 - 4)
    assert temporary(64) - temporary(4) <= 8 * codes_alone


def test_sample_without_a_run_says_so(tmp_path):
    assert "no run in" in command("sample", f"--workdir={tmp_path}", fails=True)
