"""The export command, and what it writes at work without this library."""

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exporting import make_export, same, write
from flax import linen as nn
from processes import command, run
from tiny import ROOT, one_device_mesh, tiny_config
from torch_tokenizer import SMALL

from lasad_jax.interop.generator_files import load_generator
from lasad_jax.interop.model_card import model_card
from lasad_jax.interop.verification import Verification
from lasad_jax.training.checkpoints import Checkpoints, store_config
from lasad_jax.training.sharding import RULES
from lasad_jax.training.state import init_state

ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "flax", "lasad_jax", "transformers"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Refuse())
sys.path[:] = [path for path in sys.path if path != %r]
%s
print(tuple(codes.shape), tuple(images.shape), images.dtype)
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of which the average is another than the parameters."""
    workdir = tmp_path_factory.mktemp("run")
    config = tiny_config()
    mesh = one_device_mesh(config)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        state = init_state(config, mesh)
    noise = lambda x, by: x + by * jax.random.normal(jax.random.key(x.size), x.shape)
    params = jax.tree.map(lambda x: noise(x, 0.3), state.params)
    ema = jax.tree.map(lambda x: noise(x, 0.2), state.params)
    checkpoints = Checkpoints(workdir)
    checkpoints.save(state.replace(params=params, ema=ema), 5, held_out_loss=1.0)
    checkpoints.close()
    store_config(config, workdir)
    (workdir / "classes.json").write_text(json.dumps([f"digit {i}" for i in range(10)]))
    return workdir, jax.device_get(params), jax.device_get(ema)


def test_export_command_and_what_it_writes_alone(workdir, tmp_path):
    workdir, params, ema = workdir
    out = tmp_path / "made" / "here"
    export = (f"--workdir={workdir}", f"--out={out}")
    said = command("export", *export)
    assert re.search(r"step 5 as float32: .*differ by at most \d.*; 128 codes drawn alike", said)
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_lasadgen.py",
        "transformers_lasadgen.py",
    }
    same(load_generator(out)[1], ema)
    assert json.loads((out / "config.json").read_text())["id2label"]["7"] == "digit 7"

    card = (out / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    (alone,) = (block for block in blocks if "from modeling_lasadgen" in block)
    said = run([sys.executable, "-c", ALONE % (str(ROOT), alone + blocks[-1])], cwd=out)
    assert said.split("\n")[0] == "(3, 64) (3, 8, 8) torch.uint8"

    changes = ("--force", "--raw", "--dtype=bfloat16", "--noverify", "--shard_gb=1e-5")
    said = command("export", *export, *changes)
    assert "step 5 as bfloat16" in said and "verified: no" in said
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    kernel = load_generator(out)[1]["head"]["kernel"]
    np.testing.assert_array_equal(kernel, params["head"]["kernel"].astype(jnp.bfloat16))
    assert list(out.parent.iterdir()) == [out]


def test_cards_name_what_was_exported():
    card = model_card("mine", make_export(), Verification(2.3e-6, 40))
    assert "# mine\n" in card and "decay `raster`, content gate, 2D RoPE, local convolution" in card
    assert "differ by at most 2e-06; 40 codes" in card and "{" not in card.replace("{\n", "")
    softmax = make_export(mixer="softmax", tokenizer=(SMALL, None))
    card = model_card("x", dataclasses.replace(softmax, class_names=None), None)
    assert "softmax attention" in card and "| verified | no |" in card
    assert f"(len(codes), {SMALL.codebook_dim}, 4, 5)" in card and "grey" not in card


AUTO = """
import sys
# PyPI's is built for CUDA and cannot be imported beside a torch that is not.
sys.modules["torchvision"] = None
import torch
from transformers import AutoModel, logging

logging.disable_progress_bar()
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    sys.path.insert(0, folder)
    from modeling_lasadgen import LASADGen

    auto = AutoModel.from_pretrained(folder, trust_remote_code=True)
    plain = LASADGen.from_pretrained(folder)
    assert isinstance(auto.model, torch.nn.Module) and not auto.training
    for name, parameter in plain.named_parameters():
        found = auto.model.get_parameter(name)
        assert found.dtype == parameter.dtype and torch.equal(found, parameter), name
    codes, labels = torch.arange(40).reshape(2, 20) % 11, torch.tensor([1, 3])
    assert torch.equal(auto(codes, labels), plain(codes, labels))
    draw = lambda model, **options: model.generate(
        labels, generator=torch.Generator().manual_seed(0), **options
    )
    assert torch.equal(draw(auto), draw(plain))
    assert torch.equal(draw(auto, top_k=3), draw(plain, top_k=3))
    assert not torch.equal(draw(auto, top_k=3), draw(plain))
    print(auto.config.id2label[2], auto.generation_config.guidance_scale)
"""


def test_transformers_loads_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    whole = write(tmp_path / "a.b-c", make_export())
    half = make_export(dtype="bfloat16", decay="manhattan", selective=False)
    parts = write(tmp_path / "parts", half, shard_bytes=3000)
    said = run([sys.executable, "-c", AUTO, str(whole), str(parts)], cwd=tmp_path)
    assert said.count("class 2 1.5") == 2
