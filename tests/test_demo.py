"""Drawing from exported folders, of which the demo's is one that comes with the library."""

import json
import re
import tomllib
from importlib import resources

import numpy as np
import pytest
import torch
from exporting import make_export, write
from PIL import Image
from processes import call, command, run
from tiny import ROOT

from lasad_jax.interop.export_folder import read_export
from lasad_jax.interop.modeling_lasadgen import LASADGen
from lasad_jax.models import count_parameters

DEMO = resources.files("lasad_jax") / "demo"


def test_an_exported_folder_is_drawn_as_pytorch_draws_it(tmp_path, monkeypatch):
    """The likeliest codes, guided as the folder says, as many of each class as make about 100."""
    folder = write(tmp_path / "exported", make_export(seed=1, vocab_size=16, grid=(3, 5)))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "here").mkdir()
    flags = (f"--folder={folder}", "--temperature=0", "--batch_size=40")
    said = run(call("sample", *flags), cwd=tmp_path / "here")
    assert "99 images of exported: exported.png, exported.npz" in said

    codes = LASADGen.from_pretrained(folder).generate(torch.arange(3), temperature=0).numpy()
    assert len(np.unique(codes, axis=0)) == 3
    with np.load(tmp_path / "here" / "exported.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    np.testing.assert_array_equal(np.bincount(labels), [33, 33, 33])
    np.testing.assert_array_equal(images, (codes * 17).reshape(3, 3, 5, 1)[labels])
    assert Image.open(tmp_path / "here" / "exported.png").size > (300, 300)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num=3", "workdir: nothing given to draw from; name one of --workdir=RUN, --folder"),
        ("--demo --workdir=runs/a", "workdir: --workdir and --demo given to draw from; name one"),
        ("--folder=nothing", "no file nothing/config.json; export the run again"),
        ("--demo --step=3", "step, raw: an exported folder has one set of parameters"),
    ],
)
def test_bad_requests_are_refused_in_a_line(flags, message):
    assert message in command("sample", *flags.split(), fails=True)


def test_the_demo_is_whole_small_and_installed():
    files = list(DEMO.iterdir())
    assert sum(file.stat().st_size for file in files) <= 20e6
    config, params, tokenizer, class_names = read_export(DEMO)
    model = config.model
    assert (model.mixer, model.decay, model.selective) == ("lasad", "raster", True)
    assert tokenizer is None
    assert (model.grid, model.vocab_size, model.num_classes) == ((24, 24), 8, 13)
    assert len(set(class_names)) == 13
    assert 4e6 < count_parameters(model) < 6e6
    # Zero before training.
    assert np.abs(params["head"]["kernel"]).mean() > 1e-3
    stored = json.loads((DEMO / "generation_config.json").read_text())
    assert config.sampling.guidance == stored["guidance_scale"]

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["lasad_jax"]
    needed = ("config.json", "generation_config.json", "model.safetensors")
    assert all(
        any(re.fullmatch(p.replace("*", ".*"), f"demo/{f}") for p in patterns) for f in needed
    )
