"""Training a tokenizer: its step, what a run leaves behind, and what is refused."""

import itertools

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import one_device_mesh
from tiny_tokenizer import tiny_tokenizer_config

from lasad_jax.config import MeshConfig, load_config
from lasad_jax.config.runs import TokenizerRunConfig
from lasad_jax.data import load_images
from lasad_jax.models.codec import TokenizerCodec
from lasad_jax.training import loop, sharding
from lasad_jax.training.checkpoints import Checkpoints
from lasad_jax.training.metrics import read_metrics
from lasad_jax.training.tokenizer_task import TokenizerTask, load_trained_tokenizer

CODEBOOK = ("quantize", "embedding")


def run_steps(config, mesh, steps):
    """The state before the first step and after each, on the host, and the metrics of each."""
    task = TokenizerTask(config, mesh)
    with jax.set_mesh(mesh):
        state = task.init_state()
        states, metrics = [jax.device_get(state)], []
        for batch in itertools.islice(task.train_batches(0), steps):
            state, values = task.train_step(state, sharding.put_batch(batch, mesh))
            states.append(jax.device_get(state))
            metrics.append(jax.device_get(values))
    return states, metrics


def differs(left, right):
    return not all(jax.tree.leaves(jax.tree.map(np.array_equal, left, right)))


@pytest.fixture(scope="module")
def stepped():
    config = tiny_tokenizer_config()
    return config, *run_steps(config, one_device_mesh(config), 6)


def test_the_discriminator_joins_at_its_step(stepped):
    config, states, metrics = stepped
    for step, (before, after) in enumerate(itertools.pairwise(states)):
        joined = step >= config.losses.adversarial_start
        assert differs(before.discriminator, after.discriminator) == joined
        assert (metrics[step]["generator_loss"] != 0) == joined
        assert (metrics[step]["discriminator_loss"] > 0) == joined
        assert differs(before.params, after.params)


def test_the_loss_is_the_weighted_sum_of_its_terms():
    """From the parts that the metrics name, with the codebook's terms left out."""
    config = tiny_tokenizer_config(
        losses={
            "codebook_weight": 0.0,
            "commitment_weight": 0.0,
            "entropy_weight": 0.3,
            "reconstruction": "l1",
            "reconstruction_weight": 2.0,
            "adversarial_start": 0,
        }
    )
    _, (first, *_) = run_steps(config, one_device_mesh(config), 1)
    expected = first["reconstruction"] + 0.3 * first["entropy_loss"] + 0.5 * first["generator_loss"]
    np.testing.assert_allclose(first["loss"], expected, rtol=1e-5)


def test_unused_codes_are_revived_and_counted_anew(stepped):
    config, states, metrics = stepped
    for step, (before, after) in enumerate(itertools.pairwise(states)):
        if (step + 1) % config.losses.revive_every:
            places = 4 * 4 * config.batch_size
            assert after.usage.sum() == before.usage.sum() + places
            np.testing.assert_allclose(metrics[step]["codes_in_use"], np.mean(after.usage > 0))
        else:
            assert not after.usage.any()
    # With so few steps some code was dead; where one is, its average is replaced as well.
    old, new = states[1], states[2]
    codebooks = [tree[CODEBOOK[0]][CODEBOOK[1]] for tree in (new.params, new.ema)]
    dead = metrics[1]["codes_in_use"] < 1
    assert dead
    moved = np.abs(new.params["quantize"]["embedding"] - old.params["quantize"]["embedding"])
    revived = moved.max(axis=1) > 0.1
    assert revived.any()
    np.testing.assert_array_equal(codebooks[0][revived], codebooks[1][revived])


def test_any_number_of_devices_takes_the_same_steps(stepped):
    config, _, metrics = stepped
    _, others = run_steps(config, sharding.make_mesh(MeshConfig(data=2, fsdp=4)), 6)
    for ours, theirs in zip(metrics, others, strict=True):
        for name, value in ours.items():
            np.testing.assert_allclose(theirs[name], value, rtol=2e-4, atol=1e-5, err_msg=name)


# Runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, evaluated with a last batch that is not full."""
    config = tiny_tokenizer_config(eval_every=3, sample_every=6)
    workdir = tmp_path_factory.mktemp("runs") / "run"
    loop.train(config, workdir)
    return config, workdir


def test_a_run_leaves_numbers_and_pictures(run):
    config, workdir = run
    assert load_config(workdir, TokenizerRunConfig) == config
    rows = read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "held_out_psnr" in row] == [3, 6]
    assert sorted(path.name for path in (workdir / "samples").iterdir()) == ["step_0000006.png"]
    for path in (workdir / "samples" / "step_0000006.png", workdir / "loss.png"):
        with Image.open(path) as picture:
            assert len(np.unique(np.asarray(picture))) > 1


def test_held_out_figures_are_those_of_the_codec(run):
    config, workdir = run
    model, params, step = load_trained_tokenizer(workdir)
    row = {row["step"]: row for row in read_metrics(workdir / "metrics.jsonl")}[step]
    images = load_images(config.data, "test").images
    assert len(images) % config.batch_size
    codec = TokenizerCodec(model.model, params)
    codes = codec.encode(images)
    seen = codec.decode(codes, (4, 4))
    squares = np.square(seen.astype(np.float64) - images).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(row["held_out_psnr"], np.mean(10 * np.log10(255**2 / squares)), 1e-3)
    counts = np.bincount(codes.ravel(), minlength=16)
    np.testing.assert_allclose(row["held_out_codebook_usage"], np.mean(counts > 0))
    share = counts[counts > 0] / counts.sum()
    perplexity = np.exp(-np.sum(share * np.log(share)))
    np.testing.assert_allclose(row["held_out_codebook_perplexity"], perplexity, rtol=1e-4)


def test_a_run_goes_on_to_the_same_parameters(run, tmp_path):
    config, workdir = run
    loop.train(tiny_tokenizer_config(steps=3, eval_every=3, sample_every=6), tmp_path)
    loop.train(config, tmp_path)
    task = TokenizerTask(config, one_device_mesh(config))
    left, right = (
        Checkpoints(folder, read_only=True).restore(6, task.abstract_state())
        for folder in (workdir, tmp_path)
    )
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data": {"image_size": (9, 8)}}, r"data\.image_size: \(9, 8\) must be .* multiples of 2"),
        ({"data": {"source": "codes"}}, r"data\.source: 'codes' are a tokenizer's output"),
        ({"batch_size": 1600}, r"config\.batch_size: 1600 is more than the 1442 training"),
        ({"optimizer": {"accumulate": 2}}, r"optimizer\.accumulate: 2 must be 1"),
        ({"losses": {"discriminator_layers": 4}}, r"losses\.discriminator_layers"),
        ({"losses": {"perceptual_weight": 1.0, "vgg16": "none.pth"}}, r"losses\.vgg16.*none\.pth"),
        ({"losses": {"reconstruction": "l3"}}, r"losses\.reconstruction: 'l3' is not one of"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, overrides, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        loop.train(tiny_tokenizer_config(**overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_architecture_is_refused(run):
    _, workdir = run
    changed = tiny_tokenizer_config(model={"codebook_size": 8}, losses={"discriminator_width": 4})
    with pytest.raises(ValueError, match=r"codebook_size: 16 there, 8 now.*width: 8 there, 4 now"):
        loop.train(changed, workdir)
