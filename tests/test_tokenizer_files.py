"""Tokenizers as files: LlamaGen's names, refusals that name the tensor, round trips."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from torch_tokenizer import Tokenizer, random_tokenizer

from lasad_jax.interop.tokenizer_files import fingerprint, load_tokenizer, save_tokenizer
from lasad_jax.models.tokenizer import abstract_tokenizer, init_tokenizer
from lasad_jax.models.tokenizer_config import VQ8, VQ16, TokenizerConfig

FORMATS = Path(__file__).parent / "formats"
SMALL = TokenizerConfig(
    channels=1,
    width=32,
    multipliers=(1, 2),
    encoder_blocks=1,
    decoder_blocks=2,
    latent_channels=12,
    codebook_size=40,
    codebook_dim=5,
)
CONFIGS = [
    SMALL,
    dataclasses.replace(SMALL, channels=3, multipliers=(2, 1, 1), encoder_blocks=3),
    dataclasses.replace(SMALL, multipliers=(1,), codebook_size=5, codebook_dim=40),
]


@pytest.fixture(scope="module")
def model():
    return random_tokenizer(SMALL, 0)


def assert_same_params(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize(("config", "name"), [(VQ16, "vq16"), (VQ8, "vq8")])
def test_names_and_shapes_are_those_of_llamagen(config, name, tmp_path):
    listed = json.loads((FORMATS / f"llamagen_{name}.json").read_text())
    with torch.device("meta"):
        reference = Tokenizer(config).state_dict()
    assert {key: list(value.shape) for key, value in reference.items()} == listed
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract_tokenizer(config))
    save_tokenizer(tmp_path / "x.safetensors", config, params)
    with safetensors.safe_open(tmp_path / "x.safetensors", "numpy") as file:
        written = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        assert not file.get_tensor("quantize.codebook_used").any()
    assert written == listed


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state},
        lambda state: {"model": {"x": torch.zeros(1)}, "ema": state, "steps": 7},
        lambda state: {"model": state, "args": argparse.Namespace(lr=1e-4)},
    ],
)
def test_a_torch_file_and_its_safetensors_are_one_tokenizer(tmp_path, config, wrap):
    reference = random_tokenizer(config, 1)
    torch.save(wrap(reference.state_dict()), tmp_path / "a.pt")
    got, params = load_tokenizer(tmp_path / "a.pt")
    assert got == config
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))
    bfloat16 = dataclasses.replace(config, dtype="bfloat16")
    save_tokenizer(tmp_path / "new" / "a.safetensors", bfloat16, params)
    again, params_again = load_tokenizer(str(tmp_path / "new" / "a.safetensors"))
    assert again == bfloat16
    assert_same_params(params_again, params)
    assert fingerprint(again, params_again) == fingerprint(config, params)
    # And it goes back into the reference, every tensor the same.
    written = safetensors.numpy.load_file(tmp_path / "new" / "a.safetensors")
    assert written.keys() == reference.state_dict().keys()
    for name, tensor in reference.state_dict().items():
        np.testing.assert_array_equal(written[name], tensor.numpy(), err_msg=name)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.safetensors"]


def test_a_tokenizer_saved_again_gives_the_same_bytes(tmp_path):
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract_tokenizer(SMALL))
    contents = set()
    for _ in range(8):
        save_tokenizer(tmp_path / "a.safetensors", SMALL, params)
        contents.add((tmp_path / "a.safetensors").read_bytes())
    assert len(contents) == 1


def test_safetensors_without_metadata_and_without_the_counting_buffer_are_read(tmp_path, model):
    state = {name: x.numpy() for name, x in model.state_dict().items()}
    del state["quantize.codebook_used"]
    safetensors.numpy.save_file(state, tmp_path / "a.safetensors")
    config, params = load_tokenizer(tmp_path / "a.safetensors")
    assert config == SMALL
    embedding = model.state_dict()["quantize.embedding.weight"].numpy()
    np.testing.assert_array_equal(params["quantize"]["embedding"], embedding)


def test_fingerprint_tells_tokenizers_apart():
    params = init_tokenizer(SMALL, jax.random.key(0))
    first = fingerprint(SMALL, params)
    assert len(first) == 16 and int(first, 16) >= 0
    assert fingerprint(SMALL, jax.tree.map(np.asarray, params)) == first
    assert fingerprint(dataclasses.replace(SMALL, dtype="float16"), params) == first
    leaves, tree = jax.tree.flatten(params)
    for place in (0, len(leaves) // 2, len(leaves) - 1):
        changed = list(leaves)
        changed[place] = changed[place] + (np.arange(changed[place].size) == 0).reshape(
            changed[place].shape
        )
        assert fingerprint(SMALL, jax.tree.unflatten(tree, changed)) != first
    assert fingerprint(SMALL, init_tokenizer(SMALL, jax.random.key(1))) != first


def test_fingerprint_does_not_change_between_versions():
    ramp = lambda x: np.arange(x.size, dtype=np.float32).reshape(x.shape)
    params = jax.tree.map(ramp, abstract_tokenizer(SMALL))
    assert fingerprint(SMALL, params) == "e25e9a0b6aaad3d1"


# Refusals


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.mid.1.q.bias": None}, r"1 tensors .*encoder\.mid\.1\.q\.bias is missing"),
        ({"loss.scale": (2,)}, r"1 tensors .*loss\.scale is extra"),
        ({"decoder.conv_out.bias": (2,)}, r"decoder\.conv_out\.bias has shape \(2,\).*\(1,\)"),
        (
            {"quant_conv.weight": (5, 12, 1), "quant_conv.bias": None, "x": (1,)},
            r"3 tensors .*quant_conv\.bias is missing; x is extra; quant_conv\.weight has shape",
        ),
        ({"encoder.conv_in.weight": None}, r"encoder\.conv_in\.weight is missing"),
        ({"quantize.embedding.weight": (40,)}, r"embedding\.weight has shape \(40,\), not 2 axes"),
        ({"encoder.conv_blocks.0.res.0.conv1.weight": None}, r"0\.res\.0\.conv1\.weight is miss"),
        ({"encoder.conv_in.weight": (33, 1, 3, 3)}, r"model\.width: 33"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, model, kind, change, message):
    state = dict(model.state_dict())
    for name, shape in change.items():
        state.pop(name, None)
        if shape is not None:
            state[name] = torch.zeros(shape)
    path = tmp_path / f"a.{kind}"
    if kind == "pt":
        torch.save({"model": state}, path)
    else:
        safetensors.numpy.save_file({name: x.numpy() for name, x in state.items()}, path)
    with pytest.raises(ValueError, match=rf"^tokenizer: .*{message}"):
        load_tokenizer(path)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize(
    "spoil", [lambda x: x[:-99], lambda x: x[:100], lambda x: b"", lambda x: b"plain words"]
)
def test_spoiled_files_are_refused_by_name(tmp_path, model, kind, spoil):
    path = tmp_path / f"a.{kind}"
    if kind == "pt":
        torch.save({"model": model.state_dict()}, path)
    else:
        safetensors.numpy.save_file({"x": np.zeros(100, np.float32)}, path)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"tokenizer: .*a\.{kind} cannot be read.*fetch"):
        load_tokenizer(path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"model": {"lr": 0.1}}, {"a": "b"}, None])
def test_torch_files_without_tensors_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt cannot .*it holds no state dict"):
        load_tokenizer(tmp_path / "a.pt")


def test_torch_files_with_code_are_refused(tmp_path):
    torch.save({"model": Path("x")}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt cannot be read"):
        load_tokenizer(tmp_path / "a.pt")


@pytest.mark.parametrize("config", ["{", "[]", "{}", '{"multipliers": [1], "depth": 3}'])
def test_metadata_that_is_no_configuration_is_refused(tmp_path, config):
    tensors = {"x": np.zeros(1, np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors", {"config": config})
    with pytest.raises(ValueError, match=r"metadata of .*a\.safetensors holds no configuration"):
        load_tokenizer(tmp_path / "a.safetensors")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*a\.pt"):
        load_tokenizer(tmp_path / "a.pt")


def test_without_torch_only_torch_files_are_refused(tmp_path, model, monkeypatch):
    torch.save(model.state_dict(), tmp_path / "a.pt")
    save_tokenizer(tmp_path / "a.safetensors", *load_tokenizer(tmp_path / "a.pt"))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"a\.pt is a torch file.*safetensors file needs none"):
        load_tokenizer(tmp_path / "a.pt")
    assert load_tokenizer(tmp_path / "a.safetensors")[0] == SMALL


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    params = init_tokenizer(SMALL, jax.random.key(0))
    save_tokenizer(path, SMALL, params)
    before = path.read_bytes()

    def fail(tensors, target, metadata):
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_tokenizer(path, SMALL, init_tokenizer(SMALL, jax.random.key(1)))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_saving_refuses_other_endings_and_other_parameters(tmp_path):
    params = init_tokenizer(SMALL, jax.random.key(0))
    with pytest.raises(ValueError, match=r"a\.pt must end in \.safetensors"):
        save_tokenizer(tmp_path / "a.pt", SMALL, params)
    with pytest.raises(ValueError, match=r"has shape"):
        save_tokenizer(
            tmp_path / "a.safetensors", dataclasses.replace(SMALL, codebook_size=41), params
        )
    assert not list(tmp_path.iterdir())
