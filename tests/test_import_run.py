"""Runs made of exported folders."""

import jax
import numpy as np
import pytest
from exporting import make_export, random_tokenizer, write
from processes import command

from lasad_jax.config import load_config
from lasad_jax.data.tokens import TOKENIZER_FILE, load_class_names
from lasad_jax.interop.generator_files import architecture
from lasad_jax.interop.tokenizer_files import fingerprint
from lasad_jax.training.checkpoints import Checkpoints
from lasad_jax.training.sharding import make_mesh
from lasad_jax.training.state import abstract_state


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_a_run_of_an_export_is_exported_the_same(tmp_path, with_tokenizer):
    tokenizer = random_tokenizer() if with_tokenizer else None
    export = make_export(tokenizer=tokenizer, vocab_size=16, key_dim=4)
    folder, made = write(tmp_path / "exported", export), tmp_path / "runs" / "again"
    said = command("import_run", f"--folder={folder}", f"--out={made}")
    assert "3 classes, 16 codes" in said

    config = load_config(made)
    assert config.sampling == export.config.sampling
    assert architecture(config.model) == architecture(export.config.model)
    assert load_class_names(made) == export.class_names
    expected = ("codes", fingerprint(*tokenizer)) if with_tokenizer else ("digits", "")
    assert (config.data.source, config.data.tokenizer) == expected
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state = Checkpoints(made, read_only=True).restore(0, abstract_state(config, mesh))
    for tree in (state.params, state.ema):
        jax.tree.map(np.testing.assert_array_equal, tree, export.params)

    again = tmp_path / "again"
    command("export", f"--workdir={made}", f"--out={again}", "--noverify")
    names = ["model.safetensors", "config.json", "generation_config.json"]
    for name in names + [TOKENIZER_FILE] * with_tokenizer:
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


def test_what_cannot_be_a_run_leaves_nothing(tmp_path):
    folder = write(tmp_path / "exported", make_export())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    flags = (f"--folder={folder}", f"--out={tmp_path / 'run'}")
    said = command("import_run", *flags, fails=True)
    assert str(weights) in said and "export the run again" in said
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
