"""Training against NumPy: optimizer, schedules, average, losses, and what a run leaves behind."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from scipy.special import log_softmax
from tiny import one_device_mesh, tiny_config, tokens_and_labels, train_steps

from lasad_jax.config import OptimizerConfig, load_config
from lasad_jax.models import LASADGen
from lasad_jax.training import loop
from lasad_jax.training.checkpoints import Checkpoints
from lasad_jax.training.metrics import read_metrics
from lasad_jax.training.state import (
    abstract_state,
    init_state,
    learning_rate,
    make_optimizer,
    unbox,
)

NO_DROPOUT = {"dropout": 0.0, "class_dropout": 0.0}


def leaves(tree):
    """Name and float64 array of every leaf."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in flat}


def random_like(tree, seed, scale):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, scale, x.shape), x.dtype), tree)


# Optimizer

DECAYED = ("q", "k", "v", "out_gate", "out", "decay_gate", "conv", "gate", "up", "down", "head")


def is_decayed(name):
    """Every matrix by its own name; norms, rates and biases are left alone."""
    keys = name.strip("[']").split("']['")
    return keys[-1] == "embedding" or (keys[-1] == "kernel" and keys[-2] in DECAYED)


@pytest.mark.parametrize("mu_dtype", ["float32", "bfloat16"])
def test_updates_are_those_of_adamw_in_numpy(mu_dtype):
    # The second gradient is far above the clip, the others below.
    config = tiny_config(
        steps=10,
        optimizer={
            "schedule": "cosine",
            "warmup_steps": 2,
            "weight_decay": 0.3,
            "clip_norm": 5.0,
            "mu_dtype": mu_dtype,
        },
    )
    settings, optimizer = config.optimizer, make_optimizer(config)
    params = random_like(
        unbox(jax.eval_shape(lambda: init_state(config, one_device_mesh(config)).params)), 0, 1.0
    )
    opt_state = optimizer.init(params)

    @jax.jit
    def update(gradient, opt_state, params):
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    expected = leaves(params)
    assert {is_decayed(name) for name in expected} == {True, False}
    first = {name: np.zeros_like(value) for name, value in expected.items()}
    second = dict(first)
    for count, scale in enumerate((0.01, 3.0, 0.02)):
        gradient = random_like(params, count + 1, scale)
        params, opt_state = update(gradient, opt_state, params)

        gradient = leaves(gradient)
        norm = math.sqrt(sum(np.sum(np.square(g)) for g in gradient.values()))
        assert (norm > settings.clip_norm) == (scale == 3.0)
        rate = settings.learning_rate * count / 2
        for name, g in gradient.items():
            g = g * min(1.0, settings.clip_norm / norm)
            first[name] = settings.b1 * first[name] + (1 - settings.b1) * g
            second[name] = settings.b2 * second[name] + (1 - settings.b2) * g**2
            m = first[name] / (1 - settings.b1 ** (count + 1))
            v = second[name] / (1 - settings.b2 ** (count + 1))
            decay = settings.weight_decay * is_decayed(name) * expected[name]
            expected[name] = expected[name] - rate * (m / (np.sqrt(v) + 1e-8) + decay)
    # Updates are of 1e-3.
    atol = 2e-6 if mu_dtype == "float32" else 1e-3 * 2 * jnp.finfo(mu_dtype).eps
    for name, value in leaves(params).items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=atol, err_msg=name)
    moments = opt_state[1][0]
    for moment, reference, dtype in (
        (moments.mu, first, mu_dtype),
        (moments.nu, second, "float32"),
    ):
        assert {leaf.dtype for leaf in jax.tree.leaves(moment)} == {jnp.dtype(dtype)}
        rounding = 8 * jnp.finfo(dtype).eps
        for name, value in leaves(moment).items():
            largest = np.abs(reference[name]).max()
            np.testing.assert_allclose(
                value, reference[name], rtol=0, atol=rounding * largest, err_msg=name
            )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {0: 2.0, 50: 2.0, 99: 2.0}),
        ({"warmup_steps": 10}, {0: 0.0, 5: 1.0, 10: 2.0, 99: 2.0}),
        ({"schedule": "cosine"}, {0: 2.0, 25: 1 + math.sqrt(0.5), 50: 1.0, 100: 0.0}),
        (
            {"schedule": "cosine", "warmup_steps": 20},
            {0: 0.0, 10: 1.0, 20: 2.0, 60: 1.0, 100: 0.0},
        ),
    ],
)
def test_learning_rates(fields, expected):
    schedule = learning_rate(OptimizerConfig(learning_rate=2.0, **fields), 100)
    for step, value in expected.items():
        np.testing.assert_allclose(schedule(step), value, atol=1e-6, err_msg=f"step {step}")


def test_accumulation_changes_nothing():
    whole, parts = (
        tiny_config(model=NO_DROPOUT, optimizer={"accumulate": accumulate}) for accumulate in (1, 4)
    )
    (a, a_losses), (b, b_losses) = (
        train_steps(config, one_device_mesh(config), 3) for config in (whole, parts)
    )
    np.testing.assert_allclose(a_losses, b_losses, rtol=1e-5)
    a, b = leaves(a.params), leaves(b.params)
    for name, value in a.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(b[name], value, rtol=0, atol=1e-5 * scale, err_msg=name)


def test_the_average_forgets_its_start_then_decays_as_told():
    config = tiny_config(optimizer={"ema_decay": 0.3})
    mesh = one_device_mesh(config)
    states = []
    train_steps(config, mesh, 4, lambda state: states.append(jax.device_get(state)))
    for step, (before, after) in enumerate(itertools.pairwise(states)):
        decay = min(0.3, (1 + step) / (10 + step))
        old, new, params = leaves(before.ema), leaves(after.ema), leaves(after.params)
        for name, value in new.items():
            expected = decay * old[name] + (1 - decay) * params[name]
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-8, err_msg=name)
    assert len(states) == 5
    assert abstract_state(tiny_config(optimizer={"ema_decay": 0.0}), mesh).ema is None


# Held-out losses


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of 8 steps, evaluated with a last batch that is not full."""
    config = tiny_config(eval_every=3, sample_every=4)
    workdir = tmp_path_factory.mktemp("runs") / "deep" / "run"
    loop.train(config, workdir)
    return config, workdir


def restore(config, workdir, step):
    checkpoints = Checkpoints(workdir, read_only=True)
    return checkpoints.restore(step, abstract_state(config, one_device_mesh(config)))


def test_held_out_loss_is_the_mean_over_all_images(run):
    config, workdir = run
    tokens, labels = tokens_and_labels(config, "test")
    assert len(labels) % config.batch_size
    params = restore(config, workdir, 8).ema
    logits = jax.jit(LASADGen(config.model).apply)({"params": params}, tokens, labels)
    losses = -np.take_along_axis(
        log_softmax(np.asarray(logits, np.float64), -1), tokens[..., None], -1
    )
    rows = {
        row["step"]: row
        for row in read_metrics(workdir / "metrics.jsonl")
        if "held_out_nats_per_token" in row
    }
    assert list(rows) == [3, 6, 8]
    np.testing.assert_allclose(rows[8]["held_out_nats_per_token"], losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(
        rows[8]["held_out_bits_per_token"], losses.mean() / math.log(2), rtol=1e-5
    )
    assert losses.mean() < math.log(8) - 1e-3  # not the uniform start


# What a run leaves behind


def test_a_run_leaves_numbers_and_pictures(run):
    config, workdir = run
    assert load_config(workdir) == config
    rows = read_metrics(workdir / "metrics.jsonl")
    assert len(rows) == len((workdir / "metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows] == list(range(1, 9))
    told = {name for name in rows[0] if not name.startswith("goodput/")}
    assert told == {
        *("step", "loss", "grad_norm", "learning_rate", "skipped_updates", "grad_norm_level"),
        *("images_per_second", "tokens_per_second"),
    }
    assert all(math.isfinite(value) for row in rows for value in row.values())
    (events,) = workdir.glob("events.out.tfevents.*")
    assert b"held_out_nats_per_token" in events.read_bytes()
    pictures = sorted(path.name for path in (workdir / "samples").iterdir())
    assert pictures == ["step_0000004.png", "step_0000008.png"]
    for path in (workdir / "samples" / pictures[0], workdir / "loss.png"):
        with Image.open(path) as picture:
            assert len(np.unique(np.asarray(picture))) > 1
    assert not list(workdir.rglob("*.tmp"))


def test_a_cut_line_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


# What is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model": {"grid": (8, 4)}}, r"config\.model\.grid: \(8, 4\) .*set it to \(8, 8\)"),
        ({"model": {"vocab_size": 9}}, r"config\.model\.vocab_size: 9 .*set it to 8"),
        ({"model": {"num_classes": 9}}, r"config\.model\.num_classes: 9 .*set it to 10"),
        ({"batch_size": 1600}, r"config\.batch_size: 1600 is more than the 1442 training"),
        ({"batch_size": 12}, r"config\.batch_size: 12 must be a multiple of 8"),
        ({"optimizer": {"accumulate": 4}}, r"config\.batch_size: 16 must be a multiple of 32"),
        ({"mesh": {"data": 3}}, r"mesh: .*\(3, 1, 1, 1\) does not multiply to the 8 devices"),
        ({"data": {"source": "x"}}, r"'x'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        loop.train(tiny_config(**overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()
