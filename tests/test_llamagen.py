"""LlamaGen's checkpoints: logits and codes of a reference, refusals, and the runs made of them."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import torch.nn.functional as F  # noqa: N812
from processes import command
from tiny import tiny_config, tokens_and_labels
from tokenizing import VOCAB_SIZE, write_tokenizer
from torch_llamagen import LlamaGen, random_llamagen

from lasad_jax.config import SamplingConfig, load_config
from lasad_jax.interop import llamagen
from lasad_jax.interop.llamagen import llamagen_shapes, load_llamagen
from lasad_jax.interop.tokenizer_files import load_tokenizer
from lasad_jax.models import SIZES, LASADGen, ModelConfig
from lasad_jax.models.codec import TokenizerCodec
from lasad_jax.sampling.decode import sample_tokens
from lasad_jax.training import loop
from lasad_jax.training.checkpoints import Checkpoints, store_config
from lasad_jax.training.metrics import read_metrics
from lasad_jax.training.sharding import make_mesh
from lasad_jax.training.state import abstract_state

FORMATS = Path(__file__).parent / "formats"
SMALL = {"layers": 2, "width": 24, "heads": 2, "codes": 30, "classes": 5}


def save(model, path, wrap=lambda state: {"model": state}):
    torch.save(wrap(model.state_dict()), path)
    return path


def load(path, **options):
    """In float32, to compare with."""
    config, params = load_llamagen(path, **{"num_heads": 2} | options)
    return dataclasses.replace(config, dtype="float32"), params


# The network


@pytest.mark.parametrize("grid", [(16, 16), (24, 24), (3, 5)], ids=str)
def test_logits_are_those_of_llamagen(tmp_path, grid):
    reference = random_llamagen(sum(grid), **SMALL, grid=grid)
    config, params = load(save(reference, tmp_path / "a.pt"), grid=grid)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SMALL["codes"], (3, config.num_tokens))
    labels = np.array([0, 4, 5])  # the last is the null class
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens), torch.from_numpy(labels)).numpy()
    ours = jax.jit(LASADGen(config).apply)({"params": params}, tokens, labels)
    assert expected.std() > 1
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


def test_drawn_codes_are_those_of_llamagen(tmp_path):
    reference = random_llamagen(1, **SMALL, grid=(3, 5))
    config, params = load(save(reference, tmp_path / "a.pt"), grid=(3, 5))
    labels = np.array([3, 0, 4, 1])
    sampling = SamplingConfig(guidance=1.7, temperature=0)
    mesh = make_mesh(tiny_config().mesh, jax.devices()[:1])
    ours = sample_tokens(config, params, labels, sampling=sampling, seed=0, mesh=mesh)
    expected = reference.likeliest(torch.from_numpy(labels), 1.7).numpy()
    np.testing.assert_array_equal(ours, expected)
    assert len(np.unique(ours)) > 5


# Files


def test_names_and_shapes_are_those_of_llamagen():
    listed = json.loads((FORMATS / "llamagen_gpt_b.json").read_text())
    config = ModelConfig(mixer="softmax", **SIZES["B"])
    assert {name: list(shape) for name, shape in llamagen_shapes(config).items()} == listed
    with torch.device("meta"):
        size = {"layers": 12, "width": 768, "heads": 12, "codes": 16384, "classes": 1000}
        reference = LlamaGen(**size).state_dict()
    assert {name: list(x.shape) for name, x in reference.items()} == listed


@pytest.mark.parametrize("size", ["B", "L", "XL", "XXL", "3B"])
def test_every_size_is_known_by_its_shapes(size, monkeypatch):
    wanted = ModelConfig(mixer="softmax", grid=(24, 24), **SIZES[size])
    # Views of one number: nothing of these sizes is held.
    zero = np.zeros((), np.float32)
    tensors = {name: np.broadcast_to(zero, x) for name, x in llamagen_shapes(wanted).items()}
    monkeypatch.setattr(llamagen, "read_tensors", lambda *_: (tensors, {}))
    monkeypatch.setattr(llamagen, "_parameters", lambda *_: None)
    assert load_llamagen("a.pt", grid=(24, 24))[0] == wanted


def test_files_of_any_kind_and_with_buffers_are_read(tmp_path):
    reference = random_llamagen(2, **SMALL)
    config, params = load(save(reference, tmp_path / "a.pt"), grid=(16, 16))
    state = reference.state_dict()
    buffers = {
        "freqs_cis": torch.zeros(257, 6, 2),
        "layers.1.attention.kv_cache.k_cache": torch.zeros(2, 2, 3, 12),
        "layers.1.attention.kv_cache.v_cache": torch.zeros(2, 2, 3, 12),
    }
    torch.save(state | buffers, tmp_path / "b.pt")
    tensors = {name: x.numpy() for name, x in state.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "c.safetensors")
    for name in ("b.pt", "c.safetensors"):
        config_again, again = load(tmp_path / name, grid=(16, 16))
        assert config_again == config
        jax.tree.map(np.testing.assert_array_equal, again, params)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}


def test_a_feed_forward_of_another_width_is_read(tmp_path):
    state = random_llamagen(3, **SMALL).state_dict()
    for i in range(2):
        for name, rows in (("w1", True), ("w3", True), ("w2", False)):
            key = f"layers.{i}.feed_forward.{name}.weight"
            state[key] = state[key][:40] if rows else state[key][:, :40]
    torch.save(state, tmp_path / "a.pt")
    config, params = load(tmp_path / "a.pt", grid=(16, 16))
    assert config.ffn_width == 40
    assert params["blocks"]["ffn"]["down"]["kernel"].shape == (2, 40, 24)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"norm.weight": None}, {}, r"checkpoint: 1 tensors of .*a\.pt .*norm\.weight is missing"),
        ({"x.weight": (2,)}, {}, r"1 tensors .*x\.weight is extra"),
        ({"layers.1.ffn_norm.weight": (7,)}, {}, r"ffn_norm\.weight has shape \(7,\), .*\(24,\)"),
        (
            {"layers.0.attention.wqkv.weight": (40, 24)},
            {},
            r"wqkv\.weight has shape \(40, 24\), expected \(72, 24\)",
        ),
        (
            {
                "cls_embedding.embedding_table.weight": None,
                "cls_embedding.cap_proj.fc1.weight": (2,),
            },
            {},
            r"cls_embedding\.embedding_table\.weight is missing",
        ),
        ({"tok_embeddings.weight": (30,)}, {}, r"tok_embeddings\.weight has shape \(30,\), not 2"),
        ({"layers.7.ffn_norm.weight": (24,)}, {}, r"layers\.2\.attention\.wqkv\.weight is missing"),
        (
            {"cls_embedding.embedding_table.weight": (1, 24)},
            {},
            r"a\.pt makes no generator: model\.num_classes: 0",
        ),
        (
            {},
            {"num_heads": None},
            r"num_heads: not known for 2 layers of width 24.* B, L,.*give it",
        ),
        ({}, {"num_heads": 5}, r"model\.num_heads: 5 does not divide model\.width=24"),
        ({}, {"grid": (0, 4)}, r"model\.grid: \(0, 4\) must be two positive sizes"),
    ],
)
def test_what_is_no_such_checkpoint_is_refused_by_name(tmp_path, change, options, message):
    state = random_llamagen(4, **SMALL).state_dict()
    for name, shape in change.items():
        if shape is None:
            del state[name]
        else:
            state[name] = torch.zeros(shape)
    torch.save({"model": state}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.pt", **{"grid": (16, 16)} | options)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    hint = r"give LlamaGen's c2i_B_256\.pt"
    with pytest.raises(FileNotFoundError, match=rf"checkpoint: there is no file .*{hint}"):
        load(tmp_path / "none.pt", grid=(16, 16))
    path = save(random_llamagen(5, **SMALL), tmp_path / "a.pt")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=rf"checkpoint: .*a\.pt cannot be read .*{hint}"):
        load(path, grid=(16, 16))


# Runs

# Grey levels of digits do for codes: training takes them without a tokenizer.
DIGITS = {"layers": 2, "width": 16, "heads": 2, "codes": VOCAB_SIZE, "classes": 10, "grid": (8, 8)}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The reference, the flags that made a run of it, and the run."""
    top = tmp_path_factory.mktemp("import")
    reference = random_llamagen(6, **DIGITS)
    write_tokenizer(top / "tokenizer.safetensors")
    # What an import that was killed has left is taken over.
    (top / "runs" / "a.tmp" / "checkpoints" / "3").mkdir(parents=True)
    (top / "runs" / "a.tmp" / "stale").write_text("x")
    flags = (
        f"--checkpoint={save(reference, top / 'a.pt')}",
        f"--tokenizer={top / 'tokenizer.safetensors'}",
        "--grid=8",
        "--num_heads=2",
        f"--out={top / 'runs' / 'a'}",
    )
    said = command("import_llamagen", *flags)
    assert "2 layers of width 16 with 2 heads, 0.0M parameters, 10 classes, 16 codes" in said
    return reference, flags, top / "runs" / "a"


def test_a_run_holds_the_parameters_and_nothing_was_left_beside_it(imported):
    _, flags, out = imported
    names = lambda folder: sorted(path.name for path in folder.iterdir())
    assert names(out.parent) == ["a"]
    assert names(out) == ["checkpoints", "config.json", "tokenizer.safetensors"]
    assert Checkpoints(out, read_only=True).steps() == [0]
    config = load_config(out)
    assert (config.data.source, config.model.mixer) == ("codes", "softmax")
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state = Checkpoints(out, read_only=True).restore(0, abstract_state(config, mesh))
    _, params = load(flags[0].partition("=")[2], grid=(8, 8))
    for tree in (state.params, state.ema):
        jax.tree.map(np.testing.assert_array_equal, tree, params)
    assert int(state.step) == 0
    assert not any(np.any(x) for x in jax.tree.leaves(state.opt_state))


def test_a_run_goes_on_training_where_llamagen_stopped(imported, tmp_path):
    reference, _, run = imported
    out = shutil.copytree(run, tmp_path / "run")
    config = tiny_config(
        steps=1,
        eval_every=1,
        data={"levels": VOCAB_SIZE},
        model={"mixer": "softmax", "vocab_size": VOCAB_SIZE},
        # A step that changes nothing, so that the evaluation is of the checkpoint.
        optimizer={"learning_rate": 0.0},
    )
    loop.train(config, out)
    tokens, labels = (torch.tensor(x).long() for x in tokens_and_labels(config, "test"))
    with torch.no_grad():
        loss = F.cross_entropy(reference(tokens, labels).flatten(0, 1), tokens.flatten())
    measured = read_metrics(out / "metrics.jsonl")[-1]["held_out_nats_per_token"]
    assert measured == pytest.approx(loss.item(), rel=1e-5)
    assert Checkpoints(out, read_only=True).steps() == [0, 1]


def test_pictures_are_those_of_llamagens_codes(imported, tmp_path):
    reference, _, run = imported
    out = shutil.copytree(run, tmp_path / "run")
    config = load_config(out)
    model = dataclasses.replace(config.model, dtype="float32")
    store_config(dataclasses.replace(config, model=model), out)
    flags = (f"--workdir={out}", f"--out={out / 'b'}", "--num=10")
    command("sample", *flags, "--temperature=0", "--guidance=1.5")
    with np.load(out / "b.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    codec = TokenizerCodec(*load_tokenizer(out / "tokenizer.safetensors"))
    codes = reference.likeliest(torch.from_numpy(labels).long(), 1.5).numpy()
    expected = codec.decode(codes, (8, 8)).astype(int)
    assert images.shape == expected.shape == (10, 16, 16, 3)
    assert np.abs(images - expected).max() <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("", "out: .*runs/a exists already; remove it or give another folder"),
        ("--out={new} --checkpoint={other}", "tokenizer: .* has 16 codes, but .* predicts 8; give"),
    ],
)
def test_what_cannot_be_imported_leaves_nothing(imported, tmp_path, changes, message):
    _, flags, run = imported
    other = save(random_llamagen(7, **DIGITS | {"codes": 8}), tmp_path / "other.pt")
    changes = changes.format(new=tmp_path / "new", other=other).split()
    said = command("import_llamagen", *flags, *changes, fails=True)
    assert re.search(message, said), said
    assert [path.name for path in tmp_path.iterdir()] == ["other.pt"]
    assert [path.name for path in run.parent.iterdir()] == ["a"]
