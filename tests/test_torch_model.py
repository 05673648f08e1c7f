"""The exported model in PyTorch by itself: its two forms agree, and how it draws."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from exporting import VARIANTS, random_codes, torch_model
from scipy import stats
from test_filters import sorted_top_k, sorted_top_p

from lasad_jax.config import SamplingConfig as OurSamplingConfig
from lasad_jax.interop.modeling_lasadgen import (
    GUIDANCE_SCHEDULES,
    SamplingConfig,
    draw,
    guidance_scale,
    keep_top_k,
    keep_top_p,
    running_differences,
)
from lasad_jax.sampling import guidance


def stepwise(model, codes, labels):
    """All logits from the recurrent form; the states after it."""
    states = model.init_states(len(labels))
    tokens = torch.cat([labels[:, None], codes[:, :-1]], dim=1)
    with torch.no_grad():
        logits = [model.step(tokens[:, i], states, i) for i in range(tokens.shape[1])]
    return torch.stack(logits, dim=1), states


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_steps_give_the_logits_of_the_full_pass(changes):
    model = torch_model(**changes)
    codes, labels = random_codes(model)
    with torch.no_grad():
        full = model(codes, labels)
        part = model(codes[:, :4], labels)
    assert full.shape == (*codes.shape, 11) and full.std() > 0.1
    steps, _ = stepwise(model, codes, labels)
    torch.testing.assert_close(steps, full, atol=1e-4, rtol=0)
    torch.testing.assert_close(part, full[:, :4], atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_code_changes_only_what_comes_after_it(changes):
    model = torch_model(**changes)
    codes, labels = random_codes(model)
    other = codes.clone()
    other[:, 2] = (other[:, 2] + 1) % 11
    with torch.no_grad():
        before, after = model(codes, labels), model(other, labels)
    torch.testing.assert_close(before[:, :3], after[:, :3], atol=0, rtol=0)
    assert (before[:, 3] != after[:, 3]).any(-1).all()


@pytest.mark.parametrize("changes", [VARIANTS[0], VARIANTS[6]], ids=str)
def test_the_state_does_not_grow(changes):
    model = torch_model(**changes)
    codes, labels = random_codes(model)
    kept = lambda layer: [*vars(layer.mixer).values(), layer.recent]
    size = lambda layers: sum(x.numel() for layer in layers for x in kept(layer) if x is not None)
    assert size(stepwise(model, codes, labels)[1]) == size(model.init_states(len(labels)))


@pytest.mark.parametrize("changes", [VARIANTS[0], VARIANTS[6], VARIANTS[8]], ids=str)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_greedy_codes_are_the_argmax_of_the_full_pass(changes, scale):
    model = torch_model(**changes)
    codes, labels = random_codes(model)
    expected, none = codes.clone(), torch.full_like(labels, model.config.num_classes)
    with torch.no_grad():
        for i in range(4, codes.shape[1]):
            c, u = model(expected, labels)[:, i], model(expected, none)[:, i]
            expected[:, i] = (u + scale * (c - u)).argmax(-1)
    got = model.generate(labels, codes[:, :4], guidance_scale=scale, temperature=0)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(model.generate(labels, codes), codes)


def test_codes_follow_the_model():
    """Of a grid of two codes every pair, against the product of both probabilities."""
    model = torch_model(grid=(1, 2), vocab_size=3)
    labels = torch.ones(6000, dtype=torch.long)
    codes = model.generate(labels, generator=torch.Generator().manual_seed(0)).numpy()
    pairs = torch.tensor([[a, b] for a in range(3) for b in range(3)])
    with torch.no_grad():
        log_p = model(pairs, labels[:9]).log_softmax(-1)
    expected = log_p.gather(-1, pairs[..., None])[..., 0].sum(-1).exp().numpy()
    counts = np.bincount(3 * codes[:, 0] + codes[:, 1], minlength=9)
    assert stats.chisquare(counts, 6000 * expected / expected.sum()).pvalue > 1e-3


def test_generators_decide_what_is_drawn():
    model = torch_model()
    run = lambda seed: model.generate(
        torch.tensor([0, 1]), generator=torch.Generator().manual_seed(seed)
    )
    torch.testing.assert_close(run(3), run(3))
    assert (run(3) != run(4)).any()


@pytest.mark.parametrize("schedule", GUIDANCE_SCHEDULES)
def test_guidance_schedules_are_those_of_jax(schedule):
    ours = OurSamplingConfig(guidance=3.0, guidance_schedule=schedule, guidance_power=1.5)
    theirs = SamplingConfig(3.0, schedule, 1.5)
    for num_tokens in (1, 12):
        for token in range(num_tokens):
            expected = float(guidance.guidance_scale(ours, jnp.asarray(token), num_tokens))
            assert math.isclose(guidance_scale(theirs, token, num_tokens), expected, rel_tol=1e-5)


def test_filters():
    rng = np.random.default_rng(0)
    logits = np.round(3 * rng.standard_normal((5, 300)), 1).astype(np.float32)  # with ties
    for k in (1, 7, 299):
        got = keep_top_k(torch.from_numpy(logits), k)
        np.testing.assert_array_equal(got, sorted_top_k(logits, k))
    for p in (1e-60, 0.1, 0.8, 0.97):
        # Where a probability is within rounding of p, it may fall on either side.
        expected, unclear = sorted_top_p(logits, p)
        assert (~unclear).sum() > 2
        got = keep_top_p(torch.from_numpy(logits), p).numpy()
        np.testing.assert_array_equal(got[~unclear], expected[~unclear])


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    generator = torch.Generator().manual_seed(0)
    drawn = draw(logits.expand(4000, 5), SamplingConfig(temperature=0.7, top_k=4), generator)
    expected = torch.exp(logits.double() / 0.7) * (logits > -1)
    counts = np.bincount(drawn, minlength=5)
    assert counts[2] == 0
    rest = expected.numpy()[expected > 0]
    assert stats.chisquare(counts[expected > 0], 4000 * rest / rest.sum()).pvalue > 1e-3


def test_running_differences_are_exact_far_down_the_sum():
    g = -20 * np.random.default_rng(0).random(2000).astype(np.float32)
    total = np.cumsum(np.float64(g))
    got = running_differences(torch.from_numpy(g)).numpy()
    t = np.arange(2000)
    near = np.abs(t[:, None] - t) < 10
    np.testing.assert_allclose(got[near], (total[:, None] - total)[near], atol=3e-5)


@pytest.mark.parametrize("changes", [VARIANTS[0], VARIANTS[6], VARIANTS[8]], ids=str)
def test_bfloat16_is_close_to_float32(changes):
    model = torch_model(**changes)
    codes, labels = random_codes(model)
    with torch.no_grad():
        exact = model(codes, labels)
        half = model.to(torch.bfloat16)
        rounded = half(codes, labels)
    assert rounded.dtype == torch.float32
    error = lambda x: float((x - exact).norm() / exact.norm())
    assert error(rounded) < 0.05
    assert error(stepwise(half, codes, labels)[0]) < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_schedule": "square"}, "guidance_schedule: 'square' is not one of"),
        ({"temperature": -1}, "temperature: -1 must be at least 0"),
        ({"guidance_scale": math.nan}, "guidance_scale: nan must be"),
        ({"top_p": 0.0}, "top_p: 0.0 must be in"),
        ({"guidance_power": 0}, "guidance_power: 0 must be positive"),
        ({"labels": torch.tensor([4])}, r"labels: \[4\] must be one or more of 0 to 2"),
        ({"labels": torch.tensor([], dtype=torch.long)}, r"labels: \[\] must be one or more"),
        ({"given": torch.full((1, 2), 11)}, "given: codes must be 0 to 10"),
        ({"given": torch.zeros(2, 2)}, r"given: expected \(1, up to 20\) codes"),
        ({"given": torch.zeros(1, 21)}, r"given: expected \(1, up to 20\) codes"),
    ],
)
def test_bad_requests_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        torch_model().generate(**{"labels": torch.tensor([0])} | changes)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="top_q"):
        torch_model().generate(torch.tensor([0]), top_q=1)
