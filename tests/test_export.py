"""Export to PyTorch: the same logits and codes, exact files, refusals."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from exporting import VARIANTS, make_export, random_codes, random_tokenizer, same, write
from flax.traverse_util import flatten_dict
from test_models import tiny_model

from lasad_jax.files import whole_folder
from lasad_jax.interop.export_folder import check_target
from lasad_jax.interop.generator_files import architecture, layout, load_generator, read_config
from lasad_jax.interop.modeling_lasadgen import LASADGen as TorchLASADGen
from lasad_jax.interop.tokenizer_files import load_tokenizer
from lasad_jax.interop.verification import verify
from lasad_jax.models import LASADGen

SOME = [VARIANTS[0], VARIANTS[6], VARIANTS[8]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    export = make_export()
    return export, write(tmp_path_factory.mktemp("export") / "out", export)


# Both frameworks


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_pytorch_gives_the_same_logits_and_codes(tmp_path, changes):
    export = make_export(**changes)
    folder = write(tmp_path / "out", export)
    found = verify(folder, export.config.model, export.params, export.config.sampling)
    assert 0 < found.difference < 3e-5
    assert found.codes == 2 * export.config.model.num_tokens


@pytest.mark.parametrize("changes", SOME[:1], ids=str)
def test_logits_of_the_full_pass_without_the_verification(tmp_path, changes):
    config, variables, tokens, labels = tiny_model(1, **changes)
    folder = write(tmp_path / "out", make_export(1, **changes))
    expected = jax.jit(LASADGen(config).apply)(variables, tokens, labels)
    with torch.no_grad():
        got = TorchLASADGen.from_pretrained(folder)(
            torch.from_numpy(tokens), torch.from_numpy(labels)
        )
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_verification_notices_what_differs(tmp_path, exported):
    export, _ = exported
    model, params = export.config.model, export.params
    check = lambda folder, params: verify(folder, model, params, export.config.sampling)
    folder = write(tmp_path / "out", export)
    other = dict(params, head={"kernel": params["head"]["kernel"] + 1e-3})
    with pytest.raises(ValueError, match="verify: head/kernel was not stored as it is"):
        check(folder, other)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope": False}))
    with pytest.raises(ValueError, match=r"verify: PyTorch's logits differ by [\d.]+, more than"):
        check(folder, params)


def test_verification_notices_other_codes(exported):
    """Of the same logits, under a guidance that the folder does not know of."""
    export, folder = exported
    sampling = dataclasses.replace(export.config.sampling, guidance=9.0)
    with pytest.raises(ValueError, match=r"verify: PyTorch draws another code number \d+"):
        verify(folder, export.config.model, export.params, sampling)


# Files


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("shard_bytes", [10**9, 3000])
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, changes, shard_bytes):
    export = make_export(**changes)
    folder = write(tmp_path / "out", export, shard_bytes)
    config, params = load_generator(folder)
    for name in architecture(config):
        assert getattr(config, name) == getattr(export.config.model, name), name
    same(params, export.params)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if shard_bytes > 3000:
        assert files == ["model.safetensors"]
    else:
        num = len(files)
        assert files == [f"model-{i + 1:05}-of-{num:05}.safetensors" for i in range(num)]
        assert num > 3
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 4 * sum(x.size for x in jax.tree.leaves(params))
    state = TorchLASADGen.from_pretrained(folder).state_dict()
    assert {name: tuple(x.shape) for name, x in state.items()} == {
        name: place.torch_shape for name, place in layout(config).items()
    }


def test_bfloat16_rounds_matrices_only(tmp_path):
    export = make_export(dtype="bfloat16", decay="manhattan", selective=False)
    folder = write(tmp_path / "out", export)
    _, params = load_generator(folder)
    for keys, x in flatten_dict(params).items():
        exact = flatten_dict(export.params)[keys]
        if keys[-1] in ("kernel", "embedding"):
            exact = np.asarray(exact.astype(jnp.bfloat16), np.float32)
        np.testing.assert_array_equal(x, exact)
    model = TorchLASADGen.from_pretrained(folder)
    assert model.head.weight.dtype == model.blocks[0].conv.weight.dtype == torch.bfloat16
    assert model.blocks[0].mixer.row_rate.dtype == model.final_norm.weight.dtype == torch.float32
    assert verify(folder, export.config.model, export.params, export.config.sampling).difference


def test_sizes_that_are_not_the_default_are_kept(tmp_path):
    export = make_export(ffn_width=40, key_dim=4)
    model = read_config(write(tmp_path / "out", export))
    assert (model.ffn_width, model.key_dim) == (40, 4)
    default = make_export(ffn_width=0, key_dim=8)
    assert read_config(write(tmp_path / "other", default)).key_dim == 0


def test_defaults_of_sampling_come_with_the_model(exported):
    export, folder = exported
    model = TorchLASADGen.from_pretrained(folder)
    theirs = dataclasses.asdict(model.sampling)
    assert theirs.pop("guidance_scale") == export.config.sampling.guidance
    assert theirs.items() < dataclasses.asdict(export.config.sampling).items()


def test_dtype_of_loading(exported):
    _, folder = exported
    model = TorchLASADGen.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.head.weight.dtype == torch.bfloat16
    assert model.blocks[1].mixer.decay_gate.bias.dtype == torch.float32
    assert model(*random_codes(model)).isfinite().all()


def test_the_tokenizer_comes_along(tmp_path):
    tokenizer = random_tokenizer()
    folder = write(tmp_path / "out", make_export(tokenizer=tokenizer))
    config, read = load_tokenizer(folder / "tokenizer.safetensors")
    assert config == tokenizer[0]
    same(read, tokenizer[1])


# Refusals


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def change_config(folder, **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "ours", "theirs"),
    [
        (
            lambda f: change_tensors(f, lambda x: x.pop("blocks.1.ffn.up.weight")),
            r"generator: 1 tensors of .*: blocks\.1\.ffn\.up\.weight is missing",
            r"1 tensors do not fit config\.json: blocks\.1\.ffn\.up\.weight is missing",
        ),
        (
            lambda f: change_tensors(f, lambda x: x.update(y=np.zeros(2, np.float32))),
            "1 tensors of .*: y is extra",
            "1 tensors do not fit .*: y is unknown",
        ),
        (
            lambda f: change_config(f, num_layers=3),
            r"\d+ tensors of .*: blocks\.2\..* is missing",
            r"\d+ tensors do not fit .*: blocks\.2\..* is missing",
        ),
        (
            lambda f: change_config(f, vocab_size=12),
            r"2 tensors of .* has shape \(11, 16\), expected \(12, 16\)",
            r"2 tensors do not fit .* has shape \(11, 16\), expected \(12, 16\)",
        ),
        (
            lambda f: change_config(f, width=None),
            r"config\.json describes no generator \(width missing\)",
            "config: width missing",
        ),
        (
            lambda f: truncate(f / "model.safetensors"),
            r"generator: .*model\.safetensors cannot be read as tensors",
            r"model\.safetensors is damaged",
        ),
        (
            lambda f: (f / "model.safetensors").unlink(),
            r"generator: there is no file .*model\.safetensors; export",
            r"model\.safetensors is missing",
        ),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, spoil, ours, theirs):
    folder = write(tmp_path / "out", make_export())
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=ours):
        load_generator(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=theirs):
        TorchLASADGen.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is not 'lasadgen'"),
        ({"decay": "exponential"}, r"describes no generator \(model.decay: 'exponential'"),
        ({"grid": 4}, "describes no generator"),
        ({"width": "16"}, "describes no generator"),
    ],
)
def test_configurations_of_nothing_are_refused(tmp_path, changes, message):
    folder = write(tmp_path / "out", make_export())
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        read_config(folder)


def test_a_missing_part_is_named(tmp_path):
    folder = write(tmp_path / "out", make_export(), shard_bytes=3000)
    (part,) = folder.glob("model-00002-of-*.safetensors")
    part.unlink()
    for load in (load_generator, TorchLASADGen.from_pretrained):
        with pytest.raises(FileNotFoundError, match="model-00002-of-"):
            load(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"index\.json is no index of tensors"):
        load_generator(folder)


def test_other_parameters_than_the_configurations_are_refused(tmp_path):
    export = make_export()
    export.params["head"]["kernel"] = export.params["head"]["kernel"][:, 1:]
    with pytest.raises(ValueError, match=r"params: 1 tensors .*head/kernel has shape \(16, 10\)"):
        write(tmp_path / "out", export)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "a" / "out"
    with pytest.raises(KeyError), whole_folder(out) as folder:
        (folder / "x").write_text("half")
        raise KeyError
    assert not list(out.parent.iterdir())
    with whole_folder(out) as folder:
        (folder / "x").write_text("one")
        assert not out.exists()
    with pytest.raises(OSError), whole_folder(out) as folder:
        (folder / "x").write_text("two")
    assert (out / "x").read_text() == "one"
    with whole_folder(out, replace=True) as folder:
        (folder / "y").write_text("three")
    assert [path.name for path in out.iterdir()] == ["y"]
    assert list(out.parent.iterdir()) == [out]


def test_only_exports_are_replaced(tmp_path, exported):
    check_target(tmp_path / "new", force=False)
    check_target(tmp_path, force=False)  # empty
    _, folder = exported
    with pytest.raises(FileExistsError, match=r"out: .* exists; .*--force"):
        check_target(folder, force=False)
    check_target(folder, force=True)
    (tmp_path / "config.json").write_text('{"kind": "generator"}')
    with pytest.raises(ValueError, match="no earlier export"):
        check_target(tmp_path, force=True)
    with pytest.raises(ValueError, match="no earlier export"):
        check_target(tmp_path / "config.json", force=True)
